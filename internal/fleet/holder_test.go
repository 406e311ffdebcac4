package fleet_test

import (
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/faultproxy"
	"github.com/tokenbroker/tokenbroker/internal/fleet"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// isScript fits the store's transitions.
var isScript = faultproxy.Named("evalsha", "eval")

// transition fits one of the store's transitions, told by an argument that only
// it has.
func transition(argument string) func(faultproxy.Command) bool {
	return func(c faultproxy.Command) bool { return isScript(c) && slices.Contains(c.Args[1:], argument) }
}

var (
	acquires = transition("credentials")
	intends  = transition("horizon")
	saves    = transition("spent")
)

// moment is when a holder meets its end.
type moment string

const (
	leased    moment = "with the lease" // and does not know that it has it
	intended  moment = "committed to the request"
	requested moment = "after the request was sent"
	answered  moment = "after the answer, before saving"
)

// strike has something happen to the holder at the moment, once.
func (f *harness) strike(holder *replica, m moment, what func()) {
	once := func(fits func(faultproxy.Command) bool) func(faultproxy.Command) bool {
		return faultproxy.Once(func(c faultproxy.Command) bool {
			if !fits(c) {
				return false
			}
			what()
			return true
		})
	}
	switch m {
	case leased:
		holder.redis.Set(faultproxy.Faults{CutReply: once(acquires)})
	case intended:
		holder.redis.Set(faultproxy.Faults{CutReply: once(intends)})
	case requested: // the endpoint will act on it
		var struck sync.Once
		f.endpoint.onRequest(func(r *request) {
			if r.replica == holder.index {
				struck.Do(what)
			}
		})
	case answered: // it has what nobody else has
		holder.redis.Set(faultproxy.Faults{CutRequest: once(saves)})
	}
}

// A replica that dies with the lease of a repeatable grant holds others up for
// the lease, and no longer; they only wait.
func TestHolderOfARepeatableGrantIsKilled(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		moment   moment
		requests int
	}{{leased, 1}, {requested, 2}, {answered, 2}} {
		t.Run(string(c.moment), func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, options{})
			holder := f.replicas[0]
			f.replicas[1].must(subset(invoices, "openid")) // so that Redis knows all scripts
			f.allow.requests = 1 + c.requests
			killed := make(chan time.Time, 1)
			f.strike(holder, c.moment, func() {
				holder.kill()
				killed <- time.Now()
			})
			go holder.ask(plain)
			at := receive(f, "the holder is killed", killed)
			for _, a := range f.askAll(plain, f.replicas[1:], 100) {
				if !a.OK() || a.End.Sub(at) > 3500*time.Millisecond {
					t.Errorf("%v after the holder was killed: %v", a.End.Sub(at), a)
				}
			}
		})
	}
}

// askAll has so many callers ask each of the replicas at the same time.
func (f *harness) askAll(q fleet.Question, replicas []*replica, callers int) []fleet.Answer {
	answers := make(chan fleet.Answer)
	for _, r := range replicas {
		for range callers {
			go func() { answers <- r.ask(q) }()
		}
	}
	all := make([]fleet.Answer, callers*len(replicas))
	for i := range all {
		all[i] = <-answers
	}
	return all
}

// The holder dies with a refresh token that is spent, or may be. With a server
// that has a grace, the refresh token is presented once more when nobody can be
// waiting for the answer any more, and the consent lives on.
func TestHolderOfAOneTimeGrantIsKilled(t *testing.T) {
	t.Parallel()
	const timeout, horizon = 2 * time.Second, 7 * time.Second
	for _, c := range []struct {
		moment        moment
		presentations int
		within        time.Duration
	}{
		{leased, 1, 3500 * time.Millisecond},
		{intended, 1, horizon + 2*time.Second},
		{requested, 2, horizon + 2*time.Second},
		{answered, 2, horizon + 2*time.Second},
	} {
		t.Run(string(c.moment), func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, options{
				profile: []string{"    timeout: " + timeout.String()}, operator: []string{"    rotation: {grace: 1m}"},
				world: func(o *sandbox.Options) { o.Clients[1].ReuseGrace = time.Minute },
			})
			f.allow.requests, f.allow.presentations = 2+c.presentations, c.presentations
			at := f.killPresenter(c.moment)
			for _, a := range f.askAll(personalSubset, f.replicas[1:], 20) {
				if !a.OK() || a.End.Sub(at) > c.within {
					t.Errorf("%v after the holder was killed: %v", a.End.Sub(at), a)
				}
			}
			if n := f.endpoint.Calls().Issued["password"]; n != 1 {
				t.Errorf("the password was used %d times, want 1: the consent was to live on", n)
			}
		})
	}
}

// Without a grace, presenting the refresh token once more may end the consent.
// So it is left alone while an access token of it lives, which is served; who
// wants another one is served by a new grant, which the password starts.
func TestHolderOfAStrictOneTimeGrantIsKilled(t *testing.T) {
	t.Parallel()
	for _, m := range []moment{intended, requested, answered} {
		t.Run(string(m), func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, options{profile: []string{"    timeout: 2s"}})
			f.allow.requests, f.allow.upTo = 4, true
			at := f.killPresenter(m)
			for _, a := range f.askAll(personal, f.replicas[1:], 20) {
				if !a.OK() {
					t.Errorf("the token that lives: %v", a)
				}
			}
			for _, a := range f.askAll(personalSubset, f.replicas[1:], 20) {
				if !a.OK() || a.End.Sub(at) > 9*time.Second {
					t.Errorf("%v after the holder was killed: %v", a.End.Sub(at), a)
				}
			}
			if n := f.endpoint.Calls().Issued["password"]; n != 2 {
				t.Errorf("the password was used %d times, want 2", n)
			}
		})
	}
}

// killPresenter kills the first replica at a moment of its first refresh, and
// returns when.
func (f *harness) killPresenter(m moment) time.Time {
	f.t.Helper()
	f.replicas[1].must(personal)
	f.replicas[2].must(subset(operator, "permissions")) // so that Redis knows all scripts
	holder := f.replicas[0]
	killed := make(chan time.Time, 1)
	f.strike(holder, m, func() {
		holder.kill()
		killed <- time.Now()
	})
	go holder.ask(personalSubset)
	return receive(f, "the holder is killed", killed)
}

// A replica that stands still in mid-call for three leases finds that another
// has done its work, and what it saves late changes nothing.
func TestHolderOfARepeatableGrantIsFrozen(t *testing.T) {
	t.Parallel()
	f := newFleet(t, options{})
	f.allow.requests = 2
	holder := f.replicas[0]
	frozen := make(chan struct{}, 1)
	f.strike(holder, requested, func() {
		holder.process.Pause()
		frozen <- struct{}{}
	})
	late := make(chan fleet.Answer, 1)
	go func() { late <- holder.askWithin(time.Minute, plain) }()
	receive(f, "the holder is frozen", frozen)
	since := time.Now()
	var token string
	for _, a := range f.askAll(plain, f.replicas[1:], 20) {
		if !a.OK() || a.End.Sub(since) > 4*time.Second {
			t.Errorf("%v after the holder froze: %v", a.End.Sub(since), a)
		}
		token = a.TokenID
	}
	time.Sleep(time.Until(since.Add(9 * time.Second)))
	holder.process.Continue()
	if a := receive(f, "the frozen replica answers", late); !a.OK() {
		t.Errorf("the caller of the frozen replica: %v", a)
	}
	for _, r := range f.replicas {
		f.await("the late save has changed nothing", 5*time.Second, func() bool { return r.must(plain).TokenID == token })
	}
}

// The same with a refresh token in the air: nobody else presents it, and the
// late save is accepted, because it is about the refresh token that the record
// still has.
func TestHolderOfAOneTimeGrantIsFrozen(t *testing.T) {
	t.Parallel()
	f := newFleet(t, options{profile: []string{"    timeout: 2s"}})
	f.allow.requests = 2
	holder := f.replicas[0]
	holder.must(personal)
	frozen := make(chan struct{}, 1)
	f.strike(holder, requested, func() {
		holder.process.Pause()
		frozen <- struct{}{}
	})
	late := make(chan fleet.Answer, 1)
	go func() { late <- holder.askWithin(time.Minute, personalSubset) }()
	receive(f, "the holder is frozen", frozen)
	time.Sleep(9 * time.Second) // three leases, and more than its horizon
	holder.process.Continue()
	a := receive(f, "the frozen replica answers", late)
	if !a.OK() {
		t.Fatalf("the caller of the frozen replica: %v", a)
	}
	for _, r := range f.replicas {
		if got := r.must(personalSubset); got.TokenID != a.TokenID {
			t.Errorf("another token than the one that was saved late: %v", got)
		}
	}
}
