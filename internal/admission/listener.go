package admission

import (
	"container/list"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
)

// Listener bounds the connections that are open. Beyond its limit the one that
// has been open for longest without having proven itself makes room for the new
// one: who only ever connects keeps nobody out. If all have proven themselves,
// the new one is closed at once. Accept never waits for room.
type Listener struct {
	net.Listener
	most    atomic.Int64
	refused func()

	mu   sync.Mutex
	open int
	// strangers are those that have not proven themselves, the oldest first.
	strangers list.List // of *Conn
}

// Limit returns a Listener for at most so many connections. It calls refused for
// each that it closes itself; nil is nobody.
func Limit(ln net.Listener, most int, refused func()) *Listener {
	if refused == nil {
		refused = func() {}
	}
	l := &Listener{Listener: ln, refused: refused}
	l.SetMost(most)
	return l
}

// SetMost changes the limit. Connections beyond a lower one stay open.
func (l *Listener) SetMost(most int) { l.most.Store(int64(most)) }

// Open returns how many connections are open.
func (l *Listener) Open() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.open
}

// Accept implements net.Listener. Connections are of type *Conn.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		raw, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if c := l.admit(raw); c != nil {
			return c, nil
		}
		l.refused()
		raw.Close()
	}
}

// admit returns nil if there is no room.
func (l *Listener) admit(raw net.Conn) *Conn {
	for {
		l.mu.Lock()
		if l.open < int(l.most.Load()) {
			c := &Conn{Conn: raw, listener: l}
			l.open++
			c.stranger = l.strangers.PushBack(c)
			l.mu.Unlock()
			return c
		}
		oldest := l.strangers.Front()
		l.mu.Unlock()
		if oldest == nil {
			return nil
		}
		l.refused()
		oldest.Value.(*Conn).Close()
	}
}

// Conn is a connection that a Listener has accepted.
type Conn struct {
	net.Conn
	listener *Listener

	// Both belong to the listener's mutex.
	stranger *list.Element // nil once the other side has proven itself
	closed   bool
}

// Proven says that the other side has proven who it is: the connection does not
// make room for others any more.
func (c *Conn) Proven() {
	c.listener.mu.Lock()
	defer c.listener.mu.Unlock()
	c.forget()
}

// Close implements net.Conn.
func (c *Conn) Close() error {
	c.listener.mu.Lock()
	if !c.closed {
		c.closed = true
		c.listener.open--
		c.forget()
	}
	c.listener.mu.Unlock()
	return c.Conn.Close()
}

func (c *Conn) forget() {
	if c.stranger != nil {
		c.listener.strangers.Remove(c.stranger)
		c.stranger = nil
	}
}

// SyscallConn implements syscall.Conn, for whoever asks the kernel about the
// other side.
func (c *Conn) SyscallConn() (syscall.RawConn, error) {
	if s, ok := c.Conn.(syscall.Conn); ok {
		return s.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}
