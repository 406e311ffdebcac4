package service_test

import (
	"crypto/tls"
	"crypto/x509"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/admission"
	"github.com/tokenbroker/tokenbroker/internal/service"
	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// A certificate that does not count any more ends its connection, after the
// refusal, so that a client that has a new one is served again at once.
func TestRenewedCertificateIsSoonInUse(t *testing.T) {
	worker := testca.Named("worker.example.com")
	for name, c := range map[string]struct {
		lasts time.Duration
		lose  bool // it is revoked
		text  string
	}{
		"it ends":       {2 * time.Second, false, "the client certificate has ended since"},
		"it is revoked": {time.Hour, true, "the client certificate has been revoked"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			old, next := testca.New(t), testca.New(t)
			settings := serverOf(old)
			settings.ClientCAs.AddCert(next.Certificate())
			r := newRig(t, rigOptions{tls: func() *tls.Config { return settings }, policy: everyone})
			leaf := old.Leaf(func(cert *x509.Certificate) { worker(cert); cert.NotAfter = time.Now().Add(c.lasts) })
			renewed := next.Leaf(worker)
			var shown atomic.Pointer[tls.Certificate]
			shown.Store(&leaf)
			client := clientOf(old, nil)
			client.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return shown.Load(), nil }
			tokens := pb.NewTokenBrokerClient(r.dial(client))
			if err := whoami(t.Context(), tokens); err != nil {
				t.Fatal(err)
			}
			shown.Store(&renewed)
			if c.lose {
				r.service.SetTrust(revoking(t, old, leaf.Leaf))
			}
			var err error
			eventually(t, "a refusal", func() bool { err = whoami(t.Context(), tokens); return err != nil })
			if d := wantFailure(t, err, codes.Unauthenticated, "CALLER_UNKNOWN", ""); !strings.Contains(d.text, c.text) {
				t.Error(d.text)
			}
			eventually(t, "the new certificate is in use", func() bool { return whoami(t.Context(), tokens) == nil })
			eventually(t, "the old connection is closed", func() bool { return r.metric("connections", "") == 1 })
		})
	}
}

// A call that waits for its token is asked again who it is when it has it.
func TestWaitingCallLosesItsProof(t *testing.T) {
	a := testca.New(t)
	settings, leaf := serverOf(a), a.Leaf(testca.Named("worker"))
	r := newRig(t, rigOptions{tls: func() *tls.Config { return settings }, policy: everyone})
	client := clientOf(a, nil)
	client.Certificates = []tls.Certificate{leaf}
	tokens := pb.NewTokenBrokerClient(r.dial(client))
	r.fault(sandbox.Fault{Process: true, Delay: time.Second})
	failed := make(chan error, 1)
	go func() {
		_, err := tokens.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
		failed <- err
	}()
	eventually(t, "its token is asked for", func() bool { return r.vantage.Calls().Total > 0 })
	r.service.SetTrust(revoking(t, a, leaf.Leaf))
	wantFailure(t, <-failed, codes.Unauthenticated, "CALLER_UNKNOWN", "")
}

// revoking is the word of an authority that has revoked a certificate.
func revoking(t *testing.T, by *testca.Authority, leaf *x509.Certificate) service.Trust {
	t.Helper()
	list, err := x509.ParseRevocationList(by.RevocationList(nil, leaf))
	if err != nil {
		t.Fatal(err)
	}
	r := access.NewRevocations([]*x509.Certificate{by.Certificate()})
	if err := r.Add(list); err != nil {
		t.Fatal(err)
	}
	return service.Trust{Revocations: r}
}

// The audit log has who has forged a header, or shown a certificate that does not
// count any more.
func TestAuditOfWhoIsRefused(t *testing.T) {
	log := newAuditFile(t)
	a := testca.New(t)
	settings, leaf := serverOf(a), a.Leaf(testca.Named("web.example.com"))
	r := newRig(t, rigOptions{tls: func() *tls.Config { return settings }, policy: everyone, audit: log.Log})
	client := clientOf(a, nil)
	client.Certificates = []tls.Certificate{leaf}
	tokens := pb.NewTokenBrokerClient(r.dial(client))
	forged := metadata.AppendToOutgoingContext(within(t, time.Minute), access.EnvoyHeader, "URI=spiffe://prod/ns/batch/worker")
	refused := map[string]string{"caller": "", "proof": "", "peer_name": "dns:web.example.com", "decision": "deny", "outcome": "CALLER_UNKNOWN"}
	wantFailure(t, whoami(forged, tokens), codes.Unauthenticated, "CALLER_UNKNOWN", "")
	wantEvent(t, log.next(1)[0], refused)
	_, err := tokens.IssueToken(forged, &pb.IssueTokenRequest{Profile: "invoices"})
	wantFailure(t, err, codes.Unauthenticated, "CALLER_UNKNOWN", "")
	wantEvent(t, log.next(1)[0], refused)
	_, err = tokens.IssueToken(within(t, time.Minute), &pb.IssueTokenRequest{Profile: "invoices"})
	wantFailure(t, err, codes.PermissionDenied, "CALLER_DENIED", "invoices")
	wantEvent(t, log.next(1)[0], map[string]string{"caller": "dns:web.example.com", "peer_name": "", "outcome": "CALLER_DENIED"})
	r.service.SetTrust(revoking(t, a, leaf.Leaf))
	_, err = tokens.IssueToken(within(t, time.Minute), &pb.IssueTokenRequest{Profile: "invoices"})
	wantFailure(t, err, codes.Unauthenticated, "CALLER_UNKNOWN", "")
	wantEvent(t, log.next(1)[0], refused)
}

// Claims that are refused count as calls of who makes them.
func TestFloodOfForgedHeaders(t *testing.T) {
	log := newAuditFile(t)
	a := testca.New(t)
	settings := serverOf(a)
	const rate = 5
	r := newRig(t, rigOptions{tls: func() *tls.Config { return settings }, policy: everyone, audit: log.Log, limits: admission.Limits{CallerRate: rate}})
	tokens := pb.NewTokenBrokerClient(r.dial(clientOf(a, testca.Named("worker"))))
	forged := metadata.AppendToOutgoingContext(within(t, time.Minute), access.EnvoyHeader, "URI=spiffe://prod/ns/batch/worker")
	log.next(wantFloodHeld(t, rate, func() error { return whoami(forged, tokens) }))
}

// wantFloodHeld calls until twenty calls were throttled, and returns how many were
// refused: no more than the rate, after a burst of twice as many.
func wantFloodHeld(t *testing.T, rate int, call func() error) (refused int) {
	t.Helper()
	throttled := 0
	for began := time.Now(); throttled < 20; {
		switch err := call(); status.Code(err) {
		case codes.Unauthenticated:
			refused++
		case codes.ResourceExhausted:
			wantThrottled(t, err, "CALLER_THROTTLED", time.Millisecond, time.Second)
			throttled++
		default:
			t.Fatal(err)
		}
		if most := rate * (int(time.Since(began)/time.Second) + 3); refused > most {
			t.Fatalf("%d refusals, and %d of them throttled", refused, throttled)
		}
	}
	return refused
}

// Whoever proves nothing cannot fill the logs.
func TestFloodOfStrangers(t *testing.T) {
	log := newAuditFile(t)
	a := testca.New(t)
	settings := serverOf(a)
	settings.ClientAuth = tls.VerifyClientCertIfGiven
	r := newRig(t, rigOptions{tls: func() *tls.Config { return settings }, policy: everyone, audit: log.Log})
	tokens := pb.NewTokenBrokerClient(r.dial(clientOf(a, nil)))
	ctx := within(t, time.Minute)
	log.next(wantFloodHeld(t, 100, func() error { return whoami(ctx, tokens) }))
}
