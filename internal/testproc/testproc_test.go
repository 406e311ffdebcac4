package testproc_test

import (
	"net"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/testproc"
)

const soon = 10 * time.Second

// ticking is a process that writes for ever.
func ticking(t *testing.T) *testproc.Process {
	t.Helper()
	return testproc.Start(t, exec.Command("sh", "-c", "while :; do echo tick; sleep 0.01; done"))
}

func TestProcessIsPausedAndContinuedAndKilled(t *testing.T) {
	t.Parallel()
	p := ticking(t)
	ticks := func() int { return strings.Count(p.Log(), "tick") }
	p.Await("it writes", soon, func() bool { return ticks() > 0 })
	p.Pause()
	var before int
	p.Await("what was written has arrived", soon, func() bool {
		before = ticks()
		time.Sleep(50 * time.Millisecond)
		return ticks() == before
	})
	p.Continue()
	p.Await("it writes again", soon, func() bool { return ticks() > before })
	p.Pause()
	p.Kill()
	p.Kill()
	if p.Alive() || p.ExitCode() != -1 {
		t.Errorf("alive: %v, exit status %d", p.Alive(), p.ExitCode())
	}
}

func TestProcessThatEndsTellsHow(t *testing.T) {
	t.Parallel()
	p := testproc.Start(t, exec.Command("sh", "-c", "trap 'echo asked >&2; exit 7' TERM; echo ready; while :; do sleep 0.01; done"))
	p.Await("it is ready", soon, func() bool { return strings.Contains(p.Log(), "ready") })
	p.Signal(syscall.SIGTERM)
	<-p.Exited()
	if p.ExitCode() != 7 || !strings.Contains(p.Log(), "asked") {
		t.Errorf("exit status %d, log %q", p.ExitCode(), p.Log())
	}
	p.Signal(syscall.SIGTERM) // to nobody
}

func TestNobodyListensAtAFreePort(t *testing.T) {
	t.Parallel()
	address := testproc.FreeAddress(t)
	if conn, err := net.Dial("tcp", address); err == nil {
		conn.Close()
		t.Errorf("somebody listens at %s", address)
	}
	ln, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
}
