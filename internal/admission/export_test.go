package admission

import "time"

// NewCallers returns a table with room for most callers.
func NewCallers(most int) *Callers { return &Callers{most: most} }

// TakeAt is Take at an instant.
func (r *Rate) TakeAt(now time.Duration, rate int) time.Duration { return r.take(int64(now), rate) }

// WaitAt is Wait at an instant.
func (r *Rate) WaitAt(now time.Duration, rate int) time.Duration { return r.wait(int64(now), rate) }

// Controller turns waits for a processor, and memory in use, into the share of
// calls to turn away; after is the time since the last look.
func Controller(most time.Duration) func(wait time.Duration, memory float64, after time.Duration) float64 {
	c := controller{most: most}
	return func(wait time.Duration, memory float64, after time.Duration) float64 {
		return c.next(load{wait, memory}, after)
	}
}

// Median is the one of a histogram since then.
var Median = median

// Look is what a look at this process finds.
func Look() func() (time.Duration, float64) {
	s := newSampler()
	return func() (time.Duration, float64) {
		l := s.look()
		return l.wait, l.memory
	}
}
