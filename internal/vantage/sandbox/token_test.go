package sandbox_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

func TestClientCredentials(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	a := r.token(r.invoices()...)
	r.want(a, http.StatusOK, "")
	token := a.field(t, "access_token")
	want := fmt.Sprintf(`{"access_token":%q,"expires_in":2592000,"token_type":"Bearer","scope":%q}`, token, scopes)
	if a.body != want {
		t.Error("the answer is not the documented one")
	}
	if got := a.header.Get("Cache-Control"); got != "no-store, no-cache, max-age=0" {
		t.Errorf("Cache-Control %q", got)
	}
	r.wantLive(token, true)
	r.clock.pass(30*24*time.Hour - time.Second)
	r.wantLive(token, true)
	r.clock.pass(time.Second)
	r.wantLive(token, false)
}

func TestPassword(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	a := r.token(r.password(sandbox.DemoPassword)...)
	r.want(a, http.StatusOK, "")
	if a.field(t, "refresh_token") != "" {
		t.Error("a refresh token without offline_access")
	}
	r.wantLive(a.field(t, "access_token"), true)

	a = r.token(append(r.password(sandbox.DemoPassword), "scope", offline)...)
	r.want(a, http.StatusOK, "")
	first := a.field(t, "refresh_token")
	a = r.refresh("operator", first)
	r.want(a, http.StatusOK, "")
	if next := a.field(t, "refresh_token"); next == "" || next == first {
		t.Error("the refresh token was not rotated")
	}
}

// TestLifetimesPerClient has a client whose tokens live shorter than others'.
func TestLifetimesPerClient(t *testing.T) {
	r := newRig(t, sandbox.Options{Clients: []sandbox.Client{{
		ID: "operator", GrantTypes: []string{"password"}, AllowOfflineAccess: true,
		AccessTokenLifetime: 15 * time.Second, RefreshTokenLifetime: time.Minute,
	}}})
	a := r.token(append(r.password(sandbox.DemoPassword), "scope", offline)...)
	r.want(a, http.StatusOK, "")
	if !strings.Contains(a.body, `"expires_in":15,`) {
		t.Error("expires_in is not the client's")
	}
	r.clock.pass(15*time.Second - 1)
	r.wantLive(a.field(t, "access_token"), true)
	r.clock.pass(1)
	r.wantLive(a.field(t, "access_token"), false)

	r.clock.pass(44 * time.Second)
	a = r.refresh("operator", a.field(t, "refresh_token"))
	r.want(a, http.StatusOK, "")
	r.clock.pass(time.Second) // the end counts from the first issue
	r.want(r.refresh("operator", a.field(t, "refresh_token")), http.StatusBadRequest, "invalid_grant")
}

func TestOmittedScopeMeansAll(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	for want, pairs := range map[string][]string{
		scopes:  {"client_id", "invoices", "grant_type", "client_credentials"},
		offline: append(r.password(sandbox.DemoPassword), "scope", ""),
	} {
		if got := r.token(pairs...).field(t, "scope"); got != want {
			t.Errorf("scope %q, want %q", got, want)
		}
	}
}

// TestTokenErrors goes through the errors in the order in which they win.
func TestTokenErrors(t *testing.T) {
	long := strings.Repeat("x", 101)
	for _, test := range []struct {
		name        string
		pairs       []string // replace those of a good password request
		code        string
		description string
	}{
		{"no client", []string{"client_id", ""}, "invalid_client", ""},
		{"unknown client", []string{"client_id", "nobody"}, "invalid_client", ""},
		{"wrong secret", []string{"client_secret", "wrong"}, "invalid_client", ""},
		{"no secret", []string{"client_secret", ""}, "invalid_client", ""},
		{"long secret", []string{"client_secret", long}, "invalid_client", ""},
		{"long client", []string{"client_id", long}, "invalid_client", ""},
		{"wrong secret before unknown grant", []string{"client_secret", "wrong", "grant_type", "x"}, "invalid_client", ""},
		{"no grant type", []string{"grant_type", ""}, "unsupported_grant_type", ""},
		{"unknown grant type", []string{"grant_type", "implicit"}, "unsupported_grant_type", ""},
		{"long grant type", []string{"grant_type", long}, "unsupported_grant_type", ""},
		{"grant not allowed", []string{"grant_type", "client_credentials", "scope", "nonsense"}, "unauthorized_client", ""},
		{"unknown scope", []string{"scope", "nonsense"}, "invalid_scope", ""},
		{"scope not allowed", []string{"scope", "publicapi.all"}, "invalid_scope", ""},
		{"long scope", []string{"scope", strings.Repeat("openid ", 50)}, "invalid_scope", ""},
		{"scope before password", []string{"scope", "nonsense", "password", "wrong"}, "invalid_scope", ""},
		{"wrong password", []string{"password", "wrong"}, "invalid_grant", "invalid_username_or_password"},
		{"unknown user", []string{"username", "nobody@example.com"}, "invalid_grant", "invalid_username_or_password"},
		{"no user", []string{"username", ""}, "invalid_grant", ""},
		{"long password", []string{"password", long}, "invalid_grant", ""},
		{"refresh token missing", []string{"grant_type", "refresh_token"}, "invalid_request", ""},
		{"refresh token unknown", []string{"grant_type", "refresh_token", "refresh_token", "x"}, "invalid_grant", ""},
		{"refresh token long", []string{"grant_type", "refresh_token", "refresh_token", long}, "invalid_grant", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t, sandbox.Options{})
			form := r.form(r.password(sandbox.DemoPassword)...)
			for i := 0; i < len(test.pairs); i += 2 {
				form.Set(test.pairs[i], test.pairs[i+1])
			}
			a := r.do(r.postForm(tokenPath, form))
			want := fmt.Sprintf(`{"error":%q}`, test.code)
			if test.description != "" {
				want = fmt.Sprintf(`{"error":%q,"error_description":%q}`, test.code, test.description)
			}
			if a.status != http.StatusBadRequest || a.body != want {
				t.Errorf("answer %d %s, want 400 %s", a.status, a.body, want)
			}
			for name, want := range map[string]string{
				"Content-Type":     "application/json; charset=UTF-8",
				"Cache-Control":    "no-store, no-cache, max-age=0",
				"Pragma":           "no-cache",
				"WWW-Authenticate": "",
			} {
				if got := a.header.Get(name); got != want {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
		})
	}
}

func TestTokenRequestShape(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	form := r.form(r.invoices()...).Encode()
	const mediaType = "application/x-www-form-urlencoded"
	for name, request := range map[string]*http.Request{
		"GET":       r.request(http.MethodGet, tokenPath+"?"+form, "", ""),
		"PUT":       r.request(http.MethodPut, tokenPath, mediaType, form),
		"JSON":      r.request(http.MethodPost, tokenPath, "application/json", `{"grant_type":"client_credentials"}`),
		"multipart": r.request(http.MethodPost, tokenPath, "multipart/form-data; boundary=x", "--x--"),
		"no type":   r.request(http.MethodPost, tokenPath, "", form),
		"escape":    r.request(http.MethodPost, tokenPath, mediaType, form+"&x=%zz"),
		"too large": r.request(http.MethodPost, tokenPath, mediaType, form+"&x="+strings.Repeat("x", 1<<20)),
	} {
		t.Run(name, func(t *testing.T) {
			a := r.do(request)
			if a.status != http.StatusBadRequest || a.body != `{"error":"invalid_request"}` {
				t.Errorf("answer %d %s", a.status, a.body)
			}
		})
	}
	a := r.do(r.request(http.MethodPost, tokenPath, mediaType+"; charset=utf-8", form))
	r.want(a, http.StatusOK, "")
	if got := r.Calls().ByGrant["unknown"]["invalid_request"]; got != 7 {
		t.Errorf("%d malformed requests were counted, want 7", got)
	}
}

func TestParametersInTheQueryDoNotCount(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	form := r.form(r.invoices()...)
	secret := form.Get("client_secret")
	form.Del("client_secret")
	a := r.do(r.postForm(tokenPath+"?client_secret="+secret, form))
	r.want(a, http.StatusBadRequest, "invalid_client")
}

func TestBasicAuthentication(t *testing.T) {
	const awkward = "a+b &c%=:é d"
	r := newRig(t, sandbox.Options{})
	if err := r.SetClientSecret("invoices", awkward, "second"); err != nil {
		t.Fatal(err)
	}
	encode := func(id, secret string) string {
		return "Basic " + base64.StdEncoding.EncodeToString([]byte(id+":"+secret))
	}
	for _, test := range []struct {
		name, header string
		status       int
	}{
		{"encoded", encode("invoices", url.QueryEscape(awkward)), http.StatusOK},
		{"spaces as %20", encode("invoices", strings.ReplaceAll(url.QueryEscape(awkward), "+", "%20")), http.StatusOK},
		{"second secret", encode("invoices", "second"), http.StatusOK},
		{"raw", encode("invoices", awkward), http.StatusBadRequest},
		{"wrong", encode("invoices", "wrong"), http.StatusBadRequest},
		{"not base64", "Basic ???", http.StatusBadRequest},
		{"no colon", "Basic " + base64.StdEncoding.EncodeToString([]byte("invoices")), http.StatusBadRequest},
	} {
		t.Run(test.name, func(t *testing.T) {
			request := r.postForm(tokenPath, url.Values{"grant_type": {"client_credentials"}, "scope": {scopes}})
			request.Header.Set("Authorization", test.header)
			if a := r.do(request); a.status != test.status {
				t.Errorf("status %d, want %d", a.status, test.status)
			}
		})
	}
	a := r.token(r.invoices()...) // the same secret in the body
	r.want(a, http.StatusOK, "")
}

func TestSecretsExpire(t *testing.T) {
	start := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC) // when the rig's clock begins
	r := newRig(t, sandbox.Options{Clients: []sandbox.Client{{
		ID: "c", GrantTypes: []string{"client_credentials"},
		Secrets: []sandbox.Secret{
			{Value: "next", StartTime: start.Add(time.Hour)},
			{Value: "now", Expiration: start.Add(2 * time.Hour)},
		},
	}}})
	try := func(secret string, status int) {
		t.Helper()
		a := r.token("client_id", "c", "client_secret", secret, "grant_type", "client_credentials")
		r.want(a, status, "")
	}
	try("now", http.StatusOK)
	try("next", http.StatusBadRequest)
	r.clock.pass(time.Hour)
	try("now", http.StatusOK)
	try("next", http.StatusOK)
	r.clock.pass(time.Hour)
	try("now", http.StatusBadRequest)
	try("next", http.StatusOK)
}

func TestPublicClient(t *testing.T) {
	r := newRig(t, sandbox.Options{Clients: []sandbox.Client{
		{ID: "c", Public: true, GrantTypes: []string{"client_credentials"}},
	}})
	r.want(r.token("client_id", "c", "grant_type", "client_credentials"), http.StatusOK, "")
	r.want(r.token("client_id", "c", "client_secret", "x", "grant_type", "client_credentials"),
		http.StatusBadRequest, "invalid_client")
}

func TestLockout(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	attempt := func(password string) answer { return r.token(r.password(password)...) }
	for range 2 {
		for range 4 {
			r.want(attempt("wrong"), http.StatusBadRequest, "invalid_grant")
		}
		r.want(attempt(sandbox.DemoPassword), http.StatusOK, "") // begins to count again
	}
	var wrong answer
	for range 5 {
		wrong = attempt("wrong")
	}
	locked := attempt(sandbox.DemoPassword)
	if locked.status != wrong.status || locked.body != wrong.body {
		t.Error("a locked account does not look like a wrong password")
	}
	r.clock.pass(5*time.Minute - time.Second)
	r.want(attempt(sandbox.DemoPassword), http.StatusBadRequest, "invalid_grant")
	r.clock.pass(time.Second)
	r.want(attempt(sandbox.DemoPassword), http.StatusOK, "")

	for range 5 {
		attempt("wrong")
	}
	if err := r.Unlock("operator@example.com"); err != nil {
		t.Fatal(err)
	}
	r.want(attempt(sandbox.DemoPassword), http.StatusOK, "")
	if err := r.SetPassword("operator@example.com", "changed"); err != nil {
		t.Fatal(err)
	}
	r.want(attempt("changed"), http.StatusOK, "")
}

func TestDisabledUser(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	a := r.consent()
	code := r.signIn(authorizeURL()).Get("code")
	if err := r.SetDisabled("reviewer@example.com", true); err != nil {
		t.Fatal(err)
	}
	r.want(r.exchange(code), http.StatusBadRequest, "invalid_grant")
	r.want(r.refresh("review", a.field(t, "refresh_token")), http.StatusBadRequest, "invalid_grant")
	r.wantLive(a.field(t, "access_token"), false)
}

func TestTenants(t *testing.T) {
	const one, two, external = "11111111-1111-1111-1111-111111111111", "22222222-AAAA-2222-2222-222222222222", "33333333-3333-3333-3333-333333333333"
	r := newRig(t, sandbox.Options{
		Tenants: []sandbox.Tenant{{ID: one}, {ID: two}, {ID: external, ExternalIdentityProvider: true}},
		Users: []sandbox.User{
			{Name: "both@example.com", Password: "p1", Tenant: one},
			{Name: "Both@example.com", Password: "p2", Tenant: two},
			{Name: "elsewhere@example.com", Password: "p", Tenant: external},
		},
		Clients: []sandbox.Client{
			{ID: "any", GrantTypes: []string{"password"}},
			{ID: "bound", Tenant: two, GrantTypes: []string{"password"}},
		},
	})
	for _, test := range []struct {
		name, tenant, client, user, password string
		status                               int
		code                                 string
	}{
		{"several accounts", "", "any", "both@example.com", "p1", 400, "invalid_grant"},
		{"first tenant", one, "any", "both@example.com", "p1", 200, ""},
		{"second tenant", two, "any", "both@example.com", "p2", 200, ""},
		{"second tenant, other spelling", "22222222aaaa22222222222222222222", "bound", "both@example.com", "p2", 200, ""},
		{"password of the other", two, "any", "both@example.com", "p1", 400, "invalid_grant"},
		{"client of the other", one, "bound", "both@example.com", "p1", 400, "invalid_client"},
		{"external identity provider", "", "any", "elsewhere@example.com", "p", 400, "invalid_grant"},
		{"unknown tenant", "44444444-4444-4444-4444-444444444444", "any", "both@example.com", "p1", 404, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := tokenPath
			if test.tenant != "" {
				path = "/auth2/" + test.tenant + "/connect/token"
			}
			a := r.do(r.postForm(path, r.form("client_id", test.client, "grant_type", "password",
				"username", test.user, "password", test.password)))
			if a.status != test.status {
				t.Fatalf("status %d, want %d", a.status, test.status)
			}
			if test.code != "" && a.field(t, "error") != test.code {
				t.Errorf("error %q, want %q", a.field(t, "error"), test.code)
			}
		})
	}
	calls := r.Calls().ByGrant["password"]
	if calls["success"] != 3 || calls["invalid_grant"] != 3 || calls["invalid_client"] != 1 || calls["not_found"] != 1 {
		t.Errorf("counts %v", calls)
	}
}

func TestUnknownPath(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	for _, path := range []string{"/", "/auth/connect/token", "/auth2/connect/token/", "/auth2/x/y/connect/token"} {
		a := r.do(r.request(http.MethodPost, path, "", ""))
		if a.status != http.StatusNotFound || !strings.HasPrefix(a.header.Get("Content-Type"), "text/html") {
			t.Errorf("%s: answer %d of type %q", path, a.status, a.header.Get("Content-Type"))
		}
	}
}

// verify checks a JWT against the published keys and returns its claims.
func verify(t *testing.T, r *rig, jwksPath, token, typ string) map[string]any {
	t.Helper()
	var set jose.JSONWebKeySet
	if err := json.Unmarshal([]byte(r.do(r.request(http.MethodGet, jwksPath, "", "")).body), &set); err != nil {
		t.Fatal(err)
	}
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	header := parsed.Headers[0]
	if got := header.ExtraHeaders[jose.HeaderType]; got != typ {
		t.Errorf("typ %v, want %s", got, typ)
	}
	keys := set.Key(header.KeyID)
	if len(keys) != 1 || !keys[0].IsPublic() {
		t.Fatalf("%d public keys named %q", len(keys), header.KeyID)
	}
	claims := map[string]any{}
	if err := parsed.Claims(keys[0].Key, &claims); err != nil {
		t.Fatal(err)
	}
	return claims
}

func TestDiscoveryAndTokens(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	for _, prefix := range []string{"/auth2", "/auth2/" + sandbox.DemoTenant} {
		a := r.do(r.request(http.MethodGet, prefix+"/.well-known/openid-configuration", "", ""))
		r.want(a, http.StatusOK, "")
		issuer := r.url + prefix
		for name, want := range map[string]string{
			"issuer":                 issuer,
			"token_endpoint":         issuer + "/connect/token",
			"authorization_endpoint": issuer + "/connect/authorize",
			"revocation_endpoint":    issuer + "/connect/revocation",
			"jwks_uri":               issuer + "/.well-known/openid-configuration/jwks",
		} {
			if got := a.field(t, name); got != want {
				t.Errorf("%s %q, want %q", name, got, want)
			}
		}
		token := r.do(r.postForm(prefix+"/connect/token", r.form(r.invoices()...))).field(t, "access_token")
		for _, path := range []string{"/.well-known/openid-configuration/jwks", "/jwks"} {
			claims := verify(t, r, prefix+path, token, "at+jwt")
			if claims["iss"] != issuer || claims["client_id"] != "invoices" || claims["aud"] != "publicapi" || claims["jti"] == nil {
				t.Errorf("claims %v", claims)
			}
			if span := claims["exp"].(float64) - claims["iat"].(float64); span != 2592000 {
				t.Errorf("the token lives %v s", span)
			}
		}
	}
}

func TestConfiguredIssuer(t *testing.T) {
	r := newRig(t, sandbox.Options{Issuer: "https://vantage.example.com/auth2"})
	claims := verify(t, r, "/auth2/jwks", r.token(r.invoices()...).field(t, "access_token"), "at+jwt")
	if claims["iss"] != "https://vantage.example.com/auth2" {
		t.Errorf("issuer %v", claims["iss"])
	}
}

func TestSkillsRefuse(t *testing.T) {
	r, other := newRig(t, sandbox.Options{}), newRig(t, sandbox.Options{})
	token := r.token(r.invoices()...).field(t, "access_token")
	r.wantLive(token, true)
	r.wantLive(token[:len(token)-5]+"AAAAA", false)
	r.wantLive(other.token(other.invoices()...).field(t, "access_token"), false)
	r.wantLive("", false)
	r.RevokeAll()
	r.wantLive(token, false)
}

// TestManyAtOnce has every answer arrive and every one counted.
func TestManyAtOnce(t *testing.T) {
	const workers, each = 50, 10
	r := newRig(t, sandbox.Options{})
	form := r.form(r.invoices()...)
	tokens := sync.Map{}
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			for range each {
				a, err := r.try(r.postForm(tokenPath, form))
				if err != nil || a.status != http.StatusOK {
					t.Errorf("answer %d: %v", a.status, err)
					return
				}
				tokens.Store(a.body, true)
			}
		})
	}
	group.Wait()
	calls := r.Calls()
	if calls.Total != workers*each || calls.ByClient["invoices"]["success"] != workers*each || calls.InFlight != 0 {
		t.Errorf("counts %+v", calls)
	}
	if calls.PeakInFlight < 1 || calls.PeakInFlight > workers {
		t.Errorf("%d were in flight at once", calls.PeakInFlight)
	}
	distinct := 0
	tokens.Range(func(any, any) bool { distinct++; return true })
	if distinct != workers*each {
		t.Errorf("%d distinct tokens, want %d", distinct, workers*each)
	}
}

func TestWorldsThatAreRefused(t *testing.T) {
	for name, options := range map[string]sandbox.Options{
		"no tenant":         {Tenants: []sandbox.Tenant{}},
		"tenant twice":      {Tenants: []sandbox.Tenant{{ID: "a-b"}, {ID: "AB"}}},
		"user twice":        {Users: []sandbox.User{{Name: "a"}, {Name: "A"}}},
		"user of no tenant": {Users: []sandbox.User{{Name: "a", Tenant: "x"}}},
		"client twice":      {Clients: []sandbox.Client{{ID: "a"}, {ID: "a"}}},
		"client nameless":   {Clients: []sandbox.Client{{}}},
		"client nowhere":    {Clients: []sandbox.Client{{ID: "a", Tenant: "x"}}},
		"open redirect":     {Clients: []sandbox.Client{{ID: "a", RedirectURIs: []string{""}}}},
		"long secret":       {Clients: []sandbox.Client{{ID: "a", Secrets: []sandbox.Secret{{Value: strings.Repeat("x", 101)}}}}},
	} {
		if _, err := sandbox.New(options); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	s, err := sandbox.New(sandbox.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"secret of nobody": s.SetClientSecret("nobody", "x"),
		"empty secret":     s.SetClientSecret("invoices", ""),
		"nobody":           s.Unlock("nobody"),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if s.ClientSecret("nobody") != "" {
		t.Error("a secret of nobody")
	}
}
