package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/testproc"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// binary is the command, built once for all tests.
var binary string

func TestMain(m *testing.M) { os.Exit(testproc.RunWithBroker(m, &binary)) }

// outcome of a command that has ended.
type outcome struct {
	status         int
	stdout, stderr string
}

// command runs the binary to its end.
func command(t testing.TB, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, binary, args...)
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	err := c.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("broker %s: %v", strings.Join(args, " "), err)
	}
	return outcome{c.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// process is a running "broker serve".
type process struct {
	t              testing.TB
	cmd            *exec.Cmd
	address, admin string
	log            *lockedBuffer // standard error
	out            *lockedBuffer // and output, which is the audit log unless the config says otherwise
	exited         chan struct{}
}

var served = regexp.MustCompile(`"msg":"serving".*"address":"([^"]+)","admin_address":"([^"]+)"`)

// start runs serve and returns when it serves.
func start(t testing.TB, config string, env ...string) *process {
	t.Helper()
	p := &process{t: t, log: &lockedBuffer{}, out: &lockedBuffer{}, exited: make(chan struct{})}
	p.cmd = exec.Command(binary, "serve", "--config", config)
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.log
	p.begin()
	return p
}

// begin starts the command and returns when it serves.
func (p *process) begin() {
	p.t.Helper()
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	go func() {
		defer close(p.exited)
		_ = p.cmd.Wait() // the exit status is in ProcessState
	}()
	p.t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // it may have ended already
		<-p.exited
	})
	p.await("it serves", func() bool {
		m := served.FindStringSubmatch(p.log.String())
		if m == nil {
			return false
		}
		p.address, p.admin = m[1], m[2]
		return true
	})
}

// await polls until the condition holds, and fails with the log if it does not.
func (p *process) await(what string, condition func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !condition(); time.Sleep(2 * time.Millisecond) {
		select {
		case <-p.exited:
			if condition() {
				return
			}
			p.t.Fatalf("waiting until %s: the process ended: %v\n%s", what, p.cmd.ProcessState, p.log)
		default:
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("waiting until %s: not within 30 s\n%s", what, p.log)
		}
	}
}

// ended waits for the process.
func (p *process) ended() {
	p.t.Helper()
	p.await("it has ended", func() bool {
		select {
		case <-p.exited:
			return true
		default:
			return false
		}
	})
}

func (p *process) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

// stop asks the process to stop and returns its exit status.
func (p *process) stop() int {
	p.t.Helper()
	p.signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(40 * time.Second):
		p.t.Fatalf("it did not stop\n%s", p.log)
	}
	return p.cmd.ProcessState.ExitCode()
}

// logged waits for a line in the log.
func (p *process) logged(text string) {
	p.t.Helper()
	p.await(fmt.Sprintf("%q is logged", text), func() bool { return strings.Contains(p.log.String(), text) })
}

// get reads a page of the admin address.
func (p *process) get(path string) (int, string) {
	p.t.Helper()
	r, err := http.Get("http://" + p.admin + path)
	if err != nil {
		p.t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return r.StatusCode, string(body)
}

func (p *process) dial() *grpc.ClientConn {
	p.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+p.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	return conn
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// stage is a directory with a config and what it names, and a stand-in Vantage.
type stage struct {
	t       testing.TB
	dir     string
	vantage *sandbox.Server
	url     string
	keyset  broker.Secret // of the store, if there is one
}

func newStage(t testing.TB) *stage {
	t.Helper()
	v, err := sandbox.New(sandbox.Options{})
	if err != nil {
		t.Fatal(err)
	}
	web := httptest.NewServer(v)
	t.Cleanup(func() {
		v.Close()
		web.Close()
	})
	s := &stage{t: t, dir: t.TempDir(), vantage: v, url: web.URL}
	s.write("secret", v.ClientSecret("invoices")+"\n")
	return s
}

func (s *stage) path(name string) string { return filepath.Join(s.dir, name) }

// write replaces a file at once, as deployment tools do.
func (s *stage) write(name, content string) string {
	s.t.Helper()
	temporary := s.path("." + name + ".new")
	if err := os.WriteFile(temporary, []byte(content), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if err := os.Rename(temporary, s.path(name)); err != nil {
		s.t.Fatal(err)
	}
	return s.path(name)
}

// config writes a config with the profile "invoices" and more lines after it.
func (s *stage) config(more ...string) string {
	s.t.Helper()
	return s.write("config.yaml", fmt.Sprintf(`server: {address: "127.0.0.1:0"}
admin: {address: "127.0.0.1:0"}
log: {level: debug}
profiles:
  - name: invoices
    scopes: [openid, permissions, global.wildcard]
    vantage:
      base_url: %s
      client_id: invoices
      client_secret: {file: secret}
      client_credentials: {}
%s`, s.url, strings.Join(more, "\n")))
}

// onSocket writes a config that serves on a unix socket.
func (s *stage) onSocket(socket string, more ...string) string {
	s.t.Helper()
	return s.write("config.yaml", strings.Replace(read(s.t, s.config(more...)), `{address: "127.0.0.1:0"}`, `{address: "unix:`+socket+`"}`, 1))
}

// shortDir is a directory whose path leaves room: those of sockets have about
// 100 characters.
func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "broker")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func freeAddress(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}
