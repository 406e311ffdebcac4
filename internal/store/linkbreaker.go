package store

import (
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

const (
	// breakerThreshold is how many calls in a row must fail before none is tried.
	breakerThreshold = 3
	// probeInterval is how often a node out of reach is asked whether it is back:
	// a failover should not last much longer for us than for Redis.
	probeInterval = 250 * time.Millisecond
	// failureMemory is how long a single failure tells that a node is out of
	// reach, if it is never asked again.
	failureMemory = 10 * time.Second
	// probeSource is a script that does nothing. Without flags it is refused where
	// a script that writes would be, by a replica for example, which answers PING.
	probeSource = "#!lua\nreturn {}"
)

// breaker keeps calls from waiting for a node that is out of reach. It opens
// after some failures in a row, and closes when a probe succeeds, or a call that
// was under way.
type breaker struct {
	mu       sync.Mutex
	failures int
	first    time.Time  // failure of these
	latest   time.Time  // failure of these
	last     *linkError // nil while there are none
	open     bool
}

// breaker returns the one of a node; "" stands for the only node, and in a
// Cluster for finding out which node to ask.
func (l *link) breaker(addr string) *breaker {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, ok := l.breakers[addr]
	if !ok {
		b = &breaker{}
		l.breakers[addr] = b
	}
	return b
}

// outOfReach returns why a node is not to be asked, or nil.
func (l *link) outOfReach(addr string) *linkError {
	b := l.breaker(addr)
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.open {
		return nil
	}
	return b.last
}

// reached notes that a node answered, which shows that it can do so much.
func (l *link) reached(addr string, can ability) {
	b := l.breaker(addr)
	b.mu.Lock()
	if b.last != nil && b.last.outcome == readOnly && can != writing {
		b.mu.Unlock()
		return
	}
	wasOpen, since := b.open, b.first
	b.failures, b.last, b.open = 0, nil, false
	b.mu.Unlock()
	l.tally.add(func(s *linkStats) { s.contacted = true })
	if wasOpen {
		l.o.log.Info("redis is back", "node", l.where(addr), "after", time.Since(since).Round(time.Millisecond))
	}
}

// failed notes that a node could not be asked for key.
func (l *link) failed(addr, key string, failure *linkError) {
	b := l.breaker(addr)
	b.mu.Lock()
	b.latest = time.Now()
	if b.failures == 0 {
		b.first = b.latest
	}
	b.failures++
	b.last = failure
	opens := !b.open && b.failures >= breakerThreshold
	b.open = b.open || opens
	b.mu.Unlock()
	l.tally.add(func(s *linkStats) { s.lastFailure = failure.outcome })
	if opens {
		l.tally.add(func(s *linkStats) { s.breakerOpens++ })
		l.o.log.Warn("redis is out of reach", "node", l.where(addr), "error", failure)
		l.start(func() { l.probe(addr, key, b) })
	}
}

// probe asks a node until it answers, or does not have key any more, because
// another node of the Cluster took over.
func (l *link) probe(addr, key string, b *breaker) {
	for l.pause(probeInterval) {
		b.mu.Lock()
		open := b.open
		b.mu.Unlock()
		if !open {
			return
		}
		if !l.probeOnce(addr, key) {
			l.mu.Lock()
			delete(l.breakers, addr)
			l.mu.Unlock()
			l.o.log.Info("redis has another node in the place of the one out of reach", "node", l.where(addr))
			return
		}
	}
}

// probeOnce notes what comes of asking a node. It returns false when the node
// does not have key any more.
func (l *link) probeOnce(addr, key string) bool {
	p := l.borrow()
	if p == nil {
		return true
	}
	defer p.users.Done()
	ctx, cancel := context.WithTimeout(l.alive, callTimeout)
	defer cancel()
	n, err := p.node(ctx, key)
	if err == nil && addr != "" && n.addr != addr {
		return false
	}
	if err == nil && n.addr == addr {
		conn := n.Conn()
		_, err = l.do(ctx, n, conn, "EVAL", probeSource, 1, key)
		_ = conn.Close()
	}
	l.judge(p, addr, key, writing, l.failure("probe", addr, err))
	return true
}

// judge notes what an outcome says about a node.
func (l *link) judge(p *pool, addr, key string, needs ability, e *linkError) {
	switch e.outcome.means() {
	case nodeAnswers:
		l.reached(addr, needs)
	case nodeFails:
		l.distrust(p)
		l.failed(addr, key, e)
	}
}

// reachable reports whether the last call to each node was answered, and if not
// since when.
func (l *link) reachable() (bool, time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var since time.Time
	for _, b := range l.breakers {
		b.mu.Lock()
		fails := b.open || b.failures > 0 && time.Since(b.latest) < failureMemory
		if fails && (since.IsZero() || b.first.Before(since)) {
			since = b.first
		}
		b.mu.Unlock()
	}
	return since.IsZero(), since
}

// pause waits for about d. It returns false when the link is closed.
func (l *link) pause(d time.Duration) bool {
	timer := time.NewTimer(d*4/5 + rand.N(d*2/5))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-l.alive.Done():
		return false
	}
}
