// Package audit writes down who was given or denied what: one JSON object a
// line for each decision, to a file, standard output or syslog.
//
// Doors call [Log.Record] when a call has ended. It copies the event into a
// buffer and returns; a goroutine of the log's own encodes and writes. What
// happens when lines cannot be written is the operator's choice, see
// [Log.Ready].
//
// No event has room for a secret: tokens are named by their ids.
package audit

import "time"

// Event is one decision, and what came of it.
type Event struct {
	// Time when the call ended.
	Time time.Time
	// Door is where it came in: "grpc" or "console".
	Door string
	// Method that was called: the full name over gRPC, "POST /path" on the
	// console.
	Method string
	// Caller by the name that policies use; empty if it proved none.
	Caller string
	// Proof is how the name was proven.
	Proof string
	// Forwarder is the proxy that forwarded the name; empty if none did.
	Forwarder string
	// Peer is the address that the connection came from.
	Peer string
	// Profile and Operation that the decision is about; empty if the call did
	// not come to one.
	Profile, Operation string
	// Scopes that were asked for; nil for the profile's own.
	Scopes []string
	// Job on whose behalf; empty if none was named.
	Job string
	// Allowed is the decision.
	Allowed bool
	// Rule that decided, as "policy[0]"; empty if none allowed it.
	Rule string
	// Outcome is how the call ended: "ok", or a reason of the errors' list, or
	// the name of a gRPC code.
	Outcome string
	// TokenID of the token that was handed out, reported or revoked; empty if
	// none was.
	TokenID string
	// Source that it came from: memory, store, endpoint or uncoordinated.
	Source string
	// RequestID and TraceID find the call in logs and traces.
	RequestID, TraceID string
}

// Log takes events. A nil Log takes them and does nothing.
type Log struct{}

// Record takes an event. It never blocks.
func (l *Log) Record(*Event) {}

// Ready returns why calls must be refused: lines cannot be written, and the
// operator would rather have no answers than answers without a trace. Nil in
// all other cases.
func (l *Log) Ready() error { return nil }
