package client_test

import (
	"bufio"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/tokenbroker/tokenbroker/client"
	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/testproc"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// binary builds the command, once.
var binary = sync.OnceValues(func() (string, error) {
	path := filepath.Join(scratch, "broker")
	if out, err := exec.Command("go", "build", "-o", path, "../cmd/broker").CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the command: %w\n%s", err, out)
	}
	return path, nil
})

// scratch is a directory for all tests.
var scratch string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if scratch, err = os.MkdirTemp("", "client-test"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(scratch)
		return m.Run()
	}())
}

// place is a real broker with mTLS, a token endpoint and, where wanted, a Redis.
type place struct {
	folder
	ca             *testca.Authority
	address, admin string
	process        *testproc.Process
	logs           string // of the processes before
}

// newPlace has the profile invoices, whose tokens live for so long, and for which
// the workers one and two may do everything.
func newPlace(t testing.TB, lives time.Duration, redis *testredis.Server) *place {
	t.Helper()
	p := &place{folder: folder{t, t.TempDir()}, ca: testca.New(t)}
	v, err := sandbox.New(sandbox.Options{Clients: []sandbox.Client{
		{ID: "invoices", GrantTypes: []string{"client_credentials"}, Secrets: []sandbox.Secret{{Value: "s"}}, AccessTokenLifetime: lives},
	}})
	if err != nil {
		t.Fatal(err)
	}
	web := httptest.NewServer(v)
	t.Cleanup(func() {
		v.Close()
		web.Close()
	})
	p.address, p.admin = testproc.FreeAddress(t), testproc.FreeAddress(t)
	p.overwrite("authorities.crt", p.ca.PEM()) // of callers
	p.overwrite("ca.crt", p.ca.PEM())          // of the broker
	p.identity("broker", p.ca, testca.Loopback)
	p.identity("worker", p.ca, named("one"))
	store := ""
	if redis != nil {
		b, err := binary()
		if err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(b, "keyset", "new", "--out", p.path("keyset.json")).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		store = fmt.Sprintf("store: {redis: {addresses: [%q]}, encryption_keyset: {file: keyset.json}}\n", redis.Address())
	}
	p.overwrite("config.yaml", fmt.Appendf(nil, `server:
  address: %q
  tls: {certificate: broker.crt, private_key: broker.key, client_ca: authorities.crt}
admin: {address: %q}
%slog: {level: debug}
policy:
  - {callers: ["spiffe://test/one", "spiffe://test/two"], profiles: [invoices], allow: [issue, refresh, watch, revoke]}
profiles:
  - name: invoices
    vantage: {base_url: %q, client_id: invoices, client_secret: {value: s}, client_credentials: {}}
`, p.address, p.admin, store, web.URL))
	p.start()
	return p
}

// named is a change that gives a leaf a worker's name.
func named(worker string) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "test", Path: "/" + worker}} }
}

// identity replaces the files of an identity, each at once.
func (p *place) identity(name string, ca *testca.Authority, change func(*x509.Certificate)) {
	p.t.Helper()
	certificate, key := testca.PEM(p.t, ca.Leaf(change))
	p.replace(name+".key", key)
	p.replace(name+".crt", certificate)
}

// start runs the broker, and returns when it serves.
func (p *place) start() {
	p.t.Helper()
	b, err := binary()
	if err != nil {
		p.t.Fatal(err)
	}
	p.process = testproc.Start(p.t, exec.Command(b, "serve", "--config", p.path("config.yaml")))
	p.process.Await("the broker serves", time.Minute, func() bool { return strings.Contains(p.process.Log(), `"msg":"serving"`) })
}

// stop ends the broker, by a signal, and returns when it is gone.
func (p *place) stop(s syscall.Signal) {
	p.t.Helper()
	p.process.Signal(s)
	select {
	case <-p.process.Exited():
	case <-time.After(time.Minute):
		p.t.Fatalf("the broker does not stop\n%s", p.process.Log())
	}
	p.logs += p.process.Log()
}

func (p *place) client() *client.Client {
	p.t.Helper()
	c, err := client.New(client.WithAddress(p.address), client.WithCA(p.path("ca.crt")), client.WithCertificate(p.path("worker.crt"), p.path("worker.key")))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { c.Close() })
	return c
}

// started is how many calls of a method the broker has seen begin.
func (p *place) started(method string) (n int) {
	p.t.Helper()
	r, err := http.Get("http://" + p.admin + "/metrics")
	if err != nil {
		p.t.Fatal(err)
	}
	defer r.Body.Close()
	known := false
	for lines := bufio.NewScanner(r.Body); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), " ")
		if !strings.HasPrefix(name, "token_broker_grpc_server_started_total{") {
			continue
		}
		known = true
		if strings.Contains(name, `grpc_method="`+method+`"`) {
			f, err := strconv.ParseFloat(value, 64)
			if err != nil {
				p.t.Fatal(err)
			}
			n += int(f)
		}
	}
	if !known {
		p.t.Fatal("the broker has no count of calls")
	}
	return n
}

// TestNobodyNotices has everything under a client replaced while callers ask for
// the token all the time.
func TestNobodyNotices(t *testing.T) {
	t.Parallel()
	redis := testredis.Start(t, testredis.Options{})
	p := newPlace(t, 24*time.Hour, redis)
	c := p.client()
	s := c.TokenSource("invoices")
	current, err := s.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var asked, failed atomic.Int64
	done := make(chan struct{})
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			pace := time.NewTicker(100 * time.Microsecond)
			defer pace.Stop()
			for {
				select {
				case <-done:
					return
				case <-pace.C:
				}
				asked.Add(1)
				if _, err := s.Token(); err != nil && failed.Add(1) < 5 {
					t.Errorf("a caller got %v", err)
				}
			}
		})
	}
	defer callers.Wait()
	defer close(done)
	// meanwhile returns when callers have asked many times more.
	meanwhile := func() {
		t.Helper()
		until := asked.Load() + 500
		await(t, "callers have asked", func() bool { return asked.Load() > until })
	}
	// successor proves that the stream is there: what the broker has revoked is
	// replaced. Whoever revokes is a client of its own.
	successor := func(after string) {
		t.Helper()
		r, err := p.client().Stub().RevokeToken(t.Context(), &pb.RevokeTokenRequest{Profile: "invoices"})
		if err != nil {
			t.Fatalf("%s: revoking: %v\n%s", after, err, p.process.Log())
		}
		previous := current
		await(t, "a successor comes after "+after, func() bool {
			current, err = s.Current(t.Context())
			return err == nil && current.ID != previous.ID && current.ID != r.GetTokenId()
		})
	}
	is := func(worker string) {
		t.Helper()
		r, err := c.Stub().WhoAmI(t.Context(), &pb.WhoAmIRequest{})
		if err != nil || r.GetCaller() != "spiffe://test/"+worker {
			t.Errorf("the client is %s, %v; want %s", r.GetCaller(), err, worker)
		}
	}
	restart := func() {
		t.Helper()
		p.stop(syscall.SIGTERM)
		p.start()
	}
	successor("the start")

	p.stop(syscall.SIGTERM)
	meanwhile()
	p.start()
	successor("a stop of the broker")

	p.stop(syscall.SIGKILL)
	meanwhile()
	p.start()
	successor("a crash of the broker")

	redis.Kill()
	meanwhile()
	redis.RestartEmpty()
	successor("a crash of Redis")
	is("one")

	certificate, key := testca.PEM(t, p.ca.Leaf(named("two")))
	p.overwrite("worker.crt", certificate[:len(certificate)/2])
	restart()
	meanwhile()
	is("one")
	p.overwrite("worker.crt", certificate) // beside the old key
	restart()
	meanwhile()
	is("one")
	p.replace("worker.key", key)
	successor("half a certificate")
	restart()
	successor("another certificate")
	is("two")

	next := testca.New(t)
	both := append(p.ca.PEM(), next.PEM()...)
	p.replace("ca.crt", both)
	p.identity("broker", next, testca.Loopback)
	restart()
	successor("another authority")
	p.overwrite("ca.crt", both[:len(both)-100])
	restart()
	meanwhile()
	is("two")
	p.overwrite("ca.crt", both)
	successor("half a bundle")

	if n := failed.Load(); n > 0 {
		t.Errorf("%d of %d calls failed", n, asked.Load())
	}
	t.Logf("%d calls, none failed", asked.Load())
	p.stop(syscall.SIGTERM)
	for _, worker := range []string{"one", "two"} { // whose streams they were
		found := false
		for line := range strings.Lines(p.logs) {
			found = found || strings.Contains(line, `WatchToken"`) && strings.Contains(line, `"caller":"spiffe://test/`+worker+`"`) && strings.Contains(line, `"decision":"allow"`)
		}
		if !found {
			t.Errorf("the audit log has no stream of worker %s", worker)
		}
	}
}

// The broker is away for longer than the token lives: then there are errors, and not
// before, and none when it is back.
func TestBrokerAwayForLong(t *testing.T) {
	t.Parallel()
	p := newPlace(t, 10*time.Second, nil)
	s := p.client().TokenSource("invoices")
	last, err := s.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p.stop(syscall.SIGKILL)
	for {
		current, err := s.Current(t.Context())
		if now := time.Now(); err == nil {
			last = current
			time.Sleep(time.Millisecond) // how often it asks
			continue
		} else if good := last.ExpireTime.Sub(now); good > time.Second {
			t.Errorf("an error %v before the end of %v: %v", good, last, err)
		}
		wantReason(t, err, codes.Unavailable, "")
		break
	}
	p.start()
	await(t, "there is a token again", func() bool { _, err := s.Token(); return err == nil })
}

// TestResourceServerRefuses is a resource server that answers 401 all of a sudden.
func TestResourceServerRefuses(t *testing.T) {
	t.Parallel()
	const at = 100
	p := newPlace(t, 24*time.Hour, nil)
	s := p.client().TokenSource("invoices")
	current, err := s.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	server := &resource{}
	server.take(current.AccessToken())
	site := httptest.NewServer(server)
	defer site.Close()
	web := &http.Client{Transport: s.Transport(&http.Transport{MaxIdleConnsPerHost: at})}
	defer web.CloseIdleConnections()
	if code, _ := get(t, web, site.URL); code != 200 {
		t.Fatal(code)
	}
	// Before that the broker would hold it for the server's fault.
	await(t, "the token is older than 10 s", func() bool { return time.Since(current.IssueTime) > 10500*time.Millisecond })
	server.take()
	burst := func(want int) {
		t.Helper()
		before := len(server.requests())
		hold := make(chan struct{}) // all come with the token that is refused
		server.mu.Lock()
		server.hold = hold
		server.mu.Unlock()
		var wg sync.WaitGroup
		for range at {
			wg.Go(func() {
				if code, body := get(t, web, site.URL); code != http.StatusUnauthorized || body != "no" {
					t.Errorf("got %d %q, want the server's 401", code, body)
				}
			})
		}
		await(t, "all have asked", func() bool { return len(server.requests()) == before+at })
		close(hold)
		wg.Wait()
		if n := len(server.requests()) - before; n != want {
			t.Errorf("the resource server had %d requests, want %d", n, want)
		}
	}
	burst(2 * at) // each once more, with the successor
	burst(at)     // which is young: there is no other
	if refreshes, watches, issues := p.started("RefreshToken"), p.started("WatchToken"), p.started("IssueToken"); refreshes != 1 || watches != 1 || issues != 0 {
		t.Errorf("the broker had %d RefreshToken, %d WatchToken, %d IssueToken; want 1, 1, 0", refreshes, watches, issues)
	}
	if now, err := s.Current(t.Context()); err != nil || now.ID == current.ID {
		t.Errorf("got %v, %v", now, err)
	}
}

// Who is denied hears it at once, and does not hammer a real broker either.
func TestDenied(t *testing.T) {
	t.Parallel()
	p := newPlace(t, time.Hour, nil)
	s := p.client().TokenSource("payroll")
	for range 10_000 {
		_, err := s.Token()
		e := wantReason(t, err, codes.PermissionDenied, client.ReasonCallerDenied)
		if e.Metadata["caller"] != "spiffe://test/one" || errors.Is(err, client.ErrClosed) {
			t.Fatal(err)
		}
	}
	if n := p.started("WatchToken"); n > 5 {
		t.Errorf("the broker had %d calls", n)
	}
}
