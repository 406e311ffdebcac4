package service

import (
	"context"
	"time"

	"google.golang.org/grpc"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

func (s *tokenBroker) WatchToken(r *pb.WatchTokenRequest, stream grpc.ServerStreamingServer[pb.WatchTokenResponse]) error {
	ctx := stream.Context()
	return s.whileAllowed(ctx, r.GetProfile(), access.Watch, r.GetScopes(), func(ctx context.Context) error {
		k := callFrom(ctx)
		k.outcome.job = r.GetJob().GetId()
		watch := s.broker.Watch(askOf(r))
		defer watch.Close()
		sent := ""
		for {
			token, source, news, err := watch.Next(ctx, broker.Demand{Lifetime: r.GetMinLifetime().AsDuration()})
			if err != nil {
				return fromBroker(err, k.caller, r.GetProfile(), access.Watch)
			}
			if token.ID != sent {
				if err := stream.Send(&pb.WatchTokenResponse{Token: new(tokenMessage).fill(token), Source: sourceOf(source)}); err != nil {
					return err
				}
				sent = token.ID
			}
			select {
			case <-news:
			case <-time.After(time.Until(token.ExpireTime)):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	})
}
