// Package oauth speaks to token endpoints (RFC 6749 section 3.2): it makes one
// token request and says what came of it, as a grant or as a classified error.
// It speaks to revocation endpoints (RFC 7009) in the same way. On top of that
// stand the profiles of any OAuth 2.0 server: see [NewProfile].
//
// What makes a token request hard is not sending a form. It is knowing what a
// failure means for the next attempt: was the request sent at all, was it the
// authorization server that answered or a gateway in front of it, is the client
// refused or only busy. So every attempt ends as one of the kinds of
// [broker.IssueError], and the doubtful ones never as a verdict: only an error
// code that the standards register, in a complete answer, condemns a credential.
//
// Callers may rely on this:
//
//   - A request is written at most once. Nothing is retried, no redirect is
//     followed, no second way to authenticate the client is tried.
//   - It ends within the client's timeout and when its context ends, whatever
//     the other side does. Only a one-time request outlives its context; see
//     [TokenRequest].
//   - Where endpoints are discovered, that happens before, within the same time,
//     and without any credentials. What a server says of another issuer than the
//     one that is configured is not used.
//   - Neither a secret that was sent nor a token that came back is in an error.
//     The package does not log.
package oauth

import (
	"cmp"
	"context"
	"errors"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

const (
	defaultTimeout   = 10 * time.Second
	defaultUserAgent = "tokenbroker"
)

// Client makes requests to one server as one client. It is immutable and may be
// used from several goroutines.
type Client struct {
	fixed     *endpoints // nil when they are discovered
	discovery *discovery // nil when they are not
	clientID  string
	auth      ClientAuth
	assertion *assertion // nil unless auth is PrivateKeyJWT
	// unauthorizedRefuses is as in ProfileConfig.
	unauthorizedRefuses bool
	timeout             time.Duration
	userAgent           string
	transport           *Transport
}

// endpoint is where a request goes. Its string is how messages call it.
type endpoint struct {
	role string
	url  *url.URL
}

func (e endpoint) String() string { return e.role + " endpoint " + shown(e.url) }

// endpoints are a server's. The URLs of those that it does not have are nil.
type endpoints struct {
	authorization, token, revocation endpoint
	// issuer is how the server calls itself; empty if nobody knows.
	issuer string
	// namesIssuer says that iss comes beside each code (RFC 9207).
	namesIssuer bool
}

// NewClient returns a Client for the server and the client that config
// describes. It makes no connection: an endpoint that is down does not matter
// here. The error tells every mistake.
func NewClient(config ProfileConfig) (*Client, error) {
	c := &Client{
		clientID:            config.ClientID,
		auth:                config.ClientAuth,
		unauthorizedRefuses: config.UnauthorizedRefuses,
		timeout:             orDefault(config.Timeout, defaultTimeout),
		userAgent:           cmp.Or(config.UserAgent, defaultUserAgent),
		transport:           config.Transport,
	}
	if c.transport == nil {
		c.transport = NewTransport(TransportConfig{})
	}
	err := errors.Join(c.locate(config), checkClientID(config.ClientID), c.authenticate(config))
	if err != nil {
		return nil, err
	}
	return c, nil
}

// locate finds out where the endpoints are, or will be found.
func (c *Client) locate(config ProfileConfig) error {
	if config.Issuer != "" {
		if config.TokenURL != "" || config.AuthorizationURL != "" || config.RevocationURL != "" {
			return errors.New("issuer excludes token_url, authorization_url and revocation_url: keep the issuer, from which they are discovered, or the URLs")
		}
		issuer, err := parseEndpoint("issuer", "issuer", config.Issuer, config.AllowInsecureHTTP)
		if err != nil {
			return err
		}
		if issuer.url.RawQuery != "" {
			return errors.New("issuer has a query (?...): remove it")
		}
		c.discovery = c.transport.discovery(config.Issuer, issuer.url, config.AllowInsecureHTTP)
		return nil
	}
	c.fixed = &endpoints{}
	var errs []error
	for _, e := range []struct {
		to        *endpoint
		role, raw string
	}{
		{&c.fixed.token, "token", config.TokenURL},
		{&c.fixed.authorization, "authorization", config.AuthorizationURL},
		{&c.fixed.revocation, "revocation", config.RevocationURL},
	} {
		if e.raw == "" && e.role != "token" {
			continue
		}
		parsed, err := parseEndpoint(e.role, e.role+"_url", e.raw, config.AllowInsecureHTTP)
		*e.to, errs = parsed, append(errs, err)
	}
	return errors.Join(errs...)
}

// Endpoint is the token endpoint as messages show it, without its query and in
// one spelling however it was configured; the issuer where it is discovered.
func (c *Client) Endpoint() string {
	if c.discovery != nil {
		return c.discovery.name
	}
	return shown(c.fixed.token.url)
}

// Timeout bounds one request.
func (c *Client) Timeout() time.Duration { return c.timeout }

// endpoints are those that are configured, or discovered by now.
func (c *Client) endpoints(ctx context.Context) (*endpoints, *broker.IssueError) {
	if c.fixed != nil {
		return c.fixed, nil
	}
	m, failure := c.discovery.metadata(ctx, c)
	switch {
	case failure != nil:
		return nil, failure
	case c.auth == TLSClientAuth:
		return &m.mtls, nil
	}
	return &m.plain, nil
}

// RequestToken makes one token request. The error is always a
// *[broker.IssueError].
func (c *Client) RequestToken(ctx context.Context, request TokenRequest) (*broker.Grant, error) {
	a := newAttempt(ctx, c, request)
	if failure := a.locate(ctx); failure != nil {
		return nil, failure
	}
	a.endpoint = a.at.token
	answer, failure := a.ask(ctx)
	if failure != nil {
		return nil, failure
	}
	grant, failure := a.judge(answer)
	if failure != nil {
		return nil, failure
	}
	return grant, nil
}

// parseEndpoint reads an endpoint's URL, which stands under name. Its errors
// repeat nothing of what may hide a password.
func parseEndpoint(role, name, raw string, allowInsecureHTTP bool) (endpoint, error) {
	u, err := url.Parse(raw)
	var flaw string
	switch {
	case raw == "":
		flaw = "is missing"
	case err != nil || u.Hostname() == "" || u.Opaque != "":
		flaw = "is not an absolute URL such as https://id.example.com/" + role
	case u.User != nil:
		flaw = "holds a user name: remove it, credentials are sent another way"
	case u.Fragment != "":
		flaw = "has a fragment (#...): remove it"
	case u.Query().Has("client_secret"):
		flaw = "holds a client_secret: remove it, and replace that secret since URLs are logged everywhere"
	case u.Scheme == "http" && !allowInsecureHTTP && !IsLoopback(u.Hostname()):
		flaw = shown(u) + " would send secrets in clear: use https://, or set allow_insecure_http if that is meant"
	case u.Scheme != "http" && u.Scheme != "https":
		flaw = "starts with neither https:// nor http://"
	}
	if flaw != "" {
		return endpoint{}, errors.New(name + " " + flaw)
	}
	u.Host = canonicalHost(u)
	return endpoint{role, u}, nil
}

// canonicalHost drops what does not distinguish two hosts: case, and the port
// that the scheme implies.
func canonicalHost(u *url.URL) string {
	host, port := strings.ToLower(u.Hostname()), u.Port()
	if port != "" && port != map[string]string{"http": "80", "https": "443"}[u.Scheme] {
		return net.JoinHostPort(host, port)
	}
	if strings.Contains(host, ":") {
		return "[" + host + "]"
	}
	return host
}

// IsLoopback reports whether a URL's host is a loopback one: nobody else can
// listen in on the way to it.
func IsLoopback(host string) bool {
	address, err := netip.ParseAddr(host)
	return strings.EqualFold(host, "localhost") || err == nil && address.Unmap().IsLoopback()
}

func checkClientID(id string) error {
	switch {
	case id == "":
		return errors.New("client_id is missing")
	case !isVSCHAR(id) || strings.TrimSpace(id) != id:
		return errors.New("client_id has blanks around it, or characters that no client ID can have (RFC 6749 appendix A.1)")
	}
	return nil
}

// shown is a URL as messages show it: a query or a user name may be secret.
func shown(u *url.URL) string {
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}).String()
}
