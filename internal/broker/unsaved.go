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
	families map[string]chan struct{}
}

// hold notes that the family's grant is not saved, until release is called.
func (u *unsaved) hold(family string) (release func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.families == nil {
		u.families = make(map[string]chan struct{})
	}
	done := make(chan struct{})
	u.families[family] = done
	return func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		delete(u.families, family)
		close(done)
	}
}

// wait returns when the family's grant is saved, or why ctx ended.
func (u *unsaved) wait(ctx context.Context, family string) error {
	u.mu.Lock()
	done := u.families[family]
	u.mu.Unlock()
	if done == nil {
		return nil
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (u *unsaved) count() int {
	u.mu.Lock()
	defer u.mu.Unlock()
	return len(u.families)
}

// Unsaved is how many grants only this process has: the store has not taken
// them in yet.
func (b *Broker) Unsaved() int { return b.unsaved.count() }
