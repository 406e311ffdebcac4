package oauth_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// described is what is shown of an error_description.
func described(t *testing.T, description string, asked oauth.TokenRequest, change ...func(*oauth.ProfileConfig)) string {
	t.Helper()
	body, err := json.Marshal(map[string]string{"error": "invalid_request", "error_description": description})
	if err != nil {
		t.Fatal(err)
	}
	grant, issueErr := clientFor(t, serve(t, reply{status: 400, body: string(body)}), change...).RequestToken(t.Context(), asked)
	e := failure(t, grant, issueErr)
	_, said, _ := strings.Cut(e.Text, "invalid_request")
	return strings.TrimPrefix(said, ": ")
}

func TestDescriptionsAreShown(t *testing.T) {
	for description, want := range map[string]string{
		"":                               "",
		"invalid_username_or_password":   `"invalid_username_or_password"`,
		"  one\r\n\ttwo  ":               `"one two"`,
		"bell\a, esc\x1b[31m, é, \u202e": `"bell , esc [31m, ?, ?"`,
		`say "hello"`:                    `"say 'hello'"`,
		strings.Repeat("long ", 100):     `"` + strings.Repeat("long ", 39) + `lo..."`,
		"Trace ID: 0b1c2d3e-0000-4000-8000-00000000cafe": `"Trace ID: 0b1c2d3e-0000-4000-8000-00000000cafe"`,
		"got eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiIxIn0.c2ln":  `"got [redacted]"`,
		"token 8f14e45fceea167a5a36dedd4bea2543 expired": `"token [redacted] expired"`,
		"key " + strings.Repeat("lowercase", 10):         `"key [redacted]"`,
	} {
		if got := described(t, description, ask(broker.ClientCredentials)); got != want {
			t.Errorf("%q is shown as %s, want %s", description, got, want)
		}
	}
}

func TestNoSpellingOfASecretIsShown(t *testing.T) {
	const password, code = "päss wörd+&", "c0de/with=signs"
	asked := ask(broker.Password)
	asked.Secrets = map[string]broker.Secret{"password": broker.NewSecret(password), "code": broker.NewSecret(code), "pin": broker.NewSecret("0 7")}
	for _, secret := range []string{canary, password, code, "0 7"} {
		for name, spelling := range map[string]string{
			"itself":          secret,
			"in a form":       url.QueryEscape(secret),
			"in a path":       url.PathEscape(secret),
			"in lower case":   strings.ToLower(url.QueryEscape(secret)),
			"in base64":       base64.StdEncoding.EncodeToString([]byte(secret)),
			"in base64url":    base64.RawURLEncoding.EncodeToString([]byte(secret)),
			"in part":         secret[:max(len(secret)-3, 3)],
			"in upper case":   strings.ToUpper(secret),
			"in another form": strings.ReplaceAll(url.QueryEscape(secret), "+", "%20"),
		} {
			got := described(t, "was ( "+spelling+" ) ok", asked)
			if !strings.HasPrefix(got, `"was ( [redacted]`) || strings.Count(got, "redacted") != 1 {
				t.Errorf("%s: %q is shown as %s", name, spelling, got)
			}
		}
	}
}

func TestTheAuthorizationHeaderIsNotShown(t *testing.T) {
	half := strings.ReplaceAll(url.QueryEscape(canary), "+", "%20")
	sent := base64.StdEncoding.EncodeToString([]byte("tester:" + half))
	if got := described(t, "Basic "+sent, ask(broker.ClientCredentials), basic); got != `"Basic [redacted]"` {
		t.Errorf("the header is shown as %s", got)
	}
}

func TestAQueryIsNotShown(t *testing.T) {
	for _, answer := range []reply{{status: 404}, {status: 302}, oauthError(400, "invalid_client")} {
		grant, err := request(t, clientFor(t, serve(t, answer)+"?key=secret-value"))
		failure(t, grant, err)
	}
	grant, err := request(t, clientFor(t, "http://127.0.0.1:1/token?key=secret-value"))
	failure(t, grant, err)
}

// What does not even speak HTTP can repeat a secret too: net/http quotes it.
func TestErrorsOfTheHTTPClientShowNoSecret(t *testing.T) {
	for _, raw := range []string{
		"%s\r\n\r\n", "HTTP/1.1 %s\r\n\r\n", "HTTP/1.1 200 OK\r\n%s\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: %s\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: %s\r\n\r\n",
	} {
		address := serveConn(t, func(c net.Conn, _ *http.Request) { fmt.Fprintf(c, raw, canary) })
		bothWays(t, func(t *testing.T, asked oauth.TokenRequest) {
			grant, err := clientFor(t, address).RequestToken(t.Context(), asked)
			wantKind(t, failure(t, grant, err), broker.Ambiguous, "broke the connection off")
		})
	}
}
