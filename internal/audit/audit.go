// Package audit writes down who was given or denied what: one JSON object a
// line for each decision, to a file, standard output or syslog.
//
// Doors call [Log.Record] when a call has ended. It copies the event into a
// buffer of fixed size and returns; a goroutine of the log's own encodes and
// writes, a tenth of a second later at the most. An event leaves the buffer
// when its line is written, not before: what a crash can cost is one buffer.
// Lines that could not be written are tried again until they are; when the
// buffer is full meanwhile, further events are lost, counted, and told of by a
// line of their own as soon as there is one again.
//
// What happens to calls in the meantime is the operator's choice. They may go
// on; or the log refuses, and then a door takes a [Place] in the buffer before
// it hands out anything, so that nothing can be handed out that has none.
//
// No event has room for a secret: tokens are named by their ids. What callers
// have made up themselves is escaped, so that it can neither end a line nor
// begin one.
package audit

import (
	"fmt"
	"time"
)

// Event is one decision, and what came of it. Once recorded, neither it nor
// what it points to changes.
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
	// Peer is the address that the connection came from; nil if it has none. It
	// is made text when the line is.
	Peer fmt.Stringer
	// PeerName is who the connection proves to be at its other end, for a call
	// whose caller is not known; empty otherwise, or if it proves nobody.
	PeerName string
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
	// RequestID and TraceID find the call in logs and traces. A line whose event
	// has no RequestID gets one that nothing else has.
	RequestID, TraceID string
}

// weight is about how many bytes the event keeps alive that a caller has
// chosen.
func (e *Event) weight() int {
	n := len(e.Job) + len(e.Profile) + len(e.RequestID)
	for _, scope := range e.Scopes {
		n += len(scope)
	}
	return n
}
