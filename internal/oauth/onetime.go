package oauth

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// salvage is for how long after its timeout an answer to a one-time request
	// is still read. It is time in which this process runs: one that was stopped
	// while the answer came finds it in the socket when it goes on, and the
	// timeout over.
	salvage = 300 * time.Millisecond
	// salvageStep is what a stop of the process costs of that at the most.
	salvageStep = 50 * time.Millisecond
)

// oneTime watches over the one connection of a one-time request: that its first
// byte leaves only if it may, and that its answer is not missed.
//
// It works below TLS, where every way to the server looks the same, through a
// proxy as well as without one. Until net/http hands the connection over, what
// is written there is a handshake, or the way through a proxy; from then on it
// is the request. The one exception is a connection that breaks in that very
// moment: TLS then takes its leave, and the request counts as sent when it may
// not have been, which is the safe mistake of the two.
type oneTime struct {
	attempt *attempt
	// ended is why the context that the request was asked for in has ended, if
	// it has. commit makes its end mean nothing from now on; it returns false
	// if that comes too late.
	ended  func() error
	commit func() bool

	armed atomic.Bool // what is written from now on is the request
	over  atomic.Bool // the timeout has ended it

	mu      sync.Mutex // guards the rest
	begun   bool       // the first byte has been written, or is about to be
	refusal error      // why no byte will be
	held    bool       // the refusal is Clear's
}

// sendOnce makes a one-time request.
func (a *attempt) sendOnce(ctx context.Context) (*answer, error) {
	detached, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	a.oneTime = &oneTime{
		attempt: a,
		ended:   func() error { return context.Cause(ctx) },
		commit:  context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) }),
	}
	defer a.oneTime.commit()
	request := a.client.newHTTPRequest(detached, a.endpoint.url, a.request)
	return a.exchange(request, a.client.transport.single(a.oneTime.dial(detached)))
}

// dial returns what connects. The connection ends with the request at the
// latest, whatever it is used for just then: net/http would finish a handshake
// that was given up, for others.
func (o *oneTime) dial(request context.Context) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		defer context.AfterFunc(request, cancel)()
		conn, err := o.attempt.client.transport.dialer.DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		if tcp, ok := conn.(*net.TCPConn); ok {
			// Closing then discards what has not left yet, which must not
			// arrive after its time.
			if err := tcp.SetLinger(0); err != nil {
				conn.Close()
				return nil, err
			}
		}
		context.AfterFunc(request, func() { conn.Close() })
		return &oneTimeConn{Conn: conn, oneTime: o, salvage: salvage}, nil
	}
}

// arm takes over from here: the connection is there, and the request comes next.
func (o *oneTime) arm(conn net.Conn) {
	_ = conn.SetDeadline(o.attempt.deadline) // fails where writing will, too
	o.armed.Store(true)
}

// begin decides whether bytes of the request may be written, once for all.
func (o *oneTime) begin() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.begun || o.refusal != nil {
		return o.refusal
	}
	if o.refusal = o.ended(); o.refusal == nil {
		o.refusal = o.clear()
		o.held = o.refusal != nil
	}
	if o.refusal == nil && !o.commit() {
		o.refusal = o.ended()
	}
	o.begun = o.refusal == nil
	return o.refusal
}

// clear asks whoever wants the request to be made for the last time. A panic
// would end the process here, far from those who know how to recover from it.
func (o *oneTime) clear() (err error) {
	if o.attempt.request.Clear == nil {
		return nil
	}
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("asking whether it may be sent: panic of type %T", r)
		}
	}()
	return o.attempt.request.Clear()
}

// end is how the timeout ends a request. What net/http makes of the error does
// not always tell.
func (o *oneTime) end() error {
	o.over.Store(true)
	return os.ErrDeadlineExceeded
}

// heldBack is what Clear said, if that kept the request from being sent.
func (o *oneTime) heldBack() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.held {
		return o.refusal
	}
	return nil
}

// oneTimeConn is the connection of a one-time request.
type oneTimeConn struct {
	net.Conn
	oneTime *oneTime

	// What is left of the time for salvage, and whether it has begun. Only the
	// goroutine that reads has to do with them.
	salvage time.Duration
	late    bool
}

func (c *oneTimeConn) Write(p []byte) (int, error) {
	if !c.oneTime.armed.Load() {
		return c.Conn.Write(p)
	}
	if err := c.oneTime.begin(); err != nil {
		return 0, err
	}
	a := c.oneTime.attempt
	if !time.Now().Before(a.deadline) { // TLS sets another deadline for taking its leave
		return 0, c.oneTime.end()
	}
	before := a.progress.Swap(int32(sent))
	n, err := c.Conn.Write(p)
	if n == 0 && err != nil {
		a.progress.Store(before)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = c.oneTime.end()
	}
	return n, err
}

func (c *oneTimeConn) Read(p []byte) (int, error) {
	if !c.late {
		n, err := c.Conn.Read(p)
		if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		c.late = true
	}
	for c.salvage > 0 {
		start := time.Now()
		if err := c.Conn.SetReadDeadline(start.Add(min(c.salvage, salvageStep))); err != nil {
			return 0, err
		}
		n, err := c.Conn.Read(p)
		c.salvage -= min(time.Since(start), salvageStep)
		if n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
	}
	return 0, c.oneTime.end()
}
