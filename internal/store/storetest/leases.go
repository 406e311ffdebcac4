package storetest

import (
	"fmt"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

var leases = map[string]func(*history){
	"there is one at a time":                       oneLease,
	"one of many claims at once gets it":           oneOfMany,
	"it ends by itself":                            leaseEnds,
	"it is renewed by its owner only":              renewal,
	"it can be given back":                         givenBack,
	"it is given back by who finds a token":        givenBackUnused,
	"each family has its own":                      families,
	"looking takes no part":                        looking,
	"its fences rise, and above what others saw":   fences,
	"what answers a claim, before what":            order,
	"what answers a claim on a consent, and first": consentOrder,
}

func oneLease(h *history) {
	first := h.acquire("p", broker.Demand{}, broker.Granted)
	busy := h.acquire("q", broker.Demand{}, broker.Busy)
	h.about("wait", busy.Wait, lease)
	h.Advance(lease / 2)
	if again := h.acquire("p", broker.Demand{}, broker.Granted); again.Fence != first.Fence {
		h.t.Errorf("the owner got fence %d, and %d before", again.Fence, first.Fence)
	}
	busy = h.acquire("q", broker.Demand{}, broker.Busy) // asking again has made it last its length again
	h.about("wait", busy.Wait, lease)
}

func oneOfMany(h *history) {
	claims := make(chan broker.Acquisition)
	for i := range 50 {
		go func() {
			c := h.claimOf(fmt.Sprint("owner", i), "", anew)
			a, err := []broker.Store{h.Store, h.Another}[i%2].Acquire(h.ctx(), c)
			if err != nil {
				h.t.Errorf("acquire: %v", err)
			}
			claims <- a
		}()
	}
	granted := 0
	for range 50 {
		switch a := <-claims; a.Verdict {
		case broker.Granted:
			granted++
		case broker.Busy:
		default:
			h.t.Errorf("verdict %d", a.Verdict)
		}
	}
	h.want("granted", granted, 1)
}

func leaseEnds(h *history) {
	first := h.lease("p")
	h.Advance(lease + time.Millisecond)
	h.renew(first, false)
	if second := h.lease("q"); second.Fence <= first.Fence {
		h.t.Errorf("fence %d after %d", second.Fence, first.Fence)
	}
	h.renew(first, false)
}

func renewal(h *history) {
	l := h.lease("p")
	for range 5 {
		h.Advance(lease / 2)
		h.renew(l, true)
	}
	h.acquire("q", broker.Demand{}, broker.Busy)
	h.renew(broker.Lease{Family: h.family, Owner: "q", Fence: l.Fence, Length: lease}, false)
	h.renew(broker.Lease{Family: h.family, Owner: "p", Fence: l.Fence + 1, Length: lease}, false)
}

func givenBack(h *history) {
	l := h.lease("p")
	if f := h.fail(l, broker.Failure{}); f.Kind != broker.NoFailure {
		h.t.Errorf("remembered %+v", f)
	}
	h.renew(l, false)
	h.lease("q")
}

func givenBackUnused(h *history) {
	h.lease("p")
	h.Another.Restore(h.family, "", token("t1", hour))
	h.eventually("the restored token's arrival", func() bool { return h.look("").Token != nil })
	h.acquire("p", broker.Demand{}, broker.Usable)
	h.lease("q")
}

func families(h *history) {
	h.lease("p")
	another := *h
	another.family = "another"
	another.fail(another.lease("q"), transient(0))
	another.drop("operation", "")
	h.acquire("p", broker.Demand{}, broker.Granted)
}

func looking(h *history) {
	if r := h.look(""); r.Token != nil || r.Failure != nil || r.Consent != nil || r.ToRevoke {
		h.t.Errorf("an empty family: %+v", r)
	}
	h.save(h.lease("p"), plain("t1"), broker.Saved)
	h.fail(h.lease("p"), transient(0))
	r := h.look("")
	if r.Token == nil || r.Failure == nil || r.Token.Access.Reveal() != "t1" || r.Failure.Attempts != 1 || r.Consent != nil || r.ToRevoke {
		h.t.Errorf("%+v", r)
	}
	if r := h.look("b"); r.Token != nil || r.Failure == nil {
		h.t.Errorf("another slot: %+v", r)
	}
}

func fences(h *history) {
	g := broker.Generation(0)
	for i := range 5 {
		owner := string(rune('p' + i))
		l := h.lease(owner)
		if l.Fence <= g {
			h.t.Fatalf("fence %d after %d", l.Fence, g)
		}
		g = l.Fence
		h.fail(l, broker.Failure{})
	}
	// Whoever saw more than the store has the last word.
	c := h.claimOf("z", "", anew)
	c.Floor = g + 1_000_000
	if a := h.claim(c, broker.Granted); a.Fence <= c.Floor {
		h.t.Errorf("fence %d is not above the floor %d", a.Fence, c.Floor)
	}
}

// order has all that may answer a claim hold at once, and takes away one after
// the other.
func order(h *history) {
	t1 := h.save(h.lease("p"), plain("t1"), broker.Saved)
	newer := broker.Demand{NewerThan: t1.Generation}
	long := broker.Demand{NewerThan: t1.Generation, Lifetime: hour}
	report := broker.Demand{NewerThan: t1.Generation, Lifetime: hour, Not: id("t1")}
	h.fail(h.lease("p"), rejected("secret", 30*time.Second))
	holder := h.claimOf("q", "", newer)
	holder.Credentials, holder.Length = []string{"new-secret"}, time.Minute
	h.acquire("r", report, broker.TooSoon)
	h.Advance(11 * time.Second)
	q := h.claim(holder, broker.Granted)
	holder.Demand = long

	h.acquire("r", broker.Demand{}, broker.Usable)
	h.claim(holder, broker.Granted) // its own, whatever else may stand in the way
	h.acquire("r", long, broker.Short)
	if a := h.acquire("r", newer, broker.Refused); a.Failure == nil || a.Failure.Kind != broker.Rejection {
		h.t.Errorf("refused by %+v", a.Failure)
	}
	h.Advance(20 * time.Second)
	h.acquire("r", newer, broker.Busy)
	h.Advance(time.Minute)
	if a := h.acquire("r", newer, broker.Granted); a.Fence <= q.Fence {
		h.t.Errorf("fence %d after %d", a.Fence, q.Fence)
	}
}

func consentOrder(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l := h.lease("p")
	h.intend(l, "r1", broker.Intended)

	h.acquire("q", broker.Demand{}, broker.Usable)
	h.acquire("q", anew, broker.Busy)
	h.Advance(lease + time.Millisecond)
	doubt := h.acquire("q", anew, broker.InDoubt)
	h.about("wait", doubt.Wait, horizon-lease)
	h.claim(h.claimOf("q", "b", broker.Demand{}), broker.InDoubt) // one refresh token, whatever the slot
	plain := h.claimOf("q", "", anew)
	plain.Consent = broker.NoConsent
	h.claim(plain, broker.Granted) // who does not present it need not wait
	h.acquire("r", anew, broker.Busy)
	h.Advance(lease + time.Millisecond)
	h.fail(l, dead("r1"))
	h.acquire("q", anew, broker.Refused)
	h.drop("operation", "")
	h.acquire("q", broker.Demand{}, broker.Unauthorized)
}
