// Package sandbox is a stand-in for ABBYY Vantage's authorization server: the
// server that demos talk to, and the witness that tests believe.
//
// It behaves as an IdentityServer does where ABBYY's documentation is silent:
// every token error is an HTTP 400 with a JSON body, a locked account looks
// like a wrong password, an authorization code is burnt by the exchange that
// fails, a rotated refresh token that comes back ends its whole family. Around
// that it serves the sign-in page, revocation, discovery, the client
// administration API and one resource (the list of skills) which tells a live
// token from a dead one.
//
// Two things make it a witness. It counts what it received, so that a test
// asserts "one request, of that grant, with that outcome" without asking the
// code under test; see [Calls]. And it fails on demand in the ways real servers
// do, including the cruel one: the request was processed and the answer was
// lost; see [Fault].
//
// It shares no code with the broker, so that one misreading of a standard
// cannot hide behind another. It is no authorization server for production:
// everything lives in bounded memory, where the oldest gives way to the newest,
// and it is meant for loopback only.
//
// All methods of [Server] may be called by any number of goroutines.
package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"
)

const (
	maxBody           = 1 << 20          // bytes of one request
	bodyTimeout       = 30 * time.Second // for a client to send them
	readHeaderTimeout = 10 * time.Second
	idleTimeout       = 2 * time.Minute
	maxHeader         = 64 << 10
	stopTimeout       = 5 * time.Second // for the requests in hand when Serve stops
)

// Server is the stand-in. It is an http.Handler; [Server.Serve] puts it on a
// listener.
type Server struct {
	options Options
	keys    *keys
	mux     *http.ServeMux
	faults  faults
	tally   tally

	closeOnce sync.Once
	closed    chan struct{} // closed by Close: whoever delays or hangs lets go

	// mu guards everything in world. It is never held while signing or writing.
	mu    sync.Mutex
	world world
}

// New makes a server for the world that options describe. The zero Options
// describe the demo world.
func New(options Options) (*Server, error) {
	options = options.withDefaults()
	w, err := newWorld(options)
	if err != nil {
		return nil, fmt.Errorf("making the sandbox: %w", err)
	}
	k, err := newKeys()
	if err != nil {
		return nil, fmt.Errorf("making the sandbox: %w", err)
	}
	s := &Server{
		options: options,
		keys:    k,
		world:   w,
		closed:  make(chan struct{}),
	}
	s.tally.reset()
	s.mux = s.routes()
	return s, nil
}

// routes names every address. Under /auth2 each has a twin for one tenant.
func (s *Server) routes() *http.ServeMux {
	mux := http.NewServeMux()
	auth := func(path string, h handler) {
		mux.Handle("/auth2/"+path, s.endpoint(h))
		mux.Handle("/auth2/{tenant}/"+path, s.endpoint(h))
	}
	mux.Handle("/auth2/connect/token", s.tokenEndpoint())
	mux.Handle("/auth2/{tenant}/connect/token", s.tokenEndpoint())
	auth("connect/authorize", s.authorize)
	auth("connect/revocation", s.revocation)
	auth(".well-known/openid-configuration", s.discovery)
	auth(".well-known/openid-configuration/jwks", s.jwks)
	auth("jwks", s.jwks)

	const clients = "/api/adminapi2/v2/tenants/{tenant}/clients"
	for _, slash := range []string{"", "/{$}"} {
		mux.Handle(clients+slash, s.endpoint(s.adminClients))
		mux.Handle(clients+"/{client}"+slash, s.endpoint(s.adminClient))
		mux.Handle(clients+"/{client}/secrets"+slash, s.endpoint(s.adminSecrets))
		mux.Handle(clients+"/{client}/secrets/{secret}"+slash, s.endpoint(s.adminSecret))
	}
	mux.Handle("/api/publicapi/v1/skills", s.endpoint(s.skills))

	mux.Handle("/sandbox/calls", loopbackOnly(s.controlCalls))
	mux.Handle("/sandbox/faults", loopbackOnly(s.controlFaults))
	mux.Handle("/", s.endpoint(func(*call) reply { return notFound() }))
	return mux
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mux.ServeHTTP(w, r)
}

// A call is one request in hand, its body read.
type call struct {
	*http.Request
	token  bool       // it came to the token endpoint
	tenant *Tenant    // named by the path; nil when none is
	body   []byte     // at most maxBody bytes
	form   url.Values // the body's parameters; nil when it is not a form
	issuer string     // of the endpoint that was asked
	grant  string     // as the tally calls it
	client string     // as the tally calls it

	settle func(outcome string) // counts the outcome; once
	leave  func()               // ends being in flight; again does nothing
}

// A handler decides the answer to a call. It writes nothing itself, so that a
// fault can lose, replace or cut an answer to a request that was processed.
type handler func(*call) reply

// endpoint serves h at any address but the token endpoint.
func (s *Server) endpoint(h handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := s.read(w, r)
		if err != nil {
			page(http.StatusRequestEntityTooLarge, "Request too large").write(w)
			return
		}
		c.settle, c.leave = func(string) {}, func() {}
		s.answer(w, c, s.inTenant(h))
	})
}

// tokenEndpoint serves the token endpoint: every request is counted, whatever
// comes of it.
func (s *Server) tokenEndpoint() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := s.read(w, r)
		c.token = true
		if err != nil {
			c.form = nil // too large or never complete: no form at all
		}
		s.label(c)
		s.tally.arrive(c)
		c.settle = func(outcome string) { s.tally.settle(c, outcome) }
		c.leave = sync.OnceFunc(s.tally.leave)
		defer c.leave()
		s.answer(w, c, s.inTenant(s.tokenRequest))
	})
}

// inTenant refuses paths that name a tenant which does not exist.
func (s *Server) inTenant(h handler) handler {
	return func(c *call) reply {
		if name := c.PathValue("tenant"); name != "" && c.tenant == nil {
			return notFound()
		}
		return h(c)
	}
}

// read takes the request in. The call is usable even when there is an error.
func (s *Server) read(w http.ResponseWriter, r *http.Request) (*call, error) {
	c := &call{Request: r, issuer: s.issuer(r)}
	if name := r.PathValue("tenant"); name != "" {
		c.tenant = s.world.tenant(name)
	}
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(bodyTimeout)) // not every writer has one
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		return c, fmt.Errorf("reading the request: %w", err)
	}
	_ = control.SetReadDeadline(time.Time{})
	c.body = body
	if r.Method == http.MethodPost && isForm(r) {
		if form, err := url.ParseQuery(string(body)); err == nil {
			c.form = form
		}
	}
	return c, nil
}

// issuer is the URL that names this server to its clients: as configured, or
// as the client called it, and with the tenant where the path has one.
func (s *Server) issuer(r *http.Request) string {
	issuer := s.options.Issuer
	if issuer == "" {
		scheme := "http"
		if r.TLS != nil {
			scheme = "https"
		}
		issuer = scheme + "://" + r.Host + "/auth2"
	}
	if tenant := r.PathValue("tenant"); tenant != "" {
		issuer += "/" + tenant
	}
	return issuer
}

// Serve answers on ln, which must be a loopback address, until ctx ends. Then
// it closes ln, lets go of what hangs, gives other requests in hand five
// seconds, and returns nil. The same server may be served again: it remembers
// everything, as a real one does over a restart.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	if addr, ok := ln.Addr().(*net.TCPAddr); !ok || !addr.IP.IsLoopback() {
		ln.Close()
		return fmt.Errorf("serving the sandbox on %s: not a loopback address", ln.Addr())
	}
	base, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	srv := &http.Server{
		Handler:           s,
		ReadHeaderTimeout: readHeaderTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		BaseContext:       func(net.Listener) context.Context { return base },
		// No ReadTimeout: it would end the context of a request that hangs
		// on purpose. Bodies have their own deadline; see read.
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	select {
	case err := <-done:
		return fmt.Errorf("serving the sandbox: %w", err)
	case <-ctx.Done():
	}
	cancel()
	stop, end := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer end()
	if err := srv.Shutdown(stop); err != nil {
		srv.Close()
	}
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving the sandbox: %w", err)
	}
	return nil
}

// Close lets go of every request that is delayed or hangs, now and from now
// on: their connections are cut. It is for servers that Serve does not run, so
// that closing an httptest.Server does not wait. It may be called twice.
func (s *Server) Close() {
	s.closeOnce.Do(func() { close(s.closed) })
}
