package storetest

import (
	"fmt"
	"slices"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

var drops = map[string]func(*history){
	"a token":                                      dropToken,
	"a token that the record does not have":        dropUnknown,
	"a token leaves the others, and a call":        dropOneOnly,
	"a dropped token does not come back":           droppedStaysDropped,
	"the grant":                                    dropGrant,
	"the grant, while a plain call is under way":   dropGrantPlain,
	"the grant, while a refresh is under way":      dropGrantRefresh,
	"the grant, while a person signs in":           dropGrantSignIn,
	"what the server returns of a dropped grant":   droppedGrantStaysDropped,
	"after it, all begins anew":                    afterDrop,
	"it is repeatable, and spares what came since": dropTwice,
	"generations rise above what was seen":         dropFloor,
	"what it took is remembered until confirmed":   confirmed,
}

// names of the tokens that were dropped, sorted, the refresh token last.
func names(d broker.Dropped) (n []string) {
	for _, s := range d.Access {
		n = append(n, s.Reveal())
	}
	slices.Sort(n)
	if !d.Refresh.IsEmpty() {
		n = append(n, d.Refresh.Reveal())
	}
	return n
}

func dropToken(h *history) {
	kept := h.save(h.lease("p"), plain("t1"), broker.Saved)
	h.want("dropped", names(h.drop("operation", "t1")), []string{"t1"})
	if r := h.look(""); r.Token != nil {
		h.t.Errorf("token %+v", r.Token)
	}
	a := h.acquire("q", broker.Demand{}, broker.Granted)
	if a.Fence <= kept.Generation || a.Token != nil {
		h.t.Errorf("fence %d after generation %d, token %+v", a.Fence, kept.Generation, a.Token)
	}
}

func dropUnknown(h *history) {
	l := h.lease("p")
	h.want("dropped", names(h.drop("operation", "t1")), []string{})
	h.save(l, plain("t1"), broker.WasDropped)
	if r := h.look(""); r.Token != nil || r.ToRevoke {
		h.t.Errorf("%+v", r)
	}
}

func dropOneOnly(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l, _ := h.grant("p", "b")
	h.intend(l, "r1", broker.Intended)
	h.save(l, refreshed("b", "t2", "r1", "r2"), broker.Saved)
	l = h.presented("p", "r2")
	h.want("dropped", names(h.drop("operation", "t2")), []string{"t2"})
	if r := h.look("b"); r.Token != nil || r.Consent == nil {
		h.t.Errorf("token %+v, consent %+v", r.Token, r.Consent)
	}
	h.acquire("q", broker.Demand{}, broker.Usable)
	h.renew(l, true)
	h.inDoubt("r2", 1)
	h.save(l, refreshed("", "t3", "r2", "r3"), broker.Saved)

	h.family, h.use = "plain", broker.NoConsent
	h.save(h.lease("p"), plain("t1"), broker.Saved)
	l = h.lease("p")
	h.drop("operation", "t1")
	h.renew(l, true)
	h.save(l, plain("t2"), broker.Saved)
	h.acquire("q", broker.Demand{}, broker.Usable)
}

func droppedStaysDropped(h *history) {
	l := h.lease("p")
	kept := h.save(l, plain("t1"), broker.Saved)
	h.drop("operation", "t1")
	h.save(l, plain("t1"), broker.WasDropped)
	_, err := h.Another.Drop(h.ctx(), broker.Drop{Family: h.family, Operation: "another", Token: id("t1"), Remember: time.Minute})
	h.must("drop", err) // who remembers it for a shorter time does not shorten it
	h.Advance(hour)
	h.save(h.lease("q"), plain("t1"), broker.WasDropped)
	h.Advance(lease)
	for _, generation := range []broker.Generation{0, kept.Generation, kept.Generation + 10_000_000} {
		t := token("t1", hour)
		t.Generation = generation
		h.Another.Restore(h.family, "", t)
	}
	h.Another.Restore(h.family, "b", token("t2", hour))
	h.eventually("another restored token's arrival", func() bool { return h.look("b").Token != nil })
	if r := h.look(""); r.Token != nil {
		h.t.Errorf("token %+v", r.Token)
	}
	h.acquire("q", broker.Demand{}, broker.Granted)
}

func dropGrant(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l, _ := h.grant("p", "b")
	h.intend(l, "r1", broker.Intended)
	h.save(l, refreshed("b", "t2", "r1", "r2"), broker.Saved)
	h.fail(h.lease("p"), rejected("secret", broker.Forever))
	h.want("dropped", names(h.drop("operation", "")), []string{"t2", "token of r1", "r2"})
	for _, slot := range []string{"", "b"} {
		if r := h.look(slot); r.Token != nil || r.Consent != nil || r.Failure != nil || !r.ToRevoke {
			h.t.Errorf("slot %q: %+v", slot, r)
		}
		h.claim(h.claimOf("q", slot, broker.Demand{}), broker.Unauthorized)
	}
	h.use = broker.ConsentPreferred
	if _, a := h.grant("q", ""); a.Consent != nil {
		h.t.Errorf("consent %+v", a.Consent)
	}
}

func dropGrantPlain(h *history) {
	h.save(h.lease("p"), plain("t1"), broker.Saved)
	l := h.lease("p")
	h.want("dropped", names(h.drop("operation", "")), []string{"t1"})
	h.renew(l, false)
	h.save(l, plain("t2"), broker.WasDropped)
	if f := h.fail(l, transient(0)); f.Kind != broker.NoFailure {
		h.t.Errorf("remembered %+v", f)
	}
	next := h.lease("q")
	h.save(l, plain("t2"), broker.WasDropped)
	h.renew(next, true)
}

func dropGrantRefresh(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l := h.presented("p", "r1")
	h.drop("operation", "")
	h.intend(l, "r1", broker.IntendLost)
	h.save(l, refreshed("", "t2", "r1", "r2"), broker.WasDropped)
	h.fail(l, dead("r1"))
	if r := h.look(""); r.Token != nil || r.Consent != nil || r.Failure != nil {
		h.t.Errorf("%+v", r)
	}
	h.signIn("s1")
	h.save(l, refreshed("", "t2", "r1", "r2"), broker.WasDropped)
	h.current("s1")
}

func droppedGrantStaysDropped(h *history) {
	h.use = broker.ConsentPreferred
	login := plain("t1")
	login.Refresh = broker.NewSecret("r1")
	h.save(h.lease("p"), login, broker.Saved)
	h.save(h.presented("p", "r1"), refreshed("", "t2", "r1", "r2"), broker.Saved)
	h.drop("operation", "")
	l := h.lease("q")
	h.save(l, plain("t2"), broker.WasDropped)
	login = plain("t3")
	for _, refresh := range []string{"r1", "r2"} {
		login.Refresh = broker.NewSecret(refresh)
		h.save(l, login, broker.WasDropped)
	}
	h.restore(token("t2", hour))
	if r := h.look(""); r.Token != nil || r.Consent != nil {
		h.t.Errorf("token %+v, consent %+v", r.Token, r.Consent)
	}
}

func dropGrantSignIn(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l, r := signedIn(h.family, "s1")
	h.drop("operation", "")
	h.save(l, r, broker.Saved) // a person has the last word
	h.current("s1")
}

func afterDrop(h *history) {
	h.fail(h.lease("p"), transient(0))
	h.drop("operation", "")
	h.save(h.lease("p"), plain("t1"), broker.Saved)
	h.acquire("q", broker.Demand{}, broker.Usable)
	if f := h.fail(h.lease("p"), transient(0)); f.Attempts != 1 {
		h.t.Errorf("attempt %d", f.Attempts)
	}
	h.family, h.use = "consent", broker.ConsentRequired
	h.signIn("r1")
	h.drop("operation", "")
	h.signIn("s1")
	h.save(h.presented("q", "s1"), refreshed("", "t2", "s1", "s2"), broker.Saved)
	h.current("s2")
}

func dropTwice(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	h.want("dropped", names(h.drop("one", "token of r1")), []string{"token of r1"})
	h.want("dropped", names(h.drop("one", "token of r1")), []string{"token of r1"})
	h.want("dropped by somebody else", names(h.drop("two", "token of r1")), []string{"token of r1"})
	h.must("confirm", h.Store.Confirm(h.ctx(), h.family, id("token of r1")))

	first := h.drop("grant", "")
	h.want("dropped", names(first), []string{"r1"})
	h.want("dropped", names(h.drop("grant", "")), names(first))
	h.signIn("s1")
	h.want("dropped", names(h.drop("grant", "")), names(first))
	h.current("s1")
	h.acquire("q", broker.Demand{}, broker.Usable)
}

func dropFloor(h *history) {
	l := h.lease("p")
	floor := l.Fence + 1_000_000
	_, err := h.Store.Drop(h.ctx(), broker.Drop{Family: h.family, Operation: "operation", Remember: hour, Floor: floor})
	h.must("drop", err)
	if next := h.lease("q"); next.Fence <= floor {
		h.t.Errorf("fence %d is not above the floor %d", next.Fence, floor)
	}
}

func confirmed(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	h.drop("operation", "")
	h.Advance(time.Minute)
	r := h.look("")
	if !r.ToRevoke {
		h.t.Fatalf("%+v", r)
	}
	h.about("waiting for", r.ToRevokeSince, time.Minute)
	for i, name := range []string{"nothing", "token of r1", "token of r1", "r1"} {
		h.must("confirm", h.Store.Confirm(h.ctx(), h.family, id(name)))
		if r := h.look(""); r.ToRevoke != (i < 3) {
			h.t.Errorf("after %s: to revoke %t", name, r.ToRevoke)
		}
	}
	h.want("dropped", fmt.Sprint(names(h.drop("operation", ""))), "[]")
	h.acquire("q", broker.Demand{}, broker.Unauthorized) // what is revoked stays dropped
}
