package service_test

import (
	"crypto/tls"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/tokenbroker/tokenbroker/internal/admission"
	"github.com/tokenbroker/tokenbroker/internal/testca"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// BenchmarkCall is a whole call over mutual TLS on loopback, client included: on
// one connection, and with many calls at once.
func BenchmarkCall(b *testing.B) {
	a := testca.New(b)
	settings := serverOf(a)
	r := newRig(b, rigOptions{tls: func() *tls.Config { return settings }, policy: everyone, limits: admission.Limits{CallerRate: 1_000_000}})
	conn, err := grpc.NewClient("passthrough:///"+r.address, grpc.WithTransportCredentials(credentials.NewTLS(clientOf(a, testca.Named("caller")))))
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	client := pb.NewTokenBrokerClient(conn)
	call := func() {
		if _, err := client.IssueToken(b.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
			b.Error(err)
		}
	}
	call()
	b.Run("one", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			call()
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.SetParallelism(50)
		b.ReportAllocs()
		b.RunParallel(func(p *testing.PB) {
			for p.Next() {
				call()
			}
		})
	})
}
