package vantage_test

import (
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/vantage"
)

// This file holds the requests to the parameter tables of Vantage's
// documentation: what the server receives is compared as a whole and byte by
// byte, so that each row is there, once, in the form, and nothing else is.

// nasty holds what encodings get wrong, in a form:
const (
	nasty     = "a+ & % = : é"
	nastyForm = "a%2B+%26+%25+%3D+%3A+%C3%A9"
)

// received is a request as the server got it: what matters of its head, then the
// body.
type received struct{ method, path, contentType, authorization, body string }

// documented are the requests that ask makes of a server that grants them.
func documented(t *testing.T, change func(*vantage.Config), ask func(*broker.Profile) error) []received {
	t.Helper()
	var got []received
	base := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		got = append(got, received{r.Method, r.RequestURI, r.Header.Get("Content-Type"), r.Header.Get("Authorization"), string(body)})
		io.WriteString(w, `{"access_token":"token","expires_in":2592000,"token_type":"Bearer","scope":"openid permissions global.wildcard"}`)
	}))
	c := config(base, nasty)
	c.ClientID = "client:id"
	change(&c)
	if err := ask(profileFor(t, c)); err != nil {
		t.Fatal(err)
	}
	return got
}

// issuing asks for a token for the profile's scopes.
func issuing(refreshToken string) func(*testing.T) func(*broker.Profile) error {
	return func(t *testing.T) func(*broker.Profile) error {
		return func(p *broker.Profile) error {
			grant, err := p.Issuer.Issue(t.Context(), broker.Request{Scopes: p.Scopes, RefreshToken: broker.NewSecret(refreshToken)})
			if err == nil && grant.Lifetime != 30*24*time.Hour {
				t.Errorf("the lifetime is %s", grant.Lifetime)
			}
			return err
		}
	}
}

func exchanging(t *testing.T) func(*broker.Profile) error {
	return func(p *broker.Profile) error {
		_, err := p.Issuer.(broker.Authorizer).Exchange(t.Context(), broker.CodeExchange{Code: broker.NewSecret("code " + nasty), Verifier: broker.NewSecret("verifier-._~")})
		return err
	}
}

func TestTheDocumentedRequests(t *testing.T) {
	const who = "client_id=client%3Aid&client_secret=" + nastyForm
	const scope = "&scope=openid+permissions+global.wildcard"
	password := func(c *vantage.Config) { *c = withUser(*c, "user "+nasty, "password "+nasty) }
	inTenant := func(change func(*vantage.Config)) func(*vantage.Config) {
		return func(c *vantage.Config) { change(c); c.TenantID = "0fc5d4ed-tenant" }
	}
	plain := func(*vantage.Config) {}
	for name, tc := range map[string]struct {
		change     func(*vantage.Config)
		ask        func(*testing.T) func(*broker.Profile) error
		path, body string
	}{
		"client credentials": {plain, issuing(""), "/auth2/connect/token",
			who + "&grant_type=client_credentials" + scope},
		"client credentials of a tenant": {inTenant(plain), issuing(""), "/auth2/0fc5d4ed-tenant/connect/token",
			who + "&grant_type=client_credentials" + scope},
		"client credentials at a private cloud": {func(c *vantage.Config) { c.BaseURL += "/prefix/" }, issuing(""), "/prefix/auth2/connect/token",
			who + "&grant_type=client_credentials" + scope},
		"password": {password, issuing(""), "/auth2/connect/token",
			who + "&grant_type=password&password=password+" + nastyForm + scope + "&username=user+" + nastyForm},
		"password of a tenant": {inTenant(password), issuing(""), "/auth2/0fc5d4ed-tenant/connect/token",
			who + "&grant_type=password&password=password+" + nastyForm + scope + "&username=user+" + nastyForm},
		"code": {signIn, exchanging, "/auth2/connect/token",
			who + "&code=code+" + nastyForm + "&code_verifier=verifier-._~&grant_type=authorization_code" +
				"&redirect_uri=https%3A%2F%2Fbroker.example.com%2Foauth%2Fcallback" + scope + "+offline_access"},
		"code of a tenant": {inTenant(signIn), exchanging, "/auth2/0fc5d4ed-tenant/connect/token",
			who + "&code=code+" + nastyForm + "&code_verifier=verifier-._~&grant_type=authorization_code" +
				"&redirect_uri=https%3A%2F%2Fbroker.example.com%2Foauth%2Fcallback" + scope + "+offline_access"},
		"refresh": {signIn, issuing("refresh " + nasty), "/auth2/connect/token",
			who + "&grant_type=refresh_token&refresh_token=refresh+" + nastyForm},
		"refresh of a tenant": {inTenant(signIn), issuing("refresh " + nasty), "/auth2/0fc5d4ed-tenant/connect/token",
			who + "&grant_type=refresh_token&refresh_token=refresh+" + nastyForm},
	} {
		t.Run(name, func(t *testing.T) {
			want := received{"POST", tc.path, "application/x-www-form-urlencoded", "", tc.body}
			if got := documented(t, tc.change, tc.ask(t)); len(got) != 1 || got[0] != want {
				t.Errorf("the server saw\n%q\nwant\n%q", got, want)
			}
		})
	}
}

// signIn is config with the grant authorization_code, as a profile with refresh
// tokens has it.
func signIn(c *vantage.Config) {
	c.GrantType = broker.AuthorizationCode
	c.RedirectURL = "https://broker.example.com/oauth/callback"
	c.Scopes = offline
}

func TestTheDocumentedAuthorizationURL(t *testing.T) {
	const challenge = "tA6ayQ5VUjLX2tufAKaHh-9bTAQ4hQQY5VZAoB2kG9o"
	const state = "ef30939211cc4ecb9a7a349b855c6a10"
	const rest = "/connect/authorize?client_id=invoices&code_challenge=" + challenge + "&code_challenge_method=S256" +
		"&productId=PRODUCT&redirect_uri=https%3A%2F%2Fbroker.example.com%2Foauth%2Fcallback&response_type=code" +
		"&scope=openid%20permissions%20global.wildcard%20offline_access&state=" + state
	const vantages = "a8548c9b-cb90-4c66-8567-d7372bb9b963"
	for name, tc := range map[string]struct {
		change                func(*vantage.Config)
		before, product, gone string
	}{
		"any tenant":         {func(*vantage.Config) {}, "https://vantage-us.abbyy.com/auth2", vantages, ""},
		"a tenant":           {func(c *vantage.Config) { c.TenantID = "tenant-1" }, "https://vantage-us.abbyy.com/auth2/tenant-1", vantages, ""},
		"another product":    {func(c *vantage.Config) { c.ProductID = "p+1" }, "https://vantage-us.abbyy.com/auth2", "p%2B1", ""},
		"no refresh tokens":  {func(c *vantage.Config) { c.Scopes = offline[:3] }, "https://vantage-us.abbyy.com/auth2", vantages, "%20offline_access"},
		"at a private cloud": {func(c *vantage.Config) { c.Region, c.BaseURL = "", "https://v.example.com/on" }, "https://v.example.com/on/auth2", vantages, ""},
	} {
		c := config("", "s")
		signIn(&c)
		c.Region = "us"
		tc.change(&c)
		a := profileFor(t, c).Issuer.(broker.Authorizer)
		got, err := a.AuthorizationURL(t.Context(), broker.AuthorizationRequest{State: state, Challenge: challenge})
		want := tc.before + strings.Replace(strings.Replace(rest, "PRODUCT", tc.product, 1), tc.gone, "", 1)
		if err != nil || got != want {
			t.Errorf("%s: error %v, URL\n%s\nwant\n%s", name, err, got, want)
		}
		if a.RedirectURL() != c.RedirectURL {
			t.Errorf("the browser comes back to %s", a.RedirectURL())
		}
	}
}
