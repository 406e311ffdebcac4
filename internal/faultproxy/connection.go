package faultproxy

import (
	"bufio"
	"net"
	"sync"
	"time"
)

// connection is one client's, with the one to the server that belongs to it.
// Each direction has a goroutine that reads and judges, and one that writes
// when the time has come.
type connection struct {
	proxy          *Proxy
	client, server net.Conn
	ended          chan struct{}
	once           sync.Once

	mu         sync.Mutex // guards all below
	subscribed bool
	pending    []Command // passed on and not answered, the oldest first
}

// parcel is a piece of one direction on its way.
type parcel struct {
	due  time.Time
	data []byte
}

// queued parcels of one direction; a sender that is faster has to wait.
const queued = 1024

// run returns when the connection is over.
func (c *connection) run() {
	var directions sync.WaitGroup
	pump := func(from, to net.Conn, judge func(*bufio.Reader, chan<- parcel)) {
		queue := make(chan parcel, queued)
		directions.Go(func() {
			defer close(queue)
			judge(bufio.NewReader(from), queue)
		})
		directions.Go(func() {
			c.deliver(to, queue)
			c.end(func(conn net.Conn) { conn.Close() }) // what was sent before the end has arrived
		})
	}
	pump(c.client, c.server, c.requests)
	pump(c.server, c.client, c.replies)
	directions.Wait()
}

func (c *connection) end(closeConn func(net.Conn)) {
	c.once.Do(func() {
		close(c.ended)
		closeConn(c.client)
		closeConn(c.server)
	})
}

func (c *connection) reset() { c.end(resetConn) }

// deliver writes parcels when they are due.
func (c *connection) deliver(to net.Conn, queue <-chan parcel) {
	broken := false
	for p := range queue {
		if wait := time.Until(p.due); wait > 0 {
			timer := time.NewTimer(wait)
			select {
			case <-timer.C:
			case <-c.ended:
				timer.Stop()
				broken = true
			}
		}
		if broken {
			continue // the reader must not block
		}
		if _, err := to.Write(p.data); err != nil {
			broken = true
			c.reset()
		}
	}
}

// requests reads what the client sends, command by command.
func (c *connection) requests(r *bufio.Reader, queue chan<- parcel) {
	first, err := r.Peek(1)
	if err != nil {
		return
	}
	isRedis := first[0] == '*'
	swallowing := false
	for {
		var data []byte
		var command Command
		if isRedis {
			var words []string
			if data, words, err = readValue(r); err == nil && len(words) > 0 {
				command = newCommand(words)
			}
		} else {
			data, err = readPiece(r)
		}
		if err != nil {
			return
		}
		c.proxy.count(command)
		f, _ := c.proxy.now()
		if f.CutRequest != nil && f.CutRequest(command) {
			c.reset()
			return
		}
		c.note(command, isRedis)
		if !c.travel(queue, data, &swallowing, func(f Faults) Path { return f.Requests }) {
			return
		}
	}
}

// note keeps a command until its reply comes.
func (c *connection) note(command Command, isRedis bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case Named("subscribe", "psubscribe", "ssubscribe")(command):
		c.subscribed, c.pending = true, nil
	case c.subscribed:
	case isRedis:
		c.pending = append(c.pending, command)
	default:
		c.pending = []Command{command}
	}
}

// replies reads what the server sends, value by value.
func (c *connection) replies(r *bufio.Reader, queue chan<- parcel) {
	swallowing := false
	for {
		if _, err := r.Peek(1); err != nil {
			return
		}
		command, known := c.answered()
		f, _ := c.proxy.now()
		if known && f.CutReply != nil && f.CutReply(command) {
			c.reset()
			return
		}
		var data []byte
		var words []string
		var err error
		if known && command.Name == "" {
			data, err = readPiece(r)
		} else {
			data, words, err = readValue(r)
		}
		if err != nil {
			return
		}
		if known && f.CutMidReply != nil && f.CutMidReply(command) {
			_, _ = c.client.Write(data[:len(data)/2]) // it is cut anyway
			c.end(func(conn net.Conn) { conn.Close() })
			return
		}
		if f, _ := c.proxy.now(); f.DropMessages && !known && isMessage(words) {
			continue
		}
		if !c.travel(queue, data, &swallowing, func(f Faults) Path { return f.Replies }) {
			return
		}
	}
}

// answered returns the command that the next reply belongs to. On a connection
// that subscribes none is known: what comes there may be a message.
func (c *connection) answered() (Command, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.pending) == 0 {
		return Command{}, false
	}
	command := c.pending[0]
	if command.Name != "" {
		c.pending = c.pending[1:]
	}
	return command, true
}

// travel sends a piece on its way, as the faults have it. It returns false when
// the connection is over. Swallowing is for good.
func (c *connection) travel(queue chan<- parcel, data []byte, swallowing *bool, path func(Faults) Path) bool {
	for {
		f, changed := c.proxy.now()
		way := Path{}
		if c.is(f.On) {
			way = path(f)
		}
		if *swallowing = *swallowing || way.Swallow; *swallowing {
			return true
		}
		if !way.Hold {
			select {
			case queue <- parcel{time.Now().Add(way.Delay), data}:
				return true
			case <-c.ended:
				return false
			}
		}
		select {
		case <-changed:
		case <-c.ended:
			return false
		}
	}
}

func (c *connection) is(kind Kind) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return kind == AnyConnection || c.subscribed == (kind == SubscribedConnections)
}
