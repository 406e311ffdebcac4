package admission_test

import (
	"errors"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/admission"
)

// hall is a limited listener whose connections are taken, and left open.
type hall struct {
	*admission.Listener
	t        *testing.T
	accepted chan *admission.Conn
	refused  atomic.Int64
}

func newHall(t *testing.T, most int) *hall {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &hall{t: t, accepted: make(chan *admission.Conn, 100)}
	h.Listener = admission.Limit(ln, most, func() { h.refused.Add(1) })
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := h.Accept()
			if err != nil {
				if !errors.Is(err, net.ErrClosed) {
					t.Errorf("accepting: %v", err)
				}
				return
			}
			h.accepted <- conn.(*admission.Conn)
		}
	}()
	t.Cleanup(func() {
		h.Close()
		<-ended
	})
	return h
}

func (h *hall) dial() net.Conn {
	h.t.Helper()
	c, err := net.Dial("tcp", h.Addr().String())
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { c.Close() })
	return c
}

// closed waits until the other side has closed the connection.
func closed(t *testing.T, c net.Conn) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	var timeout net.Error
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.As(err, &timeout) && timeout.Timeout() {
		t.Fatalf("the connection is open: %v", err)
	}
}

// answers checks that the connection is open.
func answers(t *testing.T, server, client net.Conn) {
	t.Helper()
	if _, err := server.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(client, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
}

func TestListenerRefusesWhatIsBeyondItsLimit(t *testing.T) {
	h := newHall(t, 2)
	first, second := h.dial(), h.dial()
	a, b := <-h.accepted, <-h.accepted
	a.Proven()
	b.Proven()
	closed(t, h.dial())
	if h.refused.Load() != 1 || h.Open() != 2 {
		t.Errorf("%d refused, %d open", h.refused.Load(), h.Open())
	}
	answers(t, a, first)
	answers(t, b, second)

	a.Close()
	a.Close() // counts once
	if h.Open() != 1 {
		t.Errorf("%d are open, want 1", h.Open())
	}
	third := h.dial()
	answers(t, <-h.accepted, third)
}

func TestOldestStrangerMakesRoom(t *testing.T) {
	h := newHall(t, 3)
	known := h.dial()
	k := <-h.accepted
	k.Proven()
	k.Proven() // again is no harm
	older := h.dial()
	<-h.accepted
	younger := h.dial()
	y := <-h.accepted
	newest := h.dial()
	n := <-h.accepted
	closed(t, older)
	answers(t, k, known)
	answers(t, y, younger)
	answers(t, n, newest)
	if h.Open() != 3 || h.refused.Load() != 1 {
		t.Errorf("%d open, %d closed", h.Open(), h.refused.Load())
	}
}

func TestLowerLimitHoldsForConnectionsToCome(t *testing.T) {
	h := newHall(t, 2)
	first, second := h.dial(), h.dial()
	a, b := <-h.accepted, <-h.accepted
	a.Proven()
	b.Proven()
	h.SetMost(1)
	answers(t, a, first)
	answers(t, b, second)
	closed(t, h.dial())
	h.SetMost(3)
	third := h.dial()
	answers(t, <-h.accepted, third)
}

func TestKernelCanBeAsked(t *testing.T) {
	h := newHall(t, 1)
	h.dial()
	raw, err := (<-h.accepted).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	asked := false
	if err := raw.Control(func(uintptr) { asked = true }); err != nil || !asked {
		t.Errorf("asking: %v", err)
	}
}
