package client_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/client"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// Every reason of the schema has its constant, and the other way round.
func TestReasons(t *testing.T) {
	ours := map[client.Reason]bool{
		client.ReasonInvalidRequest: true, client.ReasonCallerUnknown: true, client.ReasonCallerDenied: true, client.ReasonCredentialsRejected: true,
		client.ReasonAuthorizationRequired: true, client.ReasonLifetimeUnavailable: true, client.ReasonEndpointThrottled: true, client.ReasonRefreshTooSoon: true,
		client.ReasonCallerThrottled: true, client.ReasonEndpointUnavailable: true, client.ReasonStoreUnavailable: true, client.ReasonAuditUnavailable: true,
		client.ReasonIdentityUnavailable: true, client.ReasonShuttingDown: true, client.ReasonJobEnded: true, client.ReasonDedicatedUnavailable: true,
	}
	for number, name := range pb.ErrorReason_name {
		if short := client.Reason(strings.TrimPrefix(name, "ERROR_REASON_")); number != 0 && !ours[short] {
			t.Errorf("%s is not among the constants", short)
		} else {
			delete(ours, short)
		}
	}
	if len(ours) > 0 {
		t.Errorf("the schema does not have %v", ours)
	}
}

// A call of the stub fails with all that the broker said, also when gRPC has tried it
// several times.
func TestErrors(t *testing.T) {
	f := newFake(t)
	f.issue = func(*pb.IssueTokenRequest) (*pb.Token, error) {
		return nil, refusal(codes.Unavailable, client.ReasonEndpointUnavailable, 1500*time.Millisecond)
	}
	_, failed := f.client().Stub().IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
	if n := len(f.calls("IssueToken")); n != 4 {
		t.Errorf("%d attempts, the service config says 4", n)
	}
	e, ok := client.FromError(fmt.Errorf("paying: %w", failed))
	if !ok || e.Code != codes.Unavailable || e.Reason != client.ReasonEndpointUnavailable || e.Metadata["request_id"] != "r-1" ||
		e.RetryAfter != 1500*time.Millisecond || e.Message != "the broker says why" || !errors.Is(e, failed) {
		t.Errorf("got %#v", e)
	}
	found := false
	for _, d := range status.Convert(e).Details() {
		_, is := d.(*errdetails.RetryInfo)
		found = found || is
	}
	if again, ok := client.FromError(fmt.Errorf("paying: %w", e)); !found || !ok || again != e {
		t.Errorf("details %v; got %v", status.Convert(e).Details(), again)
	}
	for _, other := range []error{nil, errors.New("something else")} {
		if e, ok := client.FromError(other); ok {
			t.Errorf("%v is the broker's %v", other, e)
		}
	}
}

// A job that somebody else ends has no token any more, however long it would live.
func TestJobIsEnded(t *testing.T) {
	f := newFake(t)
	end := make(chan struct{})
	f.watch = func(_ *pb.WatchTokenRequest, tokens chan<- *pb.Token, _ context.Context) error {
		select {
		case <-end:
		default:
			tokens <- minuteOld("one")
			<-end
		}
		return refusal(codes.FailedPrecondition, client.ReasonJobEnded, 0)
	}
	s := f.client().TokenSource("invoices", client.WithDedicatedJob("j"))
	current, err := s.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	close(end)
	_, err = s.Next(t.Context(), current)
	wantReason(t, err, codes.FailedPrecondition, client.ReasonJobEnded)
	_, err = s.Token()
	wantReason(t, err, codes.FailedPrecondition, client.ReasonJobEnded)
}

// Revoking ends the token here, too.
func TestRevoke(t *testing.T) {
	f := newFake(t)
	ended := make(chan struct{})
	f.watch = func(_ *pb.WatchTokenRequest, tokens chan<- *pb.Token, _ context.Context) error {
		tokens <- minuteOld("one")
		<-ended
		return refusal(codes.FailedPrecondition, client.ReasonJobEnded, 0)
	}
	f.revoke = func(r *pb.RevokeTokenRequest) (*pb.RevokeTokenResponse, error) {
		if r.GetProfile() != "invoices" || r.GetJob().GetId() != "j" || !r.GetJob().GetDedicated() || fmt.Sprint(r.GetScopes()) != "[a]" {
			t.Errorf("revoked %v", r)
		}
		select {
		case <-ended:
			return nil, refusal(codes.Unavailable, client.ReasonStoreUnavailable, time.Hour)
		default:
		}
		close(ended)
		return &pb.RevokeTokenResponse{TokenId: idOf("one"), Outcome: pb.RevocationOutcome_REVOCATION_OUTCOME_CONFIRMED}, nil
	}
	s := f.client().TokenSource("invoices", client.WithScopes("a"), client.WithDedicatedJob("j"))
	want(t, s, "one")
	if confirmed, err := s.Revoke(t.Context()); !confirmed || err != nil {
		t.Fatal(confirmed, err)
	}
	_, err := s.Token()
	wantReason(t, err, codes.FailedPrecondition, client.ReasonJobEnded)
	_, err = s.Revoke(t.Context())
	wantReason(t, err, codes.Unavailable, client.ReasonStoreUnavailable)
}
