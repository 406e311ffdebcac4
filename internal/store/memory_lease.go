package store

import (
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// acquire answers a claim from the record if it can; else it takes the lease.
func (r *memRecord) acquire(c broker.Claim, now time.Time) broker.Acquisition {
	t := r.tokens[c.Slot]
	a := broker.Acquisition{Token: t.seen(now)}
	if r.hasEnded(c.Slot, now) {
		a.Verdict = broker.Ended
		return a
	}
	if t != nil && c.Demand.Meets(t.id, t.Generation, t.Lifetime, t.remaining(now)) {
		if r.lease.owner == c.Owner {
			r.lease = memLease{}
		}
		a.Verdict = broker.Usable
		return a
	}
	if r.lease.owner == c.Owner && r.lease.live(now) {
		r.lease.until = now.Add(c.Length)
		return r.granted(c, now)
	}
	if t != nil && c.Demand.Not == t.id {
		age := now.Sub(t.obtained)
		t.early = t.early || broker.ReportedEarly(age)
		if wait := broker.HoldOff(t.refused) - age; wait > 0 {
			a.Verdict, a.Wait = broker.TooSoon, wait
			return a
		}
	}
	switch {
	case t != nil && t.remaining(now) > 0 && c.Demand.TooLong(t.Lifetime):
		a.Verdict = broker.Short
	case r.binds(c, now):
		a.Verdict, a.Failure = broker.Refused, r.failure.seen(now)
	case r.lease.live(now):
		a.Verdict, a.Wait = broker.Busy, r.lease.until.Sub(now)
	case c.Consent != broker.NoConsent && r.consent.inDoubt(c.Owner, now):
		a.Verdict, a.Wait = broker.InDoubt, r.consent.intent.until.Sub(now)
	case c.Consent == broker.ConsentRequired && !r.consent.lives(now):
		a.Verdict = broker.Unauthorized
		if a.Consent = r.consent.seen(now); a.Consent != nil {
			a.Consent.RefreshToken, a.Consent.Account = broker.Secret{}, broker.Account{}
		}
	case c.Peek:
		a.Verdict = broker.Free
	default:
		r.fence = r.next(now, c.Floor)
		r.lease = memLease{owner: c.Owner, fence: r.fence, until: now.Add(c.Length)}
		return r.granted(c, now)
	}
	return a
}

// granted is the record inside the lease.
func (r *memRecord) granted(c broker.Claim, now time.Time) broker.Acquisition {
	a := broker.Acquisition{
		Verdict: broker.Granted, Fence: r.lease.fence,
		Token: r.tokens[c.Slot].seen(now), Failure: r.failure.seen(now),
	}
	if c.Consent != broker.NoConsent && r.consent.lives(now) {
		a.Consent = r.consent.seen(now)
	}
	return a
}

// binds reports whether the remembered failure stands in the claimant's way.
// That a refresh token is dead concerns only those who have nothing else.
func (r *memRecord) binds(c broker.Claim, now time.Time) bool {
	f := r.failure.seen(now)
	switch {
	case f == nil:
		return false
	case f.Kind == broker.Dead:
		return c.Consent == broker.ConsentRequired && r.consent.is(f.Credential)
	}
	return f.Binds(c.Credentials...)
}

// renew extends a lease that is still held: a later one or a drop has taken it
// away.
func (r *memRecord) renew(l broker.Lease, now time.Time) bool {
	if !r.lease.is(l) || !r.lease.live(now) {
		return false
	}
	r.lease.until = now.Add(l.Length)
	return true
}

// fail remembers what came of a call. Whoever has presented a refresh token may
// tell what came of that even when the lease is another's by now.
func (r *memRecord) fail(l broker.Lease, f broker.Failure, now time.Time) (broker.Failure, *broker.Change) {
	if r.failure != nil && r.failure.fence == l.Fence { // failed before
		return *r.failure.seen(now), nil
	}
	held, presented := r.lease.is(l), r.consent.presentedBy(l)
	if !held && !presented {
		return broker.Failure{}, nil
	}
	if held {
		r.lease = memLease{}
	}
	if presented {
		r.consent.ended(f.Outcome, now)
	}
	changed := &broker.Change{}
	overtaken := l.Fence <= r.failureFloor || r.failure != nil && r.failure.fence > l.Fence
	aboutAnother := f.Kind == broker.Dead && !r.consent.is(f.Credential)
	if f.Kind == broker.NoFailure || overtaken || aboutAnother {
		return broker.Failure{}, changed
	}
	f.Attempts = 1
	if r.failure != nil {
		f.Attempts = r.failure.Attempts + 1
	}
	if f.BacksOff() {
		f.Rest = broker.Backoff(f.Attempts, f.Rest, f.Jitter)
	}
	if f.Kind == broker.Dead {
		r.consent.dead = true
	}
	r.failure = &memFailure{Failure: f, fence: l.Fence, at: now}
	if f.Rest != broker.Forever {
		r.failure.until = now.Add(f.Rest)
	}
	return *r.failure.seen(now), changed
}

// reset forgets failures, those that are on their way included, and allows a
// refresh token in doubt to be presented once more.
func (r *memRecord) reset() *broker.Change {
	r.failure = nil
	r.failureFloor = r.fence
	if r.consent != nil {
		r.consent.dead, r.consent.presentations = false, 0
	}
	return &broker.Change{Reset: true}
}
