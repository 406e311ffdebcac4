//go:build faults

package fleet_test

import (
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/fleet"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// Measures what docs/guarantees.md states of a fleet that nothing ails: five
// replicas, an endpoint that takes 200 ms, 10,000 callers at once that all find
// no token, again and again.
func TestGuaranteesOfAHealthyFleet(t *testing.T) {
	const rounds, endpointTakes = 20, 200 * time.Millisecond
	f := newFleet(t, options{replicas: 5, logLevel: "info"})
	f.allow.requests = 1 + rounds
	if err := f.endpoint.Fault(sandbox.Fault{Times: -1, Delay: endpointTakes}); err != nil {
		t.Fatal(err)
	}
	token := f.replicas[0].must(plain)
	for _, r := range f.replicas {
		r.must(plain)
	}
	var scripts []int
	var waited, late, heard, quick []time.Duration
	for range rounds {
		if err := f.replicas[0].revoke(plain, token.TokenID); err != nil {
			t.Fatalf("revoking: %v", err)
		}
		asked := f.endpoint.Calls().Total
		before := f.redis.CommandStats()
		crowd := f.gather(fleet.Crowd{Question: plain, Callers: 10_000, Connections: 9})
		crowd.begin()
		answers := crowd.end()
		after := f.redis.CommandStats()
		scripts = append(scripts, after["evalsha"]+after["eval"]-before["evalsha"]-before["eval"])
		if n := f.endpoint.Calls().Total - asked; n != 1 {
			t.Errorf("%d token requests for 10,000 callers", n)
		}
		var last time.Time
		for _, a := range answers {
			if !a.OK() || a.TokenID == token.TokenID {
				t.Fatalf("a caller got %v", a)
			}
			waited = append(waited, a.End.Sub(a.Begin)-endpointTakes)
			if a.End.After(last) {
				last = a.End
			}
		}
		late = append(late, last.Sub(f.endpoint.lastAnswer()))
		first, end := f.burst(fleet.Crowd{Question: plain, Callers: 10_000, Connections: 9})
		quick = append(quick, end.Sub(first))
		token = answers[0]
		heard = append(heard, f.hearOfARevocation()-endpointTakes)
	}
	t.Logf("token requests in each of %d rounds: 1", rounds)
	t.Logf("scripts that Redis ran in a round: median %d, most %d", quantile(scripts, .5), quantile(scripts, 1))
	t.Logf("callers waited longer than the endpoint took: median %v, p99 %v, most %v", quantile(waited, .5), quantile(waited, .99), quantile(waited, 1))
	t.Logf("the last caller ended after the endpoint's answer: median %v, most %v", quantile(late, .5), quantile(late, 1))
	t.Logf("the same callers answered from memory: median %v, most %v", quantile(quick, .5), quantile(quick, 1))
	t.Logf("a revocation is known to all replicas after: median %v, most %v", quantile(heard, .5), quantile(heard, 1))
}

// hearOfARevocation revokes a token that all replicas serve, of scopes that
// nobody else asks for, and returns how long until all have another one. That
// takes them a token request.
func (f *harness) hearOfARevocation() time.Duration {
	f.t.Helper()
	q := subset(invoices, "openid")
	f.allow.requests += 2
	var token fleet.Answer
	for _, r := range f.replicas {
		token = r.must(q)
	}
	began := time.Now()
	if err := f.replicas[0].revoke(q, token.TokenID); err != nil {
		f.t.Fatalf("revoking: %v", err)
	}
	for _, r := range f.replicas {
		for r.must(q).TokenID == token.TokenID {
			if time.Since(began) > dropBound {
				f.t.Fatalf("replica %d still serves the token", r.index)
			}
		}
	}
	took := time.Since(began)
	if err := f.replicas[0].revoke(q, f.replicas[0].must(q).TokenID); err != nil { // cold again
		f.t.Fatalf("revoking: %v", err)
	}
	return took
}
