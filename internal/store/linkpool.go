package store

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
)

const (
	// dialTimeout covers asking the Sentinels, TCP and TLS. A dial goes on when
	// the call that began it has given up, for those to come.
	dialTimeout = 400 * time.Millisecond
	// poolTimeout is the wait for a connection when all are in use.
	poolTimeout = 250 * time.Millisecond
	// poolSize is the number of connections to one node.
	poolSize = 10
	// idleTimeout is less than what load balancers forgive.
	idleTimeout = 5 * time.Minute
	// stateAge after which the slots of a Cluster are read again. The library's
	// minute would be the length of an outage.
	stateAge = time.Second
)

// pool is a client of go-redis with all its connections. It is replaced as a
// whole when what is in it should not be used any more.
type pool struct {
	single  *redis.Client        // nil in a Cluster
	cluster *redis.ClusterClient // nil elsewhere
	users   sync.WaitGroup
}

// node is one Redis server as a call sees it.
type node struct {
	*redis.Client
	// addr is empty outside a Cluster.
	addr string
	// asking: the node is taking the key over, and serves those who were sent.
	asking bool
}

// options for the connections to one node.
//
// The library retries nothing: it would do so beyond the caller's deadline and
// without telling. It needs RESP 2 only, because nothing is cached on the client
// side, and must not ask at each connection for what Redis 7.0 does not have.
func (l *link) options(addr, name string) *redis.Options {
	return &redis.Options{
		Addr:                       addr,
		Dialer:                     l.dial,
		OnConnect:                  func(ctx context.Context, conn *redis.Conn) error { return l.connected(ctx, conn, name) },
		CredentialsProviderContext: l.credentials,
		Protocol:                   2,
		MaxRetries:                 -1,
		ContextTimeoutEnabled:      true,
		DialTimeout:                dialTimeout,
		DialerRetries:              1,
		ReadTimeout:                callTimeout,
		WriteTimeout:               callTimeout,
		PoolTimeout:                poolTimeout,
		PoolSize:                   poolSize,
		PipelinePoolSize:           -1, // none of their own
		ConnMaxIdleTime:            idleTimeout,
		DisableIdentity:            true,
		MaintNotificationsConfig:   &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	}
}

func (l *link) newPool() *pool {
	if !l.o.cluster {
		// Behind Sentinel, too: dial asks for the master. The library's client
		// for Sentinel keeps a connection to one of them whose silence it does
		// not notice, and goroutines that outlive it.
		return &pool{single: redis.NewClient(l.options(l.o.addresses[0], ""))}
	}
	o := l.options("", "")
	return &pool{cluster: redis.NewClusterClient(&redis.ClusterOptions{
		Addrs:                      l.o.addresses,
		MaxRedirects:               maxRedirects,
		ClusterStateReloadInterval: stateAge,
		NewClient: func(n *redis.Options) *redis.Client {
			return redis.NewClient(l.options(n.Addr, n.Addr))
		},
		Dialer:                     o.Dialer,
		CredentialsProviderContext: o.CredentialsProviderContext,
		Protocol:                   o.Protocol,
		MaxRetries:                 o.MaxRetries,
		ContextTimeoutEnabled:      o.ContextTimeoutEnabled,
		DialTimeout:                o.DialTimeout,
		DialerRetries:              o.DialerRetries,
		ReadTimeout:                o.ReadTimeout,
		WriteTimeout:               o.WriteTimeout,
		PoolTimeout:                o.PoolTimeout,
		PoolSize:                   o.PoolSize,
		DisableIdentity:            o.DisableIdentity,
		MaintNotificationsConfig:   o.MaintNotificationsConfig,
	})}
}

// borrow returns the pool in use, or nil if the link is closed. Whoever borrows
// it tells users when it is done.
func (l *link) borrow() *pool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.pool.users.Add(1)
	return l.pool
}

// replace puts an empty pool in the place of p, unless somebody has done so.
func (l *link) replace(p *pool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.pool != p {
		return
	}
	l.pool = l.newPool()
	l.running.Go(p.close)
}

// close waits for the users.
func (p *pool) close() {
	p.users.Wait()
	if p.cluster != nil {
		_ = p.cluster.Close()
		return
	}
	_ = p.single.Close()
}

// distrust sees to it that connections which may be as bad as the one that
// failed are not used, and that the right node is looked for. A Cluster's nodes
// have a pool each, and other nodes take over.
func (l *link) distrust(p *pool) {
	if p.cluster != nil {
		p.cluster.ReloadState(l.alive) // at most every 200 ms
		return
	}
	l.replace(p)
}

// node returns the one that has key, as far as is known.
func (p *pool) node(ctx context.Context, key string) (node, error) {
	if p.cluster == nil {
		return node{Client: p.single}, nil
	}
	client, err := p.cluster.MasterForKey(ctx, key)
	if err != nil {
		return node{}, err
	}
	return node{Client: client, addr: client.Options().Addr}, nil
}

// follow lets op ask n, or whom n sends to. It returns whom op asked last.
func (p *pool) follow(ctx context.Context, n node, key string, op func(context.Context, node) error) (node, error) {
	for hops := 0; ; hops++ {
		err := op(ctx, n)
		addr, asking := redirection(err)
		if addr == "" || p.cluster == nil || hops == maxRedirects {
			return n, err
		}
		if n, err = p.at(ctx, addr, key); err != nil {
			return n, err
		}
		n.asking = asking
	}
}

// at returns the node of the Cluster with that address, or else the one that has
// key by now.
func (p *pool) at(ctx context.Context, addr, key string) (node, error) {
	var mu sync.Mutex
	var found node
	err := p.cluster.ForEachShard(ctx, func(_ context.Context, c *redis.Client) error { // reads the slots first
		if c.Options().Addr == addr {
			mu.Lock()
			defer mu.Unlock()
			found = node{Client: c, addr: addr}
		}
		return nil
	})
	if err != nil || found.Client != nil {
		return found, err
	}
	return p.node(ctx, key)
}

// redirection returns the address that a node of a Cluster names instead of
// answering; asking is for this once.
func redirection(err error) (addr string, asking bool) {
	if err == nil {
		return "", false
	}
	addr, ok := redis.IsMovedError(err)
	if !ok {
		addr, asking = redis.IsAskError(err)
	}
	if host, port, ok := cutLast(addr, ":"); ok && strings.Contains(host, ":") { // IPv6 comes without brackets
		addr = net.JoinHostPort(strings.Trim(host, "[]"), port)
	}
	return addr, asking
}

func cutLast(s, separator string) (before, after string, found bool) {
	if i := strings.LastIndex(s, separator); i >= 0 {
		return s[:i], s[i+len(separator):], true
	}
	return s, "", false
}

func (l *link) credentials(context.Context) (username, password string, err error) {
	return l.o.username, l.access.Load().Password.Reveal(), nil
}

// dial connects to a node, behind Sentinel to the master. It hands a failure over
// as a connection that fails when it is used: the library's pool counts failed
// dials, after some of them does not try again for a second at a time, and looks
// from a goroutine that outlives the pool.
func (l *link) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	conn, err := l.dialNode(ctx, network, addr)
	if err != nil {
		return stillborn{dialError{err}}, nil
	}
	return conn, nil
}

func (l *link) dialNode(ctx context.Context, network, addr string) (net.Conn, error) {
	addr, err := l.target(ctx, addr)
	if err != nil {
		return nil, err
	}
	return l.connect(ctx, network, addr)
}

// target is the address of the node to connect to.
func (l *link) target(ctx context.Context, addr string) (string, error) {
	if l.o.masterName == "" {
		return addr, nil
	}
	return l.findMaster(ctx)
}

func (l *link) connect(ctx context.Context, network, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	defer context.AfterFunc(l.alive, cancel)()
	dialer := &net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}}
	conn, err := dialer.DialContext(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	config := l.access.Load().TLS
	if config == nil {
		return conn, nil
	}
	if config.ServerName == "" {
		config = config.Clone()
		config.ServerName, _, _ = cutLast(addr, ":")
		config.ServerName = strings.Trim(config.ServerName, "[]")
	}
	secured := tls.Client(conn, config)
	if err := secured.HandshakeContext(ctx); err != nil {
		_ = conn.Close()
		if outcomeOf(err) == timeout {
			return nil, fmt.Errorf("TLS with %s: %w; it may not speak TLS", addr, err)
		}
		return nil, fmt.Errorf("TLS with %s: %w", addr, err)
	}
	return tlsConn{secured}, nil
}

// tlsConn lets the pool see that an idle connection was closed by the other side,
// which it asks of the socket.
type tlsConn struct{ *tls.Conn }

func (c tlsConn) SyscallConn() (syscall.RawConn, error) {
	conn, ok := c.NetConn().(syscall.Conn)
	if !ok {
		return nil, errors.ErrUnsupported
	}
	return conn.SyscallConn()
}

// stillborn is a connection that could not be made.
type stillborn struct{ err error }

func (c stillborn) Read([]byte) (int, error)         { return 0, c.err }
func (c stillborn) Write([]byte) (int, error)        { return 0, c.err }
func (c stillborn) Close() error                     { return nil }
func (c stillborn) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (c stillborn) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (c stillborn) SetDeadline(time.Time) error      { return nil }
func (c stillborn) SetReadDeadline(time.Time) error  { return nil }
func (c stillborn) SetWriteDeadline(time.Time) error { return nil }

// SyscallConn shows the pool that it is dead, should it have become idle.
func (c stillborn) SyscallConn() (syscall.RawConn, error) { return nil, c.err }

// dialError keeps the library from unwrapping it once, as it does with errors of
// a new connection: the address would be lost.
type dialError struct{ error }

func (e dialError) Unwrap() []error { return []error{e.error} }

// silence is for what the library would print to stderr: it is in the errors that
// it returns, too.
type silence struct{}

func (silence) Printf(context.Context, string, ...any) {}

// findMaster asks the Sentinels for the address of the master, first the one that
// answered last, until one answers. When it is another address than before, the
// connections to the old one are given up.
func (l *link) findMaster(ctx context.Context) (string, error) {
	var errs []error
	first, n := int(l.sentinel.Load()), len(l.o.addresses)
	for i := range n {
		at := (first + i) % n
		addr, err := l.askSentinel(ctx, l.o.addresses[at], n-i+1) // the master comes after them
		if err == nil {
			l.sentinel.Store(int64(at))
			l.named(addr)
			return addr, nil
		}
		errs = append(errs, err)
	}
	return "", mostUncertain(errs)
}

// askSentinel takes its share of the time that ctx has left for so many steps.
func (l *link) askSentinel(ctx context.Context, addr string, steps int) (string, error) {
	share := dialTimeout
	if deadline, ok := ctx.Deadline(); ok {
		share = time.Until(deadline)
	}
	ctx, cancel := context.WithTimeout(ctx, share/time.Duration(steps))
	defer cancel()
	sentinel := redis.NewSentinelClient(&redis.Options{
		Addr:                     addr,
		Dialer:                   l.connect,
		Protocol:                 2,
		MaxRetries:               -1,
		ContextTimeoutEnabled:    true,
		DialTimeout:              dialTimeout,
		DialerRetries:            1,
		ReadTimeout:              callTimeout,
		WriteTimeout:             callTimeout,
		DisableIdentity:          true,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	})
	defer sentinel.Close()
	master, err := sentinel.GetMasterAddrByName(ctx, l.o.masterName).Result()
	switch {
	case errors.Is(err, redis.Nil):
		return "", fmt.Errorf("asking Sentinel at %s: it knows no master %q; correct store.redis.master_name", addr, l.o.masterName)
	case answered(err): // not what it would mean from a master
		return "", fmt.Errorf("asking Sentinel at %s: %s", addr, err.Error())
	case err != nil:
		return "", fmt.Errorf("asking Sentinel at %s: %w", addr, err)
	}
	return net.JoinHostPort(master[0], master[1]), nil
}

// mostUncertain joins errs, but for those that were refused if others were not.
func mostUncertain(errs []error) error {
	var kept []error
	for _, err := range errs {
		if outcomeOf(err) != refused {
			kept = append(kept, err)
		}
	}
	if kept == nil {
		kept = errs
	}
	return joined(kept)
}

// named notes whom a Sentinel named.
func (l *link) named(master string) {
	if was := l.master.Swap(&master); was != nil && *was != master {
		l.o.log.Info("redis has another master", "was", *was, "is", master)
		l.mu.Lock()
		p := l.pool
		l.mu.Unlock()
		l.replace(p)
	}
}
