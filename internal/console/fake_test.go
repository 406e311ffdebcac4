package console_test

import (
	"bytes"
	"cmp"
	"context"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/console"
)

// fakeBroker holds profiles as told, and remembers what was asked of it.
type fakeBroker struct {
	mu       sync.Mutex
	profiles map[string]*broker.Status
	asked    []string
	err      error // answers everything but Status
	signIn   *broker.SignIn
	browser  broker.Secret // of the last sign-in
	back     broker.Callback
	done     *broker.Completion
	ended    *broker.Completion // of a question; nil is one that is answered
}

func newFake(profiles ...*broker.Status) *fakeBroker {
	f := &fakeBroker{profiles: map[string]*broker.Status{}}
	for _, p := range profiles {
		f.profiles[p.Name] = p
	}
	return f
}

func (f *fakeBroker) ask(what string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, what)
	return f.err
}

// took returns what was asked since the last time.
func (f *fakeBroker) took() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	a := f.asked
	f.asked = nil
	return a
}

func (f *fakeBroker) Profiles() []string { return slices.Sorted(maps.Keys(f.profiles)) }

func (f *fakeBroker) Glance(name string) (*broker.Status, error) {
	return f.Status(context.Background(), name)
}

func (f *fakeBroker) Status(_ context.Context, name string) (*broker.Status, error) {
	if s := f.profiles[name]; s != nil {
		return s, nil
	}
	return nil, &broker.Error{Reason: broker.ReasonProfileUnknown, Text: "no such profile"}
}

func (f *fakeBroker) Issue(_ context.Context, ask broker.Ask, d broker.Demand) (*broker.Token, broker.Source, error) {
	return &broker.Token{}, broker.FromEndpoint, f.ask("issue " + ask.Profile + " not " + d.Not)
}

func (f *fakeBroker) Reset(_ context.Context, name string) error { return f.ask("reset " + name) }

func (f *fakeBroker) StartAuthorization(_ context.Context, name string, browser broker.Secret) (*broker.SignIn, error) {
	f.browser = browser
	return f.signIn, f.ask("start " + name)
}

func (f *fakeBroker) CompleteAuthorization(_ context.Context, c broker.Callback) (*broker.Completion, error) {
	f.back = c
	return f.done, f.ask("complete")
}

func (f *fakeBroker) RefuseAuthorization(_ context.Context, c broker.Callback) (string, error) {
	f.back = c
	return "review", f.ask("refuse")
}

func (f *fakeBroker) ConfirmAuthorization(_ context.Context, ticket string, allowed func(string) bool) (*broker.Completion, error) {
	return f.end("confirm "+ticket, allowed)
}

func (f *fakeBroker) AbandonAuthorization(_ context.Context, ticket string, allowed func(string) bool) (*broker.Completion, error) {
	return f.end("abandon "+ticket, allowed)
}

func (f *fakeBroker) end(what string, allowed func(string) bool) (*broker.Completion, error) {
	if allowed != nil && !allowed("review") {
		return nil, &broker.Error{Reason: broker.ReasonInvalidRequest, Text: "no such ticket"}
	}
	return cmp.Or(f.ended, &broker.Completion{Profile: "review"}), f.ask(what)
}

// authorizer is an issuer that people sign in at.
type authorizer struct{ broker.Authorizer }

func (authorizer) Issue(context.Context, broker.Request) (*broker.Grant, error) { return nil, nil }
func (authorizer) RedirectURL() string                                          { return "http://127.0.0.1:7444/oauth/callback" }

func codeProfile(name string) *broker.Status {
	return &broker.Status{
		Profile: &broker.Profile{
			Name: name, Provider: "vantage", GrantType: broker.AuthorizationCode, Issuer: authorizer{},
			Endpoint: "https://vantage.example.com/auth2/connect/token", Scopes: []string{"openid", "offline_access"},
		},
		State: broker.Ready, Text: "there is a token", TokenID: "0123456789abcdef",
		IssueTime: time.Now(), RefreshTime: time.Now().Add(40 * time.Minute), ExpireTime: time.Now().Add(time.Hour),
	}
}

// rig is a console in front of a fake broker.
type rig struct {
	t       testing.TB
	broker  *fakeBroker
	handler http.Handler
	log     *bytes.Buffer
}

func newRig(t testing.TB, b *fakeBroker, more func(*console.Options)) *rig {
	r := &rig{t: t, broker: b, log: &bytes.Buffer{}}
	o := console.Options{
		Broker: b, Ready: func() []string { return nil }, Degraded: func() []string { return nil }, Gatherer: prometheus.NewRegistry(), Version: "v0",
		Access: console.Access{Local: true, Authorizer: access.NewAuthorizer()}, Logger: slog.New(slog.NewTextHandler(r.log, nil)),
	}
	if more != nil {
		more(&o)
	}
	r.handler = console.Handler(o)
	return r
}

// withToken demands the bearer token.
const bearerToken = "correct horse battery staple"

func withToken(o *console.Options) {
	o.Access.BearerToken = func() broker.Secret { return broker.NewSecret(bearerToken) }
}

// request is one from this machine, unless changed.
func request(method, path string, change ...func(*http.Request)) *http.Request {
	r := httptest.NewRequest(method, "http://127.0.0.1:7444"+path, nil)
	r.RemoteAddr = "127.0.0.1:50000"
	for _, c := range change {
		c(r)
	}
	return r
}

func post(path string, form url.Values, change ...func(*http.Request)) *http.Request {
	r := request(http.MethodPost, path, change...)
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.Body = io.NopCloser(strings.NewReader(form.Encode()))
	return r
}

func header(name, value string) func(*http.Request) {
	return func(r *http.Request) { r.Header.Set(name, value) }
}

func cookies(from *http.Response) func(*http.Request) {
	return func(r *http.Request) {
		for _, c := range from.Cookies() {
			r.AddCookie(c)
		}
	}
}

// do returns the answer and its body, and holds every answer to what all have in
// common.
func (r *rig) do(request *http.Request) (*http.Response, string) {
	r.t.Helper()
	w := httptest.NewRecorder()
	r.handler.ServeHTTP(w, request)
	a := w.Result()
	for name, want := range map[string]string{
		"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
		"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
	} {
		if got := a.Header.Get(name); got != want {
			r.t.Errorf("%s %s: %s is %q, want %q", request.Method, request.URL.Path, name, got, want)
		}
	}
	csp, body := a.Header.Get("Content-Security-Policy"), w.Body.String()
	if !strings.Contains(csp, "default-src 'none'") || !strings.Contains(csp, "frame-ancestors 'none'") || strings.Contains(csp, "unsafe") {
		r.t.Errorf("%s %s: policy %q", request.Method, request.URL.Path, csp)
	}
	if strings.HasPrefix(a.Header.Get("Content-Type"), "text/html") {
		if !strings.Contains(csp, "base-uri 'none'") || !strings.Contains(csp, "form-action 'self'") {
			r.t.Errorf("%s %s: policy of a page %q", request.Method, request.URL.Path, csp)
		}
		checkPage(r.t, request.URL.Path, body)
	}
	return a, body
}

// checkPage holds a page to what can be seen without a browser.
func checkPage(t testing.TB, path, body string) {
	t.Helper()
	for what, n := range map[string]int{`<html lang="en">`: 1, "<h1>": 1, "<title>": 1, "<main": 1} {
		if got := strings.Count(body, what); got != n {
			t.Errorf("%s: %s is there %d times, want %d", path, what, got, n)
		}
	}
	for _, never := range []string{" style=", "<style", " onclick=", "javascript:"} {
		if strings.Contains(body, never) {
			t.Errorf("%s: the page has %s", path, never)
		}
	}
}
