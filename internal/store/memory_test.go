package store_test

import (
	"fmt"
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
			history(t, storetest.Subject{Store: store.NewMemory(), Advance: time.Sleep})
		})
	})
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
