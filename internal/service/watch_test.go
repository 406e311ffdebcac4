package service_test

import (
	"testing"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

func TestWatchTokenSendsTheCurrentTokenAndItsSuccessor(t *testing.T) {
	r := newRig(t, rigOptions{})
	client := r.tokens()
	stream, err := client.WatchToken(t.Context(), &pb.WatchTokenRequest{Profile: "invoices"})
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.RevokeToken(t.Context(), &pb.RevokeTokenRequest{Profile: "invoices"}); err != nil {
		t.Fatal(err)
	}
	second, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if first.GetToken().GetId() == second.GetToken().GetId() {
		t.Errorf("got %s twice", first.GetToken().GetId())
	}
	r.wantRequests(2)
}
