package service

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"

	"google.golang.org/grpc/credentials"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/admission"
)

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
	caller *access.Caller // nil if the certificate names nobody
}

func (c tlsCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	found := tlsInfo{TLSInfo: info.(credentials.TLSInfo)}
	if chains := found.State.VerifiedChains; len(chains) > 0 {
		found.caller = access.Identify(chains[0][0])
	}
	proven(raw)
	return conn, found, nil
}

func (c tlsCredentials) Clone() credentials.TransportCredentials {
	return tlsCredentials{c.TransportCredentials.Clone()}
}

// proven tells the listener that a connection belongs to somebody. What follows
// of the handshake, HTTP/2's own, has a timeout.
func proven(raw net.Conn) {
	if c, ok := raw.(*admission.Conn); ok {
		c.Proven()
	}
}

// localCredentials accept callers without TLS from this machine only, whatever
// the address that the server listens on.
type localCredentials struct{}

type localInfo struct {
	credentials.CommonAuthInfo
	caller *access.Caller
}

func (localInfo) AuthType() string { return "local" }

var errNotLocal = errors.New("without TLS only callers on this machine are accepted")

func (localCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	info := localInfo{caller: &access.Caller{Name: access.Anonymous}}
	switch remote := conn.RemoteAddr().(type) {
	case *net.UnixAddr:
		info.caller.Proof = access.UnixPeer
		info.SecurityLevel = credentials.PrivacyAndIntegrity
	case *net.TCPAddr:
		if !remote.IP.IsLoopback() {
			return nil, nil, fmt.Errorf("%w, not %s", errNotLocal, remote.IP)
		}
		info.caller.Proof = access.Loopback
		info.SecurityLevel = credentials.NoSecurity
	default:
		return nil, nil, errNotLocal
	}
	proven(conn)
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
