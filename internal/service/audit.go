package service

import (
	"cmp"
	"context"
	"errors"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/internal/audit"
	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// errAuditUnavailable is the same for whoever may do what was asked. Why the log
// cannot be written is the operators' business.
var errAuditUnavailable = failure{cause: &broker.Error{
	Reason:     reasonAuditUnavailable,
	Text:       "the broker's audit log cannot be written at this moment, and by its configuration it hands out and changes nothing meanwhile; try again, and if that lasts tell the broker's operators",
	RetryAfter: time.Second,
}}

// reserve keeps a place in the audit log for the call that ctx belongs to, or
// says that it must not hand out or change anything. It does so once for a call.
func (s *Service) reserve(ctx context.Context) error {
	c := callFrom(ctx)
	if c == nil || c.place != (audit.Place{}) {
		return nil
	}
	var err error
	if c.place, err = s.audit.Reserve(); err != nil {
		return errAuditUnavailable
	}
	return nil
}

// ends are the outcomes of streams that refuse nothing.
var ends = map[string]bool{
	string(broker.ReasonShuttingDown): true, code.Code_CANCELLED.String(): true, code.Code_DEADLINE_EXCEEDED.String(): true,
}

// record writes the audit log's line for a call that came to a decision, or was
// refused before it could.
func (s *Service) record(ctx context.Context, method, outcome string) {
	c := callFrom(ctx)
	if c == nil || s.audit == nil || isHealth(method) || c.throttled || c.outcome.operation == 0 && outcome == "ok" {
		return // nothing was decided: WhoAmI, health, reflection, calls beyond a limit
	}
	if c.told && c.outcome.tokenID == "" && ends[outcome] {
		s.audit.Release(&c.place)
		return
	}
	o := &c.outcome
	e := audit.Event{
		Time: time.Now(), Door: "grpc", Method: method,
		Profile: o.profile, Operation: o.operation.String(), Scopes: c.asked(), Job: o.job,
		Allowed: o.decision.Allowed && outcome != unknownProfile, Rule: o.decision.By(), Outcome: outcome, TokenID: o.tokenID, Source: o.source.String(),
		RequestID: c.id, TraceID: c.trace,
	}
	if o.operation == 0 {
		e.Rule = "" // the zero decision names one
	}
	switch {
	case c.caller != nil:
		e.Caller, e.Proof, e.Forwarder = c.caller.Name, c.caller.Proof.String(), c.caller.Forwarder
	case c.peer != nil: // who has forged a header, for example
		e.PeerName = c.peer.Name
	}
	if a := remote(ctx); a != nil && a.Network() != "unix" { // where there are no addresses
		e.Peer = a
	}
	s.audit.Fill(&c.place, &e)
}

// asked are the scopes that the caller names; nil if it names none.
func (c *call) asked() []string {
	if c.named {
		return c.scopes
	}
	return nil
}

// unknownProfile is the outcome of a call that a rule allows, on a profile that
// does not exist.
const unknownProfile = string(broker.ReasonProfileUnknown)

// outcomeOf is the word for a failure in the audit log. It tells a profile that
// does not exist from one that is forbidden, which the caller is not told.
func outcomeOf(err error, st *status.Status) string {
	var f failure
	if errors.As(err, &f) && f.unknown {
		return unknownProfile
	}
	return cmp.Or(reasonOf(st), code.Code(st.Code()).String())
}
