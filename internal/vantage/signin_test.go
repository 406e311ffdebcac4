package vantage_test

import (
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/vantage"
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
		if e := issueError(t, check(t.Context(), iss)); e.Kind != broker.Malformed || e.Outcome != broker.Unsent || strings.Contains(e.Text, "evil") {
			t.Errorf("%q: %+v", iss, e)
		}
	}
}
