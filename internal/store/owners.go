package store

import (
	"context"
	"fmt"
	"time"
)

// Whose an access token is, where others must not have it, is in a Redis hash of
// its own, "tb1:owner:{ID}", which ends with the token:
//
//	owner   the family and the slot
//	ends    until when, in milliseconds of Redis time
func ownerKey(id string) string { return "tb1:owner:{" + id + "}" }

// Own implements broker.Store.
func (r *Redis) Own(ctx context.Context, id, owner string, life time.Duration) (string, error) {
	var answer reply
	raw, err := r.link.run(ctx, ownScript, ownerKey(id), r.offset.Load(), r.nonce(), "owner", owner, "life", life.Milliseconds())
	if err == nil {
		err = answer.parse(raw)
	}
	if err != nil {
		return "", r.explained(fmt.Errorf("noting whose token %s is: %w", id, err), id)
	}
	return answer.out["owner"], nil
}

// memOwner is whose a token is, until it ends.
type memOwner struct {
	owner string
	ends  time.Time
}

// Own implements broker.Store.
func (m *Memory) Own(_ context.Context, id, owner string, life time.Duration) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	if o, ok := m.owners[id]; ok && o.owner != owner && o.ends.After(now) {
		return o.owner, nil
	}
	if len(m.owners) >= m.tidyAt {
		for id, o := range m.owners {
			if !o.ends.After(now) {
				delete(m.owners, id)
			}
		}
		m.tidyAt = max(memLeastSweep, 2*len(m.owners))
	}
	if ends := now.Add(life); m.owners[id].owner != owner || m.owners[id].ends.Before(ends) {
		m.owners[id] = memOwner{owner, ends}
	}
	return owner, nil
}
