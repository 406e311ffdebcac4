package oauth

import (
	"context"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// authorizer implements broker.Authorizer for an issuer.
type authorizer struct {
	of              *issuer
	redirectURL     string
	expectedIssuers []string
	parameters      url.Values // of the authorization request
	scopeWithCode   bool
}

func newAuthorizer(config ProfileConfig, of *issuer) *authorizer {
	if config.GrantType != broker.AuthorizationCode {
		return nil
	}
	return &authorizer{
		of:              of,
		redirectURL:     config.RedirectURL,
		expectedIssuers: slices.Clone(config.ExpectedIssuers),
		parameters:      merged(config.SignInParameters, config.target()),
		scopeWithCode:   config.ScopeWithCode,
	}
}

// RedirectURL implements broker.Authorizer.
func (a *authorizer) RedirectURL() string { return a.redirectURL }

// AuthorizationURL implements broker.Authorizer (RFC 6749 section 4.1.1, RFC 7636
// section 4.3).
func (a *authorizer) AuthorizationURL(ctx context.Context, r broker.AuthorizationRequest) (string, error) {
	at, failure := a.locate(ctx)
	if failure != nil {
		return "", failure
	}
	if at.authorization.url == nil {
		return "", &broker.IssueError{
			Kind:    broker.Unavailable,
			Text:    "the metadata of " + a.of.client.Endpoint() + " name no authorization_endpoint: check issuer, or set token_url and authorization_url instead",
			Outcome: broker.Unsent,
		}
	}
	query := maps.Clone(a.parameters)
	query.Set("client_id", a.of.client.clientID)
	query.Set("redirect_uri", a.redirectURL)
	query.Set("response_type", "code")
	query.Set("state", r.State)
	query.Set("code_challenge", r.Challenge)
	query.Set("code_challenge_method", "S256")
	if len(a.of.scopes) > 0 {
		query.Set("scope", strings.Join(a.of.scopes, " "))
	}
	// %20 is the blank to every server, the plus sign only to those that take
	// the query for a form.
	u := *at.authorization.url
	own := strings.ReplaceAll(query.Encode(), "+", "%20")
	u.RawQuery = strings.TrimPrefix(u.RawQuery+"&"+own, "&")
	return u.String(), nil
}

// CheckIssuer implements broker.Authorizer (RFC 9207 section 2.4).
func (a *authorizer) CheckIssuer(ctx context.Context, iss string) error {
	at, failure := a.locate(ctx)
	if failure != nil {
		return failure
	}
	expected := a.expectedIssuers
	if at.issuer != "" {
		expected = []string{at.issuer}
	}
	var flaw string
	switch {
	case iss == "" && at.namesIssuer:
		flaw = "names no issuer, although " + at.issuer + " announces that its responses do"
	case iss == "" || slices.Contains(expected, iss):
		return nil
	case len(expected) == 0:
		flaw = "names an issuer, and none is known to compare it with: set issuer instead of token_url"
	default:
		flaw = "names another issuer than " + strings.Join(expected, " or ")
	}
	return &broker.IssueError{
		Kind:    broker.RequestRejected,
		Text:    "the response to the sign-in " + flaw,
		Outcome: broker.Unsent,
	}
}

// Exchange implements broker.Authorizer (RFC 6749 section 4.1.3).
func (a *authorizer) Exchange(ctx context.Context, r broker.CodeExchange) (*broker.Grant, error) {
	asked := TokenRequest{
		GrantType:  broker.AuthorizationCode,
		Parameters: url.Values{"redirect_uri": {a.redirectURL}},
		Secrets:    map[string]broker.Secret{"code": r.Code, "code_verifier": r.Verifier},
		OneTime:    true,
	}
	if a.scopeWithCode {
		asked.Scopes = a.of.scopes
	}
	grant, err := a.of.request(ctx, asked)
	if err != nil {
		return nil, err
	}
	claims, err := readIDToken(grant.IDToken)
	if err != nil {
		return grant, nil // nobody has to send one
	}
	at, failure := a.locate(ctx)
	if failure != nil {
		return nil, failure
	}
	if flaw := claims.mismatch(at.issuer, a.of.client.clientID); flaw != "" {
		return nil, &broker.IssueError{
			Kind:    broker.Malformed,
			Text:    fmt.Sprintf("%s answered with an ID token that %s: check client_id and issuer", at.token, flaw),
			Outcome: broker.Answered,
		}
	}
	grant.Account = claims.account(time.Now())
	return grant, nil
}

// locate finds out where the server is, within the client's time-out.
func (a *authorizer) locate(ctx context.Context) (*endpoints, *broker.IssueError) {
	ctx, cancel := context.WithTimeout(ctx, a.of.client.timeout)
	defer cancel()
	return a.of.client.endpoints(ctx)
}
