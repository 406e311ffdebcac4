package broker

import (
	"errors"
	"sync"
	"time"
)

// reach is what this replica sees of the store: since when it does not answer.
// One slow reply must not have every replica go on by itself.
type reach struct {
	mu sync.Mutex
	// since is when the first of the failures in a row was met; zero while
	// the store answers.
	since time.Time
	// last is when the latest of them was met: what failed long ago and was
	// not asked since says nothing about now.
	last time.Time
	// refusals in a row, and when the latest was counted.
	refusals int
	refused  time.Time
}

// failuresInARow are no further apart than this.
const failuresInARow = 10 * time.Second

// observe notes how a transition ended.
func (r *reach) observe(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if -Until(now, r.last) > failuresInARow {
		r.since, r.refusals = time.Time{}, 0
	}
	r.last = now
	switch {
	case err == nil, errors.Is(err, ErrUnreadable):
		r.since, r.refusals = time.Time{}, 0
		return
	case errors.Is(err, ErrStoreRefused) && now.Sub(r.refused) >= storeRetry: // not two flights at once
		r.refusals, r.refused = r.refusals+1, now
	}
	if r.since.IsZero() {
		r.since = time.Now()
	}
}

// lost reports whether the store is to be taken for gone: it has failed for as
// long as a lease lasts, or its host said twice that nobody listens.
func (r *reach) lost(lease time.Duration) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.refusals >= 2 || !r.since.IsZero() && -Until(time.Now(), r.since) >= lease
}
