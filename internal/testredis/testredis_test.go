package testredis_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
)

func TestServerForgetsUnlessToldOtherwise(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		options testredis.Options
		save    bool
		want    any
	}{
		{name: "plain", want: nil},
		{name: "saved", save: true, want: "v"},
		{name: "persistent", options: testredis.Options{Persist: true}, want: "v"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := testredis.Start(t, c.options)
			address := s.Address()
			s.Do("SET", "k", "v")
			if c.save {
				s.Do("SAVE")
			}
			s.Restart()
			if got := s.Do("GET", "k"); got != c.want || s.Address() != address {
				t.Errorf("after a restart: %v at %s, want %v at %s", got, s.Address(), c.want, address)
			}
			s.RestartEmpty()
			if got := s.Do("DBSIZE"); got != int64(0) {
				t.Errorf("after an empty restart: %v keys", got)
			}
		})
	}
}

func TestUsersAndPasswordAndTLS(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{
		TLS: testca.New(t), Password: "hunter2", Users: []string{"broker on >secret ~tb1:* &tb1:* +@all"},
		Config: []string{"tls-auth-clients yes"},
	})
	if got := s.Do("ACL", "WHOAMI"); got != "default" {
		t.Errorf("it is %v", got)
	}
	if got, err := s.Try("ACL", "DRYRUN", "broker", "GET", "other"); err == nil && got == "OK" {
		t.Errorf("the user may read other keys")
	}
	var e testredis.Error
	if _, err := s.Try("NONSENSE"); !errors.As(err, &e) {
		t.Errorf("an error reply is %v", err)
	}
}

func TestCommandsAreCounted(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{})
	before := s.CommandStats()["set"]
	for range 3 {
		s.Do("SET", "k", "v")
	}
	s.Do("EVAL", "return redis.call('SET', KEYS[1], ARGV[1])", 1, "k", "w")
	if got := s.CommandStats()["set"] - before; got != 4 {
		t.Errorf("%d SETs, want 4", got)
	}
	s.Flush()
	if got := s.Do("GET", "k"); got != nil {
		t.Errorf("after a flush: %v", got)
	}
}

func TestPausedServerDoesNotAnswer(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{})
	s.Pause()
	answered := make(chan error, 1)
	go func() {
		_, err := s.Try("PING")
		answered <- err
	}()
	select {
	case err := <-answered:
		t.Fatalf("it answered: %v", err)
	default:
	}
	s.Continue()
	if err := <-answered; err != nil {
		t.Errorf("after the pause: %v", err)
	}
	s.Kill()
	if s.Alive() {
		t.Error("it lives")
	}
	if _, err := s.Try("PING"); err == nil {
		t.Error("a dead server answered")
	}
}

func TestSentinelFailsOver(t *testing.T) {
	t.Parallel()
	s := testredis.StartSentinel(t, testredis.SentinelOptions{Replicas: 1, Sentinels: 3, Options: testredis.Options{Password: "hunter2"}})
	if len(s.Addresses()) != 3 || len(s.Nodes()) != 2 {
		t.Fatalf("%d sentinels, %d nodes", len(s.Addresses()), len(s.Nodes()))
	}
	first := s.Master()
	first.Do("SET", "k", "v")
	first.Do("WAIT", 1, 1000)
	second := s.Failover()
	if second == first || second.Do("GET", "k") != "v" {
		t.Fatal("the failover lost the key")
	}
	second.Do("SET", "k", "w")
	s.AwaitReplicas(1)
	second.Do("WAIT", 1, 1000)
	if s.KillMaster() != second {
		t.Fatal("another one was killed")
	}
	if third := s.AwaitMasterOtherThan(second); third != first || third.Do("GET", "k") != "w" {
		t.Error("the second failover lost the key")
	}
}

func TestClusterMovesSlotsAndLosesMasters(t *testing.T) {
	t.Parallel()
	c := testredis.StartCluster(t, testredis.ClusterOptions{Replicas: 1})
	if len(c.Addresses()) != 6 {
		t.Fatalf("nodes at %v", c.Addresses())
	}
	const key = "{family}"
	slot := c.SlotOf(key)
	from := c.Owner(slot)
	for i := range 150 {
		from.Do("SET", key+fmt.Sprint(i), i)
	}
	to := c.Owner((slot + 6000) % 16384)
	if to == from {
		t.Fatal("both slots are at one master")
	}
	c.MoveSlot(slot, to)
	if c.Owner(slot) != to || to.Do("CLUSTER", "COUNTKEYSINSLOT", slot) != int64(150) {
		t.Error("the keys did not move")
	}
	if _, err := from.Try("GET", key+"1"); err == nil {
		t.Error("the old owner still answers")
	}
	for deadline := time.Now().Add(time.Minute); !replicated(to); { // WAIT knows only what its own connection wrote
		if time.Now().After(deadline) {
			t.Fatal("the replica does not catch up")
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.KillMaster(slot)
	c.AwaitComplete()
	if heir := c.Owner(slot); heir == to || heir.Do("GET", key+"1") != "1" {
		t.Error("the replica does not have the key")
	}
}

// replicated reports whether the master's replica has all that it has written.
func replicated(master *testredis.Server) bool {
	info := master.Info("replication")
	return strings.Contains(info["slave0"]+",", ",offset="+info["master_repl_offset"]+",")
}
