package fleet_test

import (
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/fleet"
)

// A wrong credential is presented once by the whole fleet: not once a replica,
// and not once more after Redis has forgotten.
func TestWrongCredentialIsTriedOnceByTheWholeFleet(t *testing.T) {
	f := newFleet(t, options{replicas: 5, idle: true, logLevel: "info"})
	for _, r := range f.replicas {
		r.write("invoices", "mistyped-secret")
		r.write("password", "mistyped-password")
	}
	f.startAll()
	f.allow.requests = 2
	for _, q := range []fleet.Question{plain, personal} {
		crowd := f.gather(fleet.Crowd{Question: q, Callers: 10_000, Connections: 9})
		crowd.begin()
		for _, a := range crowd.end() {
			if a.Reason != "CREDENTIALS_REJECTED" {
				t.Fatalf("%s: %v", q.Profile, a)
			}
		}
	}
	f.redis.Flush()
	for _, q := range []fleet.Question{plain, personal} {
		for _, a := range f.askAll(q, f.replicas, 10) {
			if a.Reason != "CREDENTIALS_REJECTED" {
				t.Errorf("%s, after a flush: %v", q.Profile, a)
			}
		}
	}
	// And not by a process that remembers nothing itself, once the others have
	// put back what they know.
	f.await("the refusals are known in Redis again", dropBound, func() bool { return f.recordsWith("e") >= 2 })
	r := f.replicas[0]
	r.stop()
	r.start()
	for _, q := range []fleet.Question{plain, personal} {
		if a := r.ask(q); a.Reason != "CREDENTIALS_REJECTED" {
			t.Errorf("%s, after a restart: %v", q.Profile, a)
		}
	}
	// One replica gets the right ones: that is enough for all.
	r.write("invoices", invoicesSecret)
	r.write("password", operatorPassword)
	f.allow.requests += 2
	for _, q := range []fleet.Question{plain, personal} {
		f.await("the right credential is used", 10*time.Second, func() bool { return r.ask(q).OK() })
		for _, other := range f.replicas[1:] {
			f.await("a replica with the wrong one serves what another obtained", dropBound, func() bool { return other.ask(q).OK() })
		}
	}
}

// A burst of reports that one token was refused costs one request.
func TestBurstOfReportsCostsOneRequest(t *testing.T) {
	t.Parallel()
	f := newFleet(t, options{replicas: 5, logLevel: "info"})
	f.allow.requests = 2
	first := f.replicas[0].must(plain)
	for _, r := range f.replicas {
		r.must(plain)
	}
	time.Sleep(time.Until(first.End.Add(10 * time.Second))) // reports of a token that is just there do not count
	reports := fleet.Question{Profile: invoices, Rejected: first.TokenID}
	crowd := f.gather(fleet.Crowd{Question: reports, Callers: 1000, Connections: 2})
	crowd.begin()
	tokens := map[string]int{}
	for _, a := range crowd.end() {
		if !a.OK() {
			t.Fatalf("a report failed: %v", a)
		}
		tokens[a.TokenID]++
	}
	if len(tokens) != 1 || tokens[first.TokenID] != 0 {
		t.Errorf("tokens after the report of %s: %v", first.TokenID, tokens)
	}
}
