// Package console is the HTTP door for operators and their machines: health,
// readiness and metrics.
//
// It has no secret to show, so it asks nobody who they are.
package console

import (
	"fmt"
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Options of the handler.
type Options struct {
	// Ready names what is missing for this replica to answer calls; empty
	// means that it can.
	Ready func() []string
	// Degraded names what works less well than it should, though calls are
	// answered.
	Degraded func() []string
	// Gatherer holds the metrics.
	Gatherer prometheus.Gatherer
	// Version of the program.
	Version string
}

// Handler serves the admin address.
func Handler(o Options) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		missing := o.Ready()
		if len(missing) == 0 {
			fmt.Fprintln(w, "ready")
			if degraded := o.Degraded(); len(degraded) > 0 {
				fmt.Fprintf(w, "degraded: %s\n", strings.Join(degraded, "; "))
			}
			return
		}
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintf(w, "not ready: %s\n", strings.Join(missing, "; "))
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(o.Gatherer, promhttp.HandlerOpts{EnableOpenMetrics: true, MaxRequestsInFlight: 4}))
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "token broker %s\n\n/healthz  the process lives\n/readyz   it can answer\n/metrics  Prometheus\n", o.Version)
	})
	return guard(mux)
}

// guard sets what every answer has in common.
func guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Type", "text/plain; charset=utf-8")
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		next.ServeHTTP(w, r)
	})
}
