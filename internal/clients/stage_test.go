//go:build clients

package clients_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/testproc"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

const (
	worker   = "worker"
	operator = "operator"
	// reports is how many profiles there are besides, report1 and so on. Each is for one test
	// of a refused token: all of them wait at the same time until theirs may be reported.
	reports = 6
	// throttle is what the token endpoint answers to the profile throttled.
	throttle = 30 * time.Second
	// lifetime of all tokens.
	lifetime = time.Hour
	// patience with everything that a stage is asked to do.
	patience = 30 * time.Second
)

// spiffe is the caller of that name.
func spiffe(name string) string { return "spiffe://clients.test/" + name }

// stage is what one library is tried on. newStage has the requests that it takes.
type stage struct {
	t              testing.TB
	ca             *testca.Authority
	dir            string
	address, admin string
	endpoint       string
	url            string
	// Connections of the stage's own, as the worker and as who may revoke.
	asWorker, asOperator pb.TokenBrokerClient

	// mu guards all below, and is held while the stage is changed.
	mu      sync.Mutex
	process *testproc.Process
	// calls and log of processes that have ended.
	calls    map[string]int
	log      string
	resource resource
}

// resource is a server that is shown tokens.
type resource struct {
	mu                sync.Mutex
	seen, refused     map[string]bool // by token id
	all               bool            // refuses every token
	accepts, refusals int
}

func newStage(t testing.TB) *stage {
	t.Helper()
	s := &stage{t: t, ca: testca.New(t), dir: t.TempDir(), calls: make(map[string]int)}
	s.address, s.admin = testproc.FreeAddress(t), testproc.FreeAddress(t)
	s.serveEndpoint()
	s.write("ca.crt", s.ca.PEM())
	s.identity("broker", testca.Loopback)
	s.become(worker)
	s.configure(true)
	s.start()
	s.asWorker, s.asOperator = s.dial(worker), s.dial(operator)

	routes := http.NewServeMux()
	routes.HandleFunc("GET /calls", s.answer(func(*http.Request) any { return s.started() }))
	routes.HandleFunc("GET /callers", s.answer(func(*http.Request) any { return s.callers() }))
	routes.HandleFunc("POST /broker/stop", s.answer(func(*http.Request) any { return s.stop(syscall.SIGTERM) }))
	routes.HandleFunc("POST /broker/kill", s.answer(func(*http.Request) any { return s.stop(syscall.SIGKILL) }))
	routes.HandleFunc("POST /broker/start", s.answer(func(*http.Request) any { s.start(); return nil }))
	routes.HandleFunc("POST /revoke", s.answer(func(r *http.Request) any { return s.revoke(r) }))
	routes.HandleFunc("POST /policy", s.answer(func(r *http.Request) any { return s.policy(r) }))
	routes.HandleFunc("POST /certificate", s.answer(func(r *http.Request) any { s.become(r.FormValue("as")); return nil }))
	routes.HandleFunc("/resource", s.resource.serve)
	routes.HandleFunc("POST /resource/refuse", s.resource.refuse)
	routes.HandleFunc("GET /resource/calls", s.resource.counts)
	server := httptest.NewServer(routes)
	t.Cleanup(server.Close)
	s.url = server.URL
	return s
}

// answer makes a handler of what the stage does: one thing at a time. An error is
// told to whoever asked, and is the program's to judge.
func (s *stage) answer(do func(*http.Request) any) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		a := do(r)
		if err, failed := a.(error); failed {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		reply(w, a)
	}
}

func reply(w http.ResponseWriter, a any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(a) // who asked may have gone
}

// environment tells a program where it is, and who.
func (s *stage) environment() []string {
	return []string{
		"BROKER_ADDRESS=" + s.address, "BROKER_CA=" + s.path("ca.crt"),
		"BROKER_CERTIFICATE=" + s.path("client.crt"), "BROKER_PRIVATE_KEY=" + s.path("client.key"),
		"STAGE_URL=" + s.url,
	}
}

func (s *stage) serveEndpoint() {
	s.t.Helper()
	grants := []string{"client_credentials"}
	var clients []sandbox.Client
	for _, id := range permitted() {
		clients = append(clients, sandbox.Client{ID: id, GrantTypes: grants, Secrets: []sandbox.Secret{{Value: "of " + id}}, AccessTokenLifetime: lifetime})
	}
	endpoint, err := sandbox.New(sandbox.Options{Clients: clients})
	if err != nil {
		s.t.Fatal(err)
	}
	if err := endpoint.Fault(sandbox.Fault{Times: -1, Client: "throttled", Status: http.StatusTooManyRequests,
		Headers: map[string]string{"Retry-After": strconv.Itoa(int(throttle.Seconds()))}}); err != nil {
		s.t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.t.Fatal(err)
	}
	s.endpoint = "http://" + ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- endpoint.Serve(ctx, ln) }()
	s.t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			s.t.Error(err)
		}
	})
}

func (s *stage) path(name string) string { return filepath.Join(s.dir, name) }

// write replaces a file as a whole.
func (s *stage) write(name string, content []byte) {
	s.t.Helper()
	if err := os.WriteFile(s.path(name+".new"), content, 0o600); err != nil {
		s.t.Error(err)
	}
	if err := os.Rename(s.path(name+".new"), s.path(name)); err != nil {
		s.t.Error(err)
	}
}

// identity writes a certificate into the files NAME.crt and NAME.key.
func (s *stage) identity(name string, change func(*x509.Certificate)) {
	s.t.Helper()
	certificate, key := testca.PEM(s.t, s.ca.Leaf(change))
	s.write(name+".crt", certificate)
	s.write(name+".key", key)
}

// become gives the program another certificate.
func (s *stage) become(name string) { s.identity("client", named(name)) }

func named(name string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		u, err := url.Parse(spiffe(name))
		if err != nil {
			panic(err)
		}
		c.URIs = []*url.URL{u}
	}
}

// dial connects as somebody of that name.
func (s *stage) dial(as string) pb.TokenBrokerClient {
	s.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+s.address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
		RootCAs: s.ca.Pool(), Certificates: []tls.Certificate{s.ca.Leaf(named(as))}, MinVersion: tls.VersionTLS12,
	})))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return pb.NewTokenBrokerClient(conn)
}

// permitted are the profiles that the workers may use, invoices the last.
func permitted() []string {
	profiles := []string{"throttled"}
	for i := range reports {
		profiles = append(profiles, fmt.Sprint("report", i+1))
	}
	return append(profiles, "invoices")
}

// configure writes the broker's config. The workers may use invoices if allow
// says so, and never secret.
func (s *stage) configure(allow bool) {
	s.t.Helper()
	profiles := permitted()
	if !allow {
		profiles = profiles[:len(profiles)-1]
	}
	config := fmt.Sprintf(`server:
  address: %q
  tls: {certificate: broker.crt, private_key: broker.key, client_ca: ca.crt}
admin: {address: %q}
log: {level: debug}
policy:
  - {callers: [%q, %q], profiles: [%s], allow: [issue, refresh, watch, revoke]}
  - {callers: [%q], profiles: [invoices], allow: [revoke]}
profiles:
`, s.address, s.admin, spiffe(worker), spiffe("worker2"), strings.Join(profiles, ", "), spiffe(operator))
	for _, profile := range append(permitted(), "secret") {
		config += fmt.Sprintf(`  - name: %[1]s
    vantage: {base_url: %[2]q, client_id: %[1]s, client_secret: {value: of %[1]s}, client_credentials: {}}
`, profile, s.endpoint)
	}
	s.write("broker.yaml", []byte(config))
}

// start returns when the broker serves.
func (s *stage) start() {
	if s.process != nil {
		return
	}
	s.process = testproc.Start(s.t, exec.Command(binary, "serve", "--config", s.path("broker.yaml")))
	s.process.Await("the broker serves", patience, func() bool { return strings.Contains(s.process.Log(), `"msg":"serving"`) })
}

// stop returns when the broker has ended.
func (s *stage) stop(signal syscall.Signal) error {
	if s.process == nil {
		return nil
	}
	s.calls = s.started()
	s.process.Signal(signal)
	select {
	case <-s.process.Exited():
	case <-time.After(patience):
		return fmt.Errorf("the broker has not ended within %v of %v", patience, signal)
	}
	s.log += s.process.Log()
	s.process = nil
	return nil
}

// started is how many calls the broker says to have got, by method.
func (s *stage) started() map[string]int {
	calls := maps.Clone(s.calls)
	if s.process == nil {
		return calls
	}
	r, err := http.Get("http://" + s.admin + "/metrics")
	if err != nil {
		s.t.Error(err)
		return calls
	}
	defer r.Body.Close()
	for lines := bufio.NewScanner(r.Body); lines.Scan(); {
		labels, ok := strings.CutPrefix(lines.Text(), "token_broker_grpc_server_started_total{")
		if !ok {
			continue
		}
		_, method, _ := strings.Cut(labels, `grpc_method="`)
		method, _, _ = strings.Cut(method, `"`)
		n, err := strconv.Atoi(labels[strings.LastIndex(labels, " ")+1:])
		if err != nil {
			s.t.Error(err)
		}
		calls[method] += n
	}
	return calls
}

// callers are those of the audit log, in order. A line comes 100 ms after its call.
func (s *stage) callers() []string {
	log, callers := s.log, []string{}
	if s.process != nil {
		log += s.process.Log()
	}
	for line := range strings.Lines(log) {
		var event struct{ Door, Caller string }
		if json.Unmarshal([]byte(line), &event) == nil && event.Door == "grpc" && event.Caller != "" {
			callers = append(callers, event.Caller)
		}
	}
	return callers
}

func (s *stage) tail() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	log := s.log
	if s.process != nil {
		log += s.process.Log()
	}
	return log[max(0, len(log)-8<<10):]
}

// revoke has the token that all share revoked, or that of a job.
func (s *stage) revoke(r *http.Request) any {
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	request := &pb.RevokeTokenRequest{Profile: "invoices"}
	if id := r.FormValue("job"); id != "" {
		request.Job = &pb.Job{Id: id, Dedicated: true}
	}
	revoked, err := s.asOperator.RevokeToken(ctx, request, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	return map[string]string{"token_id": revoked.GetTokenId()}
}

// policy returns when the broker obeys another one.
func (s *stage) policy(r *http.Request) any {
	allow, err := strconv.ParseBool(r.FormValue("allow"))
	if err != nil {
		return fmt.Errorf("allow=true or allow=false: %w", err)
	}
	s.configure(allow)
	want := len(permitted())
	if !allow {
		want--
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		me, err := s.asWorker.WhoAmI(r.Context(), &pb.WhoAmIRequest{}, grpc.WaitForReady(true))
		if err != nil {
			return err
		}
		if len(me.GetPermissions()) == want {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the broker does not obey the new policy within %v", patience)
		}
	}
}

// serve answers like an API that wants a token.
func (r *resource) serve(w http.ResponseWriter, q *http.Request) {
	n, err := io.Copy(io.Discard, q.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	token, bearer := strings.CutPrefix(q.Header.Get("Authorization"), "Bearer ")
	sum := sha256.Sum256([]byte(token))
	id := hex.EncodeToString(sum[:8])
	r.mu.Lock()
	defer r.mu.Unlock()
	if !bearer || r.all || r.refused[id] {
		r.refusals++
		w.Header().Set("WWW-Authenticate", `Bearer error="invalid_token"`)
		w.WriteHeader(http.StatusUnauthorized)
	} else {
		r.accepts++
	}
	if r.seen == nil {
		r.seen = make(map[string]bool)
	}
	r.seen[id] = true
	reply(w, map[string]any{"token_id": id, "body_length": n})
}

// refuse says which tokens are refused from now on.
func (r *resource) refuse(w http.ResponseWriter, q *http.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all, r.refused = false, nil
	switch which := q.FormValue("tokens"); which {
	case "none":
	case "all":
		r.all = true
	case "seen":
		r.refused = maps.Clone(r.seen)
	default:
		http.Error(w, "tokens=seen, all or none", http.StatusBadRequest)
		return
	}
	reply(w, nil)
}

func (r *resource) counts(w http.ResponseWriter, _ *http.Request) {
	r.mu.Lock()
	defer r.mu.Unlock()
	reply(w, map[string]int{"accepted": r.accepts, "refused": r.refusals})
}
