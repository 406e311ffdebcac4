package admission_test

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/admission"
)

func TestRate(t *testing.T) {
	for _, rate := range []int{1, 3, 7, 100, 5000, 999_983, 1_000_000} {
		t.Run(fmt.Sprint(rate), func(t *testing.T) {
			u := &admission.Usage{}
			const start = time.Hour
			burst := 0
			for u.TakeAt(start, rate) == 0 {
				burst++
			}
			if burst < 2*rate || burst > 2*rate+max(1, rate/100) { // a step is whole nanoseconds
				t.Errorf("a burst of %d, want %d", burst, 2*rate)
			}
			// The wait is real: just before its end no, at its end yes, once.
			wait := u.TakeAt(start, rate)
			if step := time.Second / time.Duration(rate); wait <= 0 || wait > step {
				t.Errorf("wait %s, want at most %s", wait, step)
			}
			if again := u.WaitAt(start, rate); again != wait {
				t.Errorf("looking says %s, taking %s", again, wait)
			}
			if u.TakeAt(start+wait-1, rate) == 0 {
				t.Error("it was let in a nanosecond too early")
			}
			if left := u.TakeAt(start+wait, rate); left != 0 {
				t.Errorf("it was told to wait %s, and then %s more", wait, left)
			}
			if u.TakeAt(start+wait, rate) == 0 {
				t.Error("it was let in twice")
			}
			// What was refused is not held against the caller.
			second := 0
			for at := time.Duration(0); at < time.Second; at += time.Second / time.Duration(4*rate+1) {
				if u.TakeAt(start+wait+at, rate) == 0 {
					second++
				}
			}
			if second < rate-rate/50-1 || second > rate+rate/50+1 {
				t.Errorf("%d calls in the next second, want %d", second, rate)
			}
			// A rest gives the burst back, and no more.
			burst = 0
			for u.TakeAt(2*start, rate) == 0 {
				burst++
			}
			if burst < 2*rate || burst > 2*rate+max(1, rate/100) {
				t.Errorf("after a rest a burst of %d, want %d", burst, 2*rate)
			}
		})
	}
}

func TestRateUnderContention(t *testing.T) {
	u := &admission.Usage{}
	var taken atomic.Int64
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 1000 {
				if u.TakeAt(time.Hour, 1000) == 0 {
					taken.Add(1)
				}
			}
		})
	}
	all.Wait()
	if taken.Load() != 2000 {
		t.Errorf("%d of 8,000 calls at once, want 2,000", taken.Load())
	}
}

func TestCallsUnderWay(t *testing.T) {
	var c admission.Callers
	first, ok := c.Begin("spiffe://prod/a", nil, 2)
	if !ok {
		t.Fatal("the first call was refused")
	}
	second, ok := c.Begin("spiffe://prod/a", nil, 2)
	if !ok || second != first {
		t.Errorf("the second call: %v, counted apart: %v", ok, second != first)
	}
	if _, ok := c.Begin("spiffe://prod/a", first, 2); ok {
		t.Error("a third call was let in")
	}
	if _, ok := c.Begin("spiffe://prod/b", nil, 2); !ok {
		t.Error("another caller was refused")
	}
	first.End()
	if _, ok := c.Begin("spiffe://prod/a", first, 2); !ok {
		t.Error("a call was refused though one has ended")
	}
}

func TestCallersAreForgottenWhenIdle(t *testing.T) {
	var c admission.Callers
	busy, _ := c.Begin("busy", nil, 1)
	owing, _ := c.Begin("owing", nil, 1)
	for owing.Take(time.Now(), 1) == 0 {
	}
	owing.End()
	pending := c.Of("pending", nil)
	pending.Pending.Add()
	idle, _ := c.Begin("idle", nil, 1)
	idle.End()
	c.Tidy()
	if c.Len() != 3 {
		t.Errorf("%d callers are known, want 3", c.Len())
	}
	for name, u := range map[string]*admission.Usage{"busy": busy, "owing": owing, "pending": pending} {
		if c.Of(name, nil) != u {
			t.Errorf("%s was forgotten", name)
		}
	}
	// A connection that still has the forgotten one gets what all others get.
	again, ok := c.Begin("idle", idle, 1)
	if !ok || again == idle || c.Of("idle", nil) != again {
		t.Errorf("one caller has two counts: %v", ok)
	}
	if _, ok := c.Begin("idle", idle, 1); ok {
		t.Error("the forgotten count let another call in")
	}
}

func TestTableIsBounded(t *testing.T) {
	c := admission.NewCallers(100)
	var busy []*admission.Usage
	for i := range 100 {
		u, _ := c.Begin(fmt.Sprint(i), nil, 1000)
		busy = append(busy, u)
	}
	// No room: the others share one count, and stay bounded together.
	one, ok := c.Begin("more", nil, 1)
	if !ok || c.Len() != 100 {
		t.Fatalf("%v, %d callers", ok, c.Len())
	}
	if _, ok := c.Begin("still more", nil, 1); ok {
		t.Error("two without room have two calls under way")
	}
	one.End()
	// One that had a place keeps it.
	if c.Of("7", nil) != busy[7] {
		t.Error("a busy caller was forgotten")
	}
	// Room, as soon as some are idle.
	for _, u := range busy[:50] {
		u.End()
	}
	c.Tidy()
	mine, ok := c.Begin("more", one, 1)
	if !ok || mine == one || c.Len() != 51 {
		t.Errorf("no place though there is room: %v, %d callers", ok, c.Len())
	}
}

func TestFullTableMakesRoomByItself(t *testing.T) {
	c := admission.NewCallers(1000)
	for i := range 1500 {
		u, ok := c.Begin(fmt.Sprint(i), nil, 1)
		if !ok {
			t.Fatalf("caller %d was refused", i)
		}
		u.End()
	}
	if c.Len() > 1000 {
		t.Errorf("%d callers, want at most 1,000", c.Len())
	}
}

func TestCallersWhileTheyAreForgotten(t *testing.T) {
	var c admission.Callers
	stop := make(chan struct{})
	var tidying sync.WaitGroup
	tidying.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				c.Tidy()
			}
		}
	})
	// Eight hold the same name, and no more than two may have calls under way.
	var under, most, refused atomic.Int64
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			var known *admission.Usage
			for range 2000 {
				u, ok := c.Begin("a", known, 2)
				known = u
				if !ok {
					refused.Add(1)
					continue
				}
				if n := under.Add(1); n > most.Load() {
					most.Store(n)
				}
				under.Add(-1)
				u.End()
			}
		})
	}
	all.Wait()
	close(stop)
	tidying.Wait()
	if most.Load() > 2 {
		t.Errorf("%d calls at once, want at most 2", most.Load())
	}
	c.Tidy()
	if c.Len() != 0 {
		t.Error("calls are still counted")
	}
}

func BenchmarkCaller(b *testing.B) {
	var c admission.Callers
	b.ReportAllocs()
	var known *admission.Usage
	for b.Loop() {
		known, _ = c.Begin("spiffe://prod/ns/batch/sa/invoices", known, 10)
		known.Take(time.Now(), 5000)
		known.End()
	}
}
