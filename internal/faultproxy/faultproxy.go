// Package faultproxy stands between a client and a server and lets the network
// between them fail on demand: refuse, hang, lose, delay, cut.
//
// It passes on any protocol. Of Redis it understands enough to fail where it
// hurts: to lose the reply to a command that was executed, or only the messages
// of a subscription, or only the connections that subscribe. [Faults] says what
// is wrong with the network; it can change at any time, and the zero Faults are
// a healthy network.
package faultproxy

import (
	"maps"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/testproc"
)

const (
	dialTimeout   = 5 * time.Second // to the server behind
	listenTimeout = 2 * time.Second // until the address is free
)

// Faults are what is wrong with the network.
type Faults struct {
	// Refuse: nobody listens at the address, and open connections are reset.
	Refuse bool

	// On narrows Requests and Replies to some connections.
	On Kind
	// Requests is what happens to bytes on their way to the server, Replies on
	// the way back.
	Requests, Replies Path

	// CutRequest resets the connection instead of passing on a command that it
	// fits: the command failed.
	CutRequest func(Command) bool
	// CutReply resets the connection when the reply to a command that it fits
	// begins: the command was executed, and the client does not know.
	CutReply func(Command) bool
	// CutMidReply is CutReply after half of the reply was passed on.
	CutMidReply func(Command) bool

	// DropMessages loses what is published, and nothing else on the connections
	// that subscribe.
	DropMessages bool
}

// Path is what happens to bytes in one direction.
type Path struct {
	// Delay them.
	Delay time.Duration
	// Hold them until the faults change: then they arrive late, as after a
	// short partition.
	Hold bool
	// Swallow them. The connection stays open and is dead in this direction for
	// good, whatever comes, as when a firewall has forgotten it.
	Swallow bool
}

// Kind tells connections apart.
type Kind int

const (
	// AnyConnection is every one.
	AnyConnection Kind = iota
	// CommandConnections are those that have not subscribed.
	CommandConnections
	// SubscribedConnections are those that have, from that command on.
	SubscribedConnections
)

// Command is a request that a client made. Of a protocol that is not Redis's
// every piece is one, without a name.
type Command struct {
	Name string // in lower case
	Args []string
}

// Named fits commands with one of the names.
func Named(names ...string) func(Command) bool {
	return func(c Command) bool {
		for _, name := range names {
			if strings.EqualFold(c.Name, name) {
				return true
			}
		}
		return false
	}
}

// Once fits the first command that fits, and none after it.
func Once(fits func(Command) bool) func(Command) bool { return Times(1, fits) }

// Times fits the first n commands that fit.
func Times(n int, fits func(Command) bool) func(Command) bool {
	var mu sync.Mutex // guards n
	return func(c Command) bool {
		mu.Lock()
		defer mu.Unlock()
		if n == 0 || !fits(c) {
			return false
		}
		n--
		return true
	}
}

// Proxy listens at an address of its own and connects to one server. Its
// methods may be called from any goroutine.
type Proxy struct {
	t       testing.TB
	address string
	target  string
	running sync.WaitGroup // all goroutines

	mu       sync.Mutex // guards all below
	faults   Faults
	changed  chan struct{} // closed when the faults change
	listener net.Listener  // nil while refusing and after Close
	open     map[*connection]bool
	accepted int
	commands map[string]int
	closed   bool
}

// New starts a proxy for the server at target, "host:port", until the test
// ends. Nothing needs to listen there yet.
func New(t testing.TB, target string) *Proxy {
	t.Helper()
	p := &Proxy{
		t: t, target: target, address: testproc.FreeAddress(t),
		changed: make(chan struct{}), open: map[*connection]bool{}, commands: map[string]int{},
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.listen(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// Address is where clients connect: the same over the proxy's whole life.
func (p *Proxy) Address() string { return p.address }

// Set puts these faults in the place of all before.
func (p *Proxy) Set(f Faults) {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	p.faults = f
	close(p.changed)
	p.changed = make(chan struct{})
	switch {
	case f.Refuse:
		p.hangUp()
		p.reset()
	case p.listener == nil:
		if err := p.listen(); err != nil {
			p.t.Errorf("the proxy cannot listen again: %v", err)
		}
	}
}

// Heal is Set with no faults.
func (p *Proxy) Heal() {
	p.t.Helper()
	p.Set(Faults{})
}

// Reset resets all open connections. New ones are welcome.
func (p *Proxy) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reset()
}

// Commands returns how often each command came, by its name in lower case,
// whatever became of it.
func (p *Proxy) Commands() map[string]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.commands)
}

// Connections returns how many are open now, and how many ever were.
func (p *Proxy) Connections() (open, ever int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.open), p.accepted
}

// Close stops listening, closes every connection and waits for all that it
// started. It may be called twice.
func (p *Proxy) Close() {
	p.mu.Lock()
	p.closed = true
	p.hangUp()
	p.reset()
	p.mu.Unlock()
	p.running.Wait()
}

// listen needs p.mu. A child that was started while the port was listened at
// before may hold it for a moment more.
func (p *Proxy) listen() error {
	ln, err := net.Listen("tcp", p.address)
	for end := time.Now().Add(listenTimeout); err != nil; ln, err = net.Listen("tcp", p.address) {
		if time.Now().After(end) {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	p.listener = ln
	p.running.Go(func() {
		for {
			client, err := ln.Accept()
			if err != nil {
				return // closed
			}
			p.running.Go(func() { p.serve(client) })
		}
	})
	return nil
}

// hangUp needs p.mu.
func (p *Proxy) hangUp() {
	if p.listener != nil {
		p.listener.Close()
		p.listener = nil
	}
}

// reset needs p.mu.
func (p *Proxy) reset() {
	for c := range p.open {
		c.reset()
	}
}

// now returns the faults, and a channel that is closed when they change.
func (p *Proxy) now() (Faults, <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.faults, p.changed
}

func (p *Proxy) count(c Command) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.commands[c.Name]++
}

// serve connects a client with the server until one of them leaves. A server
// that is not there shows as a reset connection.
func (p *Proxy) serve(client net.Conn) {
	c := &connection{proxy: p, client: client, ended: make(chan struct{})}
	var err error
	if c.server, err = net.DialTimeout("tcp", p.target, dialTimeout); err != nil {
		resetConn(client)
		return
	}
	p.mu.Lock()
	if p.closed || p.faults.Refuse {
		p.mu.Unlock()
		c.reset()
		return
	}
	p.open[c] = true
	p.accepted++
	p.mu.Unlock()

	c.run()

	p.mu.Lock()
	delete(p.open, c)
	p.mu.Unlock()
}

// resetConn closes a connection with RST, so that the other side does not
// take it for an orderly end.
func resetConn(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // closing is what counts
	}
	conn.Close()
}
