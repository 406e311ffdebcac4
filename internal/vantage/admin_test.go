package vantage_test

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
	"github.com/tokenbroker/tokenbroker/internal/vantage"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// administered is an API that records the one request that it sees and answers
// it.
type administered struct {
	t      *testing.T
	status int
	header http.Header
	answer string
	cut    bool

	mu       sync.Mutex
	requests []string
}

func (a *administered) saw() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.requests)
}

func (a *administered) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		a.t.Error(err)
	}
	a.mu.Lock()
	a.requests = append(a.requests, fmt.Sprintf("%s %s\nAuthorization: %s\nContent-Type: %s\nAccept: %s\n%s",
		r.Method, r.RequestURI, r.Header.Get("Authorization"), r.Header.Get("Content-Type"), r.Header.Get("Accept"), body))
	a.mu.Unlock()
	for name, values := range a.header {
		w.Header()[name] = values
	}
	if a.cut {
		panic(http.ErrAbortHandler)
	}
	w.WriteHeader(a.status)
	io.WriteString(w, a.answer)
}

// administrator speaks to a in the name of a profile with a tenant.
func administrator(t *testing.T, a *administered) broker.Administrator {
	t.Helper()
	a.t = t
	server := httptest.NewServer(a)
	t.Cleanup(server.Close)
	c := config(server.URL+"/on/prem", "s")
	c.TenantID = "tenant-1"
	admin, ok := profileFor(t, c).Issuer.(broker.Administrator)
	if !ok {
		t.Fatal("a profile of Vantage is no administrator")
	}
	return admin
}

func (a *administered) want(t *testing.T, want string) {
	t.Helper()
	if saw := a.saw(); len(saw) != 1 || saw[0] != want {
		t.Errorf("the API saw %d requests:\n%s\nwant\n%s", len(saw), strings.Join(saw, "\n"), want)
	}
}

const bearer = "token-5b1d9c7e8f"

func TestCreateClientRequest(t *testing.T) {
	const headers = "\nAuthorization: Bearer " + bearer + "\nContent-Type: application/json\nAccept: application/json\n"
	for name, tc := range map[string]struct {
		spec broker.ClientSpec
		want string
	}{
		"least": {
			broker.ClientSpec{TenantID: "t", ClientID: "c", ClientName: "c", AllowedGrantTypes: []string{"password"}, AllowedScopes: []string{"openid"}},
			"POST /on/prem/api/adminapi2/v2/tenants/t/clients/" + headers +
				`{"clientId":"c","clientName":"c","allowOfflineAccess":false,"allowRememberConsent":false,"backChannelLogoutSessionRequired":false,` +
				`"requireClientSecret":false,"requireConsent":false,"allowNoPkce":false,"allowedGrantTypes":["password"],"allowedCorsOrigins":[],` +
				`"allowedScopes":["openid"],"postLogoutRedirectUris":[],"redirectUris":[],"accessTokenLifetime":0,"refreshTokenLifetime":0}`,
		},
		"all": {
			broker.ClientSpec{
				TenantID: "a?b/c", ClientID: "c", ClientName: "Invoices & <more>",
				AllowedGrantTypes: []string{"authorization_code", "client_credentials"}, AllowedScopes: []string{"openid", "permissions", "publicapi.all"},
				RedirectURIs: []string{"https://app.example.com/in"}, PostLogoutRedirectURIs: []string{"https://app.example.com/out"},
				AllowedCORSOrigins: []string{"https://app.example.com"},
				AllowOfflineAccess: true, AllowRememberConsent: true, BackChannelLogoutSessionRequired: true, RequireClientSecret: true, RequireConsent: true, AllowNoPKCE: true,
				AccessTokenLifetime: 24 * time.Hour, RefreshTokenLifetime: 30 * 24 * time.Hour,
			},
			"POST /on/prem/api/adminapi2/v2/tenants/a%3Fb%2Fc/clients/" + headers +
				`{"clientId":"c","clientName":"Invoices \u0026 \u003cmore\u003e","allowOfflineAccess":true,"allowRememberConsent":true,"backChannelLogoutSessionRequired":true,` +
				`"requireClientSecret":true,"requireConsent":true,"allowNoPkce":true,"allowedGrantTypes":["authorization_code","client_credentials"],` +
				`"allowedCorsOrigins":["https://app.example.com"],"allowedScopes":["openid","permissions","publicapi.all"],` +
				`"postLogoutRedirectUris":["https://app.example.com/out"],"redirectUris":["https://app.example.com/in"],` +
				`"accessTokenLifetime":86400,"refreshTokenLifetime":2592000}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := &administered{status: http.StatusCreated, answer: "{}"}
			if err := administrator(t, a).CreateClient(t.Context(), broker.NewSecret(bearer), tc.spec); err != nil {
				t.Fatal(err)
			}
			a.want(t, tc.want)
		})
	}
}

func TestCreateClientSecretRequest(t *testing.T) {
	start, end := time.Date(2026, 1, 31, 13, 0, 0, 0, time.FixedZone("", 3600)), time.Date(2026, 7, 31, 12, 0, 0, 380e6, time.UTC)
	const headers = "POST /on/prem/api/adminapi2/v2/tenants/t/clients/a%2Fb/secrets/\nAuthorization: Bearer " + bearer + "\nContent-Type: application/json\nAccept: application/json\n"
	const answered = `{"id":"1","value":"new-secret","startTime":"2026-01-31T12:00:00Z","expiration":"2026-07-31T12:00:00.38Z"}`
	for name, tc := range map[string]struct {
		spec broker.ClientSecretSpec
		want string
	}{
		"least": {broker.ClientSecretSpec{}, `{}`},
		"all": {
			broker.ClientSecretSpec{Description: "the new one", Start: start, End: end},
			`{"description":"the new one","startTime":"2026-01-31T12:00:00.000Z","expiration":"2026-07-31T12:00:00.380Z"}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := &administered{status: http.StatusCreated, answer: answered}
			tc.spec.TenantID, tc.spec.ClientID = "t", "a/b"
			s, err := administrator(t, a).CreateClientSecret(t.Context(), broker.NewSecret(bearer), tc.spec)
			if err != nil {
				t.Fatal(err)
			}
			a.want(t, headers+tc.want)
			if s.Value.Reveal() != "new-secret" || !s.Start.Equal(start) || !s.End.Equal(end) {
				t.Errorf("got a secret from %v to %v", s.Start, s.End)
			}
		})
	}
}

func TestSecretWithoutTimesHasThoseAskedForOrDocumented(t *testing.T) {
	admin := administrator(t, &administered{status: http.StatusOK, answer: `{"value":"new-secret"}`})
	end := time.Now().Add(48 * time.Hour)
	s, err := admin.CreateClientSecret(t.Context(), broker.NewSecret(bearer), broker.ClientSecretSpec{TenantID: "t", ClientID: "c", End: end})
	if err != nil || !s.End.Equal(end) {
		t.Errorf("got %v, %v; want the end that was asked for", s, err)
	}
	s, err = admin.CreateClientSecret(t.Context(), broker.NewSecret(bearer), broker.ClientSecretSpec{TenantID: "t", ClientID: "c"})
	if err != nil || s.End.Before(s.Start.AddDate(0, 6, 0)) || time.Since(s.Start) > time.Minute {
		t.Errorf("got %v, %v; want six months from now", s, err)
	}
}

// TestSecretIsNotLostToItsTimes has the API tell times in other ways than it
// documents: the value is shown once.
func TestSecretIsNotLostToItsTimes(t *testing.T) {
	asked := time.Date(2027, 1, 31, 12, 0, 0, 0, time.UTC)
	for times, want := range map[string]time.Time{
		`"2027-02-28T12:00:00.5"`:     time.Date(2027, 2, 28, 12, 0, 0, 5e8, time.UTC), // as .NET says it of no zone
		`"2027-02-28T13:00:00+01:00"`: time.Date(2027, 2, 28, 12, 0, 0, 0, time.UTC),
		`null`:                        asked,
		`""`:                          asked,
		`"28.02.2027"`:                asked,
		`1803816000`:                  asked,
	} {
		admin := administrator(t, &administered{status: http.StatusOK, answer: `{"value":"new-secret","startTime":` + times + `,"expiration":` + times + `}`})
		s, err := admin.CreateClientSecret(t.Context(), broker.NewSecret(bearer), broker.ClientSecretSpec{TenantID: "t", ClientID: "c", Start: asked, End: asked})
		if err != nil || s.Value.Reveal() != "new-secret" || !s.End.Equal(want) || !s.Start.Equal(want) {
			t.Errorf("%s: got %v, %v", times, s, err)
		}
	}
}

func TestAdministrationFailures(t *testing.T) {
	const secretLike = "Zx81-" + bearer
	for name, tc := range map[string]struct {
		a          *administered
		kind       broker.IssueErrorKind
		retryAfter time.Duration
		told       []string
	}{
		"revoked token":     {&administered{status: 401}, broker.ClientRejected, 0, []string{"401", "must be a Tenant Administrator", "revoked"}},
		"no administrator":  {&administered{status: 403, answer: `{"title":"Forbidden"}`}, broker.ClientRejected, 0, []string{"Forbidden", "must be a Tenant Administrator"}},
		"bad values":        {&administered{status: 400, answer: `{"title":"Invalid.","errors":{"clientName":["too long","odd"],"a":["b"]}}`}, broker.RequestRejected, 0, []string{"Invalid.; a: b; clientName: too long, odd"}},
		"unknown":           {&administered{status: 404, answer: `<html>`}, broker.RequestRejected, 0, []string{"answered 404"}},
		"exists":            {&administered{status: 409, answer: `{"title":"Conflict","detail":"there is one"}`}, broker.RequestRejected, 0, []string{"Conflict; there is one"}},
		"unprocessable":     {&administered{status: 422}, broker.RequestRejected, 0, []string{"answered 422"}},
		"repeats the token": {&administered{status: 400, answer: `{"title":"you sent ` + bearer + `","detail":"` + secretLike + `"}`}, broker.RequestRejected, 0, []string{"[redacted]"}},
		"much to say":       {&administered{status: 400, answer: `{"title":"` + strings.Repeat("a b ", 500) + `"}`}, broker.RequestRejected, 0, []string{"..."}},
		"throttled":         {&administered{status: 429, header: http.Header{"Retry-After": {"17"}}}, broker.Throttled, 17 * time.Second, []string{"429"}},
		"maintenance":       {&administered{status: 503, header: http.Header{"Retry-After": {"17"}}}, broker.Throttled, 17 * time.Second, []string{"503"}},
		"down":              {&administered{status: 503}, broker.Unavailable, 0, []string{"503"}},
		"broken":            {&administered{status: 500}, broker.Ambiguous, 0, []string{"500", "may exist", `"the new one"`}},
		"gave up":           {&administered{status: 504}, broker.Ambiguous, 0, []string{"504", "may exist"}},
		"cut":               {&administered{cut: true}, broker.Ambiguous, 0, []string{"may have acted", "may exist"}},
		"redirect":          {&administered{status: 307, header: http.Header{"Location": {"https://other.example.com/x"}}}, broker.Malformed, 0, []string{"https://other.example.com", "not followed"}},
		"no value":          {&administered{status: 201, answer: `{"startTime":"2026-01-31T12:00:00Z"}`}, broker.Malformed, 0, []string{"a secret exists that nobody knows", `"the new one"`}},
		"a page":            {&administered{status: 200, answer: `<html>`}, broker.Malformed, 0, []string{"a secret exists that nobody knows"}},
	} {
		t.Run(name, func(t *testing.T) {
			admin := administrator(t, tc.a)
			_, err := admin.CreateClientSecret(t.Context(), broker.NewSecret(bearer), broker.ClientSecretSpec{TenantID: "t", ClientID: "c", Description: "the new one"})
			e := issueError(t, err)
			if e.Kind != tc.kind || e.RetryAfter != tc.retryAfter {
				t.Errorf("got %v after %v: %v", e.Kind, e.RetryAfter, e)
			}
			for _, s := range tc.told {
				if !strings.Contains(e.Text, s) {
					t.Errorf("%q is not in %q", s, e.Text)
				}
			}
			if strings.Contains(e.Text, bearer) || len(e.Text) > 1000 {
				t.Errorf("the error says too much: %s", e.Text)
			}
			if n := len(tc.a.saw()); n != 1 {
				t.Errorf("it was sent %d times", n)
			}
		})
	}
}

func TestClientThatMayExistIsToldOf(t *testing.T) {
	err := administrator(t, &administered{cut: true}).CreateClient(t.Context(), broker.NewSecret(bearer), broker.ClientSpec{TenantID: "t", ClientID: "c"})
	if e := issueError(t, err); e.Kind != broker.Ambiguous || !strings.Contains(e.Text, "the client c may exist") {
		t.Errorf("got %v: %v", e.Kind, e)
	}
}

func TestAdministrationStaysInItsPath(t *testing.T) {
	a := &administered{status: 200, answer: `{"value":"x"}`}
	admin := administrator(t, a)
	for _, s := range []string{"", ".", ".."} {
		_, err := admin.CreateClientSecret(t.Context(), broker.NewSecret(bearer), broker.ClientSecretSpec{TenantID: "t", ClientID: s})
		if e := issueError(t, err); e.Kind != broker.RequestRejected || e.Outcome != broker.Unsent {
			t.Errorf("client %q: got %v", s, e)
		}
	}
	if saw := a.saw(); len(saw) != 0 {
		t.Errorf("the API saw %v", saw)
	}
}

// TestProve asks the stand-in, which checks in the documented order.
func TestProve(t *testing.T) {
	s, err := sandbox.New(sandbox.Options{})
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	for client, change := range map[string]func(*vantage.Config){
		"invoices": func(*vantage.Config) {},
		"operator": func(c *vantage.Config) { *c = withUser(*c, "operator@example.com", "a wrong password") },
	} {
		c := config(server.URL, "not the secret")
		c.ClientID = client
		change(&c)
		p := profileFor(t, c)
		admin := p.Issuer.(broker.Administrator)
		if err := admin.Prove(t.Context(), broker.NewSecret(s.ClientSecret(client))); err != nil {
			t.Errorf("%s: the secret works, and was not proven: %v", client, err)
		}
		if e := issueError(t, admin.Prove(t.Context(), broker.NewSecret("another"))); e.Kind != broker.ClientRejected {
			t.Errorf("%s: a wrong secret: got %v", client, e)
		}
	}
	calls := s.Calls()
	if calls.ByGrant["password"] != nil {
		t.Errorf("a password was presented: %v", calls.ByGrant)
	}
	if err := s.Fault(sandbox.Fault{Status: 503}); err != nil {
		t.Fatal(err)
	}
	p := profileFor(t, config(server.URL, "s"))
	if e := issueError(t, p.Issuer.(broker.Administrator).Prove(t.Context(), broker.NewSecret(s.ClientSecret("invoices")))); e.Kind != broker.Unavailable {
		t.Errorf("an outage: got %v", e)
	}
}
