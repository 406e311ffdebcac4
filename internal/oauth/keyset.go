package oauth

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// keySetTimeout bounds the request for a key set, its answer included.
const keySetTimeout = 10 * time.Second

// KeySet returns the JSON Web Key Set at a URL as it came, 1 MiB at the most. It
// is asked for once, within 10 seconds and ctx; no redirect is followed. What
// identifies the asker is bearer alone, which is not sent if it is empty.
//
// At must be an https:// URL, or an http:// one of a loopback host. Where nothing
// was got, the error is a *[broker.IssueError] that says why and what to do, and
// holds neither bearer nor any of the answer.
func (t *Transport) KeySet(ctx context.Context, at string, bearer broker.Secret) ([]byte, error) {
	e, err := parseEndpoint("jwks", "the URL", at, false)
	if err != nil {
		return nil, &broker.IssueError{Kind: broker.Unavailable, Text: err.Error(), Outcome: broker.Unsent}
	}
	ctx, cancel := context.WithTimeout(ctx, keySetTimeout)
	defer cancel()
	c := &Client{timeout: keySetTimeout, userAgent: defaultUserAgent, transport: t}
	a := newAttempt(ctx, c, TokenRequest{Secrets: map[string]broker.Secret{"bearer": bearer}})
	a.endpoint = e
	answer, err := a.exchange(keySetRequest(ctx, e.url, bearer), t.http)
	switch {
	case err != nil && a.stage() < sent:
		return nil, a.notSent(ctx, err)
	case err != nil:
		return nil, unlocated(e, a.cut(ctx, err, answer))
	}
	if why := answer.unfit(bearer); why != "" {
		return nil, unlocated(e, why)
	}
	return answer.body, nil
}

func keySetRequest(ctx context.Context, at *url.URL, bearer broker.Secret) *http.Request {
	r := (&http.Request{
		Method: http.MethodGet,
		URL:    at,
		Host:   at.Host,
		Header: http.Header{
			// An API server of Kubernetes answers 406 without the first one.
			"Accept":          {"application/jwk-set+json, application/json"},
			"Accept-Encoding": {"identity"},
			"User-Agent":      {defaultUserAgent},
		},
	}).WithContext(ctx)
	if !bearer.IsEmpty() {
		r.Header.Set("Authorization", "Bearer "+bearer.Reveal())
	}
	return r
}

// unfit says why the answer is no key set, as far as its frame tells; "" if it
// may be one.
func (a *answer) unfit(bearer broker.Secret) string {
	answered := fmt.Sprintf("answered %d", a.status)
	switch {
	case len(a.body) > maxBodyBytes:
		return answered + " with " + string(flawOversized)
	case a.status == http.StatusOK:
		return ""
	case a.isRedirect():
		return answered + ", a redirect, which is not followed: use the URL that it leads to"
	case a.status != http.StatusUnauthorized && a.status != http.StatusForbidden:
		return answered
	case bearer.IsEmpty():
		return answered + ": it demands a bearer token"
	}
	return answered + ": it does not take the bearer token, or whose that is may not read the keys"
}
