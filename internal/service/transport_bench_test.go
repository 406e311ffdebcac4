package service_test

import (
	"context"
	"crypto/tls"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/tokenbroker/tokenbroker/internal/admission"
	"github.com/tokenbroker/tokenbroker/internal/testca"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// echo is the least that any server does: it answers what it was told to.
type echo struct {
	pb.UnimplementedTokenBrokerServer
	answer *pb.IssueTokenResponse
}

func (e *echo) IssueToken(context.Context, *pb.IssueTokenRequest) (*pb.IssueTokenResponse, error) {
	return e.answer, nil
}

// bare serves the answer as the broker is served, and does nothing else. It
// returns its address.
func bare(b *testing.B, settings *tls.Config, answer *pb.IssueTokenResponse) string {
	b.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	s := grpc.NewServer(grpc.Creds(credentials.NewTLS(settings)), grpc.MaxConcurrentStreams(250), grpc.ReadBufferSize(8<<10), grpc.WriteBufferSize(8<<10))
	pb.RegisterTokenBrokerServer(s, &echo{answer: answer})
	served := make(chan error, 1)
	go func() { served <- s.Serve(ln) }()
	b.Cleanup(func() {
		s.Stop()
		if err := <-served; err != nil {
			b.Errorf("serving: %v", err)
		}
	})
	return ln.Addr().String()
}

// BenchmarkCall is a whole call over mutual TLS on loopback, client included, to
// the broker and to a server that does nothing but answer the same: on one
// connection, and with many calls at once. What lies between the two is what the
// broker costs.
func BenchmarkCall(b *testing.B) {
	a := testca.New(b)
	settings := serverOf(a)
	r := newRig(b, rigOptions{tls: func() *tls.Config { return settings }, policy: everyone, limits: admission.Limits{CallerRate: 1_000_000}})
	dial := func(address string) pb.TokenBrokerClient {
		conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(clientOf(a, testca.Named("caller")))))
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { conn.Close() })
		return pb.NewTokenBrokerClient(conn)
	}
	// With a deadline, as callers should have one.
	call := func(b *testing.B, c pb.TokenBrokerClient) *pb.IssueTokenResponse {
		ctx, cancel := context.WithTimeout(b.Context(), 10*time.Second)
		defer cancel()
		answer, err := c.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"})
		if err != nil {
			b.Error(err)
		}
		return answer
	}
	broker := dial(r.address)
	call(b, broker) // from the endpoint
	nothing := dial(bare(b, settings, call(b, broker)))
	call(b, nothing)
	for _, server := range []struct {
		name   string
		client pb.TokenBrokerClient
	}{{"bare", nothing}, {"broker", broker}} {
		b.Run(server.name+"/one", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				call(b, server.client)
			}
		})
		b.Run(server.name+"/parallel", func(b *testing.B) {
			b.SetParallelism(50)
			b.ReportAllocs()
			b.RunParallel(func(p *testing.PB) {
				for p.Next() {
					call(b, server.client)
				}
			})
		})
	}
}
