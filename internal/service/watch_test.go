package service_test

import (
	"context"
	"crypto/tls"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/admission"
	"github.com/tokenbroker/tokenbroker/internal/audit"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/testh2"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

type watchStream = grpc.ServerStreamingClient[pb.WatchTokenResponse]

// watch opens a stream.
func (r *rig) watch(client pb.TokenBrokerClient, request *pb.WatchTokenRequest) watchStream {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	r.t.Cleanup(cancel)
	stream, err := client.WatchToken(ctx, request)
	if err != nil {
		r.t.Fatal(err)
	}
	return stream
}

// received takes one token.
func received(t testing.TB, stream watchStream) *pb.Token {
	t.Helper()
	m, err := stream.Recv()
	if err != nil {
		t.Fatalf("no token: %v", err)
	}
	if m.GetSource() == pb.Source_SOURCE_UNSPECIFIED || m.GetToken().GetAccessToken() == "" || !m.GetToken().GetExpireTime().AsTime().After(time.Now()) {
		t.Fatalf("the answer lacks something, or has ended: token %s of %v", m.GetToken().GetId(), m.GetSource())
	}
	return m.GetToken()
}

// revoke replaces the token, for those who watch it.
func (r *rig) revoke(client pb.TokenBrokerClient) {
	r.t.Helper()
	if _, err := client.RevokeToken(within(r.t.(*testing.T), 20*time.Second), &pb.RevokeTokenRequest{Profile: "invoices"}); err != nil {
		r.t.Fatal(err)
	}
}

func TestWatchTokenSendsTheCurrentTokenAndItsSuccessor(t *testing.T) {
	r := newRig(t, rigOptions{})
	client := r.tokens()
	issued, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
	if err != nil {
		t.Fatal(err)
	}
	streams := []watchStream{
		r.watch(client, &pb.WatchTokenRequest{Profile: "invoices"}),
		r.watch(client, &pb.WatchTokenRequest{Profile: "invoices", MinLifetime: durationpb.New(time.Hour), Job: &pb.Job{Id: "nightly"}}),
	}
	for _, stream := range streams {
		if got := received(t, stream); !proto.Equal(got, issued.GetToken()) {
			t.Errorf("the first is %s, want all that IssueToken says of %s", got.GetId(), issued.GetToken().GetId())
		}
	}
	r.revoke(client)
	second := received(t, streams[0])
	if other := received(t, streams[1]); second.GetId() == issued.GetToken().GetId() || other.GetId() != second.GetId() {
		t.Errorf("after %s came %s and %s", issued.GetToken().GetId(), second.GetId(), other.GetId())
	}
	r.wantRequests(2)
	for name, c := range map[string]struct {
		request *pb.WatchTokenRequest
		code    codes.Code
		reason  string
	}{
		"a floor that no token has": {&pb.WatchTokenRequest{Profile: "invoices", MinLifetime: durationpb.New(365 * 24 * time.Hour)}, codes.FailedPrecondition, "LIFETIME_UNAVAILABLE"},
		"a scope of another":        {&pb.WatchTokenRequest{Profile: "invoices", Scopes: []string{"other"}}, codes.InvalidArgument, "INVALID_REQUEST"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := r.watch(client, c.request).Recv()
			wantFailure(t, err, c.code, c.reason, "invoices")
		})
	}
	r.wantRequests(2)
}

func TestWatchTokenOfWhatCannotBeHad(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.fault(sandbox.Fault{Status: 503, Times: -1})
	_, err := r.watch(r.tokens(), &pb.WatchTokenRequest{Profile: "invoices"}).Recv()
	if d := wantFailure(t, err, codes.Unavailable, "ENDPOINT_UNAVAILABLE", "invoices"); d.retry.GetRetryDelay().AsDuration() <= 0 {
		t.Error("it does not say when to come back")
	}
	if got := r.metric("watch_streams", "invoices"); got != 0 {
		t.Errorf("%v streams are open", got)
	}
}

// A reader that is slow gets what its own window took, the one that was on its
// way, and then the latest; one that never reads is ended like others.
func TestSlowReaderGetsTheLatestToken(t *testing.T) {
	const window, replaced = 2000, 200
	r := newRig(t, rigOptions{})
	client := r.tokens()
	brisk := r.watch(client, &pb.WatchTokenRequest{Profile: "invoices"})
	first := received(t, brisk)
	slow, err := testh2.Dial(r.address, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	if err := slow.Framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: window}); err != nil {
		t.Fatal(err)
	}
	if err := slow.Ping(); err != nil { // the settings are in force
		t.Fatal(err)
	}
	request, err := proto.Marshal(&pb.WatchTokenRequest{Profile: "invoices"})
	if err != nil {
		t.Fatal(err)
	}
	open := func() uint32 {
		stream, err := slow.Begin(pb.TokenBroker_WatchToken_FullMethodName)
		if err != nil {
			t.Fatal(err)
		}
		if err := slow.Send(stream, request); err != nil {
			t.Fatal(err)
		}
		return stream
	}
	reads, never := open(), open()
	eventually(t, "the slow ones have their first token", func() bool { return r.metric("watch_tokens_sent_total", "invoices") >= 3 })
	latest := first
	for range replaced {
		r.revoke(client)
		latest = received(t, brisk)
	}
	sent := r.metric("watch_tokens_sent_total", "invoices") - (1 + replaced)
	size := 5 + proto.Size(&pb.WatchTokenResponse{Token: latest, Source: pb.Source_SOURCE_MEMORY})
	if most := float64(2 * (window/size + 1)); sent > most {
		t.Errorf("%v tokens of %d bytes were sent to two readers whose windows have %d, want %v at most", sent, size, window, most)
	}
	if err := slow.Framer.WriteWindowUpdate(reads, 1<<20); err != nil { // and now it reads
		t.Fatal(err)
	}
	got := readTokens(t, slow, reads, latest.GetId())
	if len(got) > window/size+2 {
		t.Errorf("the slow reader got %d tokens %v, want %d and the latest", len(got), got, window/size+1)
	}
	if got[0] != first.GetId() || len(slices.Compact(slices.Clone(got))) != len(got) {
		t.Errorf("the slow reader got %v", got)
	}
	r.access.Use(denyAll(t))
	eventually(t, "all streams have ended", func() bool { return r.metric("watch_streams", "invoices") == 0 && r.metric("calls_in_flight", "") == 0 })
	if err := slow.Framer.WriteWindowUpdate(never, 1<<20); err != nil {
		t.Fatal(err)
	}
	if a, err := slow.Await(never); err != nil || a.Status != "7" || strings.Contains(a.Message, "token") && !strings.Contains(a.Message, "may not watch") {
		t.Errorf("when it reads after all: %+v, %v", a, err)
	}
}

func denyAll(t *testing.T) *access.Policy {
	t.Helper()
	p, err := access.NewPolicy([]access.Rule{{Callers: []string{"dns:x"}, Profiles: []string{"*"}, Allow: []string{"watch"}}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// readTokens reads messages of a stream until one has that id.
func readTokens(t *testing.T, c *testh2.Conn, stream uint32, last string) (ids []string) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	var data []byte
	for len(ids) == 0 || ids[len(ids)-1] != last {
		frame, err := c.Framer.ReadFrame()
		if err != nil {
			t.Fatalf("after %v: %v", ids, err)
		}
		f, ok := frame.(*http2.DataFrame)
		if !ok || f.StreamID != stream {
			continue
		}
		data = append(data, f.Data()...)
		for len(data) >= 5 {
			size := 5 + int(data[3])<<8 + int(data[4]) // no token is that long
			if len(data) < size {
				break
			}
			var m pb.WatchTokenResponse
			if err := proto.Unmarshal(data[5:size], &m); err != nil {
				t.Fatal(err)
			}
			ids, data = append(ids, m.GetToken().GetId()), data[size:]
		}
	}
	return ids
}

// A client never sees its connection cut: it is told to come back, and does, and
// misses nothing.
func TestWatchOutlivesItsConnections(t *testing.T) {
	a := testca.New(t)
	settings := serverOf(a)
	for name, o := range map[string]rigOptions{
		"over loopback": {},
		"over TLS":      {tls: func() *tls.Config { return settings }, policy: allMayWatch},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o.limits = admission.Limits{ConnectionAge: 2 * time.Second, ConnectionAgeGrace: time.Second}
			r := newRig(t, o)
			var client *tls.Config
			if o.tls != nil {
				client = clientOf(a, testca.Named("worker.example.com"))
			}
			tokens := pb.NewTokenBrokerClient(r.dial(client))
			other := pb.NewTokenBrokerClient(r.dial(client))
			had := ""
			for range 3 {
				stream := r.watch(tokens, &pb.WatchTokenRequest{Profile: "invoices"})
				began := time.Now()
				if got := received(t, stream); had != "" && got.GetId() != had {
					t.Errorf("between two streams %s became %s", had, got.GetId())
				}
				r.revoke(other)
				had = received(t, stream).GetId()
				_, err := stream.Recv()
				d := wantFailure(t, err, codes.Unavailable, "SHUTTING_DOWN", "invoices")
				if wait := d.retry.GetRetryDelay().AsDuration(); wait <= 0 || wait > time.Second {
					t.Errorf("told to come back in %v", wait)
				}
				if lasted := time.Since(began); lasted < time.Second || lasted > 3*time.Second {
					t.Errorf("it lasted %v", lasted)
				}
			}
		})
	}
}

var allMayWatch = []access.Rule{{Callers: []string{"anonymous", "dns:*.example.com"}, Profiles: []string{"*"}, Allow: []string{"issue", "watch", "revoke"}}}

func TestShutdownSendsWatchersElsewhere(t *testing.T) {
	r := newRig(t, rigOptions{more: []string{"slow"}})
	client := r.tokens()
	var streams []watchStream
	for range 50 {
		stream := r.watch(client, &pb.WatchTokenRequest{Profile: "invoices"})
		received(t, stream)
		streams = append(streams, stream)
	}
	r.fault(sandbox.Fault{Hang: true, Times: -1})
	r.revoke(client) // so that they wait for a flight that does not land
	waiting := r.watch(client, &pb.WatchTokenRequest{Profile: "slow"})
	eventually(t, "all are under way", func() bool { return r.metric("calls_in_flight", "") == 51 })
	r.service.Drain()
	r.broker.Drain()
	_, err := waiting.Recv()
	wantFailure(t, err, codes.Unavailable, "SHUTTING_DOWN", "slow")
	limit, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	r.service.Shutdown(limit)
	if limit.Err() != nil {
		t.Error("watchers held the stop up to its limit")
	}
	var waits []time.Duration
	for _, stream := range streams {
		_, err := stream.Recv()
		d := wantFailure(t, err, codes.Unavailable, "SHUTTING_DOWN", "invoices")
		wait := d.retry.GetRetryDelay().AsDuration()
		if wait <= 0 || wait > time.Second {
			t.Errorf("told to come back in %v", wait)
		}
		waits = append(waits, wait)
	}
	slices.Sort(waits)
	if len(slices.Compact(waits)) < 10 {
		t.Errorf("50 clients come back at %v", waits)
	}
}

// Each token that a stream sends has its line; its end has one if it is a refusal.
func TestAuditOfAWatch(t *testing.T) {
	log := newAuditFile(t)
	r := newRig(t, rigOptions{audit: log.Log})
	client := r.tokens()
	request := &pb.WatchTokenRequest{Profile: "invoices", Job: &pb.Job{Id: "nightly"}}
	ctx, leave := context.WithCancel(within(t, time.Minute))
	stream, err := client.WatchToken(ctx, request)
	if err != nil {
		t.Fatal(err)
	}
	line := map[string]string{
		"method": "/tokenbroker.v1.TokenBroker/WatchToken", "caller": "anonymous", "profile": "invoices", "operation": "watch", "job": "nightly",
		"decision": "allow", "outcome": "ok", "token_id": received(t, stream).GetId(),
	}
	first := log.next(1)[0]
	if first["source"] != "endpoint" && first["source"] != "memory" { // whichever the stream saw first
		t.Errorf("it came from %v", first["source"])
	}
	wantEvent(t, first, line)
	r.revoke(client)
	line["token_id"] = received(t, stream).GetId()
	events := log.next(2) // the revocation's, too
	second := events[slices.IndexFunc(events, func(e map[string]any) bool { return e["operation"] == "watch" })]
	wantEvent(t, second, line)
	if first["request_id"] != second["request_id"] {
		t.Error("the lines of a stream have two request ids")
	}
	leave() // which is no decision
	eventually(t, "it has ended", func() bool { return r.metric("watch_streams", "invoices") == 0 })
	log.next(0)

	stream = r.watch(client, request)
	received(t, stream)
	log.next(1)
	r.access.Use(denyAll(t))
	_, err = stream.Recv()
	wantFailure(t, err, codes.PermissionDenied, "CALLER_DENIED", "invoices")
	wantEvent(t, log.next(1)[0], map[string]string{"decision": "deny", "outcome": "CALLER_DENIED", "token_id": "", "source": "", "operation": "watch"})
	if s := log.Stats(); s.Reserved != 0 {
		t.Errorf("%d places are kept", s.Reserved)
	}
}

// With refuse a stream sends nothing that has no line, and goes on once it can.
func TestWatchWithoutAudit(t *testing.T) {
	out := &disk{}
	log, err := audit.Open(audit.Options{Settings: audit.Settings{Refuse: true}, Stdout: out, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, rigOptions{audit: log, policy: []access.Rule{{Callers: []string{"anonymous"}, Profiles: []string{"invoices"}, Allow: []string{"issue", "watch"}}}})
	client := r.tokens()
	stream := r.watch(client, &pb.WatchTokenRequest{Profile: "invoices"})
	first := received(t, stream)
	eventually(t, "a stream that is silent holds no place", func() bool { return log.Stats().Reserved == 0 })
	out.full.Store(true)
	ctx := within(t, time.Minute)
	if _, err := client.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "payroll"}); err == nil { // a line to fail with
		t.Fatal("payroll is not allowed")
	}
	eventually(t, "that it fails is known", func() bool { return log.Ready() != nil })
	if err := r.broker.Reset(ctx, "invoices"); err != nil { // wakes it, for nothing
		t.Fatal(err)
	}
	if _, err := r.broker.Revoke(ctx, broker.Ask{Profile: "invoices"}, ""); err != nil {
		t.Fatal(err)
	}
	_, err = r.watch(client, &pb.WatchTokenRequest{Profile: "invoices"}).Recv() // which has none to go on with
	wantFailure(t, err, codes.Unavailable, "AUDIT_UNAVAILABLE", "")
	eventually(t, "there is a successor", func() bool { return r.vantage.Calls().Total == 2 })
	if sent := r.metric("watch_tokens_sent_total", "invoices"); sent != 1 {
		t.Errorf("%v tokens were sent", sent)
	}
	out.full.Store(false)
	if second := received(t, stream); second.GetId() == first.GetId() {
		t.Error("it got the same token again")
	}
	if err := log.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out.text.String(), `"outcome":"ok"`); n != 2 {
		t.Errorf("%d lines of tokens, want 2:\n%s", n, out.text.String())
	}
}

// While nothing happens a stream is one goroutine; when it has ended, nothing.
func TestStreamIsOneGoroutine(t *testing.T) {
	const streams = 200
	r := newRig(t, rigOptions{})
	client := r.tokens()
	received(t, r.watch(client, &pb.WatchTokenRequest{Profile: "invoices"}))
	ctx, leave := context.WithCancel(t.Context())
	ours := func() (n int) { // the client's are in this process, too
		all := make([]byte, 16<<20)
		for _, g := range strings.Split(string(all[:runtime.Stack(all, true)]), "\n\n") {
			if strings.Contains(g, "internal/service.") && !strings.Contains(g, "internal/service_test.") || strings.Contains(g, "grpc.(*Server).serveStreams") {
				n++
			}
		}
		return n
	}
	before := ours()
	for range streams {
		stream, err := client.WatchToken(ctx, &pb.WatchTokenRequest{Profile: "invoices"})
		if err != nil {
			t.Fatal(err)
		}
		received(t, stream)
	}
	if n := ours() - before; n != streams {
		t.Errorf("%d streams have %d goroutines", streams, n)
	}
	leave()
	eventually(t, "nothing is left of them", func() bool { return ours() == before })
}
