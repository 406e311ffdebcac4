package service

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/audit"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/store"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

const panicSecret = "a-secret-that-a-panic-holds"

// cry is an error that tells a secret.
type cry struct{ secret string }

func (c cry) Error() string { return c.secret }

// panics are handlers that panic, once they may, with what value makes of a
// secret.
func panics(s *Service, value func(string) any) *grpc.ServiceDesc {
	enter := func(ctx context.Context, r *pb.IssueTokenRequest) error {
		if _, err := s.authorize(ctx, r.GetProfile(), access.Issue, nil); err != nil {
			return err
		}
		callFrom(ctx).outcome.tokenID = broker.NewSecret(panicSecret).ID()
		panic(value(panicSecret))
	}
	return &grpc.ServiceDesc{
		ServiceName: "tokenbroker.v1.Panics", HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(_ any, ctx context.Context, decode func(any) error, chain grpc.UnaryServerInterceptor) (any, error) {
			r := &pb.IssueTokenRequest{}
			if err := decode(r); err != nil {
				return nil, err
			}
			info := &grpc.UnaryServerInfo{FullMethod: "/tokenbroker.v1.Panics/Unary"}
			return chain(ctx, r, info, func(ctx context.Context, r any) (any, error) { return nil, enter(ctx, r.(*pb.IssueTokenRequest)) })
		}}},
		Streams: []grpc.StreamDesc{{StreamName: "Stream", ServerStreams: true, Handler: func(_ any, stream grpc.ServerStream) error {
			r := &pb.IssueTokenRequest{}
			if err := stream.RecvMsg(r); err != nil {
				return err
			}
			return enter(stream.Context(), r)
		}}},
	}
}

// A handler that panics takes nobody with it, tells the caller nothing, and
// leaves a stack in the log, a line in the audit log, and what it panicked with
// in neither.
func TestPanics(t *testing.T) {
	for name, value := range map[string]func(string) any{
		"a text":         func(s string) any { return s },
		"an error":       func(s string) any { return cry{s} },
		"a wrapped one":  func(s string) any { return fmt.Errorf("asking with %s: %w", s, cry{s}) },
		"a struct":       func(s string) any { return &struct{ Token string }{s} },
		"a secret":       func(s string) any { return broker.NewSecret(s) },
		"a grant":        func(s string) any { return &broker.Grant{AccessToken: broker.NewSecret(s)} },
		"a message":      func(s string) any { return &pb.Token{AccessToken: s} },
		"a runtime's":    func(s string) any { var none []string; return none[len(s)] },
		"a wrong type's": func(s string) any { var v any = cry{s}; return v.(fmt.Stringer) },
	} {
		t.Run(name, func(t *testing.T) {
			var log, lines lockedBuffer
			records, err := audit.Open(audit.Options{Stdout: &lines, Logger: slog.New(slog.DiscardHandler)})
			if err != nil {
				t.Fatal(err)
			}
			b := broker.New(store.NewMemory(), broker.Options{})
			defer b.Close()
			s, err := New(Options{
				Broker: b, Logger: slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
				Authorizer: access.NewAuthorizer(), Audit: records,
			})
			if err != nil {
				t.Fatal(err)
			}
			s.RegisterService(panics(s, value), nil)
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			served := make(chan error, 1)
			go func() { served <- s.Serve(ln) }()
			conn, err := grpc.NewClient("passthrough:///"+ln.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			request := &pb.IssueTokenRequest{Profile: "invoices"}
			unary := conn.Invoke(t.Context(), "/tokenbroker.v1.Panics/Unary", request, &pb.IssueTokenResponse{})
			stream, err := conn.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, "/tokenbroker.v1.Panics/Stream")
			if err != nil {
				t.Fatal(err)
			}
			if err := stream.SendMsg(request); err != nil {
				t.Fatal(err)
			}
			if err := stream.CloseSend(); err != nil {
				t.Fatal(err)
			}
			for _, err := range []error{unary, stream.RecvMsg(&pb.IssueTokenResponse{})} {
				if st := status.Convert(err); st.Code() != codes.Internal || strings.Contains(fmt.Sprintf("%+v %v", err, st.Proto()), panicSecret) {
					t.Errorf("the caller gets %v", err)
				}
			}
			s.Shutdown(t.Context())
			if err := <-served; err != nil {
				t.Fatal(err)
			}
			if err := records.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(log.String(), `"msg":"panic in a call"`); n != 2 || !strings.Contains(log.String(), "panic_test.go") || strings.Contains(log.String(), panicSecret) {
				t.Errorf("the log has %d panics:\n%s", n, log.String())
			}
			if n := strings.Count(lines.String(), `"decision":"allow","rule":"default","outcome":"INTERNAL","token_id":"`); n != 2 || strings.Contains(lines.String(), panicSecret) {
				t.Errorf("the audit log: %s", lines.String())
			}
		})
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
