package broker

import (
	"context"
	"errors"
	"fmt"
	"slices"
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
	token, _, err := b.Issue(ctx, Ask{Profile: name}, Demand{})
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
		return nil, notAdministered(p.Profile)
	}
	if *tenant == "" {
		*tenant = admin.Tenant()
	}
	if *tenant == "" {
		return nil, &Error{
			Reason: ReasonInvalidRequest, Field: "tenant_id",
			Text: fmt.Sprintf("no tenant is known: set tenant_id in profile %s, or name one in the request", name),
		}
	}
	return admin, nil
}

func notAdministered(p *Profile) *Error {
	return &Error{
		Reason: ReasonInvalidRequest,
		Text:   fmt.Sprintf("profile %s is one of %s, whose clients cannot be administered from here; name a profile of Vantage", p.Name, p.Provider),
	}
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
	if deliverTo != "" {
		return b.deliverSecret(ctx, name, spec, deliverTo)
	}
	token, _, err := b.Issue(ctx, Ask{Profile: name}, Demand{})
	if err != nil {
		return nil, 0, err
	}
	s, err := admin.CreateClientSecret(context.WithoutCancel(ctx), token.Access, spec)
	if err != nil {
		return nil, 0, b.administrationFailed(name, fmt.Sprintf("creating a secret for client %s with the token of profile %s", spec.ClientID, name), err)
	}
	b.log.Info("client secret created", "profile", name, "tenant_id", spec.TenantID, "client_id", spec.ClientID, "description", spec.Description, "end", s.End)
	if err := ctx.Err(); err != nil { // whom it was for has left
		b.orphaned(name, spec)
		return nil, 0, err
	}
	return s, ToCaller, nil
}

// deliverSecret creates a secret as in a rotation of the profile's that gets it.
func (b *Broker) deliverSecret(ctx context.Context, name string, spec ClientSecretSpec, deliverTo string) (*ClientSecret, Delivery, error) {
	r, delivery, err := b.renewalFor(deliverTo, name)
	if err != nil {
		return nil, 0, err
	}
	if spec.ClientID != r.spec.ClientID || r.spec.TenantID != "" && spec.TenantID != r.spec.TenantID {
		return nil, 0, &Error{
			Reason: ReasonInvalidRequest, Field: "client_id",
			Text: fmt.Sprintf("profile %s is the client %s of tenant %q, which a secret of client %s of tenant %q is of no use to",
				deliverTo, r.spec.ClientID, r.spec.TenantID, spec.ClientID, spec.TenantID),
		}
	}
	if spec.Start.After(time.Now()) {
		return nil, 0, &Error{
			Reason: ReasonInvalidRequest, Field: "start_time",
			Text: fmt.Sprintf("a secret that is not valid yet cannot be put into use by profile %s; leave start_time out", deliverTo),
		}
	}
	r.spec = spec
	record, err := r.run(ctx)
	if err != nil {
		return nil, 0, r.toCaller(ctx, err)
	}
	return &ClientSecret{Start: record.Current.Start, End: record.Current.End}, delivery, nil
}

// Rotated is what RotateClientSecret has brought about.
type Rotated struct {
	// Start and End of the secret in use.
	Start, End time.Time
	// PreviousEnd of the one before, which is the second choice until then; zero
	// if that is not known.
	PreviousEnd time.Time
	Delivery    Delivery
}

// RotateClientSecret replaces the client secret of a profile, by the right of the
// token of the profile admin: empty is what the configuration says, or the
// profile itself. The new one ends then; zero is what the configuration says, or
// what the server decides. A rotation that was cut short is continued. The error
// is an *Error or ctx's; whatever it is, the profile goes on with a secret that
// works.
func (b *Broker) RotateClientSecret(ctx context.Context, name, admin string, end time.Time) (*Rotated, error) {
	r, delivery, err := b.renewalFor(name, admin)
	if err != nil {
		return nil, err
	}
	if !end.IsZero() {
		r.spec.End = end
	}
	before, err := r.look(ctx)
	if err != nil {
		return nil, r.toCaller(ctx, err)
	}
	r.finish = true
	r.needed = func(now secretRecord) bool { // unless another one was just put into use
		return now.Current == nil || before.Current != nil && now.Current.Value.Equal(before.Current.Value.Secret)
	}
	record, err := r.run(ctx)
	if err != nil {
		return nil, r.toCaller(ctx, err)
	}
	done := &Rotated{Start: record.Current.Start, End: record.Current.End, Delivery: delivery}
	if len(record.Previous) > 0 {
		done.PreviousEnd = record.Previous[0].End
	}
	return done, nil
}

// renewalFor prepares a renewal that somebody has asked for, if there is a place
// to put the secret.
func (b *Broker) renewalFor(name, admin string) (*renewal, Delivery, error) {
	b.configuring.Lock()
	i := slices.IndexFunc(b.configured, func(p *Profile) bool { return p.Name == name })
	if i < 0 {
		b.configuring.Unlock()
		return nil, 0, &Error{Reason: ReasonProfileUnknown, Text: fmt.Sprintf("there is no profile %q", name)}
	}
	p := b.configured[i]
	b.configuring.Unlock()
	r, err := b.renewalOf(p, admin)
	if err != nil {
		return nil, 0, err
	}
	r.patient, r.needed = true, func(secretRecord) bool { return true }
	if _, err := b.administrator(r.admin, &r.spec.TenantID); err != nil {
		return nil, 0, err
	}
	switch {
	case p.Rotation != nil:
		return r, ToStore, nil
	case p.SecretFile == "" || b.secretFiles == nil:
		return nil, 0, &Error{
			Reason: ReasonInvalidRequest,
			Text:   fmt.Sprintf("a new client secret of profile %s could not be put anywhere: set secret_rotation in its configuration, to have it in the store, or let client_secret be a file that the broker can replace", name),
		}
	}
	if err := b.secretFiles.Check(p.SecretFile); err != nil {
		return nil, 0, b.notWritable(p, err)
	}
	return r, ToFile, nil
}

func (b *Broker) notWritable(p *Profile, err error) *Error {
	return &Error{
		Reason: ReasonStoreUnavailable, Err: err,
		Text: fmt.Sprintf("putting a new client secret of profile %s into its file: %v", p.Name, err),
	}
}

// toCaller is an error of a renewal as its caller sees it.
func (r *renewal) toCaller(ctx context.Context, err error) error {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return &Error{
		Reason: ReasonStoreUnavailable, RetryAfter: time.Second, Err: err,
		Text: fmt.Sprintf("renewing the client secret of profile %s: it was cut short; the next attempt goes on with it", r.profile.Name),
	}
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
