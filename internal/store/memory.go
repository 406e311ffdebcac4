// Package store keeps what replicas share: who may talk to a token endpoint,
// and what came back.
//
// Memory serves a single process. Its transitions are those of the shared
// store, so that a broker behaves the same on both; storetest holds every store
// to them.
package store

import (
	"context"
	"sync"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Memory is a broker.Store for brokers within one process. Nothing in it
// survives the process, and there is nobody else to ask: a consent that it does
// not have is one that nobody gave.
//
// What the protocol says is in the methods of memRecord, one per transition.
// Each is a function of the record, its arguments and the time.
type Memory struct {
	mu       sync.Mutex
	families map[string]*memRecord
	tickets  map[string]*memTicket
	owners   map[string]memOwner
	// tidyAt is how many tokens with an owner there may be before those that are
	// over are looked for.
	tidyAt int
	// sweepAt is how many families there may be before those that hold
	// nothing any more are looked for.
	sweepAt int

	// subscribers are called without mu, in the order of the changes each
	// goroutine makes.
	subMu       sync.Mutex
	subscribers map[int]func(broker.Change)
	nextSub     int
}

// NewMemory returns an empty store.
func NewMemory() *Memory {
	return &Memory{
		families:    make(map[string]*memRecord),
		tickets:     make(map[string]*memTicket),
		owners:      make(map[string]memOwner),
		tidyAt:      memLeastSweep,
		sweepAt:     memLeastSweep,
		subscribers: make(map[int]func(broker.Change)),
	}
}

var _ broker.Store = (*Memory)(nil)

// Acquire implements broker.Store.
func (m *Memory) Acquire(_ context.Context, c broker.Claim) (a broker.Acquisition, err error) {
	m.apply(c.Family, func(r *memRecord, now time.Time) *broker.Change {
		a = r.acquire(c, now)
		return nil
	})
	return a, nil
}

// Renew implements broker.Store.
func (m *Memory) Renew(_ context.Context, l broker.Lease) (held bool, err error) {
	m.apply(l.Family, func(r *memRecord, now time.Time) *broker.Change {
		held = r.renew(l, now)
		return nil
	})
	return held, nil
}

// Intend implements broker.Store.
func (m *Memory) Intend(_ context.Context, l broker.Lease, p broker.Presentation) (v broker.IntendVerdict, err error) {
	m.apply(l.Family, func(r *memRecord, now time.Time) *broker.Change {
		v = r.intend(l, p, now)
		return nil
	})
	return v, nil
}

// Save implements broker.Store.
func (m *Memory) Save(_ context.Context, l broker.Lease, s broker.Result) (saved broker.StoredToken, v broker.SaveVerdict, err error) {
	m.apply(l.Family, func(r *memRecord, now time.Time) (c *broker.Change) {
		saved, v, c = r.save(l, s, now)
		return c
	})
	return saved, v, nil
}

// Fail implements broker.Store.
func (m *Memory) Fail(_ context.Context, l broker.Lease, f broker.Failure) (decided broker.Failure, err error) {
	m.apply(l.Family, func(r *memRecord, now time.Time) (c *broker.Change) {
		decided, c = r.fail(l, f, now)
		return c
	})
	return decided, nil
}

// Drop implements broker.Store.
func (m *Memory) Drop(_ context.Context, d broker.Drop) (dropped broker.Dropped, err error) {
	m.apply(d.Family, func(r *memRecord, now time.Time) (c *broker.Change) {
		dropped, c = r.drop(d, now)
		return c
	})
	return dropped, nil
}

// Confirm implements broker.Store.
func (m *Memory) Confirm(_ context.Context, family, id string) error {
	m.apply(family, func(r *memRecord, _ time.Time) *broker.Change {
		delete(r.toRevoke, id)
		return nil
	})
	return nil
}

// Reset implements broker.Store.
func (m *Memory) Reset(_ context.Context, family string) error {
	m.apply(family, func(r *memRecord, _ time.Time) *broker.Change { return r.reset() })
	return nil
}

// Look implements broker.Store.
func (m *Memory) Look(_ context.Context, family, slot string) (broker.Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r, ok := m.families[family]; ok {
		return r.look(slot, time.Now()), nil
	}
	return broker.Record{}, nil
}

// Restore implements broker.Store.
func (m *Memory) Restore(family, slot string, s broker.StoredToken) {
	m.apply(family, func(r *memRecord, now time.Time) *broker.Change { return r.restore(slot, s, now) })
}

// Subscribe implements broker.Store.
func (m *Memory) Subscribe(changed func(broker.Change)) (stop func()) {
	m.subMu.Lock()
	defer m.subMu.Unlock()
	id := m.nextSub
	m.nextSub++
	m.subscribers[id] = changed
	return func() {
		m.subMu.Lock()
		defer m.subMu.Unlock()
		delete(m.subscribers, id)
	}
}

// apply runs a transition of the family's record and announces the change that
// it returns, if any.
func (m *Memory) apply(family string, transition func(*memRecord, time.Time) *broker.Change) {
	c := m.locked(family, transition)
	if c == nil {
		return
	}
	c.Family = family
	m.subMu.Lock()
	defer m.subMu.Unlock()
	for _, changed := range m.subscribers {
		changed(*c)
	}
}

func (m *Memory) locked(family string, transition func(*memRecord, time.Time) *broker.Change) *broker.Change {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	r, ok := m.families[family]
	if !ok {
		if len(m.families) >= m.sweepAt {
			m.sweep(now)
		}
		r = newMemRecord()
		m.families[family] = r
	}
	return transition(r, now)
}

const memLeastSweep = 1024

// sweep forgets the families that hold nothing, and waits until there are twice
// as many before it looks again. m.mu is held.
func (m *Memory) sweep(now time.Time) {
	for family, r := range m.families {
		if r.empty(now) {
			delete(m.families, family)
		}
	}
	m.sweepAt = max(memLeastSweep, 2*len(m.families))
}
