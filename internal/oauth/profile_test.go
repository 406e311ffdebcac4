package oauth_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// nasty holds what encodings get wrong.
const nasty = "+ & % = : é"

// recorder is a server that remembers what it received.
type recorder struct {
	mu     sync.Mutex
	seen   []string
	answer http.Handler
}

// record starts a server that answers with answer; base is what its URLs begin
// with.
func record(t testing.TB, answer http.Handler) (r *recorder, base string) {
	t.Helper()
	r = &recorder{answer: answer}
	s := httptest.NewServer(r)
	t.Cleanup(s.Close)
	return r, s.URL
}

func (r *recorder) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	body, _ := io.ReadAll(request.Body)
	request.Body = io.NopCloser(strings.NewReader(string(body)))
	r.mu.Lock()
	r.seen = append(r.seen, strings.Join([]string{
		request.Method, request.RequestURI, request.Header.Get("Content-Type"), request.Header.Get("Authorization"), string(body),
	}, "|"))
	answer := r.answer
	r.mu.Unlock()
	answer.ServeHTTP(w, request)
}

// requests are those received since it was last called: method, URI, media type,
// Authorization and body.
func (r *recorder) requests() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	seen := r.seen
	r.seen = nil
	return seen
}

func (r *recorder) then(answer http.Handler) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answer = answer
}

func (r *recorder) want(t testing.TB, want ...string) {
	t.Helper()
	if got := r.requests(); !slices.Equal(got, want) {
		t.Errorf("the server saw\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// posted is how a recorder writes down a form without Authorization.
func posted(path, body string) string {
	return "POST|" + path + "|application/x-www-form-urlencoded||" + body
}

// profileConfig is a good one for the server at base.
func profileConfig(base string, change ...func(*oauth.ProfileConfig)) oauth.ProfileConfig {
	c := oauth.ProfileConfig{
		Name:             "tests",
		Provider:         "oauth2",
		TokenURL:         base + "/token",
		AuthorizationURL: base + "/authorize",
		ClientID:         "tester",
		ClientAuth:       oauth.ClientSecretPost,
		ClientSecrets:    []broker.Secret{broker.NewSecret("s")},
		GrantType:        broker.ClientCredentials,
		Scopes:           []string{"b", "a"},
		Timeout:          5 * time.Second,
		FingerprintKey:   []byte("key"),
	}
	for _, do := range change {
		do(&c)
	}
	return c
}

func profileFor(t testing.TB, c oauth.ProfileConfig) *broker.Profile {
	t.Helper()
	if c.Transport == nil {
		c.Transport = oauth.NewTransport(oauth.TransportConfig{})
		t.Cleanup(c.Transport.CloseIdleConnections)
	}
	p, err := oauth.NewProfile(c)
	if err != nil {
		t.Fatalf("NewProfile: %v", err)
	}
	return p
}

func byPassword(c *oauth.ProfileConfig) {
	c.GrantType = broker.Password
	c.Username, c.Password = broker.NewSecret("user"), broker.NewSecret("password")
}

func byCode(c *oauth.ProfileConfig) {
	c.GrantType = broker.AuthorizationCode
	c.RedirectURL = "https://broker.example.com/oauth/callback"
}

func targeted(c *oauth.ProfileConfig) {
	c.Audience, c.Resource = "api "+nasty, []string{"https://one", "https://two"}
	c.Extra = map[string]string{"extra": nasty}
}

// All that a profile says of what it wants is in each of its requests.
func TestRequestsOfAProfile(t *testing.T) {
	const target = "audience=api+%2B+%26+%25+%3D+%3A+%C3%A9&client_id=tester&client_secret=s&extra=%2B+%26+%25+%3D+%3A+%C3%A9&grant_type="
	const resources = "&resource=https%3A%2F%2Fone&resource=https%3A%2F%2Ftwo"
	offline := func(c *oauth.ProfileConfig) { c.Scopes = []string{"a", "offline_access"} }
	for name, tc := range map[string]struct {
		change  []func(*oauth.ProfileConfig)
		request broker.Request
		want    string
	}{
		"client_credentials": {nil, broker.Request{Scopes: []string{"b", "a"}}, "client_id=tester&client_secret=s&grant_type=client_credentials&scope=b+a"},
		"part":               {nil, broker.Request{Scopes: []string{"a"}}, "client_id=tester&client_secret=s&grant_type=client_credentials&scope=a"},
		"target":             {[]func(*oauth.ProfileConfig){targeted}, broker.Request{}, target + "client_credentials" + resources},
		"password": {[]func(*oauth.ProfileConfig){byPassword, targeted}, broker.Request{Scopes: []string{"a", "b"}},
			target + "password&password=password" + resources + "&scope=a+b&username=user"},
		"part of a password": {[]func(*oauth.ProfileConfig){byPassword, offline}, broker.Request{Scopes: []string{"offline_access"}},
			"client_id=tester&client_secret=s&grant_type=password&password=password&username=user"},
		"refresh": {[]func(*oauth.ProfileConfig){byCode, targeted}, broker.Request{Scopes: []string{"a", "b"}, RefreshToken: broker.NewSecret("r")},
			target + "refresh_token&refresh_token=r" + resources},
		"part of a refresh": {[]func(*oauth.ProfileConfig){byCode}, broker.Request{Scopes: []string{"a"}, RefreshToken: broker.NewSecret("r")},
			"client_id=tester&client_secret=s&grant_type=refresh_token&refresh_token=r&scope=a"},
	} {
		t.Run(name, func(t *testing.T) {
			r, base := record(t, reply{body: bearer})
			if _, err := profileFor(t, profileConfig(base, tc.change...)).Issuer.Issue(t.Context(), tc.request); err != nil {
				t.Fatal(err)
			}
			r.want(t, posted("/token", tc.want))
		})
	}
}

func TestACodeProfileWithoutARefreshTokenAsksNothing(t *testing.T) {
	r, base := record(t, reply{body: bearer})
	grant, err := profileFor(t, profileConfig(base, byCode)).Issuer.Issue(t.Context(), broker.Request{Scopes: []string{"a"}})
	e := failure(t, grant, err)
	wantKind(t, e, broker.GrantDead, "a person must sign in")
	wantOutcome(t, e, broker.Unsent)
	r.want(t)
}

func TestWhatAProfileCan(t *testing.T) {
	for name, tc := range map[string]struct {
		change              []func(*oauth.ProfileConfig)
		revokes, authorizes bool
		refreshTokens       bool
	}{
		"client_credentials":  {nil, false, false, false},
		"password":            {[]func(*oauth.ProfileConfig){byPassword}, false, false, false},
		"password, offline":   {[]func(*oauth.ProfileConfig){byPassword, func(c *oauth.ProfileConfig) { c.Scopes = []string{"offline_access"} }}, false, false, true},
		"code":                {[]func(*oauth.ProfileConfig){byCode}, false, true, true},
		"code and revocation": {[]func(*oauth.ProfileConfig){byCode, func(c *oauth.ProfileConfig) { c.RevocationURL = "https://h/revoke" }}, true, true, true},
		"a revocation URL":    {[]func(*oauth.ProfileConfig){func(c *oauth.ProfileConfig) { c.RevocationURL = "https://h/revoke" }}, true, false, false},
		"discovery":           {[]func(*oauth.ProfileConfig){func(c *oauth.ProfileConfig) { c.Issuer, c.TokenURL, c.AuthorizationURL = "https://h", "", "" }}, true, false, false},
	} {
		p := profileFor(t, profileConfig("https://h", tc.change...))
		_, revokes := p.Issuer.(broker.Revoker)
		a, authorizes := p.Issuer.(broker.Authorizer)
		if revokes != tc.revokes || authorizes != tc.authorizes || p.RefreshTokens != tc.refreshTokens {
			t.Errorf("%s: revokes %v, authorizes %v, has refresh tokens %v", name, revokes, authorizes, p.RefreshTokens)
		}
		if authorizes && a.RedirectURL() != "https://broker.example.com/oauth/callback" {
			t.Errorf("%s: the browser comes back to %s", name, a.RedirectURL())
		}
	}
}

func TestAProfileIsComplete(t *testing.T) {
	c := profileConfig("https://ID.example.com:443", byCode)
	c.Timeout, c.Grace, c.Reusable, c.ConsentLifetime, c.DefaultLifetime, c.MaxTokenAge, c.RejectedRetry = 1, 2, true, 3, 4, 5, 6
	c.ConsoleURL = "https://console"
	p := profileFor(t, c)
	c.Scopes[0] = "changed"
	got := fmt.Sprintln(p.Name, p.Provider, p.GrantType, p.Scopes, p.Reusable, p.Endpoint, p.ConsoleURL,
		[]time.Duration{p.Timeout, p.Grace, p.ConsentLifetime, p.DefaultLifetime, p.MaxTokenAge, p.RejectedRetry})
	if want := "tests oauth2 authorization_code [b a] true https://id.example.com/token https://console [1ns 2ns 3ns 4ns 5ns 6ns]\n"; got != want {
		t.Errorf("profile is\n%s\nwant\n%s", got, want)
	}
}

// What changes what is issued is another identity; what is presented is in the
// credential; the rest changes neither.
func TestIdentityAndCredential(t *testing.T) {
	certificate, key := clientPair(t)
	otherCertificate, otherKey := clientPair(t)
	base := map[string]oauth.ProfileConfig{
		"password": profileConfig("https://h", byPassword, targeted),
		"code":     profileConfig("https://h", byCode),
		"key":      profileConfig("https://h", byKey(key.Reveal())),
		"tls": profileConfig("https://h", func(c *oauth.ProfileConfig) {
			c.ClientAuth, c.ClientSecrets, c.Certificate, c.PrivateKey = oauth.TLSClientAuth, nil, certificate, key
		}),
	}
	for name, tc := range map[string]struct {
		of                   string
		change               func(*oauth.ProfileConfig)
		identity, credential bool // the same
	}{
		"nothing":   {"password", func(*oauth.ProfileConfig) {}, true, true},
		"scopes":    {"password", func(c *oauth.ProfileConfig) { c.Scopes = nil }, true, true},
		"name":      {"password", func(c *oauth.ProfileConfig) { c.Name = "other" }, true, true},
		"endpoint":  {"password", func(c *oauth.ProfileConfig) { c.TokenURL += "/other" }, false, true},
		"issuer":    {"password", func(c *oauth.ProfileConfig) { c.Issuer, c.TokenURL, c.AuthorizationURL = "https://h", "", "" }, false, true},
		"client":    {"password", func(c *oauth.ProfileConfig) { c.ClientID = "other" }, false, true},
		"audience":  {"password", func(c *oauth.ProfileConfig) { c.Audience = "other" }, false, true},
		"resource":  {"password", func(c *oauth.ProfileConfig) { c.Resource = c.Resource[:1] }, false, true},
		"extra":     {"password", func(c *oauth.ProfileConfig) { c.Extra = map[string]string{"extra": "other"} }, false, true},
		"user":      {"password", func(c *oauth.ProfileConfig) { c.Username = broker.NewSecret("other") }, false, false},
		"password":  {"password", func(c *oauth.ProfileConfig) { c.Password = broker.NewSecret("other") }, true, false},
		"secret":    {"password", func(c *oauth.ProfileConfig) { c.ClientSecrets = []broker.Secret{broker.NewSecret("other")} }, true, false},
		"style":     {"password", func(c *oauth.ProfileConfig) { c.ClientAuth = oauth.ClientSecretBasic }, true, false}, // the wrong one is refused like a wrong secret
		"grant":     {"code", func(c *oauth.ProfileConfig) { c.GrantType = broker.ClientCredentials }, false, true},
		"redirect":  {"code", func(c *oauth.ProfileConfig) { c.RedirectURL += "/other" }, true, true}, // an edit must not cost the consent
		"new pair":  {"tls", func(c *oauth.ProfileConfig) { c.Certificate, c.PrivateKey = otherCertificate, otherKey }, false, false},
		"by secret": {"tls", func(c *oauth.ProfileConfig) { *c = profileConfig("https://h") }, false, false},
		"key's id":  {"key", func(c *oauth.ProfileConfig) { c.KeyID = "other" }, true, false},
		"recipient": {"key", func(c *oauth.ProfileConfig) { c.AssertionAudience = "https://h" }, true, false},
		"consents": {"code", func(c *oauth.ProfileConfig) {
			c.ClientAuth, c.ClientSecrets, c.PrivateKey = oauth.PrivateKeyJWT, nil, key
		}, true, false},
	} {
		c := base[tc.of]
		before := profileFor(t, c)
		tc.change(&c)
		after := profileFor(t, c)
		if (before.Identity == after.Identity) != tc.identity || (before.Credential == after.Credential) != tc.credential {
			t.Errorf("%s: the same identity is %v, the same credential %v", name, before.Identity == after.Identity, before.Credential == after.Credential)
		}
	}
}

func TestProfileMistakes(t *testing.T) {
	certificate, key := clientPair(t)
	_, otherKey := clientPair(t)
	const secret = "secret-value"
	tlsAuth := func(certificate []byte, key broker.Secret) func(*oauth.ProfileConfig) {
		return func(c *oauth.ProfileConfig) {
			c.ClientAuth, c.ClientSecrets, c.Certificate, c.PrivateKey = oauth.TLSClientAuth, nil, certificate, key
		}
	}
	jwtAuth := func(key string) func(*oauth.ProfileConfig) {
		return func(c *oauth.ProfileConfig) {
			c.ClientAuth, c.ClientSecrets, c.PrivateKey = oauth.PrivateKeyJWT, nil, broker.NewSecret(key)
		}
	}
	for words, change := range map[string]func(*oauth.ProfileConfig){
		"name is missing":                   func(c *oauth.ProfileConfig) { c.Name = "" },
		"there is no fingerprint key":       func(c *oauth.ProfileConfig) { c.FingerprintKey = nil },
		"token_url is missing":              func(c *oauth.ProfileConfig) { c.TokenURL = "" },
		"authorization_url holds a user":    func(c *oauth.ProfileConfig) { c.AuthorizationURL = "https://u:" + secret + "@h" },
		"revocation_url has a fragment":     func(c *oauth.ProfileConfig) { c.RevocationURL = "https://h/#" + secret },
		"issuer excludes token_url":         func(c *oauth.ProfileConfig) { c.Issuer = "https://h" },
		"issuer has a query":                func(c *oauth.ProfileConfig) { c.Issuer, c.TokenURL, c.AuthorizationURL = "https://h?x="+secret, "", "" },
		"issuer http://h would send":        func(c *oauth.ProfileConfig) { c.Issuer, c.TokenURL, c.AuthorizationURL = "http://h", "", "" },
		"client_id is missing":              func(c *oauth.ProfileConfig) { c.ClientID = "" },
		`client_auth "magic" is not one of`: func(c *oauth.ProfileConfig) { c.ClientAuth = "magic" },
		"client_secret is missing":          func(c *oauth.ProfileConfig) { c.ClientSecrets = nil },
		"client_secret has blanks":          func(c *oauth.ProfileConfig) { c.ClientSecrets[0] = broker.NewSecret(secret + "\n") },
		"client_secret is of no use with client_auth private_key_jwt": func(c *oauth.ProfileConfig) {
			c.ClientAuth, c.PrivateKey = oauth.PrivateKeyJWT, key
		},
		"private_key is missing or empty":                        jwtAuth(""),
		"private_key holds no private key in PEM":                jwtAuth(secret),
		"private_key holds a damaged key":                        jwtAuth("-----BEGIN PRIVATE KEY-----\nc2VjcmV0LXZhbHVl\n-----END PRIVATE KEY-----\n"),
		"private_key is encrypted":                               jwtAuth("-----BEGIN ENCRYPTED PRIVATE KEY-----\nc2VjcmV0LXZhbHVl\n-----END ENCRYPTED PRIVATE KEY-----\n"),
		"private_key is an RSA key of 1024 bits":                 jwtAuth(keyPEM(t, weakRSA(t))),
		"private_key is on the curve P-384: use P-256":           jwtAuth(keyPEM(t, p384(t))),
		"private_key cannot sign":                                jwtAuth(keyPEM(t, x25519(t))),
		"certificate holds no certificate in PEM":                tlsAuth(nil, key),
		"certificate is damaged":                                 tlsAuth([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), key),
		"certificate does not belong to private_key":             tlsAuth(certificate, otherKey),
		`the grant "" is not one of`:                             func(c *oauth.ProfileConfig) { c.GrantType = "" },
		"password.username is empty":                             func(c *oauth.ProfileConfig) { c.GrantType = broker.Password; c.Password = key },
		"password.password is empty":                             func(c *oauth.ProfileConfig) { c.GrantType = broker.Password; c.Username = broker.NewSecret("u") },
		"authorization_code.redirect_url is missing":             func(c *oauth.ProfileConfig) { c.GrantType = broker.AuthorizationCode },
		"authorization_code.redirect_url is not an absolute URL": func(c *oauth.ProfileConfig) { byCode(c); c.RedirectURL = "/oauth/callback" },
		"authorization_url is missing":                           func(c *oauth.ProfileConfig) { byCode(c); c.AuthorizationURL = "" },
		`scopes has "a b", which is not one scope`:               func(c *oauth.ProfileConfig) { c.Scopes = []string{"a b"} },
	} {
		c := profileConfig("https://h", change)
		_, err := oauth.NewProfile(c)
		if err == nil || !strings.Contains(err.Error(), words) || strings.Contains(err.Error(), "\n") {
			t.Errorf("error is %v, want %q alone", err, words)
		}
		if err != nil && (strings.Contains(err.Error(), secret) || strings.Contains(err.Error(), "c2VjcmV0")) {
			t.Errorf("a secret is shown: %v", err)
		}
	}
}

// The next secret is tried after invalid_client alone, whatever the method and
// the grant are.
func TestTheNextSecret(t *testing.T) {
	for _, auth := range []oauth.ClientAuth{oauth.ClientSecretPost, oauth.ClientSecretBasic} {
		for grant, change := range map[string]func(*oauth.ProfileConfig){
			"client_credentials": func(*oauth.ProfileConfig) {}, "password": byPassword, "refresh_token": byCode, "authorization_code": byCode,
		} {
			for _, tc := range []struct {
				status int
				body   string
				want   int
			}{
				{401, `{"error":"invalid_client"}`, 2},
				{400, `{"error":"invalid_client"}`, 2},
				{400, `{"error":"invalid_grant"}`, 1},
				{400, `{"error":"invalid_request"}`, 1},
				{401, `{}`, 1},
				{401, `<html>`, 1},
				{429, `{"error":"invalid_client"}`, 1},
				{503, `{"error":"invalid_client"}`, 1},
				{200, `{}`, 1},
			} {
				r, base := record(t, reply{status: tc.status, body: tc.body})
				c := profileConfig(base, change)
				c.ClientAuth = auth
				c.ClientSecrets = []broker.Secret{broker.NewSecret("new"), broker.NewSecret("old"), broker.NewSecret("new")}
				p := profileFor(t, c)
				var err error
				switch grant {
				case "authorization_code":
					_, err = p.Issuer.(broker.Authorizer).Exchange(t.Context(), broker.CodeExchange{Code: broker.NewSecret("code"), Verifier: broker.NewSecret("verifier")})
				case "refresh_token":
					_, err = p.Issuer.Issue(t.Context(), broker.Request{RefreshToken: broker.NewSecret("r")})
				default:
					_, err = p.Issuer.Issue(t.Context(), broker.Request{})
				}
				if got := r.requests(); err == nil || len(got) != tc.want {
					t.Errorf("%s, %s, %v: %d requests (error %v)", auth, grant, tc, len(got), err)
				}
			}
		}
	}
}
