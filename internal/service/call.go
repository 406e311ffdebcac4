package service

import (
	"context"
	"crypto/rand"
	"net"
	"strings"

	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/tap"

	"github.com/tokenbroker/tokenbroker/internal/access"
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
	// What the headers claim; see identify.
	authorization, envoy, linkerd []string

	// caller that asks; nil until identify has found out.
	caller *access.Caller
	// id under which the log has the call; see requestID.
	id    string
	trace string // trace id, 32 hex digits; empty if the caller has none

	// The policy that judged the call last, and the scopes that it judged: the
	// profile's own, if the caller names none.
	policy *access.Policy
	scopes []string

	// outcome is what the handler found out about the call, for the audit log.
	outcome outcome
}

// outcome is what came of a call.
type outcome struct {
	profile   string
	operation access.Operation // zero: the call did not come to a decision
	scopes    []string
	job       string
	decision  access.Decision
	tokenID   string
	source    string
}

type callKey struct{}

// Value implements context.Context.
func (c *call) Value(key any) any {
	if key == (callKey{}) {
		return c
	}
	return c.Context.Value(key)
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
		Context:       ctx,
		authorization: h[authorizationHeader],
		envoy:         h[access.EnvoyHeader],
		linkerd:       h[access.LinkerdHeader],
		trace:         traceID(h[traceHeader]),
	}
	c.peer, c.certified = other(ctx)
	if ids := h[requestIDHeader]; len(ids) == 1 && harmless(ids[0]) {
		c.id = ids[0]
	}
	return c, nil
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
		return rand.Text()[:16]
	}
	if c.id == "" {
		c.id = rand.Text()[:16]
	}
	return c.id
}

func harmless(id string) bool {
	if id == "" || len(id) > 64 {
		return false
	}
	for _, c := range []byte(id) {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.') {
			return false
		}
	}
	return true
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
