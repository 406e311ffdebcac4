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
	token, source, err := s.issue(ctx, r, "", pb.Operation_OPERATION_ISSUE, "issue tokens of")
	if err != nil {
		return nil, err
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
	token, source, err := s.issue(ctx, r, r.GetRejectedTokenId(), pb.Operation_OPERATION_REFRESH, "refresh tokens of")
	if err != nil {
		return nil, err
	}
	return &pb.RefreshTokenResponse{Token: new(tokenMessage).fill(token), Source: sourceOf(source)}, nil
}

// tokenRequest is what all requests for tokens have in common.
type tokenRequest interface {
	GetProfile() string
	GetScopes() []string
	GetMinLifetime() *durationpb.Duration
	GetJob() *pb.Job
}

// issue gets the caller a token other than the rejected one, if it may do op.
func (s *tokenBroker) issue(ctx context.Context, r tokenRequest, rejected string, op pb.Operation, verb string) (*broker.Token, broker.Source, error) {
	c, err := s.authorize(ctx, r.GetProfile(), op, verb)
	if err != nil {
		return nil, 0, err
	}
	if err := shared(r.GetJob()); err != nil {
		return nil, 0, err
	}
	demand := broker.Demand{Lifetime: r.GetMinLifetime().AsDuration(), Not: rejected}
	token, source, err := s.broker.Issue(ctx, r.GetProfile(), r.GetScopes(), demand)
	if err != nil {
		return nil, 0, fromBroker(err, c, r.GetProfile(), verb)
	}
	s.calls.note(r.GetProfile(), c)
	return token, source, nil
}

func (s *tokenBroker) RevokeToken(ctx context.Context, r *pb.RevokeTokenRequest) (*pb.RevokeTokenResponse, error) {
	const verb = "revoke tokens of"
	c, err := s.authorize(ctx, r.GetProfile(), pb.Operation_OPERATION_REVOKE, verb)
	if err != nil {
		return nil, err
	}
	if err := shared(r.GetJob()); err != nil {
		return nil, err
	}
	revoked, err := s.broker.Revoke(ctx, r.GetProfile(), r.GetScopes(), r.GetTokenId())
	if err != nil {
		return nil, fromBroker(err, c, r.GetProfile(), verb)
	}
	out := &pb.RevokeTokenResponse{TokenId: revoked.TokenID, Outcome: pb.RevocationOutcome_REVOCATION_OUTCOME_DROPPED}
	if revoked.Confirmed {
		out.Outcome = pb.RevocationOutcome_REVOCATION_OUTCOME_CONFIRMED
	}
	s.log.Info("caller revoked a token", "caller", c.name, "profile", r.GetProfile(), "token_id", out.TokenId, "outcome", out.Outcome.String(), "request_id", requestID(ctx))
	return out, nil
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
	s.log.Info("caller asked who it is", "caller", c.name, "proof", c.proof.String(), "request_id", out.RequestId)
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
	case broker.Uncoordinated:
		return pb.Source_SOURCE_UNCOORDINATED
	}
	return pb.Source_SOURCE_ENDPOINT
}
