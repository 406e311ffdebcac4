package store_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/store"
	"github.com/tokenbroker/tokenbroker/internal/store/storetest"
)

func TestMemory(t *testing.T) {
	storetest.Run(t, func(t *testing.T, history func(*testing.T, storetest.Subject)) {
		synctest.Test(t, func(t *testing.T) {
			history(t, memory())
		})
	})
}

func TestMemoryWalks(t *testing.T) {
	for range 200 {
		seed := rand.Uint64()
		synctest.Test(t, func(t *testing.T) { storetest.Walk(t, memory(), seed, 300) })
	}
}

// memory in virtual time.
func memory() storetest.Subject {
	return storetest.Subject{
		Store: store.NewMemory(), Advance: time.Sleep,
		Keeps: "memory is lost with the process only, and then nobody is left to put anything back",
	}
}

func TestMemoryForgetsWhatHoldsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := store.NewMemory()
		for i := range 100_000 {
			a, err := m.Acquire(t.Context(), broker.Claim{Family: fmt.Sprint(i), Owner: "p", Length: time.Second})
			if err != nil || a.Verdict != broker.Granted {
				t.Fatal(a.Verdict, err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		if n := m.Families(); n > 4096 {
			t.Errorf("%d families are kept, of which 100 hold a lease", n)
		}
	})
}

// In real time: in virtual time the two clocks never part.
func TestMemoryOfAMachineThatSlept(t *testing.T) {
	m := store.NewMemory()
	claim := broker.Claim{Family: "f", Owner: "p", Length: time.Second}
	a, err := m.Acquire(t.Context(), claim)
	if err != nil {
		t.Fatal(err)
	}
	token := broker.StoredToken{Access: broker.NewSecret("t"), Lifetime: time.Hour, Remaining: time.Hour}
	if _, verdict, err := m.Save(t.Context(), broker.Lease{Family: "f", Owner: "p", Fence: a.Fence, Length: time.Second}, broker.Result{Token: token}); verdict != broker.Saved || err != nil {
		t.Fatal(verdict, err)
	}
	if a, err := m.Acquire(t.Context(), claim); err != nil || a.Verdict != broker.Usable {
		t.Fatalf("before: verdict %d, %v", a.Verdict, err)
	}
	if !m.Suspend(3 * time.Hour) {
		t.Fatal("the token's end has no monotonic reading: this test shows nothing")
	}
	if a, err := m.Acquire(t.Context(), claim); err != nil || a.Verdict != broker.Granted {
		t.Errorf("after: verdict %d, %v; want the lease, because the token is over", a.Verdict, err)
	}
	r, err := m.Look(t.Context(), "f", "")
	if err != nil || r.Token == nil || r.Token.Remaining > 0 {
		t.Errorf("after: %+v, %v", r.Token, err)
	}
}
