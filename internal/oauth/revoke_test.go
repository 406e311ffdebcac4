package oauth_test

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

func revoking(address string) func(*oauth.ProfileConfig) {
	return func(c *oauth.ProfileConfig) { c.RevocationURL = strings.TrimSuffix(address, "/token") + "/revoke?x=1" }
}

// revoke asks the server at address to forget a token.
func revoke(t *testing.T, address string, change ...func(*oauth.ProfileConfig)) error {
	t.Helper()
	client := clientFor(t, "https://nosuch.invalid/token", append(change, revoking(address))...)
	return client.Revoke(t.Context(), broker.NewSecret("token-"+canary), broker.RefreshToken, broker.NewSecret(canary))
}

func TestRevocationOnTheWire(t *testing.T) {
	var seen string
	address := serve(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		r.ParseForm()
		_, _, hasBasic := r.BasicAuth()
		seen = fmt.Sprint(r.Method, " ", r.RequestURI, " ", r.Header.Get("Content-Type"), " ", hasBasic, " ", r.PostForm)
	}))
	const to = "POST /revoke?x=1 application/x-www-form-urlencoded "
	token := "token:[token-" + canary + "] token_type_hint:[refresh_token]]"
	for want, style := range map[string]func(*oauth.ProfileConfig){
		to + "false map[client_id:[tester] client_secret:[" + canary + "] " + token: func(*oauth.ProfileConfig) {},
		to + "true map[" + token: basic,
	} {
		if err := revoke(t, address, style); err != nil || seen != want {
			t.Errorf("the server saw %s, want %s (error %v)", seen, want, err)
		}
	}
}

// Success is told by the status alone (RFC 7009 section 2.2).
func TestRevoked(t *testing.T) {
	for name, answer := range map[string]reply{
		"200":             {},
		"200 with JSON":   {body: `{"ok":true}`},
		"200 with words":  {body: "done"},
		"200 with a list": {body: `[]`},
		"204":             {status: http.StatusNoContent},
	} {
		if err := revoke(t, serve(t, answer)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestNotRevoked(t *testing.T) {
	wait := map[string]string{"Retry-After": "30"}
	for name, tc := range map[string]struct {
		answer  reply
		kind    broker.IssueErrorKind
		outcome broker.Outcome
		words   string
	}{
		"refused client":     {oauthError(401, "invalid_client"), broker.ClientRejected, broker.Answered, "answered 401 invalid_client"},
		"IdentityServer":     {oauthError(400, "invalid_client"), broker.ClientRejected, broker.Answered, "answered 400 invalid_client"},
		"kind of token":      {oauthError(400, "unsupported_token_type"), broker.RequestRejected, broker.Answered, "answered 400 unsupported_token_type"},
		"busy":               {reply{status: 503, header: wait}, broker.Throttled, broker.Answered, "it asks to wait 30s"},
		"throttled":          {reply{status: 429, header: wait}, broker.Throttled, broker.Answered, "it asks to wait 30s"},
		"down":               {reply{status: 503}, broker.Unavailable, broker.Answered, "answered 503"},
		"gateway":            {reply{status: 504, body: "<html>"}, broker.Unavailable, broker.OutcomeUnknown, "answered 504 with an HTML page"},
		"no such endpoint":   {reply{status: 404}, broker.Unavailable, broker.Answered, "check that the URL is that of a revocation endpoint"},
		"no such method":     {reply{status: 405}, broker.Unavailable, broker.Answered, "check that the URL is that of a revocation endpoint"},
		"a page":             {reply{body: "<html>sign in"}, broker.Malformed, broker.OutcomeUnknown, "answered 200 with an HTML page, probably from a gateway"},
		"200 with a verdict": {oauthError(200, "invalid_client"), broker.ClientRejected, broker.Answered, "answered 200 invalid_client"},
		"a redirect":         {reply{status: 302, header: map[string]string{"Location": "/?" + canary}}, broker.Malformed, broker.Answered, "not followed"},
		"echo":               {reply{status: 400, body: `{"error":"invalid_request","error_description":"what is token-c@nary+&%=: and secret-value"}`}, broker.RequestRejected, broker.Answered, "invalid_request"},
	} {
		t.Run(name, func(t *testing.T) {
			e := failure(t, nil, revoke(t, serve(t, tc.answer)))
			wantKind(t, e, tc.kind, "revocation endpoint http://127.0.0.1:", tc.words)
			wantOutcome(t, e, tc.outcome)
			if tc.answer.header["Retry-After"] != "" && e.RetryAfter != 30*time.Second {
				t.Errorf("RetryAfter is %s", e.RetryAfter)
			}
			if strings.Contains(e.Text, "c@nary") {
				t.Errorf("the token is shown: %s", e.Text)
			}
		})
	}
}

func TestRevocationWithoutAnAnswer(t *testing.T) {
	e := failure(t, nil, revoke(t, serveConn(t, func(c net.Conn, _ *http.Request) { hold(c) }), timeout(200*time.Millisecond)))
	wantKind(t, e, broker.Ambiguous, "did not answer within 200ms")
	wantOutcome(t, e, broker.OutcomeUnknown)

	e = failure(t, nil, revoke(t, "http://127.0.0.1:1/token"))
	wantKind(t, e, broker.Unavailable, "revocation endpoint http://127.0.0.1:1/revoke was not reached: nothing listens at 127.0.0.1:1")
	wantOutcome(t, e, broker.Unsent)
}

func TestAServerThatHasNoRevocationEndpoint(t *testing.T) {
	err := clientFor(t, "https://nosuch.invalid/token").Revoke(t.Context(), broker.NewSecret(canary), broker.AccessToken, broker.NewSecret(canary))
	e := failure(t, nil, err)
	wantKind(t, e, broker.RequestRejected, "cannot be revoked: no revocation endpoint is known beside the token endpoint https://nosuch.invalid/token")
	wantOutcome(t, e, broker.Unsent)
	if !errors.As(err, &e) {
		t.Error("unreachable")
	}
}
