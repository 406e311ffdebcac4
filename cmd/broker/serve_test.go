package main

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

const fiveMistakes = `server:
  adress: 127.0.0.1:7443
profiles:
  - name: Invoices!
    vantage:
      region: mars
      client_id: invoices
      client_secret: hunter2-canary
      client_credentials: {}
  - name: other
    timeout: a while
    vantage:
      region: eu
      client_secret: {file: no-such-file}
      client_credentials: {}
`

func TestConfigWithFiveMistakesReportsAllOfThem(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	config := s.write("config.yaml", fiveMistakes)
	for _, verb := range []string{"check", "serve"} {
		got := command(t, verb, "--config", config)
		if got.status != 2 {
			t.Errorf("%s: exit status %d, want 2", verb, got.status)
		}
		out := got.stdout + got.stderr
		for _, want := range []string{":2:3: ", ":4:11: ", ":6:15: ", ":8:22: ", ":11:14: ", ":12:5: ", ":14:29: "} {
			if strings.Count(out, config+want) != 1 {
				t.Errorf("%s: no single mistake at %s in\n%s", verb, want, out)
			}
		}
		if strings.Contains(out, "hunter2") {
			t.Errorf("%s shows a secret:\n%s", verb, out)
		}
	}
	got := command(t, "check", "--config", config, "--output", "json")
	var r struct {
		Valid    bool
		Problems []struct {
			Line, Column  int
			Path, Message string
		}
	}
	if err := json.Unmarshal([]byte(got.stdout), &r); err != nil || got.status != 2 || r.Valid || len(r.Problems) < 5 {
		t.Errorf("exit status %d, %v: %+v", got.status, err, r)
	}
	for _, p := range r.Problems {
		if p.Line == 0 || p.Column == 0 || p.Path == "" || p.Message == "" {
			t.Errorf("incomplete: %+v", p)
		}
	}
}

func TestCheckAcceptsWhatServeAccepts(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	config := s.config()
	if got := command(t, "check", "--config", config); got.status != 0 || !strings.Contains(got.stdout, "is valid: 1 profiles") {
		t.Errorf("exit status %d: %s%s", got.status, got.stdout, got.stderr)
	}
	if calls := s.vantage.Calls().Total; calls != 0 {
		t.Errorf("check made %d token requests", calls)
	}
}

func TestServeFromFirstCallToStop(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	p := start(t, s.config())

	token := command(t, "token", "invoices", "--address", p.address)
	if token.status != 0 || strings.Count(token.stdout, "\n") != 1 || strings.Count(token.stdout, ".") != 2 {
		t.Fatalf("token: %+v", token)
	}
	header := command(t, "token", "invoices", "--address", p.address, "--output", "header", "--min-lifetime", "1h")
	if header.stdout != "Authorization: Bearer "+token.stdout {
		t.Errorf("header: %+v", header)
	}
	var j map[string]any
	asJSON := command(t, "token", "invoices", "--address", p.address, "--output", "json")
	if err := json.Unmarshal([]byte(asJSON.stdout), &j); err != nil || j["access_token"] != strings.TrimSpace(token.stdout) || j["source"] != "memory" {
		t.Errorf("json: %v, %v", j, err)
	}
	id := fmt.Sprint(j["id"])
	subset := command(t, "token", "invoices", "--address", p.address, "--scope", "openid")
	if subset.status != 0 || subset.stdout == token.stdout {
		t.Errorf("subset: %+v", subset)
	}
	refresh := command(t, "refresh", "invoices", "--rejected", id, "--address", p.address)
	if refresh.status != 1 || !strings.Contains(refresh.stderr, "reason: REFRESH_TOO_SOON") || !strings.Contains(refresh.stderr, "retry in: ") {
		t.Errorf("refresh: %+v", refresh)
	}
	table := command(t, "profiles", "--address", p.address)
	if table.status != 0 || !regexp.MustCompile(`invoices +vantage +client_credentials +ready +`+id).MatchString(table.stdout) {
		t.Errorf("profiles: %+v", table)
	}
	one := command(t, "profiles", "invoices", "--address", p.address)
	if one.status != 0 || !strings.Contains(one.stdout, "ready: there is a token") {
		t.Errorf("profiles invoices: %+v", one)
	}
	who := command(t, "whoami", "--address", p.address)
	if who.status != 0 || !strings.Contains(who.stdout, "anonymous") || !strings.Contains(who.stdout, "issue refresh watch revoke admin") {
		t.Errorf("whoami: %+v", who)
	}
	reset := command(t, "reset", "invoices", "--address", p.address)
	if reset.status != 0 {
		t.Errorf("reset: %+v", reset)
	}
	unknown := command(t, "token", "nothing", "--address", p.address)
	if unknown.status != 1 || !strings.Contains(unknown.stderr, "reason: CALLER_DENIED") {
		t.Errorf("unknown profile: %+v", unknown)
	}
	healthy := command(t, "healthcheck", "--admin-address", p.admin)
	if healthy.status != 0 || healthy.stdout != "ready\n" {
		t.Errorf("healthcheck: %+v", healthy)
	}
	if code, body := p.get("/healthz"); code != 200 || body != "ok\n" {
		t.Errorf("healthz: %d %s", code, body)
	}
	_, metrics := p.get("/metrics")
	for _, want := range []string{
		`token_broker_token_requests_total{outcome="success",profile="invoices"} 2`,
		`token_broker_tokens_served_total{profile="invoices",source="memory"} `,
		`token_broker_profile_state{profile="invoices",state="ready"} 1`,
		`token_broker_token_expire_time_seconds{profile="invoices"} `,
		`token_broker_grpc_server_handled_total{grpc_code="OK",grpc_method="IssueToken"`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("metrics lack %s", want)
		}
	}
	if calls := s.vantage.Calls().Total; calls != 2 {
		t.Errorf("%d token requests, want 2: all scopes, and one", calls)
	}
	if status := p.stop(); status != 0 {
		t.Errorf("exit status %d\n%s", status, p.log)
	}
	if got := command(t, "healthcheck", "--admin-address", p.admin); got.status != 1 {
		t.Errorf("healthcheck of a stopped server: %+v", got)
	}
	gone := command(t, "token", "invoices", "--address", p.address, "--timeout", "5s")
	if gone.status != 1 || !strings.Contains(gone.stderr, "is it running there") {
		t.Errorf("token of a stopped server: %+v", gone)
	}
}

func TestServeStartsThoughNoEndpointIsUp(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.url = "http://" + freeAddress(t)
	p := start(t, s.config())
	if code, body := p.get("/readyz"); code != 200 {
		t.Errorf("readyz: %d %s", code, body)
	}
	got := command(t, "token", "invoices", "--address", p.address)
	if got.status != 1 || !strings.Contains(got.stderr, "ENDPOINT_UNAVAILABLE") || !strings.Contains(got.stderr, "connection refused") {
		t.Errorf("token: %+v", got)
	}
	if status := p.stop(); status != 0 {
		t.Errorf("exit status %d", status)
	}
}

func TestNewSecretIsUsedAsSoonAsItsFileChanges(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	right := s.vantage.ClientSecret("invoices")
	s.write("secret", "mistyped")
	p := start(t, s.config())
	for range 5 {
		got := command(t, "token", "invoices", "--address", p.address)
		if got.status != 1 || !strings.Contains(got.stderr, "CREDENTIALS_REJECTED") {
			t.Fatalf("with the wrong secret: %+v", got)
		}
	}
	if calls := s.vantage.Calls().Total; calls != 1 {
		t.Errorf("%d token requests with the wrong secret, want 1", calls)
	}
	s.write("secret", right)
	p.logged("config reloaded")
	if got := command(t, "token", "invoices", "--address", p.address); got.status != 0 {
		t.Errorf("with the right secret: %+v", got)
	}
	if calls := s.vantage.Calls().Total; calls != 2 {
		t.Errorf("%d token requests in all, want 2", calls)
	}
}

func TestBadConfigLeavesTheOldOneInForce(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	good := s.config()
	p := start(t, good)
	if got := command(t, "token", "invoices", "--address", p.address); got.status != 0 {
		t.Fatalf("%+v", got)
	}
	s.write("config.yaml", fiveMistakes)
	p.logged(`"msg":"config not reloaded, the old one stays"`)
	p.logged(`"line":6,"column":15,"path":"profiles[0].vantage.region"`)
	before := s.vantage.Calls().Total
	if got := command(t, "token", "invoices", "--address", p.address); got.status != 0 {
		t.Errorf("%+v", got)
	}
	if calls := s.vantage.Calls().Total; calls != before {
		t.Error("the token was lost")
	}
	if _, metrics := p.get("/metrics"); !regexp.MustCompile(`config_reloads_total\{result="failure"\} [1-9]`).MatchString(metrics) {
		t.Error("the failed reload is not counted")
	}
	// What cannot change under a running server is refused, and says so.
	s.write("config.yaml", strings.Replace(read(t, s.config()), "127.0.0.1:0", freeAddress(t), 1))
	p.logged("server.address cannot change under a running server")
	// A good one is taken over, the token stays.
	s.config("  - name: more", "    vantage: {region: eu, client_id: more, client_secret: {file: secret}, client_credentials: {}}")
	p.logged(`"msg":"config reloaded","profiles":2`)
	if got := command(t, "profiles", "--address", p.address); !strings.Contains(got.stdout, "more ") {
		t.Errorf("%+v", got)
	}
	if got := command(t, "token", "invoices", "--address", p.address); got.status != 0 || s.vantage.Calls().Total != before {
		t.Errorf("%+v, %d token requests", got, s.vantage.Calls().Total)
	}
}

func TestHangupReloads(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	p := start(t, s.config())
	p.signal(syscall.SIGHUP)
	p.logged(`"msg":"config reloaded","profiles":1`)
	if got := command(t, "token", "invoices", "--address", p.address); got.status != 0 {
		t.Errorf("%+v", got)
	}
	p.signal(syscall.SIGTERM)
	_ = p.cmd.Process.Signal(syscall.SIGHUP) // unless it has ended already, it must not end it
	<-p.exited
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit status %d (%v)", code, p.cmd.ProcessState)
	}
}

func read(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestStopGivesTokenRequestsBackAndAnswersEverybody(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	p := start(t, s.config())
	if err := s.vantage.Fault(sandbox.Fault{Hang: true}); err != nil {
		t.Fatal(err)
	}
	client := pb.NewTokenBrokerClient(p.dial())
	waiting := make(chan error, 10)
	for range cap(waiting) {
		go func() {
			_, err := client.IssueToken(context.Background(), &pb.IssueTokenRequest{Profile: "invoices"})
			waiting <- err
		}()
	}
	p.await("the request hangs", func() bool { return s.vantage.Calls().InFlight == 1 })
	began := time.Now()
	if code := p.stop(); code != 0 {
		t.Errorf("exit status %d\n%s", code, p.log)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %v to stop", took)
	}
	for range cap(waiting) {
		if err := <-waiting; status.Code(err) != codes.Unavailable {
			t.Errorf("a caller got %v", err)
		}
	}
}

func TestServeOnASocket(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	socket := filepath.Join(shortDir(t), "s")
	me := fmt.Sprintf("unix:uid:%d", os.Getuid())
	s.onSocket(socket, `policy: [{callers: ["`+me+`"], profiles: [invoices], allow: [issue]}]`)
	for range 2 { // the second finds what the first, killed, left behind
		p := start(t, s.path("config.yaml"))
		if info, err := os.Stat(socket); err != nil || info.Mode().Perm() != 0o660 {
			t.Errorf("%v, %v", info.Mode(), err)
		}
		if got := command(t, "token", "invoices", "--address", "unix:"+socket); got.status != 0 {
			t.Errorf("%+v", got)
		}
		if got := command(t, "whoami", "--address", "unix:"+socket); !strings.Contains(got.stdout, "unix_peer") || !strings.Contains(got.stdout, me+"\n") {
			t.Errorf("%+v", got)
		}
		second := command(t, "serve", "--config", s.path("config.yaml"))
		if second.status != 1 || !strings.Contains(second.stderr, "another process serves this socket") {
			t.Errorf("a second server: %+v", second)
		}
		p.signal(syscall.SIGKILL)
		<-p.exited
	}
}

func TestDevShowsTheMainJob(t *testing.T) {
	t.Parallel()
	got := command(t, "dev", "--once")
	if got.status != 0 {
		t.Fatalf("%+v", got)
	}
	for _, want := range []string{
		`invoices +vantage +client_credentials +[0-9a-f]{16} +in 720h0m0s +endpoint +\S+ +yes`,
		`invoices +vantage +client_credentials +[0-9a-f]{16} +in 720h0m0s +memory +\S+ +yes`,
		`tenant-admin +vantage +client_credentials +[0-9a-f]{16} +in 24h0m0s +memory +\S+ +yes`,
		`operator +vantage +password +[0-9a-f]{16} +in 720h0m0s +endpoint +\S+ +yes`,
		`review +vantage +authorization_code +[0-9a-f]{16} +in 24h0m0s +memory +\S+ +yes`,
		`payments +secureauth +client_credentials +[0-9a-f]{16} +in 720h0m0s +endpoint +\S+ +yes`,
		`anything-else +oauth2 +client_credentials +[0-9a-f]{16} +in 720h0m0s +endpoint +\S+ +yes`,
		`counted 6 token requests for 12 tokens`,
	} {
		if !regexp.MustCompile(want).MatchString(got.stdout) {
			t.Errorf("no %s in\n%s", want, got.stdout)
		}
	}
	if got := command(t, "dev", "--address", "0.0.0.0:7443"); got.status != 2 || !strings.Contains(got.stderr, "this machine only") {
		t.Errorf("on a public address: %+v", got)
	}
}

// What dev shows is a config to begin one's own from.
func TestConfigThatDevShows(t *testing.T) {
	t.Parallel()
	got := command(t, "dev", "--show-config")
	path := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(path, []byte(got.stdout), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "check", "--config", path)
	cmd.Env = os.Environ()
	for _, name := range []string{"INVOICES_SECRET", "ADMIN_SECRET", "OPERATOR_SECRET", "OPERATOR_NAME", "OPERATOR_PASSWORD", "REVIEW_SECRET"} {
		cmd.Env = append(cmd.Env, name+"=s3cret")
	}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "is valid: 6 profiles") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestSandboxAlone(t *testing.T) {
	t.Parallel()
	out := &lockedBuffer{}
	cmd := exec.Command(binary, "sandbox", "--address", "127.0.0.1:0")
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, cmd: cmd, log: out, exited: make(chan struct{})}
	go func() {
		defer close(p.exited)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-p.exited
	})
	p.logged("/sandbox/faults")
	found := regexp.MustCompile(`(?s)sandbox at (http://\S+),.*client +invoices +secret (\S+)`).FindStringSubmatch(out.String())
	if found == nil {
		t.Fatal(out)
	}
	r, err := http.PostForm(found[1]+"/auth2/connect/token", url.Values{
		"grant_type": {"client_credentials"}, "client_id": {"invoices"}, "client_secret": {found[2]}, "scope": {"openid permissions global.wildcard"},
	})
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("%v, %v", r, err)
	}
	r.Body.Close()
	if code := p.stop(); code != 0 {
		t.Errorf("exit status %d", code)
	}
}

func TestUsage(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args   []string
		status int
		text   string
	}{
		{[]string{}, 0, "For operators:"},
		{[]string{"version"}, 0, "broker "},
		{[]string{"completion", "bash"}, 0, "complete"},
		{[]string{"token"}, 2, "accepts 1 arg"},
		{[]string{"token", "a", "--output", "xml"}, 2, "use token, json or header"},
		{[]string{"token", "a", "--adress", "x"}, 2, "unknown flag"},
		{[]string{"token", "a", "--certificate", "x"}, 2, "--certificate and --private-key go together"},
		{[]string{"token", "a", "--ca", "/no/such/file"}, 2, "reading --ca"},
		{[]string{"refresh", "a"}, 2, "rejected"},
		{[]string{"serve"}, 2, "which config?"},
		{[]string{"serve", "--config", "/no/such/file"}, 2, "no such file"},
		{[]string{"check", "--config", "/no/such/file", "--output", "xml"}, 2, "use text or json"},
		{[]string{"nonsense"}, 2, "unknown command"},
		{[]string{"follow", "invoices", "--address", "x"}, 2, "unknown command"},
		{[]string{"watch", "invoices", "--remove"}, 2, "--remove goes with --file"},
		{[]string{"token", "a", "--job", "a\xff"}, 2, "not valid UTF-8"},
		{[]string{"sandbox", "--address", "0.0.0.0:0"}, 1, "loopback"},
	} {
		got := command(t, c.args...)
		if got.status != c.status || !strings.Contains(got.stdout+got.stderr, c.text) {
			t.Errorf("broker %s: exit status %d, want %d and %q:\n%s%s", strings.Join(c.args, " "), got.status, c.status, c.text, got.stdout, got.stderr)
		}
	}
}

// tlsFiles writes a server's and a client's certificates of the authority.
func (s *stage) tlsFiles(a *testca.Authority) {
	s.t.Helper()
	s.write("ca.pem", string(a.PEM()))
	for name, change := range map[string]func(*x509.Certificate){"server": testca.Loopback, "client": testca.Named("worker.example.com")} {
		certificate, key := testca.PEM(s.t, a.Leaf(change))
		s.write(name+".pem", string(certificate))
		s.write(name+".key", string(key))
	}
}

func TestServeWithMutualTLSAndPolicy(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	first := testca.New(t)
	s.tlsFiles(first)
	withTLS := strings.Replace(read(t, s.config(`policy:`,
		`  - {callers: ["dns:*.example.com"], profiles: [invoices], allow: [issue]}`)),
		`{address: "127.0.0.1:0"}`, `{address: "127.0.0.1:0", tls: {certificate: server.pem, private_key: server.key, client_ca: ca.pem}}`, 1)
	p := start(t, s.write("config.yaml", withTLS))
	as := func(args ...string) outcome {
		return command(t, append(args, "--address", p.address, "--ca", s.path("ca.pem"), "--certificate", s.path("client.pem"), "--private-key", s.path("client.key"))...)
	}
	if got := as("token", "invoices"); got.status != 0 {
		t.Errorf("token: %+v", got)
	}
	if got := as("whoami"); !strings.Contains(got.stdout, "dns:worker.example.com") || !strings.Contains(got.stdout, "dns_san") {
		t.Errorf("whoami: %+v", got)
	}
	if got := as("reset", "invoices"); got.status != 1 || !strings.Contains(got.stderr, "CALLER_DENIED") {
		t.Errorf("reset: %+v", got)
	}
	if got := command(t, "token", "invoices", "--address", p.address, "--timeout", "5s"); got.status != 1 {
		t.Errorf("without TLS: %+v", got)
	}
	if got := command(t, "token", "invoices", "--address", p.address, "--ca", s.path("ca.pem"), "--timeout", "5s"); got.status != 1 {
		t.Errorf("without a client certificate: %+v", got)
	}

	// A whole new authority, file after file: while the files do not fit
	// together the old ones stay in force.
	s.tlsFiles(testca.New(t))
	p.await("the new certificates are in force", func() bool { return as("token", "invoices", "--timeout", "5s").status == 0 })
	if strings.Contains(p.log.String(), "PRIVATE KEY") {
		t.Error("a private key is in the log")
	}
}

func TestStopIsSeenByWhoeverWatchesBeforeConnectionsAreRefused(t *testing.T) {
	t.Parallel()
	p := start(t, newStage(t).config())
	for range 2 {
		if code, body := p.get("/readyz"); code != 200 {
			t.Fatalf("readyz: %d %s", code, body)
		}
	}
	p.signal(syscall.SIGTERM)
	p.await("readiness ends", func() bool { code, _ := p.get("/readyz"); return code == 503 })
	conn := p.dial()
	if _, err := pb.NewTokenBrokerClient(conn).IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Errorf("a call on a new connection, of somebody who has not noticed yet: %v", err)
	}
	health, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil || health.Status != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("health: %v, %v", health, err)
	}
	<-p.exited
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("exit status %d\n%s", code, p.log)
	}
}
