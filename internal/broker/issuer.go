package broker

import (
	"context"
	"fmt"
	"time"
)

// Issuer makes one attempt to obtain a grant from one authorization server for
// one profile. It does not retry, cache or store: the flight that calls it owns
// all of that.
//
// Issue may be called from several goroutines. It returns when the server has
// answered or ctx ends, whichever is first, and never later than the time-out
// that the profile sets. The error is always an *IssueError.
type Issuer interface {
	Issue(ctx context.Context, request Request) (*Grant, error)
}

// Request says what is wanted beyond what the profile fixes.
type Request struct {
	// Scopes to ask for; empty asks for none in particular, which each
	// server reads in its own way (RFC 6749 section 3.3).
	Scopes []string
	// RefreshToken, when there is one, is spent instead of what the profile
	// presents otherwise. Such a request is sent over a connection of its own,
	// and once its first byte was written nothing but its own time-out ends it:
	// its answer may hold the only token that is still good.
	RefreshToken Secret
	// Clear, if not nil, is asked right before the first byte of a request that
	// spends a refresh token leaves. An error keeps it from leaving: the
	// attempt ends with that error as its cause, unsent.
	Clear func() error
}

// Revoker is an Issuer whose server revokes tokens (RFC 7009).
type Revoker interface {
	// Revoke makes one request. Nil means that the server does not know the
	// token any more, or never did; the error is an *IssueError otherwise.
	Revoke(ctx context.Context, token Secret, kind TokenKind) error
}

// TokenKind is a token_type_hint of RFC 7009.
type TokenKind string

// The kinds of tokens that RFC 7009 knows.
const (
	AccessToken  TokenKind = "access_token"
	RefreshToken TokenKind = "refresh_token"
)

// Authorizer is an Issuer whose grants begin with a person who signs in with a
// browser (RFC 6749 section 4.1, with PKCE, RFC 7636). Its methods may be called
// from several goroutines; their errors are *IssueErrors.
type Authorizer interface {
	// AuthorizationURL is where the person signs in. It makes no request but
	// for the server's metadata, where those are not known yet.
	AuthorizationURL(ctx context.Context, r AuthorizationRequest) (string, error)
	// CheckIssuer compares the iss that came back beside the code (RFC 9207;
	// empty if none did) with the server's. It makes no request but for the
	// server's metadata, where those are not known yet. A sign-in that is
	// RequestRejected was answered by another server.
	CheckIssuer(ctx context.Context, iss string) error
	// Exchange makes one request that spends the code, over a connection of its
	// own: nothing but its time-out ends it once its first byte was written. A
	// code that the server refuses is GrantDead.
	Exchange(ctx context.Context, r CodeExchange) (*Grant, error)
	// RedirectURL is where the browser comes back to.
	RedirectURL() string
}

// AuthorizationRequest is what begins a sign-in, beyond what the profile fixes.
type AuthorizationRequest struct {
	// State comes back with the code.
	State string
	// Challenge is the code_challenge, by S256.
	Challenge string
}

// CodeExchange is what ends a sign-in.
type CodeExchange struct {
	Code, Verifier Secret
}

// Account is whose consent a grant is, as far as the server says.
type Account struct {
	// Subject is the account's id at its issuer; empty if nobody knows.
	Subject string `json:"subject,omitempty"`
	// Name is what people call it: an e-mail address, a user name, the server's
	// id where it tells no other. It is the server's text, of 256 characters at
	// most.
	Name string `json:"name,omitempty"`
}

// Grant is a token endpoint's successful answer (RFC 6749 section 5.1).
type Grant struct {
	AccessToken Secret
	// TokenType in canonical case; "Bearer" when the server sent none.
	TokenType string
	// Lifetime as the server stated it, counted from before the request was
	// sent. Zero means that it stated none.
	Lifetime time.Duration
	// Scopes that were granted; nil means as requested.
	Scopes []string
	// RefreshToken is empty when none came; the one in hand then stays valid.
	RefreshToken Secret
	// IDToken is empty when none came.
	IDToken Secret
	// Account is what a valid ID token says of whose grant this is.
	Account Account
}

// IssueErrorKind says what a failed attempt means for the next one.
type IssueErrorKind int

const (
	// Unavailable: the server was not reached, or it answered that it cannot
	// serve just now, or a gateway answered in its place. Try again later.
	Unavailable IssueErrorKind = iota + 1
	// Throttled: the server asks to be left alone for RetryAfter.
	Throttled
	// Malformed: a complete answer that makes no sense (HTML, no token,
	// impossible lifetime). Try again later.
	Malformed
	// Ambiguous: the request was sent and no complete answer came; the
	// server may have acted on it. Harmless for a grant that can be repeated.
	Ambiguous
	// ClientRejected: the server refuses the client (invalid_client).
	ClientRejected
	// UserRejected: the server refuses the resource owner's name or password.
	// One more attempt may lock the account.
	UserRejected
	// GrantDead: the server says that this very refresh token or code is no
	// longer good (invalid_grant).
	GrantDead
	// RequestRejected: the server knows the client and refuses what it asks
	// for (invalid_scope, unauthorized_client, ...).
	RequestRejected
)

func (k IssueErrorKind) String() string {
	switch k {
	case Unavailable:
		return "unavailable"
	case Throttled:
		return "throttled"
	case Malformed:
		return "malformed"
	case Ambiguous:
		return "ambiguous"
	case ClientRejected:
		return "client_rejected"
	case UserRejected:
		return "user_rejected"
	case GrantDead:
		return "grant_dead"
	case RequestRejected:
		return "request_rejected"
	}
	return fmt.Sprintf("IssueErrorKind(%d)", int(k))
}

// refuses reports whether the server has answered, and will answer the same
// again.
func (k IssueErrorKind) refuses() bool {
	return k == ClientRejected || k == UserRejected || k == GrantDead || k == RequestRejected
}

// IssueError is a failed attempt, classified.
type IssueError struct {
	Kind IssueErrorKind
	// Code is the OAuth error code when the server sent a registered one.
	Code string
	// Text says in public words what went wrong: lower case, no secret, no
	// part of a body that could hold one. It reaches callers and logs.
	Text string
	// RetryAfter is what the server asked for, from now; zero if nothing.
	RetryAfter time.Duration
	// Trace is the server's own id of the failure for its support, if any.
	Trace string
	// Outcome says whether the request was sent, and answered in full.
	Outcome Outcome
	// Err is the private cause. It reaches logs at debug level at most.
	Err error
}

func (e *IssueError) Error() string { return e.Text }
func (e *IssueError) Unwrap() error { return e.Err }
