package fleet_test

import (
	"bufio"
	"cmp"
	"context"
	"encoding/gob"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/tokenbroker/tokenbroker/internal/faultproxy"
	"github.com/tokenbroker/tokenbroker/internal/fleet"
	"github.com/tokenbroker/tokenbroker/internal/testproc"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// The programs under test, built once, without the race detector: what is
// measured here is what users run. With $FLEET_RACE they have it; then times say
// nothing, and a race fails the test in whose logs it is.
var brokerBinary, crowdBinary string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "fleet-test")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		build := []string{"build", "-o", dir + "/", "../../cmd/broker", "./crowd"}
		if os.Getenv("FLEET_RACE") != "" {
			build = slices.Insert(build, 1, "-race")
		}
		out, err := exec.Command("go", build...).CombinedOutput()
		if err != nil {
			fmt.Fprintf(os.Stderr, "building the programs: %v\n%s", err, out)
			return 1
		}
		brokerBinary, crowdBinary = filepath.Join(dir, "broker"), filepath.Join(dir, "crowd")
		flag.Parse()
		if err := flag.Set("test.parallel", "6"); err != nil { // they wait for the most part
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// options of a fleet.
type options struct {
	// replicas to begin with; 3 when zero.
	replicas int
	// redis of the fleet; a plain one when nil. sentinel or cluster in its
	// place; these are reached without proxies, because they name addresses.
	redis    *testredis.Server
	sentinel *testredis.Sentinel
	cluster  *testredis.Cluster
	// profile is more lines for both profiles, operator for that one; each with
	// its indentation of 4.
	profile, operator []string
	// person signs in for the operator, instead of the replicas with a password.
	person bool
	// tokenLife is an hour when zero.
	tokenLife time.Duration
	// world changes what the endpoint knows.
	world func(*sandbox.Options)
	// idle leaves the replicas to be started by the test.
	idle bool
	// logLevel is debug when empty: most is found in debug logs.
	logLevel string
}

// harness is a fleet, what its replicas share, and everything that was seen.
type harness struct {
	t        testing.TB
	o        options
	endpoint *endpoint
	redis    *testredis.Server // nil behind sentinels and in a cluster
	replicas []*replica
	allow    allowance

	mu      sync.Mutex // guards all below
	answers []fleet.Answer
	drops   map[string]time.Time // when a token was taken out of service, by id
	checked bool
}

// newFleet starts a fleet. When the test ends, whatever it did, the checks of
// check_test.go are made.
func newFleet(t testing.TB, o options) *harness {
	t.Helper()
	o.replicas = cmp.Or(o.replicas, 3)
	o.tokenLife = cmp.Or(o.tokenLife, time.Hour)
	o.logLevel = cmp.Or(o.logLevel, "debug")
	if o.redis == nil && o.sentinel == nil && o.cluster == nil {
		o.redis = testredis.Start(t, testredis.Options{})
	}
	f := &harness{
		t: t, o: o, redis: o.redis, drops: map[string]time.Time{},
		endpoint: newEndpoint(t, o.replicas, world(o.tokenLife, o.world)),
		allow:    allowance{presentations: 1},
	}
	keyset := f.newKeyset()
	for i := range o.replicas {
		f.replicas = append(f.replicas, f.newReplica(i, keyset))
	}
	if !o.idle {
		f.startAll()
	}
	return f
}

// newKeyset returns what "broker keyset new" prints.
func (f *harness) newKeyset() string {
	f.t.Helper()
	out, err := exec.Command(brokerBinary, "keyset", "new").Output()
	if err != nil {
		f.t.Fatalf("broker keyset new: %v\n%s", err, out)
	}
	var keyset struct {
		Key []struct{ KeyData struct{ Value string } }
	}
	if err := json.Unmarshal(out, &keyset); err != nil || len(keyset.Key) == 0 {
		f.t.Fatalf("broker keyset new printed no keyset: %v", err)
	}
	for _, k := range keyset.Key {
		f.endpoint.hide(k.KeyData.Value)
	}
	return string(out)
}

func (f *harness) startAll() {
	f.t.Helper()
	for _, r := range f.replicas {
		r.launch()
	}
	for _, r := range f.replicas {
		r.awaitServing()
	}
}

// replica is one broker, over all its restarts.
type replica struct {
	f              *harness
	index          int
	dir            string
	binary         string
	address, admin string
	// redis and web are the network to the store and to the token endpoint.
	// redis is nil behind sentinels and in a cluster.
	redis, web *faultproxy.Proxy
	process    *testproc.Process
	processes  []*testproc.Process // all there ever were
	killed     map[*testproc.Process]bool
	conn       *grpc.ClientConn
}

func (f *harness) newReplica(index int, keyset string) *replica {
	f.t.Helper()
	loopback := func() string { return fmt.Sprintf("127.0.0.1:%d", testproc.FreePort(f.t)) }
	r := &replica{
		f: f, index: index, dir: f.t.TempDir(), binary: brokerBinary, address: loopback(), admin: loopback(),
		web: faultproxy.New(f.t, f.endpoint.addresses[index]), killed: map[*testproc.Process]bool{},
	}
	if f.redis != nil {
		r.redis = faultproxy.New(f.t, f.redis.Address())
	}
	r.write("keyset.json", keyset)
	r.write("invoices", invoicesSecret)
	r.write("operator", operatorSecret)
	r.write("password", operatorPassword)
	r.write("config.yaml", r.config())
	var err error
	if r.conn, err = fleet.Dial(r.address); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { r.conn.Close() })
	return r
}

// path of a file of the replica's own.
func (r *replica) path(name string) string { return filepath.Join(r.dir, name) }

// write replaces a file at once, as deployment tools do.
func (r *replica) write(name, content string) {
	r.f.t.Helper()
	temporary := r.path("." + name + ".new")
	if err := os.WriteFile(temporary, []byte(content), 0o600); err != nil {
		r.f.t.Fatal(err)
	}
	if err := os.Rename(temporary, r.path(name)); err != nil {
		r.f.t.Fatal(err)
	}
}

// config names the token endpoint the same for all replicas, because a token
// belongs to its endpoint; each reaches it through a proxy of its own.
func (r *replica) config() string {
	o := r.f.o
	store := fmt.Sprintf("    addresses: [%s]", strings.Join(r.storeAddresses(), ", "))
	if o.sentinel != nil {
		store += "\n    master_name: " + testredis.MasterName
	}
	grant := fmt.Sprintf("password: {username: {value: %s}, password: {file: password}}", operatorName)
	if o.person {
		grant = fmt.Sprintf("authorization_code: {redirect_url: %q}", redirectURL)
	}
	more, moreOfOperator := strings.Join(o.profile, "\n"), strings.Join(slices.Concat(o.profile, o.operator), "\n")
	return fmt.Sprintf(`server: {address: %q}
admin: {address: %q}
log: {level: %s}
store:
  redis:
%s
  encryption_keyset: {file: keyset.json}
profiles:
  - name: invoices
    scopes: [openid, permissions, global.wildcard]
    vantage:
      base_url: http://vantage.test
      allow_insecure_http: true
      client_id: invoices
      client_secret: {file: invoices}
      client_credentials: {}
%s
  - name: operator
    scopes: [openid, permissions, global.wildcard, offline_access]
    vantage:
      base_url: http://vantage.test
      allow_insecure_http: true
      client_id: operator
      client_secret: {file: operator}
      %s
%s
`, r.address, r.admin, o.logLevel, store, more, grant, moreOfOperator)
}

func (r *replica) storeAddresses() []string {
	switch {
	case r.f.o.sentinel != nil:
		return r.f.o.sentinel.Addresses()
	case r.f.o.cluster != nil:
		return r.f.o.cluster.Addresses()
	}
	return []string{r.redis.Address()}
}

// start runs the replica and returns when it serves.
func (r *replica) start() {
	r.f.t.Helper()
	r.launch()
	r.awaitServing()
}

func (r *replica) launch() {
	r.f.t.Helper()
	cmd := exec.Command(r.binary, "serve", "--config", r.path("config.yaml"))
	cmd.Env = append(os.Environ(), "HTTP_PROXY=http://"+r.web.Address(), "NO_PROXY=")
	r.process = testproc.Start(r.f.t, cmd)
	r.processes = append(r.processes, r.process)
	// What was registered last is done first: the checks come before any
	// process is killed for good.
	r.f.t.Cleanup(r.f.check)
}

func (r *replica) awaitServing() {
	r.f.t.Helper()
	r.process.Await("it serves", 30*time.Second, func() bool {
		return strings.Contains(r.process.Log(), `"msg":"serving"`)
	})
}

// kill ends the replica as a crash does.
func (r *replica) kill() {
	r.killed[r.process] = true
	r.process.Kill()
}

// stop asks the replica to end and waits until it has.
func (r *replica) stop() {
	r.f.t.Helper()
	r.terminate()
	r.awaitExit()
}

func (r *replica) terminate() { r.process.Signal(syscall.SIGTERM) }

func (r *replica) awaitExit() {
	r.f.t.Helper()
	select {
	case <-r.process.Exited():
	case <-time.After(35 * time.Second):
		r.f.t.Errorf("replica %d has not ended 35 s after SIGTERM\n%s", r.index, r.process.Log())
		r.kill()
	}
}

// ask makes one call and keeps the answer for the checks.
func (r *replica) ask(q fleet.Question) fleet.Answer { return r.askWithin(30*time.Second, q) }

func (r *replica) askWithin(timeout time.Duration, q fleet.Question) fleet.Answer {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	a := fleet.Ask(ctx, r.conn, r.index, q)
	r.f.keep(a)
	return a
}

// must is ask where no error is acceptable.
func (r *replica) must(q fleet.Question) fleet.Answer {
	r.f.t.Helper()
	a := r.ask(q)
	if !a.OK() {
		r.f.t.Fatalf("a call that must not fail: %v\n%s", a, r.tail())
	}
	return a
}

func (f *harness) keep(answers ...fleet.Answer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.answers = append(f.answers, answers...)
}

// tail is the end of the log.
func (r *replica) tail() string {
	const most = 6 << 10
	text := r.process.Log()
	return text[max(0, len(text)-most):]
}

// crowd is callers under way.
type crowd struct {
	f       *harness
	process *exec.Cmd
	stdin   io.WriteCloser
	answers []fleet.Answer
	err     error
	done    chan struct{}
}

// gather connects a crowd to all replicas; begin lets it loose.
func (f *harness) gather(c fleet.Crowd) *crowd {
	f.t.Helper()
	for _, r := range f.replicas {
		c.Replicas = append(c.Replicas, r.address)
	}
	c.Timeout = cmp.Or(c.Timeout, 30*time.Second)
	order, err := json.Marshal(c)
	if err != nil {
		f.t.Fatal(err)
	}
	g := &crowd{f: f, process: exec.Command(crowdBinary), done: make(chan struct{})}
	g.process.Stderr = os.Stderr
	if g.stdin, err = g.process.StdinPipe(); err != nil {
		f.t.Fatal(err)
	}
	stdout, err := g.process.StdoutPipe()
	if err != nil {
		f.t.Fatal(err)
	}
	if err := g.process.Start(); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		g.stdin.Close()
		_ = g.process.Process.Kill() // it may have ended already
		<-g.done
	})
	connected := make(chan struct{})
	go func() {
		defer close(g.done)
		r := bufio.NewReader(stdout)
		if _, g.err = r.ReadString('\n'); g.err == nil {
			close(connected)
			g.err = gob.NewDecoder(r).Decode(&g.answers)
		}
		if err := g.process.Wait(); err != nil {
			g.err = err
		}
	}()
	if _, err := fmt.Fprintf(g.stdin, "%s\n", order); err != nil {
		f.t.Fatal(err)
	}
	select {
	case <-connected:
	case <-g.done:
		f.t.Fatalf("the crowd ended: %v", g.err)
	}
	return g
}

// begin lets all callers ask at once.
func (g *crowd) begin() {
	g.f.t.Helper()
	if _, err := fmt.Fprintln(g.stdin, "begin"); err != nil {
		g.f.t.Fatal(err)
	}
}

// end waits for the last call of each caller and returns all answers.
func (g *crowd) end() []fleet.Answer {
	g.f.t.Helper()
	g.stdin.Close()
	<-g.done
	if g.err != nil {
		g.f.t.Fatalf("the crowd: %v", g.err)
	}
	g.f.keep(g.answers...)
	return g.answers
}

// logged reports whether the replica's process has written the text.
func (r *replica) logged(text string) bool { return strings.Contains(r.process.Log(), text) }
