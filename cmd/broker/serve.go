package main

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"sync/atomic"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/config"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

func newServe() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "serve --config FILE",
		Short: "Run the server",
		Long: "Run the server. It starts whether or not Redis, or any authorization server, can\nbe reached; only a bad config stops it. SIGHUP, and any change of the config or of\na file that " +
			"it names, loads the config again, all or nothing: if the new one is\nbad, its mistakes are logged and the old one stays. On SIGTERM calls that wait for\na token are sent to another replica, others finish.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			return serve(cmd.Context(), path, cmd.ErrOrStderr())
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
func serve(ctx context.Context, path string, stderr io.Writer) error {
	// From the first moment to the last: a SIGHUP that nobody waits for ends a process.
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)

	loader := config.NewLoader(path, config.Options{UserAgent: "token-broker/" + buildVersion()})
	c, err := loader.Load()
	if err != nil {
		fmt.Fprintln(stderr, err) // a line per mistake, as editors read them
		return alreadyTold{usageError{err}}
	}
	var level slog.LevelVar
	level.Set(c.Log.Level)
	log := newLogger(stderr, c.Log.Format, &level)

	var settings, adminSettings atomic.Pointer[tls.Config]
	var bearer atomic.Pointer[broker.Secret]
	o := serverOptions{
		log: log, reflection: c.Server.Reflection, limits: c.Server.Limits, store: c.Store,
		admin: adminOptions{local: isLocal(c.Admin.Address), certificates: knowsOperators(c.Admin), url: c.Admin.URL},
	}
	if c.Server.TLS != nil {
		o.tls = settings.Load
	}
	if c.Admin.TLS != nil {
		o.admin.tls = adminSettings.Load
	}
	if !c.Admin.BearerToken.IsEmpty() {
		o.admin.bearer = func() broker.Secret { return *bearer.Load() }
	}
	s, err := newServer(o)
	if err != nil {
		return err
	}
	apply := func(c *config.Config) error {
		policy, err := access.NewPolicy(c.Policy)
		if err != nil {
			return err
		}
		level.Set(c.Log.Level)
		settings.Store(c.Server.TLS)
		adminSettings.Store(c.Admin.TLS)
		bearer.Store(&c.Admin.BearerToken)
		s.service.SetLimits(c.Server.Limits)
		if c.Store != nil {
			s.redis.Use(c.Store.Access)
		}
		s.configure(c.Profiles, policy)
		for _, w := range c.Warnings {
			log.Warn("config", "file", w.File, "line", w.Line, "column", w.Column, "path", w.Path, "warning", w.Message)
		}
		return nil
	}
	if err := apply(c); err != nil {
		return usageError{err}
	}

	calls, err := listen(c.Server.Network, c.Server.Address)
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
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.hangups:
		case <-again:
		}
		r.reload()
	}
}

// reload is all or nothing.
func (r *reloader) reload() {
	log := r.server.log
	next, err := r.loader.Load()
	if err == nil {
		err = r.fits(next)
	}
	if err == nil {
		err = r.apply(next)
	}
	r.server.metrics.Reloaded(err == nil)
	if err != nil {
		var problems config.Problems
		if !errors.As(err, &problems) {
			log.Error("config not reloaded, the old one stays", "error", err)
		}
		for _, p := range problems {
			log.Error("config not reloaded, the old one stays", "file", p.File, "line", p.Line, "column", p.Column, "path", p.Path, "error", p.Message)
		}
		return
	}
	r.current = next
	log.Info("config reloaded", "profiles", len(next.Profiles))
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

func newCheck() *cobra.Command {
	var path, output string
	cmd := &cobra.Command{
		Use:   "check --config FILE",
		Short: "Check a config, as serve would, without touching the network",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return usageError{fmt.Errorf("--output %q: use text or json", output)}
			}
			return check(path, output, cmd.OutOrStdout())
		},
	}
	configFlag(cmd, &path)
	cmd.Flags().StringVar(&output, "output", "text", "text or json")
	return cmd
}

// report is what check prints as JSON.
type report struct {
	Valid    bool            `json:"valid"`
	Profiles int             `json:"profiles"`
	Problems config.Problems `json:"problems"`
	Warnings config.Problems `json:"warnings"`
}

func check(path, output string, w io.Writer) error {
	r := report{Problems: config.Problems{}, Warnings: config.Problems{}}
	c, err := config.Load(path, config.Options{})
	if err == nil {
		_, err = access.NewPolicy(c.Policy)
	}
	if err != nil {
		if !errors.As(err, &r.Problems) {
			r.Problems = config.Problems{{File: path, Message: err.Error()}}
		}
	} else {
		r.Valid, r.Profiles, r.Warnings = true, len(c.Profiles), append(r.Warnings, c.Warnings...)
	}
	if output == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		if err := e.Encode(r); err != nil {
			return err
		}
	} else {
		for _, p := range r.Problems {
			fmt.Fprintln(w, p)
		}
		for _, p := range r.Warnings {
			fmt.Fprintln(w, "warning:", p)
		}
		if r.Valid {
			fmt.Fprintf(w, "%s is valid: %d profiles\n", path, r.Profiles)
		}
	}
	if err != nil {
		return alreadyTold{usageError{err}}
	}
	return nil
}
