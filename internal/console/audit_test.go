package console_test

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tokenbroker/tokenbroker/internal/audit"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/console"
)

// records is where an audit log writes to, until the disk is full.
type records struct {
	mu   sync.Mutex
	text strings.Builder
	full atomic.Bool
}

func (r *records) Write(p []byte) (int, error) {
	if r.full.Load() {
		return 0, syscall.ENOSPC
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(p)
}

// take returns the lines since the last time.
func (r *records) take(t *testing.T) (lines []map[string]any) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, line := range strings.Split(strings.TrimSuffix(r.text.String(), "\n"), "\n") {
		var e map[string]any
		if line == "" {
			continue
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		lines = append(lines, e)
	}
	r.text.Reset()
	return lines
}

// Every action, login and refusal is one line; looking is none.
func TestAuditOfTheConsole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &records{}
		log, err := audit.Open(audit.Options{Stdout: out, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		defer log.Close(t.Context()) //nolint:errcheck // it is memory
		b := newFake(codeProfile("review"), codeProfile("second"))
		r := newRig(t, b, func(o *console.Options) { withBoth(o); o.Audit = log })
		ops := certificate(&x509.Certificate{URIs: uris("spiffe://prod/ops"), NotAfter: time.Now().Add(1000 * time.Hour)})
		token := header("Authorization", "Bearer "+bearerToken)
		foreign := func(r *http.Request) { r.Header.Set("Sec-Fetch-Site", "cross-site") }
		for name, c := range map[string]struct {
			request *http.Request
			fails   error
			want    string // method, caller, proof, profile, operation, decision, rule, outcome
		}{
			"a list":              {request(http.MethodGet, "/", ops), nil, ""},
			"a page":              {request(http.MethodGet, "/profiles/review", ops), nil, ""},
			"health":              {request(http.MethodGet, "/healthz"), nil, ""},
			"a list for nobody":   {request(http.MethodGet, "/"), nil, "GET /{$}|||||deny||CALLER_UNKNOWN"},
			"another's page":      {request(http.MethodGet, "/profiles/second", ops), nil, "GET /profiles/{name}|spiffe://prod/ops|uri_san|second|admin|deny||CALLER_DENIED"},
			"a page that is none": {request(http.MethodGet, "/profiles/none", token), nil, "GET /profiles/{name}|bearer|bearer_token|none|admin|deny|bearer_token|PROFILE_UNKNOWN"},
			"a page of no name":   {request(http.MethodGet, "/profiles/A%22%0a", token), nil, "GET /profiles/{name}|bearer|bearer_token|||deny|bearer_token|PROFILE_UNKNOWN"},
			"a refresh":           {post("/profiles/review/refresh", nil, ops), nil, "POST /profiles/{name}/refresh|spiffe://prod/ops|uri_san|review|admin|allow|policy[0]|ok"},
			"one that fails": {post("/profiles/review/refresh", nil, token), &broker.Error{Reason: broker.ReasonRefreshTooSoon, Text: "x"},
				"POST /profiles/{name}/refresh|bearer|bearer_token|review|admin|allow|bearer_token|REFRESH_TOO_SOON"},
			"one that breaks":          {post("/profiles/review/reset", nil, ops), errors.New("x"), "POST /profiles/{name}/reset|spiffe://prod/ops|uri_san|review|admin|allow|policy[0]|INTERNAL"},
			"a reset":                  {post("/profiles/review/reset", nil, ops), nil, "POST /profiles/{name}/reset|spiffe://prod/ops|uri_san|review|admin|allow|policy[0]|ok"},
			"another's reset":          {post("/profiles/second/reset", nil, ops), nil, "POST /profiles/{name}/reset|spiffe://prod/ops|uri_san|second|admin|deny||CALLER_DENIED"},
			"a stranger's reset":       {post("/profiles/review/reset", nil), nil, "POST /profiles/{name}/reset|||||deny||CALLER_UNKNOWN"},
			"another site's":           {post("/profiles/review/reset", nil, ops, foreign), nil, "POST /profiles/{name}/reset|||||deny||CROSS_ORIGIN"},
			"a login":                  {post("/login", url.Values{"token": {bearerToken}}), nil, "POST /login|bearer|bearer_token|||allow|bearer_token|ok"},
			"a wrong one":              {post("/login", url.Values{"token": {"guessed"}}), nil, "POST /login|||||deny||CALLER_UNKNOWN"},
			"a wrong token":            {request(http.MethodGet, "/", header("Authorization", "Bearer x")), nil, "GET /{$}|||||deny||CALLER_UNKNOWN"},
			"a logout":                 {post("/logout", nil, token), nil, "POST /logout|bearer|bearer_token|||allow|bearer_token|ok"},
			"a nobody's logout":        {post("/logout", nil), nil, ""},
			"an answer to no question": {request(http.MethodGet, "/oauth/callback?code=c"), nil, "GET /oauth/callback|||||deny||INVALID_REQUEST"},
			"an answer that fails": {request(http.MethodGet, "/oauth/callback?state=s&code=c"), &broker.Error{Reason: broker.ReasonInvalidRequest, Text: "x"},
				"GET /oauth/callback|||||deny||INVALID_REQUEST"},
			"a sign-in":                   {request(http.MethodGet, "/oauth/callback?state=s&code=c"), nil, "GET /oauth/callback|||review|admin|allow|state|ok"},
			"a path that is none of ours": {request(http.MethodGet, "/profiles/"+strings.Repeat("x", 5000)+"/secret"), nil, ""},
		} {
			b.err, b.done = c.fails, &broker.Completion{Profile: "review"}
			time.Sleep(time.Hour) // of virtual time: the limit of logins, and the lines
			out.take(t)
			header("X-Request-Id", "id-1")(c.request)
			a, _ := r.do(c.request)
			time.Sleep(time.Second)
			var got []string
			for _, e := range out.take(t) {
				var fields []string
				for _, field := range []string{"method", "caller", "proof", "profile", "operation", "decision", "rule", "outcome"} {
					text, _ := e[field].(string)
					fields = append(fields, text)
				}
				got = append(got, strings.Join(fields, "|"))
				if e["door"] != "console" || e["peer"] != "127.0.0.1:50000" || e["request_id"] != "id-1" {
					t.Errorf("%s: %v", name, e)
				}
			}
			if strings.Join(got, "\n") != c.want {
				t.Errorf("%s: got %q, want %q", name, got, c.want)
			}
			if id := a.Header.Get("X-Request-Id"); id != "id-1" {
				t.Errorf("%s: request id %q", name, id)
			}
		}
	})
}

// Ids that could do harm are replaced, and pages of failures show theirs.
func TestRequestIDs(t *testing.T) {
	r := newRig(t, newFake(), nil)
	seen := map[string]bool{}
	for _, given := range []string{"", "a b", "<b>", strings.Repeat("x", 65), "a\"b"} {
		a, body := r.do(request(http.MethodGet, "/profiles/none", header("X-Request-Id", given)))
		id := a.Header.Get("X-Request-Id")
		if len(id) != 16 || seen[id] || !strings.Contains(body, "Request <code>"+id+"</code>") {
			t.Errorf("%q: %q\n%s", given, id, body)
		}
		seen[id] = true
	}
	if a, body := r.do(request(http.MethodGet, "/profiles/none", header("X-Request-Id", "mine.1"))); a.Header.Get("X-Request-Id") != "mine.1" || !strings.Contains(body, "<code>mine.1</code>") {
		t.Errorf("%v", a.Header)
	}
}

// With refuse, nothing is done while lines cannot be written.
func TestNothingIsDoneWithoutAudit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &records{}
		log, err := audit.Open(audit.Options{Settings: audit.Settings{Refuse: true}, Stdout: out, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		defer log.Close(t.Context()) //nolint:errcheck // it is memory
		b := newFake(codeProfile("review"))
		b.done = &broker.Completion{Profile: "review"}
		b.signIn = &broker.SignIn{URL: "https://id.example.com/", State: "s", Expires: time.Now().Add(time.Hour)}
		r := newRig(t, b, func(o *console.Options) { o.Audit = log })
		out.full.Store(true)
		log.Record(&audit.Event{})
		time.Sleep(time.Second)
		requests := func() []*http.Request {
			return []*http.Request{
				post("/profiles/review/refresh", nil), post("/profiles/review/reset", nil), post("/profiles/review/authorize", nil),
				post("/oauth/confirm", url.Values{"ticket": {"T"}}), post("/oauth/abandon", url.Values{"ticket": {"T"}}),
				request(http.MethodGet, "/oauth/callback?state=s&code=c"), request(http.MethodGet, "/oauth/callback?state=s&error=access_denied"),
			}
		}
		for _, q := range requests() {
			if a, body := r.do(q); a.StatusCode != http.StatusServiceUnavailable || a.Header.Get("Retry-After") == "" || !strings.Contains(body, "audit log") {
				t.Errorf("%s %s: %d %s", q.Method, q.URL, a.StatusCode, body)
			}
		}
		if did := b.took(); len(did) > 0 {
			t.Errorf("something was done: %v", did)
		}
		if a, _ := r.do(request(http.MethodGet, "/profiles/review")); a.StatusCode != http.StatusOK {
			t.Errorf("looking: %d", a.StatusCode)
		}
		out.full.Store(false)
		time.Sleep(time.Minute)
		if n := len(out.take(t)); n != 1+len(requests()) {
			t.Errorf("%d lines of what was refused", n)
		}
		for _, q := range requests() {
			if a, _ := r.do(q); a.StatusCode >= http.StatusInternalServerError {
				t.Errorf("%s %s: %d", q.Method, q.URL, a.StatusCode)
			}
		}
		if n := log.Stats().Reserved; n != 0 {
			t.Errorf("%d places are never filled", n)
		}
	})
}

// A handler that panics is answered for, and what it panicked with is nowhere.
func TestPanics(t *testing.T) {
	out := &records{}
	log, err := audit.Open(audit.Options{Stdout: out, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	const secret = "a-secret-that-a-panic-holds"
	r := newRig(t, newFake(codeProfile("review")), func(o *console.Options) {
		o.Audit = log
		o.LastCall = func(string) (string, time.Time) { panic("cannot go on with " + secret) }
	})
	a, body := r.do(request(http.MethodGet, "/profiles/review"))
	if a.StatusCode != http.StatusInternalServerError || strings.Contains(body, secret) {
		t.Errorf("%d %s", a.StatusCode, body)
	}
	if told := r.log.String(); !strings.Contains(told, "panic in a request") || !strings.Contains(told, "audit_test.go") || strings.Contains(told, secret) {
		t.Error(told)
	}
	if err := log.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if lines := out.take(t); len(lines) != 1 || lines[0]["outcome"] != "INTERNAL" || strings.Contains(fmt.Sprint(lines), secret) {
		t.Errorf("%v", lines)
	}
}

func TestMetricsOfTheAuditLog(t *testing.T) {
	registry := prometheus.NewRegistry()
	out := &records{}
	log, err := audit.Open(audit.Options{Stdout: out, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	prometheus.WrapRegistererWithPrefix("token_broker_", registry).MustRegister(console.AuditLog(log))
	r := newRig(t, newFake(), func(o *console.Options) { o.Gatherer = registry })
	log.Record(&audit.Event{})
	if err := log.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	log.Record(&audit.Event{}) // too late
	_, metrics := r.do(request(http.MethodGet, "/metrics"))
	for _, want := range []string{"audit_events_total 2", "audit_events_lost_total 1", "audit_events_buffered 0", "audit_writable 1"} {
		if !strings.Contains(metrics, "\ntoken_broker_"+want+"\n") {
			t.Errorf("no %s in\n%s", want, metrics)
		}
	}
}
