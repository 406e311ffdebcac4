package fleet_test

import (
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/fleet"
)

func TestRollingRestartUnderLoad(t *testing.T) {
	f := newFleet(t, options{})
	f.allow.requests = 2
	f.replicas[0].must(plain)
	f.replicas[0].must(personal)

	load := f.load(plain, personal)
	for _, r := range f.replicas {
		r.stop()
		r.start()
		// The new process has answered before the next one goes.
		r.must(plain)
		r.must(personal)
	}
	f.wantNoFailure(load())
}

// load lets a crowd ask each question again and again, as clients that retry
// UNAVAILABLE do, until the function that it returns is called for the answers.
func (f *harness) load(questions ...fleet.Question) (end func() []fleet.Answer) {
	f.t.Helper()
	var crowds []*crowd
	for _, q := range questions {
		crowds = append(crowds, f.gather(fleet.Crowd{
			Question: q, Callers: 30, Connections: 1, Again: true, Pause: 10 * time.Millisecond, Patience: 10 * time.Second,
		}))
	}
	for _, c := range crowds {
		c.begin()
	}
	return func() []fleet.Answer {
		f.t.Helper()
		var all []fleet.Answer
		for _, c := range crowds {
			all = append(all, c.end()...)
		}
		return all
	}
}

func (f *harness) wantNoFailure(answers []fleet.Answer) {
	f.t.Helper()
	failed, slowest := 0, time.Duration(0)
	for _, a := range answers {
		slowest = max(slowest, a.End.Sub(a.Begin))
		if !a.OK() {
			if failed++; failed <= 3 {
				f.t.Errorf("a call failed: %v", a)
			}
		}
	}
	f.t.Logf("%d calls, %d failed, the slowest took %v", len(answers), failed, slowest.Round(time.Millisecond))
	if len(answers) < 100 {
		f.t.Errorf("only %d calls say nothing", len(answers))
	}
}

// What a process has begun when it is asked to stop is not lost: a request that
// can be repeated is left to another replica, one that cannot is brought home.
func TestStopInMidFlight(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name     string
		question fleet.Question
		before   []fleet.Question
		requests int
	}{
		// The one that is given back and made again by another replica.
		{"plain", plain, nil, 2},
		{"one-time", personalSubset, []fleet.Question{personal}, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, options{replicas: 2})
			f.allow.requests = c.requests
			holder, other := f.replicas[0], f.replicas[1]
			for _, q := range c.before {
				holder.must(q)
			}
			inHand := make(chan struct{}, 2)
			release := make(chan struct{})
			f.endpoint.onRequest(func(r *request) {
				inHand <- struct{}{}
				if r.replica == holder.index {
					<-release
				}
			})
			asked := make(chan fleet.Answer, 1)
			go func() { asked <- holder.ask(c.question) }()
			receive(f, "a request arrives", inHand)
			holder.terminate()
			waiting := make(chan fleet.Answer, 1)
			go func() { waiting <- other.ask(c.question) }()
			if c.requests == 2 && len(c.before) == 0 {
				if a := receive(f, "the other replica answers", waiting); !a.OK() {
					t.Errorf("the other replica: %v", a)
				}
				close(release)
			} else {
				holder.process.Await("it shuts down", 10*time.Second, func() bool { return holder.logged("shutting down") })
				close(release)
				if a := receive(f, "the other replica answers", waiting); !a.OK() {
					t.Errorf("the other replica: %v", a)
				}
				if a := receive(f, "the replica that stops answers", asked); !a.OK() {
					t.Errorf("the caller of the replica that stops: %v", a)
				}
			}
			holder.awaitExit()
		})
	}
}
