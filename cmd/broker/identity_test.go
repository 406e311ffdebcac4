package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/internal/testca"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// dialTLS connects to a process as whoever the certificate names; nil is nobody.
func (p *process) dialTLS(a *testca.Authority, change func(*x509.Certificate)) *grpc.ClientConn {
	p.t.Helper()
	settings := &tls.Config{RootCAs: a.Pool(), ServerName: "127.0.0.1"}
	if change != nil {
		settings.Certificates = []tls.Certificate{a.Leaf(change)}
	}
	conn, err := grpc.NewClient("passthrough:///"+p.address, grpc.WithTransportCredentials(credentials.NewTLS(settings)))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	return conn
}

// issue asks for a token with these headers, by name and value in turns.
func issue(t *testing.T, conn *grpc.ClientConn, headers ...string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	_, err := pb.NewTokenBrokerClient(conn).IssueToken(metadata.AppendToOutgoingContext(ctx, headers...), &pb.IssueTokenRequest{Profile: "invoices"})
	return err
}

// wantRefusal checks that an error is CALLER_UNKNOWN and says why.
func wantRefusal(t *testing.T, what string, err error, text string) {
	t.Helper()
	if status.Code(err) != codes.Unauthenticated || !strings.Contains(status.Convert(err).Message(), text) {
		t.Errorf("%s: got %v, want a refusal that says %q", what, err, text)
	}
}

const serverTLS = `{address: "127.0.0.1:0", tls: {certificate: server.pem, private_key: server.key, client_ca: ca.pem}`

// A proxy is believed from the moment on that the config lists it, over
// connections that are open, and has no rights of its own from then on.
func TestServeBehindAProxy(t *testing.T) {
	t.Parallel()
	s, a := newStage(t), testca.New(t)
	s.tlsFiles(a)
	plain := strings.Replace(read(t, s.config("policy:",
		`  - {callers: ["dns:envoy.example.com", "spiffe://prod/ns/batch/*"], profiles: [invoices], allow: [issue]}`)),
		`{address: "127.0.0.1:0"`, serverTLS, 1)
	p := start(t, s.write("config.yaml", plain))
	proxy := p.dialTLS(a, testca.Named("envoy.example.com"))
	const xfcc = "x-forwarded-client-cert"
	const worker, other = "By=spiffe://prod/broker;Hash=00;URI=spiffe://prod/ns/batch/worker", "URI=spiffe://prod/ns/web/worker"

	wantRefusal(t, "a header from an unlisted peer", issue(t, proxy, xfcc, worker), "list this proxy under server.forwarders")
	if got := s.vantage.Calls().Total; got != 0 {
		t.Errorf("the token endpoint got %d requests, want none", got)
	}
	if err := issue(t, proxy); err != nil {
		t.Errorf("as itself: %v", err)
	}

	listed := strings.Replace(plain, "client_ca: ca.pem}", `client_ca: ca.pem}, forwarders: [{peers: ["dns:envoy.example.com"], header: x-forwarded-client-cert, callers: ["spiffe://prod/ns/*/worker"]}]`, 1)
	s.write("config.yaml", listed)
	p.await("the proxy is believed", func() bool { return issue(t, proxy, xfcc, worker) == nil })
	who, err := pb.NewTokenBrokerClient(proxy).WhoAmI(metadata.AppendToOutgoingContext(t.Context(), xfcc, worker), &pb.WhoAmIRequest{})
	if err != nil || who.GetCaller() != "spiffe://prod/ns/batch/worker" || who.GetForwarder() != "dns:envoy.example.com" || who.GetProof() != pb.IdentityProof_IDENTITY_PROOF_FORWARDED {
		t.Errorf("who am I: %v, %v", who, err)
	}
	if err := issue(t, proxy, xfcc, other); status.Code(err) != codes.PermissionDenied {
		t.Errorf("for a caller that may not: %v", err)
	}
	wantRefusal(t, "as itself", issue(t, proxy), "is a proxy, which must say in x-forwarded-client-cert who is behind it")
	wantRefusal(t, "for somebody else's caller", issue(t, proxy, xfcc, "URI=spiffe://prod/ns/batch/admin"), "may not speak for that caller")
	wantRefusal(t, "around the proxy", issue(t, p.dialTLS(a, testca.Named("worker.example.com")), xfcc, worker), "dns:worker.example.com is not believed")
	p.logged(`"forwarder":"dns:envoy.example.com"`)

	bad := strings.Replace(listed, `"dns:envoy.example.com"], header`, `"anonymous"], header`, 1)
	s.write("config.yaml", bad)
	p.logged("no proxy's name")
	if err := issue(t, proxy, xfcc, worker); err != nil {
		t.Errorf("after a bad config: %v", err)
	}
	s.write("config.yaml", plain)
	p.await("the proxy is no longer believed", func() bool { return issue(t, proxy) == nil })
	wantRefusal(t, "a header from a peer that was listed", issue(t, proxy, xfcc, worker), "is not believed")
}

// Where tokens are accepted a certificate may be missing in the handshake, and
// proof in no call.
func TestServeWithoutCertificatesOfCallers(t *testing.T) {
	t.Parallel()
	s, a := newStage(t), testca.New(t)
	s.tlsFiles(a)
	s.write("jwks.json", `{"keys": [{"kty": "EC", "crv": "P-256", "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4", "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM", "use": "sig", "alg": "ES256", "kid": "1"}]}`) // RFC 7517 appendix A.1
	certificates := strings.Replace(read(t, s.config("policy:",
		`  - {callers: ["dns:worker.example.com"], profiles: [invoices], allow: [issue]}`)), `{address: "127.0.0.1:0"`, serverTLS, 1)
	p := start(t, s.write("config.yaml", certificates))
	if err := issue(t, p.dialTLS(a, nil)); status.Code(err) != codes.Unavailable {
		t.Errorf("without a certificate: %v, want no connection", err)
	}
	tokens := strings.Replace(certificates, "client_ca: ca.pem}", `client_ca: ca.pem}, service_accounts: [{cluster: prod, issuer: "https://kubernetes.default.svc", audience: token-broker, jwks_file: jwks.json}]`, 1)
	s.write("config.yaml", tokens)
	p.await("a certificate may be missing", func() bool { return status.Code(issue(t, p.dialTLS(a, nil))) == codes.Unauthenticated })
	nobody := p.dialTLS(a, nil)
	wantRefusal(t, "no certificate and no token", issue(t, nobody), "no identity: show a client certificate")
	wantRefusal(t, "a token of nobody", issue(t, nobody, "authorization", "Bearer canary"), "token")
	wantRefusal(t, "a header of a proxy", issue(t, nobody, "x-forwarded-client-cert", "DNS=worker.example.com"), "must prove who it is itself")
	if got, err := healthpb.NewHealthClient(nobody).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil || got.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", got, err)
	}
	if got := s.vantage.Calls().Total; got != 0 {
		t.Errorf("the token endpoint got %d requests, want none", got)
	}
	if got := command(t, "whoami", "--address", p.address, "--ca", s.path("ca.pem")); got.status != 1 || !strings.Contains(got.stderr, "no identity: show a client certificate") {
		t.Errorf("whoami: %+v", got)
	}
	worker := p.dialTLS(a, testca.Named("worker.example.com"))
	if err := issue(t, worker); err != nil {
		t.Errorf("with a certificate: %v", err)
	}
	wantRefusal(t, "a certificate and a token", issue(t, worker, "authorization", "Bearer canary"), "a client certificate and a bearer token")
	if strings.Contains(p.log.String(), "canary") {
		t.Error("a token is in the log")
	}
}
