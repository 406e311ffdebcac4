package service_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/tokenbroker/tokenbroker/internal/vantage"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

func dedicated(id string) *pb.Job { return &pb.Job{Id: id, Dedicated: true} }

func TestADedicatedJobHasATokenOfItsOwn(t *testing.T) {
	r := newRig(t, rigOptions{})
	client := r.tokens()
	issue := func(j *pb.Job) string {
		t.Helper()
		out, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices", Job: j})
		if err != nil {
			t.Fatal(err)
		}
		return out.GetToken().GetId()
	}
	shared, nightly, weekly := issue(nil), issue(dedicated("nightly")), issue(dedicated("weekly"))
	if shared == nightly || shared == weekly || nightly == weekly {
		t.Errorf("all: %s, nightly: %s, weekly: %s", shared, nightly, weekly)
	}
	for range 3 {
		if issue(nil) != shared || issue(&pb.Job{Id: "nightly"}) != shared || issue(dedicated("nightly")) != nightly || issue(dedicated("weekly")) != weekly {
			t.Error("somebody got another token")
		}
	}
	r.wantRequests(3)
	_, err := client.RefreshToken(t.Context(), &pb.RefreshTokenRequest{Profile: "invoices", Job: dedicated("nightly"), RejectedTokenId: nightly})
	wantFailure(t, err, codes.ResourceExhausted, "REFRESH_TOO_SOON", "invoices")
	out, err := client.RefreshToken(t.Context(), &pb.RefreshTokenRequest{Profile: "invoices", Job: dedicated("nightly"), RejectedTokenId: shared})
	if err != nil || out.GetToken().GetId() != nightly {
		t.Errorf("a report of another token: %v, %v", out, err)
	}
}

func TestADedicatedJobEndsWithRevokeToken(t *testing.T) {
	r := newRig(t, rigOptions{})
	client := r.tokens()
	stream, err := client.WatchToken(t.Context(), &pb.WatchTokenRequest{Profile: "invoices", Job: dedicated("nightly")})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	id := first.GetToken().GetId()
	revoke := func(tokenID string) *pb.RevokeTokenResponse {
		t.Helper()
		out, err := client.RevokeToken(t.Context(), &pb.RevokeTokenRequest{Profile: "invoices", Job: dedicated("nightly"), TokenId: tokenID})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	if out := revoke("0123456789abcdef"); out.GetTokenId() != "" || out.GetOutcome() != pb.RevocationOutcome_REVOCATION_OUTCOME_DROPPED {
		t.Errorf("revoking another token: %v", out)
	}
	if out := revoke(id); out.GetTokenId() != id || out.GetOutcome() != pb.RevocationOutcome_REVOCATION_OUTCOME_CONFIRMED {
		t.Errorf("revoking: %v", out)
	}
	_, err = stream.Recv()
	wantFailure(t, err, codes.FailedPrecondition, "JOB_ENDED", "invoices")
	_, err = client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices", Job: dedicated("nightly")})
	wantFailure(t, err, codes.FailedPrecondition, "JOB_ENDED", "invoices")
	_, err = client.RefreshToken(t.Context(), &pb.RefreshTokenRequest{Profile: "invoices", Job: dedicated("nightly"), RejectedTokenId: id})
	wantFailure(t, err, codes.FailedPrecondition, "JOB_ENDED", "invoices")
	if out := revoke(""); out.GetTokenId() != "" || out.GetOutcome() != pb.RevocationOutcome_REVOCATION_OUTCOME_DROPPED {
		t.Errorf("revoking again: %v", out)
	}
	if _, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices", Job: &pb.Job{Id: "nightly"}}); err != nil {
		t.Errorf("the job asks for the token that all share: %v", err)
	}
	r.wantRequests(2)
	if got := r.vantage.Calls().Revocations["revoked"]; got != 1 {
		t.Errorf("the server revoked %d tokens, want 1", got)
	}
}

func TestADedicatedJobGetsNoTokenThatOthersHave(t *testing.T) {
	r := newRig(t, rigOptions{})
	client := r.tokens()
	shared, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
	if err != nil {
		t.Fatal(err)
	}
	r.fault(sandbox.Fault{Times: -1, Status: 200, Headers: map[string]string{"Content-Type": "application/json"},
		Body: fmt.Sprintf(`{"access_token":%q,"token_type":"Bearer","expires_in":3600}`, shared.GetToken().GetAccessToken())})
	_, err = client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices", Job: dedicated("nightly")})
	wantFailure(t, err, codes.FailedPrecondition, "DEDICATED_UNAVAILABLE", "invoices")
	again, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
	if err != nil || again.GetToken().GetId() != shared.GetToken().GetId() {
		t.Errorf("who had it has lost it: %v, %v", again, err)
	}
	if got := r.vantage.Calls().Revocations["revoked"]; got != 0 {
		t.Errorf("the server revoked %d tokens", got)
	}
}

func TestALifeThatNoTokenHasIsRefusedAtOnce(t *testing.T) {
	r := newRig(t, rigOptions{})
	client := r.tokens()
	for i := range 50 {
		_, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{
			Profile: "invoices", Job: dedicated(fmt.Sprint(i)), MinLifetime: durationpb.New(time.Duration(i+2000) * time.Hour),
		})
		wantFailure(t, err, codes.FailedPrecondition, "LIFETIME_UNAVAILABLE", "invoices")
		if !strings.Contains(err.Error(), " in all; ask for ") {
			t.Errorf("it does not say what to ask for: %v", err)
		}
	}
	r.wantRequests(1)
}

func TestJobsAreCounted(t *testing.T) {
	r := newRig(t, rigOptions{change: func(c *vantage.Config) { c.Timeout = 5 * time.Second }})
	client := r.tokens()
	for _, j := range []*pb.Job{nil, {Id: "a"}, {Id: "b"}, dedicated("a"), dedicated("b"), dedicated("b")} {
		if _, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices", Job: j}); err != nil {
			t.Fatal(err)
		}
	}
	s, err := r.broker.Glance("invoices")
	if err != nil || s.Named != 2 || s.Dedicated != 3 || s.DedicatedTokens != 2 {
		t.Errorf("%d named, %d dedicated, %d tokens, %v", s.Named, s.Dedicated, s.DedicatedTokens, err)
	}
}
