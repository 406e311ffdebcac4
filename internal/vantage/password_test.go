package vantage_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/vantage"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// withUser is config with the grant password.
func withUser(c vantage.Config, username, password string) vantage.Config {
	c.GrantType = broker.Password
	c.Username, c.Password = broker.NewSecret(username), broker.NewSecret(password)
	return c
}

// offline is what a profile with refresh tokens asks for.
var offline = []string{"openid", "permissions", "global.wildcard", "offline_access"}

func issueError(t *testing.T, err error) *broker.IssueError {
	t.Helper()
	var e *broker.IssueError
	if !errors.As(err, &e) {
		t.Fatalf("error is %v, want an *broker.IssueError", err)
	}
	return e
}

// onlyForm is the one request that s saw, without its path.
func onlyForm(t *testing.T, s *server) string {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.forms) != 1 {
		t.Fatalf("the server saw %d requests", len(s.forms))
	}
	path, form, _ := strings.Cut(s.forms[0], " ")
	if path != "/auth2/tenant-1/connect/token" {
		t.Errorf("the request went to %s", path)
	}
	s.forms = nil
	return form
}

func TestThePasswordRequest(t *testing.T) {
	s := &server{good: "s"}
	c := withUser(config(serve(t, s), "s"), "o p@example.com", " päss+&%= ")
	c.TenantID, c.Scopes = "tenant-1", offline
	p := profileFor(t, c)
	const who = "client_id=invoices&client_secret=s&grant_type=password&password=+p%C3%A4ss%2B%26%25%3D+"
	const user = "&username=o+p%40example.com"
	for _, tc := range []struct {
		scopes []string
		want   string
	}{
		{offline, who + "&scope=openid+permissions+global.wildcard+offline_access" + user},
		{[]string{"offline_access", "permissions", "openid", "global.wildcard"}, who + "&scope=offline_access+permissions+openid+global.wildcard" + user},
		// A refresh token for a part would take the place of that for all.
		{[]string{"openid", "offline_access"}, who + "&scope=openid" + user},
		{[]string{"permissions"}, who + "&scope=permissions" + user},
		{nil, who + user},
	} {
		if _, err := p.Issuer.Issue(t.Context(), broker.Request{Scopes: tc.scopes}); err != nil {
			t.Fatal(err)
		}
		if got := onlyForm(t, s); got != tc.want {
			t.Errorf("the server saw\n%s\nwant\n%s", got, tc.want)
		}
	}
}

func TestTheRefreshRequest(t *testing.T) {
	s := &server{good: "s"}
	c := withUser(config(serve(t, s), "s"), "u", "p")
	c.TenantID, c.Scopes = "tenant-1", offline
	p := profileFor(t, c)
	const who = "client_id=invoices&client_secret=s&grant_type=refresh_token&refresh_token=r%2F1"
	for _, tc := range []struct {
		scopes []string
		want   string
	}{
		{nil, who},
		{offline, who},
		{[]string{"offline_access", "permissions", "openid", "global.wildcard"}, who},
		{[]string{"openid", "permissions"}, who + "&scope=openid+permissions"},
	} {
		request := broker.Request{Scopes: tc.scopes, RefreshToken: broker.NewSecret("r/1")}
		if _, err := p.Issuer.Issue(t.Context(), request); err != nil {
			t.Fatal(err)
		}
		if got := onlyForm(t, s); got != tc.want {
			t.Errorf("the server saw\n%s\nwant\n%s", got, tc.want)
		}
	}
}

func TestThePasswordProfile(t *testing.T) {
	base := func() vantage.Config {
		c := withUser(config("https://h", "s"), "user", "password")
		c.Scopes = offline
		return c
	}
	p := profileFor(t, base())
	if p.GrantType != broker.Password || !p.RefreshTokens {
		t.Errorf("profile is %+v", p)
	}
	if _, ok := p.Issuer.(broker.Revoker); !ok {
		t.Error("the profile cannot revoke")
	}
	c := base()
	c.Scopes = offline[:3]
	if profileFor(t, c).RefreshTokens {
		t.Error("there are refresh tokens without offline_access")
	}
	c = config("https://h", "s")
	c.Scopes = offline
	if profileFor(t, c).RefreshTokens {
		t.Error("client_credentials brings refresh tokens")
	}
	for name, tc := range map[string]struct {
		change     func(*vantage.Config)
		identity   bool // the same
		credential bool // the same
	}{
		"scopes":   {func(c *vantage.Config) { c.Scopes = nil }, true, true},
		"times":    {func(c *vantage.Config) { c.Grace, c.Reusable = 1, true }, true, true},
		"password": {func(c *vantage.Config) { c.Password = broker.NewSecret("other") }, true, false},
		"secret":   {func(c *vantage.Config) { c.ClientSecrets[0] = broker.NewSecret("other") }, true, false},
		"user":     {func(c *vantage.Config) { c.Username = broker.NewSecret("other") }, false, false},
		"grant":    {func(c *vantage.Config) { c.GrantType = "" }, false, false},
		"key":      {func(c *vantage.Config) { c.FingerprintKey = []byte("yek") }, false, false}, // else the name could be guessed
	} {
		c := base()
		tc.change(&c)
		got := profileFor(t, c)
		if (got.Identity == p.Identity) != tc.identity || (got.Credential == p.Credential) != tc.credential {
			t.Errorf("%s: the same identity is %v, the same credential %v", name, got.Identity == p.Identity, got.Credential == p.Credential)
		}
	}
}

// hush is part of every secret that must not be in an error.
const hush = "hush-8c1f"

func newSandbox(t *testing.T, options sandbox.Options) (*sandbox.Server, string) {
	t.Helper()
	s, err := sandbox.New(options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s, serve(t, s)
}

// operator is the sandbox's client for the grant password, and its user.
func operator(s *sandbox.Server, base string) vantage.Config {
	c := withUser(config(base, s.ClientSecret("operator")), "operator@example.com", sandbox.DemoPassword)
	c.ClientID, c.Scopes = "operator", slices.Clone(offline)
	return c
}

// Vantage says the same of all of these, so that the broker must say them all.
func TestARefusedUser(t *testing.T) {
	const abroad, home = "11111111-0000-4000-8000-000000000000", sandbox.DemoTenant
	const username, password = hush + "@example.com", hush + "-password"
	var s *sandbox.Server
	for name, tc := range map[string]struct {
		prepare func(*vantage.Config)
	}{
		"wrong password":  {func(c *vantage.Config) { c.Password = broker.NewSecret(hush + "-wrong") }},
		"unknown user":    {func(c *vantage.Config) { c.Username = broker.NewSecret("no-" + hush) }},
		"locked account":  {func(*vantage.Config) { lock(t, s, username) }},
		"several tenants": {func(c *vantage.Config) { c.Username, c.TenantID = broker.NewSecret("both@example.com"), "" }},
		"external identity provider": {func(c *vantage.Config) {
			c.Username, c.TenantID = broker.NewSecret("both@example.com"), abroad
		}},
	} {
		t.Run(name, func(t *testing.T) {
			var base string
			s, base = newSandbox(t, sandbox.Options{
				Tenants: []sandbox.Tenant{{ID: home}, {ID: abroad, ExternalIdentityProvider: true}},
				Users: []sandbox.User{
					{Name: username, Password: password},
					{Name: "both@example.com", Password: password}, {Name: "both@example.com", Password: password, Tenant: abroad},
				},
				Clients: []sandbox.Client{{ID: "operator", GrantTypes: []string{"password"}, AllowOfflineAccess: true}},
			})
			c := operator(s, base)
			c.Username, c.Password, c.TenantID = broker.NewSecret(username), broker.NewSecret(password), home
			c.ClientSecrets = append(c.ClientSecrets, broker.NewSecret(hush+"-old-secret"))
			tc.prepare(&c)
			s.ResetCalls()
			_, err := profileFor(t, c).Issuer.Issue(t.Context(), broker.Request{Scopes: c.Scopes})
			e := issueError(t, err)
			if e.Kind != broker.UserRejected || e.Outcome != broker.Answered || e.Code != "invalid_grant" {
				t.Errorf("error is %+v", e)
			}
			for _, words := range []string{"a wrong user name or password", "a locked account", "unless tenant_id is set", "an external identity provider"} {
				if !strings.Contains(e.Text, words) {
					t.Errorf("%q lacks %q", e.Text, words)
				}
			}
			if strings.Contains(fmt.Sprintf("%s %+v", e.Text, e), hush) {
				t.Errorf("a secret is shown: %s", e.Text)
			}
			if n := s.Calls().Total; n != 1 {
				t.Errorf("the password was presented %d times", n)
			}
		})
	}
}

// lock locks an account, as wrong passwords do.
func lock(t *testing.T, s *sandbox.Server, username string) {
	t.Helper()
	c := withUser(config(serve(t, s), s.ClientSecret("operator")), username, "wrong")
	c.ClientID = "operator"
	p := profileFor(t, c)
	for range 5 {
		if _, err := p.Issuer.Issue(t.Context(), broker.Request{}); err == nil {
			t.Fatal("a wrong password was accepted")
		}
	}
}

// What a server repeats of a user is not shown.
func TestAServerThatRepeatsTheUser(t *testing.T) {
	s := &server{good: "s", then: func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(w, `{"error":"invalid_grant","error_description":"no %s, %s, %s"}`,
			r.PostFormValue("username"), r.PostFormValue("password"), r.PostFormValue("refresh_token"))
	}}
	p := profileFor(t, withUser(config(serve(t, s), "s"), "name-"+hush, "password-"+hush))
	for _, request := range []broker.Request{{}, {RefreshToken: broker.NewSecret("refresh-" + hush)}} {
		_, err := p.Issuer.Issue(t.Context(), request)
		if e := issueError(t, err); strings.Contains(e.Text, "hush") || !strings.Contains(e.Text, "[redacted]") {
			t.Errorf("text is %s", e.Text)
		}
	}
}

// requests are the two that present more than the client's secret.
var requests = map[string]broker.Request{
	"password":      {},
	"refresh_token": {RefreshToken: broker.NewSecret("r")},
}

func TestTheNextSecretNeedsAnAnswer(t *testing.T) {
	invalid := func(w http.ResponseWriter, status int) {
		w.WriteHeader(status)
		io.WriteString(w, `{"error":"invalid_client"}`)
	}
	for name, tc := range map[string]struct {
		refuse http.HandlerFunc
		want   string
	}{
		"refused":        {func(w http.ResponseWriter, _ *http.Request) { invalid(w, 400) }, "new old"},
		"refused by 401": {func(w http.ResponseWriter, _ *http.Request) { invalid(w, 401) }, "new old"},
		"a gateway":      {func(w http.ResponseWriter, _ *http.Request) { invalid(w, 504) }, "new"},
		"no answer":      {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "new"},
		"half an answer": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			invalid(w, 400)
		}, "new"},
	} {
		t.Run(name, func(t *testing.T) {
			for grant, request := range requests {
				s := &server{good: "new", then: tc.refuse}
				p := profileFor(t, withUser(config(serve(t, s), "new", "old"), "u", "p"))
				cleared := 0
				if !request.RefreshToken.IsEmpty() {
					request.Clear = func() error { cleared++; return nil }
				}
				_, err := p.Issuer.Issue(t.Context(), request)
				e := issueError(t, err)
				asked := s.asked()
				if asked != tc.want {
					t.Errorf("%s: the server was asked with %q, want %q", grant, asked, tc.want)
				}
				if want := len(strings.Fields(asked)); request.Clear != nil && cleared != want {
					t.Errorf("%d requests, of which %d were cleared", want, cleared)
				}
				if answered := tc.want == "new old"; (e.Outcome == broker.Answered) != answered {
					t.Errorf("%s: the outcome is %d", grant, e.Outcome)
				}
			}
		})
	}
}

// A request that was held back, or whose secret was refused in the last moment,
// is not made with the next secret.
func TestAHeldBackRefresh(t *testing.T) {
	s := &server{good: "old"}
	p := profileFor(t, withUser(config(serve(t, s), "new", "old"), "u", "p"))
	lost := errors.New("lost")
	asked := 0
	_, err := p.Issuer.Issue(t.Context(), broker.Request{RefreshToken: broker.NewSecret("r"), Clear: func() error {
		if asked++; asked == 2 {
			return lost
		}
		return nil
	}})
	if e := issueError(t, err); e.Outcome != broker.Unsent || !errors.Is(e, lost) {
		t.Errorf("error is %+v", e)
	}
	if got := s.asked(); got != "new" {
		t.Errorf("the server was asked with %q", got)
	}
}

// From the first byte on a refresh outlives its caller, and all its requests
// share the profile's time-out.
func TestARefreshOutlivesItsCaller(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	s := &server{good: "s", then: func(w http.ResponseWriter, _ *http.Request) {
		cancel()
		<-ctx.Done()
		io.WriteString(w, `{"access_token":"a","refresh_token":"r2"}`)
	}}
	p := profileFor(t, withUser(config(serve(t, s), "s"), "u", "p"))
	grant, err := p.Issuer.Issue(ctx, broker.Request{RefreshToken: broker.NewSecret("r1")})
	if err != nil || grant.RefreshToken.Reveal() != "r2" {
		t.Errorf("grant is %+v, error %v", grant, err)
	}
}

func TestAllSecretsOfARefreshShareOneTimeout(t *testing.T) {
	const timeout = 2 * time.Second
	s := &server{good: "new"}
	s.then = func(w http.ResponseWriter, _ *http.Request) {
		late := time.NewTimer(timeout * 7 / 10)
		defer late.Stop()
		<-late.C
		w.WriteHeader(http.StatusBadRequest)
		io.WriteString(w, `{"error":"invalid_client"}`)
		s.accept("old", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	}
	c := withUser(config(serve(t, s), "new", "old"), "u", "p")
	c.Timeout = timeout
	start := time.Now()
	_, err := profileFor(t, c).Issuer.Issue(t.Context(), broker.Request{RefreshToken: broker.NewSecret("r")})
	took := time.Since(start)
	if e := issueError(t, err); e.Outcome != broker.OutcomeUnknown || s.asked() != "old" || took < timeout || took > timeout*3/2 {
		t.Errorf("after %s: %v", took, e)
	}
}

// The whole life of a grant with refresh tokens, counted by the server.
func TestRefreshTokensAgainstTheSandbox(t *testing.T) {
	s, base := newSandbox(t, sandbox.Options{})
	for _, tenant := range []string{"", sandbox.DemoTenant} {
		c := operator(s, base)
		c.TenantID = tenant
		p := profileFor(t, c)
		s.ResetCalls()
		first, err := p.Issuer.Issue(t.Context(), broker.Request{Scopes: c.Scopes})
		if err != nil {
			t.Fatal(err)
		}
		second, err := p.Issuer.Issue(t.Context(), broker.Request{Scopes: c.Scopes, RefreshToken: first.RefreshToken})
		if err != nil {
			t.Fatal(err)
		}
		if second.RefreshToken.IsEmpty() || second.RefreshToken.Equal(first.RefreshToken) || second.AccessToken.Equal(first.AccessToken) {
			t.Error("the refresh token was not rotated")
		}
		part, err := p.Issuer.Issue(t.Context(), broker.Request{Scopes: []string{"permissions"}, RefreshToken: second.RefreshToken})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(part.Scopes, []string{"permissions"}) {
			t.Errorf("the token for a part has %v", part.Scopes)
		}
		_, err = p.Issuer.Issue(t.Context(), broker.Request{RefreshToken: first.RefreshToken})
		if e := issueError(t, err); e.Kind != broker.GrantDead || e.Outcome != broker.Answered {
			t.Errorf("reuse is %+v", e)
		}
		got := s.Calls()
		if got.Total != 4 || got.RefreshTokens[first.RefreshToken.ID()] != 2 || got.RefreshTokens[second.RefreshToken.ID()] != 1 {
			t.Errorf("the sandbox counted %+v", got)
		}
	}
}

func TestRevocation(t *testing.T) {
	s, base := newSandbox(t, sandbox.Options{})
	for _, tenant := range []string{"", sandbox.DemoTenant} {
		c := operator(s, base)
		c.TenantID = tenant
		c.ClientSecrets = append([]broker.Secret{broker.NewSecret("not yet known")}, c.ClientSecrets...)
		p := profileFor(t, c)
		grant, err := p.Issuer.Issue(t.Context(), broker.Request{Scopes: c.Scopes})
		if err != nil {
			t.Fatal(err)
		}
		s.ResetCalls()
		revoke := p.Issuer.(broker.Revoker).Revoke
		for range 2 { // the second time there is nothing left to revoke
			if err := revoke(t.Context(), grant.RefreshToken, broker.RefreshToken); err != nil {
				t.Fatal(err)
			}
		}
		if got := s.Calls().Revocations; got["revoked"] != 1 || got["unchanged"] != 1 || got["invalid_client"] != 0 {
			t.Errorf("the sandbox counted %v", got)
		}
		if _, err := p.Issuer.Issue(t.Context(), broker.Request{RefreshToken: grant.RefreshToken}); err == nil {
			t.Error("the refresh token still works")
		}
	}
}

func TestRevocationThatIsRefused(t *testing.T) {
	s, base := newSandbox(t, sandbox.Options{})
	c := operator(s, base)
	c.ClientSecrets = []broker.Secret{broker.NewSecret(hush + "-1"), broker.NewSecret(hush + "-2")}
	err := profileFor(t, c).Issuer.(broker.Revoker).Revoke(t.Context(), broker.NewSecret(hush+"-token"), broker.AccessToken)
	e := issueError(t, err)
	if e.Kind != broker.ClientRejected || !strings.Contains(e.Text, "/connect/revocation answered 400 invalid_client to each of the 2 client secrets; Vantage says") {
		t.Errorf("error is %+v", e)
	}
	if strings.Contains(e.Text, hush) {
		t.Errorf("a secret is shown: %s", e.Text)
	}
	if got := s.Calls().Revocations["invalid_client"]; got != 2 {
		t.Errorf("%d requests were refused", got)
	}
}
