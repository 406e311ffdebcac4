package service_test

import (
	"encoding/json"
	"io"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
	"github.com/tokenbroker/tokenbroker/internal/vantage"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

const day = 24 * time.Hour

// asAdministrator makes the rig's profiles those of the stand-in's tenant
// administrator.
func (r *rig) asAdministrator(more ...string) {
	r.configure(func(c *vantage.Config) {
		c.ClientID, c.TenantID = "admin", sandbox.DemoTenant
		c.ClientSecrets = []broker.Secret{broker.NewSecret(r.vantage.ClientSecret("admin"))}
	}, more...)
}

// shown is what the stand-in shows of something in its administration.
func (r *rig) shown(path string, to any) {
	r.t.Helper()
	token, _, err := r.broker.Issue(r.t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
	if err != nil {
		r.t.Fatal(err)
	}
	request, err := http.NewRequestWithContext(r.t.Context(), http.MethodGet, r.url+"/api/adminapi2/v2/tenants/"+sandbox.DemoTenant+path, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	request.Header.Set("Authorization", "Bearer "+token.Access.Reveal())
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		r.t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		r.t.Fatalf("the stand-in answered %s: %s, %v", response.Status, body, err)
	}
	if err := json.Unmarshal(body, to); err != nil {
		r.t.Fatal(err)
	}
}

func TestCreateClientAsVantageShowsIt(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.asAdministrator()
	for name, tc := range map[string]struct {
		request *pb.CreateClientRequest
		want    map[string]any
	}{
		"defaults": {
			&pb.CreateClientRequest{ClientId: "c1", AllowedGrantTypes: []string{"client_credentials"}},
			map[string]any{
				"clientId": "c1", "clientName": "c1", "allowOfflineAccess": false, "allowRememberConsent": true, "backChannelLogoutSessionRequired": true,
				"requireClientSecret": true, "requireConsent": false, "allowNoPkce": false, "allowedGrantTypes": []any{"client_credentials"},
				"allowedCorsOrigins": []any{}, "allowedScopes": []any{"openid", "permissions", "publicapi.all"},
				"postLogoutRedirectUris": []any{}, "redirectUris": []any{}, "accessTokenLifetime": 86400., "refreshTokenLifetime": 2592000.,
			},
		},
		"everything": {
			&pb.CreateClientRequest{
				TenantId: sandbox.DemoTenant, ClientId: "c2", ClientName: "Invoices", AllowedGrantTypes: []string{"authorization_code", "password"},
				AllowedScopes: []string{"publicapi.all", "openid", "permissions"}, RedirectUris: []string{"https://app.example.com/in"},
				PostLogoutRedirectUris: []string{"https://app.example.com/out"}, AllowedCorsOrigins: []string{"https://app.example.com"},
				AllowOfflineAccess: true, AllowRememberConsent: proto.Bool(false), BackChannelLogoutSessionRequired: proto.Bool(false),
				RequireClientSecret: proto.Bool(false), RequireConsent: true, AllowNoPkce: true,
				AccessTokenLifetime: durationpb.New(time.Hour), RefreshTokenLifetime: durationpb.New(366 * day),
			},
			map[string]any{
				"clientId": "c2", "clientName": "Invoices", "allowOfflineAccess": true, "allowRememberConsent": false, "backChannelLogoutSessionRequired": false,
				"requireClientSecret": false, "requireConsent": true, "allowNoPkce": true, "allowedGrantTypes": []any{"authorization_code", "password"},
				"allowedCorsOrigins": []any{"https://app.example.com"}, "allowedScopes": []any{"publicapi.all", "openid", "permissions"},
				"postLogoutRedirectUris": []any{"https://app.example.com/out"}, "redirectUris": []any{"https://app.example.com/in"},
				"accessTokenLifetime": 3600., "refreshTokenLifetime": 366 * 86400.,
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			tc.request.Profile = "invoices"
			out, err := r.admin().CreateClient(within(t, 10*time.Second), tc.request)
			if err != nil {
				t.Fatal(err)
			}
			if out.GetTenantId() != sandbox.DemoTenant || out.GetClientId() != tc.request.GetClientId() {
				t.Errorf("got %v", out)
			}
			var got map[string]any
			if r.shown("/clients/"+tc.request.GetClientId(), &got); !reflect.DeepEqual(got, tc.want) {
				t.Errorf("the stand-in has\n%v\nwant\n%v", got, tc.want)
			}
		})
	}
}

func TestCreateClientSecretIsShownOnce(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.asAdministrator()
	end := time.Now().Add(90 * day).Truncate(time.Millisecond)
	out, err := r.admin().CreateClientSecret(within(t, 10*time.Second), &pb.CreateClientSecretRequest{
		Profile: "invoices", ClientId: "invoices", Description: "the new one", ExpireTime: timestamppb.New(end),
	})
	if err != nil {
		t.Fatal(err)
	}
	if out.GetDelivery() != pb.SecretDelivery_SECRET_DELIVERY_RESPONSE || !out.GetExpireTime().AsTime().Equal(end) || out.GetStartTime() == nil {
		t.Errorf("got a secret from %v to %v by %v", out.GetStartTime(), out.GetExpireTime(), out.GetDelivery())
	}
	var shown []struct {
		Description, Value, ValueDisplay string
		Expiration                       time.Time
	}
	r.shown("/clients/invoices/secrets/", &shown)
	if s := shown[0]; len(shown) != 2 || s.Description != "the new one" || !s.Expiration.Equal(end) || !strings.HasPrefix(out.GetValue(), s.ValueDisplay) {
		t.Errorf("the stand-in has %+v", shown)
	}
	r.configure(func(c *vantage.Config) { c.ClientSecrets = []broker.Secret{broker.NewSecret(out.GetValue())} })
	if _, err := r.tokens().IssueToken(within(t, 10*time.Second), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Errorf("the new secret does not work: %v", err)
	}
	if strings.Contains(r.log.String(), out.GetValue()) {
		t.Error("the secret is in the log")
	}
}

func TestSecretWithoutEndLivesSixMonths(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.asAdministrator()
	out, err := r.admin().CreateClientSecret(within(t, 10*time.Second), &pb.CreateClientSecretRequest{Profile: "invoices", ClientId: "invoices"})
	if err != nil {
		t.Fatal(err)
	}
	if start, end := out.GetStartTime().AsTime(), out.GetExpireTime().AsTime(); !end.Equal(start.AddDate(0, 6, 0)) {
		t.Errorf("the secret lives from %v to %v", start, end)
	}
}

func TestClientAdministrationIsRefused(t *testing.T) {
	fromNow := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(time.Now().Add(d)) }
	anonymous := func(profiles ...string) []access.Rule {
		return []access.Rule{{Callers: []string{"anonymous"}, Profiles: profiles, Allow: []string{"admin"}}}
	}
	client := &pb.CreateClientRequest{Profile: "invoices", ClientId: "c", AllowedGrantTypes: []string{"client_credentials"}}
	secret := &pb.CreateClientSecretRequest{Profile: "invoices", ClientId: "invoices"}
	changed := func(change func(*pb.CreateClientSecretRequest)) *pb.CreateClientSecretRequest {
		c := proto.CloneOf(secret)
		change(c)
		return c
	}
	for name, tc := range map[string]struct {
		policy  []access.Rule
		prepare func(*rig)
		client  *pb.CreateClientRequest
		secret  *pb.CreateClientSecretRequest
		code    codes.Code
		reason  string
		field   string
		about   string
	}{
		"no tenant":             {prepare: func(r *rig) { r.configure(nil) }, client: client, code: codes.InvalidArgument, reason: "INVALID_REQUEST", field: "tenant_id", about: "invoices"},
		"not its administrator": {prepare: func(r *rig) { r.configure(func(c *vantage.Config) { c.TenantID = sandbox.DemoTenant }) }, client: client, code: codes.FailedPrecondition, reason: "CREDENTIALS_REJECTED", about: "invoices"},
		"exists":                {client: &pb.CreateClientRequest{Profile: "invoices", ClientId: "invoices", AllowedGrantTypes: []string{"client_credentials"}}, code: codes.InvalidArgument, reason: "INVALID_REQUEST", about: "invoices"},
		"no grant":              {client: &pb.CreateClientRequest{Profile: "invoices", ClientId: "c"}, code: codes.InvalidArgument, reason: "INVALID_REQUEST", field: "allowed_grant_types"},
		"foreign grant":         {client: &pb.CreateClientRequest{Profile: "invoices", ClientId: "c", AllowedGrantTypes: []string{"implicit"}}, code: codes.InvalidArgument, reason: "INVALID_REQUEST", field: "allowed_grant_types[0]"},
		"part of a second":      {client: &pb.CreateClientRequest{Profile: "invoices", ClientId: "c", AllowedGrantTypes: []string{"password"}, AccessTokenLifetime: durationpb.New(time.Minute + 1)}, code: codes.InvalidArgument, reason: "INVALID_REQUEST", field: "access_token_lifetime", about: "invoices"},
		"lives too long":        {client: &pb.CreateClientRequest{Profile: "invoices", ClientId: "c", AllowedGrantTypes: []string{"password"}, RefreshTokenLifetime: durationpb.New(367 * day)}, code: codes.InvalidArgument, reason: "INVALID_REQUEST", field: "refresh_token_lifetime"},
		"throttled":             {prepare: adminFault(sandbox.Fault{Status: 429, Headers: map[string]string{"Retry-After": "9"}}), client: client, code: codes.ResourceExhausted, reason: "ENDPOINT_THROTTLED", about: "invoices"},
		"answer lost":           {prepare: adminFault(sandbox.Fault{Cut: sandbox.CutAfter}), secret: secret, code: codes.Unavailable, reason: "ENDPOINT_UNAVAILABLE", about: "invoices"},
		"no value":              {prepare: adminFault(sandbox.Fault{Body: "{}"}), secret: secret, code: codes.Unavailable, reason: "ENDPOINT_UNAVAILABLE", about: "invoices"},
		"unknown client":        {secret: changed(func(r *pb.CreateClientSecretRequest) { r.ClientId = "nobody" }), code: codes.InvalidArgument, reason: "INVALID_REQUEST", about: "invoices"},
		"ends too soon":         {secret: changed(func(r *pb.CreateClientSecretRequest) { r.ExpireTime = fromNow(day - time.Minute) }), code: codes.InvalidArgument, reason: "INVALID_REQUEST", field: "expire_time"},
		"ends too late":         {secret: changed(func(r *pb.CreateClientSecretRequest) { r.ExpireTime = fromNow(1097 * day) }), code: codes.InvalidArgument, reason: "INVALID_REQUEST", field: "expire_time"},
		"lives less than a day": {secret: changed(func(r *pb.CreateClientSecretRequest) {
			r.StartTime, r.ExpireTime = fromNow(2*day), fromNow(3*day-time.Hour)
		}), code: codes.InvalidArgument, reason: "INVALID_REQUEST", field: "expire_time", about: "invoices"},
		"not allowed":            {policy: anonymous("other"), client: client, code: codes.PermissionDenied, reason: "CALLER_DENIED", about: "invoices"},
		"not allowed to deliver": {policy: anonymous("invoices"), secret: changed(func(r *pb.CreateClientSecretRequest) { r.DeliverToProfile = "other" }), code: codes.PermissionDenied, reason: "CALLER_DENIED", about: "other"},
		"delivered to nobody":    {secret: changed(func(r *pb.CreateClientSecretRequest) { r.DeliverToProfile = "nobody" }), code: codes.PermissionDenied, reason: "CALLER_DENIED", about: "nobody"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, rigOptions{policy: tc.policy})
			r.asAdministrator("other")
			if tc.prepare != nil {
				tc.prepare(r)
			}
			var err error
			if tc.client != nil {
				_, err = r.admin().CreateClient(within(t, 10*time.Second), tc.client)
			} else {
				_, err = r.admin().CreateClientSecret(within(t, 10*time.Second), tc.secret)
			}
			d := wantFailure(t, err, tc.code, tc.reason, tc.about)
			if tc.field != "" && (len(d.fields) != 1 || d.fields[0] != tc.field) {
				t.Errorf("the wrong fields are %v, want %s", d.fields, tc.field)
			}
			if (d.retry != nil) != (name == "throttled") {
				t.Errorf("retry: %v", d.retry)
			}
		})
	}
}

func adminFault(f sandbox.Fault) func(*rig) {
	f.Path = "/api/adminapi2"
	return func(r *rig) { r.fault(f) }
}

// TestCreationIsNeverRepeated loses the answer: the client exists, once.
func TestCreationIsNeverRepeated(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.asAdministrator()
	adminFault(sandbox.Fault{Cut: sandbox.CutAfter})(r)
	_, err := r.admin().CreateClientSecret(within(t, 10*time.Second), &pb.CreateClientSecretRequest{Profile: "invoices", ClientId: "invoices", Description: "lost"})
	if d := detailsOf(err); !strings.Contains(d.text, "may exist") || !strings.Contains(d.text, "lost") || d.retry != nil {
		t.Errorf("got %v %q", d.code, d.text)
	}
	var shown []any
	if r.shown("/clients/invoices/secrets/", &shown); len(shown) != 2 {
		t.Errorf("the client has %d secrets, want the first and the lost one", len(shown))
	}
}

// rotating has the profile invoices renew its secret, by the right of admin.
func (r *rig) rotating() {
	config := func(name, client string, secrets ...broker.Secret) *broker.Profile {
		p, err := vantage.NewProfile(vantage.Config{BaseURL: r.url, TenantID: sandbox.DemoTenant, ProfileConfig: oauth.ProfileConfig{
			Name: name, ClientID: client, FingerprintKey: []byte("a key of thirty-two bytes, fixed"),
			ClientSecrets: append(secrets, broker.NewSecret(r.vantage.ClientSecret(client))), Scopes: []string{"openid", "permissions"},
		}})
		if err != nil {
			r.t.Fatal(err)
		}
		return p
	}
	rotated := config("invoices", "invoices")
	rotated.Rotation = &broker.SecretRotation{
		Before: 30 * day, Lifetime: 100 * day, AdminProfile: "admin",
		With: func(s []broker.Secret) (*broker.Profile, error) { return config("invoices", "invoices", s...), nil },
	}
	r.broker.Configure([]*broker.Profile{rotated, config("admin", "admin"), config("plain", "invoices")})
}

func TestRotateClientSecret(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.rotating()
	rotate := func(q *pb.RotateClientSecretRequest) *pb.RotateClientSecretResponse {
		t.Helper()
		out, err := r.admin().RotateClientSecret(within(t, 10*time.Second), q)
		if err != nil {
			t.Fatal(err)
		}
		if out.GetDelivery() != pb.SecretDelivery_SECRET_DELIVERY_STORE || out.GetStartTime() == nil {
			t.Errorf("got %v", out)
		}
		return out
	}
	first := rotate(&pb.RotateClientSecretRequest{Profile: "invoices"})
	if life := time.Until(first.GetExpireTime().AsTime()); life < 99*day || life > 100*day || first.GetPreviousExpireTime() != nil {
		t.Errorf("got %v, want the lifetime of the configuration", first)
	}
	end := time.Now().Add(2 * day).Truncate(time.Millisecond)
	second := rotate(&pb.RotateClientSecretRequest{Profile: "invoices", AdminProfile: "admin", ExpireTime: timestamppb.New(end)})
	if !second.GetExpireTime().AsTime().Equal(end) || !second.GetPreviousExpireTime().AsTime().Equal(first.GetExpireTime().AsTime()) {
		t.Errorf("got %v after %v", second, first)
	}
	if err := r.vantage.SetClientSecret("invoices", "another"); err != nil { // none of before is left
		t.Fatal(err)
	}
	_, err := r.tokens().IssueToken(within(t, 10*time.Second), &pb.IssueTokenRequest{Profile: "invoices", Scopes: []string{"openid"}})
	if d := detailsOf(err); d.info.Reason != "CREDENTIALS_REJECTED" || !strings.Contains(d.text, "each of the 3 client secrets") {
		t.Errorf("got %v %q, want each of the secrets refused", d.info.Reason, d.text)
	}
}

func TestRotationIsRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		request *pb.RotateClientSecretRequest
		code    codes.Code
		reason  string
		about   string
	}{
		"nowhere to put it":    {&pb.RotateClientSecretRequest{Profile: "plain", AdminProfile: "admin"}, codes.InvalidArgument, "INVALID_REQUEST", "plain"},
		"no administrator":     {&pb.RotateClientSecretRequest{Profile: "invoices", AdminProfile: "plain"}, codes.FailedPrecondition, "CREDENTIALS_REJECTED", "invoices"},
		"no such profile":      {&pb.RotateClientSecretRequest{Profile: "nobody"}, codes.PermissionDenied, "CALLER_DENIED", "nobody"},
		"admin is not allowed": {&pb.RotateClientSecretRequest{Profile: "invoices", AdminProfile: "secret"}, codes.PermissionDenied, "CALLER_DENIED", "secret"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, rigOptions{policy: []access.Rule{{Callers: []string{"anonymous"}, Profiles: []string{"invoices", "plain", "admin", "nobody"}, Allow: []string{"admin", "issue"}}}})
			r.rotating()
			_, err := r.admin().RotateClientSecret(within(t, 10*time.Second), tc.request)
			wantFailure(t, err, tc.code, tc.reason, tc.about)
			if _, err := r.tokens().IssueToken(within(t, 10*time.Second), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
				t.Errorf("the profile does not go on: %v", err)
			}
		})
	}
}
