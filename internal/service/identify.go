package service

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// longestToken bounds the authorization header. The tokens of Kubernetes have
// one or two KiB.
const longestToken = 16 << 10

// parting is how long a connection stays after its certificate was refused, for
// the refusal to arrive.
const parting = 200 * time.Millisecond

// certified is a client certificate as the handshake has verified it. It lives
// as long as its connection, which may outlive what it proves.
type certified struct {
	chains [][]*x509.Certificate // one at least, the leaf first
	ends   time.Time
	nobody error // why it names nobody; nil if it names the peer

	conn  net.Conn // that it was shown on; nil in tests without
	parts sync.Once

	// judged is what was said of the chains last.
	judged atomic.Pointer[judgement]
}

// judgement is what a Trust says of a certificate.
type judgement struct {
	trust   *trusted
	ends    time.Time // of what is believed; zero if nothing is
	revoked error     // why nothing is
}

// judge says what is believed of the certificate by now. It is worked out once
// for each Trust. The authorities stay the handshake's: they are replaced under
// connections that are open.
func (c *certified) judge(trust *trusted) *judgement {
	j := c.judged.Load()
	if j == nil || j.trust != trust {
		j = &judgement{trust: trust}
		j.ends, j.revoked = access.Standing(c.chains, nil, trust.Revocations)
		c.judged.Store(j)
	}
	return j
}

// standing returns why the certificate does not count any more. Its connection is
// closed then, so that whoever has another one can show it.
func (c *certified) standing(trust *trusted) error {
	err := c.check(trust)
	if err != nil && c.conn != nil {
		c.parts.Do(func() { time.AfterFunc(parting, func() { c.conn.Close() }) })
	}
	return err
}

func (c *certified) check(trust *trusted) error {
	ended := func(at time.Time) error {
		if time.Now().After(at) {
			return unknown("the client certificate has ended since this connection was made: connect again with its successor", nil)
		}
		return nil
	}
	if err := ended(c.ends); err != nil {
		return err
	}
	j := c.judge(trust)
	if j.revoked != nil {
		return unknown("the client certificate has been revoked: connect again with another one", j.revoked)
	}
	return ended(j.ends)
}

// identify works out who asks, or why nobody acceptable does.
//
// What is shown must hold together: a call that proves two identities, or claims
// one that it may not, is refused rather than taken for one of them.
func (s *Service) identify(c *call) (err error) {
	c.trust = s.trust.Load()
	c.caller, err = c.known(c.trust)
	return err
}

// known is identify by some Trust, and changes nothing of the call.
func (c *call) known(trust *trusted) (*access.Caller, error) {
	if c.certified != nil {
		if err := c.certified.standing(trust); err != nil {
			return nil, err
		}
	}
	authorization := c.headers[authorizationHeader]
	switch {
	case len(c.headers[access.EnvoyHeader])+len(c.headers[access.LinkerdHeader]) > 0 || trust.Forwarders.List(c.peer):
		return c.forwarded(trust)
	case len(authorization) > 0:
		return c.authorized(trust, authorization)
	case c.peer == nil && c.certified != nil:
		return nil, unknown("no acceptable identity: the client certificate must carry exactly one URI SAN, or no URI SAN and exactly one DNS SAN, and "+
			"a name in it that has one spelling; the common name is not looked at", c.certified.nobody)
	case c.peer == nil:
		return nil, unknown("no identity: show a client certificate of one of the broker's authorities, or send a service account token as authorization: Bearer", nil)
	}
	return c.peer, nil
}

// provenUntil returns until when what the call has shown proves who its caller
// is, zero being for good, or why it does not any more.
func (c *call) provenUntil(trust *trusted) (time.Time, error) {
	caller, err := c.known(trust)
	if err != nil {
		return time.Time{}, err
	}
	ends := caller.Expires
	if c.certified != nil {
		ends = c.certified.judge(trust).ends // the proxy's, if there is one
	}
	if !ends.IsZero() && time.Now().After(ends) {
		return time.Time{}, unknown("what has proven who calls has ended since the call was made: call again with its successor", nil)
	}
	return ends, nil
}

// forwarded finds the caller whom a proxy speaks for.
func (c *call) forwarded(trust *trusted) (*access.Caller, error) {
	envoy, linkerd := c.headers[access.EnvoyHeader], c.headers[access.LinkerdHeader]
	header, values := access.EnvoyHeader, envoy
	if len(values) == 0 {
		header, values = access.LinkerdHeader, linkerd
	}
	switch {
	case c.peer == nil:
		return nil, unknown(header+" says who is behind a proxy, which must prove who it is itself: "+
			"by a client certificate with exactly one URI SAN, or else exactly one DNS SAN, or over a unix socket", nil)
	case len(envoy) > 0 && len(linkerd) > 0:
		return nil, unknown(fmt.Sprintf("%s and %s each say who is behind the proxy %s: have it set one of them and remove the other",
			access.EnvoyHeader, access.LinkerdHeader, c.peer.Name), nil)
	case len(values) > 0 && !trust.Forwarders.Believes(c.peer, header):
		return nil, unknown(fmt.Sprintf("%s is not believed when it says in %s who is behind it: have the header removed, "+
			"or the broker's operators list this proxy under server.forwarders", c.peer.Name, header), nil)
	case len(values) == 0:
		return nil, unknown(fmt.Sprintf("%s is a proxy, which must say in %s who is behind it, and has not: have it set the header, and callers connect to it by mTLS; "+
			"a proxy has no rights of its own", c.peer.Name, strings.Join(trust.Forwarders.Headers(c.peer), " or ")), nil)
	case len(values) > 1:
		return nil, unknown(fmt.Sprintf("the proxy %s has sent %s more than once: have it replace what its callers send", c.peer.Name, header), nil)
	case len(c.headers[authorizationHeader]) > 0:
		return nil, unknown(fmt.Sprintf("the proxy %s says in %s who is behind it, and there is a bearer token as well: send one of them", c.peer.Name, header), nil)
	}
	caller, err := trust.Forwarders.Caller(c.peer, header, values[0])
	if err != nil {
		return nil, unknown(fmt.Sprintf("what the proxy %s says in %s names no acceptable caller: %v", c.peer.Name, header, err), nil)
	}
	return caller, nil
}

// authorized finds the caller whom a bearer token proves. Whoever shows a
// certificate is known by that alone: which of the two the policy should judge
// nobody has said.
func (c *call) authorized(trust *trusted, authorization []string) (*access.Caller, error) {
	if c.certified != nil {
		return nil, unknown("there is a client certificate and a bearer token, which may prove two different callers: send one of them", nil)
	}
	if trust.ServiceAccounts == nil {
		return nil, unknown("there is a bearer token, and this broker accepts none: service_accounts is not configured; send none, or have the broker's operators configure it", nil)
	}
	token, why := bearer(authorization)
	if why != "" {
		return nil, unknown(why, nil)
	}
	caller, err := trust.ServiceAccounts.Verify(c, token)
	switch {
	case err != nil && c.Err() != nil:
		return nil, c.Err() // nobody waits for the answer
	case err != nil && mayPass(err):
		return nil, failure{cause: &broker.Error{
			Reason:     reasonIdentityUnavailable,
			Text:       "whether the bearer token is good cannot be told at this moment: try again with it; if that lasts tell the broker's operators, whose log says why",
			RetryAfter: later(), Err: err,
		}}
	case err == nil && caller == nil:
		err = errors.New("the verifier names nobody")
		fallthrough
	case err != nil:
		return nil, unknown("the bearer token was refused; the broker's log says why, under this request id", err)
	}
	return caller, nil
}

// mayPass reports whether a token was not refused, but could not be checked now.
func mayPass(err error) bool {
	var e interface{ Temporary() bool }
	return errors.As(err, &e) && e.Temporary()
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
