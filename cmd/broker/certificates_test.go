package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/internal/config"
	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/workload/workloadtest"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// tlsConfig writes a config with these settings of TLS, where "tls" stands for
// the certificate, the key and the authorities that tlsFiles writes.
func (s *stage) tlsConfig(server, admin string) string {
	s.t.Helper()
	files := "certificate: server.pem, private_key: server.key, client_ca: ca.pem"
	text := s.config(`policy:`, `  - {callers: ["dns:*.example.com", "spiffe://prod.test/worker"], profiles: [invoices], allow: [issue, admin]}`)
	content, err := os.ReadFile(text)
	if err != nil {
		s.t.Fatal(err)
	}
	replaced := strings.Replace(string(content), `server: {address: "127.0.0.1:0"}`, `server: {address: "127.0.0.1:0", tls: {`+strings.Replace(server, "tls", files, 1)+`}}`, 1)
	if admin != "" {
		replaced = strings.Replace(replaced, `admin: {address: "127.0.0.1:0"}`, `admin: {address: "127.0.0.1:0", tls: {`+strings.Replace(admin, "tls", files, 1)+`}}`, 1)
	}
	return s.write("config.yaml", replaced)
}

// as connects with a certificate.
func (p *process) as(root *testca.Authority, client tls.Certificate) *grpc.ClientConn {
	p.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+p.address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		RootCAs: root.Pool(), ServerName: "127.0.0.1", Certificates: []tls.Certificate{client},
	})))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	return conn
}

// gauges are the metrics with that name, by their labels.
func gauges(t *testing.T, metrics, name string) map[string]time.Time {
	t.Helper()
	found := map[string]time.Time{}
	for _, m := range regexp.MustCompile(`(?m)^`+name+`\{(.*)\} (.*)$`).FindAllStringSubmatch(metrics, -1) {
		seconds, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			t.Fatal(err)
		}
		found[m[1]] = time.Unix(int64(seconds), 0)
	}
	return found
}

// A certificate is there before its key: nothing is told until that lasts.
func TestCertificateBeforeItsKey(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	authority := testca.New(t)
	s.tlsFiles(authority)
	p := start(t, s.tlsConfig("tls", ""))
	worker := authority.Leaf(testca.Named("worker.example.com"))
	open := p.as(authority, worker)
	if err := issue(t, open); err != nil {
		t.Fatal(err)
	}
	shown := func() *x509.Certificate {
		conn, err := tls.Dial("tcp", p.address, &tls.Config{RootCAs: authority.Pool(), ServerName: "127.0.0.1", Certificates: []tls.Certificate{worker}})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		return conn.ConnectionState().PeerCertificates[0]
	}
	before := shown()
	next := authority.Leaf(testca.Loopback)
	certificate, key := testca.PEM(t, next)
	s.write("server.pem", string(certificate))
	p.logged("config not reloaded yet, its files do not fit together at this moment")
	if !shown().Equal(before) {
		t.Error("the old certificate is not in force any more")
	}
	if err := issue(t, p.as(authority, worker)); err != nil {
		t.Errorf("a new connection: %v", err)
	}
	if _, metrics := p.get("/metrics"); !strings.Contains(metrics, `token_broker_config_reloads_total{result="failure"} 0`) || strings.Contains(p.log.String(), `"level":"ERROR"`) {
		t.Errorf("it is told as a failure\n%s", p.log)
	}
	s.write("server.key", string(key))
	p.await("the new certificate is in force", func() bool { return shown().Equal(next.Leaf) })

	// And now the key never comes.
	other, _ := testca.PEM(t, authority.Leaf(testca.Loopback))
	s.write("server.pem", string(other))
	p.logged("does not belong to the certificate in ")
	if _, metrics := p.get("/metrics"); !strings.Contains(metrics, `token_broker_config_reloads_total{result="failure"} 1`) {
		t.Error("the failure is not counted")
	}
	if !shown().Equal(next.Leaf) {
		t.Error("the last good certificate is not in force any more")
	}
	if err := issue(t, open); err != nil {
		t.Errorf("the connection from the beginning: %v", err)
	}
}

func TestRevocationReachesTheDoors(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	authority := testca.New(t)
	s.tlsFiles(authority)
	due := time.Now().Add(time.Hour).Truncate(time.Second)
	list := func(number int64, revoked ...*x509.Certificate) {
		s.write("ca.crl", string(testca.ListPEM(authority.RevocationList(func(l *x509.RevocationList) {
			l.Number, l.NextUpdate = big.NewInt(number), due
		}, revoked...))))
	}
	list(1)
	p := start(t, s.tlsConfig("tls, client_crl: [ca.crl]", "tls, client_crl: [ca.crl]"))
	good, bad := authority.Leaf(testca.Named("good.example.com")), authority.Leaf(testca.Named("bad.example.com"))
	console := func(certificate tls.Certificate) *http.Client {
		transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: authority.Pool(), Certificates: []tls.Certificate{certificate}}}
		t.Cleanup(transport.CloseIdleConnections)
		return &http.Client{Timeout: 10 * time.Second, Transport: transport}
	}
	get := func(c *http.Client, path string) (int, string) {
		r, err := c.Get("https://" + p.admin + path)
		if err != nil {
			return 0, err.Error()
		}
		defer r.Body.Close()
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return r.StatusCode, string(body)
	}
	openGood, openBad := console(good), console(bad)
	for name, c := range map[string]*http.Client{"good": openGood, "bad": openBad} {
		if status, body := get(c, "/"); status != http.StatusOK {
			t.Fatalf("%s: %d %s", name, status, body)
		}
	}
	openCalls := p.as(authority, bad)
	if err := issue(t, openCalls); err != nil {
		t.Fatal(err)
	}

	list(2, bad.Leaf)
	p.await("the revoked certificate is refused", func() bool { status, _ := get(openBad, "/"); return status == http.StatusForbidden })
	if status, body := get(openBad, "/"); status != http.StatusForbidden || !strings.Contains(body, "The certificate has been revoked") {
		t.Errorf("on an open connection: %d %s", status, body)
	}
	if err := issue(t, openCalls); status.Code(err) != codes.Unauthenticated || !strings.Contains(err.Error(), "has been revoked") {
		t.Errorf("gRPC on an open connection: %v", err)
	}
	if status, body := get(console(bad), "/"); status != 0 {
		t.Errorf("on a new connection: %d %s", status, body)
	}
	if err := issue(t, p.as(authority, bad)); status.Code(err) != codes.Unavailable {
		t.Errorf("gRPC on a new connection: %v", err)
	}
	if status, body := get(openGood, "/"); status != http.StatusOK {
		t.Errorf("who is not revoked: %d %s", status, body)
	}
	if err := issue(t, p.as(authority, good)); err != nil {
		t.Errorf("who is not revoked, over gRPC: %v", err)
	}

	// A list that cannot be used leaves the last one in force.
	s.write("ca.crl", string(testca.ListPEM(testca.New(t).RevocationList(nil))))
	p.logged("revocation list 1 cannot be used: no authority called")
	if status, _ := get(console(bad), "/"); status != 0 {
		t.Errorf("after a bad list: %d", status)
	}
	_, metrics := get(openGood, "/metrics")
	for _, door := range []string{"server", "admin"} {
		if got := gauges(t, metrics, "token_broker_crl_next_update_time_seconds")[`door="`+door+`",issuer="CN=test CA"`]; !got.Equal(due) {
			t.Errorf("the list of %s is due at %v, want %v\n%s", door, got, due, metrics)
		}
	}
}

// TestRevokedCallers knocks with certificates from below an intermediate
// authority, which is revoked, or has revoked them.
func TestRevokedCallers(t *testing.T) {
	t.Parallel()
	root := testca.New(t)
	good, bad := root.Intermediate("good"), root.Intermediate("bad")
	named := testca.Named("worker.example.com")
	fired := good.Leaf(named)
	s := newStage(t)
	s.tlsFiles(root)
	s.write("ca.pem", string(root.PEM())+string(good.PEM()))
	gone := root.Leaf(named)
	s.write("root.crl", string(root.RevocationList(nil, gone.Leaf, bad.Certificate()))) // DER
	s.write("good.crl", string(testca.ListPEM(good.RevocationList(nil, fired.Leaf))))
	p := start(t, s.tlsConfig("tls, min_version: 1.2, client_crl: [root.crl, good.crl]", ""))
	for name, c := range map[string]struct {
		client tls.Certificate
		code   codes.Code
	}{
		"a good one": {root.Leaf(named), codes.OK},
		"a good one, from below a good intermediate": {good.Leaf(named), codes.OK},
		"a revoked one":                     {gone, codes.Unavailable},
		"from below a revoked intermediate": {bad.Leaf(named), codes.Unavailable},
		"revoked by its intermediate":       {fired, codes.Unavailable},
	} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			conn, err := grpc.NewClient("passthrough:///"+p.address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
				RootCAs: root.Pool(), ServerName: "127.0.0.1", Certificates: []tls.Certificate{c.client}, MaxVersion: version,
			})))
			if err != nil {
				t.Fatal(err)
			}
			if err := issue(t, conn); status.Code(err) != c.code {
				t.Errorf("%s over %s: %v", name, tls.VersionName(version), err)
			}
			conn.Close()
		}
	}
}

func TestEndsOfCertificatesAreMetrics(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	authority := testca.New(t)
	s.tlsFiles(authority)
	soon := time.Now().Add(time.Minute).Truncate(time.Second)
	certificate, key := testca.PEM(t, authority.Leaf(func(c *x509.Certificate) {
		testca.Loopback(c)
		c.NotAfter = soon
	}))
	s.write("server.pem", string(certificate))
	s.write("server.key", string(key))
	p := start(t, s.tlsConfig("tls", ""))
	ends := func() map[string]time.Time {
		_, metrics := p.get("/metrics")
		return gauges(t, metrics, "token_broker_certificate_expire_time_seconds")
	}
	got := ends()
	if len(got) != 2 || !got[`certificate="server"`].Equal(soon) || !got[`certificate="client_ca"`].Equal(authority.Certificate().NotAfter) {
		t.Errorf("got %v", got)
	}
	renewed := authority.Leaf(testca.Loopback)
	certificate, key = testca.PEM(t, renewed)
	s.write("server.key", string(key))
	s.write("server.pem", string(certificate))
	p.await("the new end is a metric", func() bool { return ends()[`certificate="server"`].Equal(renewed.Leaf.NotAfter) })
}

// TestServeWithWorkloadAPI begins before the API is there, and goes on when it
// is gone.
func TestServeWithWorkloadAPI(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	api, domain, other := workloadtest.New(t), workloadtest.NewDomain(t, "prod.test"), workloadtest.NewDomain(t, "other.test")
	api.Stop()
	p := start(t, s.tlsConfig("workload_api: {address: '"+api.Address()+"'}", ""))
	worker := domain.Member("/worker", nil)
	connect := func(member tls.Certificate) *grpc.ClientConn {
		conn, err := grpc.NewClient("passthrough:///"+p.address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
			InsecureSkipVerify: true, // who the server is, is tested below
			Certificates:       []tls.Certificate{member},
		})))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return conn
	}
	readyz := func(status int, text string) {
		t.Helper()
		p.await(fmt.Sprintf("/readyz says %d, %q", status, text), func() bool {
			got, body := p.get("/readyz")
			return got == status && strings.Contains(body, text)
		})
	}
	if err := issue(t, connect(worker)); status.Code(err) != codes.Unavailable {
		t.Errorf("without a certificate: %v", err)
	}
	readyz(http.StatusServiceUnavailable, "not ready: no certificate from the Workload API at "+api.Address()+": ")

	say := func(end time.Time) {
		member := domain.Member("/broker", func(c *x509.Certificate) { c.NotAfter = end })
		api.Say(&workloadtest.Answer{Svids: []*workloadtest.SVID{domain.SVID(t, member)}, FederatedBundles: map[string][]byte{other.ID(): other.Certificate().Raw}})
	}
	end := time.Now().Add(10 * time.Minute).Truncate(time.Second)
	say(end)
	api.Start()
	readyz(http.StatusOK, "ready")
	conn := connect(worker)
	if err := issue(t, conn); err != nil {
		t.Error(err)
	}
	_, metrics := p.get("/metrics")
	if got := gauges(t, metrics, "token_broker_certificate_expire_time_seconds"); len(got) != 2 || !got[`certificate="server"`].Equal(end) ||
		!got[`certificate="trust_domain:prod.test"`].Equal(domain.Certificate().NotAfter) {
		t.Errorf("got %v", got)
	}
	if err := issue(t, connect(domain.Member("/other", nil))); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a member that the policy does not know: %v", err)
	}
	if err := issue(t, connect(other.Member("/worker", nil))); status.Code(err) != codes.Unavailable {
		t.Errorf("a member of a trust domain that is not believed: %v", err)
	}
	forged := &workloadtest.Domain{Authority: other.Authority, Name: "prod.test"}
	if err := issue(t, connect(forged.Member("/worker", nil))); status.Code(err) != codes.Unavailable {
		t.Errorf("a member that another trust domain has made: %v", err)
	}

	// A federated trust domain is let in by a reload.
	believe := func(domains string) {
		s.tlsConfig("workload_api: {address: '"+api.Address()+"', trust_domains: ["+domains+"]}", "")
	}
	believe("prod.test, other.test")
	p.await("the other trust domain is believed", func() bool {
		return status.Code(issue(t, connect(other.Member("/worker", nil)))) == codes.PermissionDenied
	})
	if err := issue(t, connect(forged.Member("/worker", nil))); status.Code(err) != codes.Unavailable {
		t.Errorf("a member that another trust domain has made, which is believed: %v", err)
	}

	api.Stop()
	readyz(http.StatusOK, "degraded: the Workload API at "+api.Address()+" does not answer since ")
	if err := issue(t, connect(worker)); err != nil {
		t.Errorf("without the API: %v", err)
	}
	if err := issue(t, conn); err != nil {
		t.Errorf("the connection from the beginning: %v", err)
	}
	if code := p.stop(); code != 0 {
		t.Errorf("exit status %d", code)
	}
}

// TestWorkloadRotationUnderLoad has the API hand out a certificate after the
// other.
func TestWorkloadRotationUnderLoad(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	api, domain := workloadtest.New(t), workloadtest.NewDomain(t, "prod.test")
	ends := func() time.Time { return time.Now().Add(30 * time.Minute) }
	say := func(end time.Time) {
		member := domain.Member("/broker", func(c *x509.Certificate) {
			testca.Loopback(c)
			c.NotAfter = end
		})
		api.Say(&workloadtest.Answer{Svids: []*workloadtest.SVID{domain.SVID(t, member)}})
	}
	say(ends())
	p := start(t, s.tlsConfig("workload_api: {address: '"+api.Address()+"'}", ""))
	p.await("it is ready", func() bool { status, _ := p.get("/readyz"); return status == http.StatusOK })
	stop, results := make(chan struct{}), make(chan error, 4)
	for range 4 {
		worker := domain.Member("/worker", nil)
		go func() {
			for {
				select {
				case <-stop:
					results <- nil
					return
				default:
				}
				conn, err := grpc.NewClient("passthrough:///"+p.address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
					RootCAs: domain.Pool(), ServerName: "127.0.0.1", Certificates: []tls.Certificate{worker},
				})))
				for i := 0; i < 3 && err == nil; i++ {
					_, err = pb.NewTokenBrokerClient(conn).IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
				}
				conn.Close()
				if err != nil {
					results <- err
					return
				}
			}
		}()
	}
	for i := range 20 {
		end := time.Now().Add(time.Duration(i+1) * time.Minute).Truncate(time.Second)
		say(end)
		p.await("the new certificate is in force", func() bool {
			_, metrics := p.get("/metrics")
			return gauges(t, metrics, "token_broker_certificate_expire_time_seconds")[`certificate="server"`].Equal(end)
		})
	}
	close(stop)
	for range 4 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

// An address that others can reach needs TLS, however it is written.
func TestAddressesThatNeedTLS(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	plain := read(t, s.config())
	hostname, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"0.0.0.0", "[::]", "", "[::ffff:0.0.0.0]", "192.0.2.1", hostname, "localhost.example.com", "127.0.0.1.example.com", "LOCALHOST", "0", "[::1%eth0]"} {
		path := s.write("public.yaml", strings.Replace(plain, `server: {address: "127.0.0.1:0"}`, `server: {address: "`+host+`:0"}`, 1))
		if got := command(t, "serve", "--config", path); got.status != 2 || !strings.Contains(got.stderr, "must be loopback") {
			t.Errorf("%q: exit status %d: %s", host, got.status, got.stderr)
		}
	}
}

// What localhost means is the machine's business: what counts is where the
// listener is.
func TestListenerMustBeLocalWithoutTLS(t *testing.T) {
	t.Parallel()
	for address, local := range map[string]bool{
		"0.0.0.0:0": false, "[::]:0": false, ":0": false,
		"127.0.0.1:0": true, "127.8.8.8:0": true, "localhost:0": true,
	} {
		ln, err := listenForCalls(config.Server{Network: "tcp", Address: address})
		if err == nil {
			ln.Close()
		}
		if local != (err == nil) || err != nil && !strings.Contains(err.Error(), "without tls it must be loopback or unix") {
			t.Errorf("%s: %v", address, err)
		}
	}
	ln, err := listenForCalls(config.Server{Network: "tcp", Address: "0.0.0.0:0", TLS: &tls.Config{}})
	if err != nil {
		t.Fatalf("with TLS: %v", err)
	}
	ln.Close()
}
