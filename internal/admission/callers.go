package admission

import (
	"cmp"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// mostCallers bounds the table. An identity is proven, but an authority may
	// prove any number: at some 200 bytes each, this many take 20 MB.
	mostCallers = 100_000
	// tidyTime is how often idle callers are looked for when the table is full.
	tidyTime = time.Second
	// gone, as a count of calls, marks a usage that the table has dropped. It is
	// far enough below zero for late comers to see it.
	gone = -1 << 40
)

// epoch is what instants are counted from: only the monotonic clock, which
// nobody sets, may decide about rates.
var epoch = time.Now()

func sinceEpoch(now time.Time) int64 { return int64(now.Sub(epoch)) }

// Callers is what each caller does, by name. It outlives connections, so that a
// new connection is no fresh burst. The zero value knows nobody.
type Callers struct {
	mu     sync.Mutex
	table  map[string]*Usage
	most   int   // zero: mostCallers
	tidied int64 // since epoch; zero: never
	// crowd is shared by those for whom there is no room.
	crowd Usage
}

// Of returns the usage of the caller with this name. One that the caller was
// known by before saves looking for it; nil is none.
func (c *Callers) Of(name string, known *Usage) *Usage {
	if known != nil && known != &c.crowd && known.calls.Load() >= 0 {
		return known
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if u := c.table[name]; u != nil {
		return u
	}
	if c.table == nil {
		c.table = map[string]*Usage{}
	}
	if len(c.table) >= cmp.Or(c.most, mostCallers) && !c.makeRoom() {
		return &c.crowd
	}
	u := &Usage{}
	c.table[name] = u
	return u
}

// makeRoom drops idle callers from a full table, though not with every call.
func (c *Callers) makeRoom() bool {
	now := sinceEpoch(time.Now())
	if c.tidied != 0 && now-c.tidied < int64(tidyTime) {
		return false
	}
	c.tidied = now
	before := len(c.table)
	c.drop(now)
	return len(c.table) < before
}

// Begin counts a call of the caller under way, unless there are most already; ok
// says which. It returns the usage that counted it, which may be another than
// the one known before.
func (c *Callers) Begin(name string, known *Usage, most int) (u *Usage, ok bool) {
	for {
		known = c.Of(name, known)
		switch n := known.calls.Add(1); {
		case n < 0: // the table has dropped it since
			known.calls.Add(-1)
		case n > int64(most):
			known.calls.Add(-1)
			return known, false
		default:
			return known, true
		}
	}
}

// Tidy forgets callers that are idle, which costs them nothing: a usage that is
// as good as new says nothing.
func (c *Callers) Tidy() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop(sinceEpoch(time.Now()))
}

// Len returns how many callers are known.
func (c *Callers) Len() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.table)
}

func (c *Callers) drop(now int64) {
	for name, u := range c.table {
		if u.next.Load() <= now && u.Pending.Now() == 0 && u.calls.CompareAndSwap(0, gone) {
			delete(c.table, name)
		}
	}
}

// Usage is what one caller does: how often it asks, and what it has under way.
type Usage struct {
	// Rate counts the calls.
	Rate
	// Refusals counts those that were told to wait.
	Refusals Rate
	// Pending is that part of the calls on the caller's connections whose
	// message is yet to come.
	Pending Gauge

	calls atomic.Int64
}

// End takes back a [Callers.Begin].
func (u *Usage) End() { u.calls.Add(-1) }

// Rate holds to a rate by GCRA, the generic cell rate algorithm, in one word:
// next is when all would be at rest again if there was no other call. Each call
// moves it by the time that a call takes at the allowed rate, and it must not get
// further ahead of now than the burst allows. A bucket of tokens, as
// golang.org/x/time/rate has it, says the same with a mutex and three words. The
// zero value is at rest.
type Rate struct {
	next atomic.Int64 // since epoch, in ns
}

// burst is how much more than the rate a caller may ask for at once, in seconds
// of the rate.
const burst = 2 * time.Second

// Take counts a call at the given rate a second. Zero means yes; otherwise
// nothing was counted, and it is how long to wait. Looking at the clock is the
// caller's business: it costs more than all of this.
func (r *Rate) Take(now time.Time, rate int) time.Duration { return r.take(sinceEpoch(now), rate) }

func (r *Rate) take(now int64, rate int) time.Duration {
	step := int64(time.Second) / int64(rate)
	for {
		was := r.next.Load()
		next := max(was, now) + step
		if wait := next - now - int64(burst); wait > 0 {
			return time.Duration(wait)
		}
		if r.next.CompareAndSwap(was, next) {
			return 0
		}
	}
}

// Wait is what Take would return; nothing is counted. The earlier now is, the
// longer the wait.
func (r *Rate) Wait(now time.Time, rate int) time.Duration { return r.wait(sinceEpoch(now), rate) }

func (r *Rate) wait(now int64, rate int) time.Duration {
	step := int64(time.Second) / int64(rate)
	return max(0, time.Duration(max(r.next.Load(), now)+step-now-int64(burst)))
}
