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
// survives the process.
type Memory struct {
	mu       sync.Mutex
	families map[string]*record
	// sweepAt is how many families there may be before those that hold
	// nothing any more are looked for.
	sweepAt int

	// subscribers are called without mu, in the order of the changes each
	// goroutine makes.
	subMu       sync.Mutex
	subscribers map[int]func(broker.Change)
	nextSub     int
}

// record is one family.
type record struct {
	// lastFence is the highest generation ever reserved. It is never below
	// the token's generation.
	lastFence broker.Generation
	lease     lease
	token     *token
	failure   *failure
	// failureFloor is raised by a reset: failures of older leases no longer
	// count.
	failureFloor broker.Generation
}

type lease struct {
	owner string
	fence broker.Generation
	until time.Time
}

type token struct {
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

type failure struct {
	broker.Failure
	fence broker.Generation
	at    time.Time
	until time.Time // zero: never by itself
}

// NewMemory returns an empty store.
func NewMemory() *Memory {
	return &Memory{
		families:    make(map[string]*record),
		sweepAt:     leastSweep,
		subscribers: make(map[int]func(broker.Change)),
	}
}

var _ broker.Store = (*Memory)(nil)

// Acquire implements broker.Store.
func (m *Memory) Acquire(_ context.Context, c broker.Claim) (broker.Acquisition, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, now := m.record(c.Family), time.Now()

	t := r.token
	if t != nil && c.Demand.Meets(t.id, t.Generation, t.Lifetime, t.remaining(now)) {
		if r.lease.owner == c.Owner {
			r.lease = lease{}
		}
		return broker.Acquisition{Verdict: broker.Usable, Token: t.seen(now)}, nil
	}
	if r.lease.owner == c.Owner && r.lease.live(now) && r.lease.fence == r.lastFence {
		r.lease.until = now.Add(c.Length)
		return broker.Acquisition{Verdict: broker.Granted, Fence: r.lease.fence, Token: t.seen(now)}, nil
	}
	if t != nil && c.Demand.Not == t.id {
		age := now.Sub(t.obtained)
		t.early = t.early || broker.ReportedEarly(age)
		if wait := broker.HoldOff(t.refused) - age; wait > 0 {
			return broker.Acquisition{Verdict: broker.TooSoon, Wait: wait, Token: t.seen(now)}, nil
		}
	}
	if t != nil && t.remaining(now) > 0 && c.Demand.TooLong(t.Lifetime) {
		return broker.Acquisition{Verdict: broker.Short, Token: t.seen(now)}, nil
	}
	if f := r.failure.seen(now); f != nil && f.Binds(c.Credential) {
		return broker.Acquisition{Verdict: broker.Refused, Failure: f, Token: t.seen(now)}, nil
	}
	if r.lease.live(now) {
		return broker.Acquisition{Verdict: broker.Busy, Wait: r.lease.until.Sub(now), Token: t.seen(now)}, nil
	}
	r.lastFence = next(now, r.lastFence, c.Floor)
	r.lease = lease{owner: c.Owner, fence: r.lastFence, until: now.Add(c.Length)}
	return broker.Acquisition{Verdict: broker.Granted, Fence: r.lastFence, Token: t.seen(now), Failure: r.failure.seen(now)}, nil
}

// Renew implements broker.Store.
func (m *Memory) Renew(_ context.Context, l broker.Lease) (bool, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, now := m.record(l.Family), time.Now()
	if !r.lease.is(l) || !r.lease.live(now) || r.lastFence != l.Fence {
		return false, nil
	}
	r.lease.until = now.Add(l.Length)
	return true, nil
}

// Save implements broker.Store.
func (m *Memory) Save(_ context.Context, l broker.Lease, result broker.Result) (broker.StoredToken, broker.SaveVerdict, error) {
	saved, ok, changed := m.save(l, result.Token)
	if changed {
		m.publish(broker.Change{Family: l.Family, Generation: saved.Generation})
	}
	if !ok {
		return saved, broker.Stale, nil
	}
	return saved, broker.Saved, nil
}

func (m *Memory) save(l broker.Lease, s broker.StoredToken) (saved broker.StoredToken, ok, changed bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, now := m.record(l.Family), time.Now()
	id := s.Access.ID()
	if t := r.token; t != nil && t.id == id { // saved before, or the server repeated itself
		if r.lease.is(l) {
			r.failure, r.lease = nil, lease{}
			t.obtained = now
			if t.remaining(now) <= 0 { // the server's own newer word
				t.ends = now.Add(s.Remaining)
			}
			t.refused, t.early = t.nextRefused(), false
		}
		return *t.seen(now), true, false
	}
	if r.lastFence > l.Fence {
		return broker.StoredToken{}, false, false
	}
	t := &token{StoredToken: s, id: id, ends: now.Add(s.Remaining), obtained: now}
	t.Generation = l.Fence
	if before := r.token; before != nil {
		t.Generation = max(l.Fence, before.Generation+1)
		t.refused = before.nextRefused()
	}
	r.token, r.failure = t, nil
	r.lastFence = max(r.lastFence, t.Generation)
	if r.lease.is(l) {
		r.lease = lease{}
	}
	return *t.seen(now), true, true
}

// Fail implements broker.Store.
func (m *Memory) Fail(_ context.Context, l broker.Lease, f broker.Failure) (broker.Failure, error) {
	decided, changed := m.fail(l, f)
	if changed {
		m.publish(broker.Change{Family: l.Family})
	}
	return decided, nil
}

func (m *Memory) fail(l broker.Lease, f broker.Failure) (broker.Failure, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, now := m.record(l.Family), time.Now()
	if r.failure != nil && r.failure.fence == l.Fence { // failed before
		return *r.failure.seen(now), false
	}
	if !r.lease.is(l) || r.lastFence != l.Fence {
		return broker.Failure{}, false
	}
	r.lease = lease{}
	if f.Kind == broker.NoFailure {
		return broker.Failure{}, true
	}
	if l.Fence <= r.failureFloor {
		return broker.Failure{}, true
	}
	f.Attempts = 1
	if r.failure != nil {
		f.Attempts = r.failure.Attempts + 1
	}
	if f.BacksOff() {
		f.Rest = broker.Backoff(f.Attempts, f.Rest, f.Jitter)
	}
	kept := &failure{Failure: f, fence: l.Fence, at: now}
	if f.Rest != broker.Forever {
		kept.until = now.Add(f.Rest)
	}
	r.failure = kept
	return *kept.seen(now), true
}

// Reset implements broker.Store.
func (m *Memory) Reset(_ context.Context, family string) error {
	m.mu.Lock()
	r := m.record(family)
	r.failure = nil
	r.failureFloor = r.lastFence
	m.mu.Unlock()
	m.publish(broker.Change{Family: family, Reset: true})
	return nil
}

// Look implements broker.Store.
func (m *Memory) Look(_ context.Context, family, _ string) (broker.Record, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, ok := m.families[family]
	if !ok {
		return broker.Record{}, nil
	}
	now := time.Now()
	return broker.Record{Token: r.token.seen(now), Failure: r.failure.seen(now)}, nil
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

func (m *Memory) publish(c broker.Change) {
	m.subMu.Lock()
	defer m.subMu.Unlock()
	for _, changed := range m.subscribers {
		changed(c)
	}
}

// record returns the family's record, a new one if need be. m.mu is held.
func (m *Memory) record(family string) *record {
	r, ok := m.families[family]
	if !ok {
		if len(m.families) >= m.sweepAt {
			m.sweep(time.Now())
		}
		r = &record{}
		m.families[family] = r
	}
	return r
}

const leastSweep = 1024

// sweep forgets the families that hold nothing, and waits until there are twice
// as many before it looks again. m.mu is held.
func (m *Memory) sweep(now time.Time) {
	for family, r := range m.families {
		if r.empty(now) {
			delete(m.families, family)
		}
	}
	m.sweepAt = max(leastSweep, 2*len(m.families))
}

func (r *record) empty(now time.Time) bool {
	f := r.failure.seen(now)
	return !r.lease.live(now) && (r.token == nil || r.token.remaining(now) <= 0) && (f == nil || f.Rest <= 0)
}

// next is a generation above everything known, even if the clock went back.
func next(now time.Time, known ...broker.Generation) broker.Generation {
	g := broker.Generation(now.UnixMilli())
	for _, k := range known {
		g = max(g, k)
	}
	return g + 1
}

func (l lease) live(now time.Time) bool { return l.owner != "" && l.until.After(now) }

func (l lease) is(other broker.Lease) bool {
	return l.owner == other.Owner && l.fence == other.Fence
}

// seen returns the token with what it has left now.
func (t *token) seen(now time.Time) *broker.StoredToken {
	if t == nil {
		return nil
	}
	s := t.StoredToken
	s.Remaining = t.remaining(now)
	return &s
}

func (t *token) remaining(now time.Time) time.Duration { return broker.Until(now, t.ends) }

// nextRefused is the count for the token that replaces this one.
func (t *token) nextRefused() int {
	if t.early {
		return t.refused + 1
	}
	return 0
}

// seen returns the failure with the rest it has now.
func (f *failure) seen(now time.Time) *broker.Failure {
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
