package service

import (
	"context"

	"github.com/tokenbroker/tokenbroker/internal/access"
)

// Trust is what the server believes of callers beyond the handshake. It is
// immutable; a new one holds for connections that are open, too.
type Trust struct {
	// Forwarders are the proxies that may speak for others; nil is none.
	Forwarders *access.Forwarders
	// ServiceAccounts checks bearer tokens; nil refuses all of them.
	ServiceAccounts TokenVerifier
	// Revocations are asked about the certificates of open connections, too; nil
	// revokes nothing.
	Revocations *access.Revocations
}

// TokenVerifier checks the bearer tokens of callers.
type TokenVerifier interface {
	// Verify returns who the token proves its bearer to be, and why it proves
	// nothing otherwise: an error whose Temporary method says true if it cannot
	// be told now, and the token is not to blame. It may be called concurrently, and remembers what it
	// has checked, so that most calls cost a look. The error holds nothing of
	// the token.
	Verify(ctx context.Context, token string) (*access.Caller, error)
}

// SetTrust replaces what is believed.
func (s *Service) SetTrust(t Trust) {
	if was := s.trust.Swap(&trusted{t, make(chan struct{})}); was != nil {
		close(was.changed)
	}
}

// trusted is a Trust in force, until changed is closed.
type trusted struct {
	Trust
	changed chan struct{}
}
