package client_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/tokenbroker/tokenbroker/client"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// fake is a broker that does what a test says, over real gRPC and no network. It may
// be used in a bubble of synctest.
type fake struct {
	pb.UnimplementedTokenBrokerServer
	t testing.TB

	mu     sync.Mutex
	server *grpc.Server      // nil while it is away
	ln     *bufconn.Listener // of the server
	times  map[string][]time.Time
	dials  int
	conns  []*frozen
	slow   time.Duration // until a connection is there
	watch  func(*pb.WatchTokenRequest, chan<- *pb.Token, context.Context) error
	issue  func(*pb.IssueTokenRequest) (*pb.Token, error)
	renew  func(*pb.RefreshTokenRequest) (*pb.Token, error)
	revoke func(*pb.RevokeTokenRequest) (*pb.RevokeTokenResponse, error)
}

func newFake(t testing.TB) *fake {
	f := &fake{t: t, times: map[string][]time.Time{}}
	f.start()
	t.Cleanup(f.stop)
	return f
}

func (f *fake) start() {
	f.mu.Lock()
	defer f.mu.Unlock()
	// It tolerates pings as the broker does.
	ln, server := bufconn.Listen(64<<10), grpc.NewServer(grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}))
	f.ln, f.server = ln, server
	pb.RegisterTokenBrokerServer(server, f)
	go func() { _ = server.Serve(ln) }() // until stop
}

// stop ends the server and what is under way, as a crash does.
func (f *fake) stop() {
	f.mu.Lock()
	server := f.server
	f.server = nil
	f.mu.Unlock()
	if server != nil {
		server.Stop()
	}
}

func (f *fake) dial(ctx context.Context, _ string) (net.Conn, error) {
	f.mu.Lock()
	f.dials++
	up, ln, slow := f.server != nil, f.ln, f.slow
	f.mu.Unlock()
	if !up {
		return nil, fmt.Errorf("nobody listens there")
	}
	select {
	case <-time.After(slow):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	conn, err := ln.DialContext(ctx)
	if err != nil {
		return nil, err
	}
	c := &frozen{Conn: conn, closed: make(chan struct{})}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.conns = append(f.conns, c)
	return c, nil
}

// freeze has nothing go through the connections that there are.
func (f *fake) freeze() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.conns {
		c.cold.Store(true)
	}
}

// frozen is a connection through which nothing goes once it is cold.
type frozen struct {
	net.Conn
	cold   atomic.Bool
	once   sync.Once
	closed chan struct{}
}

func (c *frozen) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.cold.Load() {
		<-c.closed
		return 0, net.ErrClosed
	}
	return n, err
}

func (c *frozen) Write(p []byte) (int, error) {
	if c.cold.Load() {
		return len(p), nil
	}
	return c.Conn.Write(p)
}

func (c *frozen) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// client returns a client of the fake, until the test ends.
func (f *fake) client(options ...client.Option) *client.Client {
	f.t.Helper()
	c, err := client.New(append([]client.Option{
		client.WithAddress("127.0.0.1:1"), client.WithDialOptions(grpc.WithContextDialer(f.dial)),
	}, options...)...)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { c.Close() })
	return c
}

// note counts a call, and runs the test's function without the lock.
func (f *fake) note(method string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.times[method] = append(f.times[method], time.Now())
}

// calls are the times of the calls of a method so far.
func (f *fake) calls(method string) []time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.times[method])
}

// dialed is how many connections were tried.
func (f *fake) dialed() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dials
}

func (f *fake) all() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, times := range f.times {
		n += len(times)
	}
	return n
}

func (f *fake) WatchToken(r *pb.WatchTokenRequest, stream grpc.ServerStreamingServer[pb.WatchTokenResponse]) error {
	f.note("WatchToken")
	if f.watch == nil {
		return status.Error(codes.Unimplemented, "unknown method WatchToken")
	}
	tokens, ended := make(chan *pb.Token), make(chan error, 1)
	go func() { ended <- f.watch(r, tokens, stream.Context()) }()
	for {
		select {
		case t := <-tokens:
			if err := stream.Send(&pb.WatchTokenResponse{Token: t, Source: pb.Source_SOURCE_MEMORY}); err != nil {
				return err
			}
		case err := <-ended:
			return err
		}
	}
}

func (f *fake) IssueToken(_ context.Context, r *pb.IssueTokenRequest) (*pb.IssueTokenResponse, error) {
	f.note("IssueToken")
	if f.issue == nil {
		return nil, status.Error(codes.Unimplemented, "unknown method IssueToken")
	}
	t, err := f.issue(r)
	return &pb.IssueTokenResponse{Token: t, Source: pb.Source_SOURCE_MEMORY}, err
}

func (f *fake) RefreshToken(_ context.Context, r *pb.RefreshTokenRequest) (*pb.RefreshTokenResponse, error) {
	f.note("RefreshToken")
	t, err := f.renew(r)
	return &pb.RefreshTokenResponse{Token: t, Source: pb.Source_SOURCE_ENDPOINT}, err
}

func (f *fake) RevokeToken(_ context.Context, r *pb.RevokeTokenRequest) (*pb.RevokeTokenResponse, error) {
	f.note("RevokeToken")
	return f.revoke(r)
}

// token is one that was issued at a time and lives for so long.
func token(value string, issued time.Time, lives time.Duration) *pb.Token {
	return &pb.Token{
		AccessToken: value, TokenType: "Bearer", Id: idOf(value), Scopes: []string{"a", "b"},
		IssueTime: timestamppb.New(issued), RefreshTime: timestamppb.New(issued.Add(lives * 9 / 10)), ExpireTime: timestamppb.New(issued.Add(lives)),
	}
}

func idOf(value string) string {
	sum := sha256.Sum256([]byte(value))
	return hex.EncodeToString(sum[:8])
}

// refusal is an error as the broker sends them.
func refusal(code codes.Code, reason client.Reason, retry time.Duration) error {
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{Domain: "tokenbroker.v1", Reason: string(reason), Metadata: map[string]string{"profile": "invoices", "request_id": "r-1"}}}
	if retry > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(retry)})
	}
	s, err := status.New(code, "the broker says why").WithDetails(details...)
	if err != nil {
		panic(err)
	}
	return s.Err()
}

// always sends one token and stays open.
func always(t *pb.Token) func(*pb.WatchTokenRequest, chan<- *pb.Token, context.Context) error {
	return func(_ *pb.WatchTokenRequest, tokens chan<- *pb.Token, ctx context.Context) error {
		select {
		case tokens <- t:
		case <-ctx.Done():
		}
		<-ctx.Done()
		return ctx.Err()
	}
}
