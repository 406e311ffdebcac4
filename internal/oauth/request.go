package oauth

import (
	"context"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// RefreshToken is the grant type that spends a refresh token (RFC 6749 section
// 6). No profile is of this type: it follows from another one's grant.
const RefreshToken broker.GrantType = "refresh_token"

// TokenRequest is what one token request says beyond who the client is.
//
// A one-time request spends what works only once: a refresh token, a code. If
// its answer is lost, so may be what was spent, and if it is sent twice, the
// server may take it for theft. So it has a connection of its own, and once its
// first byte was written, the end of the context does nothing: only the timeout
// ends it. When that is over, what the server has answered by then is still
// read, even if this process stood still meanwhile, which takes 300 ms at the
// most. What is not sent by then never is.
type TokenRequest struct {
	// GrantType is sent as grant_type, and decides what an invalid_grant
	// condemns. Required.
	GrantType broker.GrantType
	// Scopes are sent joined by blanks, in this order; none sends no scope.
	Scopes []string
	// ClientSecret authenticates the client, for this attempt only: the
	// secrets of a client change while the Client lives.
	ClientSecret broker.Secret
	// Parameters are what the grant needs beyond that and may be shown:
	// redirect_uri, audience, resource. Empty values are not sent (RFC 6749
	// section 3.2), nor are the names that other fields stand for.
	Parameters url.Values
	// Secrets are the parameters that must never be shown: username, password,
	// code, code_verifier, refresh_token. They are sent as
	// Parameters are, and kept out of every error.
	Secrets map[string]broker.Secret
	// Timeout bounds this request instead of the client's; zero is the
	// client's.
	Timeout time.Duration
	// OneTime makes it a one-time request.
	OneTime bool
	// Clear, if not nil, is asked right before the first byte of a one-time
	// request is written. An error keeps the request from being sent and is the
	// cause of the failure. It may be called from another goroutine.
	Clear func() error

	// assertion authenticates the client in place of a secret. Each attempt
	// makes its own.
	assertion broker.Secret
}

// ownParameters have their own fields, so that no request says them twice
// (RFC 6749 section 3.2) or authenticates in two ways (section 2.3).
var ownParameters = []string{"grant_type", "scope", "client_id", "client_secret", "client_assertion_type", "client_assertion"}

// newHTTPRequest puts request on the wire's terms.
func (c *Client) newHTTPRequest(ctx context.Context, to *url.URL, request TokenRequest) *http.Request {
	body := c.form(request).Encode()
	h := (&http.Request{
		Method:        http.MethodPost,
		URL:           to,
		Host:          to.Host,
		Body:          readCloser(body),
		ContentLength: int64(len(body)),
		Header: http.Header{
			"Content-Type": {"application/x-www-form-urlencoded"},
			"Accept":       {"application/json"},
			// A compressed answer could be a bomb. Saying nothing would
			// leave the choice to the server (RFC 9110 section 12.5.3).
			"Accept-Encoding": {"identity"},
			"User-Agent":      {c.userAgent},
		},
	}).WithContext(ctx)
	if c.auth == ClientSecretBasic {
		h.SetBasicAuth(basicHalves(c.clientID, request.ClientSecret))
	}
	// There is no GetBody and no Idempotency-Key: with either, net/http would
	// send the request again by itself when a connection breaks.
	return h
}

func (c *Client) form(request TokenRequest) url.Values {
	form := url.Values{}
	for name, values := range request.Parameters {
		for _, v := range values {
			addPresent(form, name, v)
		}
	}
	for name, secret := range request.Secrets {
		addPresent(form, name, secret.Reveal())
	}
	for _, name := range ownParameters {
		form.Del(name)
	}
	addPresent(form, "grant_type", string(request.GrantType))
	addPresent(form, "scope", strings.Join(request.Scopes, " "))
	switch c.auth {
	case ClientSecretBasic:
		return form
	case ClientSecretPost:
		addPresent(form, "client_secret", request.ClientSecret.Reveal())
	case PrivateKeyJWT:
		addPresent(form, "client_assertion_type", assertionType)
		addPresent(form, "client_assertion", request.assertion.Reveal())
	}
	addPresent(form, "client_id", c.clientID)
	return form
}

func addPresent(form url.Values, name, value string) {
	if value != "" {
		form.Add(name, value)
	}
}

// basicHalves are the user name and password of HTTP Basic: each half is
// form-encoded before they are joined (RFC 6749 section 2.3.1).
func basicHalves(clientID string, secret broker.Secret) (user, password string) {
	return basicEncode(clientID), basicEncode(secret.Reveal())
}

// basicEncode form-encodes with %20 for the blank: servers that decode only
// percent signs read it as well as those that know the plus sign.
func basicEncode(s string) string {
	return strings.ReplaceAll(url.QueryEscape(s), "+", "%20")
}
