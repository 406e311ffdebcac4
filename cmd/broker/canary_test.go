package main

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

const (
	canarySecret = "canary+secret/with=odd&characters%7f-5b1d9c"
	canaryToken  = "canary.access.token-9e8d7c6b5a4f3e2d1c0b"
	canaryCode   = "CANARYCODE3F2E1D0C9B8A"
	// What a sign-in brings to stay.
	canaryRefresh = "canary.refresh-7a6b5c4d3e2f"
)

// traitor is an authorization server that repeats what it was told wherever it
// can: the worst that a server, a gateway or an error page can do to a secret.
type traitor struct {
	mu   sync.Mutex
	mode string
	n    int
	// verifiers that came with codes.
	verifiers []string
}

func (t *traitor) set(mode string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.mode = mode
}

func (t *traitor) requests() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.n
}

func (t *traitor) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	t.mu.Lock()
	mode := t.mode
	t.n++
	t.mu.Unlock()
	body, _ := io.ReadAll(r.Body)
	told, _ := url.ParseQuery(string(body))
	if v := told.Get("code_verifier"); v != "" {
		t.mu.Lock()
		t.verifiers = append(t.verifiers, v)
		t.mu.Unlock()
	}
	secret := told.Get("client_secret")
	if secret != canarySecret {
		mode = "refuse" // the test itself is wrong: no token, and it will notice
	}
	echo := fmt.Sprintf("you sent %s, that is %s, also %s, %s", body, secret, base64.StdEncoding.EncodeToString([]byte(secret)), url.QueryEscape(secret))
	w.Header().Set("X-Trace-ID", "trace "+secret)
	w.Header().Set("Content-Type", "application/json")
	switch mode {
	case "good":
		refresh := ""
		if told.Get("code") != "" {
			refresh = fmt.Sprintf(`,"refresh_token":%q,"id_token":%q`, canaryRefresh, secret)
		}
		fmt.Fprintf(w, `{"access_token":%q,"expires_in":3600,"scope":%q%s}`, canaryToken, "openid "+secret, refresh)
	case "description":
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(w, `{"error":"invalid_scope","error_description":%q,"error_hint":%q}`, echo, echo)
	case "error":
		w.WriteHeader(http.StatusBadRequest)
		fmt.Fprintf(w, `{"error":%q}`, echo)
	case "html":
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(http.StatusBadGateway)
		fmt.Fprintf(w, "<html><title>%s</title>%s</html>", secret, echo)
	case "redirect":
		http.Redirect(w, r, "http://127.0.0.1/elsewhere?"+string(body), http.StatusTemporaryRedirect)
	case "token type":
		fmt.Fprintf(w, `{"access_token":%q,"token_type":%q,"expires_in":3600}`, canaryToken, secret)
	case "malformed":
		fmt.Fprintf(w, `{"access_token":%q,"expires_in":%q`, canaryToken, echo)
	case "retry":
		w.Header().Set("Retry-After", secret)
		w.WriteHeader(http.StatusTooManyRequests)
		fmt.Fprint(w, echo)
	case "cut":
		w.Header().Set("Content-Length", "100000")
		fmt.Fprint(w, echo)
		panic(http.ErrAbortHandler)
	default:
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprintf(w, `{"error":"invalid_client","error_description":%q}`, echo)
	}
}

// TestCanary runs the broker through its failures with marked secrets and
// tokens, at debug level, and finds no trace of them in the log, in the audit
// log, in errors and their details, in metrics, in what operators see, nor in
// what a process says that is made to crash.
func TestCanary(t *testing.T) {
	t.Parallel()
	for destination, crash := range map[string]syscall.Signal{"file": syscall.SIGQUIT, "syslog": syscall.SIGABRT, "stdout": syscall.SIGQUIT} {
		t.Run(destination, func(t *testing.T) {
			t.Parallel()
			canary(t, destination, crash)
		})
	}
}

// canary does it with one destination of the audit log, and ends the process by
// a signal that prints all stacks.
func canary(t *testing.T, destination string, crash syscall.Signal) {
	server := &traitor{mode: "refuse"}
	web := httptest.NewServer(server)
	t.Cleanup(web.Close)
	s := newStage(t)
	s.url = web.URL
	s.write("secret", canarySecret)
	socket := syslogSocket(t)
	records := map[string]string{"file": "{file: audit.jsonl}", "stdout": "{stdout: {}}", "syslog": "{syslog: {address: \"unix:" + socket.path + "\"}}"}[destination]
	p := start(t, s.config("  - name: from-env",
		"    vantage: {base_url: \""+web.URL+"\", client_id: b, client_secret: {env: CANARY}, client_credentials: {}}",
		"  - name: literal",
		"    vantage: {base_url: \""+web.URL+"\", client_id: c, client_secret: {value: \""+canarySecret+"\"}, client_credentials: {}}",
		"  - name: consent",
		"    vantage: {base_url: \""+web.URL+"\", client_id: d, client_secret: {env: CANARY}, authorization_code: {redirect_url: \"http://127.0.0.1/oauth/callback\"}}",
		"audit: "+records),
		"CANARY="+canarySecret, "GOTRACEBACK=all")
	conn := p.dial()
	tokens, admin := pb.NewTokenBrokerClient(conn), pb.NewProfileAdminClient(conn)

	var seen strings.Builder // all that leaves the process, but for tokens handed out
	for _, mode := range []string{"refuse", "description", "error", "html", "redirect", "token type", "malformed", "retry", "cut", "good"} {
		server.set(mode)
		for _, name := range []string{"invoices", "from-env", "literal"} {
			if _, err := admin.ResetProfile(t.Context(), &pb.ResetProfileRequest{Profile: name}); err != nil {
				t.Fatal(err)
			}
			before := server.requests()
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			r, err := tokens.IssueToken(ctx, &pb.IssueTokenRequest{Profile: name})
			cancel()
			if (mode == "good") != (err == nil) {
				t.Fatalf("%s: %v", mode, err)
			}
			if server.requests() == before {
				t.Fatalf("%s: %s made no token request", mode, name)
			}
			if err == nil {
				if r.GetToken().GetAccessToken() != canaryToken {
					t.Fatalf("%s: not the token", mode)
				}
				_, err = tokens.RefreshToken(t.Context(), &pb.RefreshTokenRequest{Profile: name, RejectedTokenId: r.GetToken().GetId()})
			}
			st := status.Convert(err)
			fmt.Fprintln(&seen, st.Message(), prototext.Format(st.Proto()))
			for _, d := range st.Details() {
				fmt.Fprintf(&seen, "%+v\n", d)
			}
		}
		err := signInWith(t.Context(), admin, "consent", canaryCode)
		if (mode == "good") != (err == nil) {
			t.Fatalf("%s: signing in: %v", mode, err)
		}
		fmt.Fprintln(&seen, prototext.Format(status.Convert(err).Proto()))
		list, err := admin.ListProfiles(t.Context(), &pb.ListProfilesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, profile := range list.GetProfiles() {
			fmt.Fprintln(&seen, prototext.Format(profile))
		}
		for _, path := range []string{"/metrics", "/readyz", "/healthz", "/", "/profiles/consent"} {
			_, page := p.get(path)
			seen.WriteString(page)
		}
	}
	for _, verb := range [][]string{{"profiles"}, {"profiles", "invoices"}, {"profiles", "--output", "json"}, {"whoami"}, {"token", "nothing"}} {
		got := command(t, append(verb, "--address", p.address)...)
		seen.WriteString(got.stdout + got.stderr)
	}
	hostile(t, p, canarySecret, canaryToken)
	for _, path := range []string{"/profiles/" + url.PathEscape(canarySecret), "/oauth/callback?code=" + canaryCode + "&state=" + canaryCode, "/oauth/callback?error=x&error_description=" + canaryCode} {
		_, page := p.get(path)
		seen.WriteString(page)
	}
	audited := func() string {
		return map[string]func() string{"file": func() string { return readIf(s.path("audit.jsonl")) }, "stdout": p.out.String, "syslog": socket.text}[destination]()
	}
	p.await("the audit log is written", func() bool {
		_, metrics := p.get("/metrics")
		return strings.Contains(metrics, "token_broker_audit_events_buffered 0\n")
	})
	// Mistakes in a config that holds secrets where none belong.
	s.write("config.yaml", "profiles:\n  - name: "+canarySecret+"\n    vantage:\n      client_secret: "+canarySecret+"\n      "+canarySecret+": {value: 5}\n")
	p.logged("config not reloaded")
	for _, output := range []string{"text", "json"} {
		got := command(t, "check", "--config", s.path("config.yaml"), "--output", output)
		if got.status != 2 {
			t.Errorf("check: %+v", got)
		}
		seen.WriteString(got.stdout + got.stderr)
	}
	p.signal(crash)
	<-p.exited
	lines := auditLines(t, audited())
	outcomes := map[string]int{}
	for _, l := range lines {
		outcomes[l.Door+" "+l.Outcome]++
	}
	for _, want := range []string{"grpc ok", "grpc CREDENTIALS_REJECTED", "grpc ENDPOINT_UNAVAILABLE", "console PROFILE_UNKNOWN", "console INVALID_REQUEST"} {
		if outcomes[want] == 0 {
			t.Errorf("the audit log has no %s: nothing would be found in it: %v", want, outcomes)
		}
	}
	seen.WriteString(audited() + p.out.String())
	if !strings.Contains(p.log.String(), "goroutine ") || !strings.Contains(p.log.String(), `"level":"DEBUG"`) {
		t.Error("the log holds no debug lines or no stacks: nothing would be found in it")
	}
	seen.WriteString(p.log.String())

	if len(server.verifiers) == 0 {
		t.Error("no sign-in came as far as the authorization server")
	}
	for what, pattern := range map[string]string{
		"the code":              canaryCode,
		"the refresh token":     regexp.QuoteMeta(canaryRefresh),
		"a verifier":            strings.Join(server.verifiers, "|"),
		"the secret":            regexp.QuoteMeta(canarySecret),
		"the encoded secret":    regexp.QuoteMeta(url.QueryEscape(canarySecret)),
		"the secret in base64":  regexp.QuoteMeta(base64.RawStdEncoding.EncodeToString([]byte(canarySecret))[:20]),
		"a part of the secret":  "(?i)canary[^_]{0,3}secret",
		"the end of the secret": "5b1d9c",
		"the token":             "(?i)canary[^_]{0,3}access",
		"a part of the token":   "9e8d7c6b5a4f",
	} {
		all := seen.String()
		if at := regexp.MustCompile(pattern).FindStringIndex(all); at != nil {
			t.Errorf("%s leaked: %q", what, all[max(0, at[0]-80):min(len(all), at[1]+40)])
		}
	}
}

// hostile calls with secrets, and with what could end a line, wherever a caller
// may write something.
func hostile(t *testing.T, p *process, secrets ...string) {
	t.Helper()
	for _, secret := range secrets {
		for _, mark := range []string{secret, "00-" + secret + "-00-01", `"}{"decision":"allow","job":"` + secret} {
			conn, err := grpc.NewClient("passthrough:///"+p.address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithUserAgent(mark))
			if err != nil {
				t.Fatal(err)
			}
			ctx := metadata.AppendToOutgoingContext(t.Context(), "x-request-id", mark+"!", "traceparent", mark, "authorization", "Bearer "+mark, "cookie", mark)
			// A job's id is the caller's to choose, and in the audit log; so are names of profiles, as long as they are some.
			_, _ = pb.NewTokenBrokerClient(conn).IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices", Job: &pb.Job{Id: `"}{"decision":"allow\n\u000a`}})
			_, _ = pb.NewTokenBrokerClient(conn).IssueToken(ctx, &pb.IssueTokenRequest{Profile: mark, Scopes: []string{mark}, Job: &pb.Job{Id: mark + "\n"}})
			conn.Close()
		}
	}
}

// socket is a syslog server's.
type socket struct {
	path string
	got  lockedBuffer
}

func syslogSocket(t *testing.T) *socket {
	t.Helper()
	dir, err := os.MkdirTemp("", "syslog") // paths of sockets are short
	if err != nil {
		t.Fatal(err)
	}
	s := &socket{path: filepath.Join(dir, "log")}
	conn, err := net.ListenPacket("unixgram", s.path)
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for b := make([]byte, 64<<10); ; {
			n, _, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			fmt.Fprintf(&s.got, "%s\n", b[:n])
		}
	}()
	t.Cleanup(func() {
		conn.Close()
		<-read
		os.RemoveAll(dir)
	})
	return s
}

// text is what the messages say.
func (s *socket) text() string {
	return regexp.MustCompile(`(?m)^<86>1 \S+ \S+ token-broker \d+ audit - `).ReplaceAllString(s.got.String(), "")
}

// signInWith starts a sign-in, and ends it with the code.
func signInWith(ctx context.Context, admin pb.ProfileAdminClient, profile, code string) error {
	if _, err := admin.ResetProfile(ctx, &pb.ResetProfileRequest{Profile: profile}); err != nil {
		return err
	}
	began, err := admin.StartAuthorization(ctx, &pb.StartAuthorizationRequest{Profile: profile})
	if err != nil {
		return err
	}
	_, err = admin.CompleteAuthorization(ctx, &pb.CompleteAuthorizationRequest{State: began.GetState(), Code: code})
	return err
}
