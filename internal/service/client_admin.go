package service

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// What a new client has unless the request says otherwise.
var clientScopes = []string{"openid", "permissions", "publicapi.all"}

const (
	accessTokenLifetime  = 24 * time.Hour
	refreshTokenLifetime = 30 * 24 * time.Hour
)

func (s *profileAdmin) CreateClient(ctx context.Context, r *pb.CreateClientRequest) (*pb.CreateClientResponse, error) {
	c, err := s.authorize(ctx, r.GetProfile(), access.Admin, nil)
	if err != nil {
		return nil, err
	}
	spec, err := clientSpec(r)
	if err != nil {
		return nil, fromBroker(err, c, r.GetProfile(), access.Admin)
	}
	tenant, err := s.broker.CreateClient(ctx, r.GetProfile(), spec)
	if err != nil {
		return nil, fromBroker(err, c, r.GetProfile(), access.Admin)
	}
	s.log.Info("caller created a client", named(c), "profile", r.GetProfile(), "tenant_id", tenant, "client_id", r.GetClientId(), "request_id", requestID(ctx))
	return &pb.CreateClientResponse{TenantId: tenant, ClientId: r.GetClientId()}, nil
}

// clientSpec completes a request with what is documented as default.
func clientSpec(r *pb.CreateClientRequest) (broker.ClientSpec, error) {
	access, err := lifetime("access_token_lifetime", r.GetAccessTokenLifetime(), accessTokenLifetime)
	if err != nil {
		return broker.ClientSpec{}, err
	}
	refresh, err := lifetime("refresh_token_lifetime", r.GetRefreshTokenLifetime(), refreshTokenLifetime)
	if err != nil {
		return broker.ClientSpec{}, err
	}
	scopes := r.GetAllowedScopes()
	if len(scopes) == 0 {
		scopes = clientScopes
	}
	return broker.ClientSpec{
		TenantID:                         r.GetTenantId(),
		ClientID:                         r.GetClientId(),
		ClientName:                       cmp.Or(r.GetClientName(), r.GetClientId()),
		AllowedGrantTypes:                r.GetAllowedGrantTypes(),
		AllowedScopes:                    scopes,
		RedirectURIs:                     r.GetRedirectUris(),
		PostLogoutRedirectURIs:           r.GetPostLogoutRedirectUris(),
		AllowedCORSOrigins:               r.GetAllowedCorsOrigins(),
		AllowOfflineAccess:               r.GetAllowOfflineAccess(),
		AllowRememberConsent:             orTrue(r.AllowRememberConsent),
		BackChannelLogoutSessionRequired: orTrue(r.BackChannelLogoutSessionRequired),
		RequireClientSecret:              orTrue(r.RequireClientSecret),
		RequireConsent:                   r.GetRequireConsent(),
		AllowNoPKCE:                      r.GetAllowNoPkce(),
		AccessTokenLifetime:              access,
		RefreshTokenLifetime:             refresh,
	}, nil
}

func orTrue(b *bool) bool { return b == nil || *b }

// lifetime is in whole seconds: Vantage knows no parts of them.
func lifetime(field string, d *durationpb.Duration, standard time.Duration) (time.Duration, error) {
	if d == nil {
		return standard, nil
	}
	if d.GetNanos() != 0 {
		return 0, &broker.Error{Reason: broker.ReasonInvalidRequest, Field: field, Text: fmt.Sprintf("%s is %v; it must be in whole seconds", field, d.AsDuration())}
	}
	return d.AsDuration(), nil
}

func (s *profileAdmin) CreateClientSecret(ctx context.Context, r *pb.CreateClientSecretRequest) (*pb.CreateClientSecretResponse, error) {
	c, err := s.authorizeBoth(ctx, r.GetProfile(), r.GetDeliverToProfile())
	if err != nil {
		return nil, err
	}
	spec := broker.ClientSecretSpec{
		TenantID: r.GetTenantId(), ClientID: r.GetClientId(), Description: r.GetDescription(),
		Start: instant(r.GetStartTime()), End: instant(r.GetExpireTime()),
	}
	secret, delivery, err := s.broker.CreateClientSecret(ctx, r.GetProfile(), spec, r.GetDeliverToProfile())
	if err != nil {
		return nil, fromBroker(err, c, r.GetProfile(), access.Admin)
	}
	s.log.Info("caller created a client secret", named(c), "profile", r.GetProfile(), "client_id", r.GetClientId(),
		"deliver_to_profile", r.GetDeliverToProfile(), "request_id", requestID(ctx))
	return &pb.CreateClientSecretResponse{
		Value:     secret.Value.Reveal(),
		StartTime: timestamp(secret.Start), ExpireTime: timestamp(secret.End), Delivery: deliveries[delivery],
	}, nil
}

func (s *profileAdmin) RotateClientSecret(ctx context.Context, r *pb.RotateClientSecretRequest) (*pb.RotateClientSecretResponse, error) {
	c, err := s.authorizeBoth(ctx, r.GetProfile(), r.GetAdminProfile())
	if err != nil {
		return nil, err
	}
	rotated, err := s.broker.RotateClientSecret(ctx, r.GetProfile(), r.GetAdminProfile(), instant(r.GetExpireTime()))
	if err != nil {
		return nil, fromBroker(err, c, r.GetProfile(), access.Admin)
	}
	s.log.Info("caller rotated a client secret", named(c), "profile", r.GetProfile(), "request_id", requestID(ctx))
	return &pb.RotateClientSecretResponse{
		StartTime: timestamp(rotated.Start), ExpireTime: timestamp(rotated.End), PreviousExpireTime: timestamp(rotated.PreviousEnd),
		Delivery: deliveries[rotated.Delivery],
	}, nil
}

// authorizeBoth returns the caller if it may administer the profile, and also the
// other one if there is one.
func (s *profileAdmin) authorizeBoth(ctx context.Context, profile, other string) (*access.Caller, error) {
	c, err := s.authorize(ctx, profile, access.Admin, nil)
	if err != nil || other == "" {
		return c, err
	}
	first := callFrom(ctx).outcome
	if _, err = s.authorize(ctx, other, access.Admin, nil); err == nil && !s.broker.Has(other) {
		err = denied(c, other, access.Admin)
	}
	if err == nil { // a denial is about the other one
		callFrom(ctx).outcome = first
	}
	return c, err
}

var deliveries = map[broker.Delivery]pb.SecretDelivery{
	broker.ToCaller: pb.SecretDelivery_SECRET_DELIVERY_RESPONSE,
	broker.ToStore:  pb.SecretDelivery_SECRET_DELIVERY_STORE,
	broker.ToFile:   pb.SecretDelivery_SECRET_DELIVERY_FILE,
}

// instant is the zero time for none.
func instant(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}
