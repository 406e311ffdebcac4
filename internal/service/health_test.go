package service_test

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
)

func TestHealth(t *testing.T) {
	r := newRig(t, rigOptions{})
	health := healthpb.NewHealthClient(r.dial(nil))
	for _, service := range []string{"", "tokenbroker.v1.TokenBroker", "tokenbroker.v1.ProfileAdmin"} {
		h, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{Service: service})
		if err != nil || h.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("%q: %v, %v", service, h, err)
		}
	}
	if _, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "nothing"}); status.Code(err) != codes.NotFound {
		t.Errorf("an unknown service: %v", err)
	}
	r.service.Drain()
	h, err := health.Check(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil || h.GetStatus() != healthpb.HealthCheckResponse_NOT_SERVING {
		t.Errorf("while draining: %v, %v", h, err)
	}
}

func TestReflectionListsTheServices(t *testing.T) {
	r := newRig(t, rigOptions{})
	stream, err := reflectionpb.NewServerReflectionClient(r.dial(nil)).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	answer, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, s := range answer.GetListServicesResponse().GetService() {
		found[s.GetName()] = true
	}
	if !found["tokenbroker.v1.TokenBroker"] || !found["tokenbroker.v1.ProfileAdmin"] {
		t.Errorf("services %v", found)
	}
}

func TestStreamsDoNotHoldUpAStop(t *testing.T) {
	r := newRig(t, rigOptions{})
	watcher, err := healthpb.NewHealthClient(r.dial(nil)).Watch(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watcher.Recv(); err != nil {
		t.Fatal(err)
	}
	limit, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	r.service.Shutdown(limit)
	if limit.Err() != nil {
		t.Error("an idle watcher held the stop up to its limit")
	}
}
