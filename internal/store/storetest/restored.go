package storetest

import (
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

var restored = map[string]func(*history){
	"a token is found by all":                 restoredToken,
	"a token that is there already":           restoredTwice,
	"a token does not displace one as good":   restoredWorse,
	"a token displaces one that ends earlier": restoredBetter,
	"a token that has ended is not taken in":  restoredEnded,
	"a token from before a drop of the grant": restoredDropped,
	"a token does not stop a call under way":  restoredBeside,
}

// restore hands over a token and waits until the store has dealt with it: with
// one for a slot of its own, handed over after it.
func (h *history) restore(s broker.StoredToken) {
	h.t.Helper()
	h.Store.Restore(h.family, "", s)
	after := "after " + s.Access.ID()
	h.Store.Restore(h.family, after, token(after, hour))
	h.eventually("the restored token's arrival", func() bool { return h.look(after).Token != nil })
}

func restoredToken(h *history) {
	heard, stop := h.listen(h.Another)
	defer stop()
	l := h.lease("q")
	h.fail(l, broker.Failure{})
	s := token("t1", hour)
	s.Remaining = 40 * time.Minute
	h.Store.Restore(h.family, "", s)
	h.hears(heard, "the restored token", func(c broker.Change) bool { return c.Generation > l.Fence })
	a := h.acquire("q", broker.Demand{}, broker.Usable)
	if a.Token.Access.Reveal() != "t1" || a.Token.Type != "Bearer" || a.Token.Generation <= l.Fence || a.Token.Lifetime != hour {
		h.t.Errorf("found %+v", a.Token)
	}
	h.about("remaining", a.Token.Remaining, 40*time.Minute)
}

func restoredTwice(h *history) {
	kept := h.save(h.lease("p"), plain("t1"), broker.Saved)
	s := token("t1", hour)
	s.Lifetime, s.Remaining = 2*hour, 2*hour
	h.restore(s)
	r := h.look("")
	if r.Token.Generation != kept.Generation || r.Token.Lifetime != hour {
		h.t.Errorf("generation %d with life %v, was %d with %v", r.Token.Generation, r.Token.Lifetime, kept.Generation, kept.Lifetime)
	}
	h.about("remaining", r.Token.Remaining, hour)
	h.Advance(11 * time.Second)
	h.restore(s)
	h.acquire("q", broker.Demand{Not: id("t1")}, broker.Granted) // it was obtained no later for that
}

func restoredWorse(h *history) {
	h.save(h.lease("p"), plain("t1"), broker.Saved)
	for name, lives := range map[string]time.Duration{"t2": hour, "t3": 62 * time.Minute, "t4": time.Minute} {
		h.restore(token(name, lives))
		if r := h.look(""); r.Token.Access.Reveal() != "t1" {
			h.t.Errorf("one that lives %v has displaced one that lives an hour", lives)
		}
	}
}

func restoredBetter(h *history) {
	kept := h.save(h.lease("p"), plain("t1"), broker.Saved)
	h.Advance(30 * time.Minute)
	h.restore(token("t2", hour))
	r := h.look("")
	if r.Token.Access.Reveal() != "t2" || r.Token.Generation <= kept.Generation {
		h.t.Errorf("found %s under generation %d, after %d", r.Token.Access.Reveal(), r.Token.Generation, kept.Generation)
	}
	h.about("remaining", r.Token.Remaining, hour)
}

func restoredEnded(h *history) {
	s := token("t1", hour)
	s.Remaining = 0
	h.restore(s)
	if r := h.look(""); r.Token != nil {
		h.t.Errorf("token %+v", r.Token)
	}
}

func restoredDropped(h *history) {
	l := h.lease("p")
	h.drop("operation", "")
	s := token("t1", hour)
	s.Generation = l.Fence
	h.restore(s)
	if r := h.look(""); r.Token != nil {
		h.t.Errorf("token %+v, obtained under a lease from before the drop", r.Token)
	}
}

func restoredBeside(h *history) {
	l := h.lease("p")
	h.restore(token("t1", hour))
	restored := h.look("").Token
	h.renew(l, true)
	kept := h.save(l, plain("t2"), broker.Saved)
	if kept.Generation <= restored.Generation {
		h.t.Errorf("generation %d after %d", kept.Generation, restored.Generation)
	}
}
