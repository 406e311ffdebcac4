package broker

import (
	"context"
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
	// Tenant that a spec without one means; empty if there is none.
	Tenant() string
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
