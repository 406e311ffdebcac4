package broker

import (
	"context"
	"sync"
)

// unsaved are the families whose latest grant only this process has, because
// the store has not taken it in yet. Until it has, nobody here may look at what
// the store says of them: it would be the refresh token that was spent.
type unsaved struct {
	mu       sync.Mutex
	families map[string]*pending
}

// pending are the grants of one family that are not saved.
type pending struct {
	grants int
	saved  chan struct{}
}

// hold notes that the family's grant is not saved, until release is called.
func (u *unsaved) hold(family string) (release func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.families == nil {
		u.families = make(map[string]*pending)
	}
	p := u.families[family]
	if p == nil {
		p = &pending{saved: make(chan struct{})}
		u.families[family] = p
	}
	p.grants++
	return func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		if p.grants--; p.grants == 0 {
			delete(u.families, family)
			close(p.saved)
		}
	}
}

// has reports whether the family's grant is not saved.
func (u *unsaved) has(family string) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.families[family] != nil
}

// wait returns when the family's grant is saved, or why ctx ended.
func (u *unsaved) wait(ctx context.Context, family string) error {
	u.mu.Lock()
	p := u.families[family]
	u.mu.Unlock()
	if p == nil {
		return nil
	}
	select {
	case <-p.saved:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Unsaved is of how many families only this process has the latest grant: the
// store has not taken it in yet.
func (b *Broker) Unsaved() int {
	b.unsaved.mu.Lock()
	defer b.unsaved.mu.Unlock()
	return len(b.unsaved.families)
}
