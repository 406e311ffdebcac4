package fleet_test

import (
	"context"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/faultproxy"
	"github.com/tokenbroker/tokenbroker/internal/fleet"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// revoke takes a profile's token out of service; from now on the checks know.
func (r *replica) revoke(q fleet.Question, id string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, err := pb.NewTokenBrokerClient(r.conn).RevokeToken(ctx, &pb.RevokeTokenRequest{Profile: q.Profile, Scopes: q.Scopes, TokenId: id})
	if err == nil {
		r.f.mu.Lock()
		r.f.drops[id] = time.Now()
		r.f.mu.Unlock()
	}
	return err
}

// The token is revoked while one replica cannot hear of it; Redis forgets, and
// that replica comes back with the token in its memory.
func TestRevokedTokenNeverComesBack(t *testing.T) {
	t.Parallel()
	f := newFleet(t, options{})
	f.allow.requests = 2
	cutOff := f.replicas[2]
	first := f.replicas[0].must(plain)
	for _, r := range f.replicas {
		r.must(plain)
	}
	cutOff.redis.Set(faultproxy.Faults{Refuse: true})
	if err := f.replicas[0].revoke(plain, first.TokenID); err != nil {
		t.Fatalf("revoking: %v", err)
	}
	f.await("the other replica hears of it", 5*time.Second, func() bool { return f.replicas[1].must(plain).TokenID != first.TokenID })
	second := f.replicas[0].must(plain)
	if second.TokenID == first.TokenID {
		t.Fatal("the replica that revoked it still serves it")
	}
	if a := cutOff.must(plain); a.TokenID != first.TokenID {
		t.Errorf("the replica that is cut off has another token: %v", a)
	}
	f.redis.Flush()
	cutOff.redis.Heal()
	f.await("the replica that was cut off drops it", dropBound, func() bool { return cutOff.must(plain).TokenID == second.TokenID })
	// Not by a restarted one, nor after one more loss.
	f.redis.RestartEmpty()
	r := f.replicas[1]
	r.stop()
	r.start()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		for _, r := range f.replicas {
			if a := r.ask(plain); a.OK() && a.TokenID != second.TokenID {
				t.Fatalf("not the token that is current: %v", a)
			}
		}
	}
}
