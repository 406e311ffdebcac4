package vantage

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// administration is Vantage's API for clients and their secrets, as a profile
// reaches it. It implements broker.Administrator.
type administration struct {
	client           *oauth.Client
	base             string // up to the tenant
	tenant, clientID string
	grantType        broker.GrantType
	scopes           []string
	insecure         bool
}

func newAdministration(config Config, base string, client *oauth.Client) administration {
	return administration{
		client: client, base: base + "/api/adminapi2/v2/tenants/", tenant: config.TenantID, clientID: config.ClientID,
		grantType: config.GrantType, scopes: config.Scopes, insecure: config.AllowInsecureHTTP,
	}
}

// Tenant implements broker.Administrator.
func (a administration) Tenant() string { return a.tenant }

// ClientID implements broker.Administrator.
func (a administration) ClientID() string { return a.clientID }

// newClient is a client as the API reads it. Every field is sent, so that what is
// created does not depend on defaults that may change.
type newClient struct {
	ClientID                         string   `json:"clientId"`
	ClientName                       string   `json:"clientName"`
	AllowOfflineAccess               bool     `json:"allowOfflineAccess"`
	AllowRememberConsent             bool     `json:"allowRememberConsent"`
	BackChannelLogoutSessionRequired bool     `json:"backChannelLogoutSessionRequired"`
	RequireClientSecret              bool     `json:"requireClientSecret"`
	RequireConsent                   bool     `json:"requireConsent"`
	AllowNoPKCE                      bool     `json:"allowNoPkce"`
	AllowedGrantTypes                []string `json:"allowedGrantTypes"`
	AllowedCORSOrigins               []string `json:"allowedCorsOrigins"`
	AllowedScopes                    []string `json:"allowedScopes"`
	PostLogoutRedirectURIs           []string `json:"postLogoutRedirectUris"`
	RedirectURIs                     []string `json:"redirectUris"`
	AccessTokenLifetime              int64    `json:"accessTokenLifetime"`  // seconds
	RefreshTokenLifetime             int64    `json:"refreshTokenLifetime"` // seconds
}

// CreateClient implements broker.Administrator.
func (a administration) CreateClient(ctx context.Context, token broker.Secret, spec broker.ClientSpec) error {
	to, err := a.url(spec.TenantID, "clients")
	if err != nil {
		return err
	}
	_, err = a.post(ctx, to, token, newClient{
		ClientID:                         spec.ClientID,
		ClientName:                       spec.ClientName,
		AllowOfflineAccess:               spec.AllowOfflineAccess,
		AllowRememberConsent:             spec.AllowRememberConsent,
		BackChannelLogoutSessionRequired: spec.BackChannelLogoutSessionRequired,
		RequireClientSecret:              spec.RequireClientSecret,
		RequireConsent:                   spec.RequireConsent,
		AllowNoPKCE:                      spec.AllowNoPKCE,
		AllowedGrantTypes:                spec.AllowedGrantTypes,
		AllowedCORSOrigins:               list(spec.AllowedCORSOrigins),
		AllowedScopes:                    spec.AllowedScopes,
		PostLogoutRedirectURIs:           list(spec.PostLogoutRedirectURIs),
		RedirectURIs:                     list(spec.RedirectURIs),
		AccessTokenLifetime:              int64(spec.AccessTokenLifetime / time.Second),
		RefreshTokenLifetime:             int64(spec.RefreshTokenLifetime / time.Second),
	})
	return refusedAdministration(err, fmt.Sprintf("the client %s may exist: look in Vantage before it is created again", spec.ClientID))
}

// list is never null in JSON.
func list(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

// newSecret is a secret to create as the API reads it. What is not said is
// Vantage's to decide.
type newSecret struct {
	Description string `json:"description,omitempty"`
	StartTime   string `json:"startTime,omitempty"`
	Expiration  string `json:"expiration,omitempty"`
}

// createdSecret is what the API answers.
type createdSecret struct {
	Value                 string
	StartTime, Expiration answeredTime
}

// answeredTime is zero where the answer has none that can be read: the value
// beside it is shown once, and must not be lost to that.
type answeredTime struct{ time.Time }

func (t *answeredTime) UnmarshalJSON(text []byte) error {
	var s string
	if json.Unmarshal(text, &s) != nil {
		return nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04:05"} { // the latter in UTC
		if parsed, err := time.Parse(layout, s); err == nil {
			t.Time = parsed
			break
		}
	}
	return nil
}

// CreateClientSecret implements broker.Administrator.
func (a administration) CreateClientSecret(ctx context.Context, token broker.Secret, spec broker.ClientSecretSpec) (*broker.ClientSecret, error) {
	to, err := a.url(spec.TenantID, "clients", spec.ClientID, "secrets")
	if err != nil {
		return nil, err
	}
	asked := time.Now()
	body, err := a.post(ctx, to, token, newSecret{
		Description: spec.Description, StartTime: instant(spec.Start), Expiration: instant(spec.End),
	})
	const mayExist = "a secret that nobody knows may exist"
	if err != nil {
		return nil, refusedAdministration(err, fmt.Sprintf("%s: look for it among the secrets of %s in Vantage%s", mayExist, spec.ClientID, described(spec)))
	}
	var created createdSecret
	if err := json.Unmarshal(body, &created); err != nil || created.Value == "" || strings.TrimSpace(created.Value) != created.Value {
		return nil, &broker.IssueError{
			Kind: broker.Malformed, Outcome: broker.OutcomeUnknown,
			Text: fmt.Sprintf("%s endpoint %s answered without the secret's value: a secret exists that nobody knows; remove it from %s in Vantage%s",
				role, to, spec.ClientID, described(spec)),
		}
	}
	// What the answer lacks is what was asked for, or else the documented default.
	s := &broker.ClientSecret{Value: broker.NewSecret(created.Value), Start: spec.Start, End: spec.End}
	if !created.StartTime.IsZero() {
		s.Start = created.StartTime.Time
	} else if s.Start.IsZero() {
		s.Start = asked
	}
	if !created.Expiration.IsZero() {
		s.End = created.Expiration.Time
	} else if s.End.IsZero() {
		s.End = asked.AddDate(0, 6, 0)
	}
	return s, nil
}

// described is how to find a secret among others.
func described(spec broker.ClientSecretSpec) string {
	if spec.Description == "" {
		return ""
	}
	return fmt.Sprintf(", by its description %q", spec.Description)
}

// instant is as Vantage documents it: ISO 8601 in UTC, with milliseconds.
func instant(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02T15:04:05.000Z")
}

// role is how messages call the API.
const role = "client administration"

func (a administration) post(ctx context.Context, to string, token broker.Secret, body any) ([]byte, error) {
	return a.client.PostJSON(ctx, oauth.APIRequest{Role: role, URL: to, AllowInsecureHTTP: a.insecure, Token: token, Body: body})
}

// url of a collection of a tenant. It ends in a slash, as documented.
func (a administration) url(tenant string, segments ...string) (string, error) {
	to := a.base
	for _, s := range append([]string{tenant}, segments...) {
		if s == "" || s == "." || s == ".." {
			return "", &broker.IssueError{
				Kind: broker.RequestRejected, Outcome: broker.Unsent,
				Text: fmt.Sprintf("%q is neither a tenant nor a client", s),
			}
		}
		to += url.PathEscape(s) + "/"
	}
	return to, nil
}

// refusedAdministration adds what a failure means: whose fault it is, and what it
// may have left behind.
func refusedAdministration(err error, mayExist string) error {
	var e *broker.IssueError
	switch {
	case !errors.As(err, &e):
		return err
	case e.Kind == broker.ClientRejected:
		return more(e, "; the token's owner must be a Tenant Administrator of this tenant, and the token must not have been revoked")
	case e.Outcome == broker.OutcomeUnknown:
		return more(e, "; "+mayExist)
	}
	return err
}

// Prove implements broker.Administrator. A client with the grant
// client_credentials obtains a token, which nobody gets. Any other presents a
// refresh token that cannot exist: Vantage authenticates the client before it
// looks at the grant, so that invalid_client refuses the secret, and any other
// code can only come after the secret was taken. Neither a password nor a real
// refresh token is at risk.
func (a administration) Prove(ctx context.Context, secret broker.Secret) error {
	request := oauth.TokenRequest{GrantType: broker.ClientCredentials, Scopes: a.scopes, ClientSecret: secret}
	if a.grantType != broker.ClientCredentials {
		request = oauth.TokenRequest{
			GrantType: oauth.RefreshToken, ClientSecret: secret,
			Secrets: map[string]broker.Secret{"refresh_token": broker.NewSecret(rand.Text())},
		}
	}
	_, err := a.client.RequestToken(ctx, request)
	var e *broker.IssueError
	if errors.As(err, &e) && e.Outcome == broker.Answered && (e.Kind == broker.GrantDead || e.Kind == broker.RequestRejected) {
		return nil
	}
	return err
}

// more is e with more to say.
func more(e *broker.IssueError, text string) error {
	told := *e
	told.Text += text
	return &told
}
