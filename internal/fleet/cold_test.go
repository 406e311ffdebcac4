package fleet_test

import (
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/fleet"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// What callers ask for.
var (
	plain = fleet.Question{Profile: invoices}
	// personal is a family with a refresh token that can be used once. Its
	// first token takes the password, a token for other scopes the refresh
	// token.
	personal       = fleet.Question{Profile: operator}
	personalSubset = subset(operator, "openid")
)

// subset of a profile's scopes: a token of its own.
func subset(profile string, scopes ...string) fleet.Question {
	return fleet.Question{Profile: profile, Scopes: scopes}
}

// Asks a fleet that has no token for one, ten thousand times at once. The bound
// is on what the broker adds to the endpoint's answer. A busy machine adds to
// that: the same ten thousand calls, answered from memory, tell what the calls
// alone cost it just now, of which the answers are a good half. The best of three
// rounds counts, each for a token of its own.
func TestTenThousandCallersOverColdReplicasCostOneRequest(t *testing.T) {
	const bound = 250 * time.Millisecond
	f := newFleet(t, options{replicas: 5, logLevel: "info"})
	if err := f.endpoint.Fault(sandbox.Fault{Times: -1, Delay: 2 * time.Second}); err != nil {
		t.Fatal(err)
	}
	for _, scopes := range [][]string{nil, {"openid"}, {"permissions"}} {
		f.allow.requests++
		everybody := fleet.Crowd{Question: fleet.Question{Profile: invoices, Scopes: scopes}, Callers: 10_000, Connections: 9}
		_, last := f.burst(everybody)
		late := last.Sub(f.endpoint.lastAnswer())
		first, last := f.burst(everybody)
		quick := last.Sub(first)
		t.Logf("the slowest of 10,000 callers ended %v after the endpoint's answer; from memory all of them take %v", late, quick)
		if late <= max(bound, quick*3/4) {
			return
		}
	}
	t.Errorf("the slowest caller ended too late, want %v after the endpoint's answer", bound)
}

// burst has a crowd ask once, and returns when the first caller began and the
// last ended. None may fail.
func (f *harness) burst(c fleet.Crowd) (first, last time.Time) {
	f.t.Helper()
	crowd := f.gather(c)
	crowd.begin()
	answers := crowd.end()
	if len(answers) != c.Callers {
		f.t.Fatalf("%d answers, want %d", len(answers), c.Callers)
	}
	for _, a := range answers {
		if !a.OK() {
			f.t.Fatalf("a caller failed: %v", a)
		}
		if first.IsZero() || a.Begin.Before(first) {
			first = a.Begin
		}
		if a.End.After(last) {
			last = a.End
		}
	}
	return first, last
}

// Counts what Redis executes while nobody asks, and for as long while a crowd
// asks as fast as it can. What replicas do in the background is in both.
func TestAnswersFromMemoryCauseNoRedisCommand(t *testing.T) {
	const window = 4 * time.Second
	f := newFleet(t, options{logLevel: "info"})
	f.allow.requests = 2
	for _, r := range f.replicas {
		r.must(plain)
		r.must(personal)
	}
	executed := func(do func()) (all, scripts int) {
		before := f.redis.CommandStats()
		do()
		for name, n := range f.redis.CommandStats() {
			all += n - before[name]
			if name == "evalsha" || name == "eval" {
				scripts += n - before[name]
			}
		}
		return all, scripts
	}
	idle, idleScripts := executed(func() { time.Sleep(window) })

	plainly := f.gather(fleet.Crowd{Question: plain, Callers: 60, Connections: 2, Again: true})
	personally := f.gather(fleet.Crowd{Question: personal, Callers: 60, Connections: 2, Again: true})
	busy, busyScripts := executed(func() {
		plainly.begin()
		personally.begin()
		time.Sleep(window)
	})
	answers := append(plainly.end(), personally.end()...)
	for _, a := range answers {
		if !a.OK() || a.Source != "MEMORY" {
			t.Fatalf("not from memory: %v", a)
		}
	}
	t.Logf("Redis executed %d commands for nobody, %d for %d callers", idle, busy, len(answers))
	if len(answers) < 10_000 {
		t.Errorf("only %d calls in %v say nothing", len(answers), window)
	}
	// The sweep of a replica falls into one window or the other, and windows
	// are not equally long.
	if spare := 15 * len(f.replicas); busy > idle+spare || busyScripts > idleScripts+2*len(f.replicas) {
		t.Errorf("Redis executed %d commands and %d scripts, and %d and %d without callers", busy, busyScripts, idle, idleScripts)
	}
}
