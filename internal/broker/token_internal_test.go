package broker

import (
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/testclock"
)

// In real time: in virtual time the two clocks never part.
func TestTokenOfAMachineThatSlept(t *testing.T) {
	s := StoredToken{Access: NewSecret("t"), Generation: 1, Lifetime: time.Hour, Remaining: time.Hour}
	token := newToken(s, time.Now(), 24*time.Hour)
	if !token.meets(Demand{}, time.Now()) {
		t.Fatal("a new token does not serve")
	}
	if !testclock.Suspend(&token.ExpireTime, 3*time.Hour) {
		t.Fatal("the token's end has no monotonic reading: this test shows nothing")
	}
	if now := time.Now(); token.meets(Demand{}, now) || token.serves(Demand{}, now) || token.remaining(now) > 0 {
		t.Errorf("a token that ended while the machine slept serves: %v left", token.remaining(now))
	}
}

// A lease is over when it is over by one of the clocks, whatever the watchdog
// has noticed.
func TestLeaseOfAMachineThatSlept(t *testing.T) {
	const slept = 3 * time.Hour
	for _, asleep := range []bool{false, true} {
		start := time.Now()
		if asleep && !testclock.Suspend(&start, slept) {
			t.Fatal("the lease's begin has no monotonic reading: this test shows nothing")
		}
		held, lasts, release := (&Broker{}).hold(t.Context(), "p", Lease{Length: time.Hour}, start)
		defer release()
		if lasts() == asleep || held.Err() != nil {
			t.Errorf("asleep: %v, lasts: %v, watchdog: %v", asleep, lasts(), held.Err())
		}
	}
}

func TestTimesOfATokenAreInOrder(t *testing.T) {
	start := time.Now()
	for _, c := range []struct{ life, left, maxAge time.Duration }{
		{10 * time.Second, 10 * time.Second, 24 * time.Hour},
		{time.Minute, time.Minute, 24 * time.Hour},
		{time.Hour, time.Hour, 24 * time.Hour},
		{time.Hour, time.Minute, 24 * time.Hour},
		{24 * time.Hour, 24 * time.Hour, 24 * time.Hour},
		{30 * 24 * time.Hour, 30 * 24 * time.Hour, 24 * time.Hour},
		{30 * 24 * time.Hour, 30 * 24 * time.Hour, time.Minute},
	} {
		for range 100 {
			token := newToken(StoredToken{Lifetime: c.life, Remaining: c.left}, start, c.maxAge)
			if token.IssueTime.After(start) || token.renewTime.Before(token.IssueTime) || token.RefreshTime.Before(token.renewTime.Add(-c.maxAge/20)) ||
				token.RefreshTime.After(token.ExpireTime) || token.renewTime.After(token.IssueTime.Add(c.maxAge)) {
				t.Fatalf("%+v: issued %v, renewed %v, refresh %v, expires %v", c,
					token.IssueTime.Sub(start), token.renewTime.Sub(start), token.RefreshTime.Sub(start), token.ExpireTime.Sub(start))
			}
		}
	}
}
