package admission_test

import (
	"context"
	"runtime"
	"runtime/debug"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/admission"
)

const tick = 100 * time.Millisecond

// after is the share that is turned away after some time with this much memory
// in use.
func after(share float64, d time.Duration, memory float64) float64 {
	for ; d > 0; d -= tick {
		share = admission.Next(share, memory, tick)
	}
	return share
}

func TestShare(t *testing.T) {
	if share := after(0, time.Hour, .89); share != 0 {
		t.Errorf("turns away %v while there is memory", share)
	}
	share := 0.0
	for range 9 {
		was := share
		if share = admission.Next(share, .9, tick); share <= was || share > was+.11 {
			t.Fatalf("from %v to %v at once", was, share)
		}
	}
	// Some are let in always: they show whether it has helped.
	if share = after(share, time.Hour, 2); share < .9 || share > .95 {
		t.Errorf("turns away %v, want 0.95", share)
	}
	for range 30 {
		was := share
		if share = admission.Next(share, .5, tick); share < was*.85 {
			t.Fatalf("from %v to %v at once", was, share)
		}
	}
	if share = after(share, 10*time.Second, .5); share != 0 {
		t.Errorf("turns away %v when there is memory again", share)
	}
	// Time counts, not looks.
	if share = admission.Next(0, .9, 800*time.Millisecond); share < .7 || share > .9 {
		t.Errorf("turns away %v after 0.8 s", share)
	}
}

func TestMemoryLimit(t *testing.T) {
	if memory := admission.Memory(); memory != 0 {
		t.Skip("GOMEMLIMIT is set")
	}
	ballast := make([]byte, 64<<20)
	runtime.GC()
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(68 << 20))
	if memory := admission.Memory(); memory < .9 || memory > 2 {
		t.Errorf("%v of the memory is in use, want most of it", memory)
	}
	debug.SetMemoryLimit(1 << 30)
	if memory := admission.Memory(); memory > .2 {
		t.Errorf("%v of the memory is in use, want little", memory)
	}
	runtime.KeepAlive(ballast)
}

// Nothing happens in the process any more: that memory is there again is seen
// all the same.
func TestMemoryComesBackAtRest(t *testing.T) {
	ballast := make([]byte, 64<<20)
	runtime.GC()
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(68 << 20))
	var o admission.Overload
	ctx, stop := context.WithCancel(t.Context())
	var watching sync.WaitGroup
	defer watching.Wait()
	defer stop()
	watching.Go(func() { o.Watch(ctx) })
	await := func(what string, condition func() bool) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); !condition(); time.Sleep(tick) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: not within 20 s", what)
			}
		}
	}
	await("most is turned away", func() bool { return o.Share() > .9 })
	runtime.KeepAlive(ballast)
	await("nothing is turned away", func() bool { return o.Share() == 0 })
}
