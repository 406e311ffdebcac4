package admission_test

import (
	"math"
	"runtime"
	"runtime/debug"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/admission"
)

const (
	most = admission.DefaultWait
	tick = 100 * time.Millisecond
)

// after feeds a controller one load for some time.
func after(next func(time.Duration, float64, time.Duration) float64, d, wait time.Duration, memory float64) (share float64) {
	for ; d > 0; d -= tick {
		share = next(wait, memory, tick)
	}
	return share
}

func TestController(t *testing.T) {
	t.Run("idle", func(t *testing.T) {
		if share := after(admission.Controller(most), time.Minute, 0, 0); share != 0 {
			t.Errorf("turns away %v", share)
		}
	})
	t.Run("just good enough", func(t *testing.T) {
		if share := after(admission.Controller(most), time.Hour, most, .89); share != 0 {
			t.Errorf("turns away %v", share)
		}
	})
	t.Run("bursts of a second pass", func(t *testing.T) {
		c := admission.Controller(most)
		for range 100 {
			if share := after(c, time.Second, time.Minute, 0); share != 0 {
				t.Fatalf("turns away %v", share)
			}
			after(c, tick, 0, 0)
		}
	})
	t.Run("behind", func(t *testing.T) {
		c := admission.Controller(most)
		after(c, time.Second, most+1, 0)
		last := 0.0
		for range 40 {
			share := c(most+1, 0, tick)
			if share <= last || share > last+.03 {
				t.Fatalf("from %v to %v at once", last, share)
			}
			last = share
		}
		// Some are let in always: they show whether it has helped.
		if share := after(c, time.Hour, time.Minute, 0); share < .9 || share > .95 {
			t.Errorf("turns away %v, want 0.95", share)
		}
		// Better, but not good: it stays as it is.
		if share := after(c, time.Minute, most/2+1, 0); share < .9 {
			t.Errorf("turns away %v while the wait is above half", share)
		}
		for range 30 {
			share := c(0, 0, tick)
			if share < last*.85 {
				t.Fatalf("from %v to %v at once", last, share)
			}
			last = share
		}
		if share := after(c, 10*time.Second, 0, 0); share != 0 {
			t.Errorf("turns away %v when all is well again", share)
		}
	})
	t.Run("too busy to look often", func(t *testing.T) {
		c := admission.Controller(most)
		for range 4 {
			c(time.Minute, 0, time.Second)
		}
		if share := c(time.Minute, 0, time.Second); share < .7 || share > .9 {
			t.Errorf("turns away %v after 5 s", share)
		}
	})
	t.Run("memory", func(t *testing.T) {
		c := admission.Controller(most)
		if share := after(c, time.Second, 0, .9); share < .9 {
			t.Errorf("turns away %v after a second", share)
		}
		if share := after(c, 10*time.Second, 0, .5); share != 0 {
			t.Errorf("turns away %v when there is memory again", share)
		}
	})
}

func TestMedian(t *testing.T) {
	buckets := []float64{math.Inf(-1), 0, .001, .01, .1, 1, math.Inf(1)}
	for name, c := range map[string]struct {
		now, then []uint64
		want      time.Duration
	}{
		"nothing ever":         {make([]uint64, 6), nil, 0},
		"nothing since":        {[]uint64{0, 1, 2, 3, 4, 5}, []uint64{0, 1, 2, 3, 4, 5}, 0},
		"all in one":           {[]uint64{0, 0, 0, 9, 0, 0}, nil, 10 * time.Millisecond},
		"half":                 {[]uint64{0, 5, 0, 0, 5, 0}, nil, 0},
		"more than half":       {[]uint64{0, 5, 0, 0, 6, 0}, nil, 100 * time.Millisecond},
		"only what came since": {[]uint64{0, 1000, 0, 0, 6, 0}, []uint64{0, 1000, 0, 0, 0, 0}, 100 * time.Millisecond},
		"below all buckets":    {[]uint64{3, 0, 0, 0, 0, 0}, nil, 0},
		"above all buckets":    {[]uint64{0, 0, 0, 0, 0, 3}, nil, time.Second},
	} {
		if got := admission.Median(buckets, c.now, c.then); got != c.want {
			t.Errorf("%s: got %s, want %s", name, got, c.want)
		}
	}
}

// A process with far more work than processors is seen as such, and one at rest
// is not.
func TestLook(t *testing.T) {
	look := admission.Look()
	look()
	var all sync.WaitGroup
	stop := make(chan struct{})
	for range 200 * runtime.GOMAXPROCS(0) {
		all.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				for began := time.Now(); time.Since(began) < 100*time.Microsecond; {
				}
				runtime.Gosched()
			}
		})
	}
	deadline := time.Now().Add(20 * time.Second)
	for {
		if wait, _ := look(); wait > 5*time.Millisecond {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("nothing was seen in 20 s")
		}
		time.Sleep(tick)
	}
	close(stop)
	all.Wait()
}

func TestMemoryLimit(t *testing.T) {
	if _, memory := admission.Look()(); memory != 0 {
		t.Skip("GOMEMLIMIT is set")
	}
	ballast := make([]byte, 64<<20)
	runtime.GC()
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(68 << 20))
	if _, memory := admission.Look()(); memory < .9 || memory > 2 {
		t.Errorf("%v of the memory is in use, want most of it", memory)
	}
	debug.SetMemoryLimit(1 << 30)
	if _, memory := admission.Look()(); memory > .2 {
		t.Errorf("%v of the memory is in use, want little", memory)
	}
	runtime.KeepAlive(ballast)
}
