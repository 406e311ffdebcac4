package service_test

import (
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

func TestRevokedTokenIsGone(t *testing.T) {
	r := newRig(t, rigOptions{})
	client := r.tokens()
	issue := func() *pb.Token {
		t.Helper()
		out, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
		if err != nil {
			t.Fatal(err)
		}
		return out.GetToken()
	}
	revoke := func(id string) *pb.RevokeTokenResponse {
		t.Helper()
		out, err := client.RevokeToken(t.Context(), &pb.RevokeTokenRequest{Profile: "invoices", TokenId: id})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	if out := revoke(""); out.GetTokenId() != "" || out.GetOutcome() != pb.RevocationOutcome_REVOCATION_OUTCOME_DROPPED {
		t.Errorf("revoking nothing: %v", out)
	}
	first := issue()
	if out := revoke(""); out.GetTokenId() != first.GetId() || out.GetOutcome() != pb.RevocationOutcome_REVOCATION_OUTCOME_CONFIRMED {
		t.Errorf("revoking the current one: %v", out)
	}
	second := issue()
	if second.GetId() == first.GetId() {
		t.Error("the revoked token was handed out again")
	}
	if revoke(first.GetId()); issue().GetId() != second.GetId() {
		t.Error("revoking an old token took the current one")
	}
	r.fault(sandbox.Fault{Path: "/auth2/connect/revocation", Status: 503})
	if out := revoke(second.GetId()); out.GetTokenId() != second.GetId() || out.GetOutcome() != pb.RevocationOutcome_REVOCATION_OUTCOME_DROPPED {
		t.Errorf("the server does not revoke: %v", out)
	}
	if issue().GetId() == second.GetId() {
		t.Error("the dropped token was handed out again")
	}
	if got := r.vantage.Calls().Revocations["revoked"]; got != 1 {
		t.Errorf("the server revoked %d tokens, want 1", got)
	}
	r.wantRequests(3)
	_, err := client.RevokeToken(t.Context(), &pb.RevokeTokenRequest{Profile: "nobody"})
	wantFailure(t, err, codes.PermissionDenied, "CALLER_DENIED", "nobody")
}
