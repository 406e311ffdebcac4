package oauth

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"sync/atomic"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// offlineAccess is the scope that brings refresh tokens where a server wants to
// be asked for them (OpenID Connect Core section 11).
const offlineAccess = "offline_access"

// issuer speaks for one profile. It implements broker.Issuer; see capable for
// the rest.
type issuer struct {
	client             *Client
	grantType          broker.GrantType
	scopes             []string // the profile's
	scopeWithRefresh   bool
	username, password broker.Secret
	parameters         url.Values      // of every token request
	secrets            []broker.Secret // newest first, none twice; an empty one where the client proves itself otherwise
	explain            func(*broker.IssueError) string

	// current is the index of the secret to begin with. A refusal moves it on,
	// so that the next request does not repeat a refused secret; round the end
	// it begins with the newest again. Each move is from the very secret that
	// was refused, so that late news undo nothing.
	current atomic.Int64
}

func newIssuer(config ProfileConfig, client *Client) *issuer {
	i := &issuer{
		client:           client,
		grantType:        config.GrantType,
		scopes:           slices.Clone(config.Scopes),
		scopeWithRefresh: config.ScopeWithRefresh,
		username:         config.Username,
		password:         config.Password,
		parameters:       config.target(),
		secrets:          distinct(config.ClientSecrets),
		explain:          config.Explain,
	}
	if config.ClientAuth.hasKey() {
		i.secrets = []broker.Secret{{}}
	}
	for name, value := range config.Extra {
		i.parameters.Set(name, value)
	}
	return i
}

// target is what tokens are for.
func (c ProfileConfig) target() url.Values {
	target := url.Values{}
	addPresent(target, "audience", c.Audience)
	for _, r := range c.Resource {
		addPresent(target, "resource", r)
	}
	return target
}

// capable is i with those of broker.Revoker and broker.Authorizer that it is to
// be.
func (i *issuer) capable(revokes bool, signIn *authorizer) broker.Issuer {
	switch {
	case revokes && signIn != nil:
		return struct {
			*issuer
			revoker
			*authorizer
		}{i, revoker{i}, signIn}
	case signIn != nil:
		return struct {
			*issuer
			*authorizer
		}{i, signIn}
	case revokes:
		return struct {
			*issuer
			revoker
		}{i, revoker{i}}
	}
	return i
}

// Issue implements broker.Issuer. A secret that the server refuses costs one
// more request, with the next secret, within the same time-out; no other failure
// does.
func (i *issuer) Issue(ctx context.Context, request broker.Request) (*broker.Grant, error) {
	if i.grantType == broker.AuthorizationCode && request.RefreshToken.IsEmpty() {
		return nil, &broker.IssueError{
			Kind:    broker.GrantDead,
			Text:    "there is no refresh token to present: a person must sign in",
			Outcome: broker.Unsent,
		}
	}
	return i.request(ctx, i.tokenRequest(request))
}

// request makes a token request.
func (i *issuer) request(ctx context.Context, asked TokenRequest) (grant *broker.Grant, err error) {
	asked.Parameters = merged(asked.Parameters, i.parameters)
	err = i.withSecret(func(secret broker.Secret, timeout time.Duration) (err error) {
		asked.ClientSecret, asked.Timeout = secret, timeout
		grant, err = i.client.RequestToken(ctx, asked)
		return err
	})
	return grant, err
}

// tokenRequest is what the profile's grant, or a refresh token, takes.
func (i *issuer) tokenRequest(request broker.Request) TokenRequest {
	part := !sameScopes(request.Scopes, i.scopes)
	switch {
	case !request.RefreshToken.IsEmpty():
		asked := TokenRequest{
			GrantType: RefreshToken,
			Secrets:   map[string]broker.Secret{"refresh_token": request.RefreshToken},
			OneTime:   true,
			Clear:     request.Clear,
		}
		if part || i.scopeWithRefresh { // without any they stay as granted (RFC 6749 section 6)
			asked.Scopes = request.Scopes
		}
		return asked
	case i.grantType == broker.Password:
		asked := TokenRequest{
			GrantType: broker.Password,
			Scopes:    request.Scopes,
			Secrets:   map[string]broker.Secret{"username": i.username, "password": i.password},
		}
		if part { // a refresh token for a part must not take the place of that for all
			asked.Scopes = without(request.Scopes, offlineAccess)
		}
		return asked
	}
	return TokenRequest{GrantType: i.grantType, Scopes: request.Scopes}
}

// withSecret makes a request with the client's current secret, and again with
// the next one as long as the server answers that it refuses the client and the
// client's time-out leaves time.
func (i *issuer) withSecret(request func(secret broker.Secret, timeout time.Duration) error) error {
	deadline := time.Now().Add(i.client.Timeout())
	first, n := i.current.Load(), int64(len(i.secrets))
	var refusal error
	tried := int64(0)
	for ; tried < n; tried++ {
		left := time.Until(deadline)
		if left <= 0 {
			break
		}
		at := (first + tried) % n
		err := request(i.secrets[at], left)
		if !refusesSecret(err) {
			return i.explained(err)
		}
		refusal = err
		i.current.CompareAndSwap(at, (at+1)%n)
	}
	if tried > 1 {
		refusal = more(refusal, fmt.Sprintf(" to each of the %d client secrets", tried))
	}
	return i.explained(refusal)
}

// refusesSecret reports whether err is invalid_client in a complete answer,
// which is all that can mean that another secret may do.
func refusesSecret(err error) bool {
	var e *broker.IssueError
	return errors.As(err, &e) && e.Kind == broker.ClientRejected && e.Code == "invalid_client" && e.Outcome == broker.Answered
}

// explained adds what a failure means at this server.
func (i *issuer) explained(err error) error {
	var e *broker.IssueError
	if i.explain == nil || !errors.As(err, &e) {
		return err
	}
	return more(err, i.explain(e))
}

// more is err with more to say.
func more(err error, text string) error {
	var e *broker.IssueError
	if text == "" || !errors.As(err, &e) {
		return err
	}
	told := *e
	told.Text += text
	return &told
}

// revoker is an issuer whose server may revoke tokens.
type revoker struct{ of *issuer }

// Revoke implements broker.Revoker.
func (r revoker) Revoke(ctx context.Context, token broker.Secret, kind broker.TokenKind) error {
	return r.of.withSecret(func(secret broker.Secret, timeout time.Duration) error {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		return r.of.client.Revoke(ctx, token, kind, secret)
	})
}

// merged are the values of both; those of the first count where both have some.
func merged(first, second url.Values) url.Values {
	all := maps.Clone(second)
	maps.Copy(all, first)
	return all
}

// sameScopes reports whether two lists name the same scopes.
func sameScopes(a, b []string) bool {
	return !slices.ContainsFunc(a, func(s string) bool { return !slices.Contains(b, s) }) &&
		!slices.ContainsFunc(b, func(s string) bool { return !slices.Contains(a, s) })
}

func without(scopes []string, one string) []string {
	return slices.DeleteFunc(slices.Clone(scopes), func(s string) bool { return s == one })
}

// distinct drops repetitions, so that no refused secret is sent twice.
func distinct(secrets []broker.Secret) []broker.Secret {
	var d []broker.Secret
	for _, s := range secrets {
		if !slices.ContainsFunc(d, s.Equal) {
			d = append(d, s)
		}
	}
	return d
}
