package vantage

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// clientCredentials issues grants to a client in its own name (RFC 6749
// section 4.4).
type clientCredentials struct {
	client  *oauth.Client
	secrets []broker.Secret // newest first, none twice

	// current is the index of the secret to begin with. A refusal moves it on,
	// so that the next request does not repeat a refused secret; round the end
	// it begins with the newest again. Each move is from the very secret that
	// was refused, so that late news undo nothing.
	current atomic.Int64
}

// Issue implements broker.Issuer. A secret that Vantage refuses costs one more
// request, with the next secret, within the same time-out; no other failure
// does.
func (c *clientCredentials) Issue(ctx context.Context, request broker.Request) (*broker.Grant, error) {
	ctx, cancel := context.WithTimeout(ctx, c.client.Timeout())
	defer cancel()
	var refusal error
	first, n := c.current.Load(), int64(len(c.secrets))
	for k := range n {
		i := (first + k) % n
		grant, err := c.client.RequestToken(ctx, oauth.TokenRequest{
			GrantType:    broker.ClientCredentials,
			Scopes:       request.Scopes,
			ClientSecret: c.secrets[i],
		})
		if !refusesClient(err) {
			return grant, err
		}
		refusal = err
		c.current.CompareAndSwap(i, (i+1)%n)
	}
	return nil, c.refused(refusal)
}

// refusesClient reports whether err is invalid_client, which is all that can
// mean that another secret may do.
func refusesClient(err error) bool {
	var e *broker.IssueError
	return errors.As(err, &e) && e.Kind == broker.ClientRejected && e.Code == "invalid_client"
}

// refused adds what invalid_client means at Vantage.
func (c *clientCredentials) refused(err error) error {
	var e *broker.IssueError
	errors.As(err, &e)
	told := *e
	all := ""
	if n := len(c.secrets); n > 1 {
		all = fmt.Sprintf(" to each of the %d client secrets", n)
	}
	told.Text = fmt.Sprintf("%s%s; Vantage says the same of an unknown client, a wrong secret and an expired one (six months by default): "+
		"check client_id, then create a new secret in Vantage", e.Text, all)
	return &told
}
