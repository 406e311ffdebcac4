//go:build faults

package fleet_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/faultproxy"
	"github.com/tokenbroker/tokenbroker/internal/fleet"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
)

// subset of a profile's scopes: a token of its own.
func subset(profile string, scopes ...string) fleet.Question {
	return fleet.Question{Profile: profile, Scopes: scopes}
}

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
		"forgets scripts":      {func(f *harness) { f.redis.Do("SCRIPT", "FLUSH") }, func(*harness) {}, true},
		"cuts each reply once": {everywhere(faultproxy.Faults{CutReply: faultproxy.Once(isScript)}), heal, true},
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
					if a := r.ask(subset(invoices, "openid")); !a.OK() && a.Reason != "STORE_UNAVAILABLE" || a.End.Sub(a.Begin) > 8*time.Second {
						t.Errorf("a new plain token: %v", a)
					}
					a := r.ask(subset(operator, "openid"))
					if (!a.OK() && (a.Reason != "STORE_UNAVAILABLE" || c.works)) || a.End.Sub(a.Begin) > 8*time.Second {
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
	f.strike(holder, whileRequested, func() { f.redis.Pause() })
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
	f.await("it has put back what it knew", 15*time.Second, func() bool { return f.tokensInRedis() > 0 })
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
		"asked for": func(s *testredis.Sentinel) { s.Failover() },
		"master killed": func(s *testredis.Sentinel) {
			s.AwaitMasterOtherThan(s.KillMaster())
		},
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
			f := newFleet(t, options{sentinel: s})
			f.survive(func() { fails(s) })
		})
	}
}

func TestClusterChangesUnderLoad(t *testing.T) {
	t.Parallel()
	for name, changes := range map[string]func(f *harness, c *testredis.Cluster){
		"slots moved to and fro": func(_ *harness, c *testredis.Cluster) {
			for _, master := range c.Nodes()[:3] {
				for _, node := range c.Nodes() {
					keys, _ := node.Do("KEYS", "tb1:*").([]any)
					for _, key := range keys {
						c.MoveSlot(c.SlotOf(key.(string)), master)
					}
				}
			}
		},
		"master killed": func(_ *harness, c *testredis.Cluster) {
			c.KillMaster(1)
			c.AwaitComplete()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := testredis.StartCluster(t, testredis.ClusterOptions{Replicas: 1})
			f := newFleet(t, options{cluster: c})
			f.survive(func() { changes(f, c) })
		})
	}
}

// survive lets the store change its shape under load: nobody's call fails, and
// what a restarted replica finds then is what was there before.
func (f *harness) survive(change func()) {
	f.t.Helper()
	f.allow.back = f.o.tokenLife / 10
	questions := []fleet.Question{plain, personal, subset(invoices, "openid"), subset(operator, "openid")}
	tokens := map[string]string{}
	for _, q := range questions {
		f.allow.requests++
		for _, r := range f.replicas {
			tokens[fmt.Sprint(q)] = r.must(q).TokenID
		}
	}
	load := f.load(questions...)
	ctx, cancel := context.WithCancel(context.Background())
	var news sync.WaitGroup
	news.Go(func() { // somebody wants what nobody has
		for _, scopes := range [][]string{{"permissions"}, {"openid", "permissions"}, {"global.wildcard"}} {
			for _, r := range f.replicas {
				if a := r.ask(fleet.Question{Profile: invoices, Scopes: scopes}); !a.OK() || a.End.Sub(a.Begin) > 8*time.Second {
					f.t.Errorf("a new token: %v", a)
				}
			}
			if ctx.Err() != nil {
				return
			}
		}
	})
	change()
	cancel()
	news.Wait()
	f.allow.requests += 3 * len(f.replicas) // each may have been on its own
	f.allow.upTo = true
	r := f.replicas[0]
	f.await("the store has what it had before", 30*time.Second, func() bool {
		r.stop()
		r.start()
		for _, q := range questions {
			if a := r.ask(q); a.TokenID != tokens[fmt.Sprint(q)] {
				return false
			}
		}
		return true
	})
	f.wantNoFailure(load())
}
