package broker

import (
	"context"
	"errors"
	"time"
)

// SignIn is a person's sign-in under way.
type SignIn struct {
	// URL to open in a browser.
	URL string
	// State that the browser brings back.
	State string
	// Expires is when it is too late to come back.
	Expires time.Time
}

// Callback is what the browser brought back.
type Callback struct {
	State string
	Code  Secret
	// Issuer is the parameter iss (RFC 9207); empty if it was not there.
	Issuer string
	// Path of the URL that it came back to; empty is any. It must be that of
	// the profile's redirect URL.
	Path string
	// Browser is what the sign-in was bound to when it was started.
	Browser Secret
	// ReplaceAccount has the new grant replace a working one of another
	// account without asking.
	ReplaceAccount bool
	// Allowed reports whether whoever brings it may complete a sign-in for the
	// profile; nil is yes. A sign-in for another one is UNKNOWN to them.
	Allowed func(profile string) bool
}

// Completion is how a sign-in ended.
type Completion struct {
	Profile string
	// Account that has signed in.
	Account Account
	// Ticket is empty when the grant is in use. Otherwise the profile works
	// with a grant of another account, Previous: Confirm or Abandon, within
	// ten minutes.
	Ticket   string
	Previous Account
}

var errNotBuilt = errors.New("not built yet")

// StartAuthorization begins a sign-in for a profile, which only the holder of
// browser can complete unless that is empty. The error is an *Error or ctx's.
func (b *Broker) StartAuthorization(ctx context.Context, name string, browser Secret) (*SignIn, error) {
	return nil, errNotBuilt
}

// CompleteAuthorization ends a sign-in that any replica has started: it
// exchanges the code, once, and makes the grant the profile's. The error is an
// *Error or ctx's; the end of ctx cancels nothing once the code was sent.
func (b *Broker) CompleteAuthorization(ctx context.Context, c Callback) (*Completion, error) {
	return nil, errNotBuilt
}

// RefuseAuthorization ends a sign-in to which the authorization server answered
// with an error instead of a code (RFC 6749 section 4.1.2.1). It returns the
// profile that the sign-in was for.
func (b *Broker) RefuseAuthorization(ctx context.Context, c Callback) (profile string, err error) {
	return "", errNotBuilt
}

// ConfirmAuthorization makes the grant that a ticket stands for the profile's.
// Allowed is as in Callback.
func (b *Broker) ConfirmAuthorization(ctx context.Context, ticket string, allowed func(profile string) bool) (*Completion, error) {
	return nil, errNotBuilt
}

// AbandonAuthorization gives the grant up that a ticket stands for, and has the
// server revoke it where it can.
func (b *Broker) AbandonAuthorization(ctx context.Context, ticket string, allowed func(profile string) bool) (*Completion, error) {
	return nil, errNotBuilt
}
