package service_test

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/vantage"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

const consolePage = "https://broker.example.com/profiles/invoices"

// people makes the profile one that a person signs in for.
func (r *rig) people() {
	r.t.Helper()
	r.configure(func(c *vantage.Config) {
		c.GrantType, c.ClientID = broker.AuthorizationCode, "review"
		c.ClientSecrets = []broker.Secret{broker.NewSecret(r.vantage.ClientSecret("review"))}
		c.RedirectURL, c.ConsoleURL = "http://127.0.0.1:7444/oauth/callback", consolePage
		c.Scopes = append(c.Scopes, "offline_access")
	})
}

func (r *rig) starts() *pb.StartAuthorizationResponse {
	r.t.Helper()
	started, err := r.admin().StartAuthorization(r.t.Context(), &pb.StartAuthorizationRequest{Profile: "invoices"})
	if err != nil {
		r.t.Fatal(err)
	}
	return started
}

// visits signs that user in on the page, and returns what the browser brings back.
func (r *rig) visits(address, user string) *pb.CompleteAuthorizationRequest {
	r.t.Helper()
	form := url.Values{"username": {user}, "password": {sandbox.DemoPassword}, "action": {"allow"}}
	request, err := http.NewRequestWithContext(r.t.Context(), http.MethodPost, address, strings.NewReader(form.Encode()))
	if err != nil {
		r.t.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	response, err := http.DefaultTransport.RoundTrip(request) // which follows no redirect
	if err != nil {
		r.t.Fatal(err)
	}
	defer response.Body.Close()
	back, err := response.Location()
	if err != nil {
		r.t.Fatalf("the page answered %d: %v", response.StatusCode, err)
	}
	q := back.Query()
	return &pb.CompleteAuthorizationRequest{State: q.Get("state"), Code: q.Get("code"), Iss: q.Get("iss")}
}

func (r *rig) completes(c *pb.CompleteAuthorizationRequest) *pb.Profile {
	r.t.Helper()
	completed, err := r.admin().CompleteAuthorization(r.t.Context(), c)
	if err != nil {
		r.t.Fatal(err)
	}
	return completed.GetProfile()
}

func (r *rig) exchanges() (n int) {
	for _, times := range r.vantage.Calls().Codes {
		n += times
	}
	return n
}

func TestPersonSignsIn(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.people()
	_, err := r.tokens().IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
	d := wantFailure(t, err, codes.FailedPrecondition, "AUTHORIZATION_REQUIRED", "invoices")
	if d.info.Metadata["console_url"] != consolePage || !strings.Contains(d.text, consolePage) || !strings.Contains(d.text, "'broker authorize invoices'") {
		t.Errorf("it says %q with %v", d.text, d.info.Metadata)
	}
	started := r.starts()
	if left := time.Until(started.GetExpireTime().AsTime()); left > 10*time.Minute || left < 9*time.Minute {
		t.Errorf("the sign-in may take %v", left)
	}
	back := r.visits(started.GetAuthorizationUrl(), "reviewer@example.com")
	before := time.Now()
	p := r.completes(back)
	if back.GetState() != started.GetState() || p.GetState() != pb.State_STATE_READY || p.GetConsentAccount() != "reviewer@example.com" {
		t.Errorf("profile %v", p)
	}
	begins, ends := p.GetConsentStartTime().AsTime(), p.GetConsentEndTime().AsTime()
	if begins.Before(before.Add(-time.Second)) || begins.After(time.Now()) || ends.Sub(begins).Round(time.Second) != 30*24*time.Hour {
		t.Errorf("the consent lasts from %v to %v", begins, ends)
	}
	if p.GetLastCaller() != "" || p.GetLastCallTime() != nil {
		t.Errorf("last call by %q", p.GetLastCaller())
	}
	token, err := r.tokens().IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
	if err != nil {
		t.Fatal(err)
	}
	got, err := r.admin().GetProfile(t.Context(), &pb.GetProfileRequest{Profile: "invoices"})
	if err != nil || got.GetProfile().GetLastCaller() != "anonymous" || time.Since(got.GetProfile().GetLastCallTime().AsTime()) > 10*time.Second {
		t.Errorf("last call by %q at %v, %v", got.GetProfile().GetLastCaller(), got.GetProfile().GetLastCallTime(), err)
	}
	_, err = r.admin().CompleteAuthorization(t.Context(), back)
	if d := wantFailure(t, err, codes.InvalidArgument, "INVALID_REQUEST", ""); len(d.fields) != 1 || d.fields[0] != "state" || d.retry != nil {
		t.Errorf("fields %v, retry %v", d.fields, d.retry)
	}
	if n := r.exchanges(); n != 1 {
		t.Errorf("codes were exchanged %d times", n)
	}
	for _, secret := range []string{back.GetState(), back.GetCode(), token.GetToken().GetAccessToken()} {
		if strings.Contains(r.log.String(), secret) {
			t.Error("a secret of the sign-in is in the log")
		}
	}
}

func TestCodeThatCameBackFromElsewhere(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.people()
	one, other := r.visits(r.starts().GetAuthorizationUrl(), "reviewer@example.com"), r.visits(r.starts().GetAuthorizationUrl(), "reviewer@example.com")
	one.Code, other.Code = other.GetCode(), one.GetCode() // PKCE: each is for its own verifier
	_, err := r.admin().CompleteAuthorization(t.Context(), one)
	wantFailure(t, err, codes.FailedPrecondition, "AUTHORIZATION_REQUIRED", "invoices")
	other.Iss = "https://evil.example.com"
	_, err = r.admin().CompleteAuthorization(t.Context(), other)
	if d := wantFailure(t, err, codes.InvalidArgument, "INVALID_REQUEST", "invoices"); len(d.fields) != 1 || d.fields[0] != "iss" {
		t.Errorf("fields %v", d.fields)
	}
	if n := r.exchanges(); n != 1 {
		t.Errorf("codes were exchanged %d times", n)
	}
}

func TestAnotherAccountNeedsToBeToldSo(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.people()
	r.completes(r.visits(r.starts().GetAuthorizationUrl(), "reviewer@example.com"))
	token, err := r.tokens().IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.admin().CompleteAuthorization(t.Context(), r.visits(r.starts().GetAuthorizationUrl(), "operator@example.com"))
	d := wantFailure(t, err, codes.InvalidArgument, "INVALID_REQUEST", "invoices")
	if len(d.fields) != 1 || d.fields[0] != "replace_account" || !strings.Contains(d.text, "reviewer@example.com") || !strings.Contains(d.text, "operator@example.com") {
		t.Errorf("it says %q about %v", d.text, d.fields)
	}
	if n := r.vantage.Calls().Revocations["revoked"]; n == 0 {
		t.Error("what the other account gave was not revoked")
	}
	still, err := r.tokens().IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
	if err != nil || still.GetToken().GetId() != token.GetToken().GetId() {
		t.Errorf("%v, %v", still.GetToken().GetId(), err)
	}
	back := r.visits(r.starts().GetAuthorizationUrl(), "operator@example.com")
	back.ReplaceAccount = true
	if p := r.completes(back); p.GetConsentAccount() != "operator@example.com" {
		t.Errorf("account %q", p.GetConsentAccount())
	}
}

func TestSignInNeedsAdmin(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.people()
	back := r.visits(r.starts().GetAuthorizationUrl(), "reviewer@example.com")
	policy, err := access.NewPolicy([]access.Rule{{Callers: []string{"anonymous"}, Profiles: []string{"*"}, Allow: []string{"issue", "refresh", "revoke"}}})
	if err != nil {
		t.Fatal(err)
	}
	r.access.Use(policy)
	_, err = r.admin().StartAuthorization(t.Context(), &pb.StartAuthorizationRequest{Profile: "invoices"})
	wantFailure(t, err, codes.PermissionDenied, "CALLER_DENIED", "invoices")
	_, err = r.admin().CompleteAuthorization(t.Context(), back)
	real := wantFailure(t, err, codes.InvalidArgument, "INVALID_REQUEST", "")
	back.State = "invented"
	_, err = r.admin().CompleteAuthorization(t.Context(), back)
	invented := wantFailure(t, err, codes.InvalidArgument, "INVALID_REQUEST", "")
	if real.text != invented.text {
		t.Errorf("%q tells of a profile that is hidden, as opposed to %q", real.text, invented.text)
	}
	if n := r.exchanges(); n != 0 {
		t.Errorf("codes were exchanged %d times", n)
	}
}

func TestSignInIsForProfilesThatNeedIt(t *testing.T) {
	r := newRig(t, rigOptions{})
	_, err := r.admin().StartAuthorization(t.Context(), &pb.StartAuthorizationRequest{Profile: "invoices"})
	if d := wantFailure(t, err, codes.InvalidArgument, "INVALID_REQUEST", "invoices"); len(d.fields) != 1 || d.fields[0] != "profile" {
		t.Errorf("fields %v", d.fields)
	}
}
