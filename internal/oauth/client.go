// Package oauth speaks to token endpoints (RFC 6749 section 3.2): it makes one
// token request and says what came of it, as a grant or as a classified error.
// It speaks to revocation endpoints (RFC 7009) in the same way.
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
//   - Neither a secret that was sent nor a token that came back is in an error.
//     The package does not log.
package oauth

import (
	"cmp"
	"context"
	"errors"
	"fmt"
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

// ClientAuth is how the client authenticates to the token endpoint, in the
// words of OpenID Connect Core section 9.
type ClientAuth string

const (
	// ClientSecretPost puts client_id and client_secret into the form. Without
	// a secret the client_id stands alone, as public clients have it.
	ClientSecretPost ClientAuth = "client_secret_post"
	// ClientSecretBasic puts both into the Authorization header and neither
	// into the form.
	ClientSecretBasic ClientAuth = "client_secret_basic"
)

// Config says which endpoint a Client speaks to, and as whom.
type Config struct {
	// TokenURL is the token endpoint. Its query, if any, is kept. Required.
	TokenURL string
	// RevocationURL is the revocation endpoint, likewise. Empty means that the
	// server has none.
	RevocationURL string
	// ClientID as registered with the server. Required.
	ClientID string
	// ClientAuth is never guessed: trying one way and then another doubles
	// refusals and burns codes. Required.
	ClientAuth ClientAuth
	// Timeout bounds a whole request, from looking up the host to the last
	// byte of the answer. Zero means 10 seconds.
	Timeout time.Duration
	// UserAgent is sent with every request. Empty means "tokenbroker".
	UserAgent string
	// AllowInsecureHTTP admits http:// URLs of a host that is not a loopback
	// one; secrets and tokens then travel in clear.
	AllowInsecureHTTP bool
	// Transport holds the connections. Clients may share one and should; nil
	// means one of the Client's own, whose idle connections end by themselves.
	Transport *Transport
}

// Client makes requests to one server as one client. It is immutable and may be
// used from several goroutines.
type Client struct {
	token      endpoint
	revocation endpoint // its url is nil when there is none
	clientID   string
	auth       ClientAuth
	timeout    time.Duration
	userAgent  string
	transport  *Transport
}

// endpoint is where a request goes. Its string is how messages call it.
type endpoint struct {
	role string
	url  *url.URL
}

func (e endpoint) String() string { return e.role + " endpoint " + shown(e.url) }

// NewClient checks config and returns a Client for it. It makes no connection:
// an endpoint that is down does not matter here. The error tells every mistake.
func NewClient(config Config) (*Client, error) {
	token, err := parseEndpoint("token", config.TokenURL, config.AllowInsecureHTTP)
	var revocation endpoint
	var revocationErr error
	if config.RevocationURL != "" {
		revocation, revocationErr = parseEndpoint("revocation", config.RevocationURL, config.AllowInsecureHTTP)
	}
	err = errors.Join(err, revocationErr, checkClientID(config.ClientID), checkClientAuth(config.ClientAuth))
	if err != nil {
		return nil, err
	}
	c := &Client{
		token:      token,
		revocation: revocation,
		clientID:   config.ClientID,
		auth:       config.ClientAuth,
		timeout:    orDefault(config.Timeout, defaultTimeout),
		userAgent:  cmp.Or(config.UserAgent, defaultUserAgent),
		transport:  config.Transport,
	}
	if c.transport == nil {
		c.transport = NewTransport(TransportConfig{})
	}
	return c, nil
}

// Endpoint is the token endpoint as messages show it: without its query, and in
// one spelling however it was configured.
func (c *Client) Endpoint() string { return shown(c.token.url) }

// Timeout bounds one request.
func (c *Client) Timeout() time.Duration { return c.timeout }

// RequestToken makes one token request. The error is always a
// *[broker.IssueError].
func (c *Client) RequestToken(ctx context.Context, request TokenRequest) (*broker.Grant, error) {
	a := newAttempt(ctx, c, c.token, request)
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

// parseEndpoint reads an endpoint's URL. Its errors repeat nothing of what may
// hide a password.
func parseEndpoint(role, raw string, allowInsecureHTTP bool) (endpoint, error) {
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
		return endpoint{}, fmt.Errorf("%s would send secrets in clear: use https://, or set allow_insecure_http if that is meant", shown(u))
	case u.Scheme != "http" && u.Scheme != "https":
		flaw = "starts with neither https:// nor http://"
	}
	if flaw != "" {
		return endpoint{}, fmt.Errorf("the %s URL %s", role, flaw)
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
		return errors.New("the client ID is missing")
	case !isVSCHAR(id) || strings.TrimSpace(id) != id:
		return errors.New("the client ID has blanks around it, or characters that no client ID can have (RFC 6749 appendix A.1)")
	}
	return nil
}

func checkClientAuth(auth ClientAuth) error {
	switch auth {
	case ClientSecretPost, ClientSecretBasic:
		return nil
	}
	return fmt.Errorf("client authentication %q is not one of %s, %s", auth, ClientSecretPost, ClientSecretBasic)
}

// shown is a URL as messages show it: a query or a user name may be secret.
func shown(u *url.URL) string {
	return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}).String()
}
