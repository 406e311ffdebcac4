package storetest

import (
	"fmt"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

var tokens = map[string]func(*history){
	"it is saved and found":                             saved,
	"a save is repeatable":                              savedTwice,
	"a late save under an overtaken lease":              staleSave,
	"a late save that nothing overtook":                 lateSave,
	"one that the server repeats":                       repeatedToken,
	"one that the server repeats past its end":          repeatedPastEnd,
	"generations never fall":                            generations,
	"a demand for life":                                 demandedLife,
	"a demand for another one":                          reports,
	"reports of each replacement rest longer":           holdOff,
	"one that lives stays in view beside a failure":     refusedWithToken,
	"changes are announced to all":                      changes,
	"slots of a family that holds no consent are apart": slots,
}

func saved(h *history) {
	kept := h.save(h.lease("p"), plain("t1"), broker.Saved)
	if kept.Lifetime != hour || kept.Access.Reveal() != "t1" {
		h.t.Errorf("kept %+v", kept)
	}
	h.about("remaining", kept.Remaining, hour)
	h.Advance(20 * time.Minute)
	a := h.acquire("q", broker.Demand{}, broker.Usable)
	if a.Token.Access.Reveal() != "t1" || a.Token.Type != "Bearer" || fmt.Sprint(a.Token.Scopes) != "[a b]" || a.Token.Generation != kept.Generation || a.Token.Lifetime != hour {
		h.t.Errorf("found %+v", a.Token)
	}
	h.about("remaining", a.Token.Remaining, 40*time.Minute)
	h.Advance(40 * time.Minute)
	h.acquire("q", broker.Demand{}, broker.Granted)
}

func savedTwice(h *history) {
	l := h.lease("p")
	first := h.save(l, plain("t1"), broker.Saved)
	if second := h.save(l, plain("t1"), broker.Saved); second.Generation != first.Generation {
		h.t.Errorf("generation %d, and %d before", second.Generation, first.Generation)
	}
	next := h.lease("q") // a repeated save does not end another's lease
	h.save(l, plain("t1"), broker.Saved)
	h.renew(next, true)
	h.save(next, plain("t2"), broker.Saved)
	h.save(l, plain("t1"), broker.Stale)
	if r := h.look(""); r.Token.Access.Reveal() != "t2" {
		h.t.Errorf("the repeated save displaced its successor")
	}
}

func staleSave(h *history) {
	late := h.lease("p")
	h.Advance(lease + time.Millisecond)
	next := h.lease("q")
	h.save(late, plain("t1"), broker.Stale)
	h.renew(next, true)
	h.save(next, plain("t2"), broker.Saved)
	h.save(late, plain("t1"), broker.Stale)
	if a := h.acquire("r", broker.Demand{}, broker.Usable); a.Token.Access.Reveal() != "t2" {
		h.t.Error("the late token displaced its successor")
	}
}

func lateSave(h *history) {
	late := h.lease("p")
	h.Advance(time.Minute)
	h.save(late, plain("t1"), broker.Saved)
	h.acquire("q", broker.Demand{}, broker.Usable)
}

func repeatedToken(h *history) {
	first := h.save(h.lease("p"), plain("t1"), broker.Saved)
	h.Advance(30 * time.Minute)
	again := h.save(h.lease("q"), plain("t1"), broker.Saved)
	if again.Generation != first.Generation || again.Lifetime != hour {
		h.t.Errorf("the same token became generation %d with life %v, was %d with %v", again.Generation, again.Lifetime, first.Generation, first.Lifetime)
	}
	h.about("remaining: a repetition makes it no younger", again.Remaining, 30*time.Minute)
	h.lease("r") // the lease was ended
}

func repeatedPastEnd(h *history) {
	h.save(h.lease("p"), plain("t1"), broker.Saved)
	h.Advance(hour + time.Second)
	repeated := plain("t1")
	repeated.Token.Lifetime, repeated.Token.Remaining = 30*time.Minute, 30*time.Minute
	again := h.save(h.lease("q"), repeated, broker.Saved)
	h.about("remaining: the server's own newer word", again.Remaining, 30*time.Minute)
	if again.Lifetime != hour {
		h.t.Errorf("full life %v, was %v", again.Lifetime, hour)
	}
	h.acquire("r", broker.Demand{}, broker.Usable)
}

func generations(h *history) {
	g := broker.Generation(0)
	for i := range 5 {
		l := h.lease("p")
		kept := h.save(l, plain(fmt.Sprint("t", i)), broker.Saved)
		if kept.Generation <= g || kept.Generation < l.Fence {
			h.t.Fatalf("generation %d after %d, under fence %d", kept.Generation, g, l.Fence)
		}
		g = kept.Generation
	}
	// One that was under way when its predecessor was dropped is newer than
	// the drop, for all who hear of both.
	l := h.lease("p")
	heard, stop := h.listen(h.Another)
	defer stop()
	h.drop("operation", "t4")
	h.hears(heard, "the drop", func(c broker.Change) bool {
		g = c.Generation
		return dropsAll(id("t4"))(c)
	})
	if kept := h.save(l, plain("t5"), broker.Saved); kept.Generation <= g {
		h.t.Errorf("generation %d after %d", kept.Generation, g)
	}
}

func demandedLife(h *history) {
	h.save(h.lease("p"), plain("t1"), broker.Saved)
	h.Advance(20 * time.Minute)
	h.acquire("q", broker.Demand{Lifetime: 39 * time.Minute}, broker.Usable)
	a := h.acquire("q", broker.Demand{Lifetime: hour - 30*time.Second}, broker.Short)
	if a.Token.Lifetime != hour {
		h.t.Errorf("full life %v", a.Token.Lifetime)
	}
	h.acquire("q", broker.Demand{Lifetime: 50 * time.Minute}, broker.Granted)
	h.Advance(40 * time.Minute)
	h.acquire("q", broker.Demand{Lifetime: hour}, broker.Granted) // nothing lives that would show the full life
}

func reports(h *history) {
	h.save(h.lease("p"), plain("t1"), broker.Saved)
	refused := broker.Demand{Not: id("t1")}
	a := h.acquire("q", refused, broker.TooSoon)
	h.about("hold-off", a.Wait, 10*time.Second)
	h.acquire("q", broker.Demand{}, broker.Usable)
	h.Advance(a.Wait + time.Millisecond)
	g := h.acquire("q", refused, broker.Granted)
	h.save(broker.Lease{Family: h.family, Owner: "q", Fence: g.Fence, Length: lease}, plain("t2"), broker.Saved)
	h.acquire("r", refused, broker.Usable)
}

func holdOff(h *history) {
	report := func(name string) broker.Demand { return broker.Demand{Not: id(name)} }
	replace := func(name, next string) {
		g := h.acquire("q", report(name), broker.Granted)
		h.save(broker.Lease{Family: h.family, Owner: "q", Fence: g.Fence, Length: lease}, plain(next), broker.Saved)
	}
	h.save(h.lease("p"), plain("t0"), broker.Saved)
	for i, want := range []time.Duration{10, 20, 40, 80, 160, 300, 300} {
		current := fmt.Sprint("t", i)
		a := h.acquire("q", report(current), broker.TooSoon)
		h.about(fmt.Sprintf("hold-off %d", i), a.Wait, want*time.Second)
		h.Advance(a.Wait + time.Millisecond)
		replace(current, fmt.Sprint("t", i+1))
	}
	// One that was good for a while starts again.
	h.Advance(10 * time.Minute)
	replace("t7", "t8")
	a := h.acquire("q", report("t8"), broker.TooSoon)
	h.about("hold-off", a.Wait, 10*time.Second)
}

func refusedWithToken(h *history) {
	kept := h.save(h.lease("p"), plain("t1"), broker.Saved)
	newer := broker.Demand{NewerThan: kept.Generation}
	h.fail(h.lease("p"), transient(0))
	a := h.acquire("q", newer, broker.Refused)
	if a.Token == nil || a.Token.Access.Reveal() != "t1" {
		h.t.Error("the living token is out of view")
	}
	h.acquire("q", broker.Demand{}, broker.Usable)
}

func slots(h *history) {
	h.save(h.lease("p"), plain("t1"), broker.Saved)
	l, a := h.grant("p", "b")
	if a.Token != nil {
		h.t.Errorf("slot b shows %+v", a.Token)
	}
	inB := plain("t2")
	inB.Slot = "b"
	h.save(l, inB, broker.Saved)
	for slot, want := range map[string]string{"": "t1", "b": "t2"} {
		a := h.claim(h.claimOf("q", slot, broker.Demand{}), broker.Usable)
		if got := a.Token.Access.Reveal(); got != want {
			h.t.Errorf("slot %q has %s, want %s", slot, got, want)
		}
	}
}

func changes(h *history) {
	near, stopNear := h.listen(h.Store)
	far, stopFar := h.listen(h.Another)
	expect := func(what string, ok func(broker.Change) bool) {
		h.t.Helper()
		h.hears(near, what, ok)
		h.hears(far, what, ok)
	}
	kept := h.save(h.lease("p"), plain("t1"), broker.Saved)
	expect("a save", func(c broker.Change) bool { return c.Generation == kept.Generation })
	h.fail(h.lease("p"), transient(0))
	expect("a failure", func(c broker.Change) bool { return !c.Reset })
	h.reset()
	expect("a reset", func(c broker.Change) bool { return c.Reset })
	h.drop("one", "t1")
	expect("the drop of a token", dropsAll(id("t1")))
	h.save(h.lease("p"), plain("t2"), broker.Saved)
	h.drop("two", "")
	expect("the drop of the grant", dropsAll(id("t2")))
	h.Store.Restore(h.family, "", token("t3", hour))
	expect("a restored token", func(c broker.Change) bool { return c.Generation > kept.Generation && c.Dropped == nil })
	stopNear()
	stopFar()
	for len(near)+len(far) > 0 {
		select {
		case <-near:
		case <-far:
		}
	}
	h.fail(h.lease("p"), transient(0))
	if len(near)+len(far) > 0 {
		h.t.Error("a change was announced after the end")
	}
}
