package admission

import (
	"context"
	"math"
	"math/rand/v2"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
	"time"
)

const (
	// DefaultWait is how long half of all goroutines may wait for a processor
	// before the process counts as behind. A call waits two or three times on
	// its way, so that most are answered in some seconds even then. A machine
	// that is merely busy, or throttled by its cgroup, stays far below: runs of
	// 100 ms are what the kernel deals in.
	DefaultWait = 500 * time.Millisecond

	// look is how often the process is looked at.
	look = 100 * time.Millisecond
	// window is how many looks a median is taken over.
	window = 10
	// patience is how long the process must be behind before any call is turned
	// away: bursts pass.
	patience = time.Second
	// more is what is added each second to the share that is turned away while
	// the process is behind, and less what is left of it after each second in
	// which it is not. It takes 5 s to turn most away, and 2 s to take most in
	// again.
	more, less = 0.2, 0.35
	// mostShed leaves some calls, which show whether it helps.
	mostShed = 0.95
	// full is which part of GOMEMLIMIT may be in use by what lives on.
	full = 0.9
)

// load is what one look at the process has found.
type load struct {
	wait   time.Duration // for a processor, the median
	memory float64       // in use, as a part of what may be; 0 if nothing limits it
}

// controller decides which share of new calls to turn away. It is a function of
// the loads that it is told, and when: additive increase, multiplicative
// decrease. A process that is behind looks at itself less often, so time counts,
// not looks.
type controller struct {
	most   time.Duration
	behind time.Duration // for how long
	share  float64
}

// next is told what was found a time after the last look.
func (c *controller) next(l load, after time.Duration) float64 {
	seconds := after.Seconds()
	switch {
	case l.memory >= full:
		c.share = min(mostShed, c.share+5*more*seconds)
	case l.wait > c.most:
		if c.behind += after; c.behind > patience {
			c.share = min(mostShed, c.share+more*seconds)
		}
	case l.wait > c.most/2: // better, but not good
		c.behind = 0
	default:
		c.behind = 0
		if c.share *= math.Pow(less, seconds); c.share < 0.01 {
			c.share = 0
		}
	}
	return c.share
}

// Overload tells which calls to turn away while the process cannot keep up. It
// judges by how long goroutines wait for a processor, which nothing that callers
// send can forge, and by the memory in use where GOMEMLIMIT bounds it. The zero
// value turns nobody away.
type Overload struct{ share atomic.Uint64 }

// Shed reports whether to turn this call away.
func (o *Overload) Shed() bool {
	share := o.share.Load()
	return share != 0 && rand.Float64() < math.Float64frombits(share)
}

// Share returns which part of the calls is turned away.
func (o *Overload) Share() float64 { return math.Float64frombits(o.share.Load()) }

// Watch looks at the process until ctx ends. It is behind when the median wait
// for a processor is above most.
func (o *Overload) Watch(ctx context.Context, most time.Duration) {
	defer o.share.Store(0)
	ticker := time.NewTicker(look)
	defer ticker.Stop()
	s, c := newSampler(), controller{most: most}
	for last := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			now := time.Now()
			o.share.Store(math.Float64bits(c.next(s.look(), now.Sub(last))))
			last = now
		}
	}
}

// What is asked of the runtime.
const (
	schedulerWaits = "/sched/latencies:seconds"
	liveHeap       = "/gc/heap/live:bytes"
	stacks         = "/memory/classes/heap/stacks:bytes"
)

// sampler looks at the process.
type sampler struct {
	samples []metrics.Sample
	// past has the counts of the scheduler's waits at the last looks, the
	// oldest at at.
	past [window][]uint64
	at   int
}

func newSampler() *sampler {
	return &sampler{samples: []metrics.Sample{{Name: schedulerWaits}, {Name: liveHeap}, {Name: stacks}}}
}

func (s *sampler) look() load {
	metrics.Read(s.samples)
	var l load
	if h := s.samples[0].Value; h.Kind() == metrics.KindFloat64Histogram {
		waits := h.Float64Histogram()
		l.wait = median(waits.Buckets, waits.Counts, s.past[s.at])
		s.past[s.at] = append(s.past[s.at][:0], waits.Counts...)
		s.at = (s.at + 1) % window
	}
	// What the last collection left, not what is waiting for the next one: a
	// heap may grow up to the limit before that, and usually does.
	limit := debug.SetMemoryLimit(-1)
	if heap, stack := s.samples[1].Value, s.samples[2].Value; limit != math.MaxInt64 && heap.Kind() == metrics.KindUint64 && stack.Kind() == metrics.KindUint64 {
		l.memory = float64(heap.Uint64()+stack.Uint64()) / float64(limit)
	}
	return l
}

// median of what a histogram has counted since then, rounded down to a bucket.
// Nothing counted is no wait.
func median(buckets []float64, now, then []uint64) time.Duration {
	var total uint64
	since := func(i int) uint64 {
		if i < len(then) {
			return now[i] - then[i]
		}
		return now[i]
	}
	for i := range now {
		total += since(i)
	}
	if total == 0 {
		return 0
	}
	var below uint64
	for i := range now {
		if below += since(i); 2*below >= total {
			return time.Duration(max(0, buckets[i]) * float64(time.Second))
		}
	}
	return 0
}
