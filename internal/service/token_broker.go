package service

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/tokenbroker/tokenbroker/internal/broker"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// tokenBroker serves callers.
type tokenBroker struct {
	*Service
	pb.UnimplementedTokenBrokerServer
}

// authorize returns the caller if it may do op with the profile.
func (s *Service) authorize(ctx context.Context, profile string, op pb.Operation, verb string) (*caller, error) {
	c, ok := callerFrom(ctx)
	if !ok {
		return nil, errCallerUnknown
	}
	if !s.policy.Load().allowed(c, profile).has(op) {
		return nil, denied(c, profile, verb)
	}
	return c, nil
}

func (s *tokenBroker) IssueToken(ctx context.Context, r *pb.IssueTokenRequest) (*pb.IssueTokenResponse, error) {
	c, err := s.authorize(ctx, r.GetProfile(), pb.Operation_OPERATION_ISSUE, "issue tokens of")
	if err != nil {
		return nil, err
	}
	if err := shared(r.GetJob()); err != nil {
		return nil, err
	}
	token, source, err := s.broker.Issue(ctx, r.GetProfile(), r.GetScopes(), broker.Demand{Lifetime: lifetime(r.GetMinLifetime())})
	if err != nil {
		return nil, fromBroker(err, c, r.GetProfile(), "issue tokens of")
	}
	// One allocation for the whole answer.
	out := &struct {
		response pb.IssueTokenResponse
		token    tokenMessage
	}{}
	out.response.Token, out.response.Source = out.token.fill(token), sourceOf(source)
	return &out.response, nil
}

func (s *tokenBroker) RefreshToken(ctx context.Context, r *pb.RefreshTokenRequest) (*pb.RefreshTokenResponse, error) {
	c, err := s.authorize(ctx, r.GetProfile(), pb.Operation_OPERATION_REFRESH, "refresh tokens of")
	if err != nil {
		return nil, err
	}
	if err := shared(r.GetJob()); err != nil {
		return nil, err
	}
	demand := broker.Demand{Lifetime: lifetime(r.GetMinLifetime()), Not: r.GetRejectedTokenId()}
	token, source, err := s.broker.Issue(ctx, r.GetProfile(), r.GetScopes(), demand)
	if err != nil {
		return nil, fromBroker(err, c, r.GetProfile(), "refresh tokens of")
	}
	return &pb.RefreshTokenResponse{Token: new(tokenMessage).fill(token), Source: sourceOf(source)}, nil
}

func (s *tokenBroker) WhoAmI(ctx context.Context, _ *pb.WhoAmIRequest) (*pb.WhoAmIResponse, error) {
	c, ok := callerFrom(ctx)
	if !ok {
		return nil, errCallerUnknown
	}
	out := &pb.WhoAmIResponse{Caller: c.name, Proof: c.proof, RequestId: requestID(ctx)}
	policy := s.policy.Load()
	for _, name := range s.broker.Profiles() {
		if ops := policy.allowed(c, name).list(); len(ops) > 0 {
			out.Permissions = append(out.Permissions, &pb.Permission{Profile: name, Operations: ops})
		}
	}
	return out, nil
}

// shared refuses what this version does not have, rather than hand a token that
// others hold to a job that asked for one of its own.
func shared(j *pb.Job) error {
	if j.GetDedicated() {
		return status.Error(codes.Unimplemented, "this version does not have dedicated tokens yet; ask without job.dedicated for the token that everybody shares")
	}
	return nil
}

func lifetime(d *durationpb.Duration) time.Duration { return d.AsDuration() }

// tokenMessage is a pb.Token with its timestamps beside it.
type tokenMessage struct {
	token                  pb.Token
	expire, refresh, issue timestamppb.Timestamp
}

func (m *tokenMessage) fill(t *broker.Token) *pb.Token {
	set := func(ts *timestamppb.Timestamp, at time.Time) *timestamppb.Timestamp {
		ts.Seconds, ts.Nanos = at.Unix(), int32(at.Nanosecond())
		return ts
	}
	m.token.AccessToken = t.Access.Reveal()
	m.token.TokenType = t.Type
	m.token.ExpireTime = set(&m.expire, t.ExpireTime)
	m.token.RefreshTime = set(&m.refresh, t.RefreshTime)
	m.token.IssueTime = set(&m.issue, t.IssueTime)
	m.token.Scopes = t.Scopes
	m.token.Id = t.ID
	return &m.token
}

func sourceOf(s broker.Source) pb.Source {
	switch s {
	case broker.FromMemory:
		return pb.Source_SOURCE_MEMORY
	case broker.FromStore:
		return pb.Source_SOURCE_STORE
	}
	return pb.Source_SOURCE_ENDPOINT
}
