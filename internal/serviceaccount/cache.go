package serviceaccount

import (
	"crypto/sha256"
	"sync"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
)

const (
	// maxVerified is how many tokens are remembered at the most: some 3 MB.
	maxVerified = 10000
	// rememberFor is for how long a token is remembered at the most.
	rememberFor = 5 * time.Minute
)

// digest stands for a token.
type digest [sha256.Size]byte

// usualToken is what most tokens are shorter than.
const usualToken = 2 << 10

func digestOf(token string) digest {
	if len(token) > usualToken {
		return sha256.Sum256([]byte(token))
	}
	var onStack [usualToken]byte
	return sha256.Sum256(onStack[:copy(onStack[:], token)])
}

// entry is a verified token. It is immutable.
type entry struct {
	caller *access.Caller
	ring   keyring
	keys   *Keys // of the ring, when the token was verified
	until  time.Time
}

// good reports whether the token would still be found right.
func (e *entry) good(now time.Time) bool {
	return e != nil && now.Before(e.until) && e.ring.current() == e.keys
}

// cache remembers verified tokens in two generations. When the young one is
// full it becomes the old one, and the old one is forgotten; what is used moves
// to the young one. So it needs neither a clock nor a list, and what is used
// stays. Only tokens that are good get in, so whoever wants to push out others
// has to have the cluster make thousands, and gains a signature check for each.
type cache struct {
	half int

	mu         sync.RWMutex
	young, old map[digest]*entry // never more than half in either
}

func newCache(size int) *cache {
	return &cache{half: size / 2, young: map[digest]*entry{}, old: map[digest]*entry{}}
}

// get returns the caller whose token this is, or nil.
func (c *cache) get(d digest, now time.Time) *access.Caller {
	c.mu.RLock()
	e, isYoung := c.young[d]
	if !isYoung {
		e = c.old[d]
	}
	c.mu.RUnlock()
	if !e.good(now) {
		return nil
	}
	if !isYoung {
		return c.put(d, e, now)
	}
	return e.caller
}

// put remembers an entry, unless there is a good one already, and returns the
// caller of the one that is remembered.
func (c *cache) put(d digest, e *entry, now time.Time) *access.Caller {
	c.mu.Lock()
	defer c.mu.Unlock()
	known, ok := c.young[d]
	if !ok {
		known = c.old[d]
	}
	if known.good(now) {
		e = known
	}
	if !ok && len(c.young) >= c.half {
		c.young, c.old = make(map[digest]*entry, c.half), c.young
	}
	c.young[d] = e
	return e.caller
}
