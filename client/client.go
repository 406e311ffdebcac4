package client

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	"github.com/tokenbroker/tokenbroker/clients"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// DefaultAddress is where a broker is looked for when nobody says where it is.
const DefaultAddress = "127.0.0.1:7443"

const (
	// A stream is silent for hours. Its connection is asked for a sign of life, so
	// that one that has died is noticed within 40 seconds; the broker tolerates a
	// question each 10 seconds, and grpc-go asks no more often than that.
	pingAfter   = 30 * time.Second
	pingTimeout = 10 * time.Second
	// connectTimeout is for a connection with its handshake.
	connectTimeout = 10 * time.Second
)

// settings are what options change.
type settings struct {
	address   string
	files     files
	tokenFile string
	userAgent string
	dial      []grpc.DialOption
}

// An Option says something about a Client that the environment should not.
type Option func(*settings)

// WithAddress says where the broker is: host:port, or unix:/path. Without it that is
// $BROKER_ADDRESS, and without that DefaultAddress. A name with several addresses is
// balanced over all of them.
func WithAddress(address string) Option { return func(s *settings) { s.address = address } }

// WithCA names the PEM file of the authorities that the broker's certificate is
// checked against. Without it that is $BROKER_CA; empty means the system's.
func WithCA(file string) Option { return func(s *settings) { s.files.ca = file } }

// WithCertificate names the PEM files of the client certificate and its private key,
// which go together. Without it they are $BROKER_CERTIFICATE and
// $BROKER_PRIVATE_KEY; empty means none.
func WithCertificate(certificate, privateKey string) Option {
	return func(s *settings) { s.files.certificate, s.files.privateKey = certificate, privateKey }
}

// WithTokenFile names a file with a bearer token that says who calls, such as a
// Kubernetes service account token. It is read for each call. Without it that is
// $BROKER_TOKEN_FILE; empty means none.
func WithTokenFile(file string) Option { return func(s *settings) { s.tokenFile = file } }

// WithUserAgent says which program calls, for the broker's log: "name/version".
func WithUserAgent(name string) Option { return func(s *settings) { s.userAgent = name } }

// WithDialOptions adds to how the connection is made, for interceptors, another
// authority (grpc.WithAuthority) and the like. They come after the package's own.
func WithDialOptions(options ...grpc.DialOption) Option {
	return func(s *settings) { s.dial = append(s.dial, options...) }
}

// Client is a connection to a broker, and the token sources that use it. Its methods
// may be called by any number of goroutines.
type Client struct {
	conn *grpc.ClientConn
	stub pb.TokenBrokerClient
	ctx  context.Context // ends with Close, and so does all that runs
	stop context.CancelFunc
	runs sync.WaitGroup // goroutines; grown with mu held, while not closed

	mu      sync.Mutex
	closed  bool                 // guarded by mu
	sources map[string]*follower // guarded by mu; by what they follow
}

// New returns a client. It connects with the first call, so the broker need not be
// there yet, but the files must be: one that cannot be used is a *FileError.
//
// A connection to this machine (a loopback address, localhost, a unix socket) is
// plain when there is neither a CA nor a certificate. Every other one is TLS.
func New(options ...Option) (*Client, error) {
	s := settings{
		address: DefaultAddress,
		files: files{
			ca: os.Getenv("BROKER_CA"), certificate: os.Getenv("BROKER_CERTIFICATE"), privateKey: os.Getenv("BROKER_PRIVATE_KEY"),
		},
		tokenFile: os.Getenv("BROKER_TOKEN_FILE"),
		userAgent: "token-broker-go",
	}
	if address, ok := os.LookupEnv("BROKER_ADDRESS"); ok {
		s.address = address
	}
	for _, o := range options {
		o(&s)
	}
	dial, err := s.dialOptions()
	if err != nil {
		return nil, err
	}
	target := s.address
	if !strings.HasPrefix(target, "unix:") {
		target = "dns:///" + target
	}
	conn, err := grpc.NewClient(target, dial...)
	if err != nil {
		return nil, fmt.Errorf("address %q: %w", s.address, err)
	}
	c := &Client{conn: conn, stub: pb.NewTokenBrokerClient(conn), sources: map[string]*follower{}}
	c.ctx, c.stop = context.WithCancel(context.Background())
	return c, nil
}

func (s *settings) dialOptions() ([]grpc.DialOption, error) {
	local := isLocal(s.address)
	creds := insecure.NewCredentials()
	if !local || s.files.given() {
		if err := s.files.load(); err != nil {
			return nil, err
		}
		creds = handshakes{&s.files}
	}
	dial := []grpc.DialOption{
		grpc.WithTransportCredentials(creds),
		grpc.WithNoProxy(),
		grpc.WithUserAgent(s.userAgent),
		grpc.WithDefaultServiceConfig(clients.ServiceConfig),
		grpc.WithDisableServiceConfig(), // what DNS might say
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingAfter, Timeout: pingTimeout}),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: firstWait, Multiplier: 2, Jitter: 0.5, MaxDelay: longestWait},
			MinConnectTimeout: connectTimeout,
		}),
	}
	if s.tokenFile != "" {
		token := tokenFile{path: s.tokenFile, secure: !local}
		if _, err := token.read(); err != nil {
			return nil, err
		}
		dial = append(dial, grpc.WithPerRPCCredentials(token))
	}
	return append(dial, s.dial...), nil
}

// isLocal reports whether an address is on this machine for certain.
func isLocal(address string) bool {
	if strings.HasPrefix(address, "unix:") {
		return true
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return strings.EqualFold(host, "localhost") || err == nil && ip.Unmap().IsLoopback()
}

// Stub has the methods of the service as they are, for what sources do not do. Their
// errors are plain gRPC statuses; see FromError.
func (c *Client) Stub() pb.TokenBrokerClient { return c.stub }

// Conn is the connection, for other services of the broker. It is closed with the
// client.
func (c *Client) Conn() grpc.ClientConnInterface { return c.conn }

// TokenSource returns a source of tokens of a profile. It calls nobody before it is
// asked for a token. Sources of one client that ask for the same share one stream.
func (c *Client) TokenSource(profile string, options ...TokenOption) *TokenSource {
	d := demand{profile: profile}
	for _, o := range options {
		o(&d)
	}
	d.normalize()
	c.mu.Lock()
	defer c.mu.Unlock()
	key := d.key()
	f := c.sources[key]
	if f == nil {
		f = newFollower(c, d)
		if c.closed {
			f.end()
		} else {
			c.sources[key] = f
		}
	}
	f.users++
	return &TokenSource{f: f}
}

// leave takes a user from a source, which ends with the last one.
func (c *Client) leave(f *follower) {
	c.mu.Lock()
	f.users--
	last := f.users == 0 && !c.closed
	if last {
		delete(c.sources, f.demand.key())
	}
	c.mu.Unlock()
	if last {
		f.end()
	}
}

// run runs f in a goroutine that Close waits for, unless the client is closed
// already.
func (c *Client) run(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.runs.Go(f)
	}
}

// Close ends all sources, and calls that are under way, and returns when nothing of
// the client runs any more. Whoever waits for a token gets ErrClosed.
func (c *Client) Close() error {
	c.mu.Lock()
	was := c.closed
	c.closed = true
	sources := c.sources
	c.sources = nil
	c.mu.Unlock()
	if was {
		c.runs.Wait()
		return nil
	}
	for _, f := range sources {
		f.end()
	}
	c.stop()
	c.runs.Wait()
	if err := c.conn.Close(); err != nil {
		return fmt.Errorf("closing the connection to the broker: %w", err)
	}
	return nil
}

// String names the client's target, and none of its secrets.
func (c *Client) String() string { return "client of the broker at " + c.conn.Target() }

// GoString is String: %#v shows no more.
func (c *Client) GoString() string { return c.String() }

// ErrClosed is the cause of errors after Close.
var ErrClosed = fmt.Errorf("the client, or this source of tokens, is closed")

func closedError(d demand) *Error {
	return &Error{Code: codes.Canceled, Message: ErrClosed.Error(), doing: d.doing(), err: ErrClosed}
}
