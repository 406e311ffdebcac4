package service

import (
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// tokenBroker serves callers.
type tokenBroker struct {
	*Service
	pb.UnimplementedTokenBrokerServer
}

// authorize returns the caller if it may do op with the profile, for tokens with
// these scopes, and what it does can be put on record.
func (s *Service) authorize(ctx context.Context, profile string, op access.Operation, scopes []string) (*access.Caller, error) {
	c, err := s.permit(ctx, profile, op, scopes)
	if err != nil {
		return nil, err
	}
	if err := s.reserve(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

// permit is authorize for what hands out nothing and changes nothing.
func (s *Service) permit(ctx context.Context, profile string, op access.Operation, scopes []string) (*access.Caller, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	k := callFrom(ctx)
	o := &k.outcome
	o.profile, o.operation = profile, op
	k.named = len(scopes) > 0
	for {
		policy, changed := s.access.Current()
		k.policy, k.scopes = policy, s.asked(profile, scopes)
		if o.decision = policy.Decide(c, op, profile, k.scopes); o.decision.Allowed {
			return c, nil
		}
		if !policy.Passing() {
			return nil, denied(c, profile, op)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// asked is what a request is about that names these scopes, or none.
func (s *Service) asked(profile string, scopes []string) []string {
	if len(scopes) == 0 {
		return s.broker.Scopes(profile)
	}
	return scopes
}

// authorizeAgain refuses a call that authorize has let through, and that has
// waited since, if by now it would not: what is believed of callers, the policy,
// or the scopes that the profile has, may be others.
func (s *Service) authorizeAgain(ctx context.Context, profile string, op access.Operation, scopes []string) error {
	k := callFrom(ctx)
	if trust := s.trust.Load(); trust != k.trust {
		if _, err := k.known(trust); err != nil {
			k.policy, k.outcome.decision = nil, access.Decision{Rule: access.NoRule}
			return err
		}
	}
	if policy, _ := s.access.Current(); policy == k.policy && slices.Equal(k.scopes, s.asked(profile, scopes)) {
		return nil
	}
	_, err := s.authorize(ctx, profile, op, scopes)
	return err
}

func (s *tokenBroker) IssueToken(ctx context.Context, r *pb.IssueTokenRequest) (*pb.IssueTokenResponse, error) {
	token, source, err := s.issue(ctx, r, "", access.Issue)
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
	token, source, err := s.issue(ctx, r, r.GetRejectedTokenId(), access.Refresh)
	if err != nil {
		return nil, err
	}
	return &pb.RefreshTokenResponse{Token: new(tokenMessage).fill(token), Source: sourceOf(source)}, nil
}

// tokenRequest is what all requests for tokens have in common.
type tokenRequest interface {
	asking
	GetMinLifetime() *durationpb.Duration
}

// asking is what the requests of a token and of its end have in common.
type asking interface {
	GetProfile() string
	GetScopes() []string
	GetJob() *pb.Job
}

// askOf is what a request asks for. Only a dedicated job has a token of its own.
func askOf(r asking) broker.Ask {
	ask := broker.Ask{Profile: r.GetProfile(), Scopes: r.GetScopes()}
	if j := r.GetJob(); j != nil {
		ask.Named = j.GetId() != ""
		if j.GetDedicated() {
			ask.Job = j.GetId()
		}
	}
	return ask
}

// issue gets the caller a token other than the rejected one, if it may do op.
func (s *tokenBroker) issue(ctx context.Context, r tokenRequest, rejected string, op access.Operation) (*broker.Token, broker.Source, error) {
	c, err := s.authorize(ctx, r.GetProfile(), op, r.GetScopes())
	if err != nil {
		return nil, 0, err
	}
	o := &callFrom(ctx).outcome
	o.job = r.GetJob().GetId()
	o.tokenID = rejected
	demand := broker.Demand{Lifetime: r.GetMinLifetime().AsDuration(), Not: rejected}
	token, source, err := s.broker.Issue(ctx, askOf(r), demand)
	if lost := s.authorizeAgain(ctx, r.GetProfile(), op, r.GetScopes()); lost != nil {
		return nil, 0, lost // whatever became of it
	}
	if err != nil {
		return nil, 0, fromBroker(err, c, r.GetProfile(), op)
	}
	o.tokenID, o.source = token.ID, source
	s.calls.note(r.GetProfile(), c)
	return token, source, nil
}

func (s *tokenBroker) RevokeToken(ctx context.Context, r *pb.RevokeTokenRequest) (*pb.RevokeTokenResponse, error) {
	c, err := s.authorize(ctx, r.GetProfile(), access.Revoke, r.GetScopes())
	if err != nil {
		return nil, err
	}
	callFrom(ctx).outcome.job, callFrom(ctx).outcome.tokenID = r.GetJob().GetId(), r.GetTokenId()
	revoked, err := s.broker.Revoke(ctx, askOf(r), r.GetTokenId())
	if err != nil {
		return nil, fromBroker(err, c, r.GetProfile(), access.Revoke)
	}
	callFrom(ctx).outcome.tokenID = revoked.TokenID
	out := &pb.RevokeTokenResponse{TokenId: revoked.TokenID, Outcome: pb.RevocationOutcome_REVOCATION_OUTCOME_DROPPED}
	if revoked.Confirmed {
		out.Outcome = pb.RevocationOutcome_REVOCATION_OUTCOME_CONFIRMED
	}
	s.log.Info("caller revoked a token", named(c), "profile", r.GetProfile(), "token_id", out.TokenId, "outcome", out.Outcome.String(), "request_id", requestID(ctx))
	return out, nil
}

func (s *tokenBroker) WhoAmI(ctx context.Context, _ *pb.WhoAmIRequest) (*pb.WhoAmIResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	out := &pb.WhoAmIResponse{Caller: c.Name, Proof: proofs[c.Proof], Forwarder: c.Forwarder, RequestId: requestID(ctx)}
	policy, _ := s.access.Current()
	for _, name := range s.broker.Profiles() {
		if p := permission(policy, c, name, s.broker.Scopes(name)); len(p.Operations) > 0 {
			out.Permissions = append(out.Permissions, p)
		}
	}
	s.log.Info("caller asked who it is", named(c), "proof", c.Proof.String(), "request_id", out.RequestId)
	return out, nil
}

// permission is what the policy lets the caller do with a profile that has these
// scopes.
func permission(policy *access.Policy, c *access.Caller, profile string, scopes []string) *pb.Permission {
	p := &pb.Permission{Profile: profile}
	for _, op := range access.Operations() {
		for _, r := range policy.Allowing(c, op, profile) {
			if len(r.Scopes) > 0 && !access.AnyScope(r.Scopes, scopes) {
				continue // no request can pass it
			}
			if n := len(p.Operations); n == 0 || p.Operations[n-1] != pb.Operation(op) {
				p.Operations = append(p.Operations, pb.Operation(op))
			}
			p.Grants = append(p.Grants, &pb.Grant{Operation: pb.Operation(op), Rule: access.Decision{Rule: r.Index}.By(), Scopes: r.Scopes})
		}
	}
	return p
}

// proofs are the schema's names.
var proofs = map[access.Proof]pb.IdentityProof{
	access.Loopback:       pb.IdentityProof_IDENTITY_PROOF_ANONYMOUS_LOOPBACK,
	access.URISAN:         pb.IdentityProof_IDENTITY_PROOF_URI_SAN,
	access.DNSSAN:         pb.IdentityProof_IDENTITY_PROOF_DNS_SAN,
	access.UnixPeer:       pb.IdentityProof_IDENTITY_PROOF_UNIX_PEER,
	access.Forwarded:      pb.IdentityProof_IDENTITY_PROOF_FORWARDED,
	access.ServiceAccount: pb.IdentityProof_IDENTITY_PROOF_SERVICE_ACCOUNT,
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
