package store

import (
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// memRecord is one family.
type memRecord struct {
	// fence is the highest generation ever reserved for a lease.
	fence broker.Generation
	// generation of the last change of what is kept.
	generation broker.Generation
	// dropped is the generation of the last drop of the grant: what was under
	// way before it is dropped, too.
	dropped broker.Generation
	// failureFloor is raised by a reset: failures of older leases no longer
	// count.
	failureFloor broker.Generation

	lease memLease
	// tokens by slot.
	tokens  map[string]*memToken
	consent *memConsent
	failure *memFailure

	// tombstones are the ids of tokens that never come back, operations the
	// drops that have happened, each with the instant at which it may be
	// forgotten.
	tombstones, operations map[string]time.Time
	// ended are the jobs, and the slots of jobs, that have ended, with the same.
	ended map[string]time.Time
	// toRevoke by id.
	toRevoke map[string]memToRevoke
}

// memLease is the right of an owner to something, until it ends.
type memLease struct {
	owner string
	fence broker.Generation
	until time.Time
}

type memToken struct {
	broker.StoredToken
	id   string
	ends time.Time
	// obtained is when the server last returned it.
	obtained time.Time
	// refused counts the predecessors in a row that were reported early;
	// early tells that this one was, too.
	refused int
	early   bool
}

type memFailure struct {
	broker.Failure
	fence broker.Generation
	at    time.Time
	until time.Time // zero: never by itself
}

type memToRevoke struct {
	secret       broker.Secret
	slot         string
	refresh      bool
	since, until time.Time
}

func newMemRecord() *memRecord {
	return &memRecord{
		tokens:     make(map[string]*memToken),
		tombstones: make(map[string]time.Time),
		operations: make(map[string]time.Time),
		ended:      make(map[string]time.Time),
		toRevoke:   make(map[string]memToRevoke),
	}
}

// next is a generation above everything known, even if the clock went back.
func (r *memRecord) next(now time.Time, floor broker.Generation) broker.Generation {
	return max(broker.Generation(now.UnixMilli()), r.fence, r.generation, floor) + 1
}

// empty reports whether nothing is lost by forgetting the record.
func (r *memRecord) empty(now time.Time) bool {
	r.prune(now)
	for _, t := range r.tokens {
		if t.remaining(now) > 0 {
			return false
		}
	}
	f := r.failure.seen(now)
	return !r.lease.live(now) && (f == nil || f.Rest <= 0) && r.consent == nil &&
		len(r.tombstones)+len(r.operations)+len(r.ended)+len(r.toRevoke) == 0
}

// look is the record as of now.
func (r *memRecord) look(slot string, now time.Time) broker.Record {
	seen := broker.Record{Token: r.tokens[slot].seen(now), Failure: r.failure.seen(now), Consent: r.consent.seen(now), Ended: r.hasEnded(slot, now)}
	for _, w := range r.toRevoke {
		if w.until.After(now) {
			seen.ToRevoke = true
			seen.ToRevokeSince = max(seen.ToRevokeSince, now.Sub(w.since))
		}
	}
	return seen
}

// hasEnded reports whether the slot's job has ended, or that one token of it.
func (r *memRecord) hasEnded(slot string, now time.Time) bool {
	job := broker.JobOf(slot)
	return job != "" && (r.ended[job].After(now) || r.ended[slot].After(now))
}

func (l memLease) live(now time.Time) bool { return l.owner != "" && l.until.After(now) }

func (l memLease) is(other broker.Lease) bool {
	return l.owner == other.Owner && l.fence == other.Fence
}

func (t *memToken) is(id string) bool { return t != nil && t.id == id }

// seen returns the token with what it has left now.
func (t *memToken) seen(now time.Time) *broker.StoredToken {
	if t == nil {
		return nil
	}
	s := t.StoredToken
	s.Remaining = t.remaining(now)
	return &s
}

func (t *memToken) remaining(now time.Time) time.Duration { return broker.Until(now, t.ends) }

// nextRefused is the count for the token that replaces this one.
func (t *memToken) nextRefused() int {
	if t != nil && t.early {
		return t.refused + 1
	}
	return 0
}

// seen returns the failure with the rest it has now.
func (f *memFailure) seen(now time.Time) *broker.Failure {
	if f == nil {
		return nil
	}
	c := f.Failure
	c.Age = now.Sub(f.at)
	if f.Rest != broker.Forever {
		c.Rest = max(f.until.Sub(now), 0)
	}
	return &c
}
