package console_test

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/console"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

func TestAdminPages(t *testing.T) {
	registry := prometheus.NewRegistry()
	ours := prometheus.WrapRegistererWithPrefix("token_broker_", registry)
	m := console.NewMetrics(ours, "v0")
	b := broker.New(store.NewMemory(), broker.Options{})
	defer b.Close()
	b.Configure([]*broker.Profile{{Name: "invoices", Identity: "i", Credential: "c"}})
	ours.MustRegister(console.Profiles(b))
	m.Observe(broker.Attempt{Profile: "invoices", Outcome: "throttled", Duration: 300 * time.Millisecond})
	m.Reloaded(true)
	m.Reloaded(false)
	ours.MustRegister(console.Store(func() console.StoreStats {
		return console.StoreStats{
			Reachable:       true,
			Operations:      map[console.StoreOperation]int64{{Name: "acquire", Outcome: "ok"}: 3},
			Resubscriptions: 4, Restored: 5, Unreadable: 6, Corrupt: 7, ClockOffset: -1500 * time.Millisecond,
		}
	}))

	var missing, degraded []string
	web := httptest.NewServer(console.Handler(console.Options{
		Broker: b, Ready: func() []string { return missing }, Degraded: func() []string { return degraded }, Gatherer: registry, Version: "v0",
		Access: console.Access{Local: true, Authorizer: access.NewAuthorizer()}, Logger: slog.New(slog.DiscardHandler),
	}))
	defer web.Close()
	get := func(path string) (int, string) {
		t.Helper()
		r, err := http.Get(web.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		if r.Header.Get("Cache-Control") != "no-store" || r.Header.Get("X-Content-Type-Options") != "nosniff" || r.Header.Get("Content-Security-Policy") == "" {
			t.Errorf("%s: headers %v", path, r.Header)
		}
		return r.StatusCode, string(body)
	}
	for path, want := range map[string]string{"/healthz": "ok", "/readyz": "ready", "/": "Token Broker v0"} {
		if code, body := get(path); code != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("%s: %d %s", path, code, body)
		}
	}
	_, metrics := get("/metrics")
	for _, want := range []string{
		`token_broker_token_requests_total{outcome="throttled",profile="invoices"} 1`,
		`token_broker_token_request_duration_seconds_bucket{profile="invoices",le="0.5"} 1`,
		`token_broker_profile_state{profile="invoices",state="idle"} 1`,
		`token_broker_profile_state{profile="invoices",state="ready"} 0`,
		`token_broker_tokens_served_total{profile="invoices",source="memory"} 0`,
		`token_broker_job_tokens_served_total{job="dedicated",profile="invoices"} 0`,
		`token_broker_job_tokens_served_total{job="named",profile="invoices"} 0`,
		`token_broker_dedicated_tokens{profile="invoices"} 0`,
		`token_broker_config_reloads_total{result="failure"} 1`,
		`token_broker_unsaved_grants 0`,
		`token_broker_build_info{version="v0"} 1`,
		`token_broker_store_reachable 1`,
		`token_broker_store_operations_total{operation="acquire",outcome="ok"} 3`,
		`token_broker_store_resubscriptions_total 4`,
		`token_broker_store_restored_total 5`,
		`token_broker_store_unreadable_total 6`,
		`token_broker_store_corrupt_total 7`,
		`token_broker_store_clock_offset_seconds -1.5`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	degraded = []string{"the store is out of reach"}
	if code, body := get("/readyz"); code != http.StatusOK || body != "ready\ndegraded: the store is out of reach\n" {
		t.Errorf("readyz: %d %s", code, body)
	}
	missing = []string{"this replica is shutting down"}
	if code, body := get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "not ready: this replica is shutting down") {
		t.Errorf("readyz: %d %s", code, body)
	}
	if code, _ := get("/healthz"); code != http.StatusOK {
		t.Errorf("healthz while draining: %d", code)
	}
	if code, _ := get("/nothing"); code != http.StatusNotFound {
		t.Errorf("an unknown page: %d", code)
	}
	r, err := http.Post(web.URL+"/healthz", "text/plain", nil)
	if err != nil || r.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("POST: %v, %v", r, err)
	} else {
		r.Body.Close()
	}
}
