package service

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"syscall"
	"time"

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
	caller    *access.Caller // nil if the certificate names nobody, or there is none
	certified *certified     // nil if there is none
	since     time.Time
}

func (c tlsCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return nil, nil, err
	}
	found := &tlsInfo{TLSInfo: info.(credentials.TLSInfo), since: time.Now()}
	if chains := found.State.VerifiedChains; len(chains) > 0 {
		found.certified = &certified{chains: chains, ends: access.End(chains), conn: raw}
		found.caller, found.certified.nobody = access.IdentifyVerified(chains)
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
	since  time.Time
}

func (localInfo) AuthType() string { return "local" }

var errNotLocal = errors.New("without TLS only callers on this machine are accepted")

func (localCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	switch remote := conn.RemoteAddr().(type) {
	case *net.UnixAddr:
		caller, err := unixPeer(conn)
		if err != nil {
			return nil, nil, fmt.Errorf("asking the kernel who is at the other end of a unix socket: %w", err)
		}
		proven(conn)
		return conn, localInfo{common(credentials.PrivacyAndIntegrity), caller, time.Now()}, nil
	case *net.TCPAddr:
		if !remote.IP.IsLoopback() {
			return nil, nil, fmt.Errorf("%w, not %s", errNotLocal, remote.IP)
		}
		proven(conn)
		return conn, localInfo{common(credentials.NoSecurity), &access.Caller{Name: access.Anonymous, Proof: access.Loopback}, time.Now()}, nil
	}
	return nil, nil, errNotLocal
}

func common(level credentials.SecurityLevel) credentials.CommonAuthInfo {
	return credentials.CommonAuthInfo{SecurityLevel: level}
}

// unixPeer names the user at the other end of a unix socket, and its groups.
// Its process has a number, too, which soon is another's.
func unixPeer(conn net.Conn) (*access.Caller, error) {
	c, ok := conn.(syscall.Conn)
	if !ok {
		return nil, errors.New("the connection has no file descriptor")
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var uid uint32
	var gids []uint32
	var failed error
	if err := raw.Control(func(fd uintptr) { uid, gids, failed = peerOf(int(fd)) }); err != nil {
		return nil, err
	}
	if failed != nil {
		return nil, failed
	}
	caller := &access.Caller{Name: fmt.Sprintf("unix:uid:%d", uid), Proof: access.UnixPeer}
	for _, gid := range gids {
		if group := fmt.Sprintf("unix:gid:%d", gid); !slices.Contains(caller.Groups, group) {
			caller.Groups = append(caller.Groups, group)
		}
	}
	return caller, nil
}

func (localCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for servers")
}

func (localCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "local"}
}
func (c localCredentials) Clone() credentials.TransportCredentials { return c }
func (localCredentials) OverrideServerName(string) error           { return nil }
