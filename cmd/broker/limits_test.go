package main

import (
	"context"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// limited writes a config with these limits.
func (s *stage) limited(t *testing.T, limits string) string {
	t.Helper()
	return s.write("config.yaml", strings.Replace(read(t, s.config()), `server: {address: "127.0.0.1:0"`, `server: {address: "127.0.0.1:0", limits: {`+limits+`}`, 1))
}

func TestLimitsAreReloaded(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	if err := s.vantage.Fault(sandbox.Fault{Hang: true, Times: -1}); err != nil {
		t.Fatal(err)
	}
	p := start(t, s.limited(t, "calls: 1"))
	client := pb.NewTokenBrokerClient(p.dial())
	whoami := func() codes.Code {
		_, err := client.WhoAmI(t.Context(), &pb.WhoAmIRequest{})
		return status.Code(err)
	}
	// One call takes the only place, for as long as the endpoint hangs. Nobody
	// else asks before it has: one of two that arrive together is refused.
	ctx, leave := context.WithCancel(t.Context())
	var calling sync.WaitGroup
	calling.Go(func() { _, _ = client.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"}) })
	p.await("the call is under way", func() bool {
		_, page := p.get("/metrics")
		return strings.Contains(page, "token_broker_calls_in_flight 1\n")
	})
	if code := whoami(); code != codes.ResourceExhausted {
		t.Fatalf("a second call: %s", code)
	}
	s.limited(t, "calls: 2")
	p.await("the new limit is in force", func() bool { return whoami() == codes.OK })
	leave()
	calling.Wait()
	if _, page := p.get("/metrics"); !strings.Contains(page, `token_broker_calls_refused_total{limit="calls"} `) || strings.Contains(page, `token_broker_calls_refused_total{limit="calls"} 0`) {
		t.Error("the refusals are not counted")
	}
	for _, fixed := range []string{"connection_streams: 7", "connection_age: 10s", "connection_age_grace: 7s", "ping_interval: 7s", "header_size: 4096"} {
		s.limited(t, "calls: 2, "+fixed)
		field, _, _ := strings.Cut(fixed, ":")
		p.logged("server.limits." + field + " cannot change under a running server")
	}
}
