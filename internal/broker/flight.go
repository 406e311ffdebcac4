package broker

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"sync/atomic"
	"time"
)

// flight obtains one token for everybody who waits for it. It is detached from
// its callers, and there is one per entry at a time.
type flight struct {
	profile *profile
	demand  Demand
	// ahead tells that nobody waits: the token at hand is still good.
	ahead bool
	// changed is signalled when the family changed in the store.
	changed chan struct{}

	// done is closed when the flight has ended; what follows is written
	// before that and only read after it.
	done   chan struct{}
	token  *Token
	source Source
	err    *Error
	// quiet is for how long the endpoint is best left alone although the
	// flight brought nothing new.
	quiet time.Duration

	// resets of the entry when the flight began.
	resets int
	// failing is since when the store has not answered this flight.
	failing time.Time
	// repeats are the tokens that came and were another's already.
	repeats int
}

// storeTimeout bounds one transition that must not be cut short by the
// flight's own end.
const storeTimeout = 500 * time.Millisecond

var (
	errLeaseLost = errors.New("the lease ended before the call did")
	errUnsaved   = errors.New("the latest grant is not saved yet")
	errClosing   = errors.New("shutting down")
	// errAgain sends a flight back to the store, which knows more by now.
	errAgain = errors.New("the record has changed")
)

// fly claims the family until there is a token, a verdict, or no time left.
func (f *flight) fly(e *entry, floor Generation) {
	defer func() {
		if f.token == nil && f.err == nil { // what came was dropped here
			f.err = revokedMeanwhile(f.profile.Profile)
		}
	}()
	ctx, cancel := context.WithTimeout(e.b.ctx, flightDeadline)
	defer cancel()
	f.awaitSecrets(ctx, e)
	claim := Claim{
		Family:      e.family,
		Slot:        e.slot,
		Owner:       newOwner(),
		Length:      e.b.lease,
		Floor:       floor,
		Credentials: e.credentials(f.profile),
		Demand:      f.demand,
		Consent:     f.profile.consentUse(),
	}
	line := time.NewTimer(lineDeadline)
	defer line.Stop()
	turn := turn{lane: f.laneOf(e)}
	defer turn.leave()
	for lost := 0; ; {
		if !f.awaitSave(ctx, e) {
			return
		}
		claim.Peek = !turn.try()
		start := time.Now()
		a, err := e.b.store.Acquire(ctx, claim)
		if ctx.Err() != nil && (err != nil || a.Verdict == Busy) {
			f.err = f.outOfTime(e)
			return
		}
		e.b.reach.observe(err)
		if err != nil {
			if f.withoutStore(ctx, e, err) {
				return
			}
			continue
		}
		f.failing = time.Time{}
		switch a.Verdict {
		case Usable:
			if f.token = e.adopt(*a.Token, start); f.token != nil {
				f.source = FromStore
				if claim.Consent != NoConsent {
					e.b.background(e.meetConsent)
				}
				return
			}
			e.dropAgain(ctx, a.Token.Access.ID())
			f.pause(ctx, storeRetry)
		case Granted:
			if a.Consent != nil {
				e.b.consents.note(e.family, a.Consent, start)
			}
			err := f.mint(ctx, e, claim.lease(a.Fence), a, start)
			if err == nil {
				return
			}
			claim.Owner = newOwner() // the old one's lease was given back, or is lost
			if errors.Is(err, errAgain) {
				f.pause(ctx, storeRetry)
				break
			}
			// The lease was lost: whoever has it now may have an answer. But a
			// store that grants leases and cannot keep them must not have us
			// ask the endpoint again and again.
			if lost++; lost == 2 && ctx.Err() == nil {
				f.err = f.leaseNotKept(e)
				return
			}
		case Refused:
			e.keep(a.Token, start)
			e.remember(f, *a.Failure)
			f.err = failureError(f.profile.Profile, *a.Failure, a.Failure.Rest)
			return
		case Short:
			e.keep(a.Token, start)
			f.err = lifetimeUnavailable(f.profile.Profile, f.demand, a.Token.Lifetime)
			return
		case TooSoon:
			e.keep(a.Token, start)
			f.err = tooSoon(f.profile.Profile, f.demand, a.Wait)
			return
		case Unauthorized:
			e.keep(a.Token, start)
			e.b.consents.note(e.family, a.Consent, start)
			f.err = authorizationNeeded(f.profile.Profile, consentGone(a.Consent, start))
			return
		case Ended:
			f.ended(e)
			return
		case Free:
			news := f.changed
			if claim.Consent != NoConsent { // which is about the others as well
				news = nil
			}
			if !turn.await(ctx, news, line.C) {
				f.err = waitedInVain(f.profile.Profile)
				return
			}
			if f.err = f.learnedInLine(e); f.err != nil {
				return
			}
		case Unknown:
			f.pause(ctx, a.Wait)
			claim.Asked = true
		case Busy, InDoubt:
			if claim.Consent == NoConsent { // another replica is at it
				turn.leave()
			}
			f.wait(ctx, min(pollInterval, a.Wait+rand.N(pollJitter)))
		}
		if ctx.Err() != nil {
			f.err = f.outOfTime(e)
			return
		}
	}
}

// awaitSave waits for the family's latest grant to be saved, if only this process
// has it: the store would answer with the refresh token that was spent. It
// reports whether it was saved within a lease.
func (f *flight) awaitSave(ctx context.Context, e *entry) bool {
	wait, cancel := context.WithTimeout(ctx, e.b.lease)
	defer cancel()
	switch err := e.b.unsaved.wait(wait, e.family); {
	case err == nil:
		return true
	case ctx.Err() != nil:
		f.err = f.outOfTime(e)
	default:
		f.err = storeUnavailable(f.profile.Profile, "requesting a token for", errUnsaved)
	}
	return false
}

// wait returns when the family changed, after d, or when ctx ends.
func (f *flight) wait(ctx context.Context, d time.Duration) { waitFor(ctx, f.changed, d) }

// pause returns after d, or when ctx ends.
func (f *flight) pause(ctx context.Context, d time.Duration) { waitFor(ctx, nil, d) }

func waitFor(ctx context.Context, changed <-chan struct{}, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-changed:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// storeRetry is how soon a store that failed is asked again.
const storeRetry = 100 * time.Millisecond

// withoutStore decides what an error of the store means: ask again (false), or
// the end of the flight. A grant that can be repeated goes on without the store
// once that is lost, or cannot be read; nothing else does.
func (f *flight) withoutStore(ctx context.Context, e *entry, err error) (ended bool) {
	p, unreadable := f.profile.Profile, errors.Is(err, ErrUnreadable)
	if f.failing.IsZero() {
		f.failing = time.Now()
	}
	// A part of the store may be gone while others answer.
	lost := time.Since(f.failing) >= e.b.lease || e.b.reach.lost(e.b.lease)
	switch {
	case !unreadable && !lost:
		f.pause(ctx, storeRetry+rand.N(storeRetry))
		if ctx.Err() == nil {
			return false
		}
		f.err = f.outOfTime(e)
	case unreadable && (!p.repeatable() || e.isJob()):
		f.err = unreadableRecord(p, err)
	case !p.repeatable() || p.Coordinated || f.ahead || e.isJob():
		f.err = storeUnavailable(p, "requesting a token for", err)
	default:
		f.mintAlone(ctx, e, unreadable)
	}
	return true
}

// leaseNotKept backs off, here only: the others may fare better.
func (f *flight) leaseNotKept(e *entry) *Error {
	failure := e.backOff(Failure{
		Kind: Transient, Jitter: between(0.8, 1.2),
		Text: "the store granted the lease and did not keep it while the token endpoint was asked",
	})
	e.remember(f, failure)
	e.b.log.Warn("token request given up twice: the store does not keep the lease", "profile", f.profile.Name, "next_attempt", restText(failure.Rest))
	err := storeUnavailable(f.profile.Profile, "requesting a token for", errLeaseLost)
	err.RetryAfter = failure.Rest
	return err
}

func (f *flight) outOfTime(e *entry) *Error {
	if e.b.ctx.Err() != nil {
		return shuttingDown(f.profile.Profile)
	}
	return &Error{
		Reason:     ReasonEndpointUnavailable,
		Text:       fmt.Sprintf("requesting a token for profile %s: no replica obtained one within %v; the token endpoint or the store is slow", f.profile.Name, flightDeadline),
		RetryAfter: backoffFirst,
	}
}

// thrice repeats a transition that must happen although ctx may have ended.
func thrice(ctx context.Context, transition func(context.Context) error) (err error) {
	for range 3 {
		if err = detached(ctx, transition); err == nil {
			break
		}
	}
	return err
}

// detached runs a transition that must happen although ctx may have ended.
func detached(ctx context.Context, transition func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeout)
	defer cancel()
	return transition(ctx)
}

const brokerFailed = "the broker itself failed; its log has the place"

// recovered logs a panic without its value: nobody knows what is in it.
func (b *Broker) recovered(profile string, value any) {
	b.log.Error("panic while requesting a token", "profile", profile, "type", fmt.Sprintf("%T", value), "stack", string(debug.Stack()))
}

// hold keeps the lease alive until release is called, and returns a context
// that ends before the lease can: each renewal counts from before it was sent.
// start is when the lease was asked for. A process or a machine that stood still
// finds that out a moment after it goes on; lasts tells at once whether the lease
// can still be relied on.
func (b *Broker) hold(ctx context.Context, profile string, lease Lease, start time.Time) (held context.Context, lasts func() bool, release func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	reliable := lease.Length - leaseMargin(lease.Length)
	var until atomic.Pointer[time.Time]
	rely := func(start time.Time) {
		end := start.Add(reliable)
		until.Store(&end)
	}
	rely(start)
	watchdog := time.AfterFunc(time.Until(start.Add(reliable)), func() { cancel(errLeaseLost) })
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if r := recover(); r != nil { // without renewals the lease cannot be relied on
				b.recovered(profile, r)
				cancel(errLeaseLost)
			}
		}()
		tick := time.NewTicker(lease.Length / 3)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			start := time.Now()
			call, cancelCall := context.WithTimeout(ctx, storeTimeout)
			ok, err := b.store.Renew(call, lease)
			cancelCall()
			switch {
			case err != nil: // the next tick tries again; the watchdog is the judge
			case !ok:
				cancel(errLeaseLost)
			case watchdog.Stop():
				rely(start)
				watchdog.Reset(time.Until(start.Add(reliable)))
			}
		}
	}()
	lasts = func() bool { return Until(time.Now(), *until.Load()) > 0 }
	return ctx, lasts, func() {
		watchdog.Stop()
		cancel(nil)
		<-done
	}
}
