// Package service is the gRPC door: the services TokenBroker and ProfileAdmin,
// who is calling, whether they may, and how failures look from outside.
//
// A call that arrives is held to the limits before anything is set aside for it.
// Then it passes, in this order: recovery from panics, metrics, the log of
// failures and the audit log, identity and the caller's limits, validation of the request, and then the
// handler, which asks the policy before it asks the broker. The identity of a
// connection is worked out once, in the handshake. Default deny: what no rule allows is
// refused, and a caller that is refused cannot tell whether the profile exists.
//
// Requests and responses hold secrets. They are never logged or formatted.
package service

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"buf.build/go/protovalidate"
	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/admission"
	"github.com/tokenbroker/tokenbroker/internal/audit"
	"github.com/tokenbroker/tokenbroker/internal/broker"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// handshakeTime bounds the time from a connection's first byte to its first
// settings of HTTP/2.
const handshakeTime = 10 * time.Second

// Options of a Service.
type Options struct {
	Broker *broker.Broker
	// Logger gets one line per failed call, and panics. Never nil.
	Logger *slog.Logger
	// Registerer takes the metrics of the calls; nil leaves them out.
	Registerer prometheus.Registerer
	// TLS returns the settings for the next handshake, so that they can
	// change under a running server; nil is no TLS, and then callers must
	// come from loopback or a unix socket.
	TLS func() *tls.Config
	// Reflection lets anyone who can connect read the schema.
	Reflection bool
	// Authorizer decides what callers may do. Never nil.
	Authorizer *access.Authorizer
	// Limits bound what callers can make the server do; zero fields are the
	// defaults.
	Limits admission.Limits
	// Audit gets one event per decision; nil is nobody.
	Audit *audit.Log
}

// Service is a gRPC server with both services.
type Service struct {
	*grpc.Server
	broker    *broker.Broker
	log       *slog.Logger
	validator protovalidate.Validator
	health    *health.Server
	access    *access.Authorizer
	trust     atomic.Pointer[trusted]
	audit     *audit.Log
	calls     lastCalls
	limiter   *limiter
	methods   map[string]*method // by full name; not changed after it is made

	watches watchMetrics
	// age and grace of connections.
	age, grace time.Duration

	// leaving is closed when streams must end, and so ends away.
	leaving <-chan struct{}
	away    context.Context
	leave   context.CancelFunc
}

// New returns a server that is ready to serve.
func New(o Options) (*Service, error) {
	validator, err := protovalidate.New(protovalidate.WithMessages(requests...), protovalidate.WithDisableLazy())
	if err != nil {
		return nil, fmt.Errorf("compiling the rules of requests: %w", err)
	}
	s := &Service{broker: o.Broker, log: o.Logger, validator: validator, health: health.NewServer(), access: o.Authorizer, audit: o.Audit, limiter: newLimiter(o.Limits), watches: newWatchMetrics()}
	s.away, s.leave = context.WithCancel(context.Background())
	s.leaving = s.away.Done()
	limits := o.Limits.WithDefaults()
	s.age, s.grace = limits.ConnectionAge, limits.ConnectionAgeGrace
	s.SetTrust(Trust{})

	// A panic is caught where the call can still be told about, and once more
	// around all there is.
	guard := recovery.UnaryServerInterceptor(recovery.WithRecoveryHandlerContext(s.recovered))
	guardStream := recovery.StreamServerInterceptor(recovery.WithRecoveryHandlerContext(s.recovered))
	handshakes := newHandshakes(o.Logger)
	chain := []grpc.UnaryServerInterceptor{guard}
	streams := []grpc.StreamServerInterceptor{guardStream, s.endWithServer}
	if o.Registerer != nil {
		metrics := grpcprom.NewServerMetrics()
		if err := errors.Join(o.Registerer.Register(metrics), o.Registerer.Register(handshakes.failed)); err != nil {
			return nil, fmt.Errorf("registering the metrics of calls: %w", err)
		}
		for _, c := range append(s.limiter.metrics, s.watches.open, s.watches.sent) {
			if err := o.Registerer.Register(c); err != nil {
				return nil, fmt.Errorf("registering the metrics of limits and streams: %w", err)
			}
		}
		chain = append(chain, metrics.UnaryServerInterceptor())
		streams = append(streams, metrics.StreamServerInterceptor())
	}
	s.Server = grpc.NewServer(
		grpc.Creds(heard{newCredentials(o.TLS), handshakes}),
		grpc.InTapHandle(s.arrive),
		grpc.ChainUnaryInterceptor(append(chain, s.explain, guard, s.admit, s.validate)...),
		grpc.ChainStreamInterceptor(append(streams, s.explainStream, guardStream, s.admitStream, s.validateStream)...),
		grpc.MaxRecvMsgSize(largestReceived),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.MaxHeaderListSize(uint32(limits.HeaderSize)),
		grpc.MaxConcurrentStreams(uint32(limits.ConnectionStreams)),
		grpc.ConnectionTimeout(handshakeTime),
		// Calls are small, connections many: with these, one takes two thirds of
		// the memory that grpc-go's defaults take, and calls cost no more.
		grpc.ReadBufferSize(8<<10), grpc.WriteBufferSize(8<<10),
		grpc.KeepaliveParams(ageing(limits)),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: limits.PingInterval, PermitWithoutStream: true}),
	)
	pb.RegisterTokenBrokerServer(s.Server, &tokenBroker{Service: s})
	pb.RegisterProfileAdminServer(s.Server, &profileAdmin{Service: s})
	healthpb.RegisterHealthServer(s.Server, s.health)
	for _, name := range []string{pb.TokenBroker_ServiceDesc.ServiceName, pb.ProfileAdmin_ServiceDesc.ServiceName} {
		s.health.SetServingStatus(name, healthpb.HealthCheckResponse_SERVING)
	}
	if o.Reflection {
		reflection.Register(s.Server)
	}
	s.methods = methodsOf(s.Server)
	return s, nil
}

// Serve accepts connections until the server stops. It is called once.
func (s *Service) Serve(ln net.Listener) error {
	limited := admission.Limit(ln, s.limiter.limits.Load().Connections, func() { s.limiter.count(limitConnections) })
	s.limiter.mu.Lock()
	s.limiter.listener = limited
	limited.SetMost(s.limiter.limits.Load().Connections) // as it is by now
	s.limiter.mu.Unlock()
	ctx, stop := context.WithCancel(context.Background())
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		s.watch(ctx)
	}()
	err := s.Server.Serve(limited)
	stop()
	<-watched
	return err
}

// Drain tells health checks that this replica is leaving.
func (s *Service) Drain() { s.health.Shutdown() }

// endWithServer ends a stream that is none of ours when the server stops: a health
// watcher alone would hold it up for good. Ours see to that themselves, and say
// why.
func (s *Service) endWithServer(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if strings.HasPrefix(info.FullMethod, "/tokenbroker.v1.") {
		return handler(server, stream)
	}
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	defer context.AfterFunc(s.away, cancel)()
	return handler(server, streamUntil{stream, ctx})
}

// streamUntil is a stream with another context.
type streamUntil struct {
	grpc.ServerStream
	ctx context.Context
}

func (s streamUntil) Context() context.Context { return s.ctx }

// Shutdown ends streams, lets other calls under way finish until ctx ends, and
// then cuts them off.
func (s *Service) Shutdown(ctx context.Context) {
	s.Drain()
	s.leave()
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.GracefulStop()
	}()
	select {
	case <-done:
	case <-ctx.Done():
		s.Stop()
		<-done
	}
}

// recovered turns a panic into an answer. Its value may hold anything, so only
// its type is written.
func (s *Service) recovered(ctx context.Context, value any) error {
	method, _ := grpc.Method(ctx)
	s.log.Error("panic in a call", "method", method, "type", fmt.Sprintf("%T", value), "stack", string(debug.Stack()))
	return internalError
}
