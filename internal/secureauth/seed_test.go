package secureauth_test

import (
	"encoding/base64"
	"slices"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
	"github.com/tokenbroker/tokenbroker/internal/secureauth"
)

// This file holds the requests to SecureAuth's documentation: what the server
// receives is compared as a whole and byte by byte. The documented sample has no
// scope, which then means all; ours always name theirs.

// nasty holds what encodings get wrong, in a form:
const (
	nasty     = "a+ & % = : é"
	nastyForm = "a%2B+%26+%25+%3D+%3A+%C3%A9"
)

func TestTheDocumentedRequests(t *testing.T) {
	const who = "client_id=client%3Aid&client_secret=" + nastyForm
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("client%3Aid:a%2B%20%26%20%25%20%3D%20%3A%20%C3%A9"))
	issue := func(refreshToken string, scopes ...string) func(*testing.T, *broker.Profile) error {
		return func(t *testing.T, p *broker.Profile) error {
			_, err := p.Issuer.Issue(t.Context(), broker.Request{Scopes: scopes, RefreshToken: broker.NewSecret(refreshToken)})
			return err
		}
	}
	exchange := func(t *testing.T, p *broker.Profile) error {
		_, err := p.Issuer.(broker.Authorizer).Exchange(t.Context(), broker.CodeExchange{Code: broker.NewSecret("code " + nasty), Verifier: broker.NewSecret("verifier")})
		return err
	}
	revoke := func(t *testing.T, p *broker.Profile) error {
		return p.Issuer.(broker.Revoker).Revoke(t.Context(), broker.NewSecret("token"), broker.RefreshToken)
	}
	plain := func(*secureauth.Config) {}
	for name, tc := range map[string]struct {
		change              func(*secureauth.Config)
		ask                 func(*testing.T, *broker.Profile) error
		path, authorization string
		body                string
	}{
		"client credentials": {plain, issue("", "read", "write"), "/oauth2/token", "",
			who + "&grant_type=client_credentials&scope=read+write"},
		"client credentials, part": {plain, issue("", "read"), "/oauth2/token", "",
			who + "&grant_type=client_credentials&scope=read"},
		"client credentials, basic": {func(c *secureauth.Config) { c.ClientAuth = oauth.ClientSecretBasic }, issue("", "read", "write"), "/oauth2/token", basic,
			"grant_type=client_credentials&scope=read+write"},
		"audience": {func(c *secureauth.Config) { c.Audience = "api one" }, issue("", "read", "write"), "/oauth2/token", "",
			"audience=api+one&" + who + "&grant_type=client_credentials&scope=read+write"},
		"password": {withUser, issue("", "read", "write"), "/oauth2/token", "",
			who + "&grant_type=password&password=password+" + nastyForm + "&scope=read+write&username=user"},
		"code": {signIn, exchange, "/oauth2/token", "",
			who + "&code=code+" + nastyForm + "&code_verifier=verifier&grant_type=authorization_code&redirect_uri=https%3A%2F%2Fbroker.example.com%2Foauth%2Fcallback"},
		"refresh": {signIn, issue("refresh "+nasty, "write", "read"), "/oauth2/token", "",
			who + "&grant_type=refresh_token&refresh_token=refresh+" + nastyForm + "&scope=write+read"},
		"refresh, part": {signIn, issue("refresh", "read"), "/oauth2/token", "",
			who + "&grant_type=refresh_token&refresh_token=refresh&scope=read"},
		"revocation": {plain, revoke, "/oauth2/revoke", "",
			who + "&token=token&token_type_hint=refresh_token"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorkspace(t)
			c := w.config(nasty)
			c.ClientID = "client:id"
			tc.change(&c)
			if err := tc.ask(t, profileFor(t, c)); err != nil {
				t.Fatal(err)
			}
			want := []received{
				{"GET", "/acme/default/.well-known/openid-configuration", "", "", ""},
				{"POST", "/acme/default" + tc.path, "application/x-www-form-urlencoded", tc.authorization, tc.body},
			}
			if got := w.requests(); !slices.Equal(got, want) {
				t.Errorf("the server saw\n%q\nwant\n%q", got, want)
			}
		})
	}
}

func TestTheAuthorizationURL(t *testing.T) {
	w := newWorkspace(t)
	c := w.config("s")
	signIn(&c)
	c.Audience = "api"
	got, err := profileFor(t, c).Issuer.(broker.Authorizer).AuthorizationURL(t.Context(), broker.AuthorizationRequest{State: "state", Challenge: "challenge"})
	want := c.Issuer + "/oauth2/authorize?audience=api&client_id=payments&code_challenge=challenge&code_challenge_method=S256" +
		"&redirect_uri=https%3A%2F%2Fbroker.example.com%2Foauth%2Fcallback&response_type=code&scope=read%20write&state=state"
	if err != nil || got != want {
		t.Errorf("error %v, URL\n%s\nwant\n%s", err, got, want)
	}
}
