// Package admission bounds what others can make this process do: how often a
// caller may ask, how much may be under way, how many connections are open, and
// what happens when the process cannot keep up.
//
// The idea is to say no early, while it is cheap, and to say when to come back,
// rather than to say yes to all and be late for everybody. Each part is small
// and knows no protocol:
//
//	Callers   what each caller does, by its proven name
//	Usage     one caller's rate and calls under way
//	Rate      so many a second, after a burst
//	Gauge     calls under way, of all callers
//	Overload  what share of new calls to turn away while memory is short
//	Listener  connections
//
// Saying yes takes no lock and allocates nothing.
package admission

import (
	"cmp"
	"sync/atomic"
	"time"
)

// Limits bound what callers can make the broker do. Zero fields mean the
// defaults, which are reasoned in docs/limits.md.
type Limits struct {
	// CallerRate is how many calls a second one caller may make, after a burst
	// of twice as many. Default: 5000.
	CallerRate int
	// CallerCalls is how many calls and streams one caller may have under way.
	// Default: 10000.
	CallerCalls int
	// Calls and streams of all callers that may be under way. Default: 20000.
	Calls int
	// Connections that may be open. Default: 10000.
	Connections int
	// ConnectionStreams is how many calls and streams may be under way on one
	// connection; more wait at the caller. Default: 250.
	ConnectionStreams int
	// ConnectionAge is after what time a connection is asked to end at the latest, so that
	// balancers spread callers over replicas. It also bounds for how long a
	// certificate that has ended is believed. Default: 5 min.
	ConnectionAge time.Duration
	// ConnectionAgeGrace is how much longer what is under way on such a
	// connection may take. Default: 30 s.
	ConnectionAgeGrace time.Duration
	// PingInterval is the shortest time between a caller's keepalive pings.
	// Default: 10 s, which is the shortest that grpc-go lets clients choose.
	PingInterval time.Duration
	// Deadline is the most that a call may take, whatever deadline its caller
	// has set; streams are not meant. Default: 60 s.
	Deadline time.Duration
	// HeaderSize is the largest header of a request in bytes, as HTTP/2 counts
	// (RFC 9113 section 6.5.2). Default: 32 KiB.
	HeaderSize int
}

// WithDefaults fills in what is zero.
func (l Limits) WithDefaults() Limits {
	return Limits{
		CallerRate:         cmp.Or(l.CallerRate, 5000),
		CallerCalls:        cmp.Or(l.CallerCalls, 10_000),
		Calls:              cmp.Or(l.Calls, 20_000),
		Connections:        cmp.Or(l.Connections, 10_000),
		ConnectionStreams:  cmp.Or(l.ConnectionStreams, 250),
		ConnectionAge:      cmp.Or(l.ConnectionAge, 5*time.Minute),
		ConnectionAgeGrace: cmp.Or(l.ConnectionAgeGrace, 30*time.Second),
		PingInterval:       cmp.Or(l.PingInterval, 10*time.Second),
		Deadline:           cmp.Or(l.Deadline, time.Minute),
		HeaderSize:         cmp.Or(l.HeaderSize, 32<<10),
	}
}

// Gauge counts calls under way. The zero value counts from zero.
type Gauge struct{ n atomic.Int64 }

// Enter counts one more unless limit are there already.
func (g *Gauge) Enter(limit int) bool {
	if g.n.Add(1) > int64(limit) {
		g.n.Add(-1)
		return false
	}
	return true
}

// Add counts one more, whatever the limit.
func (g *Gauge) Add() { g.n.Add(1) }

// Leave takes back one Enter or Add.
func (g *Gauge) Leave() { g.n.Add(-1) }

// Now returns how many are there.
func (g *Gauge) Now() int { return int(g.n.Load()) }
