// Package testproc runs the programs that tests need, as children of the test:
// they end with it, they can be stopped in mid-step, and what they wrote is
// there to be looked at.
package testproc

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Process is a running program.
type Process struct {
	t      testing.TB
	cmd    *exec.Cmd
	log    log
	exited chan struct{}
}

// Require fails the test if one of the programs is not installed.
func Require(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Fatalf("this test needs %s, which is not installed: run scripts/need.sh %s", p, p)
		}
	}
}

// Start runs the command, and kills it when the test ends. It returns as soon
// as the process exists.
func Start(t testing.TB, cmd *exec.Cmd) *Process {
	t.Helper()
	p := &Process{t: t, cmd: cmd, exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = &p.log, &p.log
	dieWithParent(cmd)
	if err := cmd.Start(); err != nil {
		t.Fatalf("starting %s: %v", cmd, err)
	}
	go func() {
		defer close(p.exited)
		_ = cmd.Wait() // how it ended is in ProcessState
	}()
	t.Cleanup(p.Kill)
	return p
}

// Signal sends a signal. A process that has ended does not mind.
func (p *Process) Signal(s syscall.Signal) {
	select {
	case <-p.exited:
	default:
		_ = p.cmd.Process.Signal(s) // it may end at this very moment
	}
}

// Kill ends the process at once, as a crash does, and returns when it is gone.
func (p *Process) Kill() {
	p.Signal(syscall.SIGKILL)
	<-p.exited
}

// Pause freezes the process, and returns when it is frozen: its sockets stay,
// nothing in it runs.
func (p *Process) Pause() {
	p.t.Helper()
	p.Signal(syscall.SIGSTOP)
	p.Await("it is frozen", 5*time.Second, p.frozen)
}

// Continue ends a pause.
func (p *Process) Continue() { p.Signal(syscall.SIGCONT) }

// frozen reads the state from /proc. Where there is none, a signal that was
// sent has to do.
func (p *Process) frozen() bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Pid()))
	if err != nil {
		return true
	}
	_, state, _ := strings.Cut(string(stat), ") ")
	return strings.HasPrefix(state, "T")
}

// Pid is the process's number.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Exited is closed when the process has ended.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// Alive reports whether the process has not ended.
func (p *Process) Alive() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// ExitCode is the status of a process that has ended; -1 if a signal did it.
func (p *Process) ExitCode() int { return p.cmd.ProcessState.ExitCode() }

// Log is what the process has written so far, to both outputs.
func (p *Process) Log() string { return p.log.String() }

// Await polls until the condition holds. If it does not within the time, or the
// process ends before, the test fails with the end of the log.
func (p *Process) Await(what string, within time.Duration, condition func() bool) {
	p.t.Helper()
	for deadline := time.Now().Add(within); !condition(); time.Sleep(2 * time.Millisecond) {
		if !p.Alive() {
			if condition() {
				return
			}
			p.t.Fatalf("waiting until %s: %s ended: %v\n%s", what, p.cmd.Path, p.cmd.ProcessState, p.tail())
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("waiting until %s: not within %v\n%s", what, within, p.tail())
		}
	}
}

func (p *Process) tail() string {
	const most = 8 << 10
	text := p.Log()
	if len(text) > most {
		text = "…" + text[len(text)-most:]
	}
	return text
}

// log is written by the process and read by the test.
type log struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Ports that systems do not give to outgoing connections. A server that is
// stopped and started again must find its own still free.
const (
	firstPort = 12000
	lastPort  = 30000
)

// ports hands out each port once. Processes that test at the same time begin at
// different places.
var ports = struct {
	mu   sync.Mutex
	next int // guarded by mu
}{next: firstPort + rand.IntN(lastPort-firstPort)}

// RunWithBroker runs the tests of a package after it has built the command that
// they run, whose path it sets, and returns the exit status. Other users can run
// the command, too.
func RunWithBroker(m *testing.M, path *string) int {
	dir, err := os.MkdirTemp("", "broker-test")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o711); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	*path = filepath.Join(dir, "broker")
	if out, err := exec.Command("go", "build", "-o", *path, "github.com/tokenbroker/tokenbroker/cmd/broker").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building the command: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// FreeAddress is FreePort as "127.0.0.1:port".
func FreeAddress(t testing.TB) string {
	t.Helper()
	return fmt.Sprintf("127.0.0.1:%d", FreePort(t))
}

// FreePort returns a TCP port of 127.0.0.1 where nobody listens, which no
// outgoing connection will take, and which it has not returned before.
func FreePort(t testing.TB) int {
	t.Helper()
	ports.mu.Lock()
	defer ports.mu.Unlock()
	for range lastPort - firstPort {
		port := ports.next
		if ports.next++; ports.next == lastPort {
			ports.next = firstPort
		}
		// Not by listening there: a child that is started in this moment would
		// hold the port for a moment more.
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if errors.Is(err, syscall.ECONNREFUSED) {
			return port
		}
		if err == nil {
			conn.Close()
		}
	}
	t.Fatalf("somebody listens at every port between %d and %d", firstPort, lastPort)
	return 0
}
