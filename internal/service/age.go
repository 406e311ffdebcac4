package service

import (
	"context"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"

	"github.com/tokenbroker/tokenbroker/internal/admission"
)

// grpc-go asks connections to end when they are as old as MaxConnectionAge, give
// or take a tenth of it that it keeps to itself, and cuts them off when the grace
// is over. Streams that last must have been ended by then, and not before the
// client has been told to open its next one elsewhere. So grpc-go is given a
// little less of age, and as much more of grace: whatever it draws, it asks
// before server.limits.connection_age is over, and cuts when the grace after that
// is, at the earliest. Streams end between the two.

// ageing is what grpc-go is told of it.
func ageing(l admission.Limits) keepalive.ServerParameters {
	age := l.ConnectionAge - l.ConnectionAge/11 // a tenth more is the age
	return keepalive.ServerParameters{
		MaxConnectionAge: age, MaxConnectionAgeGrace: l.ConnectionAgeGrace + l.ConnectionAge - (age - age/10),
		Time: silence, Timeout: answerTime,
	}
}

// A caller that has vanished without a word, as when its machine loses power,
// would hold its streams until the connection is too old. One that has said nothing
// for silence is asked whether it is there, and must answer within answerTime.
const silence, answerTime = time.Minute, 20 * time.Second

// leaves is when a stream of the call must end for the age of its connection, so
// that its caller hears why; zero where connections have none. They are spread
// over half of the grace: all of a connection come back at once.
func (s *Service) leaves(ctx context.Context) time.Time {
	since := connectedSince(ctx)
	if since.IsZero() {
		return time.Time{}
	}
	return since.Add(s.age + rand.N(s.grace/2+1))
}

// connectedSince is when the call's connection was ready for calls.
func connectedSince(ctx context.Context) time.Time {
	if p, ok := peer.FromContext(ctx); ok {
		switch info := p.AuthInfo.(type) {
		case *tlsInfo:
			return info.since
		case localInfo:
			return info.since
		}
	}
	return time.Time{}
}
