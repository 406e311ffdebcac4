package store

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
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
	r, err := NewRedis(RedisOptions{Addresses: []string{address}}, Access{Keyset: k})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	eventually(t, "the subscription", 20*time.Second, func() bool { return r.Stats().Subscribed && r.Stats().Sweeps > 0 })
	r.settled.Store(0)
	return r
}

func TestRedis(t *testing.T) {
	server, k := testredis.Start(t, testredis.Options{}), testKeyset(t)
	storetest.Run(t, func(t *testing.T, history func(*testing.T, storetest.Subject)) {
		server.Flush()
		p, q := replica(t, server.Address(), k), replica(t, server.Address(), k)
		history(t, storetest.Subject{
			Store: p, Another: q,
			Advance: func(d time.Duration) {
				p.offset.Add(d.Milliseconds())
				q.offset.Add(d.Milliseconds())
			},
			Lose: func() { server.Flush() },
		})
	})
}

var _ = fmt.Sprint
var _ broker.Store
var _ context.Context
