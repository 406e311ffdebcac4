package vantage

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// issuer speaks for one profile. It implements broker.Issuer, broker.Revoker and
// broker.Administrator.
type issuer struct {
	administration
	client             *oauth.Client
	grantType          broker.GrantType
	scopes             []string // the profile's
	username, password broker.Secret
	secrets            []broker.Secret // newest first, none twice

	// current is the index of the secret to begin with. A refusal moves it on,
	// so that the next request does not repeat a refused secret; round the end
	// it begins with the newest again. Each move is from the very secret that
	// was refused, so that late news undo nothing.
	current atomic.Int64
}

func newIssuer(config Config, client *oauth.Client, secrets []broker.Secret) *issuer {
	return &issuer{
		administration: newAdministration(config, client),

		client:    client,
		grantType: config.GrantType,
		scopes:    slices.Clone(config.Scopes),
		username:  config.Username,
		password:  config.Password,
		secrets:   secrets,
	}
}

// Issue implements broker.Issuer. A secret that Vantage refuses costs one more
// request, with the next secret, within the same time-out; no other failure
// does.
func (i *issuer) Issue(ctx context.Context, request broker.Request) (grant *broker.Grant, err error) {
	err = i.withSecret(func(secret broker.Secret, timeout time.Duration) (err error) {
		asked := i.tokenRequest(request)
		asked.ClientSecret, asked.Timeout = secret, timeout
		grant, err = i.client.RequestToken(ctx, asked)
		return err
	})
	return grant, explained(err)
}

// Revoke implements broker.Revoker.
func (i *issuer) Revoke(ctx context.Context, token broker.Secret, kind broker.TokenKind) error {
	return i.withSecret(func(secret broker.Secret, timeout time.Duration) error {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		return i.client.Revoke(ctx, token, kind, secret)
	})
}

// tokenRequest is what the profile's grant, or a refresh token, takes.
func (i *issuer) tokenRequest(request broker.Request) oauth.TokenRequest {
	part := !sameScopes(request.Scopes, i.scopes)
	switch {
	case !request.RefreshToken.IsEmpty():
		asked := oauth.TokenRequest{
			GrantType: oauth.RefreshToken,
			Secrets:   map[string]broker.Secret{"refresh_token": request.RefreshToken},
			OneTime:   true,
			Clear:     request.Clear,
		}
		if part { // Vantage documents no scope here, and without any they stay as granted
			asked.Scopes = request.Scopes
		}
		return asked
	case i.grantType == broker.Password:
		asked := oauth.TokenRequest{
			GrantType: broker.Password,
			Scopes:    request.Scopes,
			Secrets:   map[string]broker.Secret{"username": i.username, "password": i.password},
		}
		if part { // a refresh token for a part must not take the place of that for all
			asked.Scopes = without(request.Scopes, offlineAccess)
		}
		return asked
	}
	return oauth.TokenRequest{GrantType: i.grantType, Scopes: request.Scopes}
}

// withSecret makes a request with the client's current secret, and again with
// the next one as long as Vantage answers that it refuses the client and the
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
		if !refusesClient(err) {
			return err
		}
		refusal = err
		i.current.CompareAndSwap(at, (at+1)%n)
	}
	return refused(refusal, tried)
}

// refusesClient reports whether err is invalid_client in a complete answer,
// which is all that can mean that another secret may do.
func refusesClient(err error) bool {
	var e *broker.IssueError
	return errors.As(err, &e) && e.Kind == broker.ClientRejected && e.Code == "invalid_client" && e.Outcome == broker.Answered
}

// refused adds what invalid_client means at Vantage.
func refused(err error, secrets int64) error {
	all := ""
	if secrets > 1 {
		all = fmt.Sprintf(" to each of the %d client secrets", secrets)
	}
	return more(err, all+"; Vantage says the same of an unknown client, a wrong secret and an expired one (six months by default): "+
		"check client_id, then create a new secret in Vantage")
}

// explained adds what a refusal of a user means at Vantage.
func explained(err error) error {
	var e *broker.IssueError
	if !errors.As(err, &e) || e.Kind != broker.UserRejected {
		return err
	}
	return more(err, "; Vantage says the same of a wrong user name or password, of a locked account, of a name with accounts in several tenants "+
		"unless tenant_id is set, and of every user in a tenant with an external identity provider, where only client_credentials works without a person")
}

// more is err with more to say.
func more(err error, text string) error {
	var e *broker.IssueError
	if !errors.As(err, &e) {
		return err
	}
	told := *e
	told.Text += text
	return &told
}

// sameScopes reports whether two lists name the same scopes.
func sameScopes(a, b []string) bool {
	return !slices.ContainsFunc(a, func(s string) bool { return !slices.Contains(b, s) }) &&
		!slices.ContainsFunc(b, func(s string) bool { return !slices.Contains(a, s) })
}

func without(scopes []string, one string) []string {
	return slices.DeleteFunc(slices.Clone(scopes), func(s string) bool { return s == one })
}
