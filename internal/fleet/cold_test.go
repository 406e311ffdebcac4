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
	personalSubset = fleet.Question{Profile: operator, Scopes: []string{"openid"}}
)

// Asks a fleet that has no token for one, ten thousand times at once. The bound
// is on what the broker and the network add to the endpoint's answer; a busy
// machine adds to it, too, so the best of three rounds counts, each for a token
// of its own.
func TestTenThousandCallersOverColdReplicasCostOneRequest(t *testing.T) {
	const bound = 250 * time.Millisecond
	f := newFleet(t, options{replicas: 5, logLevel: "info"})
	if err := f.endpoint.Fault(sandbox.Fault{Times: -1, Delay: 2 * time.Second}); err != nil {
		t.Fatal(err)
	}
	var late []time.Duration
	for _, scopes := range [][]string{nil, {"openid"}, {"permissions"}} {
		crowd := f.gather(fleet.Crowd{Question: fleet.Question{Profile: invoices, Scopes: scopes}, Callers: 10_000, Connections: 9})
		f.allow.requests++
		crowd.begin()
		answers := crowd.end()
		if len(answers) != 10_000 {
			t.Fatalf("%d answers", len(answers))
		}
		var last time.Time
		for _, a := range answers {
			if !a.OK() {
				t.Fatalf("a caller failed: %v", a)
			}
			if a.End.After(last) {
				last = a.End
			}
		}
		f.logSpread(answers)
		after := last.Sub(f.endpoint.lastAnswer())
		t.Logf("the slowest of 10,000 callers ended %v after the endpoint's answer", after)
		if after <= bound {
			return
		}
		late = append(late, after)
	}
	t.Errorf("the slowest callers ended %v after the endpoint's answer, want %v", late, bound)
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

// logSpread tells, of each replica, when its first and its last caller ended.
func (f *harness) logSpread(answers []fleet.Answer) {
	f.t.Helper()
	answered := f.endpoint.lastAnswer()
	for i := range f.replicas {
		var first, last time.Time
		source := map[string]int{}
		for _, a := range answers {
			if a.Replica != i {
				continue
			}
			source[a.Source]++
			if first.IsZero() || a.End.Before(first) {
				first = a.End
			}
			if a.End.After(last) {
				last = a.End
			}
		}
		f.t.Logf("replica %d: first %v, last %v after the answer, %v", i, first.Sub(answered), last.Sub(answered), source)
	}
}
