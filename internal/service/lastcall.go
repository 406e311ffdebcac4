package service

import (
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
)

// lastCalls remembers, by profile, who got a token last. It is written on the way
// of every call: without a lock, without allocating, and only when there is
// something new to say.
type lastCalls struct {
	// byProfile is replaced as a whole; the map is never written to. Profiles
	// that go away stay in it.
	byProfile atomic.Pointer[map[string]*lastCall]
	mu        sync.Mutex // held to replace it
}

type lastCall = atomic.Pointer[access.Caller]

// note notes that c got a token of the profile.
func (l *lastCalls) note(profile string, c *access.Caller) {
	last := l.of(profile)
	if last == nil {
		last = l.add(profile)
	}
	if known := last.Load(); known != c && (known == nil || known.Name != c.Name) {
		last.Store(c)
	}
}

// of returns the profile's, or nil if it has none yet.
func (l *lastCalls) of(profile string) *lastCall {
	if known := l.byProfile.Load(); known != nil {
		return (*known)[profile]
	}
	return nil
}

func (l *lastCalls) add(profile string) *lastCall {
	l.mu.Lock()
	defer l.mu.Unlock()
	if last := l.of(profile); last != nil {
		return last
	}
	next, last := make(map[string]*lastCall), new(lastCall)
	if known := l.byProfile.Load(); known != nil {
		next = maps.Clone(*known)
	}
	next[profile] = last
	l.byProfile.Store(&next)
	return last
}

// LastCall returns the last caller that got a token of the profile from this
// process, and when, to the second; empty and zero if none has.
func (s *Service) LastCall(profile string) (caller string, at time.Time) {
	last := s.calls.of(profile)
	if last == nil {
		return "", time.Time{}
	}
	c, at := last.Load(), s.broker.LastServed(profile)
	if c == nil || at.IsZero() { // it is being noted, or the profile was made anew
		return "", time.Time{}
	}
	return c.Name, at
}
