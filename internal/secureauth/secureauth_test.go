package secureauth_test

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
	"github.com/tokenbroker/tokenbroker/internal/secureauth"
)

// workspace is a server that publishes metadata as SecureAuth does, and answers
// each POST with status and body.
type workspace struct {
	issuer string

	mu     sync.Mutex
	seen   []received
	status int
	body   string
}

// received is a request as the server got it.
type received struct{ method, path, contentType, authorization, body string }

func newWorkspace(t testing.TB) *workspace {
	t.Helper()
	w := &workspace{}
	w.answer(200, `{"access_token":"token","expires_in":3599,"token_type":"bearer","scope":"read write"}`)
	s := httptest.NewServer(w)
	t.Cleanup(s.Close)
	w.issuer = s.URL + "/acme/default"
	return w
}

func (w *workspace) answer(status int, body string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.status, w.body = status, body
}

func (w *workspace) ServeHTTP(response http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen = append(w.seen, received{r.Method, r.RequestURI, r.Header.Get("Content-Type"), r.Header.Get("Authorization"), string(body)})
	if r.Method == http.MethodGet {
		fmt.Fprintf(response, `{"issuer":%[1]q,"token_endpoint":"%[1]s/oauth2/token","authorization_endpoint":"%[1]s/oauth2/authorize",`+
			`"revocation_endpoint":"%[1]s/oauth2/revoke","authorization_response_iss_parameter_supported":true}`, w.issuer)
		return
	}
	response.Header().Set("X-Trace-ID", "trace-1")
	response.WriteHeader(w.status)
	io.WriteString(response, w.body)
}

func (w *workspace) requests() []received {
	w.mu.Lock()
	defer w.mu.Unlock()
	seen := w.seen
	w.seen = nil
	return seen
}

func (w *workspace) config(secrets ...string) secureauth.Config {
	c := secureauth.Config{ProfileConfig: oauth.ProfileConfig{
		Name:           "payments",
		Issuer:         w.issuer,
		ClientID:       "payments",
		Scopes:         []string{"read", "write"},
		FingerprintKey: []byte("key"),
	}}
	for _, s := range secrets {
		c.ClientSecrets = append(c.ClientSecrets, broker.NewSecret(s))
	}
	return c
}

func withUser(c *secureauth.Config) {
	c.GrantType = broker.Password
	c.Username, c.Password = broker.NewSecret("user"), broker.NewSecret("password "+nasty)
}

func signIn(c *secureauth.Config) {
	c.GrantType, c.RedirectURL = broker.AuthorizationCode, "https://broker.example.com/oauth/callback"
}

func profileFor(t testing.TB, c secureauth.Config) *broker.Profile {
	t.Helper()
	c.Transport = oauth.NewTransport(oauth.TransportConfig{})
	t.Cleanup(c.Transport.CloseIdleConnections)
	p, err := secureauth.NewProfile(c)
	if err != nil {
		t.Fatalf("NewProfile: %v", err)
	}
	return p
}

func TestIssuers(t *testing.T) {
	for want, c := range map[string]secureauth.Config{
		"https://acme.eu.authz.cloudentity.io/acme/default": {TenantID: "acme", Region: "eu", WorkspaceID: "default"},
		"https://acme.authz.cloudentity.io/acme/default":    {TenantID: "acme", WorkspaceID: "default"},
		"https://acme.us.connect.secureauth.com/default":    {ProfileConfig: oauth.ProfileConfig{Issuer: "https://acme.us.connect.secureauth.com/default"}},
		"https://id.example.com":                            {ProfileConfig: oauth.ProfileConfig{Issuer: "https://id.example.com/"}},
	} {
		full := (&workspace{}).config("s")
		full.Issuer, full.TenantID, full.Region, full.WorkspaceID = c.Issuer, c.TenantID, c.Region, c.WorkspaceID
		p := profileFor(t, full)
		if p.Endpoint != want || p.Provider != "secureauth" || p.GrantType != broker.ClientCredentials {
			t.Errorf("profile is %+v, want one of %s", p, want)
		}
	}
}

func TestMistakes(t *testing.T) {
	for words, change := range map[string]func(*secureauth.Config){
		"issuer excludes tenant_id":                func(c *secureauth.Config) { c.TenantID = "t" },
		"issuer is missing: set it, or tenant_id":  func(c *secureauth.Config) { c.Issuer, c.TenantID = "", "t" },
		"tenant_id cannot stand in a host name":    func(c *secureauth.Config) { c.Issuer, c.TenantID, c.WorkspaceID = "", "a/b", "w" },
		"region cannot stand in a host name":       func(c *secureauth.Config) { c.Issuer, c.TenantID, c.Region, c.WorkspaceID = "", "t", "e.u", "w" },
		"workspace_id has slashes or blanks":       func(c *secureauth.Config) { c.Issuer, c.TenantID, c.WorkspaceID = "", "t", "../w" },
		"scopes is empty: name them, because":      func(c *secureauth.Config) { c.Scopes = nil },
		"client_secret is missing":                 func(c *secureauth.Config) { c.ClientSecrets = nil },
		"issuer http://h would send secrets":       func(c *secureauth.Config) { c.Issuer = "http://h" },
		"private_key is missing or empty: check":   func(c *secureauth.Config) { c.ClientAuth, c.ClientSecrets = oauth.PrivateKeyJWT, nil },
		"authorization_code.redirect_url is missi": func(c *secureauth.Config) { c.GrantType = broker.AuthorizationCode },
	} {
		c := (&workspace{issuer: "https://h"}).config("s")
		change(&c)
		if _, err := secureauth.NewProfile(c); err == nil || !strings.HasPrefix(err.Error(), words) || strings.Contains(err.Error(), "\n") {
			t.Errorf("error is %v, want %q alone", err, words)
		}
	}
}

// Both schemas of errors are read, and every 401 that is not a page is a refusal
// of the client, which is not tried again, nor with another secret unless the
// server says invalid_client.
func TestRefusals(t *testing.T) {
	const prose = `"error":"Unauthorized: the request could not be authorized"`
	for name, tc := range map[string]struct {
		status int
		body   string
		kind   broker.IssueErrorKind
		code   string
		words  string
		tries  int
	}{
		"wrong secret":        {401, `{"error":"invalid_client","error_description":"no such client","error_hint":"look","status_code":401}`, broker.ClientRejected, "invalid_client", `401 invalid_client: "no such client look" to each of the 2 client secrets; SecureAuth says so of`, 2},
		"code as a string":    {401, `{"error":"Who are you?","error_code":"invalid_client","details":"look"}`, broker.ClientRejected, "invalid_client", `401 invalid_client: "Who are you? look"`, 2},
		"code as a number":    {401, `{` + prose + `,"error_code":401,"error_hint":"blocked"}`, broker.ClientRejected, "", `could not be authorized blocked"; SecureAuth says so of`, 1},
		"older schema":        {401, `{` + prose + `,"error_code":"unauthorized","status_code":401}`, broker.ClientRejected, "", "that is blocked for some minutes after a few failures", 1},
		"bare":                {401, ``, broker.ClientRejected, "", "answered 401 with an empty body; SecureAuth says so of", 1},
		"a gateway's page":    {401, `<html>sign in`, broker.Unavailable, "", "an HTML page, probably from a gateway", 1},
		"another verdict":     {401, `{"error":"unauthorized_client"}`, broker.RequestRejected, "unauthorized_client", "the client's grant types", 1},
		"a scope's policy":    {400, `{"error":"invalid_scope","error_hint":"policy"}`, broker.RequestRejected, "invalid_scope", `invalid_scope: "policy"; in SecureAuth check`, 1},
		"prose that is known": {400, `{"error":"Bad request","error_code":400}`, broker.Unavailable, "", "400 without a registered OAuth error code", 1},
		"throttled":           {429, `{"error":"Too many requests","error_code":429}`, broker.Throttled, "", "answered 429", 1},
		"precondition":        {412, `{"error":"Precondition failed","error_code":412}`, broker.Unavailable, "", "answered 412", 1},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorkspace(t)
			w.answer(tc.status, tc.body)
			p := profileFor(t, w.config("secret-value-1", "secret-value-2"))
			_, err := p.Issuer.Issue(t.Context(), broker.Request{Scopes: p.Scopes})
			var e *broker.IssueError
			if !errors.As(err, &e) {
				t.Fatalf("error is %v", err)
			}
			if e.Kind != tc.kind || e.Code != tc.code || e.Trace != "trace-1" || !strings.Contains(e.Text, tc.words) {
				t.Errorf("error is %v %q, trace %q: %s", e.Kind, e.Code, e.Trace, e.Text)
			}
			if n := len(w.requests()) - 1; n != tc.tries {
				t.Errorf("the server was asked %d times", n)
			}
		})
	}
}

// A refused revocation is explained as well.
func TestRevocationIsExplained(t *testing.T) {
	w := newWorkspace(t)
	w.answer(401, "")
	err := profileFor(t, w.config("s")).Issuer.(broker.Revoker).Revoke(t.Context(), broker.NewSecret("t"), broker.AccessToken)
	var e *broker.IssueError
	if !errors.As(err, &e) || e.Kind != broker.ClientRejected || !strings.Contains(e.Text, "revocation endpoint") || !strings.Contains(e.Text, "SecureAuth says so") {
		t.Errorf("error is %v", err)
	}
}

func TestTheSampleAnswer(t *testing.T) {
	w := newWorkspace(t)
	p := profileFor(t, w.config("s"))
	grant, err := p.Issuer.Issue(t.Context(), broker.Request{Scopes: p.Scopes})
	if err != nil || grant.TokenType != "Bearer" || grant.Lifetime.Seconds() != 3599 {
		t.Errorf("grant %+v, error %v", grant, err)
	}
}

// The workspace announces that it names itself beside each code.
func TestWhoseCodeItIs(t *testing.T) {
	w := newWorkspace(t)
	c := w.config("s")
	signIn(&c)
	check := profileFor(t, c).Issuer.(broker.Authorizer).CheckIssuer
	if err := check(t.Context(), w.issuer); err != nil {
		t.Error(err)
	}
	for _, iss := range []string{"", "https://evil.example"} {
		if check(t.Context(), iss) == nil {
			t.Errorf("%q was accepted", iss)
		}
	}
}
