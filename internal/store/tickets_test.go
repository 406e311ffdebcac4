package store

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
)

// The user of docs/redis.md may keep and redeem; what is kept is sealed, bound to
// its place, and ends by itself.
func TestTicketsInRedis(t *testing.T) {
	docs, err := os.ReadFile("../../docs/redis.md")
	if err != nil {
		t.Fatal(err)
	}
	user := regexp.MustCompile("(?m)^user (broker .*)$").FindSubmatch(docs)
	if user == nil {
		t.Fatal("docs/redis.md has no line that begins with: user broker")
	}
	server := testredis.Start(t, testredis.Options{Users: []string{string(user[1])}})
	newReplica := func(k *Keyset) *Redis {
		r, err := NewRedis(RedisOptions{Addresses: []string{server.Address()}, Username: "broker"}, Access{Keyset: k, Password: broker.NewSecret("CHANGE-THIS")})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(r.Close)
		return r
	}
	k := testKeyset(t)
	p, q := newReplica(k), newReplica(k)
	const content = "the verifier of a sign-in"
	for _, id := range []string{"t1", "t2", "t3"} {
		if err := p.Keep(t.Context(), broker.Ticket{ID: id, Content: broker.NewSecret(content), Life: 10 * time.Minute}); err != nil {
			t.Fatal(err)
		}
	}
	if kept := fmt.Sprint(server.Do("HGETALL", ticketKey("t1"))); strings.Contains(kept, content) || !strings.Contains(kept, "sealed") {
		t.Errorf("Redis has %s", kept)
	}
	if ttl, _ := server.Do("PTTL", ticketKey("t1")).(int64); ttl <= 0 || ttl > (10*time.Minute).Milliseconds() {
		t.Errorf("it is kept for %d ms", ttl)
	}
	if r, err := q.Redeem(t.Context(), "t1", "q"); err != nil || r.Content.Reveal() != content {
		t.Errorf("redeemed: verdict %d, %v", r.Verdict, err)
	}
	// Somebody who can write to Redis has it redeemed under another id.
	sealed, _ := server.Do("HGET", ticketKey("t2"), "sealed").(string)
	server.Do("HSET", ticketKey("t3"), "sealed", sealed)
	if r, err := q.Redeem(t.Context(), "t3", "q"); err != nil || r.Verdict != broker.TicketUnknown || !r.Content.IsEmpty() {
		t.Errorf("a moved ticket: verdict %d, %v", r.Verdict, err)
	}
	if _, err := newReplica(testKeyset(t)).Redeem(t.Context(), "t2", "r"); err == nil {
		t.Error("redeemed without the key")
	}
}
