package sandbox_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// set sends faults through the front door.
func (r *rig) set(faults string) answer {
	r.t.Helper()
	return r.do(r.request(http.MethodPost, "/sandbox/faults", "application/json", faults))
}

func TestFaultAnswers(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	r.want(r.set(`[
		{"status": 429, "headers": {"Retry-After": "7"}},
		{"status": 503, "body": "<html>down</html>", "headers": {"Content-Type": "text/html"}, "times": 2},
		{"body": "{\"error\":\"server_error\"}"}
	]`), http.StatusNoContent, "")
	a := r.token(r.invoices()...)
	if a.status != http.StatusTooManyRequests || a.header.Get("Retry-After") != "7" || a.body != "" {
		t.Errorf("answer %d, Retry-After %q", a.status, a.header.Get("Retry-After"))
	}
	for range 2 {
		a = r.token(r.invoices()...)
		if a.status != http.StatusServiceUnavailable || a.body != "<html>down</html>" || a.header.Get("Content-Type") != "text/html" {
			t.Errorf("answer %d %s", a.status, a.body)
		}
	}
	a = r.token(r.invoices()...)
	if a.status != http.StatusOK || a.field(t, "error") != "server_error" || !strings.HasPrefix(a.header.Get("Content-Type"), "application/json") {
		t.Errorf("answer %d %s", a.status, a.body)
	}
	r.want(r.token(r.invoices()...), http.StatusOK, "")
	calls := r.Calls()
	if got := calls.ByGrant["client_credentials"]; got["fault"] != 4 || got["success"] != 1 || calls.Total != 5 {
		t.Errorf("counts %v", calls)
	}
	if calls.Issued["client_credentials"] != 1 {
		t.Errorf("%d tokens were issued, want 1", calls.Issued["client_credentials"])
	}
}

func TestFaultUntilCleared(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	r.set(`[{"status": 500, "times": -1}]`)
	for range 5 {
		r.want(r.token(r.invoices()...), http.StatusInternalServerError, "")
	}
	r.want(r.do(r.request(http.MethodDelete, "/sandbox/faults", "", "")), http.StatusNoContent, "")
	r.want(r.token(r.invoices()...), http.StatusOK, "")
}

func TestFaultPicksItsRequests(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	r.set(`[
		{"status": 500, "path": "/api/publicapi/"},
		{"status": 501, "grant": "password"},
		{"status": 502, "client": "admin"},
		{"status": 504, "path": "/auth2/` + sandbox.DemoTenant + `/connect/token"}
	]`)
	r.want(r.token(r.invoices()...), http.StatusOK, "")
	r.want(r.do(r.postForm("/auth2/"+sandbox.DemoTenant+"/connect/token", r.form(r.invoices()...))), http.StatusGatewayTimeout, "")
	r.want(r.token(r.password(sandbox.DemoPassword)...), http.StatusNotImplemented, "")
	r.want(r.token("client_id", "admin", "grant_type", "client_credentials"), http.StatusBadGateway, "")
	if got := r.skills(""); got != http.StatusInternalServerError {
		t.Errorf("skills answered %d", got)
	}
}

// TestFaultProcesses has the answer replaced or lost after a rotation that
// really happened.
func TestFaultProcesses(t *testing.T) {
	for name, fault := range map[string]string{
		"replaced":                  `[{"process": true, "status": 502}]`,
		"cut in the middle":         `[{"cut": "after"}]`,
		"cut before, yet processed": `[{"cut": "before", "process": true}]`,
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, sandbox.Options{})
			rt := r.consent().field(t, "refresh_token")
			r.ResetCalls()
			r.set(fault)
			a, err := r.try(r.postForm(tokenPath, r.form("client_id", "review", "grant_type", "refresh_token", "refresh_token", rt)))
			if err == nil && a.status == http.StatusOK {
				t.Error("the answer arrived")
			}
			if name == "cut in the middle" && (!errors.Is(err, io.ErrUnexpectedEOF) || a.status != http.StatusOK || a.body == "") {
				t.Errorf("answer %d with %d bytes and %v, want half an answer", a.status, len(a.body), err)
			}
			calls := r.Calls()
			if calls.Issued["refresh_token"] != 1 || calls.ByGrant["refresh_token"]["fault"] != 1 || calls.RefreshTokens[id(rt)] != 1 {
				t.Errorf("counts %+v", calls)
			}
			r.want(r.refresh("review", rt), http.StatusBadRequest, "invalid_grant") // it was used up
		})
	}
}

func TestFaultWithoutProcessingUsesNothingUp(t *testing.T) {
	for name, fault := range map[string]string{
		"status":     `[{"status": 502}]`,
		"cut before": `[{"cut": "before"}]`,
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, sandbox.Options{})
			rt := r.consent().field(t, "refresh_token")
			r.set(fault)
			_, _ = r.try(r.postForm(tokenPath, r.form("client_id", "review", "grant_type", "refresh_token", "refresh_token", rt)))
			if got := r.Calls().Issued["refresh_token"]; got != 0 {
				t.Errorf("%d tokens were issued", got)
			}
			r.want(r.refresh("review", rt), http.StatusOK, "")
		})
	}
}

func TestFaultDelays(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	const delay = 20 * time.Millisecond
	for name, fault := range map[string]sandbox.Fault{
		"late":               {Delay: delay},
		"processed and late": {Delay: delay, Process: true},
		"slow":               {SlowDrip: delay / 200}, // some 500 bytes
	} {
		t.Run(name, func(t *testing.T) {
			r.ResetCalls()
			if err := r.Fault(fault); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			a := r.token(r.invoices()...)
			if took := time.Since(start); took < delay {
				t.Errorf("took %v, want at least %v", took, delay)
			}
			r.wantLive(a.field(t, "access_token"), true)
			if got := r.Calls().ByGrant["client_credentials"]["success"]; got != 1 {
				t.Errorf("%d successes, want 1", got)
			}
		})
	}
}

// TestFaultDelayEndsWithTheClient: a client that leaves during the delay was
// not served.
func TestFaultDelayEndsWithTheClient(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	begun := make(chan struct{})
	if err := r.Fault(sandbox.Fault{Delay: time.Hour, Hook: func() { close(begun) }}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-begun
		cancel()
	}()
	if _, err := r.try(r.postForm(tokenPath, r.form(r.invoices()...)).WithContext(ctx)); !errors.Is(err, context.Canceled) {
		t.Fatalf("error %v", err)
	}
	r.eventually(func(c sandbox.Calls) bool {
		return c.InFlight == 0 && c.ByGrant["client_credentials"]["fault"] == 1 && len(c.Issued) == 0
	})
}

func TestFaultHangs(t *testing.T) {
	t.Run("until the client leaves", func(t *testing.T) {
		r := newRig(t, sandbox.Options{})
		r.set(`[{"hang": true}]`)
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			r.eventually(func(c sandbox.Calls) bool {
				return c.InFlight == 1 && c.ByGrant["client_credentials"]["fault"] == 1
			})
			cancel()
		}()
		if _, err := r.try(r.postForm(tokenPath, r.form(r.invoices()...)).WithContext(ctx)); !errors.Is(err, context.Canceled) {
			t.Fatalf("error %v", err)
		}
		r.eventually(func(c sandbox.Calls) bool { return c.InFlight == 0 })
	})
	t.Run("until the server closes", func(t *testing.T) {
		r := newRig(t, sandbox.Options{})
		if err := r.Fault(sandbox.Fault{Hang: true, Process: true, Hook: r.Close}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.try(r.postForm(tokenPath, r.form(r.invoices()...))); !errors.Is(err, io.EOF) {
			t.Fatalf("error %v, want a closed connection", err)
		}
		if got := r.Calls().Issued["client_credentials"]; got != 1 {
			t.Errorf("%d tokens were issued, want 1", got)
		}
	})
}

// eventually polls the counts: what happens after a client left has no other
// sign.
func (r *rig) eventually(ok func(sandbox.Calls) bool) {
	r.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok(r.Calls()) {
		if time.Now().After(deadline) {
			r.t.Errorf("counts %+v", r.Calls())
			return
		}
		select {
		case <-time.After(time.Millisecond):
		case <-r.t.Context().Done():
			return
		}
	}
}

func TestFaultsThatAreRefused(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	for _, test := range []struct{ faults, message string }{
		{`{"status": 500}`, "JSON list"},
		{`[{"status": "x"}]`, "status"},
		{`[{"sttus": 500}]`, "sttus"},
		{`[{"status": 99}]`, "between 200 and 599"},
		{`[{"delay": "soon"}]`, "duration"},
		{`[{"delay": "-1s"}]`, "delay"},
		{`[{"times": -2}]`, "times"},
		{`[{"cut": "half"}]`, "cut"},
		{`[{"hang": true, "status": 500}]`, "hang"},
		{`[{"cut": "before", "body": "x"}]`, "cut"},
		{`[{"path": "auth2"}]`, "slash"},
		{`[{"headers": {"a b": "c"}}]`, "header"},
		{`[] []`, "follows"},
		{`[{"status": 500}, {"times": -2}]`, "fault 2"},
	} {
		a := r.set(test.faults)
		if a.status != http.StatusBadRequest || !strings.Contains(a.body, test.message) {
			t.Errorf("%s: answer %d %s", test.faults, a.status, a.body)
		}
	}
	r.want(r.token(r.invoices()...), http.StatusOK, "") // none was set
	if err := r.Fault(make([]sandbox.Fault, 1001)...); err == nil {
		t.Error("there is no limit")
	}
}

func TestCallsOverHTTP(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	r.token(append(r.invoices(), "client_secret", "wrong")...)
	r.token(append(r.invoices(), "client_id", "nobody")...)
	r.token(r.invoices()...)
	a := r.do(r.request(http.MethodGet, "/sandbox/calls", "", ""))
	var calls sandbox.Calls
	if err := json.Unmarshal([]byte(a.body), &calls); err != nil {
		t.Fatal(err)
	}
	for _, check := range []struct {
		what      string
		got, want int
	}{
		{"total", calls.Total, 3},
		{"refused by grant", calls.ByGrant["client_credentials"]["invalid_client"], 2},
		{"granted by grant", calls.ByGrant["client_credentials"]["success"], 1},
		{"refused by client", calls.ByClient["invoices"]["invalid_client"], 1},
		{"refused, no client of ours", calls.ByClient["unknown"]["invalid_client"], 1},
	} {
		if check.got != check.want {
			t.Errorf("%s: %d, want %d", check.what, check.got, check.want)
		}
	}
	var names map[string]any
	if err := json.Unmarshal([]byte(a.body), &names); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"total", "by_grant", "by_client", "refresh_tokens", "codes", "revocations", "issued"} {
		if names[name] == nil {
			t.Errorf("there is no %s", name)
		}
	}
	r.want(r.do(r.request(http.MethodDelete, "/sandbox/calls", "", "")), http.StatusNoContent, "")
	if got := r.Calls().Total; got != 0 {
		t.Errorf("%d calls after a reset", got)
	}
}

func TestNoSecretIsShown(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	a := r.consent()
	shown := r.do(r.request(http.MethodGet, "/sandbox/calls", "", "")).body
	for _, secret := range []string{r.ClientSecret("review"), a.field(t, "refresh_token"), a.field(t, "access_token")} {
		if bytes.Contains([]byte(shown), []byte(secret)) {
			t.Error("the counts show a secret")
		}
	}
}

func TestOnlyLoopbackSteers(t *testing.T) {
	server, err := sandbox.New(sandbox.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, peer, host, origin string
		status                   int
	}{
		{"name", "127.0.0.1:5000", "localhost:8080", "", http.StatusOK},
		{"IPv4", "127.0.0.1:5000", "127.0.0.1", "", http.StatusOK},
		{"IPv6", "[::1]:5000", "[::1]:8080", "", http.StatusOK},
		{"IPv6 without a port", "[::1]:5000", "[::1]", "", http.StatusOK},
		{"foreign peer", "192.0.2.1:5000", "127.0.0.1:8080", "", http.StatusForbidden},
		{"foreign host", "127.0.0.1:5000", "evil.example:8080", "", http.StatusForbidden},
		{"host that begins so", "127.0.0.1:5000", "127.0.0.1.evil.example", "", http.StatusForbidden},
		{"no host", "127.0.0.1:5000", "", "", http.StatusForbidden},
		{"foreign page", "127.0.0.1:5000", "127.0.0.1:8080", "https://evil.example", http.StatusForbidden},
	} {
		for _, path := range []string{"/sandbox/calls", "/sandbox/faults"} {
			request := httptest.NewRequest(http.MethodDelete, path, nil)
			request.RemoteAddr, request.Host = test.peer, test.host
			if test.origin != "" {
				request.Header.Set("Origin", test.origin)
			}
			recorder := httptest.NewRecorder()
			server.ServeHTTP(recorder, request)
			if got := recorder.Code; (got == http.StatusForbidden) != (test.status == http.StatusForbidden) {
				t.Errorf("%s %s: status %d", test.name, path, got)
			}
		}
	}
}
