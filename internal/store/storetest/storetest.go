// Package storetest holds every broker.Store to one contract: what the
// interface's comments promise, told as histories.
package storetest

import (
	"context"
	"fmt"
	"math"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Subject is a store under test.
type Subject struct {
	Store broker.Store
	// Advance lets time pass, as the store sees it.
	Advance func(time.Duration)
}

const (
	family = "family"
	lease  = 3 * time.Second
	hour   = time.Hour
)

// histories by what they show.
var histories = map[string]func(*history){
	"one lease at a time":                        oneLease,
	"a lease ends by itself":                     leaseEnds,
	"a lease is renewed by its owner only":       renewal,
	"a token is saved and found":                 saved,
	"a save is repeatable":                       savedTwice,
	"a late save under an overtaken lease":       staleSave,
	"a late save that nothing overtook":          lateSave,
	"a token that the server repeats":            repeatedToken,
	"generations never fall":                     generations,
	"back-off grows, and counts each lease once": backoff,
	"a success ends the failures":                successClears,
	"a rejection binds its credential":           rejection,
	"a rejection for ever":                       rejectedForever,
	"a lease given back":                         givenBack,
	"a failure under an overtaken lease":         staleFailure,
	"a reset forgets, also what is on its way":   reset,
	"a demand for life":                          demandedLife,
	"a demand for another token":                 reports,
	"reports of each replacement rest longer":    holdOff,
	"a failure leaves the living token in view":  refusedWithToken,
	"families do not touch":                      families,
	"changes are announced":                      changes,
	"looking takes no part":                      looking,
}

// Run runs the contract; within runs each history with an empty store.
func Run(t *testing.T, within func(t *testing.T, history func(t *testing.T, s Subject))) {
	for name, run := range histories {
		t.Run(name, func(t *testing.T) {
			within(t, func(t *testing.T, s Subject) { run(&history{t: t, Subject: s}) })
		})
	}
}

type history struct {
	t *testing.T
	Subject
}

func (h *history) ctx() context.Context { return h.t.Context() }

// acquire claims the family for owner, and wants that verdict.
func (h *history) acquire(owner string, d broker.Demand, want broker.Verdict) broker.Acquisition {
	h.t.Helper()
	return h.claim(broker.Claim{Family: family, Owner: owner, Length: lease, Credential: "secret", Demand: d}, want)
}

func (h *history) claim(c broker.Claim, want broker.Verdict) broker.Acquisition {
	h.t.Helper()
	a, err := h.Store.Acquire(h.ctx(), c)
	if err != nil {
		h.t.Fatalf("acquire by %s: %v", c.Owner, err)
	}
	if a.Verdict != want {
		h.t.Fatalf("acquire by %s: verdict %d, want %d", c.Owner, a.Verdict, want)
	}
	return a
}

// lease takes the lease for owner, whatever token there is.
func (h *history) lease(owner string) broker.Lease {
	h.t.Helper()
	a := h.acquire(owner, broker.Demand{NewerThan: math.MaxInt64}, broker.Granted)
	return broker.Lease{Family: family, Owner: owner, Fence: a.Fence, Length: lease}
}

func token(name string, lives time.Duration) broker.StoredToken {
	return broker.StoredToken{Access: broker.NewSecret(name), Type: "Bearer", Scopes: []string{"a", "b"}, Lifetime: lives, Remaining: lives}
}

// save stores a token under the lease, and wants it kept or not.
func (h *history) save(l broker.Lease, s broker.StoredToken, kept bool) broker.StoredToken {
	h.t.Helper()
	got, verdict, err := h.Store.Save(h.ctx(), l, broker.Result{Token: s})
	if err != nil || (verdict == broker.Saved) != kept {
		h.t.Fatalf("save by %s: verdict %d, error %v; want kept %t", l.Owner, verdict, err, kept)
	}
	return got
}

func (h *history) fail(l broker.Lease, f broker.Failure) broker.Failure {
	h.t.Helper()
	got, err := h.Store.Fail(h.ctx(), l, f)
	if err != nil {
		h.t.Fatalf("fail by %s: %v", l.Owner, err)
	}
	return got
}

func (h *history) renew(l broker.Lease, want bool) {
	h.t.Helper()
	if ok, err := h.Store.Renew(h.ctx(), l); err != nil || ok != want {
		h.t.Fatalf("renew by %s: %t, %v; want %t", l.Owner, ok, err, want)
	}
}

// about wants a duration within a second of another, for what calls take.
func (h *history) about(what string, got, want time.Duration) {
	h.t.Helper()
	if got < want-time.Second || got > want+time.Second {
		h.t.Errorf("%s: %v, want about %v", what, got, want)
	}
}

func transient(least time.Duration) broker.Failure {
	return broker.Failure{Kind: broker.Transient, Text: "down", Rest: least, Jitter: 1}
}

func oneLease(h *history) {
	first := h.acquire("p", broker.Demand{}, broker.Granted)
	busy := h.acquire("q", broker.Demand{}, broker.Busy)
	h.about("wait", busy.Wait, lease)
	if again := h.acquire("p", broker.Demand{}, broker.Granted); again.Fence != first.Fence {
		h.t.Errorf("the owner got fence %d, and %d before", again.Fence, first.Fence)
	}
}

func leaseEnds(h *history) {
	first := h.lease("p")
	h.Advance(lease + time.Millisecond)
	h.renew(first, false)
	if second := h.lease("q"); second.Fence <= first.Fence {
		h.t.Errorf("fence %d after %d", second.Fence, first.Fence)
	}
	h.renew(first, false)
}

func renewal(h *history) {
	l := h.lease("p")
	for range 5 {
		h.Advance(lease / 2)
		h.renew(l, true)
	}
	h.acquire("q", broker.Demand{}, broker.Busy)
	h.renew(broker.Lease{Family: family, Owner: "q", Fence: l.Fence, Length: lease}, false)
	h.renew(broker.Lease{Family: family, Owner: "p", Fence: l.Fence + 1, Length: lease}, false)
}

func saved(h *history) {
	kept := h.save(h.lease("p"), token("t1", hour), true)
	if kept.Generation <= 0 || kept.Lifetime != hour || kept.Access.Reveal() != "t1" {
		h.t.Errorf("kept %+v", kept)
	}
	h.about("remaining", kept.Remaining, hour)
	h.Advance(20 * time.Minute)
	a := h.acquire("q", broker.Demand{}, broker.Usable)
	if a.Token.Access.Reveal() != "t1" || a.Token.Type != "Bearer" || fmt.Sprint(a.Token.Scopes) != "[a b]" || a.Token.Generation != kept.Generation || a.Token.Lifetime != hour {
		h.t.Errorf("found %+v", a.Token)
	}
	h.about("remaining", a.Token.Remaining, 40*time.Minute)
	h.Advance(40 * time.Minute)
	h.acquire("q", broker.Demand{}, broker.Granted)
}

func savedTwice(h *history) {
	l := h.lease("p")
	first := h.save(l, token("t1", hour), true)
	if second := h.save(l, token("t1", hour), true); second.Generation != first.Generation {
		h.t.Errorf("generation %d, and %d before", second.Generation, first.Generation)
	}
	next := h.lease("q") // a repeated save does not end another's lease
	h.save(l, token("t1", hour), true)
	h.renew(next, true)
}

func staleSave(h *history) {
	late := h.lease("p")
	h.Advance(lease + time.Millisecond)
	h.save(h.lease("q"), token("t2", hour), true)
	h.save(late, token("t1", hour), false)
	if a := h.acquire("r", broker.Demand{}, broker.Usable); a.Token.Access.Reveal() != "t2" {
		h.t.Error("the late token displaced its successor")
	}
}

func lateSave(h *history) {
	late := h.lease("p")
	h.Advance(time.Minute)
	h.save(late, token("t1", hour), true)
	h.acquire("q", broker.Demand{}, broker.Usable)
}

func repeatedToken(h *history) {
	first := h.save(h.lease("p"), token("t1", hour), true)
	h.Advance(30 * time.Minute)
	again := h.save(h.lease("q"), token("t1", 30*time.Minute), true)
	if again.Generation != first.Generation || again.Lifetime != hour {
		h.t.Errorf("the same token became generation %d with life %v, was %d with %v", again.Generation, again.Lifetime, first.Generation, first.Lifetime)
	}
	h.lease("r") // the lease was ended
}

func generations(h *history) {
	g := broker.Generation(0)
	for i := range 5 {
		kept := h.save(h.lease("p"), token(fmt.Sprint("t", i), hour), true)
		if kept.Generation <= g {
			h.t.Fatalf("generation %d after %d", kept.Generation, g)
		}
		g = kept.Generation
	}
	// Whoever saw more than the store has the last word.
	a := h.claim(broker.Claim{Family: family, Owner: "q", Length: lease, Floor: g + 1_000_000, Demand: broker.Demand{NewerThan: g}}, broker.Granted)
	if a.Fence <= g+1_000_000 {
		h.t.Errorf("fence %d is not above the floor %d", a.Fence, g+1_000_000)
	}
}

func backoff(h *history) {
	for i, want := range []time.Duration{5, 10, 20, 40, 60, 60} {
		want *= time.Second
		l := h.lease("p")
		f := h.fail(l, transient(0))
		if f.Attempts != i+1 || f.Rest != want {
			h.t.Fatalf("failure %d: attempt %d rests %v, want %v", i+1, f.Attempts, f.Rest, want)
		}
		if again := h.fail(l, transient(0)); again.Attempts != f.Attempts {
			h.t.Fatalf("the repeated failure counted: attempt %d", again.Attempts)
		}
		h.Advance(want / 2)
		a := h.acquire("q", broker.Demand{}, broker.Refused)
		h.about("rest", a.Failure.Rest, want/2)
		h.about("age", a.Failure.Age, want/2)
		h.Advance(want/2 + time.Millisecond)
	}
	f := h.fail(h.lease("p"), transient(10*time.Minute))
	h.about("what the server asked for", f.Rest, 10*time.Minute)
}

func successClears(h *history) {
	h.fail(h.lease("p"), transient(0))
	h.Advance(6 * time.Second)
	h.save(h.lease("p"), token("t1", hour), true)
	if f := h.fail(h.lease("p"), transient(0)); f.Attempts != 1 {
		h.t.Errorf("attempt %d after a success", f.Attempts)
	}
}

func rejection(h *history) {
	f := h.fail(h.lease("p"), broker.Failure{Kind: broker.Rejection, Code: "invalid_client", Text: "no", Credential: "secret", Rest: 30 * time.Minute, Jitter: 1})
	h.about("rest", f.Rest, 30*time.Minute)
	a := h.acquire("q", broker.Demand{}, broker.Refused)
	if a.Failure.Code != "invalid_client" || a.Failure.Text != "no" || a.Failure.Credential != "secret" {
		h.t.Errorf("remembered %+v", a.Failure)
	}
	l := h.claim(broker.Claim{Family: family, Owner: "r", Length: lease, Credential: "new secret"}, broker.Granted)
	h.fail(broker.Lease{Family: family, Owner: "r", Fence: l.Fence, Length: lease}, broker.Failure{})
	h.acquire("q", broker.Demand{}, broker.Refused) // giving a lease back forgets nothing
	h.Advance(30*time.Minute + time.Second)
	h.acquire("q", broker.Demand{}, broker.Granted)
}

func rejectedForever(h *history) {
	h.fail(h.lease("p"), broker.Failure{Kind: broker.Rejection, Credential: "secret", Rest: broker.Forever, Jitter: 1})
	h.Advance(1000 * hour)
	if a := h.acquire("q", broker.Demand{}, broker.Refused); a.Failure.Rest != broker.Forever {
		h.t.Errorf("rests %v", a.Failure.Rest)
	}
}

func givenBack(h *history) {
	l := h.lease("p")
	if f := h.fail(l, broker.Failure{}); f.Kind != broker.NoFailure {
		h.t.Errorf("remembered %+v", f)
	}
	h.renew(l, false)
	h.lease("q")
}

func staleFailure(h *history) {
	late := h.lease("p")
	h.Advance(lease + time.Millisecond)
	next := h.lease("q")
	if f := h.fail(late, transient(0)); f.Kind != broker.NoFailure {
		h.t.Errorf("an overtaken lease's failure was remembered: %+v", f)
	}
	h.renew(next, true)
	h.save(next, token("t1", hour), true)
	h.fail(late, transient(0))
	h.acquire("r", broker.Demand{}, broker.Usable)
}

func reset(h *history) {
	h.fail(h.lease("p"), transient(0))
	under := broker.Failure{Kind: broker.Rejection, Credential: "secret", Rest: broker.Forever, Jitter: 1}
	if err := h.Store.Reset(h.ctx(), family); err != nil {
		h.t.Fatal(err)
	}
	l := h.lease("p")
	if err := h.Store.Reset(h.ctx(), family); err != nil {
		h.t.Fatal(err)
	}
	if f := h.fail(l, under); f.Kind != broker.NoFailure {
		h.t.Errorf("a failure from before the reset was remembered: %+v", f)
	}
	l = h.lease("q") // and the lease was ended
	if err := h.Store.Reset(h.ctx(), family); err != nil {
		h.t.Fatal(err)
	}
	h.save(l, token("t1", hour), true) // a token from before it is good
	h.acquire("r", broker.Demand{}, broker.Usable)
}

func demandedLife(h *history) {
	h.save(h.lease("p"), token("t1", hour), true)
	h.Advance(20 * time.Minute)
	h.acquire("q", broker.Demand{Lifetime: 39 * time.Minute}, broker.Usable)
	a := h.acquire("q", broker.Demand{Lifetime: hour - 30*time.Second}, broker.Short)
	if a.Token.Lifetime != hour {
		h.t.Errorf("full life %v", a.Token.Lifetime)
	}
	h.acquire("q", broker.Demand{Lifetime: 50 * time.Minute}, broker.Granted)
	h.Advance(40 * time.Minute)
	h.acquire("q", broker.Demand{Lifetime: hour}, broker.Granted) // nothing lives that would show the full life
}

func reports(h *history) {
	first := token("t1", hour)
	h.save(h.lease("p"), first, true)
	a := h.acquire("q", broker.Demand{Not: first.Access.ID()}, broker.TooSoon)
	h.about("hold-off", a.Wait, 10*time.Second)
	h.acquire("q", broker.Demand{}, broker.Usable)
	h.Advance(a.Wait + time.Millisecond)
	g := h.acquire("q", broker.Demand{Not: first.Access.ID()}, broker.Granted)
	h.save(broker.Lease{Family: family, Owner: "q", Fence: g.Fence, Length: lease}, token("t2", hour), true)
	h.acquire("r", broker.Demand{Not: first.Access.ID()}, broker.Usable)
}

func holdOff(h *history) {
	h.save(h.lease("p"), token("t0", hour), true)
	for i, want := range []time.Duration{10, 20, 40, 80, 160, 300, 300} {
		current := token(fmt.Sprint("t", i), hour).Access.ID()
		a := h.acquire("q", broker.Demand{Not: current}, broker.TooSoon)
		h.about(fmt.Sprintf("hold-off %d", i), a.Wait, want*time.Second)
		h.Advance(a.Wait + time.Millisecond)
		g := h.acquire("q", broker.Demand{Not: current}, broker.Granted)
		h.save(broker.Lease{Family: family, Owner: "q", Fence: g.Fence, Length: lease}, token(fmt.Sprint("t", i+1), hour), true)
	}
	// One that was good for a while starts again.
	h.Advance(10 * time.Minute)
	g := h.acquire("q", broker.Demand{Not: token("t7", hour).Access.ID()}, broker.Granted)
	h.save(broker.Lease{Family: family, Owner: "q", Fence: g.Fence, Length: lease}, token("t8", hour), true)
	a := h.acquire("q", broker.Demand{Not: token("t8", hour).Access.ID()}, broker.TooSoon)
	h.about("hold-off", a.Wait, 10*time.Second)
}

func refusedWithToken(h *history) {
	kept := h.save(h.lease("p"), token("t1", hour), true)
	l := h.claim(broker.Claim{Family: family, Owner: "p", Length: lease, Credential: "secret", Demand: broker.Demand{NewerThan: kept.Generation}}, broker.Granted)
	h.fail(broker.Lease{Family: family, Owner: "p", Fence: l.Fence, Length: lease}, transient(0))
	a := h.acquire("q", broker.Demand{NewerThan: kept.Generation}, broker.Refused)
	if a.Token == nil || a.Token.Access.Reveal() != "t1" {
		h.t.Error("the living token is out of view")
	}
	h.acquire("q", broker.Demand{}, broker.Usable)
}

func families(h *history) {
	h.lease("p")
	a := h.claim(broker.Claim{Family: "another", Owner: "q", Length: lease}, broker.Granted)
	h.fail(broker.Lease{Family: "another", Owner: "q", Fence: a.Fence, Length: lease}, transient(0))
	h.acquire("p", broker.Demand{}, broker.Granted)
}

func changes(h *history) {
	heard := make(chan broker.Change, 10)
	stop := h.Store.Subscribe(func(c broker.Change) { heard <- c })
	expect := func(what string, ok func(broker.Change) bool) {
		h.t.Helper()
		select {
		case c := <-heard:
			if c.Family != family || !ok(c) {
				h.t.Errorf("%s was announced as %+v", what, c)
			}
		case <-time.After(10 * time.Second):
			h.t.Errorf("%s was not announced", what)
		}
	}
	kept := h.save(h.lease("p"), token("t1", hour), true)
	expect("a save", func(c broker.Change) bool { return c.Generation == kept.Generation })
	h.fail(h.lease("p"), transient(0))
	expect("a failure", func(c broker.Change) bool { return !c.Reset })
	if err := h.Store.Reset(h.ctx(), family); err != nil {
		h.t.Fatal(err)
	}
	expect("a reset", func(c broker.Change) bool { return c.Reset })
	stop()
	h.fail(h.lease("p"), transient(0))
	select {
	case c := <-heard:
		h.t.Errorf("heard %+v after the end", c)
	default:
	}
}

func looking(h *history) {
	if r, err := h.Store.Look(h.ctx(), family, ""); err != nil || r.Token != nil || r.Failure != nil {
		h.t.Errorf("an empty family: %+v, %v", r, err)
	}
	h.save(h.lease("p"), token("t1", hour), true)
	l := h.lease("p")
	h.fail(l, transient(0))
	r, err := h.Store.Look(h.ctx(), family, "")
	if err != nil || r.Token == nil || r.Failure == nil || r.Token.Access.Reveal() != "t1" || r.Failure.Attempts != 1 {
		h.t.Errorf("%+v, %v", r, err)
	}
}
