package vantage_test

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/vantage"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

func TestTheSignInProfile(t *testing.T) {
	profile := func(change func(*vantage.Config)) *broker.Profile {
		c := config("https://h", "s")
		signIn(&c)
		change(&c)
		return profileFor(t, c)
	}
	p := profile(func(c *vantage.Config) { c.ConsoleURL = "https://console" })
	if p.GrantType != broker.AuthorizationCode || !p.RefreshTokens || p.ConsentLifetime != 30*24*time.Hour || p.ConsoleURL != "https://console" {
		t.Errorf("profile is %+v", p)
	}
	if _, ok := p.Issuer.(broker.Revoker); !ok {
		t.Error("the profile cannot revoke")
	}
	if p := profile(func(c *vantage.Config) { c.ConsentLifetime = time.Hour }); p.ConsentLifetime != time.Hour {
		t.Errorf("a consent lives %s", p.ConsentLifetime)
	}
	if p := profileFor(t, withUser(config("https://h", "s"), "u", "p")); p.ConsentLifetime != 0 {
		t.Error("a password's grant ends")
	}
	if _, ok := profileFor(t, config("https://h", "s")).Issuer.(broker.Authorizer); ok {
		t.Error("a person can sign in for client_credentials")
	}
	for name, tc := range map[string]struct {
		change func(*vantage.Config)
		same   bool
	}{
		"redirect": {func(c *vantage.Config) { c.RedirectURL += "/other" }, true}, // an edit must not cost the consent
		"product":  {func(c *vantage.Config) { c.ProductID = "other" }, true},
		"scopes":   {func(c *vantage.Config) { c.Scopes = nil }, true},
		"tenant":   {func(c *vantage.Config) { c.TenantID = "other" }, false},
		"client":   {func(c *vantage.Config) { c.ClientID = "other" }, false},
	} {
		if got := profile(tc.change); (got.Identity == profile(func(*vantage.Config) {}).Identity) != tc.same {
			t.Errorf("%s: the same identity is %v", name, !tc.same)
		}
	}
}

// Nobody knows yet whether Vantage names itself beside a code, and by which of
// its two names; another one's is refused.
func TestWhoseCodeItIs(t *testing.T) {
	c := config("", "s")
	signIn(&c)
	c.BaseURL, c.TenantID = "https://Vantage.Example.com", "tenant-1"
	check := profileFor(t, c).Issuer.(broker.Authorizer).CheckIssuer
	for _, iss := range []string{"", "https://vantage.example.com/auth2", "https://vantage.example.com/auth2/tenant-1"} {
		if err := check(t.Context(), iss); err != nil {
			t.Errorf("%q: %v", iss, err)
		}
	}
	for _, iss := range []string{"https://vantage.example.com", "https://vantage.example.com/auth2/", "https://vantage.example.com/auth2/tenant-2", "https://evil.example/auth2"} {
		if e := issueError(t, check(t.Context(), iss)); e.Kind != broker.RequestRejected || e.Outcome != broker.Unsent || strings.Contains(e.Text, "evil") {
			t.Errorf("%q: %+v", iss, e)
		}
	}
}

// The whole of a sign-in, with a person who fills in the sandbox's page.
func TestASignInAgainstTheSandbox(t *testing.T) {
	s, base := newSandbox(t, sandbox.Options{})
	for _, tenant := range []string{"", sandbox.DemoTenant} {
		c := config(base, "not yet known", s.ClientSecret("review"))
		signIn(&c)
		c.ClientID, c.TenantID, c.RedirectURL = "review", tenant, "http://127.0.0.1:7444/oauth/callback"
		p := profileFor(t, c)
		a := p.Issuer.(broker.Authorizer)
		const verifier = "a-verifier-of-43-characters-at-the-least-0123"
		challenge := sha256.Sum256([]byte(verifier))
		at, err := a.AuthorizationURL(t.Context(), broker.AuthorizationRequest{State: "state", Challenge: base64.RawURLEncoding.EncodeToString(challenge[:])})
		if err != nil {
			t.Fatal(err)
		}
		back := fillIn(t.Context(), t, at)
		if back.Get("state") != "state" || back.Get("iss") == "" {
			t.Errorf("the browser came back with %v", back)
		}
		if err := a.CheckIssuer(t.Context(), back.Get("iss")); err != nil {
			t.Error(err)
		}
		s.ResetCalls()
		code := broker.CodeExchange{Code: broker.NewSecret(back.Get("code")), Verifier: broker.NewSecret(verifier)}
		first, err := a.Exchange(t.Context(), code)
		if err != nil {
			t.Fatal(err)
		}
		if first.RefreshToken.IsEmpty() || first.Account.Subject == "" {
			t.Errorf("the account is %+v", first.Account)
		}
		second, err := p.Issuer.Issue(t.Context(), broker.Request{Scopes: c.Scopes, RefreshToken: first.RefreshToken})
		if err != nil || second.RefreshToken.Equal(first.RefreshToken) {
			t.Errorf("the refresh token was not rotated (error %v)", err)
		}
		if _, err := a.Exchange(t.Context(), code); issueError(t, err).Kind != broker.GrantDead {
			t.Errorf("a used code is %v", err)
		}
		got := s.Calls().ByGrant["authorization_code"]
		if got["success"] != 1 || got["invalid_client"] != 1 || got["invalid_grant"] != 1 {
			t.Errorf("the sandbox counted %v", got)
		}
	}
}

// fillIn signs in on the page at a URL, and returns what came back with the
// browser.
func fillIn(ctx context.Context, t *testing.T, at string) url.Values {
	t.Helper()
	form := url.Values{"username": {"reviewer@example.com"}, "password": {sandbox.DemoPassword}, "action": {"allow"}}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, at, strings.NewReader(form.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	response, err := http.DefaultTransport.RoundTrip(request) // which follows no redirect
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	target, err := response.Location()
	if err != nil {
		t.Fatalf("the page answered %d: %v", response.StatusCode, err)
	}
	return target.Query()
}
