package service

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sort"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// profileAdmin serves operators.
type profileAdmin struct {
	*Service
	pb.UnimplementedProfileAdminServer
}

const (
	usualPage = 100
)

func (s *profileAdmin) ListProfiles(ctx context.Context, r *pb.ListProfilesRequest) (*pb.ListProfilesResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	size := int(r.GetPageSize())
	if size == 0 {
		size = usualPage
	}
	names := s.broker.Profiles()
	out := &pb.ListProfilesResponse{}
	callFrom(ctx).outcome.operation = access.Admin
	// A page begins after the name that ended the one before.
	for _, name := range names[sort.SearchStrings(names, r.GetPageToken()):] {
		d := s.access.Decide(c, access.Admin, name, nil)
		if name == r.GetPageToken() || !d.Allowed {
			continue
		}
		if len(out.Profiles) == size {
			out.NextPageToken = out.Profiles[size-1].Name
			break
		}
		callFrom(ctx).outcome.decision = d
		status, err := s.broker.Status(ctx, name)
		if gone := (*broker.Error)(nil); errors.As(err, &gone) && gone.Reason == broker.ReasonProfileUnknown {
			continue // since the names were listed
		}
		if err != nil {
			return nil, fromBroker(err, c, name, access.Admin)
		}
		out.Profiles = append(out.Profiles, s.profileOf(status))
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

func (s *profileAdmin) StartAuthorization(ctx context.Context, r *pb.StartAuthorizationRequest) (*pb.StartAuthorizationResponse, error) {
	c, err := s.authorize(ctx, r.GetProfile(), access.Admin, nil)
	if err != nil {
		return nil, err
	}
	started, err := s.broker.StartAuthorization(ctx, r.GetProfile(), broker.Secret{})
	if err != nil {
		return nil, fromBroker(err, c, r.GetProfile(), access.Admin)
	}
	s.log.Info("caller started a sign-in", named(c), "profile", r.GetProfile(), "request_id", requestID(ctx))
	return &pb.StartAuthorizationResponse{
		AuthorizationUrl: started.URL, State: started.State, ExpireTime: timestamppb.New(started.Expires),
	}, nil
}

func (s *profileAdmin) CompleteAuthorization(ctx context.Context, r *pb.CompleteAuthorizationRequest) (*pb.CompleteAuthorizationResponse, error) {
	c, err := callerOf(ctx)
	if err != nil {
		return nil, err
	}
	allowed := func(profile string) bool {
		_, err := s.authorize(ctx, profile, access.Admin, nil)
		return err == nil
	}
	done, err := s.broker.CompleteAuthorization(ctx, broker.Callback{
		State: r.GetState(), Code: broker.NewSecret(r.GetCode()), Issuer: r.GetIss(),
		ReplaceAccount: r.GetReplaceAccount(), Allowed: allowed,
	})
	if err == nil && done.Ticket != "" {
		if _, err = s.broker.AbandonAuthorization(ctx, done.Ticket, allowed); err == nil {
			err = anotherAccount(done)
		}
	}
	if err != nil {
		return nil, fromBroker(err, c, "", access.Admin)
	}
	s.log.Info("caller completed a sign-in", named(c), "profile", done.Profile, "request_id", requestID(ctx))
	p, err := s.profile(ctx, done.Profile)
	if err != nil {
		return nil, err
	}
	return &pb.CompleteAuthorizationResponse{Profile: p}, nil
}

func anotherAccount(done *broker.Completion) *broker.Error {
	return &broker.Error{
		Reason: broker.ReasonInvalidRequest, Field: "replace_account", Profile: done.Profile,
		Text: fmt.Sprintf("signing in for profile %s: %q has signed in, and the profile works with a grant of %q, which stays; sign in as that account, or start again and set replace_account",
			done.Profile, accountName(done.Account), accountName(done.Previous)),
	}
}

func accountName(a broker.Account) string {
	return cmp.Or(a.Name, a.Subject, "an account without a name")
}

func (s *profileAdmin) ResetProfile(ctx context.Context, r *pb.ResetProfileRequest) (*pb.ResetProfileResponse, error) {
	c, err := s.authorize(ctx, r.GetProfile(), access.Admin, nil)
	if err != nil {
		return nil, err
	}
	if err := s.broker.Reset(ctx, r.GetProfile()); err != nil {
		return nil, fromBroker(err, c, r.GetProfile(), access.Admin)
	}
	s.log.Info("profile reset", "profile", r.GetProfile(), named(c))
	p, err := s.profile(ctx, r.GetProfile())
	if err != nil {
		return nil, err
	}
	return &pb.ResetProfileResponse{Profile: p}, nil
}

func (s *profileAdmin) profile(ctx context.Context, name string) (*pb.Profile, error) {
	c, err := s.authorize(ctx, name, access.Admin, nil)
	if err != nil {
		return nil, err
	}
	status, err := s.broker.Status(ctx, name)
	if err != nil {
		return nil, fromBroker(err, c, name, access.Admin)
	}
	return s.profileOf(status), nil
}

func (s *Service) profileOf(of *broker.Status) *pb.Profile {
	caller, called := s.LastCall(of.Name)
	p := &pb.Profile{
		Name:        of.Name,
		Provider:    providers[of.Provider],
		GrantType:   grantTypes[of.GrantType],
		State:       states[of.State],
		StateText:   of.Text,
		TokenId:     of.TokenID,
		IssueTime:   timestamp(of.IssueTime),
		ExpireTime:  timestamp(of.ExpireTime),
		RefreshTime: timestamp(of.RefreshTime),
		Scopes:      of.Scopes,

		ConsentStartTime: timestamp(of.ConsentStart),
		ConsentEndTime:   timestamp(of.ConsentEnd),
		ConsentAccount:   cmp.Or(of.Account.Name, of.Account.Subject),

		LastCaller:   caller,
		LastCallTime: timestamp(called),
	}
	if e := of.LastError; e != nil {
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
