package sandbox_test

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

func TestAuthorizationCode(t *testing.T) {
	for name, path := range map[string]string{
		"plain":           authorizeURL(),
		"tenant in query": authorizeURL("tenantId", sandbox.DemoTenant),
		"tenant in path":  strings.Replace(authorizeURL(), "/auth2/", "/auth2/"+sandbox.DemoTenant+"/", 1),
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, sandbox.Options{})
			back := r.signIn(path)
			issuer, _, _ := strings.Cut(r.url+path, "/connect/")
			if back.Get("state") != "xyz & more" || back.Get("iss") != issuer {
				t.Errorf("state %q and issuer %q came back", back.Get("state"), back.Get("iss"))
			}
			a := r.exchange(back.Get("code"))
			r.want(a, http.StatusOK, "")
			if got := a.field(t, "scope"); got != offline+" legacy.client" {
				t.Errorf("scope %q", got)
			}
			if a.field(t, "refresh_token") == "" || !strings.Contains(a.body, `"expires_in":86400,"token_type":"Bearer"`) {
				t.Error("the answer is not the documented one")
			}
			access := a.field(t, "access_token")
			r.wantLive(access, true)
			claims := verify(t, r, "/auth2/jwks", a.field(t, "id_token"), "JWT")
			hash := sha256.Sum256([]byte(access))
			for name, want := range map[string]any{
				"aud": "review", "nonce": "n-1", "idp": "local", "email": "reviewer@example.com",
				"tenant_id": sandbox.DemoTenant, "at_hash": base64.RawURLEncoding.EncodeToString(hash[:16]),
			} {
				if claims[name] != want {
					t.Errorf("claim %s: %v, want %v", name, claims[name], want)
				}
			}
			if verify(t, r, "/auth2/jwks", access, "at+jwt")["sub"] != claims["sub"] {
				t.Error("the two tokens have different subjects")
			}
		})
	}
}

// TestFailedExchangeBurnsTheCode tries each failure, and then the right way.
func TestFailedExchangeBurnsTheCode(t *testing.T) {
	for _, test := range []struct {
		name  string
		pairs []string
		code  string
	}{
		{"wrong verifier", []string{"code_verifier", strings.Repeat("x", 43)}, "invalid_grant"},
		{"no verifier", []string{"code_verifier", ""}, "invalid_grant"},
		{"short verifier", []string{"code_verifier", verifier[:42]}, "invalid_grant"},
		{"long verifier", []string{"code_verifier", strings.Repeat("x", 129)}, "invalid_grant"},
		{"other redirect URI", []string{"redirect_uri", callback + "/"}, "invalid_grant"},
		{"no redirect URI", []string{"redirect_uri", ""}, "unauthorized_client"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t, sandbox.Options{})
			code := r.signIn(authorizeURL()).Get("code")
			r.want(r.exchange(code, test.pairs...), http.StatusBadRequest, test.code)
			r.want(r.exchange(code), http.StatusBadRequest, "invalid_grant")
			if got := r.Calls().Codes[id(code)]; got != 2 {
				t.Errorf("the code was presented %d times, want 2", got)
			}
		})
	}
}

// TestRefusedClientDoesNotBurnTheCode: the code is looked at last.
func TestRefusedClientDoesNotBurnTheCode(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	code := r.signIn(authorizeURL()).Get("code")
	r.want(r.exchange(code, "client_secret", "wrong"), http.StatusBadRequest, "invalid_client")
	r.want(r.exchange(code), http.StatusOK, "")
}

func TestBadCodes(t *testing.T) {
	r := newRig(t, sandbox.Options{Clients: []sandbox.Client{
		{ID: "review", GrantTypes: []string{"authorization_code"}, AllowOfflineAccess: true, RedirectURIs: []string{callback}},
		{ID: "other", GrantTypes: []string{"authorization_code"}, RedirectURIs: []string{callback}},
	}})
	r.want(r.exchange(""), http.StatusBadRequest, "invalid_grant")
	r.want(r.exchange("unknown"), http.StatusBadRequest, "invalid_grant")
	r.want(r.exchange(strings.Repeat("x", 101)), http.StatusBadRequest, "invalid_grant")

	code := r.signIn(authorizeURL()).Get("code")
	r.want(r.exchange(code), http.StatusOK, "")
	r.want(r.exchange(code), http.StatusBadRequest, "invalid_grant") // used

	code = r.signIn(authorizeURL()).Get("code")
	r.clock.pass(time.Minute)
	r.want(r.exchange(code), http.StatusOK, "")
	code = r.signIn(authorizeURL()).Get("code")
	r.clock.pass(time.Minute + time.Second)
	r.want(r.exchange(code), http.StatusBadRequest, "invalid_grant") // expired

	code = r.signIn(authorizeURL()).Get("code")
	r.want(r.exchange(code, "client_id", "other", "client_secret", r.ClientSecret("other")),
		http.StatusBadRequest, "invalid_grant") // foreign
}

func TestPKCEIsOptionalOnlyWhereAllowed(t *testing.T) {
	r := newRig(t, sandbox.Options{Clients: []sandbox.Client{{
		ID: "review", GrantTypes: []string{"authorization_code"}, AllowOfflineAccess: true,
		AllowNoPKCE: true, RedirectURIs: []string{callback},
	}}})
	without := authorizeURL("code_challenge", "", "code_challenge_method", "")
	r.want(r.exchange(r.signIn(without).Get("code"), "code_verifier", ""), http.StatusOK, "")
	r.want(r.exchange(r.signIn(without).Get("code")), http.StatusBadRequest, "invalid_grant") // a verifier for nothing
	r.want(r.exchange(r.signIn(authorizeURL()).Get("code"), "code_verifier", ""), http.StatusBadRequest, "invalid_grant")
}

func TestAuthorizeErrorsOnThePage(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	for name, path := range map[string]string{
		"unknown client":       authorizeURL("client_id", "<script>"),
		"no client":            authorizeURL("client_id", ""),
		"no redirect URI":      authorizeURL("redirect_uri", ""),
		"foreign redirect URI": authorizeURL("redirect_uri", "https://evil.example/"),
		"user in redirect URI": authorizeURL("redirect_uri", "http://127.0.0.1:80@evil.example/"),
		"fragment":             authorizeURL("redirect_uri", callback+"#x"),
		"policy injection":     authorizeURL("redirect_uri", "http://127.0.0.1:;script-src/"),
		"unknown tenant":       authorizeURL("tenantId", "x"),
	} {
		t.Run(name, func(t *testing.T) {
			a := r.do(r.request(http.MethodGet, path, "", ""))
			if a.status != http.StatusBadRequest || a.header.Get("Location") != "" || !strings.HasPrefix(a.header.Get("Content-Type"), "text/html") {
				t.Errorf("answer %d, location %q", a.status, a.header.Get("Location"))
			}
			if strings.Contains(a.body, "<script>") {
				t.Error("the page is not escaped")
			}
		})
	}
}

func TestAuthorizeErrorsSentBack(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	for _, test := range []struct {
		name, code string
		pairs      []string
	}{
		{"no response type", "unsupported_response_type", []string{"response_type", ""}},
		{"implicit", "unsupported_response_type", []string{"response_type", "token"}},
		{"response mode", "invalid_request", []string{"response_mode", "fragment"}},
		{"unknown scope", "invalid_scope", []string{"scope", "nonsense"}},
		{"no challenge", "invalid_request", []string{"code_challenge", ""}},
		{"plain", "invalid_request", []string{"code_challenge_method", "plain"}},
		{"no method means plain", "invalid_request", []string{"code_challenge_method", ""}},
		{"short challenge", "invalid_request", []string{"code_challenge", "x"}},
		{"no page wanted", "login_required", []string{"prompt", "none"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := r.do(r.request(http.MethodGet, authorizeURL(test.pairs...), "", ""))
			target, err := url.Parse(a.header.Get("Location"))
			if err != nil || a.status != http.StatusFound {
				t.Fatalf("answer %d, location %q", a.status, a.header.Get("Location"))
			}
			q := target.Query()
			if q.Get("error") != test.code || q.Get("state") != "xyz & more" || q.Get("iss") != r.url+"/auth2" || q.Has("code") {
				t.Errorf("sent back %v, want %s", q, test.code)
			}
		})
	}
}

func TestSignInPage(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	a := r.do(r.request(http.MethodGet, authorizeURL(), "", ""))
	r.want(a, http.StatusOK, "")
	style, _, _ := strings.Cut(a.body[strings.Index(a.body, "<style>")+len("<style>"):], "</style>")
	hash := sha256.Sum256([]byte(style))
	want := "default-src 'none'; base-uri 'none'; frame-ancestors 'none'; style-src 'sha256-" +
		base64.StdEncoding.EncodeToString(hash[:]) + "'; form-action 'self' http://127.0.0.1:9999"
	if got := a.header.Get("Content-Security-Policy"); got != want {
		t.Errorf("policy %q, want %q", got, want)
	}
	if got := a.header.Get("Cache-Control"); !strings.Contains(got, "no-store") {
		t.Errorf("Cache-Control %q", got)
	}
	for _, part := range []string{`<html lang="en">`, `<label for="username">`, `<label for="password">`, `autocomplete="current-password"`} {
		if !strings.Contains(a.body, part) {
			t.Errorf("the page has no %s", part)
		}
	}

	form := url.Values{"username": {`"><script>`}, "password": {"wrong"}}
	a = r.do(r.postForm(authorizeURL(), form))
	if a.status != http.StatusOK || !strings.Contains(a.body, `role="alert"`) || strings.Contains(a.body, "<script>") {
		t.Errorf("a wrong sign-in answers %d and not with an escaped page that says so", a.status)
	}
	if got := r.signIn(authorizeURL(), "action", "cancel").Get("error"); got != "access_denied" {
		t.Errorf("cancelling sends back %q", got)
	}

	request := r.postForm(authorizeURL(), url.Values{"username": {"reviewer@example.com"}, "password": {sandbox.DemoPassword}})
	request.Header.Set("Origin", "https://evil.example")
	r.want(r.do(request), http.StatusBadRequest, "")
}

func TestSignInPageIsLockedToo(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	form := url.Values{"username": {"reviewer@example.com"}, "password": {"wrong"}}
	for range 5 {
		r.want(r.do(r.postForm(authorizeURL(), form)), http.StatusOK, "")
	}
	form.Set("password", sandbox.DemoPassword)
	r.want(r.do(r.postForm(authorizeURL(), form)), http.StatusOK, "") // the page again
	r.clock.pass(5 * time.Minute)
	if r.signIn(authorizeURL()).Get("code") == "" {
		t.Error("no code after the lock ended")
	}
}

func TestSignInChoosesATenant(t *testing.T) {
	const one, two = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"
	r := newRig(t, sandbox.Options{
		Tenants: []sandbox.Tenant{{ID: one, Name: "One"}, {ID: two, Name: "Two", ExternalIdentityProvider: true}},
		Users: []sandbox.User{
			{Name: "reviewer@example.com", Password: "p1", Tenant: one},
			{Name: "reviewer@example.com", Password: "p2", Tenant: two},
		},
	})
	form := url.Values{"username": {"reviewer@example.com"}, "password": {"p2"}}
	a := r.do(r.postForm(authorizeURL(), form))
	if a.status != http.StatusOK || !strings.Contains(a.body, `<option value="`+two+`">Two</option>`) {
		t.Fatalf("answer %d offers no choice of tenant", a.status)
	}
	code := r.signIn(authorizeURL(), "password", "p2", "tenant", two).Get("code")
	claims := verify(t, r, "/auth2/jwks", r.exchange(code).field(t, "access_token"), "at+jwt")
	if claims["tenant_id"] != two {
		t.Errorf("tenant %v, want the second", claims["tenant_id"])
	}
}

// TestForeignTenant: what one tenant's user allowed is nothing at another's
// endpoint.
func TestForeignTenant(t *testing.T) {
	r := newRig(t, sandbox.Options{Tenants: []sandbox.Tenant{{ID: sandbox.DemoTenant}, {ID: "other"}}})
	const other = "/auth2/other/connect/token"
	rt := r.consent().field(t, "refresh_token")
	r.want(r.do(r.postForm(other, r.form("client_id", "review", "grant_type", "refresh_token", "refresh_token", rt))),
		http.StatusBadRequest, "invalid_grant")
	r.want(r.refresh("review", rt), http.StatusOK, "") // and was not used up

	code := r.signIn(authorizeURL()).Get("code")
	form := r.form("client_id", "review", "grant_type", "authorization_code",
		"code", code, "code_verifier", verifier, "redirect_uri", callback)
	r.want(r.do(r.postForm(other, form)), http.StatusBadRequest, "invalid_grant")
	r.want(r.exchange(code), http.StatusBadRequest, "invalid_grant") // burnt
}

// TestSampleAnswer compares the members of the code answer, and their order,
// with the documented sample.
func TestSampleAnswer(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	decoder := json.NewDecoder(strings.NewReader(r.consent().body))
	var names []string
	for i := 0; decoder.More(); i++ {
		token, err := decoder.Token()
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 1 { // after the brace: name, value, name, value
			names = append(names, token.(string))
		}
	}
	if got := strings.Join(names, " "); got != "id_token access_token expires_in token_type refresh_token scope" {
		t.Errorf("members %s", got)
	}
}
