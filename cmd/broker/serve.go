package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/audit"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/config"
	"github.com/tokenbroker/tokenbroker/internal/service"
	"github.com/tokenbroker/tokenbroker/internal/serviceaccount"
	"github.com/tokenbroker/tokenbroker/internal/store"
	"github.com/tokenbroker/tokenbroker/internal/workload"
)

func newServe() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "serve --config FILE",
		Short: "Run the server",
		Long: "Run the server. It starts whether or not Redis, or any authorization server, can\nbe reached; only a bad config stops it. SIGHUP, and any change of the config or of\na file that " +
			"it names, loads the config again, all or nothing: if the new one is\nbad, its mistakes are logged and the old one stays. SIGHUP opens the audit log's\nfile anew, too. On SIGTERM calls that wait for\na token are sent to another replica, others finish.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return serve(cmd.Context(), path, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	configFlag(cmd, &path)
	return cmd
}

func configFlag(cmd *cobra.Command, path *string) {
	cmd.Flags().StringVar(path, "config", os.Getenv("BROKER_CONFIG"), "the config, a YAML file ($BROKER_CONFIG)")
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if *path == "" {
			return usageError{errors.New("which config? say --config FILE, or set BROKER_CONFIG")}
		}
		return nil
	}
}

// serve runs until ctx ends.
func serve(ctx context.Context, path string, stdout, stderr io.Writer) (err error) {
	// From the first moment to the last: a SIGHUP that nobody waits for ends a process.
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	// Who reads our output may go. That is no reason to.
	signal.Ignore(syscall.SIGPIPE)

	loader := config.NewLoader(path, config.Options{UserAgent: "token-broker/" + buildVersion()})
	c, err := loader.Load()
	if err != nil {
		fmt.Fprintln(stderr, err) // a line per mistake, as editors read them
		return alreadyTold{usageError{err}}
	}
	var level slog.LevelVar
	level.Set(c.Log.Level)
	log := newLogger(stderr, c.Log.Format, &level)

	records, err := audit.Open(audit.Options{Settings: c.Audit, Stdout: stdout, Logger: log})
	if err != nil {
		return usageError{err}
	}
	defer func() { err = errors.Join(err, closeAudit(records)) }() // after the last call

	var settings, adminSettings atomic.Pointer[tls.Config]
	var bearer atomic.Pointer[broker.Secret]
	var operators atomic.Pointer[access.Revocations]
	o := serverOptions{
		log: log, reflection: c.Server.Reflection, limits: c.Server.Limits, store: c.Store, audit: records,
		admin: adminOptions{local: isLocal(c.Admin.Address), certificates: knowsOperators(c.Admin), revocations: operators.Load, url: c.Admin.URL},
	}
	if c.Server.TLS != nil {
		o.tls = settings.Load
	}
	if w := c.Server.WorkloadAPI; w != nil {
		o.workload, err = workload.Open(workload.Options{Address: w.Address, TrustDomains: w.TrustDomains, Logger: log})
		if err != nil {
			return usageError{err}
		}
		o.tls = func() *tls.Config { return o.workload.TLS(settings.Load()) }
	}
	if c.Admin.TLS != nil {
		o.admin.tls = adminSettings.Load
		o.admin.authorities = func() *x509.CertPool { return adminSettings.Load().ClientCAs }
	}
	if !c.Admin.BearerToken.IsEmpty() {
		o.admin.bearer = func() broker.Secret { return *bearer.Load() }
	}
	s, err := newServer(o)
	if err != nil {
		return err
	}
	var accounts *serviceaccount.Verifier // in force
	apply := func(c *config.Config) error {
		policy, err := access.NewPolicy(c.Policy)
		if err != nil {
			return err
		}
		was, _ := s.access.Current()
		s.narrow(policy)
		if w := c.Server.WorkloadAPI; w != nil {
			if err := s.workload.Believe(w.TrustDomains); err != nil {
				s.access.Use(was)
				return err
			}
		}
		level.Set(c.Log.Level)
		settings.Store(c.Server.TLS)
		adminSettings.Store(c.Admin.TLS)
		operators.Store(c.Admin.Revocations)
		s.config.Store(c)
		bearer.Store(&c.Admin.BearerToken)
		s.service.SetLimits(c.Server.Limits)
		if c.Store != nil {
			s.redis.Use(c.Store.Access)
		}
		accounts = serviceaccount.New(c.Server.ServiceAccounts, serviceaccount.Options{Logger: log, Previous: accounts})
		s.service.SetTrust(trustOf(c, accounts))
		s.configure(c.Profiles, policy)
		for _, w := range c.Warnings {
			log.Warn("config", "file", w.File, "line", w.Line, "column", w.Column, "path", w.Path, "warning", w.Message)
		}
		return nil
	}
	if err := apply(c); err != nil {
		return usageError{err}
	}

	calls, err := listenForCalls(c.Server)
	if err != nil {
		return err
	}
	admin, err := listen("tcp", c.Admin.Address)
	if err != nil {
		calls.Close()
		return err
	}
	log.Info("serving", "version", buildVersion(), "address", calls.Addr().String(), "admin_address", admin.Addr().String(), "profiles", len(c.Profiles))
	r := reloader{loader: loader, server: s, current: c, apply: apply, hangups: hangups}
	ctx, stop := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		r.run(ctx)
	}()
	err = s.run(ctx, calls, admin)
	stop()
	<-watched
	return err
}

// trustOf is what a config says is to be believed of callers; accounts are those
// of its clusters.
func trustOf(c *config.Config, accounts *serviceaccount.Verifier) service.Trust {
	t := service.Trust{Forwarders: c.Server.Forwarders, Revocations: c.Server.Revocations}
	if len(c.Server.ServiceAccounts) > 0 {
		t.ServiceAccounts = accounts
	}
	return t
}

// auditFlush is how long the last lines of the audit log may take.
const auditFlush = 3 * time.Second

func closeAudit(l *audit.Log) error {
	ctx, cancel := context.WithTimeout(context.Background(), auditFlush)
	defer cancel()
	return l.Close(ctx)
}

// reloader takes over changed configurations, one at a time.
type reloader struct {
	loader  *config.Loader
	server  *server
	current *config.Config
	apply   func(*config.Config) error
	hangups <-chan os.Signal
}

func (r *reloader) run(ctx context.Context) {
	again := make(chan struct{}, 1)
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		r.loader.Watch(ctx, func() {
			select {
			case again <- struct{}{}:
			default:
			}
		})
	}()
	defer func() { <-watching }()
	var enough <-chan time.Time // nil: there is nothing to be patient with
	for {
		patient := true
		select {
		case <-ctx.Done():
			return
		case <-r.hangups: // somebody waits for an answer
			r.server.audit.Reopen()
			patient = false
		case <-enough:
			patient = false
		case <-again:
		}
		switch waits := r.reload(patient); {
		case !waits:
			enough = nil
		case enough == nil:
			enough = time.After(patience)
		}
	}
}

// patience is how long files that do not fit together are taken for ones that
// are being replaced, a certificate before its key. Then it is told.
const patience = 3 * time.Second

// reload is all or nothing. It waits, and says so, when it is patient and what is
// wrong may be over in a moment.
func (r *reloader) reload(patient bool) (waits bool) {
	log := r.server.log
	next, err := r.loader.Load()
	var problems config.Problems
	if errors.As(err, &problems) && problems.Passing() && patient {
		log.Info("config not reloaded yet, its files do not fit together at this moment", "path", problems[0].Path)
		return true
	}
	if err == nil {
		err = r.fits(next)
	}
	if err == nil {
		err = r.apply(next)
	}
	r.server.metrics.Reloaded(err == nil)
	if err != nil {
		if !errors.As(err, &problems) {
			log.Error("config not reloaded, the old one stays", "error", err)
		}
		for _, p := range problems {
			log.Error("config not reloaded, the old one stays", "file", p.File, "line", p.Line, "column", p.Column, "path", p.Path, "error", p.Message)
		}
		return false
	}
	r.current = next
	log.Info("config reloaded", "profiles", len(next.Profiles))
	return false
}

// fits refuses what cannot change under a running server.
func (r *reloader) fits(next *config.Config) error {
	was, is := r.current, next
	wasRedis, isRedis := redisOf(was), redisOf(is)
	for _, c := range []struct {
		field   string
		changed bool
	}{
		{"server.address", was.Server.Network != is.Server.Network || was.Server.Address != is.Server.Address},
		{"server.tls", (was.Server.TLS == nil) != (is.Server.TLS == nil)},
		{"server.tls.workload_api", apiOf(was) != apiOf(is)},
		{"server.reflection", was.Server.Reflection != is.Server.Reflection},
		{"server.limits.connection_streams", was.Server.Limits.ConnectionStreams != is.Server.Limits.ConnectionStreams},
		{"server.limits.connection_age", was.Server.Limits.ConnectionAge != is.Server.Limits.ConnectionAge},
		{"server.limits.connection_age_grace", was.Server.Limits.ConnectionAgeGrace != is.Server.Limits.ConnectionAgeGrace},
		{"server.limits.ping_interval", was.Server.Limits.PingInterval != is.Server.Limits.PingInterval},
		{"server.limits.header_size", was.Server.Limits.HeaderSize != is.Server.Limits.HeaderSize},
		{"admin.address", was.Admin.Address != is.Admin.Address},
		{"admin.tls", (was.Admin.TLS == nil) != (is.Admin.TLS == nil)},
		{"admin.tls.client_ca", knowsOperators(was.Admin) != knowsOperators(is.Admin)},
		{"admin.bearer_token", was.Admin.BearerToken.IsEmpty() != is.Admin.BearerToken.IsEmpty()},
		{"admin.url", was.Admin.URL != is.Admin.URL},
		{"store", (was.Store == nil) != (is.Store == nil)},
		{"store.redis.addresses", !slices.Equal(wasRedis.Addresses, isRedis.Addresses)},
		{"store.redis.master_name", wasRedis.MasterName != isRedis.MasterName},
		{"store.redis.cluster", wasRedis.Cluster != isRedis.Cluster},
		{"store.redis.username", wasRedis.Username != isRedis.Username},
		{"store.redis.lease", wasRedis.Lease != isRedis.Lease},
		{"audit", was.Audit != is.Audit},
		{"log.format", was.Log.Format != is.Log.Format},
	} {
		if c.changed {
			return fmt.Errorf("%s cannot change under a running server: restart it, or put the old value back", c.field)
		}
	}
	return nil
}

// knowsOperators reports whether operators can prove themselves by certificate.
func knowsOperators(a config.Admin) bool { return a.TLS != nil && a.TLS.ClientCAs != nil }

// apiOf is the address of the Workload API; empty without one.
func apiOf(c *config.Config) string {
	if c.Server.WorkloadAPI == nil {
		return ""
	}
	return c.Server.WorkloadAPI.Address
}

// redisOf is how the store is reached; the zero value without one.
func redisOf(c *config.Config) store.RedisOptions {
	if c.Store == nil {
		return store.RedisOptions{}
	}
	return c.Store.Redis
}

func newLogger(w io.Writer, format string, level slog.Leveler) *slog.Logger {
	o := &slog.HandlerOptions{Level: level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() == slog.KindDuration { // with its unit, which JSON numbers lack
			a.Value = slog.StringValue(a.Value.Duration().String())
		}
		return a
	}}
	if format == "text" {
		return slog.New(slog.NewTextHandler(w, o))
	}
	return slog.New(slog.NewJSONHandler(w, o))
}
