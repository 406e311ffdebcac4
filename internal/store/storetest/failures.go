package storetest

import (
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

var failures = map[string]func(*history){
	"back-off grows, and counts each lease once":    backoff,
	"a success ends them":                           successClears,
	"a rejection binds its credential":              rejection,
	"a rejection for ever":                          rejectedForever,
	"a rejection binds whoever has one of several":  oneOfSeveral,
	"under a lease that ended and nobody took over": lateFailure,
	"under an overtaken lease":                      staleFailure,
	"a reset forgets, also what is on its way":      reset,
	"the first one after a reset counts":            failureAfterReset,
	"of a client, in a family that has no token":    clientRecord,
}

func backoff(h *history) {
	for i, want := range []time.Duration{5, 10, 20, 40, 60, 60} {
		want *= time.Second
		l := h.lease("p")
		f := h.fail(l, transient(0))
		if f.Attempts != i+1 || f.Rest != want {
			h.t.Fatalf("failure %d: attempt %d rests %v, want %v", i+1, f.Attempts, f.Rest, want)
		}
		if again := h.fail(l, transient(0)); again.Attempts != f.Attempts {
			h.t.Fatalf("the repeated failure counted: attempt %d", again.Attempts)
		}
		h.Advance(want / 2)
		a := h.acquire("q", broker.Demand{}, broker.Refused)
		h.about("rest", a.Failure.Rest, want/2)
		h.about("age", a.Failure.Age, want/2)
		h.Advance(want/2 + time.Millisecond)
	}
	f := h.fail(h.lease("p"), transient(10*time.Minute))
	h.about("what the server asked for", f.Rest, 10*time.Minute)
}

func successClears(h *history) {
	h.fail(h.lease("p"), transient(0))
	h.Advance(6 * time.Second)
	h.save(h.lease("p"), plain("t1"), broker.Saved)
	if r := h.look(""); r.Failure != nil {
		h.t.Errorf("remembered %+v", r.Failure)
	}
	if f := h.fail(h.lease("p"), transient(0)); f.Attempts != 1 {
		h.t.Errorf("attempt %d after a success", f.Attempts)
	}
}

func rejection(h *history) {
	f := h.fail(h.lease("p"), rejected("secret", 30*time.Minute))
	h.about("rest", f.Rest, 30*time.Minute)
	a := h.acquire("q", broker.Demand{}, broker.Refused)
	if a.Failure.Kind != broker.Rejection || a.Failure.Code != "invalid_client" || a.Failure.Text != "no" || a.Failure.Credential != "secret" {
		h.t.Errorf("remembered %+v", a.Failure)
	}
	other := h.claimOf("r", "", broker.Demand{})
	other.Credentials = []string{"new-secret"}
	l := h.claim(other, broker.Granted)
	if l.Failure == nil || l.Failure.Kind != broker.Rejection {
		h.t.Errorf("the record inside the lease shows failure %+v", l.Failure)
	}
	h.fail(broker.Lease{Family: h.family, Owner: "r", Fence: l.Fence, Length: lease}, broker.Failure{})
	h.acquire("q", broker.Demand{}, broker.Refused) // giving a lease back forgets nothing
	h.Advance(30*time.Minute + time.Second)
	h.acquire("q", broker.Demand{}, broker.Granted)
}

func oneOfSeveral(h *history) {
	h.fail(h.lease("p"), rejected("user", broker.Forever))
	of := func(credentials ...string) broker.Claim {
		c := h.claimOf("q", "", broker.Demand{})
		c.Credentials = credentials
		return c
	}
	h.claim(of("secret", "user"), broker.Refused)
	h.claim(of("user", "new-secret"), broker.Refused)
	h.claim(of("secret", "use", "r"), broker.Granted)
	h.Advance(time.Minute)
	h.claim(of("secret", "other-user"), broker.Granted)
	h.Advance(time.Minute)
	h.claim(of(), broker.Granted)
}

func rejectedForever(h *history) {
	h.fail(h.lease("p"), rejected("secret", broker.Forever))
	h.Advance(1000 * hour)
	if a := h.acquire("q", broker.Demand{}, broker.Refused); a.Failure.Rest != broker.Forever {
		h.t.Errorf("rests %v", a.Failure.Rest)
	}
}

func lateFailure(h *history) {
	late := h.lease("p")
	h.Advance(time.Minute)
	if f := h.fail(late, transient(0)); f.Kind != broker.Transient || f.Attempts != 1 {
		h.t.Errorf("remembered %+v", f)
	}
	h.acquire("q", broker.Demand{}, broker.Refused)
}

func staleFailure(h *history) {
	late := h.lease("p")
	h.Advance(lease + time.Millisecond)
	next := h.lease("q")
	if f := h.fail(late, transient(0)); f.Kind != broker.NoFailure {
		h.t.Errorf("an overtaken lease's failure was remembered: %+v", f)
	}
	h.renew(next, true)
	h.save(next, plain("t1"), broker.Saved)
	h.fail(late, transient(0))
	if r := h.look(""); r.Failure != nil {
		h.t.Errorf("remembered %+v", r.Failure)
	}
}

func reset(h *history) {
	h.fail(h.lease("p"), transient(0))
	h.reset()
	l := h.lease("p")
	h.reset()
	if f := h.fail(l, rejected("secret", broker.Forever)); f.Kind != broker.NoFailure {
		h.t.Errorf("a failure from before the reset was remembered: %+v", f)
	}
	l = h.lease("q") // and the lease was ended
	h.reset()
	h.renew(l, true)                     // a call under way goes on
	h.save(l, plain("t1"), broker.Saved) // and what it brings is good
	h.acquire("r", broker.Demand{}, broker.Usable)
}

func failureAfterReset(h *history) {
	h.fail(h.lease("p"), transient(0))
	h.reset()
	if f := h.fail(h.lease("p"), transient(0)); f.Kind != broker.Transient || f.Attempts != 1 {
		h.t.Errorf("remembered %+v", f)
	}
	h.acquire("q", broker.Demand{}, broker.Refused)
}

func clientRecord(h *history) {
	h.fail(h.lease("p"), broker.Failure{Kind: broker.Throttling, Text: "too many", Rest: 10 * time.Minute, Jitter: 1})
	a := h.acquire("q", broker.Demand{}, broker.Refused)
	h.about("rest", a.Failure.Rest, 10*time.Minute)
	if r := h.look(""); r.Failure == nil || r.Failure.Kind != broker.Throttling || r.Failure.Text != "too many" {
		h.t.Errorf("remembered %+v", r.Failure)
	}
	h.reset()
	h.lease("q")
}
