package service

import (
	"context"
	"sort"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/tokenbroker/tokenbroker/internal/broker"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// profileAdmin serves operators.
type profileAdmin struct {
	*Service
	pb.UnimplementedProfileAdminServer
}

const (
	usualPage  = 100
	administer = "administer"
)

func (s *profileAdmin) ListProfiles(ctx context.Context, r *pb.ListProfilesRequest) (*pb.ListProfilesResponse, error) {
	c, ok := callerFrom(ctx)
	if !ok {
		return nil, errCallerUnknown
	}
	size := int(r.GetPageSize())
	if size == 0 {
		size = usualPage
	}
	names := s.broker.Profiles()
	policy := s.policy.Load()
	out := &pb.ListProfilesResponse{}
	// A page begins after the name that ended the one before.
	for _, name := range names[sort.SearchStrings(names, r.GetPageToken()):] {
		if name == r.GetPageToken() || !policy.allowed(c, name).has(pb.Operation_OPERATION_ADMIN) {
			continue
		}
		if len(out.Profiles) == size {
			out.NextPageToken = out.Profiles[size-1].Name
			break
		}
		status, err := s.broker.Status(ctx, name)
		if err != nil {
			return nil, fromBroker(err, c, name, administer)
		}
		out.Profiles = append(out.Profiles, profileOf(status))
	}
	return out, nil
}

func (s *profileAdmin) GetProfile(ctx context.Context, r *pb.GetProfileRequest) (*pb.GetProfileResponse, error) {
	p, err := s.profile(ctx, r.GetProfile())
	if err != nil {
		return nil, err
	}
	return &pb.GetProfileResponse{Profile: p}, nil
}

func (s *profileAdmin) ResetProfile(ctx context.Context, r *pb.ResetProfileRequest) (*pb.ResetProfileResponse, error) {
	c, err := s.authorize(ctx, r.GetProfile(), pb.Operation_OPERATION_ADMIN, administer)
	if err != nil {
		return nil, err
	}
	if err := s.broker.Reset(ctx, r.GetProfile()); err != nil {
		return nil, fromBroker(err, c, r.GetProfile(), administer)
	}
	s.log.Info("profile reset", "profile", r.GetProfile(), "caller", c.name)
	p, err := s.profile(ctx, r.GetProfile())
	if err != nil {
		return nil, err
	}
	return &pb.ResetProfileResponse{Profile: p}, nil
}

func (s *profileAdmin) profile(ctx context.Context, name string) (*pb.Profile, error) {
	c, err := s.authorize(ctx, name, pb.Operation_OPERATION_ADMIN, administer)
	if err != nil {
		return nil, err
	}
	status, err := s.broker.Status(ctx, name)
	if err != nil {
		return nil, fromBroker(err, c, name, administer)
	}
	return profileOf(status), nil
}

func profileOf(s *broker.Status) *pb.Profile {
	p := &pb.Profile{
		Name:        s.Name,
		Provider:    providers[s.Provider],
		GrantType:   grantTypes[s.GrantType],
		State:       states[s.State],
		StateText:   s.Text,
		TokenId:     s.TokenID,
		IssueTime:   timestamp(s.IssueTime),
		ExpireTime:  timestamp(s.ExpireTime),
		RefreshTime: timestamp(s.RefreshTime),
		Scopes:      s.Scopes,
	}
	if e := s.LastError; e != nil {
		p.LastError = &pb.LastError{
			Reason:          pb.ErrorReason(pb.ErrorReason_value["ERROR_REASON_"+string(e.Reason)]),
			OauthError:      e.Code,
			Message:         e.Text,
			ErrorTime:       timestamp(e.Time),
			Attempts:        int32(e.Attempts),
			NextAttemptTime: timestamp(e.NextAttempt),
		}
	}
	return p
}

var providers = map[string]pb.Provider{
	"vantage":    pb.Provider_PROVIDER_VANTAGE,
	"secureauth": pb.Provider_PROVIDER_SECUREAUTH,
	"oauth2":     pb.Provider_PROVIDER_OAUTH2,
}

var grantTypes = map[broker.GrantType]pb.GrantType{
	broker.ClientCredentials: pb.GrantType_GRANT_TYPE_CLIENT_CREDENTIALS,
	broker.Password:          pb.GrantType_GRANT_TYPE_PASSWORD,
	broker.AuthorizationCode: pb.GrantType_GRANT_TYPE_AUTHORIZATION_CODE,
}

var states = map[broker.State]pb.State{
	broker.Ready:                 pb.State_STATE_READY,
	broker.Idle:                  pb.State_STATE_IDLE,
	broker.BackingOff:            pb.State_STATE_BACKING_OFF,
	broker.CredentialsRejected:   pb.State_STATE_CREDENTIALS_REJECTED,
	broker.AuthorizationRequired: pb.State_STATE_AUTHORIZATION_REQUIRED,
}

func timestamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}
