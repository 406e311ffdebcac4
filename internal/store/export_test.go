package store

import (
	"time"

	"github.com/tokenbroker/tokenbroker/internal/testclock"
)

// Families is how many are kept.
func (m *Memory) Families() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.families)
}

// Suspend is what a machine that sleeps for d does to the store.
func (m *Memory) Suspend(d time.Duration) (ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range m.families {
		t := r.tokens[""]
		ok = t != nil && testclock.Suspend(&t.ends, d)
	}
	return ok
}
