package fleet_test

import (
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/faultproxy"
	"github.com/tokenbroker/tokenbroker/internal/fleet"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// isScript fits the store's transitions.
var isScript = faultproxy.Named("evalsha", "eval")

// carriesToken fits the transitions that bring a sealed token: nothing else
// that is sent is so long, but for the text of a script itself.
func carriesToken(c faultproxy.Command) bool {
	if !isScript(c) {
		return false
	}
	for _, arg := range c.Args[1:] {
		if len(arg) > 300 {
			return true
		}
	}
	return false
}

// moment is when a holder meets its end.
type moment string

const (
	beforeRequest  moment = "before the request"
	whileRequested moment = "after the request was sent"
	beforeSave     moment = "after the answer, before saving"
)

// strike has something happen to the holder at the moment, once.
func (f *harness) strike(holder *replica, m moment, what func()) {
	switch m {
	case beforeRequest: // it holds the lease, and does not know
		holder.redis.Set(faultproxy.Faults{CutReply: faultproxy.Once(func(c faultproxy.Command) bool {
			if isScript(c) {
				what()
			}
			return isScript(c)
		})})
	case whileRequested: // the endpoint will act on it
		struck := false
		f.endpoint.onRequest(func(r *request) {
			if r.replica == holder.index && !struck {
				struck = true
				what()
			}
		})
	case beforeSave: // it has what nobody else has
		holder.redis.Set(faultproxy.Faults{CutRequest: faultproxy.Once(func(c faultproxy.Command) bool {
			if carriesToken(c) {
				what()
			}
			return carriesToken(c)
		})})
	}
}

// A replica that dies with the lease of a repeatable grant holds others up for
// the lease, and no longer; they only wait.
func TestHolderOfARepeatableGrantIsKilled(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		moment   moment
		requests int
	}{{beforeRequest, 1}, {whileRequested, 2}, {beforeSave, 2}} {
		t.Run(string(c.moment), func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, options{})
			holder := f.replicas[0]
			f.warmScripts()
			f.allow.requests += c.requests
			killed := make(chan time.Time, 1)
			f.strike(holder, c.moment, func() {
				holder.kill()
				killed <- time.Now()
			})
			go holder.ask(plain)
			at := <-killed
			for _, a := range f.askAll(plain, f.replicas[1:], 100) {
				if !a.OK() || a.End.Sub(at) > 3500*time.Millisecond {
					t.Errorf("%v after the holder was killed: %v", a.End.Sub(at), a)
				}
			}
		})
	}
}

// warmScripts has Redis know all scripts, so that a script that fits a fault is
// one that is executed.
func (f *harness) warmScripts() {
	f.t.Helper()
	f.allow.requests++
	f.replicas[len(f.replicas)-1].must(fleet.Question{Profile: invoices, Scopes: []string{"openid"}})
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

// The holder dies with a refresh token that is spent, or may be. Its horizon is
// waited for; then, with a server that has a grace, the refresh token is
// presented once more and the consent lives on.
func TestHolderOfAOneTimeGrantIsKilled(t *testing.T) {
	t.Parallel()
	const timeout, horizon = 2 * time.Second, 7 * time.Second
	for _, c := range []struct {
		moment        moment
		presentations int
		within        time.Duration
	}{
		{beforeRequest, 1, 3500 * time.Millisecond},
		{whileRequested, 2, horizon + 2*time.Second},
		{beforeSave, 2, horizon + 2*time.Second},
	} {
		t.Run(string(c.moment), func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, options{
				profile: []string{"    timeout: " + timeout.String()},
				world:   func(o *sandbox.Options) { o.Clients[1].ReuseGrace = time.Minute },
			})
			holder := f.replicas[0]
			f.warmScripts()
			f.replicas[1].must(personal)
			f.replicas[2].must(personal)
			f.allow.requests += 1 + c.presentations
			f.allow.presentations = c.presentations
			killed := make(chan time.Time, 1)
			f.strike(holder, c.moment, func() {
				holder.kill()
				killed <- time.Now()
			})
			go holder.ask(personalSubset)
			at := <-killed
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

// A replica that stands still in mid-call for three leases finds that another
// has done its work, and what it saves late changes nothing.
func TestHolderOfARepeatableGrantIsFrozen(t *testing.T) {
	t.Parallel()
	f := newFleet(t, options{})
	f.allow.requests = 2
	holder := f.replicas[0]
	frozen := make(chan struct{}, 1)
	f.strike(holder, whileRequested, func() {
		holder.process.Pause()
		frozen <- struct{}{}
	})
	late := make(chan fleet.Answer, 1)
	go func() { late <- holder.askWithin(time.Minute, plain) }()
	<-frozen
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
	if a := <-late; !a.OK() {
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
	f.strike(holder, whileRequested, func() {
		holder.process.Pause()
		frozen <- struct{}{}
	})
	late := make(chan fleet.Answer, 1)
	go func() { late <- holder.askWithin(time.Minute, personalSubset) }()
	<-frozen
	time.Sleep(9 * time.Second) // three leases, and more than its horizon
	holder.process.Continue()
	a := <-late
	if !a.OK() {
		t.Fatalf("the caller of the frozen replica: %v", a)
	}
	for _, r := range f.replicas {
		if got := r.must(personalSubset); got.TokenID != a.TokenID {
			t.Errorf("another token than the one that was saved late: %v", got)
		}
	}
}
