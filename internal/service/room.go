package service

import (
	"math/rand/v2"
	"sync"

	"github.com/tokenbroker/tokenbroker/internal/admission"
)

// room is where calls wait that have arrived and whose handlers do not run yet,
// because their messages are still on the way.
//
// A call is counted when it arrives, and grpc-go does not tell when one ends
// whose handler never ran: the caller took it back, the connection broke, the
// message was too large. The contexts of such calls have ended, though. So the
// room is swept, every second and before anything is refused for want of room,
// and whatever has ended is not counted any more. That makes the count exact,
// without an allocation, a timer or a goroutine for each call.
type room struct{ corners [32]corner }

// corner is a list of calls, so that not all wait for one mutex.
type corner struct {
	mu    sync.Mutex
	first *call
	_     [48]byte // a cache line of its own
}

// waiter is a call's place in the room.
type waiter struct {
	corner *corner // nil if the call has never waited

	// Nothing changes these.
	gauge *admission.Gauge // counts it
	peer  *admission.Usage // counts it as pending; nil: nobody does

	// These belong to the corner's mutex.
	waiting    bool
	prev, next *call
}

// wait lets a call in whose waiter says who has counted it. Its context must not
// be replaced any more.
func (r *room) wait(c *call) {
	k := &r.corners[rand.Uint32()%uint32(len(r.corners))]
	w := &c.waiter
	k.mu.Lock()
	defer k.mu.Unlock()
	w.corner, w.waiting = k, true
	if w.next = k.first; k.first != nil {
		k.first.waiter.prev = c
	}
	k.first = c
}

// begin takes a call out of the room because its handler runs. It stays counted
// until end.
func (c *call) begin() {
	w := &c.waiter
	if w.corner == nil {
		return
	}
	w.corner.mu.Lock()
	defer w.corner.mu.Unlock()
	if w.waiting {
		w.corner.remove(c)
		return
	}
	// It was swept out as ended, and its handler runs all the same.
	w.gauge.Add()
}

// end stops counting a call that begin has counted.
func (c *call) end() {
	if c.counted != nil {
		c.counted.End()
		c.counted = nil
	}
	if c.waiter.corner != nil {
		c.waiter.gauge.Leave()
	}
}

// remove needs the mutex.
func (k *corner) remove(c *call) {
	w := &c.waiter
	if w.prev != nil {
		w.prev.waiter.next = w.next
	} else {
		k.first = w.next
	}
	if w.next != nil {
		w.next.waiter.prev = w.prev
	}
	w.prev, w.next, w.waiting = nil, nil, false
	leave(w.peer)
}

// sweep stops counting calls that have ended.
func (r *room) sweep() {
	for i := range r.corners {
		k := &r.corners[i]
		k.mu.Lock()
		for c := k.first; c != nil; {
			next := c.waiter.next
			if c.Err() != nil {
				k.remove(c)
				c.waiter.gauge.Leave()
			}
			c = next
		}
		k.mu.Unlock()
	}
}
