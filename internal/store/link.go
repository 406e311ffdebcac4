package store

import (
	"context"
	"crypto/sha1"
	"crypto/tls"
	"encoding/hex"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Access is what may change while a store is in use: secrets are rotated, and
// the files that hold them are read again.
type Access struct {
	// Password of the Redis user; empty where none is needed.
	Password broker.Secret
	// TLS to the nodes of Redis and to its Sentinels; nil for none. Without a
	// ServerName each certificate must name the host that was dialed.
	TLS *tls.Config
	// Keyset seals what is secret before it leaves for Redis.
	Keyset *Keyset
}

const (
	// callTimeout bounds what is asked of Redis, all tries included: two calls
	// fit between two renewals of a lease.
	callTimeout = 500 * time.Millisecond
	// acknowledgeTimeout is how long replicas have to acknowledge a write, and
	// acknowledgeSpare what asking them takes beside that.
	acknowledgeTimeout = 250 * time.Millisecond
	acknowledgeSpare   = 150 * time.Millisecond
	// maxCalls under way at once. The rest wait, so that a crowd cannot take
	// every connection from those that renew a lease.
	maxCalls = 64
	// maxTries of one call. A script answers a second execution as the first.
	maxTries = 2
	// maxRedirects that one try follows in a Cluster.
	maxRedirects = 3
	// maxPipelined commands in one go.
	maxPipelined = 500
)

// eventChannel carries what all replicas should hear.
const eventChannel = "tb1:events"

// linkOptions say where Redis is, and whom to tell. All functions and the log
// must be set. The functions are called from goroutines of the link; they should
// return soon, and must not close it.
type linkOptions struct {
	// addresses of the one node, or of the Sentinels if masterName is set, or
	// of some nodes of the Cluster.
	addresses  []string
	masterName string
	cluster    bool
	username   string
	log        *slog.Logger

	// heard gets each message of the event channel, in order.
	heard func(message string)
	// resync is called when messages may have been missed: after each
	// subscription, the first included, and after a flood of messages.
	resync func()
	// incarnation is called when Redis may have lost what it acknowledged: it
	// was restarted, a replica was promoted, or its clock jumped. In the first
	// two cases it returns before anything else is asked of that Redis.
	incarnation func()
}

// link is the way to Redis: to one node, to the master that Sentinels name, or to
// a Cluster. It answers within callTimeout whatever Redis does, and at once while
// Redis is known to be out of reach. Its errors are a *linkError each.
//
// An error does not mean that nothing happened. A call whose answer got lost is
// sent once more, and one that was given up may still be executed: what it runs
// must be such that this does no harm.
type link struct {
	o     linkOptions
	began time.Time

	// alive ends with close, and with it all dials and loops.
	alive context.Context
	end   context.CancelFunc

	access atomic.Pointer[Access]
	under  chan struct{} // holds an element for each call under way
	beats  *beats
	inbox  chan string   // messages on their way to o.heard
	missed chan struct{} // holds an element when o.resync is due

	// master that a Sentinel named last, and the index of that Sentinel.
	master   atomic.Pointer[string]
	sentinel atomic.Int64

	tally      tally
	known      acquaintances
	complaints sync.Map // texts that were logged

	mu       sync.Mutex
	pool     *pool
	breakers map[string]*breaker // by the address of the node
	closed   bool
	// running counts all goroutines. None is added once closed.
	running sync.WaitGroup
}

// newLink returns at once. Redis need not be there yet.
func newLink(o linkOptions, a Access) *link {
	redis.SetLogger(silence{})
	l := &link{
		o:        o,
		began:    time.Now(),
		under:    make(chan struct{}, maxCalls),
		beats:    newBeats(),
		inbox:    make(chan string, inboxSize),
		missed:   make(chan struct{}, 1),
		breakers: make(map[string]*breaker),
	}
	l.alive, l.end = context.WithCancel(context.Background())
	l.access.Store(&a)
	l.pool = l.newPool()
	l.start(l.subscribe)
	l.start(l.beat)
	l.start(l.deliver)
	return l
}

// use lets new connections have a. Idle ones are closed at once, those in use
// after the calls under way; the subscription stays as it is.
func (l *link) use(a Access) {
	l.access.Store(&a)
	l.mu.Lock()
	p := l.pool
	l.mu.Unlock()
	l.replace(p)
}

// close waits for the calls under way and ends everything else.
func (l *link) close() {
	l.mu.Lock()
	closed, p := l.closed, l.pool
	l.closed = true
	l.mu.Unlock()
	if !closed {
		l.end()
		p.close()
	}
	l.running.Wait()
}

// start runs f, which returns when alive ends, unless the link is closed.
func (l *link) start(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		l.running.Go(f)
	}
}

// script is a Lua script that touches one key. Its reply is an array that begins
// with a code and the time of Redis in milliseconds.
type script struct{ name, source, digest string }

func newScript(name, source string) *script {
	digest := sha1.Sum([]byte(source)) // what Redis calls it
	return &script{name: name, source: source, digest: hex.EncodeToString(digest[:])}
}

// run runs s at the node that has key.
func (l *link) run(ctx context.Context, s *script, key string, args ...any) (reply []any, err error) {
	err = l.call(ctx, s.name, key, writing, func(ctx context.Context, n node) error {
		conn := n.Conn()
		defer conn.Close()
		var err error
		reply, err = l.evaluate(ctx, n, conn, s, key, args)
		return err
	})
	return reply, err
}

// runDurably is run, and then tells whether a replica has what s wrote. Where no
// replica is in step there is nobody to ask, and the write counts as confirmed.
func (l *link) runDurably(ctx context.Context, s *script, key string, args ...any) (reply []any, confirmed bool, err error) {
	err = l.call(ctx, s.name, key, writing, func(within context.Context, n node) error {
		conn := n.Conn() // WAIT asks about what its own connection wrote
		defer conn.Close()
		var err error
		if reply, err = l.evaluate(within, n, conn, s, key, args); err == nil {
			confirmed = l.acknowledged(ctx, conn)
		}
		return err
	})
	return reply, confirmed, err
}

func (l *link) evaluate(ctx context.Context, n node, conn *redis.Conn, s *script, key string, args []any) ([]any, error) {
	sent := time.Now()
	reply, err := l.do(ctx, n, conn, append([]any{"EVALSHA", s.digest, 1, key}, args...)...)
	if redis.HasErrorPrefix(err, "NOSCRIPT") {
		reply, err = l.do(ctx, n, conn, append([]any{"EVAL", s.source, 1, key}, args...)...)
	}
	if err == nil && len(reply) > 1 {
		if now, ok := reply[1].(int64); ok {
			l.observe(n.addr, time.UnixMilli(now), sent)
		}
	}
	return reply, err
}

// acknowledged reports whether a replica has what was written over conn.
func (l *link) acknowledged(ctx context.Context, conn *redis.Conn) bool {
	ctx, cancel := context.WithTimeout(ctx, acknowledgeTimeout+acknowledgeSpare)
	defer cancel()
	replication, err := conn.Info(ctx, "replication").Result()
	if err != nil && !answered(err) {
		return false
	}
	if err != nil {
		l.complain("replicas of redis cannot be counted: its user needs the permission for INFO; writes that none acknowledges count as durable", err)
	}
	inStep := strings.Contains(replication, ",state=online,")
	if err == nil && !inStep {
		return true
	}
	count, err := conn.Wait(ctx, 1, acknowledgeTimeout).Result()
	if answered(err) {
		l.complain("replicas of redis cannot be waited for: its user needs the permission for WAIT; no write counts as durable while there are some", err)
	}
	return count > 0 || !inStep && (err == nil || answered(err))
}

// headers reads some fields of many hashes. The result has an element for each
// key, with a string or nil for each field. It is nil where the key holds
// something else, or could not be read: the error says why, and does not spoil
// the rest.
func (l *link) headers(ctx context.Context, keys []string, fields ...string) ([][]any, error) {
	found := make([][]any, len(keys))
	var errs joined
	for _, share := range l.shares(ctx, keys) {
		if err := l.readShare(ctx, keys, share, fields, found); err != nil {
			errs = append(errs, err)
		}
	}
	if errs != nil {
		return found, errs
	}
	return found, nil
}

// shares divides keys, by their indices, so that one node has all of a share.
func (l *link) shares(ctx context.Context, keys []string) [][]int {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	p := l.borrow()
	if p != nil {
		defer p.users.Done()
	}
	nodes := make(map[string][]int)
	for i, key := range keys {
		var n node
		if p != nil {
			n, _ = p.node(ctx, key) // whoever reads the share meets the error again
		}
		nodes[n.addr] = append(nodes[n.addr], i)
	}
	var shares [][]int
	for _, all := range nodes {
		shares = slices.AppendSeq(shares, slices.Chunk(all, maxPipelined))
	}
	return shares
}

func (l *link) readShare(ctx context.Context, keys []string, share []int, fields []string, found [][]any) error {
	read := func(key string) []any {
		args := []any{"HMGET", key}
		for _, f := range fields {
			args = append(args, f)
		}
		return args
	}
	var moved []int
	err := l.call(ctx, "headers", keys[share[0]], reading, func(ctx context.Context, n node) error {
		moved = nil
		pipe := n.Pipeline()
		for _, i := range share {
			_ = pipe.Process(ctx, redis.NewSliceCmd(ctx, read(keys[i])...)) // queues it
		}
		replies, failed := pipe.Exec(ctx)
		for j, reply := range replies {
			values, err := reply.(*redis.SliceCmd).Result()
			if err == nil && values == nil { // it was not even sent
				err = failed
			}
			found[share[j]] = values
			if addr, _ := redirection(err); addr != "" {
				moved = append(moved, share[j])
			} else if err != nil && !isForeign(err) {
				return err
			}
		}
		return nil
	})
	for _, i := range moved {
		if err != nil {
			break
		}
		err = l.call(ctx, "headers", keys[i], reading, func(ctx context.Context, n node) error {
			conn := n.Conn()
			defer conn.Close()
			values, err := l.do(ctx, n, conn, read(keys[i])...)
			found[i] = values
			if isForeign(err) {
				return nil
			}
			return err
		})
	}
	return err
}

// isForeign reports whether a key holds something else than a hash.
func isForeign(err error) bool { return redis.HasErrorPrefix(err, "WRONGTYPE") }

// publish sends a message to whoever listens to the event channel just now.
func (l *link) publish(ctx context.Context, message string) error {
	return l.call(ctx, "publish", l.anyKey(), reading, func(ctx context.Context, n node) error {
		return n.Publish(ctx, eventChannel, message).Err()
	})
}

// anyKey is a key at one of the nodes, as chance has it.
func (l *link) anyKey() string {
	return "tb1:{" + strconv.FormatUint(rand.Uint64(), 36) + "}"
}

// call lets op ask the node that has key, in a context with a deadline. What
// names the call in errors and counters. Op may run twice: the second time after
// the connection broke, over another.
func (l *link) call(ctx context.Context, what, key string, needs ability, op func(context.Context, node) error) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err := l.try(ctx, what, key, needs, op)
	l.tally.count(what, err)
	if err != nil {
		return err // not a nil *linkError
	}
	return nil
}

// ability is what a node must be able to for a call to succeed.
type ability int

const (
	reading ability = iota // or publishing: a replica can
	writing
)

func (l *link) try(ctx context.Context, what, key string, needs ability, op func(context.Context, node) error) *linkError {
	if err := ctx.Err(); err != nil {
		return l.failure(what, "", err)
	}
	select {
	case l.under <- struct{}{}:
		defer func() { <-l.under }()
	case <-ctx.Done():
		return l.failure(what, "", errCrowded)
	}
	failed := l.tryOnce(ctx, what, key, needs, op)
	for tries := 1; failed != nil && failed.outcome == broken && tries < maxTries && ctx.Err() == nil; tries++ {
		l.tally.add(func(s *linkStats) { s.retries++ })
		failed = l.tryOnce(ctx, what, key, needs, op)
		if failed != nil {
			failed.perhapsDone = true
		}
	}
	return failed
}

// tryOnce asks once, and keeps account of which nodes are in reach.
func (l *link) tryOnce(ctx context.Context, what, key string, needs ability, op func(context.Context, node) error) *linkError {
	p := l.borrow()
	if p == nil {
		return l.failure(what, "", errClosed)
	}
	defer p.users.Done()
	if last := l.outOfReach(""); last != nil {
		return last.untried(what)
	}
	begun := time.Now()
	n, err := p.node(ctx, key)
	if err == nil {
		if last := l.outOfReach(n.addr); last != nil {
			return last.untried(what)
		}
		n, err = p.follow(ctx, n, key, op)
	}
	if err == nil {
		l.reached(n.addr, needs)
		return nil
	}
	failed := l.failure(what, n.addr, err)
	// Nothing can be learned from a caller that had hardly any time left.
	if failed.outcome != timeout || time.Since(begun) > callTimeout/2 {
		l.judge(p, n.addr, key, needs, failed)
	}
	return failed
}

// complain logs what lasts until somebody mends it, once.
func (l *link) complain(text string, err error) {
	if _, again := l.complaints.LoadOrStore(text, true); !again {
		l.o.log.Warn(text, "error", err)
	}
}
