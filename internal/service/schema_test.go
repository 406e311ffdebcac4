package service_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"buf.build/go/protovalidate"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	tokenbrokerv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// The time at which the rules are judged.
var now = time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)

func newValidator(t testing.TB) protovalidate.Validator {
	t.Helper()
	validator, err := protovalidate.New()
	if err != nil {
		t.Fatal(err)
	}
	return validator
}

// wrong returns the fields that the rules find fault with, "" being the whole message.
func wrong(t *testing.T, validator protovalidate.Validator, message proto.Message) []string {
	t.Helper()
	err := validator.Validate(message, protovalidate.WithNowFunc(func() *timestamppb.Timestamp { return timestamppb.New(now) }))
	if err == nil {
		return nil
	}
	var invalid *protovalidate.ValidationError
	if !errors.As(err, &invalid) {
		t.Fatalf("the rules cannot be applied: %v", err)
	}
	var fields []string
	for _, violation := range invalid.Violations {
		fields = append(fields, protovalidate.FieldPathString(violation.Proto.GetField()))
	}
	return fields
}

func TestSchemaOfRequests(t *testing.T) {
	validator := newValidator(t)
	in := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(d)) }
	const day = 24 * time.Hour
	hundred := make([]string, 101)
	for i := range hundred {
		hundred[i] = fmt.Sprintf("scope-%d", i)
	}
	issue := func(change func(*tokenbrokerv1.IssueTokenRequest)) proto.Message {
		request := &tokenbrokerv1.IssueTokenRequest{Profile: "invoices"}
		change(request)
		return request
	}
	profile := func(name string) proto.Message { return &tokenbrokerv1.IssueTokenRequest{Profile: name} }
	scopes := func(scopes ...string) proto.Message {
		return issue(func(r *tokenbrokerv1.IssueTokenRequest) { r.Scopes = scopes })
	}
	lifetime := func(d time.Duration) proto.Message {
		return issue(func(r *tokenbrokerv1.IssueTokenRequest) { r.MinLifetime = durationpb.New(d) })
	}
	job := func(id string, dedicated bool) proto.Message {
		return issue(func(r *tokenbrokerv1.IssueTokenRequest) { r.Job = &tokenbrokerv1.Job{Id: id, Dedicated: dedicated} })
	}
	refresh := func(id string) proto.Message {
		return &tokenbrokerv1.RefreshTokenRequest{Profile: "p", RejectedTokenId: id}
	}
	revoke := func(id string) proto.Message { return &tokenbrokerv1.RevokeTokenRequest{Profile: "p", TokenId: id} }
	client := func(change func(*tokenbrokerv1.CreateClientRequest)) proto.Message {
		request := &tokenbrokerv1.CreateClientRequest{Profile: "p", ClientId: "c", AllowedGrantTypes: []string{"client_credentials"}}
		change(request)
		return request
	}
	secret := func(change func(*tokenbrokerv1.CreateClientSecretRequest)) proto.Message {
		request := &tokenbrokerv1.CreateClientSecretRequest{Profile: "p", ClientId: "c"}
		change(request)
		return request
	}
	expires := func(d time.Duration) proto.Message {
		return secret(func(r *tokenbrokerv1.CreateClientSecretRequest) { r.ExpireTime = in(d) })
	}

	for name, test := range map[string]struct {
		request proto.Message
		want    []string
	}{
		"profile of one letter":  {profile("a"), nil},
		"profile of 64":          {profile(strings.Repeat("a", 64)), nil},
		"profile with all kinds": {profile("0a.b_c-9"), nil},
		"no profile":             {profile(""), []string{"profile"}},
		"profile of 65":          {profile(strings.Repeat("a", 65)), []string{"profile"}},
		"profile with capital":   {profile("Invoices"), []string{"profile"}},
		"profile with slash":     {profile("a/b"), []string{"profile"}},
		"profile with line end":  {profile("a\n"), []string{"profile"}},
		"profile ends in dash":   {profile("a-"), []string{"profile"}},

		"scopes":                {scopes("openid", "global.wildcard", "https://example.com/a[b]!#~"), nil},
		"100 scopes":            {scopes(hundred[:100]...), nil},
		"101 scopes":            {scopes(hundred...), []string{"scopes"}},
		"scope twice":           {scopes("a", "b", "a"), []string{"scopes"}},
		"empty scope":           {scopes(""), []string{"scopes[0]"}},
		"scope with space":      {scopes("a", "b c"), []string{"scopes[1]"}},
		"scope with quote":      {scopes(`a"`), []string{"scopes[0]"}},
		"scope with backslash":  {scopes(`a\`), []string{"scopes[0]"}},
		"scope beyond ASCII":    {scopes("é"), []string{"scopes[0]"}},
		"scope of 256":          {scopes(strings.Repeat("s", 256)), nil},
		"scope of 257":          {scopes(strings.Repeat("s", 257)), []string{"scopes[0]"}},
		"no lifetime":           {lifetime(0), nil},
		"a lifetime":            {lifetime(time.Hour), nil},
		"366 days":              {lifetime(366 * day), nil},
		"more than 366 days":    {lifetime(366*day + 1), []string{"min_lifetime"}},
		"negative lifetime":     {lifetime(-1), []string{"min_lifetime"}},
		"job":                   {job("nightly 2026-01-31/17", false), nil},
		"job without id":        {job("", false), nil},
		"dedicated job":         {job("nightly", true), nil},
		"dedicated without id":  {job("", true), []string{"job"}},
		"job of 128":            {job(strings.Repeat("j", 128), true), nil},
		"job of 129":            {job(strings.Repeat("j", 129), true), []string{"job.id"}},
		"job with line end":     {job("a\nb", false), []string{"job.id"}},
		"job with space at end": {job("a ", false), []string{"job.id"}},

		"refresh":              {refresh("0123456789abcdef"), nil},
		"refresh of nothing":   {refresh(""), []string{"rejected_token_id"}},
		"refresh with capital": {refresh("0123456789ABCDEF"), []string{"rejected_token_id"}},
		"refresh with a token": {refresh("eyJhbGciOiJSUzI1NiJ9.e30.x"), []string{"rejected_token_id"}},
		"revoke the current":   {revoke(""), nil},
		"revoke that":          {revoke("0123456789abcdef"), nil},
		"revoke 15 digits":     {revoke("0123456789abcde"), []string{"token_id"}},
		"watch":                {&tokenbrokerv1.WatchTokenRequest{Profile: "p"}, nil},
		"watch nothing":        {&tokenbrokerv1.WatchTokenRequest{}, []string{"profile"}},
		"who am I":             {&tokenbrokerv1.WhoAmIRequest{}, nil},

		"list":            {&tokenbrokerv1.ListProfilesRequest{}, nil},
		"list 1000":       {&tokenbrokerv1.ListProfilesRequest{PageSize: 1000}, nil},
		"list 1001":       {&tokenbrokerv1.ListProfilesRequest{PageSize: 1001}, []string{"page_size"}},
		"list -1":         {&tokenbrokerv1.ListProfilesRequest{PageSize: -1}, []string{"page_size"}},
		"long page token": {&tokenbrokerv1.ListProfilesRequest{PageToken: strings.Repeat("x", 257)}, []string{"page_token"}},
		"get nothing":     {&tokenbrokerv1.GetProfileRequest{}, []string{"profile"}},
		"start nothing":   {&tokenbrokerv1.StartAuthorizationRequest{}, []string{"profile"}},
		"reset nothing":   {&tokenbrokerv1.ResetProfileRequest{}, []string{"profile"}},
		"complete":        {&tokenbrokerv1.CompleteAuthorizationRequest{State: "s", Code: "c", Iss: "https://i"}, nil},
		"complete nothing": {
			&tokenbrokerv1.CompleteAuthorizationRequest{}, []string{"code", "state"}},
		"complete too much": {
			&tokenbrokerv1.CompleteAuthorizationRequest{State: strings.Repeat("s", 513), Code: strings.Repeat("c", 4097), Iss: strings.Repeat("i", 2049)},
			[]string{"code", "iss", "state"}},

		"client": {client(func(*tokenbrokerv1.CreateClientRequest) {}), nil},
		"client with everything": {client(func(r *tokenbrokerv1.CreateClientRequest) {
			r.TenantId = "01234567-89ab-cdef-0123-456789abcdef"
			r.ClientName = "Überweisungen"
			r.AllowedGrantTypes = []string{"authorization_code", "password", "client_credentials"}
			r.AllowedScopes = []string{"openid", "permissions", "publicapi.all"}
			r.RedirectUris = []string{"https://broker.example.com/oauth/callback"}
			r.PostLogoutRedirectUris = []string{"https://broker.example.com/"}
			r.AllowedCorsOrigins = []string{"https://app.example.com"}
			r.RequireClientSecret = proto.Bool(false)
			r.AccessTokenLifetime = durationpb.New(day)
			r.RefreshTokenLifetime = durationpb.New(30 * day)
		}), nil},
		"client of nothing":       {&tokenbrokerv1.CreateClientRequest{}, []string{"allowed_grant_types", "client_id", "profile"}},
		"client with a new grant": {client(func(r *tokenbrokerv1.CreateClientRequest) { r.AllowedGrantTypes = []string{"implicit"} }), []string{"allowed_grant_types[0]"}},
		"client without redirect": {client(func(r *tokenbrokerv1.CreateClientRequest) { r.AllowedGrantTypes = []string{"authorization_code"} }), []string{""}},
		"client's token too short": {client(func(r *tokenbrokerv1.CreateClientRequest) {
			r.AccessTokenLifetime = durationpb.New(59 * time.Second)
		}), []string{"access_token_lifetime"}},
		"client climbs":          {client(func(r *tokenbrokerv1.CreateClientRequest) { r.ClientId = ".." }), []string{"client_id"}},
		"client's tenant climbs": {client(func(r *tokenbrokerv1.CreateClientRequest) { r.TenantId = "../x" }), []string{"tenant_id"}},
		"client's redirect is relative": {client(func(r *tokenbrokerv1.CreateClientRequest) {
			r.RedirectUris = []string{"/callback"}
		}), []string{"redirect_uris[0]"}},
		"client's origin has a path": {client(func(r *tokenbrokerv1.CreateClientRequest) {
			r.AllowedCorsOrigins = []string{"https://app.example.com/x"}
		}), []string{"allowed_cors_origins[0]"}},

		"secret":            {secret(func(*tokenbrokerv1.CreateClientSecretRequest) {}), nil},
		"secret of 1 day":   {expires(day), nil},
		"secret of 3 years": {expires(1096 * day), nil},
		"secret too short":  {expires(day - time.Second), []string{"expire_time"}},
		"secret too long":   {expires(1096*day + time.Second), []string{"expire_time"}},
		"secret starts too late": {secret(func(r *tokenbrokerv1.CreateClientSecretRequest) {
			r.StartTime, r.ExpireTime = in(3*day), in(2*day)
		}), []string{""}},
		"secret goes to a profile": {secret(func(r *tokenbrokerv1.CreateClientSecretRequest) { r.DeliverToProfile = "q" }), nil},
		"secret goes nowhere":      {secret(func(r *tokenbrokerv1.CreateClientSecretRequest) { r.DeliverToProfile = "Q" }), []string{"deliver_to_profile"}},
		"rotate":                   {&tokenbrokerv1.RotateClientSecretRequest{Profile: "p", AdminProfile: "q", ExpireTime: in(30 * day)}, nil},
		"rotate to the past":       {&tokenbrokerv1.RotateClientSecretRequest{Profile: "p", ExpireTime: in(-day)}, []string{"expire_time"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := wrong(t, validator, test.request)
			slices.Sort(got)
			if got = slices.Compact(got); !slices.Equal(got, test.want) {
				t.Errorf("got faults with %q, want %q", got, test.want)
			}
		})
	}
}

func BenchmarkSchemaOfIssueTokenRequest(b *testing.B) {
	validator := newValidator(b)
	for name, request := range map[string]*tokenbrokerv1.IssueTokenRequest{
		"plain": {Profile: "invoices"},
		"full": {
			Profile:     "invoices",
			Scopes:      []string{"openid", "permissions"},
			MinLifetime: durationpb.New(time.Minute),
			Job:         &tokenbrokerv1.Job{Id: "nightly", Dedicated: true},
		},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := validator.Validate(request); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
