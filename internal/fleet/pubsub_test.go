package fleet_test

import (
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/faultproxy"
	"github.com/tokenbroker/tokenbroker/internal/fleet"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// Events only make things faster. Without them those who wait for another
// replica's token look for themselves, and what was taken out of service is
// found by the sweep.
func TestDeadSubscriptions(t *testing.T) {
	t.Parallel()
	f := newFleet(t, options{})
	f.allow.requests = 2
	dead := faultproxy.Path{Swallow: true}
	for _, r := range f.replicas {
		r.redis.Set(faultproxy.Faults{On: faultproxy.SubscribedConnections, Requests: dead, Replies: dead})
	}
	if err := f.endpoint.Fault(sandbox.Fault{Delay: time.Second}); err != nil {
		t.Fatal(err)
	}
	var first fleet.Answer
	for _, a := range f.askAll(plain, f.replicas, 20) {
		if waited := a.End.Sub(f.endpoint.lastAnswer()); !a.OK() || waited > 1500*time.Millisecond {
			t.Errorf("%v after the endpoint's answer: %v", waited, a)
		}
		first = a
	}
	if err := f.replicas[0].revoke(plain, first.TokenID); err != nil {
		t.Fatalf("revoking: %v", err)
	}
	for _, r := range f.replicas {
		f.await("the token has left every memory", dropBound, func() bool { return r.must(plain).TokenID != first.TokenID })
	}
}

// Only messages are lost; the connection looks as it should.
func TestLostMessages(t *testing.T) {
	t.Parallel()
	f := newFleet(t, options{})
	f.allow.requests = 2
	first := f.replicas[0].must(plain)
	for _, r := range f.replicas {
		r.must(plain)
		r.redis.Set(faultproxy.Faults{DropMessages: true})
	}
	if err := f.replicas[0].revoke(plain, first.TokenID); err != nil {
		t.Fatalf("revoking: %v", err)
	}
	for _, r := range f.replicas {
		f.await("the token has left every memory", dropBound, func() bool { return r.must(plain).TokenID != first.TokenID })
	}
}
