package service

import (
	"context"
	"log/slog"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"
	"google.golang.org/protobuf/proto"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/audit"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/store"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// issuer answers at once.
type issuer struct{}

func (issuer) Issue(context.Context, broker.Request) (*broker.Grant, error) {
	return &broker.Grant{AccessToken: broker.NewSecret("eyJhbGciOiJSUzI1NiJ9.e30.c2lnbmF0dXJl"), TokenType: "Bearer", Lifetime: time.Hour}, nil
}

// called is a context as the server makes it for a caller on loopback.
func called(ctx context.Context) context.Context {
	return peer.NewContext(ctx, &peer.Peer{
		Addr:     &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1},
		AuthInfo: localInfo{caller: &access.Caller{Name: access.Anonymous, Proof: access.Loopback}},
	})
}

// newBench returns a service that writes an audit log if there is one.
func newBench(b testing.TB, log *audit.Log) *Service {
	b.Helper()
	br := broker.New(store.NewMemory(), broker.Options{})
	b.Cleanup(br.Close)
	br.Configure([]*broker.Profile{{
		Name: "invoices", Provider: "vantage", GrantType: broker.ClientCredentials, Scopes: []string{"a", "b"},
		Identity: "i", Credential: "c", Issuer: issuer{},
	}})
	authorizer := access.NewAuthorizer()
	s, err := New(Options{Broker: br, Logger: slog.New(slog.DiscardHandler), Authorizer: authorizer, Audit: log})
	if err != nil {
		b.Fatal(err)
	}
	policy, err := access.NewPolicy([]access.Rule{
		{Callers: []string{"spiffe://prod/ns/batch/*"}, Profiles: []string{"*"}, Allow: []string{"admin"}},
		{Callers: []string{access.Anonymous}, Profiles: []string{"inv*"}, Allow: []string{"issue", "refresh"}},
	})
	if err != nil {
		b.Fatal(err)
	}
	authorizer.Use(policy)
	return s
}

// headers are what grpc-go sends.
var headers = metadata.MD{
	":authority": {"127.0.0.1:7443"}, "content-type": {"application/grpc"}, "user-agent": {"grpc-go/1.85.0"}, "grpc-accept-encoding": {"gzip"},
}

// BenchmarkIssueToken is the handler from decoded request to response, without
// the network: validation, identity, policy, memory.
func BenchmarkIssueToken(b *testing.B) { benchmarkIssue(b, nil) }

// BenchmarkIssueTokenAudited is the same with an audit log.
func BenchmarkIssueTokenAudited(b *testing.B) {
	for name, refuse := range map[string]bool{"continue": false, "refuse": true} {
		null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		if err != nil {
			b.Fatal(err)
		}
		defer null.Close()
		log, err := audit.Open(audit.Options{Settings: audit.Settings{Refuse: refuse}, Stdout: null, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			b.Fatal(err)
		}
		b.Run(name, func(b *testing.B) { benchmarkIssue(b, log) })
		if err := log.Close(b.Context()); err != nil {
			b.Error(err)
		}
	}
}

// dated is a context with a deadline that ends nothing.
type dated struct {
	context.Context
	deadline time.Time
}

func (d dated) Deadline() (time.Time, bool) { return d.deadline, true }

func benchmarkIssue(b *testing.B, log *audit.Log) {
	s := newBench(b, log)
	// With a deadline, as callers should have one: grpc-go pays for its timer,
	// and the server needs none.
	var ctx context.Context = dated{called(b.Context()), time.Now().Add(50 * time.Second)}
	t := &tokenBroker{Service: s}
	handler := func(ctx context.Context, r any) (any, error) { return t.IssueToken(ctx, r.(*pb.IssueTokenRequest)) }
	info := &grpc.UnaryServerInfo{FullMethod: pb.TokenBroker_IssueToken_FullMethodName}
	issue := func(r *pb.IssueTokenRequest) (any, error) {
		ctx, err := s.arrive(ctx, &tap.Info{FullMethodName: info.FullMethod, Header: headers})
		if err != nil {
			return nil, err
		}
		return s.explain(ctx, r, info, func(ctx context.Context, r any) (any, error) {
			return s.admit(ctx, r, info, func(ctx context.Context, r any) (any, error) {
				return s.validate(ctx, r, info, handler)
			})
		})
	}
	for name, r := range map[string]*pb.IssueTokenRequest{
		"profile": {Profile: "invoices"},
		"subset":  {Profile: "invoices", Scopes: []string{"a"}},
	} {
		if _, err := issue(r); err != nil {
			b.Fatal(err)
		}
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for n := 0; b.Loop(); n++ {
				if n%(1<<12) == 0 { // the writer's share is off the clock, here
					b.StopTimer()
					for log.Stats().Buffered > 0 {
						time.Sleep(time.Millisecond)
					}
					b.StartTimer()
				}
				if _, err := issue(r); err != nil {
					b.Fatal(err)
				}
			}
		})
		b.Run(name+"/parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(p *testing.PB) {
				for n := 0; p.Next(); n++ {
					for n%256 == 0 && log.Stats().Buffered > 1<<13 { // as slow as the writer
						runtime.Gosched()
					}
					if _, err := issue(r); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}

// BenchmarkDeadline is what a call costs on arrival that has no deadline of its
// own: the server's, with its timer.
func BenchmarkDeadline(b *testing.B) {
	s := newBench(b, nil)
	info := &tap.Info{FullMethodName: pb.TokenBroker_IssueToken_FullMethodName, Header: headers}
	for name, with := range map[string]func(context.Context) (context.Context, context.CancelFunc){
		"caller's": func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, 50*time.Second)
		},
		"server's": context.WithCancel,
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				stream, end := with(called(context.Background()))
				ctx, err := s.arrive(stream, info)
				if err != nil {
					b.Fatal(err)
				}
				c := callFrom(ctx)
				c.begin()
				c.end()
				end()
			}
		})
	}
}

// BenchmarkMarshal is what any gRPC server pays for this response, to compare.
func BenchmarkMarshal(b *testing.B) {
	s := newBench(b, nil)
	ctx, _ := s.arrive(called(b.Context()), &tap.Info{Header: headers})
	if err := s.enter(ctx, pb.TokenBroker_IssueToken_FullMethodName); err != nil {
		b.Fatal(err)
	}
	r, err := (&tokenBroker{Service: s}).IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"})
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := proto.Marshal(r); err != nil {
			b.Fatal(err)
		}
	}
}
