package oauth_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

func authorizerFor(t testing.TB, c oauth.ProfileConfig) broker.Authorizer {
	t.Helper()
	return profileFor(t, c).Issuer.(broker.Authorizer)
}

func TestAuthorizationURL(t *testing.T) {
	const common = "client_id=tester&code_challenge=challenge&code_challenge_method=S256&"
	const redirect = "redirect_uri=https%3A%2F%2Fbroker.example.com%2Foauth%2Fcallback&"
	for name, tc := range map[string]struct {
		change func(*oauth.ProfileConfig)
		want   string
	}{
		"plain": {func(*oauth.ProfileConfig) {}, "https://h/authorize?" + common + redirect + "response_type=code&scope=b%20a&state=s%2Bt%3Da%20te"},
		"no scopes": {func(c *oauth.ProfileConfig) { c.Scopes = nil },
			"https://h/authorize?" + common + redirect + "response_type=code&state=s%2Bt%3Da%20te"},
		"a query of its own": {func(c *oauth.ProfileConfig) { c.AuthorizationURL = "https://h/a%2Fb?tenant=x+y&b" },
			"https://h/a%2Fb?tenant=x+y&b&" + common + redirect + "response_type=code&scope=b%20a&state=s%2Bt%3Da%20te"},
		"target and more": {func(c *oauth.ProfileConfig) {
			targeted(c)
			c.SignInParameters = url.Values{"prompt": {"login"}, "state": {"mine"}, "code_challenge_method": {"plain"}}
		}, "https://h/authorize?audience=api%20%2B%20%26%20%25%20%3D%20%3A%20%C3%A9&" + common + "prompt=login&" + redirect +
			"resource=https%3A%2F%2Fone&resource=https%3A%2F%2Ftwo&response_type=code&scope=b%20a&state=s%2Bt%3Da%20te"},
	} {
		got, err := authorizerFor(t, profileConfig("https://h", byCode, tc.change)).AuthorizationURL(t.Context(),
			broker.AuthorizationRequest{State: "s+t=a te", Challenge: "challenge"})
		if err != nil || got != tc.want {
			t.Errorf("%s: error %v, URL\n%s\nwant\n%s", name, err, got, tc.want)
		}
	}
}

func TestAServerWithoutAnAuthorizationEndpoint(t *testing.T) {
	s := publish(t)
	s.at(openID, reply{body: `{"issuer":"` + s.base + `","token_endpoint":"` + s.base + `/token"}`})
	_, err := authorizerFor(t, profileConfig("", byCode, discovering(s.base))).AuthorizationURL(t.Context(), broker.AuthorizationRequest{})
	wantKind(t, failure(t, nil, err), broker.Unavailable, "name no authorization_endpoint: check issuer")
}

func TestCheckIssuer(t *testing.T) {
	const announces = `"authorization_response_iss_parameter_supported":true`
	for name, tc := range map[string]struct {
		metadata string // "-" for none
		expected []string
		iss      string
		words    string
	}{
		"nobody says anything":     {"-", nil, "", ""},
		"nobody knows":             {"-", nil, "https://evil", "none is known to compare it with: set issuer"},
		"expected":                 {"-", []string{"https://a", "https://b"}, "https://b", ""},
		"expected and absent":      {"-", []string{"https://a"}, "", ""},
		"another than expected":    {"-", []string{"https://a", "https://b"}, "https://b/", "names another issuer than https://a or https://b"},
		"known":                    {"", nil, "BASE", ""},
		"known and absent":         {"", nil, "", ""},
		"another":                  {"", nil, "https://evil", "names another issuer than BASE"},
		"a slash more":             {"", nil, "BASE/", "names another issuer"},
		"announced":                {announces, nil, "BASE", ""},
		"announced and absent":     {announces, nil, "", "names no issuer, although BASE announces"},
		"known, whatever expected": {"", []string{"https://evil"}, "https://evil", "names another issuer"},
	} {
		t.Run(name, func(t *testing.T) {
			s := publish(t)
			s.at(openID, reply{body: metadataOf(s.base, tc.metadata)})
			c := profileConfig("https://h", byCode, func(c *oauth.ProfileConfig) { c.ExpectedIssuers = tc.expected })
			if tc.metadata != "-" {
				discovering(s.base)(&c)
			}
			err := authorizerFor(t, c).CheckIssuer(t.Context(), strings.ReplaceAll(tc.iss, "BASE", s.base))
			if tc.words == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			e := failure(t, nil, err)
			wantKind(t, e, broker.RequestRejected, strings.ReplaceAll(tc.words, "BASE", s.base))
			wantOutcome(t, e, broker.Unsent)
			if strings.Contains(e.Text, "evil") {
				t.Errorf("what a stranger sent is shown: %s", e.Text)
			}
		})
	}
}

func exchange(t testing.TB, c oauth.ProfileConfig) (*broker.Grant, error) {
	t.Helper()
	return authorizerFor(t, c).Exchange(t.Context(), broker.CodeExchange{Code: broker.NewSecret("c/" + canary), Verifier: broker.NewSecret("v~" + canary)})
}

func TestTheCodeExchange(t *testing.T) {
	const code = "c%2Fc%40nary%2B%26%25%3D%3A+%C3%A9%22%2F%5Csecret-value"
	const verifier = "v~c%40nary%2B%26%25%3D%3A+%C3%A9%22%2F%5Csecret-value"
	const redirect = "&grant_type=authorization_code&redirect_uri=https%3A%2F%2Fbroker.example.com%2Foauth%2Fcallback"
	for name, tc := range map[string]struct {
		change func(*oauth.ProfileConfig)
		want   string
	}{
		"plain":      {func(*oauth.ProfileConfig) {}, "client_id=tester&client_secret=s&code=" + code + "&code_verifier=" + verifier + redirect},
		"with scope": {func(c *oauth.ProfileConfig) { c.ScopeWithCode = true }, "client_id=tester&client_secret=s&code=" + code + "&code_verifier=" + verifier + redirect + "&scope=b+a"},
		"target": {func(c *oauth.ProfileConfig) { c.Resource = []string{"https://one"} },
			"client_id=tester&client_secret=s&code=" + code + "&code_verifier=" + verifier + redirect + "&resource=https%3A%2F%2Fone"},
	} {
		r, base := record(t, reply{body: bearer})
		if _, err := exchange(t, profileConfig(base, byCode, tc.change)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		r.want(t, posted("/token", tc.want))
	}
}

// A code is spent once, whatever the caller does meanwhile, and its refusal ends
// the sign-in and nothing else.
func TestACodeThatIsRefused(t *testing.T) {
	r, base := record(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(w, `{"error":"invalid_grant","error_description":"%s is used"}`, r.PostFormValue("code")[:10])
	}))
	grant, err := exchange(t, profileConfig(base, byCode))
	wantKind(t, failure(t, grant, err), broker.GrantDead, "400 invalid_grant")
	if n := len(r.requests()); n != 1 {
		t.Errorf("the code was sent %d times", n)
	}
}

func TestAnExchangeOutlivesItsCaller(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	_, base := record(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		cancel()
		<-ctx.Done()
		io.WriteString(w, bearer)
	}))
	grant, err := authorizerFor(t, profileConfig(base, byCode)).Exchange(ctx, broker.CodeExchange{Code: broker.NewSecret("c"), Verifier: broker.NewSecret("v")})
	if err != nil || grant.AccessToken.Reveal() != "abc.DEF-123" {
		t.Errorf("grant %+v, error %v", grant, err)
	}
}

// unsigned is an ID token with these claims; nobody here verifies its signature.
func unsigned(claims string) string {
	encode := base64.RawURLEncoding.EncodeToString
	return encode([]byte(`{"alg":"RS256"}`)) + "." + encode([]byte(claims)) + "." + encode([]byte("signature"))
}

func withIDToken(token string) reply {
	encoded, _ := json.Marshal(token)
	return reply{body: strings.TrimSuffix(bearer, "}") + `,"id_token":` + string(encoded) + "}"}
}

func TestIDTokens(t *testing.T) {
	soon, past := fmt.Sprint(time.Now().Add(time.Hour).Unix()), fmt.Sprint(time.Now().Add(-time.Hour).Unix())
	recent := fmt.Sprint(time.Now().Add(-time.Minute).Unix())
	claims := func(more string) string { return `{"iss":"BASE","aud":"tester","sub":"42","exp":` + soon + more + `}` }
	for name, tc := range map[string]struct {
		token   string
		unknown bool   // the issuer
		subject string // what follows the issuer's digest; empty for no account
		called  string
		refused string
	}{
		"complete":                  {token: unsigned(claims(`,"preferred_username":"ada","email":"ada@example.com","name":"Ada"`)), subject: "#42", called: "ada"},
		"e-mail address":            {token: unsigned(claims(`,"preferred_username":"","email":"ada@example.com","name":"Ada"`)), subject: "#42", called: "ada@example.com"},
		"name":                      {token: unsigned(claims(`,"preferred_username":7,"name":"Ada"`)), subject: "#42", called: "Ada"},
		"no name":                   {token: unsigned(claims("")), subject: "#42", called: "42"},
		"several audiences":         {token: unsigned(strings.Replace(claims(""), `"tester"`, `["other","tester"]`, 1)), subject: "#42", called: "42"},
		"expired just now":          {token: unsigned(strings.Replace(claims(""), soon, recent, 1)), subject: "#42", called: "42"},
		"a fraction":                {token: unsigned(strings.Replace(claims(""), soon, soon+".5", 1)), subject: "#42", called: "42"},
		"control characters":        {token: unsigned(claims(`,"name":"A\u0000d\u001b\u202ea\n"`)), subject: "#42", called: "Ada"},
		"a long name":               {token: unsigned(claims(`,"name":"` + strings.Repeat("é", 300) + `"`)), subject: "#42", called: strings.Repeat("é", 256)},
		"an issuer that nobody set": {token: unsigned(claims("")), unknown: true, subject: "#42", called: "42"},
		"expired":                   {token: unsigned(strings.Replace(claims(""), soon, past, 1))},
		"no expiry":                 {token: unsigned(`{"iss":"BASE","aud":"tester","sub":"42"}`)},
		"no subject":                {token: unsigned(strings.Replace(claims(""), `"42"`, `""`, 1))},
		"subject of a type":         {token: unsigned(strings.Replace(claims(""), `"42"`, `42`, 1))},
		"subject that is unfit":     {token: unsigned(strings.Replace(claims(""), `"42"`, `"4\n2"`, 1))},
		"no audience":               {token: unsigned(`{"iss":"BASE","sub":"42","exp":` + soon + `}`)},
		"no issuer":                 {token: unsigned(`{"aud":"tester","sub":"42","exp":` + soon + `}`)},
		"not JSON":                  {token: unsigned(`<html>`)},
		"not base64":                {token: "a.!.c"},
		"encrypted":                 {token: "a.b.c.d.e"},
		"opaque":                    {token: "abc"},
		"none":                      {token: ""},
		"another issuer":            {token: unsigned(strings.Replace(claims(""), "BASE", "https://evil", 1)), refused: "is from another issuer than BASE"},
		"a slash more":              {token: unsigned(strings.Replace(claims(""), "BASE", "BASE/", 1)), refused: "is from another issuer than BASE"},
		"another client":            {token: unsigned(strings.Replace(claims(""), "tester", "other", 1)), refused: "is for another client than tester"},
		"other clients":             {token: unsigned(strings.Replace(claims(""), `"tester"`, `["a","b"]`, 1)), refused: "is for another client than tester"},
		"another client, nobody's":  {token: unsigned(strings.Replace(claims(""), "tester", "other", 1)), unknown: true, refused: "is for another client than tester"},
	} {
		t.Run(name, func(t *testing.T) {
			s := publish(t)
			token := tc.token
			if parts := strings.Split(token, "."); len(parts) == 3 {
				payload, _ := base64.RawURLEncoding.DecodeString(parts[1])
				if len(payload) > 0 {
					token = unsigned(strings.ReplaceAll(string(payload), "BASE", s.base))
				}
			}
			answer := withIDToken(token)
			s.then(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodGet {
					io.WriteString(w, metadataOf(s.base, ""))
					return
				}
				answer.ServeHTTP(w, r)
			}))
			c := profileConfig(s.base, byCode)
			if !tc.unknown {
				discovering(s.base)(&c)
			}
			grant, err := exchange(t, c)
			if tc.refused != "" {
				e := failure(t, grant, err)
				wantKind(t, e, broker.Malformed, "answered with an ID token that "+strings.ReplaceAll(tc.refused, "BASE", s.base))
				wantOutcome(t, e, broker.Answered)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := grant.Account; got.Name != tc.called || !strings.HasSuffix(got.Subject, tc.subject) || (got.Subject == "") != (tc.subject == "") {
				t.Errorf("the account is %+v", got)
			}
		})
	}
}

// The same subject at two issuers is two accounts, and at one issuer one.
func TestAccountsOfTwoIssuers(t *testing.T) {
	subject := func(issuer string) string {
		t.Helper()
		_, base := record(t, withIDToken(unsigned(fmt.Sprintf(`{"iss":%q,"aud":"tester","sub":"42","exp":%d}`, issuer, time.Now().Add(time.Hour).Unix()))))
		grant, err := exchange(t, profileConfig(base, byCode))
		if err != nil {
			t.Fatal(err)
		}
		return grant.Account.Subject
	}
	if one := subject("https://one"); one == subject("https://two") || one != subject("https://one") {
		t.Errorf("subject is %s", one)
	}
}

// What comes with a refresh says nothing of whose consent it is.
func TestARefreshTellsNoAccount(t *testing.T) {
	_, base := record(t, withIDToken(unsigned(`{"iss":"https://evil","aud":"other","sub":"42","exp":99999999999}`)))
	grant, err := profileFor(t, profileConfig(base, byCode)).Issuer.Issue(t.Context(), broker.Request{RefreshToken: broker.NewSecret("r")})
	if err != nil || grant.Account != (broker.Account{}) {
		t.Errorf("account %+v, error %v", grant, err)
	}
}

// FuzzIDToken serves any claims and holds what callers rely on.
func FuzzIDToken(f *testing.F) {
	f.Add([]byte(`{"iss":"https://i","aud":"tester","sub":"42","exp":99999999999,"name":"Ada"}`))
	f.Add([]byte(`{"iss":"https://i","aud":["tester"],"sub":"42","exp":1e400,"email":"\u0000"}`))
	f.Add([]byte(`{"aud":[null,{}],"exp":"soon","sub":null}`))
	f.Add([]byte("[]"))
	r, base := record(f, nil)
	c := profileConfig(base, byCode)
	f.Fuzz(func(t *testing.T, claims []byte) {
		r.then(withIDToken(unsigned(string(claims))))
		grant, err := exchange(t, c)
		if err != nil {
			wantKind(t, failure(t, grant, err), broker.Malformed, "is for another client than tester")
			return
		}
		a := grant.Account
		if (a.Subject == "") && a.Name != "" || utf8.RuneCountInString(a.Name) > 256 || strings.ContainsFunc(a.Name+a.Subject, unicode.IsControl) {
			t.Errorf("account is %+v", a)
		}
	})
}
