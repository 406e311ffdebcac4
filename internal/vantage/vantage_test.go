package vantage_test

import (
	"errors"
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
	"github.com/tokenbroker/tokenbroker/internal/vantage"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// config is a good one for the server at base.
func config(base string, secrets ...string) vantage.Config {
	c := vantage.Config{BaseURL: base, ProfileConfig: oauth.ProfileConfig{
		Name:           "invoices",
		ClientID:       "invoices",
		Scopes:         []string{"openid", "permissions", "global.wildcard"},
		FingerprintKey: []byte("key"),
	}}
	for _, s := range secrets {
		c.ClientSecrets = append(c.ClientSecrets, broker.NewSecret(s))
	}
	return c
}

func profileFor(t *testing.T, c vantage.Config) *broker.Profile {
	t.Helper()
	if c.Transport == nil {
		c.Transport = oauth.NewTransport(oauth.TransportConfig{})
		t.Cleanup(c.Transport.CloseIdleConnections)
	}
	p, err := vantage.NewProfile(c)
	if err != nil {
		t.Fatalf("NewProfile: %v", err)
	}
	return p
}

func TestEndpoints(t *testing.T) {
	for want, c := range map[string]vantage.Config{
		"https://vantage-eu.abbyy.com/auth2/connect/token":                   {Region: "eu"},
		"https://vantage-us.abbyy.com/auth2/connect/token":                   {Region: "us"},
		"https://vantage-au.abbyy.com/auth2/7c1f-5a/connect/token":           {Region: "au", TenantID: "7c1f-5a"},
		"https://vantage.example.com/auth2/connect/token":                    {BaseURL: "https://vantage.example.com"},
		"https://vantage.example.com/auth2/a%3Fb%25%23c/connect/token":       {BaseURL: "https://vantage.example.com/", TenantID: "a?b%#c"},
		"https://vantage.example.com:8443/on/prem/auth2/connect/token":       {BaseURL: "https://Vantage.Example.com:8443/on/prem//"},
		"https://vantage.example.com/a%2Fb/auth2/connect/token":              {BaseURL: "https://vantage.example.com:443/a%2Fb/"},
		"http://localhost:8080/auth2/connect/token":                          {BaseURL: "http://localhost:8080"},
		"http://vantage.internal/auth2/connect/token":                        {BaseURL: "http://vantage.internal", ProfileConfig: oauth.ProfileConfig{AllowInsecureHTTP: true}},
		"http://[::1]:8080/auth2/00000000-0000-4000-8000-0000/connect/token": {BaseURL: "http://[::1]:8080", TenantID: "00000000-0000-4000-8000-0000"},
	} {
		base := config("", "s")
		base.Region, base.BaseURL, base.TenantID, base.AllowInsecureHTTP = c.Region, c.BaseURL, c.TenantID, c.AllowInsecureHTTP
		if got := profileFor(t, base).Endpoint; got != want {
			t.Errorf("endpoint is %s, want %s", got, want)
		}
	}
}

func TestMistakesAreAllTold(t *testing.T) {
	_, err := vantage.NewProfile(vantage.Config{TenantID: "../x", ProfileConfig: oauth.ProfileConfig{Scopes: []string{"a b"}}})
	want := []string{
		"neither region nor base_url is set: set region to eu, us, au, or base_url for a private cloud",
		"tenant_id has slashes, dots or blanks: copy it from Vantage, Configuration, General",
		"name is missing",
		"there is no fingerprint key",
		"client_id is missing",
		"client_secret is missing: set client_secret or client_secrets",
		`scopes has "a b", which is not one scope (RFC 6749 section 3.3): write each on its own`,
	}
	if err == nil || !slices.Equal(strings.Split(err.Error(), "\n"), want) {
		t.Errorf("error is\n%v", err)
	}
}

func TestMistakes(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*vantage.Config)
		words  string
	}{
		"unknown region":     {func(c *vantage.Config) { c.BaseURL, c.Region = "", "de" }, `region "de" is not one of eu, us, au: for a private cloud set base_url`},
		"both":               {func(c *vantage.Config) { c.Region = "eu" }, "region and base_url exclude each other"},
		"no URL":             {func(c *vantage.Config) { c.BaseURL = "vantage.example.com" }, "base_url is not an absolute URL such as"},
		"broken URL":         {func(c *vantage.Config) { c.BaseURL = "https://u:hush@h/%zz" }, "base_url is not an absolute URL"},
		"password in it":     {func(c *vantage.Config) { c.BaseURL = "https://u:hush@h" }, "base_url holds a user name"},
		"query":              {func(c *vantage.Config) { c.BaseURL = "https://h?hush" }, "base_url has a query"},
		"fragment":           {func(c *vantage.Config) { c.BaseURL = "https://h#hush" }, "base_url has a query or a fragment"},
		"too far":            {func(c *vantage.Config) { c.BaseURL = "https://h/auth2/connect/token" }, "base_url reaches into /auth2"},
		"in clear":           {func(c *vantage.Config) { c.BaseURL = "http://h" }, "would send secrets in clear: use https://, or set allow_insecure_http"},
		"another scheme":     {func(c *vantage.Config) { c.BaseURL = "ftp://h" }, "neither https:// nor http://"},
		"tenant with a dot":  {func(c *vantage.Config) { c.TenantID = "." }, "tenant_id has"},
		"tenant with a back": {func(c *vantage.Config) { c.TenantID = `a\b` }, "tenant_id has"},
		"tenant with an end": {func(c *vantage.Config) { c.TenantID = "a\n" }, "tenant_id has"},
		"client with an end": {func(c *vantage.Config) { c.ClientID = "a\n" }, "client_id has blanks around it"},
		"empty secret":       {func(c *vantage.Config) { c.ClientSecrets = append(c.ClientSecrets, broker.Secret{}) }, "client_secrets[1] is empty"},
		"secret with an end": {func(c *vantage.Config) { c.ClientSecrets[0] = broker.NewSecret("hush\n") }, "client_secret has blanks or line ends around it"},
		"no secret":          {func(c *vantage.Config) { c.ClientSecrets = nil }, "client_secret is missing"},
		"another grant":      {func(c *vantage.Config) { c.GrantType = oauth.RefreshToken }, `the grant "refresh_token" is not one of client_credentials, password`},
		"no redirect":        {func(c *vantage.Config) { c.GrantType = broker.AuthorizationCode }, "authorization_code.redirect_url is missing"},
		"no user name":       {func(c *vantage.Config) { *c = withUser(*c, "", "hush") }, "password.username is empty: check the file"},
		"user with an end":   {func(c *vantage.Config) { *c = withUser(*c, "hush\n", "hush") }, "password.username has blanks or line ends around it"},
		"no password":        {func(c *vantage.Config) { *c = withUser(*c, "hush", "") }, "password.password is empty: check the file"},
		"empty scope":        {func(c *vantage.Config) { c.Scopes = []string{""} }, "is not one scope"},
	} {
		t.Run(name, func(t *testing.T) {
			c := config("https://vantage.example.com", "s")
			tc.change(&c)
			_, err := vantage.NewProfile(c)
			if err == nil || !strings.Contains(err.Error(), tc.words) || strings.Contains(err.Error(), "hush") || strings.Contains(err.Error(), "\n") {
				t.Errorf("error is %v, want %q", err, tc.words)
			}
		})
	}
}

func TestIdentityIsWhatWouldBeIssued(t *testing.T) {
	base := func() vantage.Config { return config("https://vantage-eu.abbyy.com", "s") }
	identity := profileFor(t, base()).Identity
	for name, tc := range map[string]struct {
		change func(*vantage.Config)
		same   bool
	}{
		"name":        {func(c *vantage.Config) { c.Name = "other" }, true},
		"scopes":      {func(c *vantage.Config) { c.Scopes = nil }, true},
		"secrets":     {func(c *vantage.Config) { c.ClientSecrets[0] = broker.NewSecret("other") }, true},
		"times":       {func(c *vantage.Config) { c.Timeout, c.MaxTokenAge = 1, 1 }, true},
		"spelling":    {func(c *vantage.Config) { c.BaseURL = "https://Vantage-EU.abbyy.com:443/" }, true},
		"same region": {func(c *vantage.Config) { c.BaseURL, c.Region = "", "eu" }, true},
		"region":      {func(c *vantage.Config) { c.BaseURL, c.Region = "", "us" }, false},
		"tenant":      {func(c *vantage.Config) { c.TenantID = "t" }, false},
		"client":      {func(c *vantage.Config) { c.ClientID = "other" }, false},
	} {
		c := base()
		tc.change(&c)
		if got := profileFor(t, c).Identity; (got == identity) != tc.same {
			t.Errorf("%s: the same identity is %v, want %v", name, got == identity, tc.same)
		}
	}
}

func TestCredentialFollowsTheSecrets(t *testing.T) {
	credential := func(key string, secrets ...string) string {
		c := config("https://h", secrets...)
		c.FingerprintKey = []byte(key)
		return profileFor(t, c).Credential
	}
	base := credential("key", "new", "old")
	if base != credential("key", "new", "old", "new") {
		t.Error("a repeated secret changes the credential")
	}
	for _, other := range []string{credential("key", "new"), credential("key", "old", "new"), credential("yek", "new", "old")} {
		if other == base {
			t.Error("two credentials have one name")
		}
	}
}

func TestProfileIsComplete(t *testing.T) {
	c := config("https://h", "s")
	c.DefaultLifetime, c.MaxTokenAge, c.RejectedRetry, c.Timeout, c.Grace, c.Reusable = 1, 2, 3, 4, 5, true
	p := profileFor(t, c)
	c.Scopes[0] = "changed"
	if p.Name != "invoices" || p.Provider != "vantage" || p.GrantType != broker.ClientCredentials || p.Issuer == nil ||
		p.DefaultLifetime != 1 || p.MaxTokenAge != 2 || p.RejectedRetry != 3 || p.Scopes[0] != "openid" ||
		p.Timeout != 4 || p.Grace != 5 || !p.Reusable {
		t.Errorf("profile is %+v", p)
	}
	if p := profileFor(t, config("https://h", "s")); p.Timeout != 10*time.Second {
		t.Errorf("the time-out is %v", p.Timeout)
	}
}

// server is a token endpoint that knows some secrets and remembers what it was
// asked.
type server struct {
	mu    sync.Mutex
	good  string
	seen  []string // client_secret of each request
	forms []string
	then  http.HandlerFunc // answers good secrets; nil grants
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	r.Body = io.NopCloser(strings.NewReader(string(body)))
	s.mu.Lock()
	s.seen = append(s.seen, r.PostFormValue("client_secret"))
	s.forms = append(s.forms, r.RequestURI+" "+string(body))
	good, then := s.good == r.PostFormValue("client_secret"), s.then
	s.mu.Unlock()
	switch {
	case !good:
		w.WriteHeader(http.StatusBadRequest)
		io.WriteString(w, `{"error":"invalid_client"}`)
	case then != nil:
		then(w, r)
	default:
		io.WriteString(w, `{"access_token":"token","expires_in":2592000,"token_type":"Bearer","scope":"openid permissions"}`)
	}
}

// accept makes one secret the good one, which then answers, and forgets what was
// asked.
func (s *server) accept(secret string, then http.HandlerFunc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.good, s.then, s.seen = secret, then, nil
}

func (s *server) asked() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	asked := strings.Join(s.seen, " ")
	s.seen = nil
	return asked
}

func serve(t *testing.T, h http.Handler) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

// issue is one attempt; it returns what the server was asked with.
func issue(t *testing.T, p *broker.Profile, s *server) (string, *broker.IssueError) {
	t.Helper()
	_, err := p.Issuer.Issue(t.Context(), broker.Request{})
	var e *broker.IssueError
	if err != nil && !errors.As(err, &e) {
		t.Fatalf("error is %T", err)
	}
	return s.asked(), e
}

func TestTheNextSecretOnlyWhenTheClientIsRefused(t *testing.T) {
	s := &server{good: "old"}
	p := profileFor(t, config(serve(t, s), "new", "old", "older"))
	for _, step := range []struct{ good, asked string }{
		{"old", "new old"},       // Vantage does not know the new one yet
		{"old", "old"},           // and is not asked again
		{"new", "old older new"}, // the old one has ended
		{"new", "new"},
		{"old", "new old"},
	} {
		s.accept(step.good, nil)
		asked, err := issue(t, p, s)
		if err != nil || asked != step.asked {
			t.Errorf("while %s is good the server was asked with %q (error %v), want %q", step.good, asked, err, step.asked)
		}
	}
}

func TestNoOtherFailureTriesTheNextSecret(t *testing.T) {
	for name, answer := range map[string]struct {
		status int
		body   string
	}{
		"scope":   {400, `{"error":"invalid_scope"}`},
		"grant":   {400, `{"error":"unauthorized_client"}`},
		"gateway": {401, `<html>`},
		"busy":    {429, `{"error":"invalid_client"}`},
		"down":    {503, `{"error":"invalid_client"}`},
		"odd":     {400, `{"error":"invalid_grant"}`},
	} {
		t.Run(name, func(t *testing.T) {
			s := &server{good: "new", then: func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(answer.status)
				io.WriteString(w, answer.body)
			}}
			p := profileFor(t, config(serve(t, s), "new", "old"))
			if asked, err := issue(t, p, s); err == nil || asked != "new" {
				t.Errorf("the server was asked with %q, error %v", asked, err)
			}
		})
	}
}

func TestARefusalSaysWhatToDo(t *testing.T) {
	s := &server{good: "none of them"}
	base := serve(t, s)
	for want, secrets := range map[string][]string{
		" answered 400 invalid_client; Vantage says the same of":                                 {"a-secret"},
		" answered 400 invalid_client to each of the 2 client secrets; Vantage says the same of": {"a-secret", "b-secret", "a-secret"},
	} {
		asked, err := issue(t, profileFor(t, config(base, secrets...)), s)
		if err == nil || err.Kind != broker.ClientRejected || err.Code != "invalid_client" || !strings.Contains(err.Text, want) || strings.Contains(err.Text, "a-secret") {
			t.Errorf("error is %v, want %q", err, want)
		}
		if n := len(strings.Fields(asked)); n != min(len(secrets), 2) {
			t.Errorf("the server was asked with %q", asked)
		}
	}
}

func TestManyAtOnceSettleOnOneSecret(t *testing.T) {
	s := &server{good: "old"}
	p := profileFor(t, config(serve(t, s), "new", "old", "older"))
	var flights sync.WaitGroup
	for range 50 {
		flights.Go(func() {
			if _, err := p.Issuer.Issue(t.Context(), broker.Request{}); err != nil {
				t.Error(err)
			}
		})
	}
	flights.Wait()
	if asked := s.asked(); strings.Contains(asked, "older") {
		t.Errorf("the server was asked with %s", asked)
	}
	if asked, err := issue(t, p, s); asked != "old" || err != nil {
		t.Errorf("afterwards the server was asked with %q (error %v)", asked, err)
	}
}

func TestAllSecretsShareOneTimeout(t *testing.T) {
	s := &server{good: "old", then: func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }}
	c := config(serve(t, s), "new", "old")
	c.Timeout = 200 * time.Millisecond
	start := time.Now()
	asked, err := issue(t, profileFor(t, c), s)
	if err == nil || err.Kind != broker.Ambiguous || asked != "new old" || time.Since(start) > 3*time.Second {
		t.Errorf("asked with %q, error %v after %s", asked, err, time.Since(start))
	}
}

func TestAgainstTheSandbox(t *testing.T) {
	vantageServer, err := sandbox.New(sandbox.Options{Clients: []sandbox.Client{{
		ID:         "invoices",
		Secrets:    []sandbox.Secret{{Value: "s+&%=: é"}},
		GrantTypes: []string{"client_credentials"},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { vantageServer.Close() })
	base := serve(t, vantageServer)
	for _, tenant := range []string{"", sandbox.DemoTenant} {
		c := config(base, "wrong", "s+&%=: é")
		c.TenantID = tenant
		grant, err := profileFor(t, c).Issuer.Issue(t.Context(), broker.Request{Scopes: c.Scopes})
		if err != nil {
			t.Fatal(err)
		}
		if grant.AccessToken.IsEmpty() || grant.TokenType != "Bearer" || grant.Lifetime != 24*time.Hour {
			t.Errorf("grant is %+v", grant)
		}
	}
	got := vantageServer.Calls().ByGrant["client_credentials"]
	if got["success"] != 2 || got["invalid_client"] != 2 || vantageServer.Calls().Total != 4 {
		t.Errorf("the sandbox counted %v", got)
	}
}

func TestTheSandboxesRefusals(t *testing.T) {
	vantageServer, err := sandbox.New(sandbox.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { vantageServer.Close() })
	c := config(serve(t, vantageServer), "wrong")
	kindOf := func(c vantage.Config, scopes ...string) broker.IssueErrorKind {
		_, err := profileFor(t, c).Issuer.Issue(t.Context(), broker.Request{Scopes: scopes})
		var e *broker.IssueError
		if !errors.As(err, &e) {
			t.Fatal(err)
		}
		return e.Kind
	}
	if kind := kindOf(c); kind != broker.ClientRejected {
		t.Errorf("a wrong secret is %v", kind)
	}
	c.ClientSecrets[0] = broker.NewSecret(vantageServer.ClientSecret("invoices"))
	if kind := kindOf(c, "no.such.scope"); kind != broker.RequestRejected {
		t.Errorf("a wrong scope is %v", kind)
	}
	c.TenantID = "no-such-tenant"
	if kind := kindOf(c); kind != broker.Unavailable {
		t.Errorf("a wrong tenant is %v", kind)
	}
}
