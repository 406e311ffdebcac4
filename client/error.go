package client

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Reason says what a failure is, to programs: the reason of the google.rpc.ErrorInfo
// that the broker sends. docs/errors.md explains them. Others may come from newer
// brokers: treat one that is not known like the code it came with.
type Reason string

// The reasons, as in tokenbroker.v1.ErrorReason.
const (
	ReasonInvalidRequest        Reason = "INVALID_REQUEST"
	ReasonCallerUnknown         Reason = "CALLER_UNKNOWN"
	ReasonCallerDenied          Reason = "CALLER_DENIED"
	ReasonCredentialsRejected   Reason = "CREDENTIALS_REJECTED"
	ReasonAuthorizationRequired Reason = "AUTHORIZATION_REQUIRED"
	ReasonLifetimeUnavailable   Reason = "LIFETIME_UNAVAILABLE"
	ReasonEndpointThrottled     Reason = "ENDPOINT_THROTTLED"
	ReasonRefreshTooSoon        Reason = "REFRESH_TOO_SOON"
	ReasonCallerThrottled       Reason = "CALLER_THROTTLED"
	ReasonEndpointUnavailable   Reason = "ENDPOINT_UNAVAILABLE"
	ReasonStoreUnavailable      Reason = "STORE_UNAVAILABLE"
	ReasonAuditUnavailable      Reason = "AUDIT_UNAVAILABLE"
	ReasonIdentityUnavailable   Reason = "IDENTITY_UNAVAILABLE"
	ReasonShuttingDown          Reason = "SHUTTING_DOWN"
	ReasonJobEnded              Reason = "JOB_ENDED"
	ReasonDedicatedUnavailable  Reason = "DEDICATED_UNAVAILABLE"
)

// domain of the broker's ErrorInfo.
const domain = "tokenbroker.v1"

// Error is why there is no token: what the broker answered, or why it did not.
// errors.As finds it, and status.FromError the gRPC status.
type Error struct {
	// Code is the gRPC code. UNAVAILABLE without a reason: the broker was not
	// reached.
	Code codes.Code
	// Reason is for programs. Empty if the broker gave none.
	Reason Reason
	// Metadata is that of the reason: "profile", "request_id" and what else there
	// is. Nil if there is none.
	Metadata map[string]string
	// RetryAfter is when asking again may help. Zero: waiting does not help, or
	// nobody knows.
	RetryAfter time.Duration
	// Message is for people.
	Message string

	doing  string         // what was tried; may be empty
	status *status.Status // as it came; nil: of our own making
	err    error          // the cause; may be nil
}

// Error says what was tried, what went wrong, and the reason.
func (e *Error) Error() string {
	text := e.Message
	if e.doing != "" {
		text = e.doing + ": " + text
	}
	if e.Reason != "" {
		return fmt.Sprintf("%s (%s)", text, e.Reason)
	}
	return fmt.Sprintf("%s (%s)", text, e.Code)
}

// Unwrap returns the cause: the gRPC error, the context's, or ErrClosed.
func (e *Error) Unwrap() error { return e.err }

// GRPCStatus is the status that came, with its details.
func (e *Error) GRPCStatus() *status.Status {
	if e.status != nil {
		return e.status
	}
	return status.New(e.Code, e.Error())
}

// FromError finds the broker's answer in an error of Client.Stub, or in any other
// that has a gRPC status. It reports whether there was one.
func FromError(err error) (*Error, bool) {
	var e *Error
	if errors.As(err, &e) {
		return e, true
	}
	if s := statusIn(err); s != nil {
		return fromStatus("", s, err), true
	}
	return nil, false
}

// newError is FromError for what a call returned.
func newError(doing string, err error) *Error {
	s := statusIn(err)
	if s == nil {
		s = status.Convert(err)
	}
	return fromStatus(doing, s, err)
}

// statusIn finds a status as it came, without what gRPC says around it when it has
// tried several times. It is nil if there is none.
func statusIn(err error) *status.Status {
	var s interface{ GRPCStatus() *status.Status }
	if errors.As(err, &s) {
		return s.GRPCStatus()
	}
	return nil
}

func fromStatus(doing string, s *status.Status, err error) *Error {
	e := &Error{Code: s.Code(), Message: s.Message(), doing: doing, status: s, err: err}
	for _, detail := range s.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() == domain {
				e.Reason, e.Metadata = Reason(d.GetReason()), d.GetMetadata()
			}
		case *errdetails.RetryInfo:
			e.RetryAfter = max(0, d.GetRetryDelay().AsDuration())
		}
	}
	return e
}

// Final reports whether coming back at once is of no use, because somebody has to
// act first.
func (e *Error) Final() bool {
	switch e.Code {
	case codes.InvalidArgument, codes.PermissionDenied, codes.Unauthenticated, codes.FailedPrecondition, codes.Unimplemented:
		return true
	}
	return false
}

// unreached reports whether the broker has not said anything.
func (e *Error) unreached() bool {
	return e.Code == codes.Unavailable && e.Reason == "" && e.RetryAfter == 0
}

// outOfTime is what somebody gets whose context has ended: the last error that there
// was meanwhile, if any, and that he did not wait any longer.
func outOfTime(d demand, ended error, last *Error) *Error {
	if last != nil {
		e := *last
		e.err = errors.Join(ended, last)
		return &e
	}
	e := &Error{Code: codes.Canceled, Message: "gave up before there was an answer", doing: d.doing(), err: ended}
	if errors.Is(ended, context.DeadlineExceeded) {
		e.Code, e.Message = codes.DeadlineExceeded, "no answer in time"
	}
	return e
}
