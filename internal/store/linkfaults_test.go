//go:build faults

package store

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tokenbroker/tokenbroker/internal/testproc"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
)

// recovery is how much longer than for Redis a failover may last for us.
const recovery = 500*time.Millisecond + slack

// caller calls again and again, and keeps account of when that went well.
type caller struct {
	stop   chan struct{}
	ended  chan struct{}
	mu     sync.Mutex
	failed []error
	since  time.Time // the first success after the last failure
	slow   time.Duration
}

func callOften(t *testing.T, l *link, key string) *caller {
	c := &caller{stop: make(chan struct{}), ended: make(chan struct{})}
	go func() {
		defer close(c.ended)
		for {
			select {
			case <-c.stop:
				return
			case <-time.After(2 * time.Millisecond):
			}
			begun := time.Now()
			_, err := l.run(t.Context(), counting, key)
			c.mu.Lock()
			c.slow = max(c.slow, time.Since(begun))
			if err != nil {
				c.failed, c.since = append(c.failed, err), time.Time{}
			} else if c.since.IsZero() {
				c.since = time.Now()
			}
			c.mu.Unlock()
		}
	}()
	return c
}

func (c *caller) end() {
	close(c.stop)
	<-c.ended
}

func (c *caller) goesWellSince() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.since
}

// check ends the calls, and sees how long after that instant they failed.
func (c *caller) check(t *testing.T, repaired time.Time) {
	t.Helper()
	eventually(t, "calls go well", 5*time.Second, func() bool { return !c.goesWellSince().IsZero() })
	c.end()
	if late := c.since.Sub(repaired); late > recovery {
		t.Errorf("calls went well %v after Redis was repaired", late)
	}
	if c.slow > callTimeout+slack {
		t.Errorf("one call took %v", c.slow)
	}
	kinds := map[outcome]int{}
	for _, err := range c.failed {
		var e *linkError
		errors.As(err, &e)
		kinds[e.outcome]++
	}
	t.Logf("failed calls: %v; the slowest took %v", kinds, c.slow.Round(time.Millisecond))
}

func behind(s *testredis.Sentinel) linkOptions {
	return linkOptions{addresses: s.Addresses(), masterName: testredis.MasterName}
}

func hears(t *testing.T, l *link, h *listener, s *testredis.Server) {
	t.Helper()
	before, _, _ := h.told()
	eventually(t, "messages from there are heard", 8*time.Second, func() bool {
		s.Do("PUBLISH", eventChannel, "m")
		now, _, _ := h.told()
		return l.stats().subscribed && len(now) > len(before)
	})
}

func awaitPromotion(t *testing.T, replica *testredis.Server) {
	t.Helper()
	eventually(t, "the replica is promoted", 20*time.Second, func() bool { return replica.Info("replication")["role"] == "master" })
}

func TestFaultsLinkFollowsAFailover(t *testing.T) {
	for _, c := range []struct {
		name string
		fail func(t *testing.T, s *testredis.Sentinel) (promoted *testredis.Server)
	}{
		{"master killed", func(t *testing.T, s *testredis.Sentinel) *testredis.Server {
			return s.AwaitMasterOtherThan(s.KillMaster())
		}},
		{"master frozen", func(t *testing.T, s *testredis.Sentinel) *testredis.Server {
			master := s.Master()
			master.Pause()
			t.Cleanup(master.Continue)
			return s.AwaitMasterOtherThan(master)
		}},
		{"master demoted", func(t *testing.T, s *testredis.Sentinel) *testredis.Server { return s.Failover() }},
		{"a sentinel frozen, master killed", func(t *testing.T, s *testredis.Sentinel) *testredis.Server {
			replica := s.Nodes()[1]
			s.Sentinels()[0].Pause() // whom the link asks first
			s.Nodes()[0].Kill()
			_, port, _ := strings.Cut(replica.Address(), ":")
			eventually(t, "the others name the replica", 20*time.Second, func() bool {
				for _, sentinel := range s.Sentinels()[1:] {
					if reply := sentinel.Do("SENTINEL", "GET-MASTER-ADDR-BY-NAME", testredis.MasterName); reply.([]any)[1] != port {
						return false
					}
				}
				return true
			})
			return replica
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := testredis.StartSentinel(t, testredis.SentinelOptions{Sentinels: 3})
			l, h := open(t, behind(s), Access{})
			awaitSubscription(t, l)
			calls := callOften(t, l, "tb1:{f}")
			promoted := c.fail(t, s)
			repaired := time.Now()
			calls.check(t, repaired)
			hears(t, l, h, promoted)
			t.Logf("subscribed %v after the promotion", time.Since(repaired).Round(time.Millisecond))
			if _, resyncs, incarnations := h.told(); resyncs < 2 || incarnations != 1 {
				t.Errorf("%d resyncs, %d incarnations", resyncs, incarnations)
			}
		})
	}
}

// The master that is left behind goes on answering, as one that is cut off from
// the sentinels does.
func TestFaultsLinkLeavesAMasterThatSentinelsLeft(t *testing.T) {
	s := testredis.StartSentinel(t, testredis.SentinelOptions{})
	other := testredis.Start(t, testredis.Options{})
	l, h := open(t, behind(s), Access{})
	awaitSubscription(t, l)
	if _, err := l.run(t.Context(), counting, "tb1:{f}"); err != nil {
		t.Fatal(err)
	}
	sentinel := s.Sentinels()[0]
	sentinel.Do("SENTINEL", "REMOVE", testredis.MasterName)
	sentinel.Do("SENTINEL", "MONITOR", testredis.MasterName, "127.0.0.1", strings.Split(other.Address(), ":")[1], 1)
	eventually(t, "calls go to the other master", 2*beatInterval, func() bool {
		_, err := l.run(t.Context(), counting, "tb1:{f}")
		return err == nil && runs(t, other, "tb1:{f}") != nil
	})
	hears(t, l, h, other)
	if _, _, incarnations := h.told(); incarnations != 1 {
		t.Errorf("%d incarnations", incarnations)
	}
}

func TestFaultsLinkAsksWhicheverSentinelAnswers(t *testing.T) {
	s := testredis.StartSentinel(t, testredis.SentinelOptions{Sentinels: 3})
	for i, sentinel := range s.Sentinels() {
		sentinel.Pause()
		l, _ := open(t, behind(s), Access{})
		eventually(t, fmt.Sprintf("a call without sentinel %d", i), 2*time.Second, func() bool {
			_, err := l.run(t.Context(), counting, "tb1:{f}")
			return err == nil
		})
		sentinel.Continue()
	}
	o := behind(s)
	o.masterName = "another"
	l, _ := open(t, o, Access{})
	if _, err := l.run(t.Context(), counting, "tb1:{f}"); !outcomeIs(err, broken) || !strings.Contains(err.Error(), "store.redis.master_name") {
		t.Errorf("of a master that nobody knows: %v", err)
	}
}

func clusterKeys(n int) (keys []string) {
	for i := range n {
		keys = append(keys, fmt.Sprintf("tb1:{%d}", i))
	}
	return keys
}

func TestFaultsLinkToACluster(t *testing.T) {
	c := testredis.StartCluster(t, testredis.ClusterOptions{Replicas: 1})
	o := linkOptions{addresses: c.Addresses()[:1], cluster: true}
	l, h := open(t, o, Access{})
	awaitSubscription(t, l)
	keys := clusterKeys(100)
	for _, key := range keys {
		if _, err := l.run(t.Context(), counting, key); err != nil {
			t.Error(err)
		}
		if _, confirmed, err := l.runDurably(t.Context(), counting, key); err != nil || !confirmed {
			t.Errorf("durably: %v, %v", confirmed, err)
		}
	}
	found, err := l.headers(t.Context(), append(keys, "tb1:{none}"), "n")
	for i := range keys {
		if err != nil || found[i][0] != "2" {
			t.Errorf("%s: %v, %v", keys[i], found[i], err)
		}
	}
	masters := c.Nodes()[:3]
	for _, master := range masters {
		if n := master.Do("DBSIZE"); n == int64(0) {
			t.Error("a master has no key: this test shows little")
		}
		hears(t, l, h, master)
	}
	time.Sleep(2 * stateAge) // replicas are asked for the slots, too, which is nothing new
	for range 20 {
		if _, err := l.run(t.Context(), counting, keys[0]); err != nil {
			t.Error(err)
		}
		time.Sleep(stateAge / 10)
	}
	if _, _, incarnations := h.told(); incarnations != 0 {
		t.Errorf("%d incarnations: %s", incarnations, h.logged())
	}

	t.Run("whose slots move", func(t *testing.T) {
		const key = "tb1:{moving}"
		slot := c.SlotOf(key)
		calls := callOften(t, l, key)
		durable := 0
		for i := range 6 {
			c.MoveSlot(slot, masters[i%3])
			if _, confirmed, err := l.runDurably(t.Context(), counting, key); err != nil {
				t.Errorf("durably: %v", err)
			} else if confirmed {
				durable++
			}
			if found, err := l.headers(t.Context(), []string{key, keys[0]}, "n"); err != nil || found[0] == nil || found[1] == nil {
				t.Errorf("headers: %v, %v", found, err)
			}
		}
		calls.end()
		if len(calls.failed) > 0 || durable != 6 {
			t.Errorf("%d of 6 writes were durable, %d calls failed: %v", durable, len(calls.failed), calls.failed)
		}
	})

	t.Run("with a node that is not configured as one", func(t *testing.T) {
		single, _ := open(t, at(c.Addresses()[0]), Access{})
		var failed error
		for _, key := range keys {
			if _, err := single.run(t.Context(), counting, key); err != nil {
				failed = err
			}
		}
		if !outcomeIs(failed, redirected) {
			t.Error(failed)
		}
	})
}

func TestFaultsLinkFollowsAClusterFailover(t *testing.T) {
	for name, fail := range map[string]func(*testing.T, *testredis.Server){
		"master killed": func(_ *testing.T, s *testredis.Server) { s.Kill() },
		"master frozen": func(t *testing.T, s *testredis.Server) { s.Pause(); t.Cleanup(s.Continue) },
	} {
		t.Run(name, func(t *testing.T) {
			c := testredis.StartCluster(t, testredis.ClusterOptions{Replicas: 1, Options: testredis.Options{Config: []string{"cluster-require-full-coverage no"}}})
			l, h := open(t, linkOptions{addresses: c.Addresses(), cluster: true}, Access{})
			awaitSubscription(t, l)
			const key = "tb1:{f}"
			slot := c.SlotOf(key)
			victim := c.Owner(slot)
			var spared string
			for _, k := range clusterKeys(10) {
				if c.Owner(c.SlotOf(k)) != victim {
					spared = k
				}
			}
			for _, k := range []string{key, spared} {
				if _, err := l.run(t.Context(), counting, k); err != nil {
					t.Fatal(err)
				}
			}
			_, _, before := h.told()
			calls, others := callOften(t, l, key), callOften(t, l, spared)
			fail(t, victim)
			replica := c.Nodes()[3]
			for i, n := range c.Nodes()[:3] {
				if n == victim {
					replica = c.Nodes()[3+i]
				}
			}
			awaitPromotion(t, replica)
			calls.check(t, time.Now())
			others.end()
			if len(others.failed) > 0 {
				t.Errorf("%d calls to the other masters failed: %v", len(others.failed), others.failed[0])
			}
			hears(t, l, h, replica)
			if _, resyncs, incarnations := h.told(); resyncs < 1 || incarnations <= before {
				t.Errorf("%d resyncs, %d incarnations", resyncs, incarnations)
			}
			eventually(t, "nothing is out of reach", failureMemory+time.Second, func() bool { return l.stats().reachable })
		})
	}
}

func TestFaultsLinkCloseLeavesNothing(t *testing.T) {
	s := testredis.StartSentinel(t, testredis.SentinelOptions{})
	c := testredis.StartCluster(t, testredis.ClusterOptions{})
	for name, o := range map[string]linkOptions{
		"sentinel": behind(s),
		"cluster":  {addresses: c.Addresses(), cluster: true},
		"one dead": {addresses: append(c.Addresses(), testproc.FreeAddress(t)), cluster: true},
	} {
		t.Run(name, func(t *testing.T) {
			before := goleak.IgnoreCurrent()
			l, _ := open(t, o, Access{})
			for _, key := range clusterKeys(20) {
				if _, err := l.run(t.Context(), counting, key); err != nil {
					t.Error(err)
				}
			}
			l.close()
			goleak.VerifyNone(t, before)
		})
	}
}
