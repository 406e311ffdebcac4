//go:build hostile

package service_test

import (
	"context"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// A client of grpc-go that pings as often as it can, without calls under way, is
// not sent away. It takes a minute of real time.
func TestEagerClientIsTolerated(t *testing.T) {
	r := newRig(t, rigOptions{})
	var dialed atomic.Int64
	conn, err := grpc.NewClient("passthrough:///"+r.address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 20 * time.Second, PermitWithoutStream: true}),
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			dialed.Add(1)
			return (&net.Dialer{}).DialContext(ctx, "tcp", address)
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := pb.NewTokenBrokerClient(conn)
	if err := whoami(t.Context(), client); err != nil {
		t.Fatal(err)
	}
	<-time.After(55 * time.Second)
	if err := whoami(t.Context(), client); err != nil {
		t.Error(err)
	}
	if n := dialed.Load(); n != 1 {
		t.Errorf("it needed %d connections", n)
	}
}
