package admission

import "time"

// NewCallers returns a table with room for most callers.
func NewCallers(most int) *Callers { return &Callers{most: most} }

// TakeAt is Take at an instant.
func (r *Rate) TakeAt(now time.Duration, rate int) time.Duration { return r.take(int64(now), rate) }

// WaitAt is Wait at an instant.
func (r *Rate) WaitAt(now time.Duration, rate int) time.Duration { return r.wait(int64(now), rate) }

// Next is the share of calls to turn away after another.
var Next = next

// Memory is what a look at this process finds.
func Memory() float64 { return memory(newSamples()) }
