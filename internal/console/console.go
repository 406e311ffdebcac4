// Package console is the HTTP door: health, readiness and metrics for machines,
// pages for operators, and the address that browsers come back to from a
// sign-in.
//
// Machines are asked nothing, for what they get holds no secret. The pages are
// for operators only, see [Access]; they work without script. The callback asks
// nobody who they are: whoever brings a state that this broker has made may be
// a person who has nothing to do with its operation.
//
// No page shows a token, and none a secret that was configured. What comes from
// authorization servers and browsers is text to this package, never markup.
package console

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/tokenbroker/tokenbroker/internal/audit"
	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Broker is what the pages show and do; *broker.Broker is one.
type Broker interface {
	Profiles() []string
	Glance(name string) (*broker.Status, error)
	Status(ctx context.Context, name string) (*broker.Status, error)
	Issue(ctx context.Context, ask broker.Ask, d broker.Demand) (*broker.Token, broker.Source, error)
	Reset(ctx context.Context, name string) error
	StartAuthorization(ctx context.Context, name string, browser broker.Secret) (*broker.SignIn, error)
	CompleteAuthorization(ctx context.Context, c broker.Callback) (*broker.Completion, error)
	RefuseAuthorization(ctx context.Context, c broker.Callback) (profile string, err error)
	ConfirmAuthorization(ctx context.Context, ticket string, allowed func(profile string) bool) (*broker.Completion, error)
	AbandonAuthorization(ctx context.Context, ticket string, allowed func(profile string) bool) (*broker.Completion, error)
}

// Options of the handler.
type Options struct {
	// Broker whose profiles the pages are about.
	Broker Broker
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
	// Access says how operators are known. The zero value lets nobody in.
	Access Access
	// LastCall says who last got a token of the profile from this replica, and
	// when; empty is nobody. Nil is nobody ever.
	LastCall func(profile string) (caller string, at time.Time)
	// URL of the console as browsers see it, where a proxy is in front of it;
	// empty if there is none.
	URL string
	// Logger gets one line per action and refusal. Never nil.
	Logger *slog.Logger
	// Audit gets one event per action, login and refusal; nil is nobody.
	Audit *audit.Log
}

// maxForm bounds the body of a request.
const maxForm = 16 << 10

type console struct {
	Options
	logins limiter
	mux    *http.ServeMux
}

// Handler serves the admin address.
func Handler(o Options) http.Handler {
	mux := http.NewServeMux()
	c := &console{Options: o, mux: mux}
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", c.ready)
	mux.Handle("GET /metrics", promhttp.HandlerFor(o.Gatherer, promhttp.HandlerOpts{EnableOpenMetrics: true, MaxRequestsInFlight: 4}))

	mux.HandleFunc("GET /{$}", c.operators(c.list))
	mux.HandleFunc("GET /profiles/{name}", c.operators(c.profile(c.show)))
	mux.HandleFunc("POST /profiles/{name}/authorize", c.operators(c.profile(c.authorize)))
	mux.HandleFunc("POST /profiles/{name}/refresh", c.operators(c.profile(c.refresh)))
	mux.HandleFunc("POST /profiles/{name}/reset", c.operators(c.profile(c.reset)))
	mux.HandleFunc("POST /oauth/confirm", c.operators(c.confirm))
	mux.HandleFunc("POST /oauth/abandon", c.operators(c.abandon))

	mux.HandleFunc("GET /oauth/callback", c.callback)
	mux.HandleFunc("GET /oauth/callback/{rest...}", c.callback)
	mux.HandleFunc("GET /oauth/done", c.done)
	mux.HandleFunc("GET /login", c.loginPage)
	mux.HandleFunc("POST /login", c.login)
	mux.HandleFunc("POST /logout", c.logout)
	mux.HandleFunc("GET /style.css", asset("text/css; charset=utf-8", style))
	mux.HandleFunc("GET /console.js", asset("text/javascript; charset=utf-8", script))

	same := http.NewCrossOriginProtection()
	if u, err := url.Parse(o.URL); err == nil && u.Host != "" {
		if err := same.AddTrustedOrigin(u.Scheme + "://" + u.Host); err != nil {
			panic("console: " + err.Error()) // a scheme and a host are an origin
		}
	}
	same.SetDenyHandler(http.HandlerFunc(c.crossOrigin))
	return guard(c.visited(same.Handler(mux)))
}

func (c *console) ready(w http.ResponseWriter, _ *http.Request) {
	missing := c.Ready()
	if len(missing) == 0 {
		fmt.Fprintln(w, "ready")
		if degraded := c.Degraded(); len(degraded) > 0 {
			fmt.Fprintf(w, "degraded: %s\n", strings.Join(degraded, "; "))
		}
		return
	}
	w.WriteHeader(http.StatusServiceUnavailable)
	fmt.Fprintf(w, "not ready: %s\n", strings.Join(missing, "; "))
}

// guard sets what every answer has in common. Pages add to it.
func guard(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Type", "text/plain; charset=utf-8")
		h.Set("Cache-Control", "no-store")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		h.Set("Referrer-Policy", "same-origin") // with no-referrer, browsers hide the origin of our own forms
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		r.Body = http.MaxBytesReader(w, r.Body, maxForm)
		next.ServeHTTP(w, r)
	})
}
