package broker

import (
	"math/rand/v2"
	"sync/atomic"
	"time"
)

// Token is an access token in memory. It is immutable.
type Token struct {
	Access Secret
	// ID of the access token; see Secret.ID.
	ID     string
	Type   string
	Scopes []string
	// IssueTime is when the request for it was sent, at the latest.
	IssueTime time.Time
	// ExpireTime is when it ends, at the earliest.
	ExpireTime time.Time
	// RefreshTime is when to ask the broker again: its successor is there by
	// then, unless something is wrong.
	RefreshTime time.Time

	// Encoded is for the door to keep what it sends, by Source, so that a token that
	// many get is encoded once. This package does not look at it. It holds the token:
	// no formatter follows such a pointer.
	Encoded [Uncoordinated + 1]atomic.Pointer[[]byte]

	generation Generation
	lifetime   time.Duration
	// renewTime is when the broker itself looks for a successor.
	renewTime time.Time
}

// Source says where an answer came from.
type Source int

// The sources of an answer, nearest first.
const (
	FromMemory Source = iota + 1
	FromStore
	FromEndpoint
	// Uncoordinated: from the endpoint, because the store was out of reach.
	Uncoordinated
)

var sources = [...]string{"", "memory", "store", "endpoint", "uncoordinated"}

// String returns the source's name in metrics and in the audit log.
func (s Source) String() string { return sources[s] }

// Sources lists all there are.
func Sources() []Source { return []Source{FromMemory, FromStore, FromEndpoint, Uncoordinated} }

// newToken dates a stored token. start is when the call that returned it was
// begun.
func newToken(s StoredToken, start time.Time, maxAge time.Duration) *Token {
	age := s.Lifetime - s.Remaining
	usable := s.Remaining - Margin(s.Lifetime)
	untilTooOld := maxAge - age
	return &Token{
		Access:      s.Access,
		ID:          s.Access.ID(),
		Type:        s.Type,
		Scopes:      s.Scopes,
		IssueTime:   start.Add(-age),
		ExpireTime:  start.Add(s.Remaining),
		RefreshTime: start.Add(min(usable*9/10, untilTooOld)),
		generation:  s.Generation,
		lifetime:    s.Lifetime,
		renewTime:   start.Add(min(scale(usable, between(0.75, 0.85)), scale(untilTooOld, between(0.95, 1)))),
	}
}

// stored is the token in the store's terms.
func (t *Token) stored(now time.Time) StoredToken {
	return StoredToken{
		Access: t.Access, Type: t.Type, Scopes: t.Scopes,
		Generation: t.generation, Lifetime: t.lifetime, Remaining: t.remaining(now),
	}
}

// remaining life.
func (t *Token) remaining(now time.Time) time.Duration { return Until(now, t.ExpireTime) }

func (t *Token) meets(d Demand, now time.Time) bool {
	return d.Meets(t.ID, t.generation, t.lifetime, t.remaining(now))
}

// serves reports whether the token, although in its last moments, is still
// better than an error.
func (t *Token) serves(d Demand, now time.Time) bool {
	left := t.remaining(now)
	return left > 0 && left >= d.Lifetime && t.generation > d.NewerThan && (d.Not == "" || t.ID != d.Not)
}

// Until is the time from now to then by both clocks. The monotonic one stands
// still while a machine sleeps, the wall clock can be set; whichever says less
// is believed.
func Until(now, then time.Time) time.Duration {
	return min(then.Sub(now), then.Round(0).Sub(now.Round(0)))
}

func scale(d time.Duration, by float64) time.Duration { return time.Duration(float64(d) * by) }

// between draws evenly from [low, high).
func between(low, high float64) float64 { return low + rand.Float64()*(high-low) }
