//go:build mesh

package mesh_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/testproc"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// repository is the way to the files that users get.
const repository = "../.."

// binary is the command, built once for all tests.
var binary string

func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", "20"); err != nil { // they wait for the most part
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(testproc.RunWithBroker(m, &binary))
}

// Who is who in the tests. The policy allows the worker, by either name, to get
// tokens for the profiles invoices and throttled, and nobody anything else.
const (
	worker    = "spiffe://mesh.test/ns/billing/sa/worker"
	workerDNS = "worker.mesh.test"
	intruder  = "spiffe://mesh.test/ns/elsewhere/sa/intruder"
	sidecar   = "spiffe://mesh.test/ns/broker/sa/sidecar"
)

// throttle is what the token endpoint answers to the profile throttled.
const throttle = 30 * time.Second

// place is one network: an authority that all trust, a token endpoint, and
// brokers.
type place struct {
	t   testing.TB
	ca  *testca.Authority
	dir string
	// endpoint is the URL of the token endpoint.
	endpoint string
}

func newPlace(t testing.TB) *place {
	t.Helper()
	p := &place{t: t, ca: testca.New(t), dir: t.TempDir()}
	grants := []string{"client_credentials"}
	s, err := sandbox.New(sandbox.Options{Clients: []sandbox.Client{
		{ID: "invoices", GrantTypes: grants, Secrets: []sandbox.Secret{{Value: "of invoices"}}},
		{ID: "throttled", GrantTypes: grants, Secrets: []sandbox.Secret{{Value: "of throttled"}}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Fault(sandbox.Fault{Times: -1, Client: "throttled", Status: http.StatusTooManyRequests,
		Headers: map[string]string{"Retry-After": strconv.Itoa(int(throttle.Seconds()))}}); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p.endpoint = "http://" + ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	p.write("ca.crt", string(p.ca.PEM()))
	p.identity("broker", testca.Loopback)
	return p
}

func (p *place) path(name string) string { return filepath.Join(p.dir, name) }

func (p *place) write(name, content string) string {
	p.t.Helper()
	if err := os.WriteFile(p.path(name), []byte(content), 0o600); err != nil {
		p.t.Fatal(err)
	}
	return p.path(name)
}

// identity is a certificate, also in the files NAME.crt and NAME.key.
type identity struct {
	name string
	leaf tls.Certificate
}

// identity makes an identity by that name, which is that of its files only.
func (p *place) identity(name string, change func(*x509.Certificate)) identity {
	p.t.Helper()
	i := identity{name: name, leaf: p.ca.Leaf(change)}
	certificate, key := testca.PEM(p.t, i.leaf)
	p.write(name+".crt", string(certificate))
	p.write(name+".key", string(key))
	return i
}

// uris is a change that gives a leaf these URI names, which it can have several
// of, and is a server at 127.0.0.1 as well, as proxies are both.
func uris(names ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		testca.Loopback(c)
		for _, name := range names {
			u, err := url.Parse(name)
			if err != nil {
				panic(err)
			}
			c.URIs = append(c.URIs, u)
		}
	}
}

// dial connects to a broker, or to what stands before it.
func (p *place) dial(address string, as identity, options ...grpc.DialOption) *grpc.ClientConn {
	p.t.Helper()
	options = append(options, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		RootCAs: p.ca.Pool(), Certificates: []tls.Certificate{as.leaf}, MinVersion: tls.VersionTLS12,
	})))
	conn, err := grpc.NewClient("passthrough:///"+address, options...)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	return conn
}

// caller is dial for one who asks for tokens.
func (p *place) caller(address string, as identity) pb.TokenBrokerClient {
	p.t.Helper()
	return pb.NewTokenBrokerClient(p.dial(address, as))
}

// broker is one replica, over its restarts.
type broker struct {
	p              *place
	address, admin string
	socket         bool // address is a unix socket, without TLS
	config         string
	process        *testproc.Process
}

// newBroker returns a broker that listens on a port of loopback, or on a socket,
// once it is started. more is more of the message Server, on lines of their own
// with an indentation of 2.
func (p *place) newBroker(name, more string) *broker {
	p.t.Helper()
	b := &broker{p: p, address: testproc.FreeAddress(p.t), admin: testproc.FreeAddress(p.t)}
	tls := "  tls: {certificate: broker.crt, private_key: broker.key, client_ca: ca.crt}\n"
	if strings.HasSuffix(name, ".sock") {
		b.socket, b.address, tls = true, "unix:"+p.path(name), ""
	}
	config := fmt.Sprintf(`server:
  address: %q
  reflection: true
%s%s
admin: {address: %q}
log: {level: debug}
policy:
  - {callers: [%q, "dns:%s"], profiles: [invoices, throttled], allow: [issue, watch]}
profiles:
`, b.address, tls, more, b.admin, worker, workerDNS)
	for _, profile := range []string{"invoices", "throttled", "secret"} {
		config += fmt.Sprintf(`  - name: %[1]s
    vantage: {base_url: %[2]q, client_id: %[1]s, client_secret: {value: of %[1]s}, client_credentials: {}}
`, profile, p.endpoint)
	}
	b.config = p.write(name+".yaml", config)
	return b
}

// start returns when the broker serves.
func (b *broker) start() {
	b.p.t.Helper()
	b.launch()
	b.process.Await("the broker serves", 30*time.Second, func() bool {
		return strings.Contains(b.process.Log(), `"msg":"serving"`)
	})
}

func (b *broker) launch() {
	b.p.t.Helper()
	b.process = testproc.Start(b.p.t, exec.Command(binary, "serve", "--config", b.config))
}

// startBroker is newBroker and start.
func (p *place) startBroker(name, more string) *broker {
	p.t.Helper()
	b := p.newBroker(name, more)
	b.start()
	return b
}

// served is how many tokens the broker says it has handed out to callers, over
// all profiles.
func (b *broker) served() (n int) {
	b.p.t.Helper()
	r, err := http.Get("http://" + b.admin + "/metrics")
	if err != nil {
		b.p.t.Fatal(err)
	}
	defer r.Body.Close()
	for lines := bufio.NewScanner(r.Body); lines.Scan(); {
		if name, value, _ := strings.Cut(lines.Text(), " "); strings.HasPrefix(name, "token_broker_tokens_served_total{") {
			f, err := strconv.ParseFloat(value, 64)
			if err != nil {
				b.p.t.Fatal(err)
			}
			n += int(f)
		}
	}
	return n
}

// deployed returns a file of deploy/ with some of its text replaced. Each must be
// there, so that a test runs what it thinks it does.
func (p *place) deployed(name string, oldnew ...string) string {
	p.t.Helper()
	content, err := os.ReadFile(filepath.Join(repository, "deploy", name))
	if err != nil {
		p.t.Fatal(err)
	}
	for i := 0; i < len(oldnew); i += 2 {
		if !strings.Contains(string(content), oldnew[i]) {
			p.t.Fatalf("deploy/%s has no %q any more", name, oldnew[i])
		}
	}
	return p.write(strings.ReplaceAll(name, "/", "-"), strings.NewReplacer(oldnew...).Replace(string(content)))
}

// within bounds a call.
func within(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// wantReason fails the test unless the error has the reason, and the id of the
// request.
func wantReason(t testing.TB, err error, want string) {
	t.Helper()
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.Reason == want && info.Metadata["request_id"] != "" {
			return
		}
	}
	t.Errorf("got the error %v with %v, want the reason %s", err, status.Convert(err).Details(), want)
}

// wantCaller fails the test unless the broker takes a caller for that, gives it
// a token for invoices and none for secret.
func wantCaller(t testing.TB, c pb.TokenBrokerClient, caller string, proof pb.IdentityProof, forwarder string) {
	t.Helper()
	me, err := c.WhoAmI(within(t), &pb.WhoAmIRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if me.Caller != caller || me.Proof != proof || me.Forwarder != forwarder {
		t.Errorf("the broker sees %s by %s through %q, want %s by %s through %q", me.Caller, me.Proof, me.Forwarder, caller, proof, forwarder)
	}
	issued, err := c.IssueToken(within(t), &pb.IssueTokenRequest{Profile: "invoices"})
	if err != nil || issued.GetToken().GetAccessToken() == "" {
		t.Errorf("no token for invoices: %v", err)
	}
	watch, err := c.WatchToken(within(t), &pb.WatchTokenRequest{Profile: "invoices"})
	if err != nil {
		t.Fatal(err)
	}
	if watched, err := watch.Recv(); err != nil || watched.GetToken().GetId() != issued.GetToken().GetId() {
		t.Errorf("watching brings the token %q, not %q: %v", watched.GetToken().GetId(), issued.GetToken().GetId(), err)
	}
	_, err = c.IssueToken(within(t), &pb.IssueTokenRequest{Profile: "secret"})
	wantReason(t, err, "CALLER_DENIED")
}
