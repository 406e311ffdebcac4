package service

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// Anonymous is the name of a caller whose identity nothing proves. It exists
// only on loopback and unix sockets.
const Anonymous = "anonymous"

// caller is who is at the other end of a connection. It is worked out in the
// handshake, and holds until the connection ends.
type caller struct {
	name  string
	proof pb.IdentityProof
	// granted caches what the policy says of the caller, for the policy it
	// names.
	granted atomic.Pointer[grants]
}

type grants struct {
	policy *Policy
	rules  []rule
}

// rulesUnder returns the rules of p that speak of the caller.
func (c *caller) rulesUnder(p *Policy) []rule {
	g := c.granted.Load()
	if g == nil || g.policy != p {
		g = &grants{policy: p, rules: p.rulesFor(c)}
		c.granted.Store(g)
	}
	return g.rules
}

// callerFrom returns the caller of the call that ctx belongs to.
func callerFrom(ctx context.Context) (*caller, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, false
	}
	switch info := p.AuthInfo.(type) {
	case tlsInfo:
		return info.caller, info.caller != nil
	case localInfo:
		return info.caller, true
	}
	return nil, false
}

// identify names a caller by its verified certificate: the URI SAN, which is a
// SPIFFE ID in a mesh, else the DNS SAN. The common name proves nothing. More
// than one URI, or more than one DNS name without a URI, or a wildcard, is
// ambiguous, and who is ambiguous is nobody. Nobody, too, is a URI that is
// spelled like another kind of caller.
func identify(leaf *x509.Certificate) *caller {
	switch {
	case len(leaf.URIs) == 1:
		u := leaf.URIs[0]
		if u.Host == "" || u.Scheme == "" || strings.EqualFold(u.Scheme, "dns") {
			return nil
		}
		return &caller{name: u.String(), proof: pb.IdentityProof_IDENTITY_PROOF_URI_SAN}
	case len(leaf.URIs) == 0 && len(leaf.DNSNames) == 1:
		name := strings.ToLower(leaf.DNSNames[0])
		if strings.Contains(name, "*") {
			return nil
		}
		return &caller{name: "dns:" + name, proof: pb.IdentityProof_IDENTITY_PROOF_DNS_SAN}
	}
	return nil
}

// CallerName is the name by which the policy knows the holder of a verified
// certificate; empty if it names nobody.
func CallerName(leaf *x509.Certificate) string {
	c := identify(leaf)
	if c == nil {
		return ""
	}
	return c.name
}

// newCredentials returns how the server meets its callers.
func newCredentials(settings func() *tls.Config) credentials.TransportCredentials {
	if settings == nil {
		return localCredentials{}
	}
	return tlsCredentials{credentials.NewTLS(&tls.Config{
		MinVersion:         tls.VersionTLS12, // the settings of each handshake decide
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return settings(), nil },
	})}
}

// tlsCredentials adds the caller to what a TLS handshake found out.
type tlsCredentials struct {
	credentials.TransportCredentials
}

type tlsInfo struct {
	credentials.TLSInfo
	caller *caller // nil if the certificate names nobody
}

func (c tlsCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	found := tlsInfo{TLSInfo: info.(credentials.TLSInfo)}
	if chains := found.State.VerifiedChains; len(chains) > 0 {
		found.caller = identify(chains[0][0])
	}
	return conn, found, nil
}

func (c tlsCredentials) Clone() credentials.TransportCredentials {
	return tlsCredentials{c.TransportCredentials.Clone()}
}

// localCredentials accept callers without TLS from this machine only, whatever
// the address that the server listens on.
type localCredentials struct{}

type localInfo struct {
	credentials.CommonAuthInfo
	caller *caller
}

func (localInfo) AuthType() string { return "local" }

var errNotLocal = errors.New("without TLS only callers on this machine are accepted")

func (localCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	info := localInfo{caller: &caller{name: Anonymous}}
	switch remote := conn.RemoteAddr().(type) {
	case *net.UnixAddr:
		info.caller.proof = pb.IdentityProof_IDENTITY_PROOF_UNIX_PEER
		info.SecurityLevel = credentials.PrivacyAndIntegrity
	case *net.TCPAddr:
		if !remote.IP.IsLoopback() {
			return nil, nil, fmt.Errorf("%w, not %s", errNotLocal, remote.IP)
		}
		info.caller.proof = pb.IdentityProof_IDENTITY_PROOF_ANONYMOUS_LOOPBACK
		info.SecurityLevel = credentials.NoSecurity
	default:
		return nil, nil, errNotLocal
	}
	return conn, info, nil
}

func (localCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for servers")
}

func (localCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "local"}
}
func (c localCredentials) Clone() credentials.TransportCredentials { return c }
func (localCredentials) OverrideServerName(string) error           { return nil }
