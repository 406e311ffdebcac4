package store

import (
	"maps"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// drop takes a token, a job or the grant out of service. What it leaves are
// tombstones, and what the server has yet to revoke.
func (r *memRecord) drop(d broker.Drop, now time.Time) (broker.Dropped, *broker.Change) {
	r.prune(now)
	if _, again := r.operations[d.Operation]; !again {
		until := now.Add(d.Remember)
		r.operations[d.Operation] = until
		r.generation = r.next(now, d.Floor)
		switch {
		case d.Job != "":
			r.endJob(d, until, now)
		case d.Token != "":
			r.bury(d.Token, until)
			r.retireThose(func(_ string, t *memToken) bool { return t.is(d.Token) }, until, now)
		default:
			r.retireThose(func(string, *memToken) bool { return true }, until, now)
			r.end(until, now)
		}
	}
	var dropped broker.Dropped
	changed := &broker.Change{Generation: r.generation}
	for id, w := range r.toRevoke {
		switch {
		case d.Job != "" && !isOf(w.slot, d.Job), d.Job == "" && d.Token != "" && d.Token != id:
		case w.refresh:
			dropped.Refresh = w.secret
		default:
			dropped.Access = append(dropped.Access, w.secret)
			changed.Dropped = append(changed.Dropped, id)
		}
	}
	switch {
	case d.Job != "":
		changed.Slots = []string{} // whoever has a token hears of that
		if r.ended[d.Job].After(now) {
			changed.Ended = []string{d.Job}
		}
	case d.Token != "":
		changed.Dropped = []string{d.Token}
	}
	return dropped, changed
}

// retireThose takes tokens out of service.
func (r *memRecord) retireThose(those func(slot string, t *memToken) bool, until, now time.Time) {
	for slot, t := range r.tokens {
		if those(slot, t) {
			delete(r.tokens, slot)
			r.retire(t.Access, memToRevoke{slot: slot, since: now, until: until})
		}
	}
}

// endJob ends a job, or one token of it, unless it is another token than the one
// that is meant.
func (r *memRecord) endJob(d broker.Drop, until, now time.Time) {
	current := d.Token == ""
	for slot, t := range r.tokens {
		if isOf(slot, d.Job) {
			current = current || t.is(d.Token)
			if last := t.ends.Add(memLate); last.After(until) {
				until = last
			}
		}
	}
	if !current {
		return
	}
	r.retireThose(func(slot string, _ *memToken) bool { return isOf(slot, d.Job) }, until, now)
	if r.ended[d.Job].Before(until) {
		r.ended[d.Job] = until
	}
}

// end takes the refresh token and all that is under way out of service.
func (r *memRecord) end(until, now time.Time) {
	if r.consent != nil {
		r.bury(r.consent.origin, until)
		r.retire(r.consent.secret, memToRevoke{refresh: true, since: now, until: until})
	}
	r.consent, r.failure, r.lease = nil, nil, memLease{}
	r.dropped = r.generation
}

// retire buries a token and keeps it to be revoked.
func (r *memRecord) retire(s broker.Secret, w memToRevoke) {
	w.secret = s
	r.bury(s.ID(), w.until)
	r.toRevoke[s.ID()] = w
}

// bury makes sure that the token with this id does not come back.
func (r *memRecord) bury(id string, until time.Time) {
	if r.tombstones[id].Before(until) {
		r.tombstones[id] = until
	}
}

func (r *memRecord) buried(id string, now time.Time) bool { return r.tombstones[id].After(now) }

// prune forgets what has ended by itself by now.
func (r *memRecord) prune(now time.Time) {
	over := func(_ string, until time.Time) bool { return !until.After(now) }
	maps.DeleteFunc(r.tombstones, over)
	maps.DeleteFunc(r.ended, over)
	maps.DeleteFunc(r.tokens, func(slot string, t *memToken) bool {
		return slot != "" && t.ends.Add(memLate).Before(now)
	})
	maps.DeleteFunc(r.operations, over)
	maps.DeleteFunc(r.toRevoke, func(_ string, w memToRevoke) bool { return !w.until.After(now) })
}
