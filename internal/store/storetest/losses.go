package storetest

import (
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

var losses = map[string]func(*history){
	"a token is put back":                               lostToken,
	"a consent is put back":                             lostConsent,
	"a presentation in doubt is put back":               lostDoubt,
	"what was dropped stays dropped":                    lostDrop,
	"a remembered failure still stands":                 lostFailure,
	"a call under way is saved, over what was put back": lostUnderWay,
}

// lose makes the store forget everything. A store that cannot says so, and the
// history ends without having shown anything.
func (h *history) lose() {
	h.t.Helper()
	switch {
	case h.Lose != nil:
		h.Lose()
	case h.Keeps == "":
		h.t.Fatal("the subject has no Lose and does not say why in Keeps")
	default:
		h.cannot(h.Keeps)
	}
}

func lostToken(h *history) {
	kept := h.save(h.lease("p"), plain("t1"), broker.Saved)
	h.lose()
	h.eventually("the token's return", func() bool { return h.look("").Token != nil })
	a := h.acquire("q", broker.Demand{}, broker.Usable)
	if a.Token.Access.Reveal() != "t1" || a.Token.Generation != kept.Generation || a.Token.Lifetime != hour {
		h.t.Errorf("found %+v", a.Token)
	}
	h.about("remaining", a.Token.Remaining, hour)
	if l := h.lease("q"); l.Fence <= kept.Generation {
		h.t.Errorf("fence %d after generation %d", l.Fence, kept.Generation)
	}
}

func lostConsent(h *history) {
	h.use = broker.ConsentRequired
	start := time.Now()
	h.signIn("r1")
	r := refreshed("", "t2", "r1", "r2")
	r.Account = broker.Account{Subject: "42"}
	h.save(h.presented("p", "r1"), r, broker.Saved)
	h.lose()
	_, a := h.grant("q", "")
	if a.Consent == nil || a.Consent.Account != r.Account || a.Consent.RefreshToken.Reveal() != "r2" || a.Consent.Rotates != broker.RotatesYes {
		h.t.Fatalf("consent %+v", a.Consent)
	}
	h.about("age", a.Consent.Age, time.Since(start))
	h.about("the consent's remaining life", a.Consent.Remaining, 1000*hour-time.Since(start))
}

func lostDoubt(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	h.presented("p", "r1")
	h.Advance(lease + time.Millisecond)
	h.lose()
	h.eventually("an answer for q", func() bool {
		a, err := h.Another.Acquire(h.ctx(), h.claimOf("q", "", anew))
		h.must("acquire by q", err)
		if a.Verdict == broker.Granted && a.Consent != nil && a.Consent.Presentations == 0 {
			h.t.Fatal("q does not learn of p's presentation")
		}
		return a.Verdict == broker.Granted || a.Verdict == broker.InDoubt
	})
	h.inDoubt("r1", 1)
}

func lostDrop(h *history) {
	h.save(h.lease("p"), plain("t1"), broker.Saved)
	l := h.lease("p")
	inB := plain("t2")
	inB.Slot = "b"
	h.save(l, inB, broker.Saved)
	h.drop("operation", "t1")
	h.lose()
	h.eventually("the other token's return", func() bool { return h.look("b").Token != nil })
	if r := h.look(""); r.Token != nil {
		h.t.Errorf("token %+v", r.Token)
	}
	h.save(h.lease("q"), plain("t1"), broker.WasDropped)

	h.family, h.use = "consent", broker.ConsentRequired
	h.signIn("r1")
	late := h.presented("p", "r1")
	h.drop("operation", "")
	h.lose()
	h.acquire("q", broker.Demand{}, broker.Unauthorized)
	h.save(late, refreshed("", "t2", "r1", "r2"), broker.WasDropped)
}

func lostFailure(h *history) {
	h.fail(h.lease("p"), rejected("secret", broker.Forever))
	h.lose()
	h.eventually("the failure's return", func() bool { return h.look("").Failure != nil })
	h.acquire("q", broker.Demand{}, broker.Refused)
}

func lostUnderWay(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l := h.presented("p", "r1")
	h.lose()
	h.save(l, refreshed("", "t2", "r1", "r2"), broker.Saved)
	h.eventually("the refresh", func() bool {
		c := h.look("").Consent
		return c != nil && c.RefreshToken.Reveal() == "r2"
	})
	h.acquire("q", broker.Demand{}, broker.Usable)
}
