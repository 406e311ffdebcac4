package service_test

import (
	"crypto/tls"
	"crypto/x509"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/testca"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// serverOf returns the settings of a server that wants the authority's clients.
func serverOf(a *testca.Authority) *tls.Config {
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{a.Leaf(testca.Loopback)},
		ClientCAs:    a.Pool(),
		ClientAuth:   tls.RequireAndVerifyClientCert,
		NextProtos:   []string{"h2"},
	}
}

// clientOf returns the settings of a client that shows what change makes of its
// certificate.
func clientOf(a *testca.Authority, change func(*x509.Certificate)) *tls.Config {
	c := &tls.Config{RootCAs: a.Pool(), ServerName: "127.0.0.1"}
	if change != nil {
		c.Certificates = []tls.Certificate{a.Leaf(change)}
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
	a, other := testca.New(t), testca.New(t)
	r := newRig(t, rigOptions{tls: func() *tls.Config { return serverOf(a) }, more: []string{"payroll"}, policy: []access.Rule{
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
	dns := testca.Named
	for name, c := range map[string]struct {
		client *tls.Config
		code   codes.Code
		reason string
	}{
		"its SPIFFE ID":      {clientOf(a, spiffe("spiffe://prod/ns/batch/worker")), codes.OK, ""},
		"its DNS name":       {clientOf(a, dns("worker.example.com")), codes.OK, ""},
		"another SPIFFE ID":  {clientOf(a, spiffe("spiffe://prod/ns/web/worker")), codes.PermissionDenied, "CALLER_DENIED"},
		"a deeper SPIFFE ID": {clientOf(a, spiffe("spiffe://prod/ns/batch/x/worker")), codes.PermissionDenied, "CALLER_DENIED"},
		"a deeper DNS name":  {clientOf(a, dns("x.worker.example.com")), codes.PermissionDenied, "CALLER_DENIED"},
		"a longer DNS name":  {clientOf(a, dns("worker.example.com.evil.net")), codes.PermissionDenied, "CALLER_DENIED"},
		"the ID in the CN":   {clientOf(a, func(c *x509.Certificate) { c.Subject.CommonName = "worker.example.com" }), codes.Unauthenticated, "CALLER_UNKNOWN"},
		"two URIs":           {clientOf(a, spiffe("spiffe://prod/ns/batch/a", "spiffe://prod/ns/batch/b")), codes.Unauthenticated, "CALLER_UNKNOWN"},
		"two DNS names":      {clientOf(a, dns("a.example.com", "b.example.com")), codes.Unauthenticated, "CALLER_UNKNOWN"},
		"no certificate":     {clientOf(a, nil), codes.Unavailable, ""},
		"another CA":         {&tls.Config{RootCAs: a.Pool(), ServerName: "127.0.0.1", Certificates: []tls.Certificate{other.Leaf(dns("worker.example.com"))}}, codes.Unavailable, ""},
		"not for clients": {clientOf(a, func(c *x509.Certificate) {
			dns("worker.example.com")(c)
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}), codes.Unavailable, ""},
		"TLS 1.2": {func() *tls.Config {
			c := clientOf(a, dns("worker.example.com"))
			c.MaxVersion = tls.VersionTLS12
			return c
		}(), codes.Unavailable, ""},
		"a DNS name as URI":     {clientOf(a, spiffe("dns:worker.example.com")), codes.Unauthenticated, "CALLER_UNKNOWN"},
		"a DNS URI with a host": {clientOf(a, spiffe("dns://worker.example.com")), codes.Unauthenticated, "CALLER_UNKNOWN"},
		"anonymous as URI":      {clientOf(a, spiffe("anonymous")), codes.Unauthenticated, "CALLER_UNKNOWN"},
		"a wildcard":            {clientOf(a, dns("*.example.com")), codes.Unauthenticated, "CALLER_UNKNOWN"},
		"DNS in capitals":       {clientOf(a, dns("WORKER.example.com")), codes.OK, ""},
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
	a := testca.New(t)
	r := newRig(t, rigOptions{tls: func() *tls.Config { return serverOf(a) }, more: []string{"payroll"}, policy: []access.Rule{
		{Callers: []string{"dns:worker.example.com"}, Profiles: []string{"invoices"}, Allow: []string{"issue", "refresh", "admin"}},
	}})
	conn := r.dial(clientOf(a, testca.Named("worker.example.com")))
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
	a := testca.New(t)
	r := newRig(t, rigOptions{tls: func() *tls.Config { return serverOf(a) }})
	client := pb.NewTokenBrokerClient(r.dial(clientOf(a, testca.Named("worker.example.com"))))
	_, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
	wantFailure(t, err, codes.PermissionDenied, "CALLER_DENIED", "invoices")
	r.wantRequests(0)
}

func TestPolicyBindsAnonymousCallersOnceThereIsOne(t *testing.T) {
	r := newRig(t, rigOptions{policy: []access.Rule{
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
	deny, err := access.NewPolicy([]access.Rule{{Callers: []string{"dns:somebody"}, Profiles: []string{"*"}, Allow: []string{"issue"}}})
	if err != nil {
		t.Fatal(err)
	}
	r.access.Use(deny) // the connection stays open
	wantFailure(t, issue(), codes.PermissionDenied, "CALLER_DENIED", "invoices")
}

func TestCertificatesChangeUnderARunningServer(t *testing.T) {
	first, second := testca.New(t), testca.New(t)
	var current atomic.Pointer[tls.Config]
	current.Store(serverOf(first))
	rules := []access.Rule{{Callers: []string{"dns:worker.example.com"}, Profiles: []string{"*"}, Allow: []string{"issue"}}}
	r := newRig(t, rigOptions{tls: current.Load, policy: rules})
	worker := testca.Named("worker.example.com")
	old := pb.NewTokenBrokerClient(r.dial(clientOf(first, worker)))
	if _, err := old.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Fatal(err)
	}
	current.Store(serverOf(second))
	if _, err := pb.NewTokenBrokerClient(r.dial(clientOf(second, worker))).IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Errorf("a client of the new authority: %v", err)
	}
	if _, err := old.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Errorf("a connection from before the change: %v", err)
	}
	if _, err := pb.NewTokenBrokerClient(r.dial(clientOf(first, worker))).IssueToken(within(t, 10*time.Second), &pb.IssueTokenRequest{Profile: "invoices"}); err == nil {
		t.Error("a new connection with the old authority's certificate was accepted")
	}
}
