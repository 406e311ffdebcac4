package broker

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Administrator is an Issuer whose server has clients and secrets created
// through an API. Each method makes one request, which is never repeated: when
// its answer is lost, what was asked for may exist. Errors are *IssueErrors,
// ClientRejected when the token's owner may not do it, RequestRejected when the
// server refuses the values.
type Administrator interface {
	// CreateClient creates a client. It has no secret yet.
	CreateClient(ctx context.Context, token Secret, spec ClientSpec) error
	// CreateClientSecret creates one more secret for a client.
	CreateClientSecret(ctx context.Context, token Secret, spec ClientSecretSpec) (*ClientSecret, error)
	// Prove makes one token request that authenticates the client with this
	// secret alone. Nil means that the server takes it. It spends nothing that
	// could be missed: no refresh token, no attempt with a password.
	Prove(ctx context.Context, secret Secret) error
	// Tenant that a spec without one means; empty if there is none.
	Tenant() string
	// ClientID of the profile's own client.
	ClientID() string
}

// ClientSpec describes a client to create, in Vantage's words.
type ClientSpec struct {
	TenantID                         string
	ClientID, ClientName             string
	AllowedGrantTypes                []string
	AllowedScopes                    []string
	RedirectURIs                     []string
	PostLogoutRedirectURIs           []string
	AllowedCORSOrigins               []string
	AllowOfflineAccess               bool
	AllowRememberConsent             bool
	BackChannelLogoutSessionRequired bool
	RequireClientSecret              bool
	RequireConsent                   bool
	AllowNoPKCE                      bool
	AccessTokenLifetime              time.Duration
	RefreshTokenLifetime             time.Duration
}

// ClientSecretSpec describes a secret to create.
type ClientSecretSpec struct {
	TenantID, ClientID string
	Description        string
	// Start and End are zero where the server decides.
	Start, End time.Time
}

// ClientSecret is one that was created.
type ClientSecret struct {
	Value      Secret
	Start, End time.Time
}

// SecretRotation says when and how a profile's client secret is renewed.
type SecretRotation struct {
	// Before its end the secret is renewed.
	Before time.Duration
	// Lifetime of a new secret; zero leaves it to the server.
	Lifetime time.Duration
	// AdminProfile is whose token authorizes that; empty is the profile's own.
	AdminProfile string
	// With returns the profile as it is with these client secrets, newest
	// first, before its own.
	With func(secrets []Secret) (*Profile, error)
}

// CreateClient has the server of a profile create a client, by the right of the
// profile's token. An empty TenantID is the profile's. It returns the tenant. The
// error is an *Error or ctx's; the end of ctx cancels nothing once the request is
// made.
func (b *Broker) CreateClient(ctx context.Context, name string, spec ClientSpec) (tenant string, err error) {
	admin, err := b.administrator(name, &spec.TenantID)
	if err != nil {
		return "", err
	}
	tried := fmt.Sprintf("creating client %s with the token of profile %s", spec.ClientID, name)
	token, _, err := b.Issue(ctx, name, nil, Demand{})
	if err != nil {
		return "", err
	}
	if err := admin.CreateClient(context.WithoutCancel(ctx), token.Access, spec); err != nil {
		return "", b.administrationFailed(name, tried, err)
	}
	b.log.Info("client created", "profile", name, "tenant_id", spec.TenantID, "client_id", spec.ClientID)
	return spec.TenantID, nil
}

// administrator is whom a profile's token makes one, for a tenant. An empty
// tenant becomes the profile's.
func (b *Broker) administrator(name string, tenant *string) (Administrator, error) {
	p, err := b.profile(name)
	if err != nil {
		return nil, err
	}
	admin, ok := p.Issuer.(Administrator)
	if !ok {
		return nil, &Error{
			Reason: ReasonInvalidRequest, Field: "profile",
			Text: fmt.Sprintf("profile %s is one of %s, whose clients cannot be administered from here; name a profile of Vantage", name, p.Provider),
		}
	}
	if *tenant == "" {
		*tenant = admin.Tenant()
	}
	if *tenant == "" {
		return nil, &Error{
			Reason: ReasonInvalidRequest, Field: "tenant_id",
			Text: fmt.Sprintf("no tenant is known: profile %s has no tenant_id, so the request must", name),
		}
	}
	return admin, nil
}

// createSecret makes the one request that creates a secret, by the right of the
// token of the profile with this name. Whatever becomes of ctx, its answer is
// awaited.
func (b *Broker) createSecret(ctx context.Context, name string, admin Administrator, spec ClientSecretSpec) (*ClientSecret, error) {
	token, _, err := b.Issue(ctx, name, nil, Demand{})
	if err != nil {
		return nil, err
	}
	s, err := admin.CreateClientSecret(context.WithoutCancel(ctx), token.Access, spec)
	if err != nil {
		return nil, b.administrationFailed(name, fmt.Sprintf("creating a secret for client %s with the token of profile %s", spec.ClientID, name), err)
	}
	b.log.Info("client secret created", "profile", name, "tenant_id", spec.TenantID, "client_id", spec.ClientID, "description", spec.Description, "end", s.End)
	return s, nil
}

// administrationFailed puts a failure of the administration into a caller's
// words. Nothing of it is remembered: nobody repeats such a request by itself.
func (b *Broker) administrationFailed(name, tried string, err error) *Error {
	var issueErr *IssueError
	if !errors.As(err, &issueErr) {
		issueErr = &IssueError{Kind: Unavailable, Text: "the request could not be made", Err: err}
	}
	e := &Error{Reason: ReasonEndpointUnavailable, Text: tried + ": " + issueErr.Text, Code: issueErr.Code, RetryAfter: issueErr.RetryAfter, Err: err}
	switch issueErr.Kind {
	case ClientRejected:
		e.Reason = ReasonCredentialsRejected
	case RequestRejected:
		e.Reason = ReasonInvalidRequest
	case Throttled:
		e.Reason = ReasonEndpointThrottled
	}
	if issueErr.Outcome == OutcomeUnknown { // what was asked for may exist: nothing invites to repeat it
		e.RetryAfter = 0
	}
	b.log.Warn("client administration failed", "profile", name, "outcome", issueErr.Kind.String(), "error", e.Text)
	return e
}

// Delivery is where a new secret's value went.
type Delivery int

// Where secrets go.
const (
	// ToCaller: into the answer, this once.
	ToCaller Delivery = iota + 1
	// ToStore: into the store, sealed, from where every replica reads it.
	ToStore
	// ToFile: into the file that the profile reads it from.
	ToFile
)

// CreateClientSecret creates one more secret, by the right of the profile's
// token. Its value goes to where the profile deliverTo reads it, and is not
// returned then; it is returned if that is empty. The error is an *Error or
// ctx's; the end of ctx cancels nothing once the request is made.
func (b *Broker) CreateClientSecret(ctx context.Context, name string, spec ClientSecretSpec, deliverTo string) (*ClientSecret, Delivery, error) {
	admin, err := b.administrator(name, &spec.TenantID)
	if err != nil {
		return nil, 0, err
	}
	if err := spec.check(); err != nil {
		return nil, 0, err
	}
	s, err := b.createSecret(ctx, name, admin, spec)
	return s, ToCaller, err
}

// Secrets live for a day at the least.
const leastSecretLife = 24 * time.Hour

// check refuses what Vantage would, as far as it is not the schema's to say.
func (s ClientSecretSpec) check() error {
	if !s.Start.IsZero() && !s.End.IsZero() && s.End.Sub(s.Start) < leastSecretLife {
		return &Error{
			Reason: ReasonInvalidRequest, Field: "expire_time",
			Text: "expire_time is less than 1 day after start_time; secrets live between 1 day and 3 years",
		}
	}
	return nil
}
