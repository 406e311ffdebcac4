package broker

import "time"

// The numbers of the protocol. Every one that replicas must agree on is a pure
// function here, which a store's scripts repeat.
const (
	// leastLifetime below which an answer makes no sense.
	leastLifetime = 10 * time.Second
	// flightDeadline covers one call and the wait for another replica's.
	flightDeadline = 30 * time.Second
	// pollInterval bounds what a lost change event costs a waiter.
	pollInterval = time.Second
	// pollJitter spreads the waiters of a lease that ran out.
	pollJitter = 250 * time.Millisecond
	// noProgress is the least wait after a server repeated its token.
	noProgress = 30 * time.Second

	backoffFirst = 5 * time.Second
	backoffLast  = time.Minute

	holdOffFirst = 10 * time.Second
	holdOffLast  = 5 * time.Minute
	// reportedEarly is the age under which a report of a replacement makes
	// the next hold-off longer.
	reportedEarly = time.Minute
)

// Margin is how much life a token keeps in reserve for the way to the resource
// server: 30 seconds, and a fifth of its life if that is less, so that short
// tokens stay usable.
func Margin(lifetime time.Duration) time.Duration { return min(30*time.Second, lifetime/5) }

// Meets reports whether a token with this id, generation, full and remaining
// life answers the demand.
func (d Demand) Meets(id string, g Generation, lifetime, remaining time.Duration) bool {
	return remaining > Margin(lifetime) && remaining >= d.Lifetime && g > d.NewerThan && (d.Not == "" || id != d.Not)
}

// TooLong reports whether the demanded life is so close to a new token's full
// life that meeting it would take a token request per call.
func (d Demand) TooLong(lifetime time.Duration) bool {
	return d.Lifetime > longestLeft(lifetime)
}

// longestLeft is what may be demanded of tokens that live so long.
func longestLeft(lifetime time.Duration) time.Duration {
	return lifetime - max(10*time.Second, lifetime/100)
}

// rounded is the demand with a life rounded up, by less than a sixtieth where that
// is a second or more: those of thousands of callers, who all count down to some
// end of their own, are a few dozen.
func (d Demand) rounded() Demand {
	step := floorStep(d.Lifetime)
	if short := d.Lifetime % step; short > 0 {
		d.Lifetime += step - short
	}
	return d
}

// floorStep is what a demanded life is rounded up to.
func floorStep(life time.Duration) time.Duration {
	step := time.Second
	for _, s := range []time.Duration{10 * time.Second, time.Minute, 10 * time.Minute, time.Hour} {
		if s <= life/60 {
			step = s
		}
	}
	return step
}

// LongestFloor is the longest life that can be demanded of a profile whose tokens
// live so long.
func LongestFloor(lifetime time.Duration) time.Duration {
	left := max(longestLeft(lifetime), 0)
	return left.Truncate(floorStep(left))
}

// Backoff is the rest after so many failed attempts in a row: 5 s doubling to
// 60 s, scaled by jitter, and never less than what the server asked for.
func Backoff(attempts int, least time.Duration, jitter float64) time.Duration {
	rest := doubled(backoffFirst, backoffLast, attempts-1)
	return max(time.Duration(float64(rest)*jitter), least)
}

// HoldOff is how long after a token was obtained reports that it was refused do
// not count: 10 s, doubling to 5 min with each replacement that was itself
// reported within a minute. A resource server that refuses everything must not
// drain the endpoint.
func HoldOff(refused int) time.Duration { return doubled(holdOffFirst, holdOffLast, refused) }

// ReportedEarly reports whether a token was refused so soon after it was
// obtained that replacing it is unlikely to help.
func ReportedEarly(age time.Duration) bool { return age <= reportedEarly }

func doubled(first, last time.Duration, times int) time.Duration {
	d := first
	for ; times > 0 && d < last; times-- {
		d *= 2
	}
	return min(d, last)
}

// leaseMargin is how long before its end a lease is no longer relied on: for
// pauses, and the way of the packet.
func leaseMargin(length time.Duration) time.Duration { return max(200*time.Millisecond, length/6) }
