package admission

import (
	"context"
	"math"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
	"time"
)

const (
	// look is how often the process is looked at.
	look = 100 * time.Millisecond
	// more is what is added each second to the share that is turned away while
	// memory is short, and less what is left of it after each second in which it
	// is not. It takes a second to turn most away, and 2 s to take most in again.
	more, less = 1.0, 0.35
	// mostShed leaves some calls, which show whether it helps.
	mostShed = 0.95
	// stale is for how long what a collection left is taken for what there is,
	// while calls are turned away: a process that does less has fewer of them.
	stale = time.Second
	// full is which part of GOMEMLIMIT may be in use by what lives on.
	full = 0.9
)

// next is the share of new calls to turn away, a time after it was another. It
// is told which part of the memory is in use. Additive increase, multiplicative
// decrease; a process that is short of memory looks at itself less often, so
// time counts, not looks.
func next(share, memory float64, after time.Duration) float64 {
	if memory >= full {
		return min(mostShed, share+more*after.Seconds())
	}
	if share *= math.Pow(less, after.Seconds()); share < 0.01 {
		return 0
	}
	return share
}

// Overload tells which calls to turn away while memory is short, where GOMEMLIMIT
// says how much there is: a call that is let in holds some for as long as it
// waits, one that is turned away none. The zero value turns nobody away.
//
// Processors are not looked at. To turn a call away takes more of their time
// than to answer it from memory, and a call that waits for an authorization
// server takes none: who is short of them does worse by turning away.
type Overload struct{ share atomic.Uint64 }

// Shed reports whether to turn this call away.
func (o *Overload) Shed() bool {
	share := o.share.Load()
	return share != 0 && rand.Float64() < math.Float64frombits(share)
}

// Share returns which part of the calls is turned away.
func (o *Overload) Share() float64 { return math.Float64frombits(o.share.Load()) }

// Watch looks at the process until ctx ends.
func (o *Overload) Watch(ctx context.Context) {
	defer o.share.Store(0)
	ticker := time.NewTicker(look)
	defer ticker.Stop()
	samples := newSamples()
	collected := time.Now()
	for last := collected; ; {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			now := time.Now()
			share := next(o.Share(), memory(samples), now.Sub(last))
			o.share.Store(math.Float64bits(share))
			last = now
			if share > 0 && now.Sub(collected) > stale {
				runtime.GC()
				collected = time.Now()
			}
		}
	}
}

func newSamples() []metrics.Sample {
	return []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"}}
}

// memory in use, as a part of what may be; 0 if nothing limits it. It is what the
// last collection left, not what waits for the next one: a heap may grow up to
// the limit before that, and usually does.
func memory(samples []metrics.Sample) float64 {
	limit := debug.SetMemoryLimit(-1)
	if limit == math.MaxInt64 {
		return 0
	}
	metrics.Read(samples)
	used := 0.0
	for _, s := range samples {
		if s.Value.Kind() == metrics.KindUint64 {
			used += float64(s.Value.Uint64())
		}
	}
	return used / float64(limit)
}
