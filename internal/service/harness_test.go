package service_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/admission"
	"github.com/tokenbroker/tokenbroker/internal/audit"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
	"github.com/tokenbroker/tokenbroker/internal/service"
	"github.com/tokenbroker/tokenbroker/internal/store"
	"github.com/tokenbroker/tokenbroker/internal/vantage"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// rig is a broker in front of a stand-in Vantage, both on real sockets.
type rig struct {
	t       testing.TB
	vantage *sandbox.Server
	url     string
	broker  *broker.Broker
	service *service.Service
	access  *access.Authorizer
	address string
	log     *logBuffer
	metrics *prometheus.Registry
}

type rigOptions struct {
	tls    func() *tls.Config
	socket bool // instead of loopback
	trust  service.Trust
	policy []access.Rule
	change func(*vantage.Config)
	more   []string // further profiles, of the same client
	audit  *audit.Log
	limits admission.Limits
}

func newRig(t testing.TB, o rigOptions) *rig {
	t.Helper()
	r := &rig{t: t, log: &logBuffer{}, access: access.NewAuthorizer(), metrics: prometheus.NewRegistry()}
	var err error
	if r.vantage, err = sandbox.New(sandbox.Options{}); err != nil {
		t.Fatal(err)
	}
	web := httptest.NewServer(r.vantage)
	r.url = web.URL
	log := slog.New(slog.NewJSONHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	r.broker = broker.New(store.NewMemory(), broker.Options{Logger: log})
	r.configure(o.change, o.more...)
	r.service, err = service.New(service.Options{
		Broker: r.broker, Logger: log, TLS: o.tls, Reflection: true, Authorizer: r.access, Audit: o.audit,
		Limits: o.limits, Registerer: r.metrics,
	})
	if err != nil {
		t.Fatal(err)
	}
	policy, err := access.NewPolicy(o.policy)
	if err != nil {
		t.Fatal(err)
	}
	r.access.Use(policy)
	r.service.SetTrust(o.trust)
	network, address := "tcp", "127.0.0.1:0"
	if o.socket {
		dir, err := os.MkdirTemp("", "broker") // a short path: sockets have about 100 characters
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		network, address = "unix", dir+"/s"
	}
	ln, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	r.address = ln.Addr().String()
	served := make(chan error, 1)
	go func() { served <- r.service.Serve(ln) }()
	t.Cleanup(func() {
		r.service.Stop()
		if err := <-served; err != nil {
			t.Errorf("serving: %v", err)
		}
		r.broker.Close()
		r.vantage.Close()
		web.Close()
	})
	return r
}

// configure gives the broker a profile "invoices", and others like it.
func (r *rig) configure(change func(*vantage.Config), more ...string) {
	r.t.Helper()
	var profiles []*broker.Profile
	for _, name := range append([]string{"invoices"}, more...) {
		c := vantage.Config{BaseURL: r.url, ProfileConfig: oauth.ProfileConfig{
			Name: name, ClientID: "invoices",
			ClientSecrets:  []broker.Secret{broker.NewSecret(r.vantage.ClientSecret("invoices"))},
			Scopes:         []string{"openid", "permissions", "global.wildcard"},
			FingerprintKey: []byte("a key of thirty-two bytes, fixed"),
		}}
		if change != nil {
			change(&c)
		}
		p, err := vantage.NewProfile(c)
		if err != nil {
			r.t.Fatal(err)
		}
		profiles = append(profiles, p)
	}
	r.broker.Configure(profiles)
}

// dial connects without TLS unless settings are given.
func (r *rig) dial(settings *tls.Config) *grpc.ClientConn {
	r.t.Helper()
	creds := insecure.NewCredentials()
	if settings != nil {
		creds = credentials.NewTLS(settings)
	}
	conn, err := grpc.NewClient(r.target(), grpc.WithTransportCredentials(creds))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { conn.Close() })
	return conn
}

// target is the address as gRPC wants it.
func (r *rig) target() string {
	if strings.HasPrefix(r.address, "/") {
		return "unix:" + r.address
	}
	return "passthrough:///" + r.address
}

func (r *rig) tokens() pb.TokenBrokerClient { return pb.NewTokenBrokerClient(r.dial(nil)) }

func (r *rig) admin() pb.ProfileAdminClient { return pb.NewProfileAdminClient(r.dial(nil)) }

// wantRequests compares with what the stand-in counted.
func (r *rig) wantRequests(want int) {
	r.t.Helper()
	if got := r.vantage.Calls().Total; got != want {
		r.t.Fatalf("the token endpoint got %d requests, want %d", got, want)
	}
}

// fault makes the stand-in misbehave.
func (r *rig) fault(f ...sandbox.Fault) {
	r.t.Helper()
	if err := r.vantage.Fault(f...); err != nil {
		r.t.Fatal(err)
	}
}

// eventually polls until the condition holds.
func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !condition(); {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 20 s", what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// detail is what a client gets out of a failed call.
type detail struct {
	code   codes.Code
	text   string
	info   *errdetails.ErrorInfo
	retry  *errdetails.RetryInfo
	fields []string
}

func detailsOf(err error) detail {
	st := status.Convert(err)
	d := detail{code: st.Code(), text: st.Message(), info: &errdetails.ErrorInfo{}}
	for _, any := range st.Details() {
		switch m := any.(type) {
		case *errdetails.ErrorInfo:
			d.info = m
		case *errdetails.RetryInfo:
			d.retry = m
		case *errdetails.BadRequest:
			for _, v := range m.FieldViolations {
				d.fields = append(d.fields, v.Field)
			}
		}
	}
	return d
}

// wantFailure checks an error's code, reason and profile.
func wantFailure(t testing.TB, err error, code codes.Code, reason, profile string) detail {
	t.Helper()
	d := detailsOf(err)
	if d.code != code || d.info.Reason != reason || d.info.Metadata["profile"] != profile {
		t.Fatalf("got %v %v %q: %s\nwant %v %s for profile %q", d.code, d.info.Reason, d.info.Metadata["profile"], d.text, code, reason, profile)
	}
	if d.info.Domain != "tokenbroker.v1" || d.info.Metadata["request_id"] == "" {
		t.Errorf("error info %v lacks domain or request id", d.info)
	}
	return d
}

type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}
