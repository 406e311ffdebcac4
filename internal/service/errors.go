package service

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Domain of every google.rpc.ErrorInfo that this package sends.
const Domain = "tokenbroker.v1"

// The reasons that this door adds to the broker's.
const (
	reasonCallerUnknown broker.Reason = "CALLER_UNKNOWN"
	reasonCallerDenied  broker.Reason = "CALLER_DENIED"

	reasonAuditUnavailable    broker.Reason = "AUDIT_UNAVAILABLE"
	reasonIdentityUnavailable broker.Reason = "IDENTITY_UNAVAILABLE"
)

// codeOf is the one place where reasons become canonical codes.
func codeOf(r broker.Reason) codes.Code {
	switch r {
	case broker.ReasonInvalidRequest:
		return codes.InvalidArgument
	case reasonCallerUnknown:
		return codes.Unauthenticated
	case reasonCallerDenied:
		return codes.PermissionDenied
	case broker.ReasonCredentialsRejected, broker.ReasonAuthorizationNeeded, broker.ReasonLifetimeUnavailable, broker.ReasonJobEnded, broker.ReasonDedicatedUnavailable:
		return codes.FailedPrecondition
	case broker.ReasonEndpointThrottled, broker.ReasonRefreshTooSoon, broker.ReasonCallerThrottled:
		return codes.ResourceExhausted
	case broker.ReasonEndpointUnavailable, broker.ReasonStoreUnavailable, reasonAuditUnavailable, reasonIdentityUnavailable, broker.ReasonShuttingDown:
		return codes.Unavailable
	}
	return codes.Internal
}

var internalError = status.Error(codes.Internal, "the broker itself failed; its log has the place")

// failure is what a handler returns: an error of ours, and what it was about.
type failure struct {
	cause   *broker.Error
	profile string
	// caller that was denied; empty if that is not what happened.
	caller string
	// unknown: there is no such profile. That is for the audit log alone.
	unknown bool
	// fields that are wrong, when the request is; cause.Field needs no entry.
	fields []*errdetails.BadRequest_FieldViolation
}

func (f failure) Error() string { return f.cause.Text }

// statusOf turns any error into what the caller sees. Whatever is not meant for
// callers becomes INTERNAL without a text.
func statusOf(err error, requestID string) *status.Status {
	if s, ok := status.FromError(err); ok {
		return s
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return status.FromContextError(err)
	}
	var f failure
	if !errors.As(err, &f) {
		return status.Convert(internalError)
	}
	e := f.cause
	info := &errdetails.ErrorInfo{
		Reason:   string(e.Reason),
		Domain:   Domain,
		Metadata: map[string]string{"request_id": requestID},
	}
	if f.profile != "" {
		info.Metadata["profile"] = f.profile
	}
	if f.caller != "" {
		info.Metadata["caller"] = f.caller
	}
	if e.Code != "" {
		info.Metadata["oauth_error"] = e.Code
	}
	if e.ConsoleURL != "" {
		info.Metadata["console_url"] = e.ConsoleURL
	}
	details := []protoadapt.MessageV1{info}
	if e.RetryAfter > 0 && e.RetryAfter != broker.Forever {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(e.RetryAfter)})
	}
	fields := f.fields
	if e.Field != "" {
		fields = append(fields, &errdetails.BadRequest_FieldViolation{Field: e.Field, Description: e.Text})
	}
	if len(fields) > 0 {
		details = append(details, &errdetails.BadRequest{FieldViolations: fields})
	}
	s := status.New(codeOf(e.Reason), e.Text)
	detailed, err := s.WithDetails(details...)
	if err != nil { // the details are our own messages: this cannot happen
		return s
	}
	return detailed
}

// verbs say what the operations do to a profile.
var verbs = map[access.Operation]string{
	access.Issue: "issue tokens of", access.Refresh: "refresh tokens of", access.Watch: "watch tokens of",
	access.Revoke: "revoke tokens of", access.Admin: "administer",
}

// denied is the same whether the profile is forbidden or does not exist.
func denied(c *access.Caller, profile string, op access.Operation) failure {
	return failure{
		cause: &broker.Error{
			Reason: reasonCallerDenied,
			Text:   fmt.Sprintf("caller %s may not %s profile %q, or there is no such profile; ask the broker's operators for a policy rule, and see 'broker whoami' for what is allowed", c.Name, verbs[op], profile),
		},
		profile: profile,
		caller:  c.Name,
	}
}

// fromBroker adds the profile to a broker's error, and hides which profiles
// exist.
func fromBroker(err error, c *access.Caller, profile string, op access.Operation) error {
	var e *broker.Error
	if !errors.As(err, &e) {
		return err
	}
	if e.Reason == broker.ReasonProfileUnknown {
		f := denied(c, profile, op)
		f.unknown = true
		return f
	}
	return failure{cause: e, profile: cmp.Or(profile, e.Profile)}
}
