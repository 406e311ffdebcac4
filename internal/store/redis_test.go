package store

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/store/storetest"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
)

func testKeyset(t testing.TB) *Keyset {
	t.Helper()
	text, err := NewKeyset()
	if err != nil {
		t.Fatal(err)
	}
	k, err := ParseKeyset(text)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// replica is a store of its own at that Redis. The settle window of its start is
// over.
func replica(t *testing.T, address string, k *Keyset) *Redis {
	t.Helper()
	return replicaAt(t, RedisOptions{Addresses: []string{address}}, k)
}

func replicaAt(t *testing.T, o RedisOptions, k *Keyset) *Redis {
	t.Helper()
	r, err := NewRedis(o, Access{Keyset: k})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	eventually(t, "the subscription", 20*time.Second, func() bool { return r.Stats().Subscribed })
	var everywhere []string
	for i := range 64 {
		everywhere = append(everywhere, recordKey(fmt.Sprint(i)))
	}
	if _, err := r.link.headers(t.Context(), everywhere, "c"); err != nil { // each node is met for the first time
		t.Fatal(err)
	}
	r.settled.Store(0)
	return r
}

// shared are two replicas at one Redis, of one node or several, which loses
// everything when both have seen it.
func shared(t *testing.T, k *Keyset, nodes ...*testredis.Server) storetest.Subject {
	t.Helper()
	o := RedisOptions{Cluster: len(nodes) > 1}
	for _, n := range nodes {
		n.Flush()
		o.Addresses = append(o.Addresses, n.Address())
	}
	p, q := replicaAt(t, o, k), replicaAt(t, o, k)
	return storetest.Subject{
		Store: p, Another: q,
		Advance: func(d time.Duration) {
			p.offset.Add(d.Milliseconds())
			q.offset.Add(d.Milliseconds())
		},
		Lose: func() {
			for _, n := range nodes {
				for _, key := range n.Do("KEYS", keyPrefix+"*").([]any) {
					family := strings.TrimSuffix(strings.TrimPrefix(key.(string), keyPrefix), keySuffix)
					for _, r := range []*Redis{p, q} {
						if err := r.sync(t.Context(), family); err != nil {
							t.Fatal(err)
						}
					}
				}
				n.Flush()
			}
		},
	}
}

func TestRedis(t *testing.T) {
	server, k := testredis.Start(t, testredis.Options{}), testKeyset(t)
	storetest.Run(t, func(t *testing.T, history func(*testing.T, storetest.Subject)) {
		history(t, shared(t, k, server))
	})
}

func TestRedisCluster(t *testing.T) {
	cluster, k := testredis.StartCluster(t, testredis.ClusterOptions{}), testKeyset(t)
	storetest.Run(t, func(t *testing.T, history func(*testing.T, storetest.Subject)) {
		history(t, shared(t, k, cluster.Nodes()...))
	})
}

func TestRedisWalks(t *testing.T) {
	server, k := testredis.Start(t, testredis.Options{}), testKeyset(t)
	for range 20 {
		seed := rand.Uint64()
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			storetest.Walk(t, shared(t, k, server), seed, 300)
		})
	}
}
