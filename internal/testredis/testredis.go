// Package testredis gives tests a real Redis: a server of their own, one behind
// Sentinel, or a Cluster, on ports that nobody else uses. What happens to a
// Redis in production can be done to it: it is killed, frozen, flushed,
// restarted with its data or without, failed over, its slots are moved.
//
// It speaks to Redis with a few lines of its own, so that a test does not look
// through the eyes of the client library that is under test.
package testredis

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/testproc"
)

const (
	// startTimeout for a server to answer. It is long because machines that
	// run tests are busy.
	startTimeout = 20 * time.Second
	// settleTimeout for several servers to agree on something.
	settleTimeout = 40 * time.Second
)

// Options of a server. The zero value is a plain one that forgets everything
// when it ends.
type Options struct {
	// TLS, if not nil, signs the server's certificate, and the server speaks
	// TLS only. It asks for no client certificate unless Config says so; Do
	// has one of the same authority.
	TLS *testca.Authority
	// Password of the user "default".
	Password string
	// Users are lines of redis.conf's form "user NAME RULE...", without the
	// word "user".
	Users []string
	// Config are further lines of redis.conf.
	Config []string
	// Persist makes every write durable before it is acknowledged.
	Persist bool
}

// Server is one redis-server process after another, at one address.
type Server struct {
	t       testing.TB
	options Options
	dir     string
	port    int
	lines   []string // of redis.conf
	args    []string // after the config file
	dial    dialer
	process *testproc.Process
}

// Start runs a Redis until the test ends, and returns when it answers. The test
// fails if redis-server is not installed.
func Start(t testing.TB, o Options) *Server {
	t.Helper()
	s := newServer(t, o)
	s.start()
	return s
}

// newServer chooses a port and what to say in redis.conf.
func newServer(t testing.TB, o Options) *Server {
	t.Helper()
	testproc.Require(t, "redis-server")
	s := &Server{t: t, options: o, dir: t.TempDir(), port: testproc.FreePort(t)}
	s.dial = dialer{address: s.Address(), password: o.Password}
	lines := []string{
		"bind 127.0.0.1",
		"dir " + s.dir,
		`save ""`,
		"enable-debug-command local",
		"repl-diskless-sync-delay 0", // a replica need not wait for others to come
	}
	if o.TLS == nil {
		lines = append(lines, fmt.Sprintf("port %d", s.port))
	} else {
		lines = append(lines, s.secure(o.TLS)...)
	}
	if o.Password != "" {
		lines = append(lines, "requirepass "+o.Password, "masterauth "+o.Password)
	}
	for _, u := range o.Users {
		lines = append(lines, "user "+u)
	}
	if o.Persist {
		lines = append(lines, "appendonly yes", "appendfsync always")
	}
	s.lines = append(lines, o.Config...)
	return s
}

// secure writes the certificates and returns the lines that name them.
func (s *Server) secure(authority *testca.Authority) []string {
	s.t.Helper()
	leaf := authority.Leaf(testca.Loopback)
	certificate, key := testca.PEM(s.t, leaf)
	s.dial.tls = &tls.Config{
		RootCAs:      authority.Pool(),
		Certificates: []tls.Certificate{authority.Leaf(func(*x509.Certificate) {})},
		ServerName:   "127.0.0.1",
	}
	return []string{
		"port 0",
		fmt.Sprintf("tls-port %d", s.port),
		"tls-cert-file " + s.write("redis.crt", string(certificate)),
		"tls-key-file " + s.write("redis.key", string(key)),
		"tls-ca-cert-file " + s.write("ca.crt", string(authority.PEM())),
		"tls-auth-clients optional",
	}
}

func (s *Server) write(name, content string) string {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// start runs the process, and returns when it answers. The config is written
// anew, because Redis may have rewritten it.
func (s *Server) start() {
	s.t.Helper()
	config := s.write("redis.conf", strings.Join(s.lines, "\n")+"\n")
	s.process = testproc.Start(s.t, exec.Command("redis-server", append([]string{config}, s.args...)...))
	s.process.Await("redis-server answers at "+s.Address(), startTimeout, func() bool {
		_, err := s.dial.do("PING")
		return err == nil
	})
}

// Address is where it listens, "127.0.0.1:port": the same over its whole life.
func (s *Server) Address() string { return fmt.Sprintf("127.0.0.1:%d", s.port) }

// Do runs a command over a connection of its own, as the user "default", and
// returns the reply: a string, an int64, nil, or a []any of these. The test
// fails if the server is out of reach or answers with an error.
func (s *Server) Do(args ...any) any {
	s.t.Helper()
	reply, err := s.dial.do(args...)
	if err != nil {
		s.t.Fatalf("redis %v: %v", args, err)
	}
	return reply
}

// Try is Do for commands that may fail. An error reply is an [Error].
func (s *Server) Try(args ...any) (any, error) { return s.dial.do(args...) }

// Kill ends the process at once, as a crash does.
func (s *Server) Kill() {
	s.t.Helper()
	s.process.Kill()
}

// Alive reports whether the process runs, perhaps paused.
func (s *Server) Alive() bool { return s.process.Alive() }

// Restart kills the process if it runs, and starts another one at the same
// address, with what the dead one had made durable: everything with
// Options.Persist, otherwise what the last SAVE wrote, or nothing.
func (s *Server) Restart() {
	s.t.Helper()
	s.Kill()
	s.start()
}

// RestartEmpty is Restart after the disk was lost, too.
func (s *Server) RestartEmpty() {
	s.t.Helper()
	s.Kill()
	for _, data := range []string{"dump.rdb", "appendonlydir"} {
		if err := os.RemoveAll(filepath.Join(s.dir, data)); err != nil {
			s.t.Fatal(err)
		}
	}
	s.start()
}

// Pause freezes the process: connections stay, and are accepted, but nothing
// answers.
func (s *Server) Pause() {
	s.t.Helper()
	s.process.Pause()
}

// Continue ends a pause.
func (s *Server) Continue() { s.process.Continue() }

// Flush deletes everything.
func (s *Server) Flush() {
	s.t.Helper()
	s.Do("FLUSHALL", "SYNC")
}

// Info returns the fields of a section of INFO.
func (s *Server) Info(section string) map[string]string {
	s.t.Helper()
	return parseInfo(s.Do("INFO", section))
}

// CommandStats returns how often each command was executed since the process
// began, or since CONFIG RESETSTAT; names are in lower case, with
// subcommands as "config|get". Commands that a script calls are among them,
// and the INFO of this call and those before.
func (s *Server) CommandStats() map[string]int {
	s.t.Helper()
	stats := map[string]int{}
	for name, value := range s.Info("commandstats") {
		calls, _, _ := strings.Cut(strings.TrimPrefix(value, "calls="), ",")
		n, err := strconv.Atoi(calls)
		if err != nil {
			s.t.Fatalf("INFO commandstats says %s:%s", name, value)
		}
		stats[strings.TrimPrefix(name, "cmdstat_")] = n
	}
	return stats
}

func parseInfo(reply any) map[string]string {
	fields := map[string]string{}
	text, _ := reply.(string)
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			fields[name] = value
		}
	}
	return fields
}

// await polls until a condition of several servers holds.
func await(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(settleTimeout); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waiting until %s: not within %v", what, settleTimeout)
		}
	}
}
