package store

import (
	"maps"
	"sync"
	"time"
)

// linkStats is how a link fares. Counters begin with the link.
type linkStats struct {
	// reachable: the last call to each node was answered, and there was one.
	reachable bool
	// unreachableSince the first of the calls in a row that failed, or since the
	// link began; zero while reachable.
	unreachableSince time.Time
	// lastFailure to reach a node, however long ago; empty if there was none.
	lastFailure outcome
	contacted   bool

	calls map[callKind]int64
	// retries are second tries of a call.
	retries      int64
	connections  int64
	breakerOpens int64

	// subscribed to the event channel just now.
	subscribed bool
	// subscriptionForbidden: the Redis user may not subscribe.
	subscriptionForbidden bool
	subscriptions         int64
	// heartbeatsMissed were sent and not heard.
	heartbeatsMissed int64

	// incarnations are restarts and failovers of Redis that were noticed.
	incarnations int64
	clockJumps   int64
	// clockOffset is how far the clock of Redis is ahead of the wall clock here.
	clockOffset time.Duration
}

// callKind is what was called, by the name of the script or as "headers",
// "publish" or "heartbeat", and what came of it.
type callKind struct {
	what    string
	outcome outcome
}

// tally keeps the statistics of a link.
type tally struct {
	mu    sync.Mutex
	stats linkStats
}

func (t *tally) add(change func(*linkStats)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	change(&t.stats)
}

// count counts a call. A nil failure is success.
func (t *tally) count(what string, failure *linkError) {
	kind := callKind{what, done}
	if failure != nil {
		kind.outcome = failure.outcome
	}
	t.add(func(s *linkStats) {
		if s.calls == nil {
			s.calls = make(map[callKind]int64)
		}
		s.calls[kind]++
	})
}

// stats returns a copy.
func (l *link) stats() linkStats {
	var s linkStats
	l.tally.add(func(kept *linkStats) {
		s = *kept
		s.calls = maps.Clone(s.calls)
	})
	s.reachable, s.unreachableSince = l.reachable()
	if !s.contacted {
		s.reachable, s.unreachableSince = false, l.began
	}
	return s
}
