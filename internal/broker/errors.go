package broker

import (
	"slices"
	"time"
)

// Reason is the machine-readable part of a failure, under the name that callers
// see in google.rpc.ErrorInfo.
type Reason string

// The reasons that this package gives. Others belong to the doors.
const (
	ReasonInvalidRequest       Reason = "INVALID_REQUEST"
	ReasonProfileUnknown       Reason = "PROFILE_UNKNOWN" // never shown: see the service
	ReasonCredentialsRejected  Reason = "CREDENTIALS_REJECTED"
	ReasonAuthorizationNeeded  Reason = "AUTHORIZATION_REQUIRED"
	ReasonLifetimeUnavailable  Reason = "LIFETIME_UNAVAILABLE"
	ReasonEndpointThrottled    Reason = "ENDPOINT_THROTTLED"
	ReasonRefreshTooSoon       Reason = "REFRESH_TOO_SOON"
	ReasonCallerThrottled      Reason = "CALLER_THROTTLED"
	ReasonEndpointUnavailable  Reason = "ENDPOINT_UNAVAILABLE"
	ReasonStoreUnavailable     Reason = "STORE_UNAVAILABLE"
	ReasonShuttingDown         Reason = "SHUTTING_DOWN"
	ReasonJobEnded             Reason = "JOB_ENDED"
	ReasonDedicatedUnavailable Reason = "DEDICATED_UNAVAILABLE"
)

// Error is a failure that a caller can act on. Everything in it but Err is
// public.
type Error struct {
	Reason Reason
	// Field names the request's wrong field, for ReasonInvalidRequest.
	Field string
	// Text says what was tried, what went wrong and what to do.
	Text string
	// Profile that it is about, where the caller has not named one.
	Profile string
	// ConsoleURL is where a person signs in, for ReasonAuthorizationNeeded; empty
	// if the profile has no such page.
	ConsoleURL string
	// Code is the authorization server's OAuth error code, if it sent one.
	Code string
	// RetryAfter is how long to wait; zero when waiting does not help.
	RetryAfter time.Duration
	// Err is the private cause.
	Err error

	// credential is whose refusal this is; another credential is not bound
	// by it.
	credential string
}

func (e *Error) Error() string { return e.Text }
func (e *Error) Unwrap() error { return e.Err }

// binds reports whether a flight's failure answers a joiner that asks with
// demand d under these credentials. What was refused to one demand or one
// credential says nothing about another.
func (e *Error) binds(own, d Demand, credentials []string) bool {
	switch e.Reason {
	case ReasonRefreshTooSoon, ReasonLifetimeUnavailable:
		return own == d
	case ReasonCredentialsRejected:
		return slices.Contains(credentials, e.credential)
	}
	return true
}
