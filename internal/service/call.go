package service

import (
	"context"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/admission"
	"github.com/tokenbroker/tokenbroker/internal/audit"
	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Headers that are read from callers.
const (
	// requestIDHeader is returned in the metadata of errors.
	requestIDHeader = "x-request-id"
	// traceHeader is W3C Trace Context's.
	traceHeader         = "traceparent"
	authorizationHeader = "authorization"
)

// call is what is known of one call: who asks, under which ids, and what came of
// it. It is made when the call's headers have arrived, is the context of all that
// the call causes, and belongs to the goroutine that handles the call.
type call struct {
	context.Context

	// Who the connection proves to be at its other end, as far as its handshake
	// could tell; nil if nobody.
	peer *access.Caller
	// certified is the peer's certificate; nil if it has shown none.
	certified *certified
	// headers as they came; nothing changes them. What they claim is for identify.
	headers metadata.MD

	// caller that asks; nil until identify has found out, by this trust.
	caller *access.Caller
	trust  *trusted
	// id under which the log has the call; see requestID.
	id    string
	trace string // trace id, 32 hex digits; empty if the caller has none

	// The policy that judged the call last, and the scopes that it judged: the
	// profile's own, if the caller names none.
	policy *access.Policy
	scopes []string

	// outcome is what the handler found out about the call, for the audit log.
	outcome outcome

	method  *method          // nil: there is no such method
	waiter  waiter           // its place among the calls that have arrived
	counted *admission.Usage // that counts it as under way; nil if none does
	// refused is why the call is not let in, if it could not be told on arrival.
	refused *refusal
	// cancel ends the call's own deadline; nil if it has none.
	cancel context.CancelFunc
	late   *late // of a stream; nil for others

	// These are side by side because calls are many, and so are smaller.

	// named says that the scopes are what the caller names.
	named bool
	// throttled says that a limit ended the call, before anything was decided.
	throttled bool
	// told says that the audit log has a line of each token that the call got: its
	// end needs none, unless that is a refusal.
	told bool
	// place that the audit log keeps for it, if it does; see reserve.
	place audit.Place
}

// late ends a stream whose request does not come.
type late struct {
	*time.Timer
	lapsed atomic.Bool // it has ended the stream
}

// outcome is what came of a call.
type outcome struct {
	profile   string
	job       string
	tokenID   string
	decision  access.Decision
	source    broker.Source    // zero: no token was handed out
	operation access.Operation // zero: the call did not come to a decision
}

type callKey struct{}

// Value implements context.Context.
func (c *call) Value(key any) any {
	if key == (callKey{}) {
		return c
	}
	return c.Context.Value(key)
}

// Err implements context.Context.
func (c *call) Err() error {
	err := c.Context.Err()
	if err != nil && c.late != nil && c.late.lapsed.Load() {
		return context.DeadlineExceeded // it is no caller who has cancelled it
	}
	return err
}

// callFrom returns the call that ctx belongs to.
func callFrom(ctx context.Context) *call {
	c, _ := ctx.Value(callKey{}).(*call)
	return c
}

// arrive begins a call. It runs for one call of a connection at a time, before
// anything is set aside for it, and must not take long.
func (s *Service) arrive(ctx context.Context, info *tap.Info) (context.Context, error) {
	h := info.Header
	c := &call{
		Context: ctx,
		headers: h,
		id:      audit.RequestID(h[requestIDHeader]),
		trace:   traceID(h[traceHeader]),
		method:  s.methods[info.FullMethodName],
	}
	c.peer, c.certified = other(ctx)
	if c.method == nil || ctx.Err() != nil {
		return c, nil // answered at once, whatever follows
	}
	if r := s.limiter.arrived(c); r != nil {
		deadline, ok := ctx.Deadline()
		if !ok || time.Until(deadline) <= earlyDeadline {
			return nil, s.turnAway(c, info.FullMethodName, r)
		}
		s.limiter.refusedLater(c, r)
	}
	s.hurry(c)
	if c.waiter.gauge != nil {
		s.limiter.room.wait(c)
	}
	return c, nil
}

// turnAway is what a call gets that is refused on arrival.
func (s *Service) turnAway(c *call, method string, r *refusal) error {
	id := requestID(c)
	st := statusOf(failure{cause: r.cause}, id)
	s.logFailure(c, method, id, st, nil)
	return st.Err()
}

// hurry gives a call the deadline that the server sets, if its caller's is not
// sooner. It holds for the message, too, however slowly it comes. The timer
// costs what grpc-go pays for a deadline of the caller's; the end of the stream
// ends it.
func (s *Service) hurry(c *call) {
	longest := c.method.longest(s.limiter.limits.Load().Deadline)
	switch {
	case c.refused != nil && c.waiter.gauge == nil:
		longest = noMessage
	case c.refused != nil:
		longest = lateMessage
	case c.method.stream:
		// Only its request has a time: what may come after has none.
		ctx, cancel := context.WithCancel(c.Context)
		l := &late{}
		l.Timer = time.AfterFunc(firstMessage, func() {
			l.lapsed.Store(true)
			cancel()
		})
		c.Context, c.late = ctx, l
		return
	}
	// A look at the clock costs as much as all else here. One that is behind makes
	// the caller's deadline look further away: at worst both are kept.
	if deadline, ok := c.Deadline(); !ok || deadline.Sub(*s.limiter.lately.Load()) > longest {
		c.Context, c.cancel = context.WithTimeout(c.Context, longest)
	}
}

// other is the other end of the call's connection.
func other(ctx context.Context) (*access.Caller, *certified) {
	if p, ok := peer.FromContext(ctx); ok {
		switch info := p.AuthInfo.(type) {
		case *tlsInfo:
			return info.caller, info.certified
		case localInfo:
			return info.caller, nil
		}
	}
	return nil, nil
}

// callerOf returns the caller of the call that ctx belongs to.
func callerOf(ctx context.Context) (*access.Caller, error) {
	if c := callFrom(ctx); c != nil && c.caller != nil {
		return c.caller, nil
	}
	return nil, errCallerUnknown
}

// requestID is the caller's own id for the call, if it is harmless to log, or a
// new one.
func requestID(ctx context.Context) string {
	c := callFrom(ctx)
	if c == nil {
		return audit.NewRequestID()
	}
	if c.id == "" {
		c.id = audit.NewRequestID()
	}
	return c.id
}

// traceID is the trace id in a traceparent header (W3C Trace Context, section
// 3.2), or empty.
func traceID(headers []string) string {
	const version, id = 2, 32
	if len(headers) != 1 || len(headers[0]) < version+1+id+1 {
		return ""
	}
	h := headers[0]
	trace := h[version+1 : version+1+id]
	if h[version] != '-' || h[version+1+id] != '-' || strings.Trim(trace, "0123456789abcdef") != "" || strings.Trim(trace, "0") == "" {
		return ""
	}
	return trace
}

// remote is the address that the call came from.
func remote(ctx context.Context) net.Addr {
	if p, ok := peer.FromContext(ctx); ok {
		return p.Addr
	}
	return nil
}
