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

// A token is taken out of service while one replica cannot hear of it; Redis
// forgets, and that replica comes back with the token in its memory.
func TestTokenOutOfServiceNeverComesBack(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		age    time.Duration // of the token, before
		take   func(f *harness, id string)
		traces func(f *harness, id string) bool // Redis knows what became of it
	}{
		"revoked": {
			take: func(f *harness, id string) {
				if err := f.replicas[0].revoke(plain, id); err != nil {
					f.t.Fatalf("revoking: %v", err)
				}
			},
			traces: func(f *harness, id string) bool { return f.recordsWith("t:"+id) == 1 },
		},
		"reported": {
			age:    10 * time.Second, // reports of a younger one do not count
			take:   func(f *harness, id string) { f.replicas[0].must(fleet.Question{Profile: invoices, Rejected: id}) },
			traces: func(*harness, string) bool { return true },
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, options{})
			f.allow.requests = 2
			cutOff := f.replicas[2]
			first := f.replicas[0].must(plain)
			for _, r := range f.replicas {
				r.must(plain)
			}
			time.Sleep(time.Until(first.End.Add(c.age)))
			cutOff.redis.Set(faultproxy.Faults{Refuse: true})
			c.take(f, first.TokenID)
			f.await("the other replica hears of it", 5*time.Second, func() bool { return f.replicas[1].must(plain).TokenID != first.TokenID })
			second := f.replicas[0].must(plain)
			if second.TokenID == first.TokenID {
				t.Fatal("the replica that was told still serves it")
			}
			if a := cutOff.must(plain); a.TokenID != first.TokenID {
				t.Errorf("the replica that is cut off has another token: %v", a)
			}
			f.redis.Flush()
			cutOff.redis.Heal()
			f.await("the replica that was cut off serves the other", dropBound, func() bool { return cutOff.must(plain).TokenID == second.TokenID })
			// Nor after one more loss, by a process that remembers nothing.
			f.redis.RestartEmpty()
			f.await("what was lost is there again", dropBound, func() bool {
				return len(f.recordsWithToken()) == 1 && c.traces(f, first.TokenID)
			})
			r := f.replicas[1]
			r.stop()
			r.start()
			for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
				for _, r := range f.replicas {
					if a := r.must(plain); a.TokenID != second.TokenID {
						t.Fatalf("not the token that is current: %v", a)
					}
				}
			}
		})
	}
}

// A replica that does not know whether its token was saved goes on saving it,
// while another one revokes it.
func TestSlowWriterDoesNotBringBackARevokedToken(t *testing.T) {
	t.Parallel()
	f := newFleet(t, options{})
	f.allow.requests = 3
	f.replicas[2].must(subset(invoices, "openid")) // so that Redis knows all scripts
	writer := f.replicas[0]
	slow := faultproxy.Path{Hold: true}
	writer.redis.Set(faultproxy.Faults{CutReply: faultproxy.Once(func(c faultproxy.Command) bool {
		if saves(c) {
			writer.redis.Set(faultproxy.Faults{Requests: slow})
		}
		return saves(c)
	})})
	first := writer.must(plain)
	other := f.replicas[1]
	if a := other.must(plain); a.TokenID != first.TokenID {
		t.Fatalf("it was not saved: %v", a)
	}
	if err := other.revoke(plain, first.TokenID); err != nil {
		t.Fatalf("revoking: %v", err)
	}
	second := other.must(plain)
	writer.redis.Heal()
	for _, r := range f.replicas {
		f.await("all serve the other token", dropBound, func() bool { return r.must(plain).TokenID == second.TokenID })
	}
}
