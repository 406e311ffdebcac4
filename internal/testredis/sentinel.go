package testredis

import (
	"fmt"
	"testing"
)

// MasterName is what sentinels call the master.
const MasterName = "main"

// SentinelOptions of a replicated Redis that sentinels watch.
type SentinelOptions struct {
	Options       // of master and replicas
	Replicas  int // 1 when zero
	Sentinels int // 1 when zero; a majority of them decides
}

// Sentinel is a master, its replicas and the sentinels that watch them. A
// master that does not answer for a second is down.
type Sentinel struct {
	t         testing.TB
	nodes     []*Server // the first began as the master
	sentinels []*Server
}

// StartSentinel runs them until the test ends, and returns when every sentinel
// knows all others and all replicas are in step.
func StartSentinel(t testing.TB, o SentinelOptions) *Sentinel {
	t.Helper()
	o.Replicas, o.Sentinels = max(o.Replicas, 1), max(o.Sentinels, 1)
	s := &Sentinel{t: t, nodes: []*Server{Start(t, o.Options)}}
	master := s.nodes[0]
	for range o.Replicas {
		replica := o.Options
		replica.Config = append([]string{fmt.Sprintf("replicaof 127.0.0.1 %d", master.port)}, o.Config...)
		s.nodes = append(s.nodes, Start(t, replica))
	}
	s.AwaitReplicas(o.Replicas)
	for range o.Sentinels {
		s.sentinels = append(s.sentinels, startSentinel(t, master, o))
	}
	await(t, "the sentinels know each other and the replicas", func() bool {
		for _, sentinel := range s.sentinels {
			state := sentinelState(sentinel)
			if state["flags"] != "master" || state["num-slaves"] != fmt.Sprint(o.Replicas) ||
				state["num-other-sentinels"] != fmt.Sprint(o.Sentinels-1) {
				return false
			}
		}
		return true
	})
	return s
}

func startSentinel(t testing.TB, master *Server, o SentinelOptions) *Server {
	t.Helper()
	s := newServer(t, Options{})
	s.args = []string{"--sentinel"}
	s.lines = []string{
		"bind 127.0.0.1",
		fmt.Sprintf("port %d", s.port),
		"dir " + s.dir,
		fmt.Sprintf("sentinel monitor %s 127.0.0.1 %d %d", MasterName, master.port, o.Sentinels/2+1),
		"sentinel down-after-milliseconds " + MasterName + " 1000",
		"sentinel failover-timeout " + MasterName + " 3000",
		"sentinel parallel-syncs " + MasterName + " 1",
	}
	if o.Password != "" {
		s.lines = append(s.lines, "sentinel auth-pass "+MasterName+" "+o.Password)
	}
	s.start()
	return s
}

func sentinelState(s *Server) map[string]string {
	reply, err := s.Try("SENTINEL", "MASTER", MasterName)
	values, ok := reply.([]any)
	if err != nil || !ok {
		return nil
	}
	state := map[string]string{}
	for i := 0; i+1 < len(values); i += 2 {
		state[fmt.Sprint(values[i])] = fmt.Sprint(values[i+1])
	}
	return state
}

// Addresses are those of the sentinels.
func (s *Sentinel) Addresses() []string { return addresses(s.sentinels) }

func addresses(servers []*Server) []string {
	list := make([]string, len(servers))
	for i, s := range servers {
		list[i] = s.Address()
	}
	return list
}

// Nodes are the master and the replicas, whatever each is by now.
func (s *Sentinel) Nodes() []*Server { return s.nodes }

// Sentinels are the servers that watch the nodes.
func (s *Sentinel) Sentinels() []*Server { return s.sentinels }

// Master is the node that the first sentinel names.
func (s *Sentinel) Master() *Server {
	s.t.Helper()
	reply := s.sentinels[0].Do("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MasterName)
	address, ok := reply.([]any)
	if !ok || len(address) != 2 {
		s.t.Fatalf("the sentinel names the master %v", reply)
	}
	for _, node := range s.nodes {
		if fmt.Sprint(address[1]) == fmt.Sprint(node.port) {
			return node
		}
	}
	s.t.Fatalf("the sentinel names a stranger as master: %v", address)
	return nil
}

// AwaitReplicas returns when so many replicas are in step with the first node
// that says it is a master and lives.
func (s *Sentinel) AwaitReplicas(n int) {
	s.t.Helper()
	await(s.t, fmt.Sprintf("%d replicas are in step", n), func() bool {
		ready := 0
		for _, node := range s.nodes {
			reply, err := node.Try("INFO", "replication")
			info := parseInfo(reply)
			if err == nil && info["role"] == "slave" && info["master_link_status"] == "up" && info["master_sync_in_progress"] == "0" {
				ready++
			}
		}
		return ready >= n
	})
}

// Failover promotes a replica while the master lives, and returns the new
// master when it accepts writes.
func (s *Sentinel) Failover() *Server {
	s.t.Helper()
	was := s.Master()
	await(s.t, "the sentinel begins a failover", func() bool {
		// NOGOODSLAVE and INPROG pass by themselves.
		_, err := s.sentinels[0].Try("SENTINEL", "FAILOVER", MasterName)
		return err == nil
	})
	return s.AwaitMasterOtherThan(was)
}

// KillMaster kills the master and returns it. A replica is promoted about two
// seconds later; see AwaitMasterOtherThan.
func (s *Sentinel) KillMaster() *Server {
	s.t.Helper()
	master := s.Master()
	master.Kill()
	return master
}

// AwaitMasterOtherThan returns the new master when every sentinel names it and
// it accepts writes.
func (s *Sentinel) AwaitMasterOtherThan(was *Server) *Server {
	s.t.Helper()
	var master *Server
	await(s.t, "another node is master", func() bool {
		master = s.Master()
		if master == was {
			return false
		}
		for _, sentinel := range s.sentinels {
			if sentinelState(sentinel)["port"] != fmt.Sprint(master.port) {
				return false
			}
		}
		reply, err := master.Try("INFO", "replication")
		return err == nil && parseInfo(reply)["role"] == "master"
	})
	return master
}
