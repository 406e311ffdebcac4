package service

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/credentials"

	"github.com/tokenbroker/tokenbroker/internal/access"
)

// handshakes tells of connections that are turned away before there is a call:
// gRPC itself says nothing of them. Who was there is not known, so that they are
// no decisions, and not in the audit log.
type handshakes struct {
	log    *slog.Logger
	failed *prometheus.CounterVec

	mu      sync.Mutex
	next    time.Time // when the log is told of the next one
	silence int       // failures that it was not told of
}

// handshakeReasons are all there are.
var handshakeReasons = []string{
	"no_certificate", "unknown_authority", "expired", "revoked", "unfit_certificate", "client_refused", "no_tls", "tls_version", "closed", "timeout", "not_local", "other",
}

func newHandshakes(log *slog.Logger) *handshakes {
	h := &handshakes{log: log, failed: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "handshakes_failed_total",
		Help: "Connections that were turned away before there was a call, by reason.",
	}, []string{"reason"})}
	for _, reason := range handshakeReasons {
		h.failed.WithLabelValues(reason)
	}
	return h
}

// handshakeReason sorts what a handshake fails with.
func handshakeReason(err error) string {
	var authority x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	var unverified *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	var remote *net.OpError
	var timeout net.Error
	switch {
	case errors.Is(err, errNotLocal):
		return "not_local"
	case errors.As(err, &authority):
		return "unknown_authority"
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "expired"
	case errors.Is(err, access.ErrRevoked):
		return "revoked"
	case errors.As(err, &invalid), errors.As(err, &unverified):
		return "unfit_certificate"
	case errors.As(err, &record):
		return "no_tls"
	case errors.As(err, &remote) && remote.Op == "remote error": // an alert
		return "client_refused"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE), errors.Is(err, net.ErrClosed):
		return "closed"
	case errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	// These have no types.
	case strings.Contains(err.Error(), "client didn't provide a certificate"):
		return "no_certificate"
	case strings.Contains(err.Error(), "unsupported versions"):
		return "tls_version"
	}
	return "other"
}

// loudest is how often the log is told of a failed handshake.
const loudest = time.Second

// fail counts a failure, and tells the log unless it has just been told of
// another. Who connects and says nothing is a probe, most likely.
func (h *handshakes) fail(conn net.Conn, err error) {
	reason := handshakeReason(err)
	h.failed.WithLabelValues(reason).Inc()
	level := slog.LevelInfo
	if reason == "closed" {
		level = slog.LevelDebug
	}
	if !h.log.Enabled(context.Background(), level) {
		return
	}
	h.mu.Lock()
	now := time.Now()
	if now.Before(h.next) {
		h.silence++
		h.mu.Unlock()
		return
	}
	unsaid := h.silence
	h.next, h.silence = now.Add(loudest), 0
	h.mu.Unlock()
	h.log.LogAttrs(context.Background(), level, "connection turned away", slog.String("peer", conn.RemoteAddr().String()),
		slog.String("reason", reason), slog.Any("error", err), slog.Int("others_since_last_line", unsaid))
}

// heard are credentials whose failures are told of.
type heard struct {
	credentials.TransportCredentials
	handshakes *handshakes
}

func (c heard) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil && !errors.Is(err, credentials.ErrConnDispatched) {
		c.handshakes.fail(raw, err)
	}
	return conn, info, err
}

func (c heard) Clone() credentials.TransportCredentials {
	return heard{c.TransportCredentials.Clone(), c.handshakes}
}
