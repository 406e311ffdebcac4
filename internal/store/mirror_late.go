package store

import (
	"slices"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// lateDrop is a drop that was asked for while Redis did not answer. What is
// newer does not fall under it.
type lateDrop struct {
	broker.Drop
	since time.Time
	// remember holds the ids of tokens that only this process knew, until
	// each is forgotten.
	remember map[string]time.Time
}

// lateToken is a token that Redis is to take in.
type lateToken struct {
	broker.StoredToken
	slot string
	ends time.Time
}

func (t lateToken) fallsUnder(d broker.Drop) bool {
	if d.Token != "" {
		return t.Access.ID() == d.Token
	}
	return d.Job == "" || isOf(t.slot, d.Job)
}

// dropLate remembers a drop that Redis has not confirmed. The tokens are out of
// service here at once.
func (m *mirror) dropLate(d broker.Drop) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f, now := m.family(d.Family), m.clock()
	if slices.ContainsFunc(f.drops, func(l lateDrop) bool { return l.Operation == d.Operation }) {
		return
	}
	late := lateDrop{Drop: d, since: now, remember: make(map[string]time.Time)}
	late.Floor = max(d.Floor, broker.Generation(f.highest))
	if d.Job != "" {
		f.endLate(d, m.now())
	}
	for _, id := range f.ids(d) {
		late.remember[id] = now.Add(d.Remember)
		f.content.bury(id, m.now()+d.Remember.Milliseconds())
	}
	f.content.settle(m.now())
	f.tokens = slices.DeleteFunc(f.tokens, func(t lateToken) bool { return t.fallsUnder(d) })
	f.drops = append(f.drops, late)
	f.stamp = unsure
}

// endLate ends a job here, if the drop is about it.
func (f *mirrored) endLate(d broker.Drop, now int64) {
	ends, current := now+d.Remember.Milliseconds(), d.Token == ""
	for _, name := range f.content.slots() {
		if r, ok := f.content.register(name); ok && r.inService && isOf(slotOf(name), d.Job) {
			ends, current = max(ends, r.ends()+pruneAfter), current || r.id == d.Token
		}
	}
	if current {
		f.content.raise("j:"+d.Job, ends)
	}
}

// isOf reports whether a slot is of the job that ends, or the one that does.
func isOf(slot, job string) bool { return job != "" && (slot == job || broker.JobOf(slot) == job) }

// ids that a drop is about, as far as they are known here, and that must be
// remembered one by one.
func (f *mirrored) ids(d broker.Drop) (ids []string) {
	if d.Job != "" {
		return nil
	}
	if d.Token != "" {
		return []string{d.Token}
	}
	for _, name := range append(f.content.slots(), "r") {
		if r, ok := f.content.register(name); ok && r.inService {
			ids = append(ids, r.id)
		}
	}
	for _, t := range f.tokens {
		ids = append(ids, t.Access.ID())
	}
	return ids
}

// lateDrops of a family.
func (m *mirror) lateDrops(family string) []lateDrop {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.family(family).drops)
}

// dropDone forgets a late drop: Redis has taken it in.
func (m *mirror) dropDone(family, operation string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.family(family)
	f.drops = slices.DeleteFunc(f.drops, func(l lateDrop) bool { return l.Operation == operation })
}

// remembered are the late tokens that a drop is about, by when to forget them.
func (m *mirror) remembered(d broker.Drop) map[string]time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	remember := make(map[string]time.Time)
	for _, t := range m.family(d.Family).tokens {
		if t.fallsUnder(d) {
			remember[t.Access.ID()] = m.clock().Add(d.Remember)
		}
	}
	return remember
}

// takeTokens removes and returns the late tokens that a drop is about.
func (m *mirror) takeTokens(d broker.Drop) (taken []broker.Secret) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.family(d.Family)
	f.tokens = slices.DeleteFunc(f.tokens, func(t lateToken) bool {
		if t.fallsUnder(d) {
			taken = append(taken, t.Access)
		}
		return t.fallsUnder(d)
	})
	return taken
}

// restore keeps a token that Redis is to take in.
func (m *mirror) restore(family, slot string, t broker.StoredToken) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f, now := m.family(family), m.clock()
	f.used = now
	f.tokens = slices.DeleteFunc(f.tokens, func(t lateToken) bool { return t.slot == slot })
	f.tokens = append(f.tokens, lateToken{StoredToken: t, slot: slot, ends: now.Add(t.Remaining)})
}

// lateTokens of a family, with what each has left.
func (m *mirror) lateTokens(family string) []lateToken {
	m.mu.Lock()
	defer m.mu.Unlock()
	late := slices.Clone(m.family(family).tokens)
	for i := range late {
		late[i].Remaining = broker.Until(m.clock(), late[i].ends)
	}
	return late
}

// tokenDone forgets a late token: Redis has taken it in, or does not want it.
func (m *mirror) tokenDone(family string, t lateToken) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.family(family)
	f.tokens = slices.DeleteFunc(f.tokens, func(o lateToken) bool { return o.slot == t.slot && o.Access.Equal(t.Access) })
}
