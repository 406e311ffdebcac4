package service_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/tokenbroker/tokenbroker/internal/service"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// authority issues the certificates of a test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	a := &authority{t: t}
	a.cert, a.key = a.make(&x509.Certificate{
		Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}, nil)
	return a
}

func (a *authority) make(template, parent *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	signer := a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

// leaf returns a certificate of the authority.
func (a *authority) leaf(change func(*x509.Certificate)) tls.Certificate {
	template := &x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	change(template)
	cert, key := a.make(template, a.cert)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// server returns the settings of a server that wants the authority's clients.
func (a *authority) server() *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{a.leaf(func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)} })},
		ClientCAs:    a.pool(),
		ClientAuth:   tls.RequireAndVerifyClientCert,
		NextProtos:   []string{"h2"},
	}
}

// client returns the settings of a client that shows what change makes of its
// certificate.
func (a *authority) client(change func(*x509.Certificate)) *tls.Config {
	c := &tls.Config{RootCAs: a.pool(), ServerName: "127.0.0.1"}
	if change != nil {
		c.Certificates = []tls.Certificate{a.leaf(change)}
	}
	return c
}

func uri(t *testing.T, s string) *url.URL {
	t.Helper()
	u, err := url.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func TestCallersByCertificate(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	r := newRig(t, rigOptions{tls: a.server, more: []string{"payroll"}, policy: []service.Rule{
		{Callers: []string{"spiffe://prod/ns/batch/*"}, Profiles: []string{"invoices"}, Allow: []string{"issue"}},
		{Callers: []string{"dns:*.example.com"}, Profiles: []string{"*"}, Allow: []string{"admin", "issue", "refresh"}},
	}})
	spiffe := func(ids ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			for _, id := range ids {
				c.URIs = append(c.URIs, uri(t, id))
			}
		}
	}
	dns := func(names ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.DNSNames = names }
	}
	for name, c := range map[string]struct {
		client *tls.Config
		code   codes.Code
		reason string
	}{
		"its SPIFFE ID":      {a.client(spiffe("spiffe://prod/ns/batch/worker")), codes.OK, ""},
		"its DNS name":       {a.client(dns("worker.example.com")), codes.OK, ""},
		"another SPIFFE ID":  {a.client(spiffe("spiffe://prod/ns/web/worker")), codes.PermissionDenied, "CALLER_DENIED"},
		"a deeper SPIFFE ID": {a.client(spiffe("spiffe://prod/ns/batch/x/worker")), codes.PermissionDenied, "CALLER_DENIED"},
		"a deeper DNS name":  {a.client(dns("x.worker.example.com")), codes.PermissionDenied, "CALLER_DENIED"},
		"a longer DNS name":  {a.client(dns("worker.example.com.evil.net")), codes.PermissionDenied, "CALLER_DENIED"},
		"the ID in the CN":   {a.client(func(c *x509.Certificate) { c.Subject.CommonName = "worker.example.com" }), codes.Unauthenticated, "CALLER_UNKNOWN"},
		"two URIs":           {a.client(spiffe("spiffe://prod/ns/batch/a", "spiffe://prod/ns/batch/b")), codes.Unauthenticated, "CALLER_UNKNOWN"},
		"two DNS names":      {a.client(dns("a.example.com", "b.example.com")), codes.Unauthenticated, "CALLER_UNKNOWN"},
		"no certificate":     {a.client(nil), codes.Unavailable, ""},
		"another CA":         {&tls.Config{RootCAs: a.pool(), ServerName: "127.0.0.1", Certificates: []tls.Certificate{other.leaf(dns("worker.example.com"))}}, codes.Unavailable, ""},
		"not for clients": {a.client(func(c *x509.Certificate) {
			dns("worker.example.com")(c)
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}), codes.Unavailable, ""},
		"TLS 1.2": {func() *tls.Config {
			c := a.client(dns("worker.example.com"))
			c.MaxVersion = tls.VersionTLS12
			return c
		}(), codes.Unavailable, ""},
		"a DNS name as URI":     {a.client(spiffe("dns:worker.example.com")), codes.Unauthenticated, "CALLER_UNKNOWN"},
		"a DNS URI with a host": {a.client(spiffe("dns://worker.example.com")), codes.Unauthenticated, "CALLER_UNKNOWN"},
		"anonymous as URI":      {a.client(spiffe("anonymous")), codes.Unauthenticated, "CALLER_UNKNOWN"},
		"a wildcard":            {a.client(dns("*.example.com")), codes.Unauthenticated, "CALLER_UNKNOWN"},
		"DNS in capitals":       {a.client(dns("WORKER.example.com")), codes.OK, ""},
	} {
		t.Run(name, func(t *testing.T) {
			client := pb.NewTokenBrokerClient(r.dial(c.client))
			_, err := client.IssueToken(within(t, 10*time.Second), &pb.IssueTokenRequest{Profile: "invoices"})
			if d := detailsOf(err); d.code != c.code || d.info.Reason != c.reason {
				t.Errorf("got %v %s: %s; want %v %s", d.code, d.info.Reason, d.text, c.code, c.reason)
			}
		})
	}
}

func TestForbiddenAndUnknownProfilesLookAlike(t *testing.T) {
	a := newAuthority(t)
	r := newRig(t, rigOptions{tls: a.server, more: []string{"payroll"}, policy: []service.Rule{
		{Callers: []string{"dns:worker.example.com"}, Profiles: []string{"invoices"}, Allow: []string{"issue", "refresh", "admin"}},
	}})
	conn := r.dial(a.client(func(c *x509.Certificate) { c.DNSNames = []string{"worker.example.com"} }))
	tokens, admin := pb.NewTokenBrokerClient(conn), pb.NewProfileAdminClient(conn)
	ask := func(profile string) map[string]detail {
		_, issue := tokens.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: profile})
		_, refresh := tokens.RefreshToken(t.Context(), &pb.RefreshTokenRequest{Profile: profile, RejectedTokenId: "0123456789abcdef"})
		_, get := admin.GetProfile(t.Context(), &pb.GetProfileRequest{Profile: profile})
		_, reset := admin.ResetProfile(t.Context(), &pb.ResetProfileRequest{Profile: profile})
		return map[string]detail{"issue": detailsOf(issue), "refresh": detailsOf(refresh), "get": detailsOf(get), "reset": detailsOf(reset)}
	}
	// The names have one length, so that even the texts must be the same.
	forbidden, unknown := ask("payroll"), ask("nothing")
	for method, f := range forbidden {
		u := unknown[method]
		f.info.Metadata["profile"], f.info.Metadata["request_id"] = u.info.Metadata["profile"], u.info.Metadata["request_id"]
		f.text = replace(f.text, "payroll", "nothing")
		if f.code != codes.PermissionDenied || f.code != u.code || f.text != u.text || f.info.String() != u.info.String() || len(f.fields)+len(u.fields) != 0 {
			t.Errorf("%s: forbidden %v %q, unknown %v %q", method, f.code, f.text, u.code, u.text)
		}
	}

	who, err := tokens.WhoAmI(t.Context(), &pb.WhoAmIRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if who.GetCaller() != "dns:worker.example.com" || who.GetProof() != pb.IdentityProof_IDENTITY_PROOF_DNS_SAN || who.GetRequestId() == "" ||
		len(who.GetPermissions()) != 1 || who.GetPermissions()[0].GetProfile() != "invoices" || len(who.GetPermissions()[0].GetOperations()) != 3 {
		t.Errorf("who am I: %v", who)
	}
	list, err := admin.ListProfiles(t.Context(), &pb.ListProfilesRequest{})
	if err != nil || len(list.GetProfiles()) != 1 || list.GetProfiles()[0].GetName() != "invoices" {
		t.Errorf("list: %v, %v", list, err)
	}
}

func replace(s, old, new string) string {
	for i := 0; i+len(old) <= len(s); i++ {
		if s[i:i+len(old)] == old {
			return s[:i] + new + s[i+len(old):]
		}
	}
	return s
}

func TestNoPolicyMeansNothingForAuthenticatedCallers(t *testing.T) {
	a := newAuthority(t)
	r := newRig(t, rigOptions{tls: a.server})
	client := pb.NewTokenBrokerClient(r.dial(a.client(func(c *x509.Certificate) { c.DNSNames = []string{"worker.example.com"} })))
	_, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
	wantFailure(t, err, codes.PermissionDenied, "CALLER_DENIED", "invoices")
	r.wantRequests(0)
}

func TestPolicyBindsAnonymousCallersOnceThereIsOne(t *testing.T) {
	r := newRig(t, rigOptions{policy: []service.Rule{
		{Callers: []string{"anonymous"}, Profiles: []string{"invoices"}, Allow: []string{"issue"}},
	}})
	if _, err := r.tokens().IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Error(err)
	}
	_, err := r.admin().GetProfile(t.Context(), &pb.GetProfileRequest{Profile: "invoices"})
	wantFailure(t, err, codes.PermissionDenied, "CALLER_DENIED", "invoices")
}

func TestPolicyChangesAtOnce(t *testing.T) {
	r := newRig(t, rigOptions{})
	client := r.tokens()
	issue := func() error {
		_, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
		return err
	}
	if err := issue(); err != nil {
		t.Fatal(err)
	}
	deny, err := service.NewPolicy([]service.Rule{{Callers: []string{"dns:somebody"}, Profiles: []string{"*"}, Allow: []string{"issue"}}})
	if err != nil {
		t.Fatal(err)
	}
	r.service.SetPolicy(deny) // the connection stays open
	wantFailure(t, issue(), codes.PermissionDenied, "CALLER_DENIED", "invoices")
}

func TestCertificatesChangeUnderARunningServer(t *testing.T) {
	first, second := newAuthority(t), newAuthority(t)
	var current atomic.Pointer[tls.Config]
	current.Store(first.server())
	rules := []service.Rule{{Callers: []string{"dns:worker.example.com"}, Profiles: []string{"*"}, Allow: []string{"issue"}}}
	r := newRig(t, rigOptions{tls: current.Load, policy: rules})
	worker := func(c *x509.Certificate) { c.DNSNames = []string{"worker.example.com"} }
	old := pb.NewTokenBrokerClient(r.dial(first.client(worker)))
	if _, err := old.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Fatal(err)
	}
	current.Store(second.server())
	if _, err := pb.NewTokenBrokerClient(r.dial(second.client(worker))).IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Errorf("a client of the new authority: %v", err)
	}
	if _, err := old.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Errorf("a connection from before the change: %v", err)
	}
	if _, err := pb.NewTokenBrokerClient(r.dial(first.client(worker))).IssueToken(within(t, 10*time.Second), &pb.IssueTokenRequest{Profile: "invoices"}); err == nil {
		t.Error("a new connection with the old authority's certificate was accepted")
	}
}
