package service

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// longestToken bounds the authorization header. The tokens of Kubernetes have
// one or two KiB.
const longestToken = 16 << 10

// certified is a client certificate as the handshake has verified it. It lives
// as long as its connection, which may outlive what it proves.
type certified struct {
	chains [][]*x509.Certificate // one at least, the leaf first
	ends   time.Time
	nobody error // why it names nobody; nil if it names the peer

	// judged is what was said of the chains last.
	judged atomic.Pointer[judgement]
}

// judgement is what a Trust says of a certificate.
type judgement struct {
	trust   *Trust
	revoked error
}

// revoked returns why the certificate is not to be believed any more. It is
// worked out once for each Trust. One chain that is believed is enough.
func (c *certified) revoked(trust *Trust) error {
	j := c.judged.Load()
	if j == nil || j.trust != trust {
		j = &judgement{trust, trust.Revocations.CheckChains(c.chains)}
		c.judged.Store(j)
	}
	return j.revoked
}

// identify works out who asks, or why nobody acceptable does.
//
// What is shown must hold together: a call that proves two identities, or claims
// one that it may not, is refused rather than taken for one of them.
func (s *Service) identify(c *call) error {
	trust := s.trust.Load()
	if err := c.standing(trust); err != nil {
		return err
	}
	authorization := c.headers[authorizationHeader]
	switch {
	case len(c.headers[access.EnvoyHeader])+len(c.headers[access.LinkerdHeader]) > 0 || trust.Forwarders.List(c.peer):
		return c.forwarded(trust)
	case len(authorization) > 0:
		return c.authorized(trust, authorization)
	case c.peer == nil && c.certified != nil:
		return unknown("no acceptable identity: the client certificate must carry exactly one URI SAN, or no URI SAN and exactly one DNS SAN, and "+
			"a name in it that has one spelling; the common name is not looked at", c.certified.nobody)
	case c.peer == nil:
		return unknown("no identity: show a client certificate of one of the broker's authorities, or send a service account token as authorization: Bearer", nil)
	}
	c.caller = c.peer
	return nil
}

// standing returns why what the connection has proven no longer holds.
func (c *call) standing(trust *Trust) error {
	if c.certified == nil {
		return nil
	}
	if time.Now().After(c.certified.ends) {
		return unknown("the client certificate has ended since this connection was made: connect again with its successor", nil)
	}
	if err := c.certified.revoked(trust); err != nil {
		return unknown("the client certificate has been revoked: connect again with another one", err)
	}
	return nil
}

// forwarded finds the caller whom a proxy speaks for.
func (c *call) forwarded(trust *Trust) error {
	envoy, linkerd := c.headers[access.EnvoyHeader], c.headers[access.LinkerdHeader]
	header, values := access.EnvoyHeader, envoy
	if len(values) == 0 {
		header, values = access.LinkerdHeader, linkerd
	}
	switch {
	case c.peer == nil:
		return unknown(header+" says who is behind a proxy, which must prove who it is itself: "+
			"by a client certificate with exactly one URI SAN, or else exactly one DNS SAN, or over a unix socket", nil)
	case len(envoy) > 0 && len(linkerd) > 0:
		return unknown(fmt.Sprintf("%s and %s each say who is behind the proxy %s: have it set one of them and remove the other",
			access.EnvoyHeader, access.LinkerdHeader, c.peer.Name), nil)
	case len(values) > 0 && !trust.Forwarders.Believes(c.peer, header):
		return unknown(fmt.Sprintf("%s is not believed when it says in %s who is behind it: have the header removed, "+
			"or the broker's operators list this proxy under server.forwarders", c.peer.Name, header), nil)
	case len(values) == 0:
		return unknown(fmt.Sprintf("%s is a proxy, which must say in %s who is behind it, and has not: have it set the header, and callers connect to it by mTLS; "+
			"a proxy has no rights of its own", c.peer.Name, strings.Join(trust.Forwarders.Headers(c.peer), " or ")), nil)
	case len(values) > 1:
		return unknown(fmt.Sprintf("the proxy %s has sent %s more than once: have it replace what its callers send", c.peer.Name, header), nil)
	case len(c.headers[authorizationHeader]) > 0:
		return unknown(fmt.Sprintf("the proxy %s says in %s who is behind it, and there is a bearer token as well: send one of them", c.peer.Name, header), nil)
	}
	caller, err := trust.Forwarders.Caller(c.peer, header, values[0])
	if err != nil {
		return unknown(fmt.Sprintf("what the proxy %s says in %s names no acceptable caller: %v", c.peer.Name, header, err), nil)
	}
	c.caller = caller
	return nil
}

// authorized finds the caller whom a bearer token proves. Whoever shows a
// certificate is known by that alone: which of the two the policy should judge
// nobody has said.
func (c *call) authorized(trust *Trust, authorization []string) error {
	if c.certified != nil {
		return unknown("there is a client certificate and a bearer token, which may prove two different callers: send one of them", nil)
	}
	if trust.ServiceAccounts == nil {
		return unknown("there is a bearer token, and this broker accepts none: service_accounts is not configured; send none, or have the broker's operators configure it", nil)
	}
	token, why := bearer(authorization)
	if why != "" {
		return unknown(why, nil)
	}
	caller, err := trust.ServiceAccounts.Verify(c, token)
	switch {
	case err != nil && c.Err() != nil:
		return c.Err() // nobody waits for the answer
	case err == nil && caller == nil:
		err = errors.New("the verifier names nobody")
		fallthrough
	case err != nil:
		return unknown("the bearer token was refused; the broker's log says why, under this request id", err)
	}
	c.caller = caller
	return nil
}

// bearer is the token in an authorization header (RFC 6750 section 2.1), or what
// is wrong with it.
func bearer(values []string) (token, why string) {
	if len(values) > 1 {
		return "", "there is more than one authorization header: send one"
	}
	if len(values[0]) > longestToken {
		return "", fmt.Sprintf("the authorization header is longer than %d KiB", longestToken>>10)
	}
	scheme, token, ok := strings.Cut(values[0], " ")
	if !ok || !strings.EqualFold(scheme, "Bearer") || !isToken(token) {
		return "", "the authorization header must be Bearer, one blank and a token"
	}
	return token, ""
}

// isToken reports whether s is a b64token of RFC 6750 section 2.1.
func isToken(s string) bool {
	body := strings.TrimRight(s, "=")
	for _, c := range []byte(body) {
		if !('a' <= c|0x20 && c|0x20 <= 'z' || '0' <= c && c <= '9' || strings.IndexByte("-._~+/", c) >= 0) {
			return false
		}
	}
	return body != ""
}

// unknown is the refusal of a call whose caller is not known. The text is for
// whoever has called and repeats nothing that was sent but names of connections;
// the cause is for the log.
func unknown(text string, cause error) error {
	return failure{cause: &broker.Error{Reason: reasonCallerUnknown, Text: text, Err: cause}}
}

var errCallerUnknown = unknown("no identity: the call did not come through the door", nil)

// whoIs says in the log whose a call is: its caller's, or, as long as that is not
// known, of the other end of its connection.
func whoIs(ctx context.Context) slog.Attr {
	c := callFrom(ctx)
	switch {
	case c != nil && c.caller != nil:
		return named(c.caller)
	case c != nil && c.peer != nil:
		return slog.String("peer", c.peer.Name)
	}
	return slog.Attr{}
}

// named is a caller in the log, and the proxy it came through.
func named(c *access.Caller) slog.Attr {
	if c.Forwarder == "" {
		return slog.String("caller", c.Name)
	}
	return slog.Group("", slog.String("caller", c.Name), slog.String("forwarder", c.Forwarder))
}
