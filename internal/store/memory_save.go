package store

import (
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// save takes in what a call has obtained, unless something overtook it.
func (r *memRecord) save(l broker.Lease, s broker.Result, now time.Time) (broker.StoredToken, broker.SaveVerdict, *broker.Change) {
	if verdict := r.judge(l, s, now); verdict != broker.Saved {
		return broker.StoredToken{}, verdict, nil
	}
	id := s.Token.Access.ID()
	there := r.tokens[s.Slot].is(id) || r.gone(s.Slot, id, now)
	awaited := r.lease.is(l) || r.consent.presentedBy(l)
	var changed *broker.Change
	if awaited || !there || r.brings(s) { // else it is saved already
		changed = r.take(l, s, now)
	}
	if t := r.tokens[s.Slot]; t.is(id) {
		return *t.seen(now), broker.Saved, changed
	}
	// The token was dropped; the refresh token that came with it was not, and
	// must not be revoked.
	return broker.StoredToken{}, broker.Superseded, changed
}

// judge says what becomes of a result. A grant obtained anew is judged by its
// fence, one that spent a refresh token by lineage: lease or not, what came may
// be the only one that is still good.
func (r *memRecord) judge(l broker.Lease, s broker.Result, now time.Time) broker.SaveVerdict {
	t, id := r.tokens[s.Slot], s.Token.Access.ID()
	brings := r.brings(s)
	known := !s.Refresh.IsEmpty() && !brings
	switch {
	case t.is(id) && !brings:
		return broker.Saved
	case brings && r.buried(s.Refresh.ID(), now), l.Fence <= r.dropped && !s.Supersede:
		return broker.WasDropped
	case s.Supersede:
		if r.consent.from(s.Refresh) { // saved before, and refreshed since
			return broker.Superseded
		}
		return broker.Saved
	case s.Spent != "":
		if r.consent != nil && !r.consent.is(s.Spent) && !known {
			return broker.Superseded
		}
	case known && !r.lease.is(l): // saved before, and its access token dropped since
		return broker.Superseded
	case r.gone(s.Slot, id, now):
		return broker.WasDropped
	case r.fence > l.Fence:
		return broker.Stale
	}
	if t != nil && t.Generation > l.Fence && !brings && !r.lease.is(l) {
		return broker.Stale
	}
	return broker.Saved
}

// brings reports whether a refresh token came that the record does not have.
func (r *memRecord) brings(s broker.Result) bool {
	return !s.Refresh.IsEmpty() && !r.consent.is(s.Refresh.ID())
}

// take makes the result the record's.
func (r *memRecord) take(l broker.Lease, s broker.Result, now time.Time) *broker.Change {
	changed := &broker.Change{}
	if s.Supersede {
		l.Fence = r.next(now, l.Fence)
		changed.Dropped, changed.Reset = r.supersede(s, now), true
	}
	if r.lease.is(l) {
		r.lease = memLease{}
	}
	r.fence = max(r.fence, l.Fence)
	g := max(l.Fence, r.generation+1)
	switch {
	case r.brings(s):
		r.consent = r.consent.successor(s, g, now)
		r.generation = g
	case s.Spent != "" && r.consent.is(s.Spent):
		r.consent.proved(l.Fence, s.Rotates)
	}
	r.failure = nil
	if !r.gone(s.Slot, s.Token.Access.ID(), now) {
		r.put(s.Slot, s.Token, g, now)
	}
	changed.Generation, changed.Slots = r.generation, []string{s.Slot}
	if s.Supersede {
		changed.Slots = nil
	}
	return changed
}

// gone reports whether a token cannot be the slot's any more.
func (r *memRecord) gone(slot, id string, now time.Time) bool {
	return r.buried(id, now) || r.hasEnded(slot, now)
}

// put makes s the slot's token, under the generation unless it is there
// already: the server has repeated itself.
func (r *memRecord) put(slot string, s broker.StoredToken, g broker.Generation, now time.Time) {
	id, before := s.Access.ID(), r.tokens[slot]
	refused := before.nextRefused()
	if !before.is(id) {
		s.Generation, r.generation = g, g
		r.tokens[slot] = &memToken{StoredToken: s, id: id, ends: now.Add(s.Remaining), obtained: now, refused: refused}
		return
	}
	before.obtained, before.refused, before.early = now, refused, false
	if before.remaining(now) <= 0 { // the server's own newer word
		before.ends = now.Add(s.Remaining)
	}
}

// supersede takes the consent out of service that another one replaces, and the
// tokens that came of it. It returns their ids.
func (r *memRecord) supersede(s broker.Result, now time.Time) (dropped []string) {
	if r.consent != nil {
		r.bury(r.consent.origin, now.Add(memLate))
	}
	for slot, t := range r.tokens {
		if t.is(s.Token.Access.ID()) {
			continue
		}
		r.bury(t.id, t.ends.Add(memLate))
		delete(r.tokens, slot)
		dropped = append(dropped, t.id)
	}
	r.lease, r.consent = memLease{}, nil
	return dropped
}

// memLate is how long after it was sent a repeated transition may still
// arrive, and how far apart clocks may be.
const memLate = 10 * time.Minute

// restore takes in a token that was obtained without a lease, unless the slot
// has one that lives about as long.
func (r *memRecord) restore(slot string, s broker.StoredToken, now time.Time) *broker.Change {
	id, t := s.Access.ID(), r.tokens[slot]
	old := s.Generation != 0 && s.Generation <= r.dropped
	if old || s.Remaining <= 0 || r.gone(slot, id, now) || t.is(id) || t != nil && t.remaining(now) > s.Remaining*9/10 {
		return nil
	}
	r.put(slot, s, r.next(now, s.Generation), now)
	return &broker.Change{Generation: r.generation}
}
