package service

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/audit"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/store"
	"github.com/tokenbroker/tokenbroker/internal/testca"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// watched is the TokenBroker of these tests, beside the real one: its WatchToken
// is the real one, too, unless it is told what to do instead, and tells how it
// ends.
type watched struct {
	tokenBroker
	ended   chan error
	instead func() error
}

const watchMethod = "/tokenbroker.v1.Watched/WatchToken"

func (w *watched) WatchToken(r *pb.WatchTokenRequest, stream grpc.ServerStreamingServer[pb.WatchTokenResponse]) error {
	if w.instead != nil {
		return w.instead()
	}
	err := w.tokenBroker.WatchToken(r, stream)
	w.ended <- err
	return err
}

// watchRig serves watched over real gRPC.
type watchRig struct {
	*watched
	t       *testing.T
	issuer  *counting
	access  *access.Authorizer
	broker  *broker.Broker
	log     *lockedLog
	address string
	conn    *grpc.ClientConn
	header  metadata.MD // of streams
}

type lockedLog struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newWatchRig(t *testing.T, rules ...access.Rule) *watchRig {
	t.Helper()
	return newTLSWatchRig(t, nil, insecure.NewCredentials(), rules...)
}

func newTLSWatchRig(t *testing.T, settings func() *tls.Config, client credentials.TransportCredentials, rules ...access.Rule) *watchRig {
	t.Helper()
	r := &watchRig{t: t, access: access.NewAuthorizer(), log: &lockedLog{}, issuer: &counting{}}
	log := slog.New(slog.NewJSONHandler(r.log, nil))
	r.broker = broker.New(store.NewMemory(), broker.Options{})
	t.Cleanup(r.broker.Close)
	r.profiles("a", "b")
	r.use(rules...)
	s, err := New(Options{Broker: r.broker, Logger: log, TLS: settings, Authorizer: r.access})
	if err != nil {
		t.Fatal(err)
	}
	r.watched = &watched{tokenBroker: tokenBroker{Service: s}, ended: make(chan error, 100)}
	description := pb.TokenBroker_ServiceDesc
	description.ServiceName = "tokenbroker.v1.Watched"
	s.RegisterService(&description, r.watched)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	r.address = ln.Addr().String()
	if r.conn, err = grpc.NewClient("passthrough:///"+r.address, grpc.WithTransportCredentials(client)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.conn.Close() })
	return r
}

// profiles configures the profile "invoices" with these scopes.
func (r *watchRig) profiles(scopes ...string) {
	r.broker.Configure([]*broker.Profile{{
		Name: "invoices", Provider: "vantage", GrantType: broker.ClientCredentials, Scopes: scopes,
		Identity: "i", Credential: "c", Issuer: r.issuer,
	}})
}

// tick replaces the token of these scopes.
func (r *watchRig) tick(scopes ...string) {
	r.t.Helper()
	if _, err := r.broker.Revoke(r.t.Context(), broker.Ask{Profile: "invoices", Scopes: scopes}, ""); err != nil {
		r.t.Fatal(err)
	}
}

// counting gives out another token each time.
type counting struct {
	n     atomic.Int64
	lives time.Duration // zero is an hour
}

func (c *counting) Issue(context.Context, broker.Request) (*broker.Grant, error) {
	return &broker.Grant{AccessToken: broker.NewSecret(fmt.Sprintf("token-%d", c.n.Add(1))), TokenType: "Bearer", Lifetime: cmp.Or(c.lives, time.Hour)}, nil
}

func (r *watchRig) use(rules ...access.Rule) {
	r.t.Helper()
	policy, err := access.NewPolicy(rules)
	if err != nil {
		r.t.Fatal(err)
	}
	r.access.Use(policy)
}

func mayWatch(scopes ...string) access.Rule {
	return access.Rule{Callers: []string{"anonymous"}, Profiles: []string{"invoices"}, Allow: []string{"watch"}, Scopes: scopes}
}

// watch opens a stream. It fails by itself when the test takes too long.
func (r *watchRig) watch(request *pb.WatchTokenRequest) grpc.ServerStreamingClient[pb.WatchTokenResponse] {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
	r.t.Cleanup(cancel)
	ctx = metadata.NewOutgoingContext(ctx, r.header)
	stream, err := r.conn.NewStream(ctx, &pb.TokenBroker_ServiceDesc.Streams[0], watchMethod)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := stream.SendMsg(request); err != nil {
		r.t.Fatal(err)
	}
	if err := stream.CloseSend(); err != nil {
		r.t.Fatal(err)
	}
	return &grpc.GenericClientStream[pb.WatchTokenRequest, pb.WatchTokenResponse]{ClientStream: stream}
}

func invoices(scopes ...string) *pb.WatchTokenRequest {
	return &pb.WatchTokenRequest{Profile: "invoices", Scopes: scopes}
}

// receive takes one answer.
func receive(t *testing.T, stream grpc.ServerStreamingClient[pb.WatchTokenResponse]) {
	t.Helper()
	if r, err := stream.Recv(); err != nil || r.GetToken().GetId() == "" {
		t.Fatalf("got %v, %v", r, err)
	}
}

// silent is sure that a stream brings nothing for a moment, and returns what waits
// for what it brings then.
func silent(t *testing.T, stream grpc.ServerStreamingClient[pb.WatchTokenResponse]) (receive func()) {
	t.Helper()
	came := make(chan error, 1)
	go func() {
		_, err := stream.Recv()
		came <- err
	}()
	select {
	case err := <-came:
		t.Fatalf("a token came, or %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	return func() {
		t.Helper()
		if err := <-came; err != nil {
			t.Fatal(err)
		}
	}
}

// wantEnd checks how a stream ends, and returns the text.
func wantEnd(t *testing.T, stream grpc.ServerStreamingClient[pb.WatchTokenResponse], code codes.Code, reason string) string {
	t.Helper()
	_, err := stream.Recv()
	st := status.Convert(err)
	if st.Code() != code || reasonOf(st) != reason {
		t.Fatalf("got %v %q: %s; want %v %q", st.Code(), reasonOf(st), st.Message(), code, reason)
	}
	for _, d := range st.Details() {
		if e, ok := d.(*errdetails.ErrorInfo); ok && e.Metadata["request_id"] == "" {
			t.Error("the error has no request id")
		}
	}
	return st.Message()
}

func TestStreamEndsWhenTheCallerLosesItsRight(t *testing.T) {
	r := newWatchRig(t, mayWatch())
	stream := r.watch(invoices())
	receive(t, stream)
	r.use(access.Rule{Callers: []string{"anonymous"}, Profiles: []string{"invoices"}, Allow: []string{"issue"}})
	text := wantEnd(t, stream, codes.PermissionDenied, "CALLER_DENIED")
	if !strings.Contains(text, `caller anonymous may not watch tokens of profile "invoices"`) {
		t.Error(text)
	}
	if cause := <-r.ended; !errors.As(cause, new(failure)) {
		t.Errorf("the stream ended with %v", cause)
	}
	if log := r.log.String(); !strings.Contains(log, "policy[0] names the caller and the profile, but allows only issue: add watch to its allow") {
		t.Errorf("the log does not say why:\n%s", log)
	}
}

func TestStreamThatKeepsItsRightGoesOn(t *testing.T) {
	r := newWatchRig(t, mayWatch())
	lost, kept := r.watch(invoices("a", "b")), r.watch(invoices("a"))
	receive(t, lost)
	receive(t, kept)
	other := access.Rule{Callers: []string{"dns:x"}, Profiles: []string{"*"}, Allow: []string{"watch"}}
	for range 10 { // by other rules each time
		r.use(other, mayWatch())
		r.use(mayWatch("*"))
	}
	r.use(other, mayWatch("a"))
	wantEnd(t, lost, codes.PermissionDenied, "CALLER_DENIED")
	<-r.ended
	for range 3 {
		r.tick("a")
		receive(t, kept)
	}
	select {
	case cause := <-r.ended:
		t.Errorf("the other stream ended: %v", cause)
	default:
	}
}

// While one configuration replaces another, what they do not agree on waits, and
// is neither allowed nor denied.
func TestDenialsWaitForTheWholeConfiguration(t *testing.T) {
	r := newWatchRig(t, mayWatch("a", "b"))
	stream := r.watch(invoices())
	receive(t, stream)
	was, _ := r.access.Current()
	next, err := access.NewPolicy([]access.Rule{mayWatch("a", "b", "c")})
	if err != nil {
		t.Fatal(err)
	}
	strict, err := access.NewPolicy([]access.Rule{mayWatch("c")})
	if err != nil {
		t.Fatal(err)
	}
	r.access.Use(next.And(was))
	r.profiles("a", "b", "c") // which the old one does not allow
	late := r.watch(invoices())
	r.tick() // whose successor nobody gets yet
	release := silent(t, stream)
	if n := len(r.ended); n > 0 {
		t.Error("a stream ended")
	}
	r.access.Use(next)
	release()
	receive(t, late)
	r.access.Use(strict.And(next))
	r.access.Use(strict)
	for _, s := range []grpc.ServerStreamingClient[pb.WatchTokenResponse]{stream, late} {
		wantEnd(t, s, codes.PermissionDenied, "CALLER_DENIED")
	}
}

func TestStreamIsJudgedByTheScopesThatItsProfileHas(t *testing.T) {
	r := newWatchRig(t, mayWatch("a", "b"))
	stream := r.watch(invoices())
	receive(t, stream)
	policy, _ := r.access.Current()
	r.profiles("a", "b", "c")
	r.access.Use(policy) // as after every change of the profiles
	wantEnd(t, stream, codes.PermissionDenied, "CALLER_DENIED")
	if log := r.log.String(); !strings.Contains(log, "add c to the scopes of policy[0]") {
		t.Errorf("the log does not say why:\n%s", log)
	}
}

func TestManyStreamsEndAtOnce(t *testing.T) {
	r := newWatchRig(t, mayWatch())
	streams := make([]grpc.ServerStreamingClient[pb.WatchTokenResponse], 50)
	for i := range streams {
		streams[i] = r.watch(invoices())
		receive(t, streams[i])
	}
	r.use(access.Rule{Callers: []string{"dns:x"}, Profiles: []string{"*"}, Allow: []string{"watch"}})
	for _, stream := range streams {
		wantEnd(t, stream, codes.PermissionDenied, "CALLER_DENIED")
	}
}

func TestStreamThatEndsByItself(t *testing.T) {
	r := newWatchRig(t, mayWatch())
	for name, c := range map[string]struct {
		serve  func() error
		code   codes.Code
		reason string
	}{
		"with a panic": {func() error { panic("Canary-in-a-panic") }, codes.Internal, ""},
		"with an error of the broker": {func() error {
			return failure{cause: &broker.Error{Reason: broker.ReasonEndpointUnavailable, Text: "it is down"}, profile: "invoices"}
		}, codes.Unavailable, "ENDPOINT_UNAVAILABLE"},
		"with an error that nobody knows": {func() error { return errors.New("Canary-in-an-error") }, codes.Internal, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r.use(mayWatch())
			r.instead = c.serve
			text := wantEnd(t, r.watch(invoices()), c.code, c.reason)
			if strings.Contains(text+r.log.String(), "Canary") {
				t.Errorf("%s\n%s", text, r.log)
			}
		})
	}
	r.use(mayWatch())
	r.instead = func() error { return nil }
	if _, err := r.watch(invoices()).Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("a stream that ends well: %v", err)
	}
	if !strings.Contains(r.log.String(), "panic in a call") {
		t.Error("the panic is not logged")
	}
}

func TestStreamPassesTheChain(t *testing.T) {
	for name, c := range map[string]struct {
		rule    access.Rule
		request *pb.WatchTokenRequest
		code    codes.Code
		reason  string
	}{
		"a caller that is denied":        {mayWatch("a"), invoices(), codes.PermissionDenied, "CALLER_DENIED"},
		"a profile that does not exist":  {mayWatch(), &pb.WatchTokenRequest{Profile: "nothing"}, codes.PermissionDenied, "CALLER_DENIED"},
		"a request that is not valid":    {mayWatch(), &pb.WatchTokenRequest{Profile: "No Such Name"}, codes.InvalidArgument, "INVALID_REQUEST"},
		"a request without a profile":    {mayWatch(), &pb.WatchTokenRequest{}, codes.InvalidArgument, "INVALID_REQUEST"},
		"a request with the same scopes": {mayWatch(), invoices("a", "a"), codes.InvalidArgument, "INVALID_REQUEST"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newWatchRig(t, c.rule)
			wantEnd(t, r.watch(c.request), c.code, c.reason)
			if n := r.issuer.n.Load(); n > 0 {
				t.Errorf("it cost %d token requests", n)
			}
			if log := r.log.String(); !strings.Contains(log, `"method":"`+watchMethod+`"`) || !strings.Contains(log, `"reason":"`+c.reason+`"`) {
				t.Errorf("the log lacks the call:\n%s", log)
			}
		})
	}
}

func TestStreamOfAnUnknownCaller(t *testing.T) {
	a := testca.New(t)
	server := &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"},
		Certificates: []tls.Certificate{a.Leaf(testca.Loopback)}, ClientCAs: a.Pool(), ClientAuth: tls.RequireAndVerifyClientCert,
	}
	for name, c := range map[string]struct {
		change func(*x509.Certificate)
		code   codes.Code
		reason string
	}{
		"the name in the CN": {func(c *x509.Certificate) { c.Subject.CommonName = "worker.example.com" }, codes.Unauthenticated, "CALLER_UNKNOWN"},
		"another caller":     {testca.Named("other.example.com"), codes.PermissionDenied, "CALLER_DENIED"},
		"the caller":         {testca.Named("worker.example.com"), codes.OK, ""},
	} {
		t.Run(name, func(t *testing.T) {
			client := &tls.Config{RootCAs: a.Pool(), ServerName: "127.0.0.1", Certificates: []tls.Certificate{a.Leaf(c.change)}}
			r := newTLSWatchRig(t, func() *tls.Config { return server }, credentials.NewTLS(client),
				access.Rule{Callers: []string{"dns:worker.example.com"}, Profiles: []string{"*"}, Allow: []string{"watch"}})
			if c.code == codes.OK {
				receive(t, r.watch(invoices()))
				return
			}
			wantEnd(t, r.watch(invoices()), c.code, c.reason)
		})
	}
}

// lasting is a verifier whose tokens end at that time.
type lasting time.Time

func (l lasting) Verify(context.Context, string) (*access.Caller, error) {
	return &access.Caller{Name: "k8s://prod/batch/worker", Proof: access.ServiceAccount, Expires: time.Time(l)}, nil
}

func TestStreamEndsWithWhatProvesItsCaller(t *testing.T) {
	rule := access.Rule{Callers: []string{"k8s://prod/batch/worker"}, Profiles: []string{"*"}, Allow: []string{"watch"}}
	for name, c := range map[string]struct {
		lasts time.Duration
		lose  func(*watchRig)
		text  string
	}{
		"the token ends":                  {2 * time.Second, func(*watchRig) {}, "what has proven who calls has ended"},
		"its cluster is believed no more": {time.Hour, func(r *watchRig) { r.SetTrust(Trust{}) }, "this broker accepts none"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newWatchRig(t, rule)
			end := time.Now().Add(c.lasts)
			r.SetTrust(Trust{ServiceAccounts: lasting(end)})
			r.header = metadata.Pairs("authorization", "Bearer token")
			stream := r.watch(invoices())
			receive(t, stream)
			for range 3 { // which change nothing
				r.SetTrust(Trust{ServiceAccounts: lasting(end)})
			}
			c.lose(r)
			if text := wantEnd(t, stream, codes.Unauthenticated, "CALLER_UNKNOWN"); !strings.Contains(text, c.text) {
				t.Error(text)
			}
			if c.lasts < time.Minute && time.Now().Before(end) {
				t.Error("it ended before the token has")
			}
			var f failure
			if cause := <-r.ended; !errors.As(cause, &f) {
				t.Errorf("the stream ended with %v", cause)
			}
		})
	}
}

func TestStreamEndsWithItsCertificate(t *testing.T) {
	a := testca.New(t)
	leaf := a.Leaf(testca.Named("worker.example.com"))
	server := &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"},
		Certificates: []tls.Certificate{a.Leaf(testca.Loopback)}, ClientCAs: a.Pool(), ClientAuth: tls.RequireAndVerifyClientCert,
	}
	client := &tls.Config{RootCAs: a.Pool(), ServerName: "127.0.0.1", Certificates: []tls.Certificate{leaf}}
	r := newTLSWatchRig(t, func() *tls.Config { return server }, credentials.NewTLS(client),
		access.Rule{Callers: []string{"dns:worker.example.com"}, Profiles: []string{"*"}, Allow: []string{"watch"}})
	stream := r.watch(invoices())
	receive(t, stream)
	list, err := x509.ParseRevocationList(a.RevocationList(nil, leaf.Leaf))
	if err != nil {
		t.Fatal(err)
	}
	revocations := access.NewRevocations([]*x509.Certificate{a.Certificate()})
	if err := revocations.Add(list); err != nil {
		t.Fatal(err)
	}
	r.SetTrust(Trust{Revocations: revocations})
	if text := wantEnd(t, stream, codes.Unauthenticated, "CALLER_UNKNOWN"); !strings.Contains(text, "the client certificate has been revoked") {
		t.Error(text)
	}
	if log := r.log.String(); strings.Contains(log, "allows it") || !strings.Contains(log, "has been revoked by CN=") {
		t.Errorf("the log does not say why:\n%s", log)
	}
}

// full is output that takes nothing once it is full.
type full struct{ atomic.Bool }

func (f *full) Write(p []byte) (int, error) {
	if f.Load() {
		return 0, errors.New("no space")
	}
	return len(p), nil
}

// With refuse a stream whose last token has ended says why there is no other.
func TestStreamEndsWithoutTheAuditLog(t *testing.T) {
	t.Parallel()
	out := &full{}
	log, err := audit.Open(audit.Options{Settings: audit.Settings{Refuse: true}, Stdout: out, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	r := newWatchRig(t, mayWatch())
	r.Service.audit, r.issuer.lives = log, 10*time.Second
	stream := r.watch(invoices())
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	out.Store(true)
	log.Record(&audit.Event{}) // to fail with
	for deadline := time.Now().Add(10 * time.Second); log.Ready() == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("that it fails is not known")
		}
	}
	wantEnd(t, stream, codes.Unavailable, "AUDIT_UNAVAILABLE")
	if early := time.Until(first.GetToken().GetExpireTime().AsTime()); early > 0 {
		t.Errorf("it ended %v before its token", early)
	}
	if n := r.issuer.n.Load(); n < 2 {
		t.Error("there was no successor to withhold")
	}
}

func TestStreamEndsWithTheServer(t *testing.T) {
	r := newWatchRig(t, mayWatch())
	stream := r.watch(invoices())
	receive(t, stream)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	r.Shutdown(ctx)
	wantEnd(t, stream, codes.Unavailable, "SHUTTING_DOWN")
	if ctx.Err() != nil {
		t.Error("the stream held the server up")
	}
}

// A profile's name passes the quick check if and only if the schema accepts it.
func TestProfileNamesAreThoseOfTheSchema(t *testing.T) {
	s := newWatchRig(t).Service
	names := []string{"", "\n", "a\n", "\na", "é", "a\xff", "ａ", strings.Repeat("a", 63), strings.Repeat("a", 64), strings.Repeat("a", 65),
		strings.Repeat("a", 63) + "-", strings.Repeat("-", 64), "a" + strings.Repeat("-", 62) + "b", "a" + strings.Repeat("-", 63) + "b"}
	characters := "aZ09z._-*/ :@`{\x00\x7f"
	for i := range len(characters) {
		for j := range len(characters) {
			for k := range len(characters) {
				names = append(names, characters[i:i+1], characters[i:i+1]+characters[j:j+1], characters[i:i+1]+characters[j:j+1]+characters[k:k+1])
			}
		}
	}
	accepted := 0
	for _, name := range names {
		valid := s.validator.Validate(&pb.IssueTokenRequest{Profile: name}) == nil
		if valid {
			accepted++
		}
		if isProfileName(name) != valid {
			t.Errorf("%q: %v, the schema says %v", name, isProfileName(name), valid)
		}
	}
	if accepted < 50 || accepted > len(names)/2 {
		t.Errorf("%d of %d were accepted: this shows little", accepted, len(names))
	}
}
