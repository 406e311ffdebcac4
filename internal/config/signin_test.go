package config_test

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// withCode is minimal with the grant authorization_code and further lines in the
// profile.
func withCode(t testing.TB, redirectURL string, lines ...string) string {
	t.Helper()
	text := with(t, minimal, "client_credentials: {}", "authorization_code: {redirect_url: '"+redirectURL+"'}")
	return with(t, text, "name: p\n", "name: p\n"+strings.Join(append(lines, ""), "\n"))
}

const callback = "https://broker.example.com/oauth/callback"

func TestTheCodeProfile(t *testing.T) {
	c := mustParse(t, withCode(t, callback))
	equal(t, warnings(t, c), nil)
	p := c.Profiles[0]
	if p.GrantType != broker.AuthorizationCode || !p.RefreshTokens || p.ConsentLifetime != 30*24*time.Hour || p.Reusable || p.Grace != 0 {
		t.Errorf("profile is %+v", p)
	}
	equal(t, p.Scopes, []string{"openid", "permissions", "global.wildcard", "offline_access"})
	authorizer, ok := p.Issuer.(broker.Authorizer)
	if !ok {
		t.Fatalf("the issuer is %T", p.Issuer)
	}
	equal(t, []string{authorizer.RedirectURL()}, []string{callback})

	c = mustParse(t, withCode(t, callback, "    scopes: [openid, offline_access]", "    rotation: {one_time: false, lifetime: 90d}"))
	equal(t, warnings(t, c), nil)
	if p := c.Profiles[0]; p.ConsentLifetime != 90*24*time.Hour || !p.Reusable || len(p.Scopes) != 2 {
		t.Errorf("profile is %+v", p)
	}
}

// another is the text of a profile of another provider.
func another(name, provider, server, grant string, lines ...string) string {
	return fmt.Sprintf("  - name: %s\n    scopes: [a, offline_access]\n%s    %s: {%s, client_id: c, client_secret: {env: SECRET}, %s}\n",
		name, strings.Join(append(lines, ""), "\n"), provider, server, grant)
}

func codeGrant(redirectURL string) string {
	return "authorization_code: {redirect_url: '" + redirectURL + "'}"
}

// Nobody knows how long sign-ins last at other servers.
func TestConsentsElsewhere(t *testing.T) {
	for provider, server := range map[string]string{"secureauth": "tenant_id: t, workspace_id: w", "oauth2": "issuer: 'https://id.example.com'"} {
		for lines, want := range map[string]time.Duration{"": 0, "    rotation: {lifetime: 10d}": 10 * 24 * time.Hour} {
			p := mustParse(t, "profiles:\n"+another("q", provider, server, codeGrant(callback), lines)).Profiles[0]
			if p.GrantType != broker.AuthorizationCode || p.Provider != provider || !p.RefreshTokens || p.ConsentLifetime != want {
				t.Errorf("profile is %+v", p)
			}
			equal(t, p.Scopes, []string{"a", "offline_access"})
		}
	}
}

// An OpenID provider gives a refresh token only with consent; other servers are
// asked for nothing that they may not know.
func TestConsentIsAskedFor(t *testing.T) {
	const server = "token_url: 'https://id.example.com/token', authorization_url: 'https://id.example.com/authorize'"
	for scopes, want := range map[string]string{"[openid, offline_access]": "consent", "[openid]": "", "[a, offline_access]": ""} {
		text := with(t, "profiles:\n"+another("q", "oauth2", server, codeGrant(callback)), "[a, offline_access]", scopes)
		address, err := mustParse(t, text).Profiles[0].Issuer.(broker.Authorizer).AuthorizationURL(t.Context(), broker.AuthorizationRequest{})
		if err != nil {
			t.Fatal(err)
		}
		u, err := url.Parse(address)
		if err != nil {
			t.Fatal(err)
		}
		if got := u.Query().Get("prompt"); got != want {
			t.Errorf("for %s a sign-in has the prompt %q, want %q", scopes, got, want)
		}
	}
}

func TestRedirectURL(t *testing.T) {
	const (
		at       = "profiles[0].vantage.authorization_code.redirect_url: "
		noURL    = at + "must be an absolute URL without fragment, for example https://broker.example.com/oauth/callback"
		inClear  = at + "uses http:// for a host that is not loopback, so that codes would travel in clear: use https://, or set allow_insecure_http: true beside authorization_code"
		unserved = at + "is neither /oauth/callback, where the broker waits for browsers, nor below it: change it, or sign in with broker authorize --paste"
	)
	for url, want := range map[string]struct{ problem, warning string }{
		callback:                                      {},
		callback + "/vantage":                         {},
		callback + "?via=proxy":                       {},
		"http://localhost:7444/oauth/callback":        {},
		"http://127.0.0.1:7444/oauth/callback":        {},
		"http://[::1]/oauth/callback":                 {},
		"http://broker.example.com/oauth/callback":    {problem: inClear},
		"http://localhost.example.com/oauth/callback": {problem: inClear},
		"https://broker.example.com":                  {warning: unserved},
		"https://example.com/broker/oauth/callback":   {warning: unserved},
		"https://broker.example.com/oauth/callbacks":  {warning: unserved},
		"https://" + canary + "@broker/":              {problem: noURL},
		callback + "#" + canary:                       {problem: noURL},
		"https://[" + canary + "/":                    {problem: noURL},
		"https://:443/" + canary:                      {problem: noURL},
		"/oauth/callback":                             {problem: noURL},
	} {
		c, err := parse(withCode(t, url))
		var problem, warning string
		if err != nil {
			problem = strings.Join(shorten(t, err), "\n")
		} else {
			warning = strings.Join(warnings(t, c), "\n")
		}
		if strings.TrimPrefix(problem, "7:42: ") != want.problem || strings.TrimPrefix(warning, "7:42: ") != want.warning {
			t.Errorf("%s: got %q, %q", url, problem, warning)
		}
	}
	c := mustParse(t, with(t, withCode(t, "http://broker.example.com/oauth/callback"), "region: eu", "region: eu\n      allow_insecure_http: true"))
	equal(t, warnings(t, c), []string{
		"5:28: profiles[0].vantage.allow_insecure_http: secrets and tokens may travel in clear: use https:// and remove allow_insecure_http"})
}

// A code that came back from one server must not pass for another's.
func TestSharedRedirectURLs(t *testing.T) {
	const taken = "the profile p has the same path for another authorization server: give each authorization server its own, for example …/oauth/callback/q (RFC 9700 section 4.4)"
	vantage := func(server string) string {
		return strings.Replace(another("q", "vantage", server, codeGrant(callback)), "a, off", "openid, off", 1)
	}
	secureauth := func(server string) string { return another("q", "secureauth", server, codeGrant(callback)) }
	oauth2 := func(server, url string) string { return another("q", "oauth2", server, codeGrant(url)) }
	for text, refused := range map[string]bool{
		vantage("region: eu"):                                                                false,
		vantage("region: eu, tenant_id: t"):                                                  false, // another tenant of the same server
		vantage("region: us"):                                                                true,
		vantage("base_url: 'https://vantage.example.com'"):                                   true,
		secureauth("tenant_id: t, workspace_id: w"):                                          true,
		oauth2("issuer: 'https://id.example.com'", callback):                                 true,
		oauth2("issuer: 'https://id.example.com'", callback+"/q"):                            false,
		oauth2("issuer: 'https://id.example.com'", callback+"?q"):                            true,
		oauth2("issuer: 'https://id.example.com'", "http://localhost/oauth/callback"):        true, // another host is not enough
		another("q", "oauth2", "issuer: 'https://id.example.com'", "client_credentials: {}"): false,
	} {
		got := problems(t, withCode(t, callback)+text)
		if !refused && got != nil || refused && (len(got) != 1 || !strings.HasSuffix(got[0], ".authorization_code.redirect_url: "+taken)) {
			t.Errorf("%s: got %q", text, got)
		}
	}
	workspace := another("r", "secureauth", "tenant_id: t, region: eu, workspace_id: w", codeGrant(callback))
	equal(t, problems(t, "profiles:\n"+secureauth("issuer: 'https://t.eu.authz.cloudentity.io/t/w'")+workspace), nil)
	same := oauth2("issuer: 'https://id.example.com/'", callback)
	equal(t, problems(t, "profiles:\n"+oauth2("issuer: 'https://id.example.com'", callback)+strings.Replace(same, "name: q", "name: r", 1)), nil)
}

func TestConsoleURL(t *testing.T) {
	directory := t.TempDir()
	writeServerFiles(t, directory)
	for _, test := range []struct{ redirectURL, admin, want string }{
		{callback, "", "https://broker.example.com/profiles/p"},
		{"http://localhost:7444/oauth/callback", "", "http://localhost:7444/profiles/p"},
		{callback, "url: 'https://console.example.com/'", "https://console.example.com/profiles/p"},
		{callback, "address: 0.0.0.0:7444", "https://broker.example.com/profiles/p"},
		{"", "", "http://127.0.0.1:7444/profiles/p"},
		{"", "address: localhost:1", "http://localhost:1/profiles/p"},
		{"", "address: 0.0.0.0:7444", ""},
		{"", "address: 0.0.0.0:7444, url: https://console.example.com", "https://console.example.com/profiles/p"},
		{"", fmt.Sprintf("tls: {certificate: %[1]s/tls.crt, private_key: %[1]s/tls.key}", directory), "https://127.0.0.1:7444/profiles/p"},
	} {
		text := minimal
		if test.redirectURL != "" {
			text = withCode(t, test.redirectURL)
		}
		if got := mustParse(t, text+"admin: {"+test.admin+"}\n").Profiles[0].ConsoleURL; got != test.want {
			t.Errorf("%s, %s: got %q, want %q", test.redirectURL, test.admin, got, test.want)
		}
	}
}

func TestGrantWarnings(t *testing.T) {
	const (
		lacking = "scopes: without offline_access no refresh token will come, so a person must sign in again whenever the access token ends: add offline_access"
		vantage = "allow_password_grant: has no effect, because vantage needs no permission for the grant password: remove it"
	)
	elsewhere := func(provider, grant string, lines ...string) string {
		return "profiles:\n" + strings.Replace(another("q", provider, "issuer: 'https://id.example.com'", grant, lines...), "a, offline_access", "a", 1)
	}
	password := "password: {username: {env: SECRET}, password: {env: SECRET}}"
	allowed := "    allow_password_grant: true"
	for text, want := range map[string]string{
		withCode(t, callback, "    scopes: [openid]"):                                   lacking,
		elsewhere("secureauth", codeGrant(callback)):                                    lacking,
		elsewhere("oauth2", codeGrant(callback)):                                        "", // who knows how it is asked
		withCode(t, callback, allowed):                                                  vantage,
		with(t, minimal, "name: p", "name: p\n"+allowed):                                vantage,
		elsewhere("oauth2", "client_credentials: {}", allowed):                          "allow_password_grant: has no effect, because the grant is client_credentials: remove it",
		elsewhere("secureauth", password, allowed):                                      strings.TrimPrefix(strings.Replace(advice, "vantage", "secureauth", 1), "profiles[0]."),
		elsewhere("oauth2", password, allowed):                                          strings.TrimPrefix(strings.Replace(advice, "vantage", "oauth2", 1), "profiles[0]."),
		with(t, minimal, "region: eu", "region: eu\n      product_id: x"):               "vantage.product_id: has no effect, because it belongs to authorization_code: remove it",
		with(t, withCode(t, callback), "region: eu", "region: eu\n      product_id: x"): "",
		with(t, minimal, "region: eu", "region: eu\n      product_id: ''"):              "",
		elsewhere("oauth2", "client_credentials: {}, key_id: k"):                        "oauth2.key_id: has no effect, because it belongs to private_key_jwt: remove it",
		elsewhere("secureauth", "client_credentials: {}, assertion_audience: a"):        "secureauth.assertion_audience: has no effect, because it belongs to private_key_jwt: remove it",
		strings.Replace(elsewhere("oauth2", "client_credentials: {}, authorization_url: 'https://id.example.com/a'"), "issuer: 'https://id.example.com'", "token_url: 'https://id.example.com/t'", 1): "oauth2.authorization_url: has no effect, because it belongs to authorization_code: remove it",
	} {
		var got []string
		for _, line := range warnings(t, mustParse(t, text)) {
			_, line, _ = strings.Cut(line, ": profiles[0].")
			got = append(got, line)
		}
		if want == "" && got != nil || want != "" && !slices.Equal(got, []string{want}) {
			t.Errorf("%s: got %q", text, got)
		}
	}
	for _, provider := range []string{"secureauth", "oauth2"} {
		got := problems(t, elsewhere(provider, password))
		if len(got) != 1 || !strings.Contains(got[0], "(RFC 9700 section 2.4): use another grant, or set allow_password_grant: true") {
			t.Errorf("%s: got %q", provider, got)
		}
	}
}
