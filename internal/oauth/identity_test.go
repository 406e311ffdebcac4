package oauth_test

import (
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// An edit of what is asked for never serves yesterday's token, and never costs a
// person a sign-in.
func TestWhatATokenIsAndWhoseConsent(t *testing.T) {
	base := oauth.ProfileConfig{
		Name: "p", Provider: "oauth2", Issuer: "https://id.example.com",
		ClientID: "c", ClientAuth: oauth.ClientSecretPost, ClientSecrets: []broker.Secret{broker.NewSecret("s")},
		GrantType: broker.AuthorizationCode, RedirectURL: "https://b.example.com/oauth/callback", FingerprintKey: []byte("key"),
	}
	build := func(change func(*oauth.ProfileConfig)) *broker.Profile {
		c := base
		change(&c)
		p, err := oauth.NewProfile(c)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	was := build(func(*oauth.ProfileConfig) {})
	for name, tc := range map[string]struct {
		change         func(*oauth.ProfileConfig)
		token, consent bool // the same
	}{
		"audience": {func(c *oauth.ProfileConfig) { c.Audience = "a" }, false, true},
		"resource": {func(c *oauth.ProfileConfig) { c.Resource = []string{"https://api"} }, false, true},
		"extra":    {func(c *oauth.ProfileConfig) { c.Extra = map[string]string{"x": "y"} }, false, true},
		"redirect": {func(c *oauth.ProfileConfig) { c.RedirectURL += "/p" }, true, true},
		"secret":   {func(c *oauth.ProfileConfig) { c.ClientSecrets = []broker.Secret{broker.NewSecret("t")} }, true, true},
		"client":   {func(c *oauth.ProfileConfig) { c.ClientID = "d" }, false, false},
		"issuer":   {func(c *oauth.ProfileConfig) { c.Issuer += "/other" }, false, false},
	} {
		is := build(tc.change)
		if (is.Identity == was.Identity) != tc.token {
			t.Errorf("%s changed: the same token is %v, want %v", name, !tc.token, tc.token)
		}
		if (is.ConsentIdentity == was.ConsentIdentity) != tc.consent {
			t.Errorf("%s changed: the same consent is %v, want %v", name, !tc.consent, tc.consent)
		}
	}
}
