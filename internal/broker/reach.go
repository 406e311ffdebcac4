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
	since    time.Time
	refusals int
}

// observe notes how a transition ended.
func (r *reach) observe(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case err == nil, errors.Is(err, ErrUnreadable):
		r.since, r.refusals = time.Time{}, 0
		return
	case errors.Is(err, ErrStoreRefused):
		r.refusals++
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
