// Package testclock makes instants as a machine has them that was asleep, which
// virtual time cannot: there the two clocks of time.Time never part.
package testclock

import (
	"time"
	"unsafe"
)

// Suspend changes *t, an instant with a monotonic reading, as if the machine
// had slept for d since: by the wall clock it is d further in the past, by the
// monotonic clock it is not. It reports whether t had a monotonic reading.
func Suspend(t *time.Time, d time.Duration) bool {
	const hasMonotonic = 1 << 63 // see the comment on time.Time's field wall
	wall := (*uint64)(unsafe.Pointer(t))
	if *wall&hasMonotonic == 0 {
		return false
	}
	*wall -= uint64(d/time.Second) << 30
	return true
}
