package storetest

import (
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

var consents = map[string]func(*history){
	"a person signs in":                                  signsIn,
	"nobody has signed in":                               nobodySignedIn,
	"it outlives its tokens by far":                      outlives,
	"it is over at its known end":                        endsOnTime,
	"a password follows a consent that is over":          endsForPassword,
	"its slots share the lease and the refresh token":    sharedConsent,
	"who may commit to a presentation":                   intending,
	"a presentation is counted once per lease":           countedOnce,
	"others wait for the answer to a presentation":       waitForAnswer,
	"its own presentation stands in nobody's way":        ownPresentation,
	"a presentation that was answered is taken back":     answeredBack,
	"a presentation that was not sent is taken back":     unsentBack,
	"a presentation without an answer stays in doubt":    stillInDoubt,
	"the outcome of a presentation, after the lease":     lateOutcome,
	"presentations in doubt have a limit":                doubtLimit,
	"a refresh token that stays has no limit":            noLimit,
	"a reset allows one in doubt to be presented":        resetDoubt,
	"a dead refresh token stops those who need it":       deadRequired,
	"a dead refresh token does not stop a password":      deadPreferred,
	"a verdict about another refresh token is not taken": verdictAboutAnother,
}

// presented takes the lease for owner and commits to presenting the refresh
// token.
func (h *history) presented(owner, refresh string) broker.Lease {
	h.t.Helper()
	l := h.lease(owner)
	h.intend(l, refresh, broker.Intended)
	return l
}

// vanish is what a process does that commits to presenting the refresh token
// and is not heard of until its answer can no longer come.
func (h *history) vanish(owner, refresh string) broker.Lease {
	h.t.Helper()
	l := h.presented(owner, refresh)
	h.Advance(horizon + time.Second)
	return l
}

// inDoubt wants that many presentations of the refresh token to be in doubt.
func (h *history) inDoubt(refresh string, want int) {
	h.t.Helper()
	c := h.look("").Consent
	if c == nil || c.RefreshToken.Reveal() != refresh || c.Presentations != want {
		h.t.Fatalf("consent %+v, want refresh token %s with %d presentations in doubt", c, refresh, want)
	}
}

func signsIn(h *history) {
	h.use = broker.ConsentRequired
	kept := h.signIn("r1")
	h.about("remaining", kept.Remaining, hour)
	h.acquire("p", broker.Demand{}, broker.Usable)
	h.Advance(2 * hour)
	_, a := h.grant("q", "")
	c := a.Consent
	if c == nil || c.RefreshToken.Reveal() != "r1" || c.Generation <= 0 || c.Rotates != broker.RotatesUnknown || c.Presentations != 0 {
		h.t.Fatalf("consent %+v", c)
	}
	h.about("age", c.Age, 2*hour)
	h.about("the consent's remaining life", c.Remaining, 998*hour)
	if seen := h.look("").Consent; seen == nil || !seen.RefreshToken.Equal(c.RefreshToken) || seen.Generation != c.Generation {
		h.t.Errorf("looked at %+v", seen)
	}
}

func nobodySignedIn(h *history) {
	h.use = broker.ConsentPreferred
	l, a := h.grant("p", "")
	if a.Consent != nil {
		h.t.Errorf("consent %+v", a.Consent)
	}
	h.fail(l, broker.Failure{})
	h.use, h.family = broker.ConsentRequired, "another"
	h.acquire("p", broker.Demand{}, broker.Unauthorized)
	again := h.claimOf("q", "", broker.Demand{}) // everybody was asked: the answer is known now
	a, err := h.Another.Acquire(h.ctx(), again)
	h.must("acquire", err)
	if a.Verdict != broker.Unauthorized {
		h.t.Errorf("verdict %d, want %d", a.Verdict, broker.Unauthorized)
	}
	h.signIn("r1")
	h.acquire("p", broker.Demand{}, broker.Usable)
	h.lease("p")
}

func outlives(h *history) {
	h.use = broker.ConsentRequired
	l, r := signedIn(h.family, "r1")
	r.Remaining = 0
	h.save(l, r, broker.Saved)
	h.Advance(10_000 * hour)
	_, a := h.grant("p", "")
	if a.Consent == nil || a.Consent.RefreshToken.Reveal() != "r1" || a.Consent.Remaining != broker.Forever {
		h.t.Errorf("consent %+v", a.Consent)
	}
}

func endsOnTime(h *history) {
	h.use = broker.ConsentRequired
	l, r := signedIn(h.family, "r1")
	r.Remaining = 30 * hour
	h.save(l, r, broker.Saved)
	h.Advance(20 * hour)
	h.save(h.presented("p", "r1"), refreshed("", "t2", "r1", "r2"), broker.Saved)
	h.about("what is left after a refresh", h.current("r2").Remaining, 10*hour)
	h.Advance(12 * hour)
	a := h.acquire("q", broker.Demand{}, broker.Unauthorized)
	if a.Consent == nil || !a.Consent.RefreshToken.IsEmpty() {
		h.t.Fatalf("with the verdict came consent %+v", a.Consent)
	}
	h.about("what was left", a.Consent.Remaining, -2*hour)
	h.about("what is left", h.current("r2").Remaining, -2*hour)
	h.signIn("s1")
	h.acquire("q", broker.Demand{}, broker.Usable)
	h.presented("p", "s1")
}

func endsForPassword(h *history) {
	h.use = broker.ConsentPreferred
	login := plain("t1")
	login.Refresh, login.Remaining = broker.NewSecret("r1"), 30*hour
	h.save(h.lease("p"), login, broker.Saved)
	h.Advance(30 * hour)
	l, a := h.grant("q", "")
	if a.Consent != nil {
		h.t.Errorf("consent %+v", a.Consent)
	}
	login = plain("t2")
	login.Refresh, login.Remaining = broker.NewSecret("r2"), 30*hour
	h.save(l, login, broker.Saved)
	h.about("what is left", h.current("r2").Remaining, 30*hour)
}

func sharedConsent(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l := h.presented("p", "r1")
	inB := h.claimOf("q", "b", broker.Demand{})
	h.claim(inB, broker.Busy)
	h.save(l, refreshed("", "t2", "r1", "r2"), broker.Saved)
	a := h.claim(inB, broker.Granted)
	if a.Consent == nil || a.Consent.RefreshToken.Reveal() != "r2" || a.Token != nil {
		h.t.Fatalf("slot b got consent %+v and token %+v", a.Consent, a.Token)
	}
	l = broker.Lease{Family: h.family, Owner: "q", Fence: a.Fence, Length: lease}
	h.intend(l, "r2", broker.Intended)
	h.save(l, refreshed("b", "t3", "r2", "r3"), broker.Saved)
	for slot, want := range map[string]string{"": "t2", "b": "t3"} {
		if r := h.look(slot); r.Token.Access.Reveal() != want || r.Consent.RefreshToken.Reveal() != "r3" {
			h.t.Errorf("slot %q has %s and %s", slot, r.Token.Access.Reveal(), r.Consent.RefreshToken.Reveal())
		}
	}
}

func intending(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l := h.lease("p")
	h.intend(broker.Lease{Family: h.family, Owner: "q", Fence: l.Fence, Length: lease}, "r1", broker.IntendLost)
	h.intend(broker.Lease{Family: h.family, Owner: "p", Fence: l.Fence + 1, Length: lease}, "r1", broker.IntendLost)
	h.intend(l, "r0", broker.IntendChanged)
	h.Advance(lease + time.Millisecond)
	h.intend(l, "r0", broker.IntendLost)
	h.inDoubt("r1", 0)

	h.presented("q", "r1")
	h.Advance(lease + time.Millisecond)
	h.use = broker.NoConsent
	h.intend(h.lease("p"), "r0", broker.IntendChanged)
	h.intend(h.lease("p"), "r1", broker.IntendInDoubt)
	h.inDoubt("r1", 1)
}

func countedOnce(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l := h.presented("p", "r1")
	h.intend(l, "r1", broker.Intended)
	h.inDoubt("r1", 1)
	h.acquire("p", anew, broker.Granted)
	h.save(l, refreshed("", "t2", "r1", "r2"), broker.Saved)
	h.inDoubt("r2", 0)
	h.intend(l, "r2", broker.IntendLost) // a save ends the lease
}

func waitForAnswer(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	h.presented("p", "r1")
	h.Advance(lease + time.Millisecond)
	a := h.acquire("q", anew, broker.InDoubt)
	h.Advance(a.Wait + time.Millisecond)
	_, a = h.grant("q", "")
	if a.Consent == nil || a.Consent.Presentations != 1 {
		h.t.Fatalf("consent %+v, want one presentation in doubt", a.Consent)
	}
	h.about("age of the presentation", a.Consent.PresentedAge, horizon)
}

func answeredBack(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	failed := transient(0)
	failed.Outcome = broker.Answered
	for range 2 * most {
		l := h.presented("p", "r1")
		h.fail(l, failed)
		h.inDoubt("r1", 0)
		h.fail(l, failed)
		h.inDoubt("r1", 0)
		h.acquire("q", anew, broker.Refused)
		h.Advance(time.Minute + time.Second)
	}
	h.vanish("p", "r1")
	h.fail(h.presented("q", "r1"), failed)
	h.inDoubt("r1", 1) // that of the one who vanished
}

func unsentBack(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	for range 2 * most {
		l := h.presented("p", "r1")
		for range 2 {
			h.fail(l, broker.Failure{Outcome: broker.Unsent})
			h.inDoubt("r1", 0)
		}
	}
	l := h.presented("p", "r1")
	h.Advance(lease + time.Millisecond) // also when the lease has ended meanwhile
	h.fail(l, broker.Failure{Outcome: broker.Unsent})
	h.inDoubt("r1", 0)
	failed := transient(0)
	failed.Outcome = broker.Unsent
	h.fail(h.presented("p", "r1"), failed)
	h.inDoubt("r1", 0)
	h.acquire("q", anew, broker.Refused)
}

func ownPresentation(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l := h.presented("p", "r1")
	h.Advance(lease + time.Millisecond)
	if again := h.lease("p"); again.Fence <= l.Fence {
		h.t.Errorf("fence %d after %d", again.Fence, l.Fence)
	}
}

func lateOutcome(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	late := h.vanish("p", "r1")
	next := h.lease("q")
	failed := transient(0)
	failed.Outcome = broker.Answered
	if f := h.fail(late, failed); f.Kind != broker.Transient {
		h.t.Errorf("remembered %+v", f)
	}
	h.inDoubt("r1", 0)
	h.renew(next, true)
}

func stillInDoubt(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l := h.presented("p", "r1")
	h.fail(l, transient(0)) // it knows that no answer will come: nobody has to wait for one
	h.inDoubt("r1", 1)
	h.acquire("q", anew, broker.Refused)
	h.Advance(6 * time.Second)
	l2, a := h.grant("q", "")
	if a.Consent == nil || a.Consent.Presentations != 1 {
		h.t.Fatalf("consent %+v, want one presentation in doubt", a.Consent)
	}
	h.fail(l, transient(0)) // repeated
	h.renew(l2, true)
	h.inDoubt("r1", 1)
}

func doubtLimit(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	h.vanish("p", "r1")
	h.vanish("q", "r1")
	h.inDoubt("r1", most)
	l := h.lease("r")
	h.intend(l, "r1", broker.IntendSpent)
	h.inDoubt("r1", most)
	h.save(l, refreshed("", "t2", "r1", "r2"), broker.Saved)
	h.presented("p", "r2") // another refresh token has presentations of its own
	h.inDoubt("r2", 1)
}

func noLimit(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	h.save(h.presented("p", "r1"), refreshed("", "t2", "r1", ""), broker.Saved)
	if c := h.look("").Consent; c.Rotates != broker.RotatesNo {
		h.t.Errorf("consent %+v", c)
	}
	for range most + 2 {
		h.vanish("p", "r1")
	}
	h.save(h.presented("q", "r1"), refreshed("", "t3", "r1", "r1"), broker.Saved)
	h.inDoubt("r1", 0)
}

func resetDoubt(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	h.vanish("p", "r1")
	h.vanish("q", "r1")
	h.reset()
	h.inDoubt("r1", 0)
	l := h.presented("r", "r1")
	h.reset() // does not allow a second one beside it
	h.Advance(lease + time.Millisecond)
	h.acquire("q", anew, broker.InDoubt)
	h.fail(l, broker.Failure{Outcome: broker.Unsent})
	h.inDoubt("r1", 0)
}

func deadRequired(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l := h.presented("p", "r1")
	f := h.fail(l, dead("r1"))
	if f.Kind != broker.Dead || f.Rest != broker.Forever {
		h.t.Errorf("remembered %+v", f)
	}
	h.fail(l, dead("r1"))
	h.acquire("q", broker.Demand{}, broker.Usable)
	h.Advance(100 * hour)
	a := h.acquire("q", broker.Demand{}, broker.Refused)
	if a.Failure.Kind != broker.Dead || a.Failure.Credential != id("r1") || a.Failure.Code != "invalid_grant" || a.Failure.Attempts != 1 {
		h.t.Errorf("refused by %+v", a.Failure)
	}
	h.inDoubt("r1", 0) // kept: a late answer may still show that it was good
	if !h.current("r1").Dead {
		h.t.Error("it does not look dead")
	}
	h.reset()
	if h.current("r1").Dead {
		h.t.Error("it looks dead after a reset")
	}
	if _, a := h.grant("q", ""); a.Consent == nil {
		h.t.Error("a reset does not allow one more try")
	}
}

func deadPreferred(h *history) {
	h.use = broker.ConsentPreferred
	login := plain("t1")
	login.Refresh = broker.NewSecret("r1")
	h.save(h.lease("p"), login, broker.Saved)
	if _, a := h.grant("p", ""); a.Consent == nil || a.Consent.RefreshToken.Reveal() != "r1" {
		h.t.Fatalf("consent %+v", a.Consent)
	}
	h.fail(h.presented("p", "r1"), dead("r1"))
	withPassword := func() broker.Lease {
		h.t.Helper()
		l, a := h.grant("q", "")
		if a.Consent != nil {
			h.t.Fatalf("granted with consent %+v, which is dead", a.Consent)
		}
		return l
	}
	h.fail(withPassword(), transient(0)) // the password's failure does not bring it back to life
	h.Advance(time.Minute)
	h.save(withPassword(), plain("t2"), broker.Saved) // nor does a grant without another one
	l := withPassword()
	login = plain("t3")
	login.Refresh = broker.NewSecret("r2")
	h.save(l, login, broker.Saved)
	if _, a := h.grant("q", ""); a.Consent == nil || a.Consent.RefreshToken.Reveal() != "r2" {
		h.t.Errorf("consent %+v", a.Consent)
	}
}

func verdictAboutAnother(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l := h.presented("p", "r1")
	if f := h.fail(l, dead("r0")); f.Kind != broker.NoFailure {
		h.t.Errorf("remembered %+v", f)
	}
	h.renew(l, false) // but the call is over
	h.lease("q")
	h.inDoubt("r1", 0)
}
