//go:build faults

package fleet_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/faultproxy"
	"github.com/tokenbroker/tokenbroker/internal/fleet"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// everywhere puts the faults between Redis and all replicas.
func everywhere(faults faultproxy.Faults) func(*harness) {
	return func(f *harness) {
		for _, r := range f.replicas {
			r.redis.Set(faults)
		}
	}
}

// Redis is broken in each of these ways for a while. Tokens in memory are served
// as if nothing were. A new token is obtained without Redis if its grant can be
// repeated; otherwise the error says what is wrong, and soon. Nothing is left
// behind.
func TestRedisFails(t *testing.T) {
	dead := faultproxy.Path{Swallow: true}
	slow := faultproxy.Path{Delay: 500 * time.Millisecond}
	heal := everywhere(faultproxy.Faults{})
	for name, c := range map[string]struct {
		breaks, heals func(*harness)
		// works: even what is not in memory is answered, and nobody notices.
		works bool
	}{
		"refuses one replica": {func(f *harness) { f.replicas[0].redis.Set(faultproxy.Faults{Refuse: true}) }, heal, false},
		"refuses all":         {everywhere(faultproxy.Faults{Refuse: true}), heal, false},
		"is a black hole":     {everywhere(faultproxy.Faults{Requests: dead, Replies: dead}), heal, false},
		"is slow by a second": {everywhere(faultproxy.Faults{Requests: slow, Replies: slow}), heal, false},
		"is cut at replies":   {everywhere(faultproxy.Faults{CutReply: isScript}), heal, false},
		"is cut in replies":   {everywhere(faultproxy.Faults{CutMidReply: isScript}), heal, false},
		"is frozen":           {func(f *harness) { f.redis.Pause() }, func(f *harness) { f.redis.Continue() }, false},
		"is read-only": {
			func(f *harness) { f.redis.Do("REPLICAOF", "127.0.0.1", 1) },
			func(f *harness) { f.redis.Do("REPLICAOF", "NO", "ONE") }, false,
		},
		"is full": {
			func(f *harness) { f.redis.Do("CONFIG", "SET", "maxmemory", 1) },
			func(f *harness) { f.redis.Do("CONFIG", "SET", "maxmemory", 0) }, false,
		},
		"has no replicas": {
			func(f *harness) { f.redis.Do("CONFIG", "SET", "min-replicas-to-write", 1) },
			func(f *harness) { f.redis.Do("CONFIG", "SET", "min-replicas-to-write", 0) }, false,
		},
		"forgets scripts": {func(f *harness) { f.redis.Do("SCRIPT", "FLUSH") }, func(*harness) {}, true},
		"loses a reply to each": {func(f *harness) {
			for _, r := range f.replicas {
				r.redis.Set(faultproxy.Faults{CutReply: eachOnce(acquires, intends, saves)})
			}
		}, heal, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, options{})
			f.allow.back = f.o.tokenLife / 10
			// Warm: two. While it is broken: one, and of the plain one as many as
			// there are replicas on their own. Healed: what failed before.
			f.allow.requests, f.allow.upTo = 2+1+len(f.replicas)+2, true
			for _, r := range f.replicas {
				r.must(plain)
				r.must(personal)
			}
			before, connections := f.goroutines(), f.storeConnections()

			c.breaks(f)
			end := time.Now().Add(8 * time.Second)
			var colds sync.WaitGroup
			for _, r := range f.replicas {
				colds.Go(func() {
					a := r.ask(subset(invoices, "openid"))
					if !a.OK() || a.End.Sub(a.Begin) > 6*time.Second {
						t.Errorf("a new plain token: %v", a)
					}
					a = r.ask(subset(operator, "openid"))
					if !a.OK() && (a.Reason != "STORE_UNAVAILABLE" || c.works) || a.End.Sub(a.Begin) > 6*time.Second {
						t.Errorf("a new personal token: %v", a)
					}
				})
			}
			for ; time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
				for _, r := range f.replicas {
					for _, q := range []fleet.Question{plain, personal} {
						if a := r.ask(q); !a.OK() || a.End.Sub(a.Begin) > 500*time.Millisecond {
							t.Errorf("from memory: %v", a)
						}
					}
				}
			}
			colds.Wait()

			c.heals(f)
			for _, r := range f.replicas {
				for _, q := range []fleet.Question{subset(invoices, "openid"), subset(operator, "openid"), subset(invoices, "permissions")} {
					f.await("a new token is there after all", 15*time.Second, func() bool { return r.ask(q).OK() })
				}
			}
			f.awaitGoroutines(before)
			f.await("connections have come to rest", 15*time.Second, func() bool {
				for i, now := range f.storeConnections() {
					if now > connections[i]+4 {
						return false
					}
				}
				return true
			})
		})
	}
}

// eachOnce fits the first command that fits each of these.
func eachOnce(each ...func(faultproxy.Command) bool) func(faultproxy.Command) bool {
	for i, fits := range each {
		each[i] = faultproxy.Once(fits)
	}
	return func(c faultproxy.Command) bool {
		return slices.ContainsFunc(each, func(fits func(faultproxy.Command) bool) bool { return fits(c) })
	}
}

// storeConnections are those that each replica has open to Redis.
func (f *harness) storeConnections() []int {
	counts := make([]int, len(f.replicas))
	for i, r := range f.replicas {
		counts[i], _ = r.redis.Connections()
	}
	return counts
}

// What a refresh brought must outlive a Redis that fails just then: callers are
// served, and it is saved when that is possible again.
func TestRedisFailsBetweenRefreshAndSave(t *testing.T) {
	t.Parallel()
	f := newFleet(t, options{})
	f.allow.requests = 2
	holder := f.replicas[0]
	holder.must(personal)
	f.strike(holder, requested, func() { f.redis.Pause() })
	a := holder.ask(personalSubset)
	if !a.OK() {
		t.Fatalf("the refresh succeeded, and yet: %v", a)
	}
	if again := holder.must(personalSubset); again.TokenID != a.TokenID {
		t.Errorf("another token: %v", again)
	}
	f.redis.Continue()
	for _, r := range f.replicas[1:] {
		f.await("the others have it", 10*time.Second, func() bool { return r.ask(personalSubset).TokenID == a.TokenID })
	}
}

// Redis forgets while a refresh token is in the air, and the others put it back:
// that it is in the air must not be forgotten as long as its presenter lives.
func TestRedisIsFlushedDuringARefresh(t *testing.T) {
	t.Parallel()
	f := newFleet(t, options{profile: []string{"    timeout: 25s"}})
	f.allow.requests = 2
	for _, r := range f.replicas {
		r.must(personal)
	}
	sent := make(chan time.Time, 2)
	f.endpoint.onRequest(func(*request) { sent <- time.Now() })
	if err := f.endpoint.Fault(sandbox.Fault{Grant: "refresh_token", Process: true, Delay: 18 * time.Second}); err != nil {
		t.Fatal(err)
	}
	presenter := make(chan fleet.Answer, 1)
	go func() { presenter <- f.replicas[0].ask(personalSubset) }()
	receive(f, "the refresh token is presented", sent)
	f.redis.Flush()
	f.await("the refresh token is in Redis again", dropBound, func() bool { return f.recordsWith("rt") == 1 })
	for _, a := range f.askAll(personalSubset, f.replicas[1:], 5) {
		if !a.OK() {
			t.Errorf("another replica: %v", a)
		}
	}
	if a := receive(f, "the presenter answers", presenter); !a.OK() {
		t.Errorf("the presenter: %v", a)
	}
}

// A replica that was cut off for several rotations comes back first after a
// flush, with a refresh token that was spent long ago. It must not be presented.
func TestOldRefreshTokenReturnsFirst(t *testing.T) {
	t.Parallel()
	f := newFleet(t, options{})
	f.allow.requests = 5
	old := f.replicas[2]
	old.must(personal)
	old.redis.Set(faultproxy.Faults{Refuse: true})
	for _, scopes := range [][]string{{"openid"}, {"permissions"}, {"openid", "permissions"}} {
		f.replicas[0].must(fleet.Question{Profile: operator, Scopes: scopes})
	}
	for _, r := range f.replicas[:2] {
		r.redis.Set(faultproxy.Faults{Refuse: true})
	}
	f.redis.Flush()
	old.redis.Heal()
	f.await("it has put back what it knew", 15*time.Second, func() bool { return f.recordsWith("rt") > 0 })
	for _, r := range f.replicas[:2] {
		r.redis.Heal()
	}
	old.must(subset(operator, "global.wildcard"))
	if n := f.endpoint.Calls().Issued["password"]; n != 1 {
		t.Errorf("the password was used %d times, want 1: the newest refresh token was to be found", n)
	}
}

func TestSentinelFailoverUnderLoad(t *testing.T) {
	t.Parallel()
	for name, fails := range map[string]func(*testredis.Sentinel){
		"asked for":     func(s *testredis.Sentinel) { s.Failover() },
		"master killed": func(s *testredis.Sentinel) { s.AwaitMasterOtherThan(s.KillMaster()) },
		"master killed, with what it had not replicated": func(s *testredis.Sentinel) {
			master := s.Master()
			for _, node := range s.Nodes() {
				if node != master {
					node.Do("FLUSHALL") // as if it had never come
				}
			}
			s.AwaitMasterOtherThan(s.KillMaster())
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := testredis.StartSentinel(t, testredis.SentinelOptions{
				Replicas: 1, Sentinels: 3, Options: testredis.Options{Config: []string{"replica-read-only no"}},
			})
			newFleet(t, options{sentinel: s}).survive(false, func() { fails(s) })
		})
	}
}

func TestClusterChangesUnderLoad(t *testing.T) {
	t.Parallel()
	t.Run("slots moved to and fro", func(t *testing.T) {
		t.Parallel()
		c := testredis.StartCluster(t, testredis.ClusterOptions{})
		newFleet(t, options{cluster: c}).survive(true, func() {
			for end := time.Now().Add(10 * time.Second); time.Now().Before(end); {
				for _, to := range c.Nodes() {
					for _, from := range c.Nodes() {
						keys, _ := from.Do("KEYS", "tb1:*").([]any)
						for _, key := range keys {
							c.MoveSlot(c.SlotOf(fmt.Sprint(key)), to)
						}
					}
				}
			}
		})
	})
	t.Run("master killed", func(t *testing.T) {
		t.Parallel()
		c := testredis.StartCluster(t, testredis.ClusterOptions{Replicas: 1})
		f := newFleet(t, options{cluster: c})
		f.survive(false, func() {
			var slot int // of a family's record
			for _, node := range c.Nodes() {
				if keys, _ := node.Do("KEYS", "tb1:*").([]any); len(keys) > 0 {
					slot = c.SlotOf(fmt.Sprint(keys[0]))
				}
			}
			c.KillMaster(slot)
			c.AwaitComplete()
		})
	})
}

// survive lets the store change its shape while callers ask, and while one
// replica starts again and again and knows nothing but what is in the store.
// Callers never notice; the new replica always finds what was there if the
// change is seamless, and otherwise when it is over.
func (f *harness) survive(seamless bool, change func()) {
	f.t.Helper()
	questions := []fleet.Question{plain, personal, subset(invoices, "openid"), personalSubset}
	tokens := make([]string, len(questions))
	for i, q := range questions {
		for _, r := range f.replicas {
			tokens[i] = r.must(q).TokenID
		}
	}
	f.allow.requests = len(questions)
	if !seamless { // a replica that starts in between is on its own
		f.allow.back, f.allow.upTo = f.o.tokenLife/10, true
		f.allow.requests += 20
	}
	load := f.load(questions...)
	ctx, cancel := context.WithCancel(context.Background())
	starts := make(chan int, 1)
	novice := f.replicas[len(f.replicas)-1]
	go func() {
		n := 0
		defer func() { starts <- n }()
		for ; ctx.Err() == nil; n++ {
			novice.stop()
			novice.start()
			for i, q := range questions {
				a := novice.ask(q)
				if seamless && a.TokenID != tokens[i] || !a.OK() && a.Reason != "STORE_UNAVAILABLE" || a.End.Sub(a.Begin) > 8*time.Second {
					f.t.Errorf("the replica that starts: %v", a)
				}
			}
		}
	}()
	change()
	cancel()
	f.t.Logf("a replica started %d times meanwhile", <-starts)
	// What has a refresh token is there as it was; a plain token that was lost
	// may have been obtained once more.
	f.await("the store has what there is", 30*time.Second, func() bool {
		novice.stop()
		novice.start()
		for i, q := range questions {
			was := tokens[i]
			if !seamless && q.Profile == invoices {
				was = f.replicas[0].must(q).TokenID
			}
			if novice.ask(q).TokenID != was {
				return false
			}
		}
		return true
	})
	f.wantNoFailure(load())
}
