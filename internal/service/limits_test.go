package service_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/admission"
	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/testh2"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// everyone may do everything.
var everyone = []access.Rule{{Callers: []string{"dns:*", access.Anonymous}, Profiles: []string{"*"}, Allow: []string{"issue", "watch", "admin"}}}

// metric reads one value; label is that of its only label.
func (r *rig) metric(name, label string) float64 {
	r.t.Helper()
	families, err := r.metrics.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && (label == "" || m.GetLabel()[0].GetValue() == label) {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	r.t.Fatalf("there is no metric %s for %q", name, label)
	return 0
}

// empty waits until no call is under way.
func (r *rig) empty() {
	r.t.Helper()
	eventually(r.t, "no call is under way", func() bool { return r.metric("calls_in_flight", "") == 0 })
}

// wantThrottled checks a refusal that says when to come back.
func wantThrottled(t *testing.T, err error, reason string, least, most time.Duration) time.Duration {
	t.Helper()
	d := wantFailure(t, err, codes.ResourceExhausted, reason, "")
	wait := d.retry.GetRetryDelay().AsDuration()
	if wait < least || wait > most || wait%time.Millisecond != 0 {
		t.Fatalf("told to wait %s, want %s to %s", wait, least, most)
	}
	return wait
}

// mesh is a rig with TLS, and a client of it for each caller.
type mesh struct {
	*rig
	authority *testca.Authority
	settings  *tls.Config // of the server
}

func newMesh(t *testing.T, l admission.Limits) mesh {
	t.Helper()
	a := testca.New(t)
	settings := serverOf(a)
	return mesh{newRig(t, rigOptions{tls: func() *tls.Config { return settings }, policy: everyone, limits: l}), a, settings}
}

func (m mesh) tls(name string) *tls.Config {
	return clientOf(m.authority, func(c *x509.Certificate) { c.DNSNames = []string{name} })
}

// tokens returns a client on a connection of its own.
func (m mesh) tokens(name string) pb.TokenBrokerClient {
	return pb.NewTokenBrokerClient(m.dial(m.tls(name)))
}

func whoami(ctx context.Context, c pb.TokenBrokerClient, o ...grpc.CallOption) error {
	_, err := c.WhoAmI(ctx, &pb.WhoAmIRequest{}, o...)
	return err
}

// hold makes a call that lasts until ctx ends, and returns when it is under way,
// or the error when it is refused. The token endpoint must hang.
func (r *rig) hold(ctx context.Context, c pb.TokenBrokerClient) error {
	r.t.Helper()
	before := r.metric("calls_in_flight", "")
	ended := make(chan error, 1)
	var calling sync.WaitGroup
	calling.Go(func() {
		_, err := c.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"})
		ended <- err
	})
	r.t.Cleanup(calling.Wait)
	var err error
	eventually(r.t, "the call is under way, or refused", func() bool {
		select {
		case err = <-ended:
			return true
		default:
			return r.metric("calls_in_flight", "") > before
		}
	})
	if err == nil && r.metric("calls_in_flight", "") == before {
		r.t.Error("the call has ended")
	}
	return err
}

// open opens a stream that lasts until ctx ends.
func open(ctx context.Context, conn *grpc.ClientConn) (reflectionpb.ServerReflection_ServerReflectionInfoClient, error) {
	stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	_, err = stream.Recv()
	return stream, err
}

func TestCallerRate(t *testing.T) {
	m := newMesh(t, admission.Limits{CallerRate: 1})
	greedy := m.tokens("greedy")
	for i := range 2 {
		if err := whoami(t.Context(), greedy); err != nil {
			t.Fatalf("call %d: %v", i, err)
		}
	}
	// The third is too many: a polite answer, and what clients that retry by
	// themselves look at.
	var trailer metadata.MD
	err := whoami(t.Context(), greedy, grpc.Trailer(&trailer))
	refused := time.Now()
	wait := wantThrottled(t, err, "CALLER_THROTTLED", time.Millisecond, time.Second)
	if got := trailer.Get("grpc-retry-pushback-ms"); len(got) != 1 || got[0] != strconv.FormatInt(wait.Milliseconds(), 10) {
		t.Errorf("pushback %q, want %s", got, wait)
	}
	if text := detailsOf(err).text; !strings.Contains(text, "dns:greedy") || !strings.Contains(text, "server.limits.caller_rate") {
		t.Errorf("text: %s", text)
	}
	// It is no fresh start to come by other connections.
	for range 10 {
		wantThrottled(t, whoami(t.Context(), m.tokens("greedy")), "CALLER_THROTTLED", time.Millisecond, time.Second)
	}
	if err := whoami(t.Context(), m.tokens("modest")); err != nil {
		t.Errorf("another caller: %v", err)
	}
	eventually(t, "the caller is let in again", func() bool { return whoami(t.Context(), greedy) == nil })
	if took := time.Since(refused); took < wait-50*time.Millisecond {
		t.Errorf("told to wait %s, and let in after %s", wait, took)
	}
	if n := m.metric("calls_refused_total", "caller_rate"); n < 11 {
		t.Errorf("%v refusals are counted", n)
	}
	m.empty()
}

func TestAnonymousCallersAreNotCounted(t *testing.T) {
	r := newRig(t, rigOptions{limits: admission.Limits{CallerRate: 1, CallerCalls: 1}})
	r.fault(sandbox.Fault{Hang: true, Times: -1})
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	for range 5 {
		if err := r.hold(ctx, r.tokens()); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCallerCalls(t *testing.T) {
	m := newMesh(t, admission.Limits{CallerCalls: 2})
	m.fault(sandbox.Fault{Hang: true, Times: -1})
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	for range 2 {
		if err := m.hold(ctx, m.tokens("greedy")); err != nil {
			t.Fatal(err)
		}
	}
	// They have arrived; soon they are known to be of this caller.
	greedy := m.tokens("greedy")
	eventually(t, "a third call is refused", func() bool { return whoami(t.Context(), greedy) != nil })
	_, issue := m.tokens("greedy").IssueToken(within(t, 20*time.Second), &pb.IssueTokenRequest{Profile: "invoices"})
	for _, call := range []error{issue, whoami(t.Context(), m.tokens("greedy"))} {
		wantThrottled(t, call, "CALLER_THROTTLED", 500*time.Millisecond, 1500*time.Millisecond)
	}
	if err := whoami(t.Context(), m.tokens("modest")); err != nil {
		t.Errorf("another caller: %v", err)
	}
	leave()
	eventually(t, "there is room again", func() bool { return whoami(t.Context(), m.tokens("greedy")) == nil })
	if n := m.metric("calls_refused_total", "caller_calls"); n < 2 {
		t.Errorf("%v refusals are counted", n)
	}
}

func TestCalls(t *testing.T) {
	r := newRig(t, rigOptions{limits: admission.Limits{Calls: 3}})
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	for range 3 {
		if _, err := open(ctx, r.dial(nil)); err != nil {
			t.Fatal(err)
		}
	}
	if n := r.metric("calls_in_flight", ""); n != 3 {
		t.Errorf("%v calls are under way, want 3", n)
	}
	// Early, with details: whether or not the caller has a deadline, and however
	// far away it is.
	hour, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	for name, ctx := range map[string]context.Context{"no deadline": t.Context(), "5 s": within(t, 5*time.Second), "an hour": hour} {
		for _, err := range []error{whoami(ctx, r.tokens()), second(open(ctx, r.dial(nil)))} {
			wantThrottled(t, err, "CALLER_THROTTLED", 500*time.Millisecond, 1500*time.Millisecond)
			if text := detailsOf(err).text; !strings.Contains(text, "server.limits.calls") {
				t.Errorf("%s: %s", name, text)
			}
		}
	}
	// Balancers can ask how this replica is.
	health := healthpb.NewHealthClient(r.dial(nil))
	for range 5 {
		if _, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
			t.Errorf("health: %v", err)
		}
	}
	if n := r.metric("calls_refused_total", "calls"); n != 6 {
		t.Errorf("%v refusals are counted, want 6", n)
	}
	leave()
	eventually(t, "there is room again", func() bool { return whoami(t.Context(), r.tokens()) == nil })
	r.empty()
}

// What is beyond a limit is answered while what was accepted still waits, and
// that is none the worse for it. Without the limit, all wait.
func TestWhoIsRefusedIsToldEarly(t *testing.T) {
	const most, more = 8, 200
	start := func(t *testing.T, l admission.Limits) (r *rig, issue func() <-chan error, release func()) {
		r = newRig(t, rigOptions{limits: l})
		held := make(chan struct{})
		release = sync.OnceFunc(func() { close(held) })
		t.Cleanup(release) // before the stand-in closes
		r.fault(sandbox.Fault{Hook: func() { <-held }, Times: -1})
		client, ctx := r.tokens(), within(t, time.Minute)
		issue = func() <-chan error {
			ended := make(chan error, 1)
			go func() {
				_, err := client.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"})
				ended <- err
			}()
			return ended
		}
		return r, issue, release
	}
	underWay := func(r *rig, want float64) {
		t.Helper()
		eventually(r.t, fmt.Sprintf("%v calls are under way", want), func() bool { return r.metric("calls_in_flight", "") == want })
	}
	t.Run("with a limit", func(t *testing.T) {
		r, issue, release := start(t, admission.Limits{Calls: most})
		var accepted, beyond [most + more]<-chan error
		for i := range most {
			accepted[i] = issue()
		}
		underWay(r, most)
		for i := range more {
			beyond[i] = issue()
		}
		for _, ended := range beyond[:more] { // nothing else ends before release
			wantThrottled(t, <-ended, "CALLER_THROTTLED", 500*time.Millisecond, 1500*time.Millisecond)
		}
		if n := r.metric("calls_refused_total", "calls"); n != more {
			t.Errorf("%v refusals are counted, want %d", n, more)
		}
		underWay(r, most)
		release()
		for _, ended := range accepted[:most] {
			if err := <-ended; err != nil {
				t.Errorf("an accepted call: %v", err)
			}
		}
		r.empty()
	})
	t.Run("without", func(t *testing.T) {
		r, issue, release := start(t, admission.Limits{})
		var all [most + more]<-chan error
		for i := range all {
			all[i] = issue()
		}
		underWay(r, most+more) // nobody has an answer
		release()
		for _, ended := range all {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	})
}

func TestHealthChecksAreBoundedApart(t *testing.T) {
	r := newRig(t, rigOptions{limits: admission.Limits{Calls: 1, Connections: 3}})
	conn := r.dial(nil)
	health := healthpb.NewHealthClient(conn)
	for range 3 {
		stream, err := health.Watch(t.Context(), &healthpb.HealthCheckRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{})
	wantThrottled(t, err, "CALLER_THROTTLED", 500*time.Millisecond, 1500*time.Millisecond)
	if err := whoami(t.Context(), pb.NewTokenBrokerClient(conn)); err != nil {
		t.Errorf("a call: %v", err)
	}
}

func TestLimitsChangeUnderARunningServer(t *testing.T) {
	m := newMesh(t, admission.Limits{Calls: 1})
	m.fault(sandbox.Fault{Hang: true, Times: -1})
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	if err := m.hold(ctx, m.tokens("a")); err != nil {
		t.Fatal(err)
	}
	b := m.tokens("b")
	wantThrottled(t, whoami(t.Context(), b), "CALLER_THROTTLED", 500*time.Millisecond, 1500*time.Millisecond)
	m.service.SetLimits(admission.Limits{CallerRate: 1})
	for i := range 3 {
		if err := whoami(t.Context(), b); (err == nil) != (i < 2) {
			t.Errorf("call %d at one a second: %v", i, err)
		}
	}
	m.service.SetLimits(admission.Limits{CallerRate: 1000, CallerCalls: 1})
	eventually(t, "b is let in", func() bool { return whoami(t.Context(), b) == nil })
	eventually(t, "a's call is known to be its", func() bool { return whoami(t.Context(), m.tokens("a")) != nil })
	wantThrottled(t, whoami(t.Context(), m.tokens("a")), "CALLER_THROTTLED", 500*time.Millisecond, 1500*time.Millisecond)
	m.service.SetLimits(admission.Limits{Connections: 1})
	err := whoami(within(t, 20*time.Second), m.tokens("c"))
	if status.Code(err) != codes.Unavailable {
		t.Errorf("a connection beyond the limit: %v", err)
	}
}

// Calls that never come to their handlers are not counted for good, however
// they end.
func TestCountOfCallsIsExact(t *testing.T) {
	const issue = pb.TokenBroker_IssueToken_FullMethodName
	r := newRig(t, rigOptions{limits: admission.Limits{Calls: 20, ConnectionStreams: 1000}})
	dial := func() *testh2.Conn {
		c, err := testh2.Dial(r.address, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	ends := map[string]func(){
		"taken back before the message": func() {
			c := dial()
			for range 50 {
				stream, err := c.Begin(issue)
				must(err)
				must(c.Framer.WriteRSTStream(stream, http2.ErrCodeCancel))
			}
			_, err := c.Await(mustSend(t, c, issue))
			must(err)
		},
		"a connection that breaks": func() {
			c := dial()
			for range 15 {
				_, err := c.Begin(issue)
				must(err)
			}
			_, err := c.Await(mustSend(t, c, issue)) // all of them have arrived
			must(err)
			c.Close()
		},
		"a deadline that has passed on arrival": func() {
			c := dial()
			for range 50 {
				stream, err := c.Begin(issue, hpack.HeaderField{Name: "grpc-timeout", Value: "1n"})
				must(err)
				a, err := c.Await(stream)
				if err != nil || a.Status != "4" {
					t.Errorf("a deadline that has passed: %+v, %v", a, err)
				}
			}
		},
		"a message that is too large": func() {
			c := dial()
			for range 50 {
				stream, err := c.Begin(issue)
				must(err)
				must(c.Framer.WriteData(stream, false, testh2.Prefixed(100<<20, []byte("x"))))
				a, err := c.Await(stream)
				if err != nil || a.Status != "8" {
					t.Errorf("100 MB: %+v, %v", a, err)
				}
			}
		},
		"a method that there is not": func() {
			c := dial()
			for range 50 {
				stream, err := c.Begin("/tokenbroker.v1.TokenBroker/Nothing")
				must(err)
				if a, err := c.Await(stream); err != nil || a.Status != "12" {
					t.Errorf("no such method: %+v, %v", a, err)
				}
			}
		},
		"no message at all": func() {
			c := dial()
			for range 50 {
				stream, err := c.Begin(issue)
				must(err)
				must(c.Framer.WriteData(stream, true, nil))
				if a, err := c.Await(stream); err != nil || a.Status == "" {
					t.Errorf("no message: %+v, %v", a, err)
				}
			}
		},
	}
	for name, end := range ends {
		t.Run(name, func(t *testing.T) {
			end()
			r.empty()
			// There is room for exactly as many as before.
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			conn := r.dial(nil)
			for i := range 20 {
				if _, err := open(ctx, conn); err != nil {
					t.Fatalf("stream %d of 20: %v", i, err)
				}
			}
			if _, err := open(ctx, conn); status.Code(err) != codes.ResourceExhausted {
				t.Errorf("stream 21 of 20: %v", err)
			}
			leave()
			r.empty()
		})
	}
}

// mustSend sends a whole call.
func mustSend(t *testing.T, c *testh2.Conn, method string) uint32 {
	t.Helper()
	stream, err := c.Begin(method)
	if err == nil {
		err = c.Send(stream, []byte("\n\binvoices"))
	}
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

// What one caller sends half of keeps nobody else out.
func TestHalfSentCallsOfOneCallerLeaveRoomForOthers(t *testing.T) {
	for name, settings := range map[string]func(mesh) *tls.Config{
		"a caller":              func(m mesh) *tls.Config { return m.tls("hostile") },
		"nobody":                func(m mesh) *tls.Config { return clientOf(m.authority, nil) },
		"a caller without name": func(m mesh) *tls.Config { return clientOf(m.authority, func(*x509.Certificate) {}) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMesh(t, admission.Limits{Calls: 4000, ConnectionStreams: 5000})
			m.settings.ClientAuth = tls.VerifyClientCertIfGiven // as where tokens will do
			c, err := testh2.Dial(m.address, settings(m))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			var last uint32
			for range 1001 {
				if last, err = c.Begin(pb.TokenBroker_IssueToken_FullMethodName); err != nil {
					t.Fatal(err)
				}
			}
			a, err := c.Await(last)
			if err != nil || a.Status != "8" || !strings.Contains(a.Message, "wait for their messages") {
				t.Errorf("call 1,001 without a message: %+v, %v", a, err)
			}
			if err := whoami(t.Context(), m.tokens("modest")); err != nil {
				t.Errorf("another caller: %v", err)
			}
		})
	}
}

func TestServersDeadline(t *testing.T) {
	r := newRig(t, rigOptions{limits: admission.Limits{Deadline: time.Second}})
	r.fault(sandbox.Fault{Delay: 3 * time.Second, Process: true})
	client := r.tokens()
	issue := func(ctx context.Context) (*pb.IssueTokenResponse, time.Duration, error) {
		began := time.Now()
		a, err := client.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"})
		return a, time.Since(began), err
	}
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, took, err := issue(short); status.Code(err) != codes.DeadlineExceeded || took > 900*time.Millisecond {
		t.Errorf("a caller's own deadline of 100 ms: %v after %s", err, took)
	}
	for name, ctx := range map[string]context.Context{"no deadline": t.Context(), "a minute": within(t, time.Minute)} {
		_, took, err := issue(ctx)
		if status.Code(err) != codes.DeadlineExceeded || ctx.Err() != nil || took < 900*time.Millisecond {
			t.Errorf("%s: %v after %s, want DEADLINE_EXCEEDED after 1 s", name, err, took)
		}
	}
	// The request to the endpoint went on without them.
	eventually(t, "the token is there", func() bool { _, _, err := issue(t.Context()); return err == nil })
	r.wantRequests(1)
	r.empty()
}

func TestMessagesThatDoNotCome(t *testing.T) {
	t.Parallel()
	r := newRig(t, rigOptions{limits: admission.Limits{Deadline: time.Second}})
	for name, begin := range map[string]func(*testh2.Conn) (uint32, error){
		"nothing":      func(c *testh2.Conn) (uint32, error) { return c.Begin(pb.TokenBroker_IssueToken_FullMethodName) },
		"half of it":   half(pb.TokenBroker_IssueToken_FullMethodName),
		"of a stream":  half(pb.TokenBroker_WatchToken_FullMethodName),
		"far deadline": half(pb.TokenBroker_IssueToken_FullMethodName, hpack.HeaderField{Name: "grpc-timeout", Value: "99999999H"}),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := testh2.Dial(r.address, nil)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			stream, err := begin(c)
			if err != nil {
				t.Fatal(err)
			}
			if a, err := c.Await(stream); err != nil || a.Status != "4" {
				t.Errorf("got %+v, %v, want DEADLINE_EXCEEDED", a, err)
			}
		})
	}
}

// half sends half a message.
func half(method string, more ...hpack.HeaderField) func(*testh2.Conn) (uint32, error) {
	return func(c *testh2.Conn) (uint32, error) {
		stream, err := c.Begin(method, more...)
		if err != nil {
			return 0, err
		}
		return stream, c.Framer.WriteData(stream, false, testh2.Prefixed(10, []byte("\n\bin")))
	}
}

func TestPings(t *testing.T) {
	t.Parallel()
	const interval = 200 * time.Millisecond
	r := newRig(t, rigOptions{limits: admission.Limits{PingInterval: interval}})
	dial := func(t *testing.T) *testh2.Conn {
		c, err := testh2.Dial(r.address, nil)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	t.Run("as often as allowed, without a stream", func(t *testing.T) {
		t.Parallel()
		c := dial(t)
		for range 8 {
			// An interval after the answer is more than that after the server
			// had the ping.
			if err := c.Ping(); err != nil {
				t.Fatal(err)
			}
			timer := time.NewTimer(interval + interval/10)
			<-timer.C
		}
		if a, err := c.Await(mustSend(t, c, pb.TokenBroker_WhoAmI_FullMethodName)); err != nil || a.Status == "" {
			t.Errorf("a call after the pings: %+v, %v", a, err)
		}
	})
	t.Run("too often", func(t *testing.T) {
		t.Parallel()
		c := dial(t)
		for range 5 {
			if err := c.Framer.WritePing(false, [8]byte{1}); err != nil {
				t.Fatal(err)
			}
		}
		if a, err := c.Await(0); err != nil || a.Away != http2.ErrCodeEnhanceYourCalm || a.Debug != "too_many_pings" {
			t.Errorf("got %+v, %v", a, err)
		}
	})
}

func TestConnectionAge(t *testing.T) {
	t.Parallel()
	r := newRig(t, rigOptions{limits: admission.Limits{ConnectionAge: time.Second, ConnectionAgeGrace: 10 * time.Second}})
	var dialed atomic.Int64
	conn, err := grpc.NewClient("passthrough:///"+r.address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDisableRetry(),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			dialed.Add(1)
			return (&net.Dialer{}).DialContext(ctx, "tcp", address)
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := pb.NewTokenBrokerClient(conn)
	stream, err := open(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	cut := make(chan time.Duration, 1)
	go func() {
		_, err := stream.Recv()
		if status.Code(err) != codes.Unavailable {
			t.Errorf("the stream ended with %v", err)
		}
		cut <- time.Since(began)
	}()
	for calls := 0; dialed.Load() < 4; calls++ {
		if err := whoami(within(t, 20*time.Second), client); err != nil {
			t.Fatalf("call %d, connection %d: %v", calls, dialed.Load(), err)
		}
		if time.Since(began) > 20*time.Second {
			t.Fatalf("%d connections in 20 s", dialed.Load())
		}
	}
	if took := <-cut; took < 10*time.Second {
		t.Errorf("a stream ended after %s, before age and grace", took)
	}
}

func TestConnections(t *testing.T) {
	m := newMesh(t, admission.Limits{Connections: 2})
	one, two := m.tokens("one"), m.tokens("two")
	for _, c := range []pb.TokenBrokerClient{one, two} {
		if err := whoami(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	if err := whoami(within(t, 20*time.Second), m.tokens("three")); status.Code(err) != codes.Unavailable {
		t.Errorf("a third connection: %v", err)
	}
	for _, c := range []pb.TokenBrokerClient{one, two} {
		if err := whoami(t.Context(), c); err != nil {
			t.Errorf("a connection that was open: %v", err)
		}
	}
	if open, refused := m.metric("connections", ""), m.metric("calls_refused_total", "connections"); open != 2 || refused < 1 {
		t.Errorf("%v connections are open, %v were refused", open, refused)
	}
}

// Who only connects, and does not prove to be anybody, keeps nobody out.
func TestStrangersMakeRoom(t *testing.T) {
	m := newMesh(t, admission.Limits{Connections: 5})
	for range 20 {
		c, err := net.Dial("tcp", m.address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	eventually(t, "the strangers have connected", func() bool { return m.metric("calls_refused_total", "connections") == 15 })
	for i := range 5 {
		if err := whoami(t.Context(), m.tokens(fmt.Sprint("caller-", i))); err != nil {
			t.Errorf("caller %d: %v", i, err)
		}
	}
}

func TestLargeHeadersAreRefused(t *testing.T) {
	r := newRig(t, rigOptions{limits: admission.Limits{HeaderSize: 2048}})
	for size, ok := range map[int]bool{1000: true, 4000: false} {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "x-large", strings.Repeat("x", size))
		if err := whoami(ctx, r.tokens()); (err == nil) != ok {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}

func TestStreamsPerConnection(t *testing.T) {
	r := newRig(t, rigOptions{limits: admission.Limits{ConnectionStreams: 2}})
	conn := r.dial(nil)
	client := pb.NewTokenBrokerClient(conn)
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	for range 2 {
		if _, err := open(ctx, conn); err != nil {
			t.Fatal(err)
		}
	}
	// More wait at the caller: this one until the others have left.
	third := make(chan error, 1)
	go func() { third <- whoami(within(t, 20*time.Second), client) }()
	if err := whoami(t.Context(), r.tokens()); err != nil {
		t.Errorf("on another connection: %v", err)
	}
	select {
	case err := <-third:
		t.Errorf("a third call on the connection: %v", err)
	default:
	}
	leave()
	if err := <-third; err != nil {
		t.Errorf("the third call: %v", err)
	}
}

func TestFloodIsNoFloodOfTheLog(t *testing.T) {
	m := newMesh(t, admission.Limits{CallerRate: 1})
	client := m.tokens("greedy")
	for range 200 {
		_ = whoami(t.Context(), client)
	}
	eventually(t, "the log has it", func() bool { return strings.Contains(m.log.String(), "a limit refuses calls") })
	for line := range strings.Lines(m.log.String()) {
		if strings.Contains(line, "CALLER_THROTTLED") && !strings.Contains(line, `"level":"DEBUG"`) {
			t.Fatalf("a line per call: %s", line)
		}
	}
	if n := strings.Count(m.log.String(), "a limit refuses calls"); n != 1 {
		t.Errorf("%d lines about the limit", n)
	}
}

// The process is made to look behind: calls are turned away, most but not all,
// and are let in again when it is not.
func TestOverload(t *testing.T) {
	r := newRig(t, rigOptions{wait: time.Nanosecond})
	// A median of a nanosecond is more than the scheduler's histogram sees of a
	// process at rest, and less than of one that has anything to do.
	var busy sync.WaitGroup
	stop := make(chan struct{})
	for range 4 * runtime.GOMAXPROCS(0) {
		busy.Go(func() {
			for n := 0.0; ; n++ {
				select {
				case <-stop:
					return
				default:
					for range 10_000 {
						n = math.Sqrt(n)
					}
				}
			}
		})
	}
	client, health := r.tokens(), healthpb.NewHealthClient(r.dial(nil))
	eventually(t, "calls are turned away", func() bool { return status.Code(whoami(t.Context(), client)) == codes.ResourceExhausted })
	eventually(t, "it is told why", func() bool {
		err := whoami(t.Context(), client)
		if err == nil {
			return false
		}
		wantThrottled(t, err, "CALLER_THROTTLED", 500*time.Millisecond, 1500*time.Millisecond)
		return true
	})
	if _, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
		t.Errorf("health: %v", err)
	}
	if n := r.metric("calls_refused_total", "overload"); n < 1 {
		t.Error("refusals are not counted")
	}
	close(stop)
	busy.Wait()
	r.empty()
}
