//go:build conformance

package conformance_test

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
)

// The judge is judged first, without a broker: what it counts is what happened,
// and it takes a refresh token that it sees twice for a theft.
func TestServer(t *testing.T) {
	t.Parallel()
	s := startServer(t, time.Hour, machine("m", nil), personal("p"))

	ask := func(client string, form url.Values) (answer struct {
		Access  string `json:"access_token"`
		Refresh string `json:"refresh_token"`
		Error   string
	}) {
		t.Helper()
		if body := s.post("/token", client, form); json.Unmarshal(body, &answer) != nil {
			t.Fatalf("the token endpoint answers %s", body)
		}
		return answer
	}

	token := ask("m", url.Values{"grant_type": {"client_credentials"}, "scope": {"read"}, "colour": {"blue"}})
	if c := s.want("m", 1)[0]; c.Status != http.StatusOK || c.Authentication != "client_secret_basic" || c.Grant != "client_credentials" ||
		c.Scope != "read" || c.Extra["colour"] != "blue" || c.Access != tokenID(token.Access) {
		t.Errorf("the server tells of client credentials: %v", c)
	}
	if i := s.introspect(token.Access); !i.Active || i.ClientID != "m" || i.Scope != "read" {
		t.Errorf("the server says of its token: %+v", i)
	}

	verifier := strings.Repeat("verifier", 6)
	challenge := sha256.Sum256([]byte(verifier))
	back := s.signIn(s.http+"/auth?"+url.Values{
		"response_type": {"code"}, "client_id": {"p"}, "redirect_uri": {redirectURL + "p"}, "state": {"s"}, "prompt": {"consent"},
		"scope": {"openid offline_access"}, "code_challenge": {base64.RawURLEncoding.EncodeToString(challenge[:])}, "code_challenge_method": {"S256"},
	}.Encode(), "alice")
	if back.Get("state") != "s" || back.Get("iss") != s.http {
		t.Fatalf("came back with %v", back)
	}
	first := ask("p", url.Values{
		"grant_type": {"authorization_code"}, "code": {back.Get("code")}, "redirect_uri": {redirectURL + "p"}, "code_verifier": {verifier},
	})
	refresh := url.Values{"grant_type": {"refresh_token"}, "refresh_token": {first.Refresh}}
	second := ask("p", refresh)
	again := ask("p", refresh)
	calls := s.want("p", 3)
	if calls[1].Presented != calls[0].Refresh || calls[1].Refresh == calls[0].Refresh || calls[1].Revoked {
		t.Errorf("the server tells of a refresh: %v", calls[1])
	}
	if again.Error != "invalid_grant" || calls[2].Error != "invalid_grant" || !calls[2].Revoked {
		t.Errorf("the same refresh token once more: %v", calls[2])
	}
	if i := s.introspect(second.Access); i.Active {
		t.Error("the consent outlived the theft of its refresh token")
	}
}

// tokenID is what the broker calls the id of a token.
func tokenID(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])[:16]
}
