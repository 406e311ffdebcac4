package testredis

import (
	"fmt"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/testproc"
)

const (
	clusterSlots   = 16384
	clusterMasters = 3
)

// ClusterOptions of a Redis Cluster with three masters.
type ClusterOptions struct {
	Options      // of each node; without Password and TLS
	Replicas int // of each master
}

// Cluster is a Redis Cluster. A node that does not answer for two seconds is
// down.
type Cluster struct {
	t     testing.TB
	nodes []*Server // those that began as masters, then those that began as replicas
}

// StartCluster runs one until the test ends, and returns when every node calls
// it complete.
func StartCluster(t testing.TB, o ClusterOptions) *Cluster {
	t.Helper()
	c := &Cluster{t: t}
	for range clusterMasters * (1 + o.Replicas) {
		c.nodes = append(c.nodes, startNode(t, o.Options))
	}
	for i, master := range c.nodes[:clusterMasters] {
		master.Do("CLUSTER", "ADDSLOTSRANGE", i*clusterSlots/clusterMasters, (i+1)*clusterSlots/clusterMasters-1)
		master.Do("CLUSTER", "SET-CONFIG-EPOCH", i+1)
	}
	for _, node := range c.nodes[1:] {
		node.Do("CLUSTER", "MEET", "127.0.0.1", c.nodes[0].port, c.nodes[0].Do("CONFIG", "GET", "cluster-port").([]any)[1])
	}
	c.awaitAll("knows all others", func(info map[string]string) bool {
		return info["cluster_known_nodes"] == fmt.Sprint(len(c.nodes))
	})
	for i, replica := range c.nodes[clusterMasters:] {
		replica.Do("CLUSTER", "REPLICATE", c.nodes[i%clusterMasters].Do("CLUSTER", "MYID"))
	}
	c.AwaitComplete()
	await(t, "the replicas are in step", func() bool {
		for _, replica := range c.nodes[clusterMasters:] {
			if replica.Info("replication")["master_link_status"] != "up" {
				return false
			}
		}
		return true
	})
	return c
}

func startNode(t testing.TB, o Options) *Server {
	t.Helper()
	node := newServer(t, o)
	node.lines = append(node.lines,
		"cluster-enabled yes",
		"cluster-node-timeout 2000",
		"cluster-announce-ip 127.0.0.1",
		// Without it the port + 10000, which could be an outgoing connection's.
		fmt.Sprintf("cluster-port %d", testproc.FreePort(t)),
	)
	node.start()
	return node
}

// Addresses are those of all nodes.
func (c *Cluster) Addresses() []string { return addresses(c.nodes) }

// Nodes are masters and replicas, whatever each is by now.
func (c *Cluster) Nodes() []*Server { return c.nodes }

// AwaitComplete returns when every living node says that all slots are served,
// and by nodes that live.
func (c *Cluster) AwaitComplete() {
	c.t.Helper()
	c.awaitAll("calls the cluster complete", func(info map[string]string) bool {
		return info["cluster_state"] == "ok" && info["cluster_slots_ok"] == fmt.Sprint(clusterSlots)
	})
	await(c.t, "every node knows who serves instead of the dead", func() bool {
		for _, node := range c.nodes {
			if node.Alive() && !c.servedByLiving(node) {
				return false
			}
		}
		return true
	})
}

func (c *Cluster) servedByLiving(witness *Server) bool {
	reply, err := witness.Try("CLUSTER", "SLOTS")
	if err != nil {
		return false
	}
	for _, r := range reply.([]any) {
		if owner := c.node(masterPort(r)); owner == nil || !owner.Alive() {
			return false
		}
	}
	return true
}

func (c *Cluster) node(port int64) *Server {
	for _, node := range c.nodes {
		if int64(node.port) == port {
			return node
		}
	}
	return nil
}

func (c *Cluster) awaitAll(what string, condition func(info map[string]string) bool) {
	c.t.Helper()
	await(c.t, "every node "+what, func() bool {
		for _, node := range c.nodes {
			if !node.Alive() {
				continue
			}
			reply, err := node.Try("CLUSTER", "INFO")
			if err != nil || !condition(parseInfo(reply)) {
				return false
			}
		}
		return true
	})
}

// SlotOf is the slot of a key.
func (c *Cluster) SlotOf(key string) int {
	c.t.Helper()
	slot, ok := c.living().Do("CLUSTER", "KEYSLOT", key).(int64)
	if !ok {
		c.t.Fatalf("the slot of %q is no number", key)
	}
	return int(slot)
}

// Owner is the master that serves a slot.
func (c *Cluster) Owner(slot int) *Server {
	c.t.Helper()
	owner := c.node(ownerPort(c.living().Do("CLUSTER", "SLOTS"), slot))
	if owner == nil {
		c.t.Fatalf("none of the nodes serves slot %d", slot)
	}
	return owner
}

// ownerPort finds a slot in the reply to CLUSTER SLOTS. It is -1 if nobody
// serves the slot.
func ownerPort(reply any, slot int) int64 {
	ranges, _ := reply.([]any)
	for _, r := range ranges {
		if r := r.([]any); r[0].(int64) <= int64(slot) && int64(slot) <= r[1].(int64) {
			return masterPort(r)
		}
	}
	return -1
}

// masterPort reads an element of CLUSTER SLOTS: first slot, last slot, and
// nodes, the master before its replicas, each with address and port.
func masterPort(r any) int64 { return r.([]any)[2].([]any)[1].(int64) }

func (c *Cluster) living() *Server {
	c.t.Helper()
	for _, node := range c.nodes {
		if node.Alive() {
			return node
		}
	}
	c.t.Fatal("no node of the cluster lives")
	return nil
}

// MoveSlot hands a slot and the keys in it over to another master, as
// resharding does: while it lasts, clients are sent to and fro with ASK, then
// with MOVED.
func (c *Cluster) MoveSlot(slot int, to *Server) {
	c.t.Helper()
	from := c.Owner(slot)
	if from == to {
		return
	}
	toID, fromID := to.Do("CLUSTER", "MYID"), from.Do("CLUSTER", "MYID")
	to.Do("CLUSTER", "SETSLOT", slot, "IMPORTING", fromID)
	from.Do("CLUSTER", "SETSLOT", slot, "MIGRATING", toID)
	for {
		keys, _ := from.Do("CLUSTER", "GETKEYSINSLOT", slot, 100).([]any)
		if len(keys) == 0 {
			break
		}
		from.Do(append([]any{"MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS"}, keys...)...)
	}
	// The new owner hears it first, so that nobody is sent back; all others
	// hear it from these two.
	to.Do("CLUSTER", "SETSLOT", slot, "NODE", toID)
	from.Do("CLUSTER", "SETSLOT", slot, "NODE", toID)
	await(c.t, "every node knows the slot's owner", func() bool { return c.ownersAgree(slot, to) })
}

func (c *Cluster) ownersAgree(slot int, owner *Server) bool {
	for _, node := range c.nodes {
		if !node.Alive() {
			continue
		}
		reply, err := node.Try("CLUSTER", "SLOTS")
		if err != nil || ownerPort(reply, slot) != int64(owner.port) {
			return false
		}
	}
	return true
}

// KillMaster kills the master that serves a slot and returns it. Its replica,
// if it has one, is promoted some three seconds later; see AwaitComplete.
func (c *Cluster) KillMaster(slot int) *Server {
	c.t.Helper()
	master := c.Owner(slot)
	master.Kill()
	return master
}
