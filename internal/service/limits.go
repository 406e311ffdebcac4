package service

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/admission"
	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// The limits, as metrics and the log call them.
const (
	limitCallerRate  = "caller_rate"
	limitCallerCalls = "caller_calls"
	limitCalls       = "calls"
	limitOverload    = "overload"
	limitConnections = "connections"
)

var allLimits = []string{limitCallerRate, limitCallerCalls, limitCalls, limitOverload, limitConnections}

const (
	// pendingPart is which part of all calls may wait for messages on the
	// connections of one caller, though leastPending always may. Whoever sends
	// headers without messages can fill no more.
	pendingPart  = 4
	leastPending = 1000
	// comeBack is when to ask again after a refusal that only others can end,
	// give or take half of it, so that not all come back at once.
	comeBack = time.Second
	// earlyDeadline and lateMessage: grpc-go keeps a timer of every call that
	// was refused on arrival until the deadline of its caller, some 400 bytes.
	// A call whose deadline is further away than this is refused after its
	// message, for which it has this long. That holds for mostLate calls at a
	// time; more have next to no time, and get DEADLINE_EXCEEDED if their message
	// has not come with the headers.
	earlyDeadline = 10 * time.Second
	lateMessage   = time.Second
	noMessage     = time.Millisecond
	mostLate      = 1000
	// firstMessage is how long the request of a stream may take.
	firstMessage = 10 * time.Second
	// strangersRate is how many calls a second of all who prove nothing get a
	// full answer, and a line in the logs.
	strangersRate = 100
	// tellTime is how often the log tells of refusals, limit by limit.
	tellTime = time.Minute
	// callersTidyTime is how often callers that are idle are forgotten.
	callersTidyTime = time.Minute
)

// limiter holds calls to the limits.
type limiter struct {
	limits  atomic.Pointer[admission.Limits]
	callers admission.Callers
	// nobody is shared by all whose connection proves nothing: theirs are the
	// calls that a token may prove, or nothing.
	nobody   admission.Usage
	overload admission.Overload
	calls    admission.Gauge
	// health has its own gauge, so that whoever asks for health while all else
	// is refused gets an answer; as many as there may be connections is enough.
	health admission.Gauge
	// late are the calls that are refused after their messages.
	late  admission.Gauge
	room  room
	swept atomic.Pointer[time.Time]
	// lately is a time that has just been: at most a second ago while all is
	// well. Calls look at it where it does not matter if it is behind.
	lately atomic.Pointer[time.Time]

	counts  map[string]*refusals // by limit; not changed after it is made
	metrics []prometheus.Collector

	mu       sync.Mutex
	listener *admission.Listener // nil before Serve
}

// refusals by one limit.
type refusals struct {
	prometheus.Counter
	untold atomic.Int64 // since the log last told
	told   time.Time    // belongs to the goroutine that tells
	// caller that was refused last, if the limit is one of callers.
	caller atomic.Pointer[access.Caller]
}

func newLimiter(l admission.Limits) *limiter {
	m := &limiter{counts: map[string]*refusals{}}
	l = l.WithDefaults()
	m.limits.Store(&l)
	now := time.Now()
	m.lately.Store(&now)
	m.swept.Store(&time.Time{})
	refused := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "calls_refused_total", Help: "Calls, and connections, that were refused by a limit of server.limits, or because memory was short.",
	}, []string{"limit"})
	for _, name := range allLimits {
		m.counts[name] = &refusals{Counter: refused.WithLabelValues(name)}
	}
	m.metrics = []prometheus.Collector{
		refused,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "calls_in_flight", Help: "Calls and streams under way, health checks apart.",
		}, func() float64 { return float64(m.calls.Now()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "connections", Help: "Connections of callers that are open.",
		}, func() float64 { return float64(m.open()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "calls_shed_ratio", Help: "The part of new calls that is refused because memory is short.",
		}, m.overload.Share),
	}
	return m
}

func (m *limiter) open() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.listener == nil {
		return 0
	}
	return m.listener.Open()
}

// SetLimits puts other limits in force for calls and connections to come. What
// grpc-go fixes when the server is made stays: streams per connection, the age
// of connections, pings, the size of headers.
func (s *Service) SetLimits(l admission.Limits) {
	l = l.WithDefaults()
	m := s.limiter
	m.mu.Lock()
	defer m.mu.Unlock()
	m.limits.Store(&l)
	if m.listener != nil {
		m.listener.SetMost(l.Connections)
	}
}

// refusal is a limit that a call is beyond.
type refusal struct {
	limit string
	cause *broker.Error
}

func (m *limiter) refuse(limit string, reason broker.Reason, wait time.Duration, text string, args ...any) *refusal {
	m.count(limit)
	// RetryInfo and the pushback header count in milliseconds at best: rounded up.
	wait = (wait + time.Millisecond - 1).Truncate(time.Millisecond)
	return &refusal{limit, &broker.Error{Reason: reason, RetryAfter: wait, Text: fmt.Sprintf(text, args...)}}
}

func (m *limiter) count(limit string) {
	r := m.counts[limit]
	r.Inc()
	r.untold.Add(1)
}

// later spreads those who are told to come back.
func later() time.Duration { return comeBack/2 + rand.N(comeBack) }

// arrived counts the call, or says which limit it is beyond. It runs before
// anything is set aside for the call.
func (m *limiter) arrived(c *call) *refusal {
	l := m.limits.Load()
	if c.method.health {
		if !m.enter(&m.health, l.Connections) {
			return m.refuse(limitCalls, broker.ReasonCallerThrottled, later(), "%d health checks are under way on this replica: try another replica, or again later (server.limits.connections)", l.Connections)
		}
		c.waiter.gauge = &m.health
		return nil
	}
	u, _ := c.usage()
	if u = m.usageOf(c.peer, u); u != nil {
		// The identity of a call that claims none by its headers is that of
		// its connection. Whoever asks too often is told so with all that a
		// client can use, at the end of its call; who does not listen gets a
		// short answer, before anything is set aside.
		if c.peer != nil && u.Wait(*m.lately.Load(), l.CallerRate) > 0 && c.claimsNothing() {
			now := time.Now() // which may be later
			if wait := u.Wait(now, l.CallerRate); wait > 0 && u.Refusals.Take(now, l.CallerRate) > 0 {
				return m.tooOften(c.peer, l.CallerRate, wait)
			}
		}
		if most := max(l.Calls/pendingPart, min(l.Calls, leastPending)); !m.enter(&u.Pending, most) {
			m.counts[limitCallerCalls].caller.Store(c.peer)
			return m.refuse(limitCallerCalls, broker.ReasonCallerThrottled, later(), "on the connections of %s %d calls wait for their messages: send messages with their headers", c.peerName(), most)
		}
	}
	if !m.enter(&m.calls, l.Calls) {
		leave(u)
		return m.refuse(limitCalls, broker.ReasonCallerThrottled, later(), "%d calls are under way on this replica: try another replica, or again later (server.limits.calls)", l.Calls)
	}
	if m.overload.Shed() {
		m.calls.Leave()
		leave(u)
		return m.refuse(limitOverload, broker.ReasonCallerThrottled, later(), "this replica is short of memory: try another replica, or again later (GOMEMLIMIT)")
	}
	c.waiter.gauge, c.waiter.peer = &m.calls, u
	return nil
}

// refusedLater has the call refused when its message has come.
func (m *limiter) refusedLater(c *call, r *refusal) {
	c.refused = r
	if m.enter(&m.late, mostLate) {
		c.waiter.gauge = &m.late
	}
}

// enter is sure that what fills the gauge is still there.
func (m *limiter) enter(g *admission.Gauge, most int) bool {
	if g.Enter(most) {
		return true
	}
	m.sweep()
	return g.Enter(most)
}

func leave(u *admission.Usage) {
	if u != nil {
		u.Pending.Leave()
	}
}

// sweep stops counting calls that ended before they came to their handlers. It
// goes through all that wait, so not at every call of a flood.
func (m *limiter) sweep() {
	now := time.Now()
	was := m.swept.Load()
	if now.Sub(*was) < 10*time.Millisecond || !m.swept.CompareAndSwap(was, &now) {
		return
	}
	m.room.sweep()
}

// usageOf is what the caller does; nil if nobody counts it.
func (m *limiter) usageOf(c *access.Caller, known *admission.Usage) *admission.Usage {
	switch {
	case c == nil:
		return &m.nobody
	case c.Name == access.Anonymous:
		return nil
	}
	u := m.callers.Of(c.Name, known)
	if u != known {
		c.Usage.Store(u)
	}
	return u
}

// usage is what the peer's usage was when last looked for.
func (c *call) usage() (*admission.Usage, bool) {
	if c.peer == nil {
		return nil, false
	}
	u, ok := c.peer.Usage.Load().(*admission.Usage)
	return u, ok
}

// peerName is what refusals call the other end of the connection.
func (c *call) peerName() string {
	if c.peer == nil {
		return "all who prove nothing by them"
	}
	return c.peer.Name
}

// claimsNothing reports whether the headers leave the identity to the connection.
func (c *call) claimsNothing() bool {
	return len(c.headers[authorizationHeader])+len(c.headers[access.EnvoyHeader])+len(c.headers[access.LinkerdHeader]) == 0
}

func (m *limiter) tooOften(c *access.Caller, rate int, wait time.Duration) *refusal {
	m.counts[limitCallerRate].caller.Store(c)
	return m.refuse(limitCallerRate, broker.ReasonCallerThrottled, wait, "caller %s makes more than %d calls a second on this replica: keep tokens until their refresh_time, or raise server.limits.caller_rate", c.Name, rate)
}

// entered counts the call as its caller's, or says which limit it is beyond.
func (m *limiter) entered(c *call) *refusal {
	if c.caller == nil || c.caller.Name == access.Anonymous {
		return nil
	}
	l := m.limits.Load()
	known, _ := c.caller.Usage.Load().(*admission.Usage)
	u, ok := m.callers.Begin(c.caller.Name, known, l.CallerCalls)
	if u != known {
		c.caller.Usage.Store(u)
	}
	if !ok {
		m.counts[limitCallerCalls].caller.Store(c.caller)
		return m.refuse(limitCallerCalls, broker.ReasonCallerThrottled, later(), "caller %s has %d calls under way on this replica: let some end first, or raise server.limits.caller_calls", c.caller.Name, l.CallerCalls)
	}
	c.counted = u
	if wait := u.Take(time.Now(), l.CallerRate); wait > 0 {
		return m.tooOften(c.caller, l.CallerRate, wait)
	}
	return nil
}

// unknown counts a call whose caller is not known as one of the other end of its
// connection, or says which limit it is beyond: refusals are lines in the logs,
// and must not be a flood of them. Those whose connections prove nothing have one
// small share together.
func (m *limiter) unknown(c *call) *refusal {
	if c.peer == nil {
		if wait := m.nobody.Take(time.Now(), strangersRate); wait > 0 {
			return m.refuse(limitCallerRate, broker.ReasonCallerThrottled, wait, "more than %d calls a second on this replica prove nobody: show a client certificate or a token that is accepted", strangersRate)
		}
		return nil
	}
	known, _ := c.usage()
	u := m.usageOf(c.peer, known)
	if u == nil {
		return nil
	}
	rate := m.limits.Load().CallerRate
	if wait := u.Take(time.Now(), rate); wait > 0 {
		return m.tooOften(c.peer, rate, wait)
	}
	return nil
}

// pushback tells clients of gRPC when to retry (gRFC A6); it belongs into the
// trailers.
const pushback = "grpc-retry-pushback-ms"

// error is what the caller gets to see. The call's trailers get the pushback.
func (r *refusal) error(ctx context.Context, c *call) error {
	c.throttled = true
	if r.cause.RetryAfter > 0 {
		// There are no trailers where there is no stream: then nobody sees them.
		_ = grpc.SetTrailer(ctx, metadata.Pairs(pushback, strconv.FormatInt(r.cause.RetryAfter.Milliseconds(), 10)))
	}
	return failure{cause: r.cause}
}

// watch keeps the limiter in order until ctx ends.
func (s *Service) watch(ctx context.Context) {
	var watching sync.WaitGroup
	defer watching.Wait()
	watching.Go(func() { s.limiter.overload.Watch(ctx) })
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	tidied := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-ticker.C:
			s.limiter.lately.Store(&now)
			s.limiter.room.sweep()
			s.tell(now)
			if now.Sub(tidied) >= callersTidyTime {
				tidied = now
				s.limiter.callers.Tidy()
			}
		}
	}
}

// tell writes one line per limit that has refused something, and not again
// within a minute: a flood of calls is no flood of the log.
func (s *Service) tell(now time.Time) {
	for _, limit := range allLimits {
		r := s.limiter.counts[limit]
		if now.Sub(r.told) < tellTime {
			continue
		}
		if n := r.untold.Swap(0); n > 0 {
			attrs := []any{"limit", limit, "refused", n}
			if c := r.caller.Load(); c != nil {
				attrs = append(attrs, slog.Group("last", named(c)))
			}
			s.log.Warn("a limit refuses calls", attrs...)
			r.told = now
		}
	}
}
