package store

import (
	"maps"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// drop takes a token or the grant out of service. What it leaves are
// tombstones, and what the server has yet to revoke.
func (r *memRecord) drop(d broker.Drop, now time.Time) (broker.Dropped, *broker.Change) {
	r.prune(now)
	if _, again := r.operations[d.Operation]; !again {
		until := now.Add(d.Remember)
		r.operations[d.Operation] = until
		r.generation = r.next(now, d.Floor)
		if d.Token != "" {
			r.bury(d.Token, until)
		}
		for slot, t := range r.tokens {
			if d.Token == "" || t.is(d.Token) {
				delete(r.tokens, slot)
				r.retire(t.Access, memToRevoke{since: now, until: until})
			}
		}
		if d.Token == "" {
			r.end(until, now)
		}
	}
	var dropped broker.Dropped
	changed := &broker.Change{Generation: r.generation}
	for id, w := range r.toRevoke {
		switch {
		case d.Token != "" && d.Token != id:
		case w.refresh:
			dropped.Refresh = w.secret
		default:
			dropped.Access = append(dropped.Access, w.secret)
			changed.Dropped = append(changed.Dropped, id)
		}
	}
	if d.Token != "" {
		changed.Dropped = []string{d.Token}
	}
	return dropped, changed
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
	maps.DeleteFunc(r.operations, over)
	maps.DeleteFunc(r.toRevoke, func(_ string, w memToRevoke) bool { return !w.until.After(now) })
}
