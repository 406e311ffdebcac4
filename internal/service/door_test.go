package service_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/service"
	"github.com/tokenbroker/tokenbroker/internal/testca"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// accounts verifies tokens by their text.
type accounts map[string]string

func (a accounts) Verify(_ context.Context, token string) (*access.Caller, error) {
	if name, ok := a[token]; ok {
		return &access.Caller{Name: name, Proof: access.ServiceAccount, Expires: time.Now().Add(time.Hour)}, nil
	}
	return nil, errors.New("the audience is another one")
}

// outage is the error of a verifier that can tell nothing now.
type outage struct{}

func (outage) Error() string   { return "its keys could not be fetched: no route" }
func (outage) Temporary() bool { return true }

func (outage) Verify(context.Context, string) (*access.Caller, error) {
	return nil, fmt.Errorf("by what is configured for cluster prod: %w", outage{})
}

// Who cannot be known for now is told so, and not to throw its token away.
func TestTokenThatCannotBeCheckedNow(t *testing.T) {
	r := newRig(t, rigOptions{policy: everyone, trust: service.Trust{ServiceAccounts: outage{}}})
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer "+goodToken)
	_, err := r.tokens().IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"})
	d := wantFailure(t, err, codes.Unavailable, "IDENTITY_UNAVAILABLE", "")
	if wait := d.retry.GetRetryDelay().AsDuration(); wait <= 0 || wait > 2*time.Second {
		t.Errorf("told to wait %s", wait)
	}
	if strings.Contains(d.text, "no route") || !strings.Contains(r.log.String(), "cluster prod: its keys could not be fetched: no route") {
		t.Errorf("the caller is told %q; the log has\n%s", d.text, r.log)
	}
	r.wantRequests(0)
}

// What callers send that must turn up nowhere, and what is accepted.
const (
	canary    = "canary-7d1f"
	goodToken = "eyJhbGciOiJSUzI1NiJ9.e30.good"
	envoyName = "dns:envoy.example.com"
	batch     = "spiffe://prod/ns/batch/worker"
	longToken = 16 << 10
)

// doors are all ways in. Whoever can be named may issue tokens by the policy, the
// proxies too: so that whoever is refused is refused for what it proves.
type doors struct {
	ca       *testca.Authority
	tls      *rig // client certificates
	tokens   *rig // client certificates or service account tokens, by TLS
	loopback *rig // anonymous callers
	local    *rig // the same with service account tokens
	socket   *rig // unix peers, one of them a listed proxy: this process
	users    *rig // unix peers and service account tokens, no proxy
}

func openDoors(t *testing.T) *doors {
	t.Helper()
	d := &doors{ca: testca.New(t)}
	me := fmt.Sprintf("unix:uid:%d", os.Getuid())
	policy := []access.Rule{{Callers: []string{"anonymous", me, batch, "spiffe://prod/ns/web/worker", "dns:*.example.com", "k8s://prod/batch/worker"}, Profiles: []string{"invoices"}, Allow: []string{"issue", "admin"}}}
	forwarders, err := access.NewForwarders([]access.Forwarder{
		{Peers: []string{envoyName, me}, Header: access.EnvoyHeader, Callers: []string{"spiffe://prod/ns/batch/*", "dns:worker.example.com"}},
		{Peers: []string{"dns:linkerd.example.com", "dns:both.example.com"}, Header: access.LinkerdHeader},
		{Peers: []string{"dns:both.example.com"}, Header: access.EnvoyHeader},
	})
	if err != nil {
		t.Fatal(err)
	}
	settings := serverOf(d.ca)
	optional := settings.Clone()
	optional.ClientAuth = tls.VerifyClientCertIfGiven
	verifier := accounts{goodToken: "k8s://prod/batch/worker"}
	d.tls = newRig(t, rigOptions{policy: policy, tls: func() *tls.Config { return settings }, trust: service.Trust{Forwarders: forwarders}})
	d.tokens = newRig(t, rigOptions{policy: policy, tls: func() *tls.Config { return optional }, trust: service.Trust{Forwarders: forwarders, ServiceAccounts: verifier}})
	d.loopback = newRig(t, rigOptions{policy: policy, trust: service.Trust{Forwarders: forwarders}})
	d.local = newRig(t, rigOptions{policy: policy, trust: service.Trust{ServiceAccounts: verifier}})
	d.socket = newRig(t, rigOptions{policy: policy, socket: true, trust: service.Trust{Forwarders: forwarders, ServiceAccounts: verifier}})
	d.users = newRig(t, rigOptions{policy: policy, socket: true, trust: service.Trust{ServiceAccounts: verifier}})
	return d
}

// shows makes the settings of a client that shows a certificate of the doors'
// authority.
func (d *doors) shows(changes ...func(*x509.Certificate)) *tls.Config {
	return clientOf(d.ca, func(c *x509.Certificate) {
		for _, change := range changes {
			change(c)
		}
	})
}

// with makes the settings of a client that shows that certificate.
func (d *doors) with(leaf tls.Certificate) *tls.Config {
	c := clientOf(d.ca, nil)
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &leaf, nil } // whatever the server asks for
	return c
}

func ids(t *testing.T, names ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		for _, n := range names {
			c.URIs = append(c.URIs, uri(t, n))
		}
	}
}

func lasting(from, to time.Duration) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(from), time.Now().Add(to) }
}

// signed returns a certificate for worker.example.com that another certificate
// has signed, whether that may sign or not; or it itself, if there is none.
func signed(t *testing.T, by *tls.Certificate) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{"worker.example.com"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	parent, signer, above := template, any(key), [][]byte(nil)
	if by != nil {
		if parent, err = x509.ParseCertificate(by.Certificate[0]); err != nil {
			t.Fatal(err)
		}
		signer, above = by.PrivateKey, by.Certificate
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: append([][]byte{der}, above...), PrivateKey: key}
}

// says are the headers of a call, by name and value in turns.
func says(pairs ...string) metadata.MD { return metadata.Pairs(pairs...) }

// Nobody gets in who does not prove, beyond doubt, to be somebody who may.
func TestWhoIsTurnedAway(t *testing.T) {
	d := openDoors(t)
	const (
		xfcc, l5d, auth = access.EnvoyHeader, access.LinkerdHeader, "authorization"
		unknown, denied = "CALLER_UNKNOWN", "CALLER_DENIED"
		hop             = "URI=" + batch
	)
	named := testca.Named
	worker, envoy, linkerd, both := named("worker.example.com"), named("envoy.example.com"), named("linkerd.example.com"), named("both.example.com")
	leaf := d.ca.Leaf(worker)
	for name, c := range map[string]struct {
		door    *rig
		client  *tls.Config
		headers metadata.MD
		code    codes.Code
		reason  string
		text    string // in what the caller sees
	}{
		// What the handshake refuses.
		"no certificate":                       {d.tls, clientOf(d.ca, nil), nil, codes.Unavailable, "", ""},
		"no TLS":                               {d.tls, nil, nil, codes.Unavailable, "", ""},
		"the wrong CA":                         {d.tls, d.with(testca.New(t).Leaf(worker)), nil, codes.Unavailable, "", ""},
		"expired":                              {d.tls, d.shows(worker, lasting(-2*time.Hour, -time.Minute)), nil, codes.Unavailable, "", ""},
		"not yet valid":                        {d.tls, d.shows(worker, lasting(time.Minute, 2*time.Hour)), nil, codes.Unavailable, "", ""},
		"not for clients":                      {d.tls, d.shows(worker, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), nil, codes.Unavailable, "", ""},
		"self-signed":                          {d.tls, d.with(signed(t, nil)), nil, codes.Unavailable, "", ""},
		"signed by a leaf":                     {d.tls, d.with(signed(t, &leaf)), nil, codes.Unavailable, "", ""},
		"the wrong CA, where tokens do, too":   {d.tokens, d.with(testca.New(t).Leaf(worker)), nil, codes.Unavailable, "", ""},
		"expired, with a good token":           {d.tokens, d.shows(worker, lasting(-2*time.Hour, -time.Minute)), says(auth, "Bearer "+goodToken), codes.Unavailable, "", ""},
		"the wrong CA, with a good token":      {d.tokens, d.with(testca.New(t).Leaf(worker)), says(auth, "Bearer "+goodToken), codes.Unavailable, "", ""},
		"the wrong CA, with a forged header":   {d.tls, d.with(testca.New(t).Leaf(envoy)), says(xfcc, hop), codes.Unavailable, "", ""},
		"no certificate, with a forged header": {d.tls, clientOf(d.ca, nil), says(xfcc, hop), codes.Unavailable, "", ""},

		// Certificates that name nobody, or somebody else.
		"another DNS name":                     {d.tls, d.shows(named("worker.example.net")), nil, codes.PermissionDenied, denied, "dns:worker.example.net may not"},
		"another SPIFFE ID":                    {d.tls, d.shows(ids(t, "spiffe://prod/ns/batch/other")), nil, codes.PermissionDenied, denied, "spiffe://prod/ns/batch/other may not"},
		"the name in the CN only":              {d.tls, d.shows(func(c *x509.Certificate) { c.Subject.CommonName = "worker.example.com" }), nil, codes.Unauthenticated, unknown, "common name"},
		"the SPIFFE ID in the CN only":         {d.tls, d.shows(func(c *x509.Certificate) { c.Subject.CommonName = batch }), nil, codes.Unauthenticated, unknown, "common name"},
		"another name, the good one in the CN": {d.tls, d.shows(named("worker.example.net"), func(c *x509.Certificate) { c.Subject.CommonName = "worker.example.com" }), nil, codes.PermissionDenied, denied, "dns:worker.example.net"},
		"two URIs":                             {d.tls, d.shows(ids(t, batch, "spiffe://prod/ns/web/worker")), nil, codes.Unauthenticated, unknown, "exactly one URI SAN"},
		"two DNS names":                        {d.tls, d.shows(named("worker.example.com", "other.example.com")), nil, codes.Unauthenticated, unknown, "exactly one DNS SAN"},
		"a good DNS name and a bad URI":        {d.tls, d.shows(worker, ids(t, "spiffe://prod")), nil, codes.Unauthenticated, unknown, "one spelling"},
		"a wildcard":                           {d.tls, d.shows(named("*.example.com")), nil, codes.Unauthenticated, unknown, "one spelling"},
		"a SPIFFE ID with dots":                {d.tls, d.shows(ids(t, "spiffe://prod/ns/web/../batch/worker")), nil, codes.Unauthenticated, unknown, "one spelling"},
		"anonymous as URI":                     {d.tls, d.shows(ids(t, "anonymous")), nil, codes.Unauthenticated, unknown, ""},
		"a service account as URI":             {d.tls, d.shows(ids(t, "k8s://prod/batch/worker")), nil, codes.Unauthenticated, unknown, ""},
		"a user as URI":                        {d.tls, d.shows(ids(t, fmt.Sprintf("unix:uid:%d", os.Getuid()))), nil, codes.Unauthenticated, unknown, ""},
		"two names where tokens do, too":       {d.tokens, d.shows(named("worker.example.com", "other.example.com")), nil, codes.Unauthenticated, unknown, "exactly one DNS SAN"},

		// Headers of proxies from whoever is none.
		"a forged header":                                    {d.tls, d.shows(worker), says(xfcc, hop), codes.Unauthenticated, unknown, "dns:worker.example.com is not believed when it says in " + xfcc},
		"a forged header with its own name":                  {d.tls, d.shows(worker), says(xfcc, "DNS=worker.example.com"), codes.Unauthenticated, unknown, "is not believed"},
		"an empty forged header":                             {d.tls, d.shows(worker), says(xfcc, ""), codes.Unauthenticated, unknown, "is not believed"},
		"a forged header of Linkerd":                         {d.tls, d.shows(worker), says(l5d, "worker.example.com"), codes.Unauthenticated, unknown, "is not believed when it says in " + l5d},
		"a forged header, with no proxies configured":        {d.local, nil, says(xfcc, hop), codes.Unauthenticated, unknown, "anonymous is not believed"},
		"a forged header over loopback":                      {d.loopback, nil, says(xfcc, hop), codes.Unauthenticated, unknown, "anonymous is not believed"},
		"a forged header of Linkerd over loopback":           {d.loopback, nil, says(l5d, "worker.example.com"), codes.Unauthenticated, unknown, "anonymous is not believed"},
		"a forged header on a socket":                        {d.users, nil, says(xfcc, hop), codes.Unauthenticated, unknown, "is not believed"},
		"a forged header by a certificate that names nobody": {d.tls, d.shows(named("a.example.com", "b.example.com")), says(xfcc, hop), codes.Unauthenticated, unknown, "must prove who it is itself"},
		"a forged header without a certificate":              {d.tokens, clientOf(d.ca, nil), says(xfcc, hop), codes.Unauthenticated, unknown, "must prove who it is itself"},
		"a forged header without a certificate, and a token": {d.tokens, clientOf(d.ca, nil), says(xfcc, hop, auth, "Bearer "+goodToken), codes.Unauthenticated, unknown, "must prove who it is itself"},
		"a proxy's name by SPIFFE ID instead of DNS":         {d.tls, d.shows(envoy, ids(t, batch)), says(xfcc, hop), codes.Unauthenticated, unknown, batch + " is not believed"},

		// Headers of proxies.
		"a proxy without a header":             {d.tls, d.shows(envoy), nil, codes.Unauthenticated, unknown, "is a proxy, which must say in " + xfcc},
		"a proxy with an empty header":         {d.tls, d.shows(envoy), says(xfcc, ""), codes.Unauthenticated, unknown, "malformed"},
		"a proxy with two headers":             {d.tls, d.shows(envoy), says(xfcc, hop, xfcc, hop), codes.Unauthenticated, unknown, "more than once"},
		"a proxy with two elements":            {d.tls, d.shows(envoy), says(xfcc, "URI=spiffe://prod/"+canary+","+hop), codes.Unauthenticated, unknown, "more than one element"},
		"a proxy with both kinds":              {d.tls, d.shows(envoy), says(xfcc, hop, l5d, "worker.example.com"), codes.Unauthenticated, unknown, "each say who"},
		"a proxy that may both, with both":     {d.tls, d.shows(both), says(xfcc, hop, l5d, "worker.example.com"), codes.Unauthenticated, unknown, "each say who"},
		"a proxy that may both, with none":     {d.tls, d.shows(both), nil, codes.Unauthenticated, unknown, "l5d-client-id or x-forwarded-client-cert"},
		"a proxy with the other header":        {d.tls, d.shows(envoy), says(l5d, "worker.example.com"), codes.Unauthenticated, unknown, "is not believed when it says in " + l5d},
		"a proxy for somebody else's callers":  {d.tls, d.shows(envoy), says(xfcc, "URI=spiffe://prod/ns/web/worker"), codes.Unauthenticated, unknown, "may not speak for that caller"},
		"a proxy for itself":                   {d.tls, d.shows(envoy), says(xfcc, "DNS=envoy.example.com"), codes.Unauthenticated, unknown, "may not speak for that caller"},
		"a proxy for a service account":        {d.tls, d.shows(both), says(xfcc, "URI=k8s://prod/batch/worker"), codes.Unauthenticated, unknown, "another kind"},
		"a proxy for anonymous":                {d.tls, d.shows(both), says(xfcc, "URI=anonymous"), codes.Unauthenticated, unknown, "no acceptable caller"},
		"a proxy for a user":                   {d.tls, d.shows(both), says(xfcc, fmt.Sprintf("URI=unix:uid:%d", os.Getuid())), codes.Unauthenticated, unknown, "no acceptable caller"},
		"a proxy with a malformed header":      {d.tls, d.shows(envoy), says(xfcc, canary), codes.Unauthenticated, unknown, "malformed"},
		"a proxy with two URIs":                {d.tls, d.shows(envoy), says(xfcc, hop+";"+hop), codes.Unauthenticated, unknown, "more than one URI"},
		"a proxy with a subject only":          {d.tls, d.shows(envoy), says(xfcc, `Subject="CN=worker.example.com"`), codes.Unauthenticated, unknown, "no URI SAN and no DNS SAN"},
		"a proxy with a caller that may not":   {d.tls, d.shows(envoy), says(xfcc, "URI=spiffe://prod/ns/batch/other"), codes.PermissionDenied, denied, "spiffe://prod/ns/batch/other may not"},
		"a proxy with a token":                 {d.tokens, d.shows(envoy), says(auth, "Bearer "+goodToken), codes.Unauthenticated, unknown, "must say in " + xfcc},
		"a proxy with a header and a token":    {d.tokens, d.shows(envoy), says(xfcc, hop, auth, "Bearer "+goodToken), codes.Unauthenticated, unknown, "as well"},
		"Linkerd without its header":           {d.tls, d.shows(linkerd), nil, codes.Unauthenticated, unknown, "must say in l5d-client-id"},
		"Linkerd with an empty header":         {d.tls, d.shows(linkerd), says(l5d, ""), codes.Unauthenticated, unknown, "no host name"},
		"Linkerd with a SPIFFE ID":             {d.tls, d.shows(linkerd), says(l5d, batch), codes.Unauthenticated, unknown, "no host name"},
		"Linkerd with two headers":             {d.tls, d.shows(linkerd), says(l5d, "worker.example.com", l5d, "worker.example.com"), codes.Unauthenticated, unknown, "more than once"},
		"Linkerd with Envoy's":                 {d.tls, d.shows(linkerd), says(xfcc, hop), codes.Unauthenticated, unknown, "is not believed"},
		"a proxy on a socket without a header": {d.socket, nil, nil, codes.Unauthenticated, unknown, "is a proxy, which must say"},
		"a proxy on a socket with a token":     {d.socket, nil, says(auth, "Bearer "+goodToken), codes.Unauthenticated, unknown, "is a proxy, which must say"},
		"a proxy on a socket for a stranger":   {d.socket, nil, says(xfcc, "URI=spiffe://prod/ns/web/worker"), codes.Unauthenticated, unknown, "may not speak for that caller"},

		// Bearer tokens.
		"a token where none are accepted":             {d.loopback, nil, says(auth, "Bearer "+goodToken), codes.Unauthenticated, unknown, "service_accounts is not configured"},
		"basic authentication where none is accepted": {d.loopback, nil, says(auth, "Basic "+canary), codes.Unauthenticated, unknown, "service_accounts is not configured"},
		"a token beside a certificate, none accepted": {d.tls, d.shows(worker), says(auth, "Bearer "+goodToken), codes.Unauthenticated, unknown, "a client certificate and a bearer token"},
		"a token beside a certificate":                {d.tokens, d.shows(worker), says(auth, "Bearer "+goodToken), codes.Unauthenticated, unknown, "a client certificate and a bearer token"},
		"a token beside a certificate of nobody":      {d.tokens, d.shows(named("a.example.com", "b.example.com")), says(auth, "Bearer "+goodToken), codes.Unauthenticated, unknown, "a client certificate and a bearer token"},
		"neither certificate nor token":               {d.tokens, clientOf(d.ca, nil), nil, codes.Unauthenticated, unknown, "no identity: show a client certificate"},
		"a token that is refused":                     {d.tokens, clientOf(d.ca, nil), says(auth, "Bearer "+canary), codes.Unauthenticated, unknown, "the bearer token was refused"},
		"a token that is refused, over loopback":      {d.local, nil, says(auth, "Bearer "+canary), codes.Unauthenticated, unknown, "the bearer token was refused"},
		"a token that is refused, on a socket":        {d.users, nil, says(auth, "Bearer "+canary), codes.Unauthenticated, unknown, "the bearer token was refused"},
		"two tokens":                                  {d.tokens, clientOf(d.ca, nil), says(auth, "Bearer "+goodToken, auth, "Bearer "+goodToken), codes.Unauthenticated, unknown, "more than one authorization header"},
		"two tokens in one":                           {d.tokens, clientOf(d.ca, nil), says(auth, "Bearer "+goodToken+", Bearer "+goodToken), codes.Unauthenticated, unknown, "must be Bearer"},
		"basic authentication":                        {d.tokens, clientOf(d.ca, nil), says(auth, "Basic "+canary), codes.Unauthenticated, unknown, "must be Bearer"},
		"a token without a scheme":                    {d.tokens, clientOf(d.ca, nil), says(auth, goodToken), codes.Unauthenticated, unknown, "must be Bearer"},
		"a scheme without a token":                    {d.tokens, clientOf(d.ca, nil), says(auth, "Bearer"), codes.Unauthenticated, unknown, "must be Bearer"},
		"an empty header":                             {d.tokens, clientOf(d.ca, nil), says(auth, ""), codes.Unauthenticated, unknown, "must be Bearer"},
		"an empty header over loopback":               {d.local, nil, says(auth, ""), codes.Unauthenticated, unknown, "must be Bearer"},
		"a token of signs":                            {d.tokens, clientOf(d.ca, nil), says(auth, "Bearer =="), codes.Unauthenticated, unknown, "must be Bearer"},
		"two blanks":                                  {d.tokens, clientOf(d.ca, nil), says(auth, "Bearer  "+goodToken), codes.Unauthenticated, unknown, "must be Bearer"},
		"a token too long":                            {d.tokens, clientOf(d.ca, nil), says(auth, "Bearer "+strings.Repeat("x", longToken)), codes.Unauthenticated, unknown, "longer than 16 KiB"},
	} {
		t.Run(name, func(t *testing.T) {
			conn := c.door.dial(c.client)
			ctx := metadata.NewOutgoingContext(within(t, 20*time.Second), c.headers)
			_, err := pb.NewTokenBrokerClient(conn).IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"})
			got := detailsOf(err)
			if got.code != c.code || got.info.Reason != c.reason || !strings.Contains(got.text, c.text) {
				t.Errorf("got %v %s: %s\nwant %v %s: … %s …", got.code, got.info.Reason, got.text, c.code, c.reason, c.text)
			}
			if c.code != codes.PermissionDenied { // who is somebody may ask who
				for method, err := range otherMethods(ctx, conn) {
					if d := detailsOf(err); d.code != c.code || d.info.Reason != c.reason {
						t.Errorf("%s: got %v %s: %s", method, d.code, d.info.Reason, d.text)
					}
				}
			}
			if c.reason != "" && got.info.Metadata["request_id"] == "" {
				t.Errorf("no request id: %v", got.info)
			}
			if strings.Contains(got.text+c.door.log.String(), canary) || strings.Contains(got.text+c.door.log.String(), goodToken) {
				t.Error("what was sent is in the answer, or in the log")
			}
			c.door.wantRequests(0)
		})
	}
	// What callers are not told the log has: why, and who was at the other end.
	for text, r := range map[string]*rig{
		"the audience is another one":                                                 d.tokens,
		"there is no URI SAN and more than one DNS SAN":                               d.tls,
		`"peer":"dns:envoy.example.com"`:                                              d.tls,
		"the SPIFFE ID in the URI SAN has no path":                                    d.tls,
		`"caller":"spiffe://prod/ns/batch/other","forwarder":"dns:envoy.example.com"`: d.tls,
	} {
		if !strings.Contains(r.log.String(), text) {
			t.Errorf("%s is not in the log", text)
		}
	}
}

// otherMethods calls some of what else there is.
func otherMethods(ctx context.Context, conn *grpc.ClientConn) map[string]error {
	_, who := pb.NewTokenBrokerClient(conn).WhoAmI(ctx, &pb.WhoAmIRequest{})
	_, list := pb.NewProfileAdminClient(conn).ListProfiles(ctx, &pb.ListProfilesRequest{})
	return map[string]error{"WhoAmI": who, "ListProfiles": list, "reflection": listServices(ctx, conn)}
}

// listServices asks for the schema.
func listServices(ctx context.Context, conn *grpc.ClientConn) error {
	stream, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		return err
	}
	// The server's answer is what counts; sending fails with io.EOF once there is one.
	_ = stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
	_, err = stream.Recv()
	return err
}

// Who proves who it is gets in by that name, whatever the door.
func TestWhoGetsIn(t *testing.T) {
	d := openDoors(t)
	me := fmt.Sprintf("unix:uid:%d", os.Getuid())
	const (
		xfcc, auth = access.EnvoyHeader, "authorization"
		uriSAN     = pb.IdentityProof_IDENTITY_PROOF_URI_SAN
		dnsSAN     = pb.IdentityProof_IDENTITY_PROOF_DNS_SAN
		forwarded  = pb.IdentityProof_IDENTITY_PROOF_FORWARDED
		account    = pb.IdentityProof_IDENTITY_PROOF_SERVICE_ACCOUNT
	)
	envoy := testca.Named("envoy.example.com")
	for name, c := range map[string]struct {
		door      *rig
		client    *tls.Config
		headers   metadata.MD
		caller    string
		proof     pb.IdentityProof
		forwarder string
	}{
		"a SPIFFE ID":                        {d.tls, d.shows(ids(t, batch)), nil, batch, uriSAN, ""},
		"a SPIFFE ID beside DNS names":       {d.tls, d.shows(ids(t, batch), testca.Named("a.example.com", "b.example.com")), nil, batch, uriSAN, ""},
		"a DNS name":                         {d.tls, d.shows(testca.Named("Worker.example.com")), nil, "dns:worker.example.com", dnsSAN, ""},
		"a certificate where tokens do, too": {d.tokens, d.shows(ids(t, batch)), nil, batch, uriSAN, ""},
		"behind Envoy":                       {d.tls, d.shows(envoy), says(xfcc, "By=spiffe://prod/broker;Hash=00;URI="+batch), batch, forwarded, envoyName},
		"behind Envoy by DNS name":           {d.tls, d.shows(envoy), says(xfcc, "Hash=00;URI=;DNS=worker.example.com"), "dns:worker.example.com", forwarded, envoyName},
		"behind Envoy where tokens do, too":  {d.tokens, d.shows(envoy), says(xfcc, "URI="+batch), batch, forwarded, envoyName},
		"behind Linkerd":                     {d.tls, d.shows(testca.Named("linkerd.example.com")), says(access.LinkerdHeader, "worker.example.com"), "dns:worker.example.com", forwarded, "dns:linkerd.example.com"},
		"behind a proxy on a socket":         {d.socket, nil, says(xfcc, "URI="+batch), batch, forwarded, me},
		"a token by TLS":                     {d.tokens, clientOf(d.ca, nil), says(auth, "Bearer "+goodToken), "k8s://prod/batch/worker", account, ""},
		"a token, the scheme in capitals":    {d.tokens, clientOf(d.ca, nil), says(auth, "BEARER "+goodToken), "k8s://prod/batch/worker", account, ""},
		"a token over loopback":              {d.local, nil, says(auth, "bearer "+goodToken), "k8s://prod/batch/worker", account, ""},
		"a token on a socket":                {d.users, nil, says(auth, "Bearer "+goodToken), "k8s://prod/batch/worker", account, ""},
		"a user on a socket":                 {d.users, nil, nil, me, pb.IdentityProof_IDENTITY_PROOF_UNIX_PEER, ""},
		"anonymous":                          {d.local, nil, nil, "anonymous", pb.IdentityProof_IDENTITY_PROOF_ANONYMOUS_LOOPBACK, ""},
	} {
		t.Run(name, func(t *testing.T) {
			conn := c.door.dial(c.client)
			ctx := metadata.NewOutgoingContext(within(t, 20*time.Second), c.headers)
			who, err := pb.NewTokenBrokerClient(conn).WhoAmI(ctx, &pb.WhoAmIRequest{})
			if err != nil || who.GetCaller() != c.caller || who.GetProof() != c.proof || who.GetForwarder() != c.forwarder {
				t.Errorf("%v, %v; want %s by %v through %q", who, err, c.caller, c.proof, c.forwarder)
			}
			if _, err := pb.NewTokenBrokerClient(conn).IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
				t.Error(err)
			}
			if err := listServices(ctx, conn); err != nil {
				t.Errorf("reflection: %v", err)
			}
		})
	}
}

// Probes prove nothing, and are told nothing but whether the server is well.
func TestHealthIsForAllWhoCanConnect(t *testing.T) {
	d := openDoors(t)
	for name, c := range map[string]struct {
		door   *rig
		client *tls.Config
	}{
		"no certificate, where tokens do": {d.tokens, clientOf(d.ca, nil)},
		"a proxy":                         {d.tls, d.shows(testca.Named("envoy.example.com"))},
		"a certificate of nobody":         {d.tls, d.shows(testca.Named("a.example.com", "b.example.com"))},
		"loopback":                        {d.loopback, nil},
		"a socket":                        {d.socket, nil},
	} {
		got, err := healthpb.NewHealthClient(c.door.dial(c.client)).Check(within(t, 20*time.Second), &healthpb.HealthCheckRequest{})
		if err != nil || got.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	if _, err := healthpb.NewHealthClient(d.tls.dial(clientOf(d.ca, nil))).Check(within(t, 20*time.Second), &healthpb.HealthCheckRequest{}); err == nil {
		t.Error("without a certificate where one is demanded: got an answer")
	}
}

// By default a unix peer may do nothing: it is somebody.
func TestNoPolicyMeansNothingForUnixPeers(t *testing.T) {
	r := newRig(t, rigOptions{socket: true})
	_, err := r.tokens().IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
	wantFailure(t, err, codes.PermissionDenied, "CALLER_DENIED", "invoices")
	r.wantRequests(0)
}

// A unix peer is in the groups of its process, and in no other.
func TestUnixPeersAreInTheirGroups(t *testing.T) {
	const nobodys = 4_000_000_000
	groups, err := os.Getgroups()
	if err != nil {
		t.Fatal(err)
	}
	for gid, code := range map[int]codes.Code{os.Getgid(): codes.OK, nobodys: codes.PermissionDenied} {
		r := newRig(t, rigOptions{socket: true, policy: []access.Rule{{Callers: []string{fmt.Sprintf("unix:gid:%d", gid)}, Profiles: []string{"invoices"}, Allow: []string{"issue"}}}})
		_, err := r.tokens().IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
		if d := detailsOf(err); d.code != code {
			t.Errorf("group %d of %d and %v: %v", gid, os.Getgid(), groups, err)
		}
	}
}

// A connection lives on when its certificate ends; its calls are refused.
func TestCertificateEndsUnderAnOpenConnection(t *testing.T) {
	t.Parallel()
	a := testca.New(t)
	r := newRig(t, rigOptions{tls: func() *tls.Config { return serverOf(a) }, policy: []access.Rule{{Callers: []string{"dns:worker.example.com"}, Profiles: []string{"*"}, Allow: []string{"issue"}}}})
	end := time.Now().Add(6 * time.Second).Truncate(time.Second)
	conn := r.dial(clientOf(a, func(c *x509.Certificate) {
		testca.Named("worker.example.com")(c)
		c.NotAfter = end
	}))
	client := pb.NewTokenBrokerClient(conn)
	if _, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Fatal(err)
	}
	var err error
	eventually(t, "a refusal", func() bool {
		_, err = client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
		return err != nil
	})
	if time.Now().Before(end) {
		t.Error("refused before the certificate has ended")
	}
	if d := wantFailure(t, err, codes.Unauthenticated, "CALLER_UNKNOWN", ""); !strings.Contains(d.text, "the client certificate has ended since this connection was made") {
		t.Error(d.text)
	}
	r.wantRequests(1)
}

// A connection lives on when its certificate is revoked; its calls are refused,
// and nobody else's.
func TestCertificateIsRevokedUnderAnOpenConnection(t *testing.T) {
	a := testca.New(t)
	r := newRig(t, rigOptions{tls: func() *tls.Config { return serverOf(a) }, policy: []access.Rule{{Callers: []string{"dns:worker.example.com"}, Profiles: []string{"*"}, Allow: []string{"issue"}}}})
	bad := a.Leaf(testca.Named("worker.example.com"))
	settings := clientOf(a, nil)
	settings.Certificates = []tls.Certificate{bad}
	good, revoked := pb.NewTokenBrokerClient(r.dial(clientOf(a, testca.Named("worker.example.com")))), pb.NewTokenBrokerClient(r.dial(settings))
	ask := func(c pb.TokenBrokerClient) error {
		_, err := c.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
		return err
	}
	if err := errors.Join(ask(good), ask(revoked)); err != nil {
		t.Fatal(err)
	}
	list, err := x509.ParseRevocationList(a.RevocationList(nil, bad.Leaf))
	if err != nil {
		t.Fatal(err)
	}
	revocations := access.NewRevocations([]*x509.Certificate{a.Certificate()})
	if err := revocations.Add(list); err != nil {
		t.Fatal(err)
	}
	r.service.SetTrust(service.Trust{Revocations: revocations})
	if d := wantFailure(t, ask(revoked), codes.Unauthenticated, "CALLER_UNKNOWN", ""); !strings.Contains(d.text, "has been revoked") {
		t.Error(d.text)
	}
	if err := ask(good); err != nil {
		t.Error(err)
	}
	r.service.SetTrust(service.Trust{})
	if err := ask(revoked); err != nil {
		t.Errorf("without the list: %v", err)
	}
}

// What is believed changes for open connections.
func TestTrustChangesAtOnce(t *testing.T) {
	a := testca.New(t)
	r := newRig(t, rigOptions{tls: func() *tls.Config { return serverOf(a) }, policy: []access.Rule{{Callers: []string{batch, envoyName}, Profiles: []string{"*"}, Allow: []string{"issue"}}}})
	client := pb.NewTokenBrokerClient(r.dial(clientOf(a, testca.Named("envoy.example.com"))))
	ask := func(headers metadata.MD) error {
		_, err := client.IssueToken(metadata.NewOutgoingContext(t.Context(), headers), &pb.IssueTokenRequest{Profile: "invoices"})
		return err
	}
	forwarded := says(access.EnvoyHeader, "URI="+batch)
	for range 2 {
		r.service.SetTrust(service.Trust{})
		if err := ask(nil); err != nil {
			t.Error(err)
		}
		wantFailure(t, ask(forwarded), codes.Unauthenticated, "CALLER_UNKNOWN", "")
		f, err := access.NewForwarders([]access.Forwarder{{Peers: []string{envoyName}, Header: access.EnvoyHeader}})
		if err != nil {
			t.Fatal(err)
		}
		r.service.SetTrust(service.Trust{Forwarders: f})
		if err := ask(forwarded); err != nil {
			t.Error(err)
		}
		wantFailure(t, ask(nil), codes.Unauthenticated, "CALLER_UNKNOWN", "")
	}
}
