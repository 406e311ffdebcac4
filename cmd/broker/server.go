package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/admission"
	"github.com/tokenbroker/tokenbroker/internal/audit"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/config"
	"github.com/tokenbroker/tokenbroker/internal/console"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
	"github.com/tokenbroker/tokenbroker/internal/service"
	"github.com/tokenbroker/tokenbroker/internal/store"
	"github.com/tokenbroker/tokenbroker/internal/workload"
)

// drainTimeout is how long calls under way may take after a stop was asked for.
// With what comes after them it stays below the 30 s that Kubernetes grants.
const drainTimeout = 25 * time.Second

// adminConnections bounds those to the admin address: some scrapers, probes and
// browsers. Beyond it the oldest is closed, so that whoever comes is served.
const adminConnections = 1000

// server is one replica: the broker, its gRPC door and its admin door.
type server struct {
	log      *slog.Logger
	redis    *store.Redis // nil: tokens are in the memory of this process only
	broker   *broker.Broker
	access   *access.Authorizer
	audit    *audit.Log // nil: there is none; whoever opened it closes it
	service  *service.Service
	metrics  *console.Metrics
	admin    *http.Server
	ready    readiness
	config   atomic.Pointer[config.Config] // in force; nil: there is no file
	workload *workload.Source              // nil: certificates are files
}

type serverOptions struct {
	log        *slog.Logger
	tls        func() *tls.Config // nil: no TLS
	workload   *workload.Source   // nil: certificates are files
	reflection bool
	limits     admission.Limits
	store      *config.Store // nil: memory
	audit      *audit.Log    // nil: none
	admin      adminOptions
}

// adminOptions say who may do what on the admin address.
type adminOptions struct {
	local        bool               // it is a loopback address
	tls          func() *tls.Config // nil: no TLS
	certificates bool               // tls asks for certificates of operators
	revocations  func() *access.Revocations
	authorities  func() *x509.CertPool // nil without tls
	bearer       func() broker.Secret  // nil: no bearer token
	url          string                // as browsers see it, if a proxy is in front
}

func (o adminOptions) access(authorizer *access.Authorizer) console.Access {
	a := console.Access{Local: o.local, BearerToken: o.bearer, Authorizer: authorizer, Revocations: o.revocations, Authorities: o.authorities}
	if o.certificates {
		a.Certificate = access.Identify
	}
	return a
}

// newServer builds a replica without profiles; configure gives it some.
func newServer(o serverOptions) (*server, error) {
	s := &server{log: o.log, access: access.NewAuthorizer(), audit: o.audit, workload: o.workload}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	ours := prometheus.WrapRegistererWithPrefix("token_broker_", registry)
	s.metrics = console.NewMetrics(ours, buildVersion())
	b := broker.Options{Logger: o.log, Observe: s.metrics.Observe, SecretFiles: secretFiles{}}
	var shared broker.Store = store.NewMemory()
	if o.store != nil {
		if err := s.share(o.store); err != nil {
			return nil, err
		}
		shared, b.Lease = s.redis, o.store.Redis.Lease
		ours.MustRegister(console.Store(s.storeStats))
	}
	s.broker = broker.New(shared, b)
	ours.MustRegister(console.Profiles(s.broker), console.Expiry(s.ends))
	if s.audit != nil {
		ours.MustRegister(console.AuditLog(s.audit))
	}
	var err error
	s.service, err = service.New(service.Options{
		Broker: s.broker, Logger: o.log, Registerer: ours, TLS: o.tls, Reflection: o.reflection, Limits: o.limits,
		Authorizer: s.access, Audit: s.audit,
	})
	if err != nil {
		s.close()
		return nil, err
	}
	s.admin = &http.Server{
		Handler: s.ready.watched(console.Handler(console.Options{
			Broker: s.broker, Ready: s.missing, Degraded: s.degraded, Gatherer: registry, Version: buildVersion(),
			Access: o.admin.access(s.access), LastCall: s.service.LastCall, URL: o.admin.url, Logger: o.log, Audit: s.audit,
		})),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    32 << 10,
		ErrorLog:          slog.NewLogLogger(o.log.Handler(), slog.LevelDebug),
	}
	if settings := o.admin.tls; settings != nil {
		s.admin.TLSConfig = &tls.Config{
			MinVersion:         tls.VersionTLS13, // the settings of each handshake decide
			GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return settings(), nil },
		}
	}
	return s, nil
}

// narrow has nothing allowed but what the policy in force and the next one both
// allow, until configure puts that in force: what either of them says is about its
// own profiles, and about those whom its own configuration believes.
func (s *server) narrow(next *access.Policy) {
	was, _ := s.access.Current()
	s.access.Use(next.And(was))
}

// configure puts profiles and policy in force, all at once. Where others are in
// force, narrow comes first.
func (s *server) configure(profiles []*broker.Profile, policy *access.Policy) {
	s.broker.Configure(profiles)
	// Streams are judged anew, too, because their profiles' scopes may be others.
	s.access.Use(policy)
	s.metrics.Loaded()
}

// missing names what stands against answering calls.
func (s *server) missing() []string {
	missing := s.ready.missing()
	if s.workload != nil {
		if identity := s.workload.Missing(); identity != "" {
			missing = append(missing, identity)
		}
	}
	if err := s.audit.Ready(); err != nil {
		missing = append(missing, err.Error())
	}
	return missing
}

// run serves until ctx ends, and then lets calls under way finish: health goes
// first, so that nobody new comes, and those who watch it get the time to see;
// then requests to token endpoints are given back, so that another replica makes
// them.
func (s *server) run(ctx context.Context, calls, admin net.Listener) error {
	g, failed := errgroup.WithContext(ctx)
	g.Go(func() error {
		if err := s.service.Serve(calls); err != nil {
			return fmt.Errorf("serving gRPC: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		serve := s.admin.Serve
		if s.admin.TLSConfig != nil {
			serve = func(ln net.Listener) error { return s.admin.ServeTLS(ln, "", "") }
		}
		if err := serve(admission.Limit(admin, adminConnections, nil)); !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serving the admin address: %w", err)
		}
		return nil
	})
	g.Go(func() error {
		<-failed.Done()
		s.log.Info("shutting down")
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTimeout)
		defer cancel()
		watched := s.ready.leave()
		s.service.Drain()
		if ctx.Err() != nil { // it was asked to stop: nothing has failed, all can go on
			select {
			case <-time.After(watched):
			case <-limit.Done():
			}
		}
		s.broker.Drain()
		s.service.Shutdown(limit)
		s.close()
		if err := s.admin.Shutdown(limit); err != nil {
			return s.admin.Close()
		}
		return nil
	})
	return g.Wait()
}

// close returns when nothing of the broker and its store runs any more.
func (s *server) close() {
	s.broker.Close()
	if s.redis != nil {
		s.redis.Close()
	}
	if s.workload != nil {
		s.workload.Close()
	}
}

// isLocal reports whether a server at this address is for this machine alone.
func isLocal(address string) bool {
	if strings.HasPrefix(address, "unix:") {
		return true
	}
	host, _, err := net.SplitHostPort(address)
	return err == nil && oauth.IsLoopback(host)
}

// listen is net.Listen for a TCP address or a unix socket. A socket that a dead
// process left behind is replaced; one that is in use is not.
func listen(network, address string) (net.Listener, error) {
	if network == "unix" {
		if err := clearSocket(address); err != nil {
			return nil, err
		}
	}
	ln, err := bind(network, address)
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", address, err)
	}
	if network == "unix" {
		// It has no more than this already; the umask may have left less.
		if err := os.Chmod(address, socketMode); err != nil {
			ln.Close()
			return nil, fmt.Errorf("listening on %s: %w", address, err)
		}
	}
	return ln, nil
}

// socketMode lets the socket's owner and group connect, and nobody else.
const socketMode = 0o660

func clearSocket(path string) error {
	if info, err := os.Lstat(path); err != nil || info.Mode().Type() != os.ModeSocket {
		return nil // nothing there, or nothing of ours: Listen will tell
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		conn.Close()
	}
	if !errors.Is(err, syscall.ECONNREFUSED) { // whoever does not refuse is alive, even if too busy to answer
		return fmt.Errorf("listening on %s: another process serves this socket", path)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("replacing the abandoned socket %s: %w", path, err)
	}
	return nil
}
