package audit_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/audit"
)

// server is a syslog server that keeps the messages it gets.
type server struct {
	t        *testing.T
	kind     string
	address  string
	mu       sync.Mutex
	messages []string
	close    func() // when it returns, all connections are closed
}

// serve starts a server of some kind.
func serve(t *testing.T, kind, address string) *server {
	t.Helper()
	s := &server{t: t, kind: kind, address: address}
	if kind == "unixgram" || kind == "udp" {
		conn, err := net.ListenPacket(kind, address)
		if err != nil {
			t.Fatal(err)
		}
		s.address = conn.LocalAddr().String()
		read := make(chan struct{})
		go func() {
			defer close(read)
			for b := make([]byte, 64<<10); ; {
				n, _, err := conn.ReadFrom(b)
				if err != nil {
					return
				}
				s.take(string(b[:n]))
			}
		}()
		s.close = sync.OnceFunc(func() {
			conn.Close()
			<-read
			_ = os.Remove(s.address) // a socket's, if it is one
		})
		t.Cleanup(s.close)
		return s
	}
	ln, err := net.Listen(kind, address)
	if err != nil {
		t.Fatal(err)
	}
	s.address = ln.Addr().String()
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[conn] = true
			mu.Unlock()
			wg.Go(func() { s.read(conn) })
		}
	})
	s.close = sync.OnceFunc(func() {
		ln.Close()
		mu.Lock()
		for conn := range open {
			conn.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
	t.Cleanup(s.close)
	return s
}

// read takes messages from a connection: frames of RFC 6587 over TCP.
func (s *server) read(conn net.Conn) {
	r := bufio.NewReader(conn)
	for {
		if s.kind == "unix" {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			s.take(strings.TrimSuffix(line, "\n"))
			continue
		}
		length, err := r.ReadString(' ')
		if err != nil {
			return
		}
		n, err := strconv.Atoi(strings.TrimSuffix(length, " "))
		if err != nil {
			s.t.Errorf("not a frame: %q", length)
			return
		}
		message := make([]byte, n)
		if _, err := io.ReadFull(r, message); err != nil {
			return
		}
		s.take(string(message))
	}
}

func (s *server) take(message string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.messages = append(s.messages, message)
}

// entry is RFC 5424's SYSLOG-MSG.
var entry = regexp.MustCompile(`^<(\d+)>1 (\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z) (\S+) token-broker (\d+) audit - (\{.*\})$`)

// lines are what the messages say.
func (s *server) lines(priority int) []line {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	var text strings.Builder
	for _, m := range s.messages {
		f := entry.FindStringSubmatch(m)
		if f == nil || f[1] != strconv.Itoa(priority) || f[4] != strconv.Itoa(os.Getpid()) {
			s.t.Fatalf("not a message, or not with priority %d: %q", priority, m)
		}
		if at, err := time.Parse(time.RFC3339Nano, f[2]); err != nil || time.Since(at).Abs() > time.Hour {
			s.t.Fatalf("at %s: %v", f[2], err)
		}
		fmt.Fprintln(&text, f[5])
	}
	return read(s.t, text.String())
}

// socket is a path that is short enough for one.
func socket(t *testing.T) string {
	dir, err := os.MkdirTemp("", "syslog")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "log")
}

func toSyslog(s *server, facility string) audit.Options {
	return audit.Options{Settings: audit.Settings{
		Syslog: audit.Syslog{Network: strings.TrimSuffix(s.kind, "gram"), Address: s.address, Facility: facility}, Refuse: true,
	}}
}

var kinds = []string{"unixgram", "unix", "udp", "tcp"}

// begin starts a server of the kind, wherever there is room.
func begin(t *testing.T, kind string) *server {
	t.Helper()
	if strings.HasPrefix(kind, "unix") {
		return serve(t, kind, socket(t))
	}
	return serve(t, kind, "127.0.0.1:0")
}

func TestSyslog(t *testing.T) {
	for i, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			facility, code := []string{"", "auth", "local7", "user"}[i], []int{10, 4, 23, 1}[i]
			s := begin(t, kind)
			r := newRig(t, toSyslog(s, facility), audit.Capacity)
			const n = 500
			for i := 0; i < n; i += 50 { // UDP has no way to ask for patience
				r.record(i, i+50)
				eventually(t, "the messages", func() bool { return len(s.lines(code<<3|6)) == i+50 })
			}
			if err := r.close(10 * time.Second); err != nil {
				t.Fatal(err)
			}
			wantJobs(t, s.lines(code<<3|6), 0, n)
		})
	}
}

// A server that goes away is noticed, and what it missed it gets when it is back.
func TestSyslogServerThatComesBack(t *testing.T) {
	for _, kind := range []string{"unixgram", "unix", "tcp"} { // over UDP nobody notices
		t.Run(kind, func(t *testing.T) {
			first := begin(t, kind)
			r := newRig(t, toSyslog(first, ""), 100)
			r.record(0, 10)
			eventually(t, "the first messages", func() bool { return len(first.lines(86)) == 10 })
			first.close()
			if kind == "unixgram" { // which nothing but a message finds out
				r.record(10, 11)
			}
			eventually(t, "that it is gone", func() bool { return r.Ready() != nil })
			eventually(t, "the log says so", func() bool { return strings.Contains(r.told.String(), "sending to the syslog server at ") })
			if kind != "unixgram" {
				r.record(10, 11)
			}
			r.record(11, 20)
			second := serve(t, kind, first.address)
			eventually(t, "the rest", func() bool { return len(second.lines(86)) == 10 })
			wantJobs(t, second.lines(86), 10, 20)
			eventually(t, "that it is back", func() bool { return r.Ready() == nil })
			if err := r.close(10 * time.Second); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A server that was never there.
func TestSyslogServerThatIsNotThere(t *testing.T) {
	address := socket(t)
	r := newRig(t, audit.Options{Settings: audit.Settings{Syslog: audit.Syslog{Network: "unix", Address: address}, Refuse: true}}, 100)
	eventually(t, "that it is not there", func() bool { return r.Ready() != nil })
	s := serve(t, "unixgram", address)
	eventually(t, "that it is there, without an event", func() bool { return r.Ready() == nil })
	r.record(0, 3)
	if err := r.close(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its messages", func() bool { return len(s.lines(86)) == 3 })
}

// A server that takes connections and does not read fails the attempt, and does
// not get a line in two parts.
func TestSyslogServerThatDoesNotRead(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	o := audit.Options{Settings: audit.Settings{Syslog: audit.Syslog{Network: "tcp", Address: ln.Addr().String()}, Refuse: true}}
	r := newRig(t, o, audit.Capacity)
	scopes := []string{strings.Repeat("s", 20000)}
	for range 800 { // more than sockets have room for
		r.Record(&audit.Event{Time: noon, Scopes: scopes})
	}
	eventually(t, "a failure", func() bool { return r.Stats().Failure != nil })
	if !errors.Is(r.Stats().Failure, os.ErrDeadlineExceeded) || r.Ready() == nil {
		t.Error(r.Stats().Failure)
	}
	began := time.Now()
	if err := r.close(200 * time.Millisecond); err == nil {
		t.Error("it claims to have written everything")
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("to give up took %s", took)
	}
}
