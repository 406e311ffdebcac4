package service_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/admission"
	"github.com/tokenbroker/tokenbroker/internal/audit"
	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// auditFile is an audit log, and what it has written so far.
type auditFile struct {
	*audit.Log
	t    *testing.T
	path string
	seen int
}

func newAuditFile(t *testing.T) *auditFile {
	t.Helper()
	f := &auditFile{t: t, path: filepath.Join(t.TempDir(), "audit.jsonl")}
	var err error
	f.Log, err = audit.Open(audit.Options{Settings: audit.Settings{File: f.path}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(within(t, 10*time.Second)); err != nil && t.Context().Err() == nil {
			t.Error(err)
		}
	})
	return f
}

// next waits for lines that were not seen yet, exactly so many.
func (f *auditFile) next(n int) []map[string]any {
	f.t.Helper()
	var lines []string
	eventually(f.t, fmt.Sprintf("%d lines", n), func() bool {
		b, err := os.ReadFile(f.path)
		if err != nil {
			f.t.Fatal(err)
		}
		lines = strings.SplitAfter(string(b), "\n")
		return len(lines)-1 >= f.seen+n && f.Stats().Buffered == 0
	})
	if got := len(lines) - 1 - f.seen; got != n {
		f.t.Fatalf("%d lines, want %d:\n%s", got, n, strings.Join(lines[f.seen:], ""))
	}
	var events []map[string]any
	for _, line := range lines[f.seen : f.seen+n] {
		var e map[string]any
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			f.t.Fatalf("%v: %s", err, line)
		}
		events = append(events, e)
	}
	f.seen += n
	return events
}

// wantEvent checks the fields of an event; an empty one must not be there.
func wantEvent(t *testing.T, got map[string]any, want map[string]string) {
	t.Helper()
	for field, value := range want {
		text := ""
		if v, ok := got[field]; ok {
			text = fmt.Sprint(v)
		}
		if text != value {
			t.Errorf("%s is %q, want %q: %v", field, text, value, got)
		}
	}
	at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(got["time"]))
	if err != nil || time.Since(at).Abs() > time.Minute || !strings.HasSuffix(fmt.Sprint(got["time"]), "Z") {
		t.Errorf("time %v: %v", got["time"], err)
	}
	if host, _, err := net.SplitHostPort(fmt.Sprint(got["peer"])); err != nil || host != "127.0.0.1" {
		t.Errorf("peer %v", got["peer"])
	}
	if got["door"] != "grpc" || got["request_id"] == nil {
		t.Errorf("door %v, request id %v", got["door"], got["request_id"])
	}
}

const traceParent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

// Each decision is one line, which says what was decided and what came of it.
func TestAuditOfCalls(t *testing.T) {
	a, log := testca.New(t), newAuditFile(t)
	r := newRig(t, rigOptions{tls: func() *tls.Config { return serverOf(a) }, audit: log.Log, more: []string{"payroll"}, policy: []access.Rule{
		{Callers: []string{"dns:nobody"}, Profiles: []string{"*"}, Allow: []string{"issue"}},
		{Callers: []string{"dns:worker.example.com"}, Profiles: []string{"invoices", "ghost*"}, Allow: []string{"issue", "refresh", "revoke", "admin"}},
	}})
	conn := r.dial(clientOf(a, testca.Named("worker.example.com")))
	tokens, admin := pb.NewTokenBrokerClient(conn), pb.NewProfileAdminClient(conn)
	nameless := pb.NewTokenBrokerClient(r.dial(clientOf(a, func(c *x509.Certificate) { c.Subject.CommonName = "worker.example.com" })))
	ctx := metadata.AppendToOutgoingContext(within(t, time.Minute), "x-request-id", "batch-1", "traceparent", traceParent)

	const service, adminService = "/tokenbroker.v1.TokenBroker/", "/tokenbroker.v1.ProfileAdmin/"
	issued, err := tokens.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices", Scopes: []string{"openid"}, Job: &pb.Job{Id: "night \"run\""}})
	if err != nil {
		t.Fatal(err)
	}
	id := issued.GetToken().GetId()
	wantEvent(t, log.next(1)[0], map[string]string{
		"method": service + "IssueToken", "caller": "dns:worker.example.com", "proof": "dns_san", "forwarder": "", "profile": "invoices", "operation": "issue",
		"scopes": "[openid]", "job": "night \"run\"", "decision": "allow", "rule": "policy[1]", "outcome": "ok", "token_id": id, "source": "endpoint",
		"request_id": "batch-1", "trace_id": "0af7651916cd43dd8448eb211c80319c",
	})
	own := within(t, time.Minute) // without ids
	for _, c := range []struct {
		name string
		call func() error
		want map[string]string
	}{
		{"again", func() error {
			_, err := tokens.IssueToken(own, &pb.IssueTokenRequest{Profile: "invoices", Scopes: []string{"openid"}})
			return err
		}, map[string]string{"outcome": "ok", "source": "memory", "token_id": id, "job": "", "trace_id": ""}},
		{"a report that comes too soon", func() error {
			_, err := tokens.RefreshToken(own, &pb.RefreshTokenRequest{Profile: "invoices", Scopes: []string{"openid"}, RejectedTokenId: id, Job: &pb.Job{Id: "j"}})
			return err
		}, map[string]string{"operation": "refresh", "decision": "allow", "outcome": "REFRESH_TOO_SOON", "token_id": id, "source": "", "job": "j"}},
		{"a revocation", func() error {
			_, err := tokens.RevokeToken(own, &pb.RevokeTokenRequest{Profile: "invoices", Scopes: []string{"openid"}})
			return err
		}, map[string]string{"operation": "revoke", "decision": "allow", "outcome": "ok", "token_id": id}},
		{"a forbidden profile", func() error {
			_, err := tokens.IssueToken(own, &pb.IssueTokenRequest{Profile: "payroll", Job: &pb.Job{Id: "j"}})
			return err
		}, map[string]string{"profile": "payroll", "operation": "issue", "decision": "deny", "rule": "", "outcome": "CALLER_DENIED", "token_id": ""}},
		{"a profile that is allowed and does not exist", func() error {
			_, err := tokens.IssueToken(own, &pb.IssueTokenRequest{Profile: "ghosts"})
			return err
		}, map[string]string{"profile": "ghosts", "decision": "deny", "rule": "policy[1]", "outcome": "PROFILE_UNKNOWN"}},
		{"a certificate that names nobody", func() error {
			_, err := nameless.IssueToken(own, &pb.IssueTokenRequest{Profile: "invoices"})
			return err
		}, map[string]string{"method": service + "IssueToken", "caller": "", "proof": "", "profile": "", "operation": "", "decision": "deny", "rule": "", "outcome": "CALLER_UNKNOWN"}},
		{"a request that is not valid", func() error {
			_, err := tokens.IssueToken(own, &pb.IssueTokenRequest{Profile: "In\nvoices"})
			return err
		}, map[string]string{"caller": "dns:worker.example.com", "profile": "", "decision": "deny", "rule": "", "outcome": "INVALID_REQUEST"}},
		{"a scope that is not the profile's", func() error {
			_, err := tokens.IssueToken(own, &pb.IssueTokenRequest{Profile: "invoices", Scopes: []string{"all"}})
			return err
		}, map[string]string{"profile": "invoices", "scopes": "[all]", "decision": "allow", "rule": "policy[1]", "outcome": "INVALID_REQUEST"}},
		{"the list", func() error {
			_, err := admin.ListProfiles(own, &pb.ListProfilesRequest{})
			return err
		}, map[string]string{"method": adminService + "ListProfiles", "operation": "admin", "decision": "allow", "rule": "policy[1]", "outcome": "ok", "profile": ""}},
		{"a profile", func() error {
			_, err := admin.GetProfile(own, &pb.GetProfileRequest{Profile: "invoices"})
			return err
		}, map[string]string{"method": adminService + "GetProfile", "profile": "invoices", "decision": "allow", "outcome": "ok"}},
		{"a reset", func() error {
			_, err := admin.ResetProfile(own, &pb.ResetProfileRequest{Profile: "invoices"})
			return err
		}, map[string]string{"method": adminService + "ResetProfile", "decision": "allow", "outcome": "ok"}},
		{"a forbidden reset", func() error {
			_, err := admin.ResetProfile(own, &pb.ResetProfileRequest{Profile: "payroll"})
			return err
		}, map[string]string{"profile": "payroll", "operation": "admin", "decision": "deny", "outcome": "CALLER_DENIED"}},
		{"a sign-in for a profile that has none", func() error {
			_, err := admin.StartAuthorization(own, &pb.StartAuthorizationRequest{Profile: "invoices"})
			return err
		}, map[string]string{"method": adminService + "StartAuthorization", "decision": "allow", "outcome": "INVALID_REQUEST"}},
		{"the end of a sign-in that nobody began", func() error {
			_, err := admin.CompleteAuthorization(own, &pb.CompleteAuthorizationRequest{State: "s", Code: "c"})
			return err
		}, map[string]string{"method": adminService + "CompleteAuthorization", "operation": "admin", "decision": "deny", "rule": "", "outcome": "INVALID_REQUEST"}},
		{"a client", func() error {
			_, err := admin.CreateClient(own, &pb.CreateClientRequest{Profile: "payroll", TenantId: "t", ClientId: "c", AllowedGrantTypes: []string{"client_credentials"}})
			return err
		}, map[string]string{"method": adminService + "CreateClient", "profile": "payroll", "decision": "deny", "outcome": "CALLER_DENIED"}},
		{"a secret for another's profile", func() error {
			_, err := admin.CreateClientSecret(own, &pb.CreateClientSecretRequest{Profile: "invoices", TenantId: "t", ClientId: "c", DeliverToProfile: "payroll"})
			return err
		}, map[string]string{"method": adminService + "CreateClientSecret", "profile": "payroll", "decision": "deny", "outcome": "CALLER_DENIED"}},
		{"a rotation with another's profile", func() error {
			_, err := admin.RotateClientSecret(own, &pb.RotateClientSecretRequest{Profile: "invoices", AdminProfile: "ghosts"})
			return err
		}, map[string]string{"method": adminService + "RotateClientSecret", "profile": "ghosts", "decision": "deny", "outcome": "PROFILE_UNKNOWN"}},
	} {
		err := c.call()
		d := detailsOf(err)
		e := log.next(1)[0]
		t.Run(c.name, func(t *testing.T) {
			if (err == nil) != (c.want["outcome"] == "ok") {
				t.Fatal(err)
			}
			if err != nil && e["request_id"] != d.info.Metadata["request_id"] {
				t.Errorf("the caller's request id is %v, the line's %v", d.info.Metadata["request_id"], e["request_id"])
			}
			wantEvent(t, e, c.want)
		})
	}
	if _, err := tokens.WhoAmI(own, &pb.WhoAmIRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := healthpb.NewHealthClient(conn).Check(own, &healthpb.HealthCheckRequest{Service: "nothing"}); err == nil {
		t.Fatal("nothing is healthy")
	}
	if err := log.Close(own); err != nil { // health and WhoAmI decide nothing
		t.Fatal(err)
	}
	log.next(0)
	if !strings.Contains(r.log.String(), `"trace_id":`) && strings.Contains(r.log.String(), `"request_id":"batch-1"`) {
		t.Error("the log has no trace id where it has the request's")
	}
}

// An endpoint that fails does not undo the decision.
func TestAuditOfAFailureAfterTheDecision(t *testing.T) {
	log := newAuditFile(t)
	r := newRig(t, rigOptions{audit: log.Log})
	r.fault(sandbox.Fault{Status: 503}, sandbox.Fault{Status: 503})
	_, err := r.tokens().IssueToken(within(t, 30*time.Second), &pb.IssueTokenRequest{Profile: "invoices", Scopes: []string{"openid"}})
	wantFailure(t, err, codes.Unavailable, "ENDPOINT_UNAVAILABLE", "invoices")
	wantEvent(t, log.next(1)[0], map[string]string{
		"caller": "anonymous", "proof": "loopback", "decision": "allow", "rule": "default", "outcome": "ENDPOINT_UNAVAILABLE", "token_id": "", "source": "",
	})
}

// What callers make up reaches the log escaped, or not at all.
func TestAuditOfUnixPeers(t *testing.T) {
	log := newAuditFile(t)
	me := fmt.Sprintf("unix:uid:%d", os.Getuid())
	r := newRig(t, rigOptions{socket: true, audit: log.Log, policy: []access.Rule{{Callers: []string{me}, Profiles: []string{"invoices"}, Allow: []string{"issue"}}}})
	if _, err := r.tokens().IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Fatal(err)
	}
	if e := log.next(1)[0]; e["caller"] != me || e["proof"] != "unix_peer" || e["outcome"] != "ok" || e["peer"] != nil {
		t.Errorf("%v; want the user and no address", e)
	}
}

// What a limit refuses was not decided, and leaves no line: a flood would push
// the others out.
func TestAuditOfThrottledCalls(t *testing.T) {
	a, log := testca.New(t), newAuditFile(t)
	r := newRig(t, rigOptions{tls: func() *tls.Config { return serverOf(a) }, audit: log.Log, limits: admission.Limits{CallerRate: 1}, policy: []access.Rule{
		{Callers: []string{"dns:worker.example.com"}, Profiles: []string{"invoices"}, Allow: []string{"issue"}},
	}})
	tokens := pb.NewTokenBrokerClient(r.dial(clientOf(a, testca.Named("worker.example.com"))))
	served := 0
	for range 20 {
		switch _, err := tokens.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); status.Code(err) {
		case codes.OK:
			served++
		case codes.ResourceExhausted:
		default:
			t.Fatal(err)
		}
	}
	if served == 20 {
		t.Fatal("nothing was refused")
	}
	for _, e := range log.next(served) {
		if e["decision"] != "allow" || e["outcome"] != "ok" {
			t.Errorf("%v", e)
		}
	}
}

func TestAuditOfHostileHeaders(t *testing.T) {
	log := newAuditFile(t)
	r := newRig(t, rigOptions{audit: log.Log})
	tokens := r.tokens()
	for _, hostile := range []string{`"},{"decision":"allow"`, "a b", strings.Repeat("x", 65), "00-" + strings.Repeat("{", 32) + "-1-1", `\u000a`, `}{"decision"`} {
		ctx := metadata.AppendToOutgoingContext(within(t, time.Minute), "x-request-id", hostile, "traceparent", hostile, "user-agent", hostile)
		if _, err := tokens.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices", Job: &pb.Job{Id: `","decision":"deny\n`}}); err != nil {
			t.Fatal(err)
		}
		e := log.next(1)[0]
		if e["request_id"] == hostile {
			t.Errorf("%q is a request id", hostile)
		}
		wantEvent(t, e, map[string]string{"decision": "allow", "trace_id": "", "job": `","decision":"deny\n`})
	}
}

// disk is output that can be full.
type disk struct {
	mu   sync.Mutex
	text strings.Builder
	full atomic.Bool
}

func (d *disk) Write(p []byte) (int, error) {
	if d.full.Load() {
		return 0, syscall.ENOSPC
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.text.Write(p)
}

// With refuse nothing is handed out or changed while lines cannot be written.
func TestRefusingWithoutAudit(t *testing.T) {
	out := &disk{}
	log, err := audit.Open(audit.Options{Settings: audit.Settings{Refuse: true}, Stdout: out, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, rigOptions{audit: log, policy: []access.Rule{{Callers: []string{"anonymous"}, Profiles: []string{"invoices"}, Allow: []string{"issue", "refresh", "revoke", "admin"}}}})
	tokens, admin := r.tokens(), r.admin()
	ctx := within(t, time.Minute)
	first, err := tokens.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"})
	if err != nil {
		t.Fatal(err)
	}
	out.full.Store(true)
	if _, err := tokens.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "payroll"}); err == nil { // a line to fail with
		t.Fatal("payroll is not allowed")
	}
	eventually(t, "that it fails is known", func() bool { return log.Ready() != nil })
	before := log.Stats().Recorded
	for name, call := range map[string]func() error{
		"issue": func() error {
			_, err := tokens.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"})
			return err
		},
		"refresh": func() error {
			_, err := tokens.RefreshToken(ctx, &pb.RefreshTokenRequest{Profile: "invoices", RejectedTokenId: first.GetToken().GetId()})
			return err
		},
		"revoke": func() error {
			_, err := tokens.RevokeToken(ctx, &pb.RevokeTokenRequest{Profile: "invoices"})
			return err
		},
		"reset": func() error {
			_, err := admin.ResetProfile(ctx, &pb.ResetProfileRequest{Profile: "invoices"})
			return err
		},
		"start": func() error {
			_, err := admin.StartAuthorization(ctx, &pb.StartAuthorizationRequest{Profile: "invoices"})
			return err
		},
		"complete": func() error {
			_, err := admin.CompleteAuthorization(ctx, &pb.CompleteAuthorizationRequest{State: "s", Code: "c"})
			return err
		},
		"create client": func() error {
			_, err := admin.CreateClient(ctx, &pb.CreateClientRequest{Profile: "invoices", TenantId: "t", ClientId: "c", AllowedGrantTypes: []string{"client_credentials"}})
			return err
		},
		"create secret": func() error {
			_, err := admin.CreateClientSecret(ctx, &pb.CreateClientSecretRequest{Profile: "invoices", TenantId: "t", ClientId: "c"})
			return err
		},
		"rotate secret": func() error {
			_, err := admin.RotateClientSecret(ctx, &pb.RotateClientSecretRequest{Profile: "invoices"})
			return err
		},
	} {
		d := detailsOf(call())
		if d.code != codes.Unavailable || d.info.Reason != "AUDIT_UNAVAILABLE" || d.retry.GetRetryDelay().AsDuration() != time.Second {
			t.Errorf("%s: %v %s, again in %v: %s", name, d.code, d.info.Reason, d.retry, d.text)
		}
	}
	// Who may not learns that, and what changes nothing is answered.
	if _, err := tokens.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "payroll"}); detailsOf(err).info.Reason != "CALLER_DENIED" {
		t.Error(err)
	}
	if _, err := admin.GetProfile(ctx, &pb.GetProfileRequest{Profile: "invoices"}); err != nil {
		t.Error(err)
	}
	if _, err := admin.ListProfiles(ctx, &pb.ListProfilesRequest{}); err != nil {
		t.Error(err)
	}
	if got := log.Stats().Recorded - before; got != 12 {
		t.Errorf("%d events of 12 calls", got)
	}
	r.wantRequests(1)

	out.full.Store(false)
	eventually(t, "it goes on by itself", func() bool {
		_, err := tokens.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"})
		return err == nil
	})
	if err := log.Close(ctx); err != nil || log.Stats().Lost > 0 || log.Stats().Reserved != 0 {
		t.Errorf("%v, %+v", err, log.Stats())
	}
	if text := out.text.String(); strings.Count(text, "AUDIT_UNAVAILABLE") < 9 || strings.Count(text, `"outcome":"ok"`) < 4 {
		t.Errorf("not all of it is in the log:\n%s", text)
	}
}

// Every token that was handed out has a line, whatever the disk does meanwhile.
func TestEveryTokenHasALine(t *testing.T) {
	out := &disk{}
	log, err := audit.Open(audit.Options{Settings: audit.Settings{Refuse: true}, Stdout: out, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	r := newRig(t, rigOptions{audit: log})
	ctx := within(t, time.Minute)
	var handedOut, refused atomic.Int64
	var wg sync.WaitGroup
	conn := r.dial(nil)
	for worker := range 8 {
		wg.Go(func() {
			tokens := pb.NewTokenBrokerClient(conn)
			for i := range 300 {
				id := fmt.Sprintf("%d-%d", worker, i)
				_, err := tokens.IssueToken(metadata.AppendToOutgoingContext(ctx, "x-request-id", id), &pb.IssueTokenRequest{Profile: "invoices"})
				switch {
				case err == nil:
					handedOut.Add(1)
				case detailsOf(err).info.Reason == "AUDIT_UNAVAILABLE":
					refused.Add(1)
				default:
					t.Error(err)
				}
				if worker == 0 && i%30 == 0 {
					out.full.Store(i%60 == 0)
					if i == 0 {
						eventually(t, "that it fails is known", func() bool { return log.Ready() != nil })
					}
				}
			}
		})
	}
	wg.Wait()
	out.full.Store(false)
	if err := log.Close(ctx); err != nil {
		t.Fatal(err)
	}
	lines := map[string]bool{}
	for d := json.NewDecoder(strings.NewReader(out.text.String())); ; {
		var e struct {
			ID      string `json:"request_id"`
			Outcome string
		}
		if err := d.Decode(&e); err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if e.Outcome == "ok" {
			lines[e.ID] = true
		}
	}
	if int64(len(lines)) != handedOut.Load() || refused.Load() == 0 {
		t.Errorf("%d lines of %d tokens; %d calls refused", len(lines), handedOut.Load(), refused.Load())
	}
}

// Who does not come as far as a call is counted, and told of now and then.
func TestFailedHandshakes(t *testing.T) {
	a, other := testca.New(t), testca.New(t)
	var late atomic.Bool
	bad := a.Leaf(testca.Named("w"))
	revocations := access.NewRevocations([]*x509.Certificate{a.Certificate()})
	list, err := x509.ParseRevocationList(a.RevocationList(nil, bad.Leaf))
	if err != nil {
		t.Fatal(err)
	}
	if err := revocations.Add(list); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, rigOptions{tls: func() *tls.Config {
		c := serverOf(a)
		c.VerifyConnection = func(s tls.ConnectionState) error { return revocations.CheckChains(s.VerifiedChains) }
		if late.Load() {
			c.Time = func() time.Time { return time.Now().Add(24 * time.Hour) }
		}
		return c
	}})
	shake := func(c *tls.Config) {
		t.Helper()
		c.NextProtos = []string{"h2"}
		conn, err := tls.Dial("tcp", r.address, c)
		if err != nil {
			return
		}
		defer conn.Close()
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		_, _ = io.Copy(io.Discard, conn) // until the server has had enough
	}
	old := func(c *tls.Config) *tls.Config { c.MaxVersion = tls.VersionTLS12; return c }
	for _, c := range []struct {
		reason string
		meet   func()
	}{
		{"no_certificate", func() { shake(clientOf(a, nil)) }},
		{"unknown_authority", func() {
			shake(&tls.Config{RootCAs: a.Pool(), ServerName: "127.0.0.1", Certificates: []tls.Certificate{other.Leaf(testca.Named("w"))}})
		}},
		{"expired", func() {
			late.Store(true)
			defer late.Store(false)
			shake(clientOf(a, testca.Named("w")))
		}},
		{"revoked", func() {
			shake(&tls.Config{RootCAs: a.Pool(), ServerName: "127.0.0.1", Certificates: []tls.Certificate{bad}})
		}},
		{"unfit_certificate", func() {
			shake(clientOf(a, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }))
		}},
		{"tls_version", func() { shake(old(clientOf(a, testca.Named("w")))) }},
		{"client_refused", func() { shake(&tls.Config{RootCAs: other.Pool(), ServerName: "127.0.0.1"}) }},
		{"no_tls", func() {
			if conn, err := net.Dial("tcp", r.address); err == nil {
				defer conn.Close()
				fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
				_, _ = io.Copy(io.Discard, conn)
			}
		}},
		{"closed", func() {
			if conn, err := net.Dial("tcp", r.address); err == nil {
				conn.Close()
			}
		}},
	} {
		t.Run(c.reason, func(t *testing.T) {
			before := failedHandshakes(t, r.metrics)
			c.meet()
			eventually(t, "it is counted", func() bool { return failedHandshakes(t, r.metrics)[c.reason] == before[c.reason]+1 })
		})
	}
	if n := len(failedHandshakes(t, r.metrics)); n != 12 {
		t.Errorf("%d reasons", n)
	}
	lines := strings.Count(r.log.String(), `"msg":"connection turned away"`)
	if lines == 0 || lines > 9 || !strings.Contains(r.log.String(), `"peer":"127.0.0.1:`) || !strings.Contains(r.log.String(), `"reason":"no_certificate"`) {
		t.Errorf("%d lines:\n%s", lines, r.log)
	}
	before := strings.Count(r.log.String(), `"msg":"connection turned away"`)
	for range 50 {
		shake(clientOf(a, nil))
	}
	if lines := strings.Count(r.log.String(), `"msg":"connection turned away"`) - before; lines > 20 {
		t.Errorf("50 of them make %d lines", lines)
	}
}

// failedHandshakes are the counts by reason.
func failedHandshakes(t *testing.T, g prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]float64{}
	for _, f := range families {
		if f.GetName() == "handshakes_failed_total" {
			for _, m := range f.GetMetric() {
				counts[m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue()
			}
		}
	}
	return counts
}
