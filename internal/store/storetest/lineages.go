package storetest

import (
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

var lineages = map[string]func(*history){
	"a refresh": refresh,
	"a refresh that leaves the refresh token as it is":   refreshInPlace,
	"a late refresh is saved whoever has the lease":      lateRefresh,
	"a late refresh heals a dead verdict":                lateRefreshHeals,
	"a refresh is repeatable":                            refreshTwice,
	"a refresh of a token that was spent meanwhile":      spentMeanwhile,
	"a late refresh in place does not displace a later":  lateInPlace,
	"a late refresh that brings no other access token":   lateSameAccess,
	"a late refresh in place, beside a presentation":     lateInPlaceBeside,
	"a late refresh that brings nothing new":             lateNothingNew,
	"a server that answers two presentations alike":      sameSuccessor,
	"a refresh whose access token was dropped meanwhile": accessDropped,
	"a password's grant replaces the consent":            passwordReplaces,
	"a password's grant under an overtaken lease":        passwordOvertaken,
	"a sign-in wins over a refresh under way":            signInWins,
	"a sign-in wins over a login under way":              signInWinsOverLogin,
	"a sign-in ends the tokens of the one before":        signInEndsTokens,
	"a sign-in forgets failures everywhere":              signInForgets,
	"the account stays with the grant":                   accountStays,
	"a sign-in is repeatable":                            signInTwice,
	"a sign-in of before the last one":                   signInOfBefore,
}

// current wants the refresh token to be the family's.
func (h *history) current(refresh string) *broker.Consent {
	h.t.Helper()
	c := h.look("").Consent
	if c == nil || c.RefreshToken.Reveal() != refresh {
		h.t.Fatalf("consent %+v, want refresh token %s", c, refresh)
	}
	return c
}

func refresh(h *history) {
	h.use = broker.ConsentRequired
	first := h.signIn("r1")
	h.Advance(hour)
	kept := h.save(h.presented("p", "r1"), refreshed("", "t2", "r1", "r2"), broker.Saved)
	if kept.Generation <= first.Generation || kept.Access.Reveal() != "t2" {
		h.t.Errorf("kept %+v after generation %d", kept, first.Generation)
	}
	_, a := h.grant("q", "")
	c := a.Consent
	if c == nil || c.RefreshToken.Reveal() != "r2" || c.Rotates != broker.RotatesYes || c.Presentations != 0 || c.Generation <= first.Generation {
		h.t.Fatalf("consent %+v", c)
	}
	h.about("age: a refresh does not begin anew", c.Age, hour)
	h.about("the consent's remaining life", c.Remaining, 999*hour)
}

func refreshInPlace(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	h.vanish("p", "r1")
	for token, repeated := range map[string]string{"t2": "", "t3": "r1"} { // none came, or the same once more
		h.save(h.presented("q", "r1"), refreshed("", token, "r1", repeated), broker.Saved)
		if c := h.current("r1"); c.Rotates != broker.RotatesNo || c.Presentations != 0 {
			h.t.Errorf("consent %+v", c)
		}
	}
}

func lateRefresh(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	late := h.vanish("p", "r1")
	next := h.presented("q", "r1")
	h.save(late, refreshed("", "t2", "r1", "r2"), broker.Saved)
	if c := h.current("r2"); c.Presentations != 0 {
		h.t.Errorf("consent %+v", c)
	}
	h.renew(next, true) // its lease is its own business
	h.intend(next, "r1", broker.IntendChanged)
	h.fail(next, dead("r1"))
	h.current("r2")
	h.acquire("r", anew, broker.Granted)
}

func lateRefreshHeals(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	late := h.vanish("p", "r1")
	verdict := h.presented("q", "r1")
	h.fail(verdict, dead("r1"))
	h.acquire("r", anew, broker.Refused)
	h.save(late, refreshed("", "t2", "r1", "r2"), broker.Saved)
	h.acquire("r", broker.Demand{}, broker.Usable)
	_, a := h.grant("r", "")
	if a.Consent == nil || a.Consent.RefreshToken.Reveal() != "r2" || a.Failure != nil {
		h.t.Errorf("consent %+v, failure %+v", a.Consent, a.Failure)
	}
	h.fail(verdict, dead("r1")) // once more, late
	if r := h.look(""); r.Failure != nil {
		h.t.Errorf("remembered %+v", r.Failure)
	}
}

func refreshTwice(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l := h.presented("p", "r1")
	r := refreshed("", "t2", "r1", "r2")
	first := h.save(l, r, broker.Saved)
	if again := h.save(l, r, broker.Saved); again.Generation != first.Generation {
		h.t.Errorf("generation %d, and %d before", again.Generation, first.Generation)
	}
	next := h.presented("q", "r2")
	h.save(l, r, broker.Saved)
	h.renew(next, true)
	h.inDoubt("r2", 1)
	h.save(next, refreshed("", "t3", "r2", "r3"), broker.Saved)
	h.save(l, r, broker.Superseded)
	h.current("r3")
}

func spentMeanwhile(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	late := h.vanish("p", "r1")
	h.save(h.presented("q", "r1"), refreshed("", "t2", "r1", "r2"), broker.Saved)
	h.save(late, refreshed("", "t3", "r1", "r3"), broker.Superseded)
	h.save(late, refreshed("", "t3", "r1", ""), broker.Superseded)
	h.fail(late, transient(0))
	h.current("r2")
	if r := h.look(""); r.Token.Access.Reveal() != "t2" || r.Failure != nil {
		h.t.Errorf("token %s, failure %+v", r.Token.Access.Reveal(), r.Failure)
	}
}

func lateInPlace(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	late := h.vanish("p", "r1")
	h.save(h.presented("q", "r1"), refreshed("", "t3", "r1", ""), broker.Saved)
	h.save(late, refreshed("", "t2", "r1", ""), broker.Stale)
	if r := h.look(""); r.Token.Access.Reveal() != "t3" {
		h.t.Errorf("the late token displaced its successor")
	}
	inB := refreshed("b", "t4", "r1", "")
	h.save(late, inB, broker.Saved) // where there is none it is good
}

func lateInPlaceBeside(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	late := h.vanish("p", "r1")
	next := h.presented("q", "r1")
	h.save(late, refreshed("", "t2", "r1", ""), broker.Saved)
	h.inDoubt("r1", 1) // that of q
	h.Advance(lease + time.Millisecond)
	h.acquire("r", anew, broker.InDoubt)
	h.save(next, refreshed("", "t3", "r1", ""), broker.Saved)
	h.inDoubt("r1", 0)
}

func lateNothingNew(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	late := h.vanish("p", "r1")
	next := h.lease("q")
	h.save(late, refreshed("", "token of r1", "r1", ""), broker.Saved)
	h.inDoubt("r1", 0) // but an outcome
	h.renew(next, true)
}

func lateSameAccess(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	late := h.vanish("p", "r1")
	next := h.presented("q", "r1")
	h.save(late, refreshed("", "token of r1", "r1", "r2"), broker.Saved)
	h.current("r2")
	h.renew(next, true)
}

func sameSuccessor(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	late := h.vanish("p", "r1")
	next := h.presented("q", "r1")
	h.save(late, refreshed("", "t2", "r1", "r2"), broker.Saved)
	h.save(next, refreshed("", "t3", "r1", "r2"), broker.Saved)
	h.current("r2")
	h.renew(next, false)
}

func accessDropped(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l := h.presented("p", "r1")
	r := refreshed("", "t2", "r1", "r2")
	h.save(l, r, broker.Saved)
	h.drop("operation", "t2")
	h.save(l, r, broker.Superseded) // not WasDropped, upon which r2 would be revoked
	h.current("r2")
	if seen := h.look(""); seen.Token != nil {
		h.t.Errorf("token %+v", seen.Token)
	}
	// Dropped before it came.
	l = h.presented("p", "r2")
	h.drop("another", "t3")
	h.save(l, refreshed("", "t3", "r2", "r3"), broker.Superseded)
	h.current("r3")
	h.renew(l, false)
}

func passwordReplaces(h *history) {
	h.use = broker.ConsentPreferred
	login := func(l broker.Lease, name string, want broker.SaveVerdict) broker.StoredToken {
		h.t.Helper()
		r := plain("token of " + name)
		r.Refresh, r.Remaining = broker.NewSecret(name), 100*hour
		return h.save(l, r, want)
	}
	l := h.lease("p")
	login(l, "r1", broker.Saved)
	login(l, "r1", broker.Saved)
	h.Advance(10 * hour)
	l = h.lease("q")
	login(l, "r2", broker.Saved)
	login(l, "r2", broker.Saved)
	c := h.current("r2")
	h.about("age", c.Age, 0)
	h.about("the consent's remaining life", c.Remaining, 100*hour)
	h.save(h.presented("p", "r2"), refreshed("", "t3", "r2", "r3"), broker.Saved)
	login(l, "r2", broker.Stale)
	h.current("r3")
	h.drop("operation", "t3")
	l = h.lease("p")
	login(l, "r4", broker.Saved)
	h.drop("another", "token of r4")
	login(l, "r4", broker.Superseded) // not WasDropped, upon which r4 would be revoked
	h.current("r4")
}

func passwordOvertaken(h *history) {
	h.use = broker.ConsentPreferred
	late := h.lease("p")
	h.Advance(lease + time.Millisecond)
	next := h.lease("q")
	login := plain("t1")
	login.Refresh = broker.NewSecret("r1")
	h.save(late, login, broker.Stale)
	login = plain("t2")
	login.Refresh = broker.NewSecret("r2")
	h.save(next, login, broker.Saved)
	h.current("r2")
}

func signInWins(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l := h.presented("p", "r1")
	h.signIn("s1")
	h.renew(l, false)
	h.intend(l, "s1", broker.IntendLost)
	h.save(l, refreshed("", "t2", "r1", "r2"), broker.Superseded)
	if f := h.fail(l, dead("r1")); f.Kind != broker.NoFailure {
		h.t.Errorf("remembered %+v", f)
	}
	c := h.current("s1")
	if c.Presentations != 0 {
		h.t.Errorf("consent %+v", c)
	}
	if a := h.acquire("q", broker.Demand{}, broker.Usable); a.Token.Access.Reveal() != "token of s1" {
		h.t.Errorf("got %s", a.Token.Access.Reveal())
	}
	h.presented("q", "s1")
}

func signInWinsOverLogin(h *history) {
	h.use = broker.ConsentPreferred
	l := h.lease("p")
	h.signIn("s1")
	login := plain("t1")
	login.Refresh = broker.NewSecret("r1")
	h.save(l, login, broker.Stale)
	h.current("s1")
}

func signInEndsTokens(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l, _ := h.grant("p", "b")
	h.intend(l, "r1", broker.Intended)
	h.save(l, refreshed("b", "t2", "r1", "r2"), broker.Saved)
	h.fail(h.lease("p"), rejected("secret", broker.Forever))
	heard, stop := h.listen(h.Another)
	defer stop()
	h.signIn("s1")
	h.hears(heard, "the end of the tokens of the sign-in before", dropsAll(id("token of r1"), id("t2")))
	if r := h.look("b"); r.Token != nil || r.Failure != nil {
		h.t.Errorf("token %+v, failure %+v", r.Token, r.Failure)
	}
	h.restore(token("t2", 2*hour))
	if r := h.look(""); r.Token.Access.Reveal() != "token of s1" {
		h.t.Errorf("%s came back", r.Token.Access.Reveal())
	}
	a := h.claim(h.claimOf("q", "b", broker.Demand{}), broker.Granted)
	if a.Consent == nil || a.Consent.RefreshToken.Reveal() != "s1" {
		h.t.Errorf("consent %+v", a.Consent)
	}
}

func signInForgets(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l := h.presented("p", "r1")
	h.fail(l, dead("r1"))
	heard, stop := h.listen(h.Another)
	defer stop()
	h.signIn("s1")
	h.hears(heard, "that failures are forgotten", func(c broker.Change) bool { return c.Reset })
	if r := h.look(""); r.Failure != nil || r.Consent.Dead {
		h.t.Errorf("failure %+v, consent %+v", r.Failure, r.Consent)
	}
	h.fail(l, dead("r1")) // says nothing any more
	if r := h.look(""); r.Failure != nil || r.Consent.Dead {
		h.t.Errorf("failure %+v, consent %+v", r.Failure, r.Consent)
	}
}

func accountStays(h *history) {
	h.use = broker.ConsentRequired
	her := broker.Account{Subject: "42", Name: "ann@example.com"}
	l, r := signedIn(h.family, "r1")
	r.Account = her
	h.save(l, r, broker.Saved)
	h.want("account", h.current("r1").Account, her)
	h.save(h.presented("p", "r1"), refreshed("", "t2", "r1", ""), broker.Saved)
	h.want("account after a refresh in place", h.current("r1").Account, her)
	r = refreshed("", "t3", "r1", "r2")
	r.Account = her
	h.save(h.presented("q", "r1"), r, broker.Saved)
	_, a := h.grant("p", "")
	h.want("account after a refresh", a.Consent.Account, her)
	h.signIn("s1")
	h.want("account after a sign-in of nobody known", h.current("s1").Account, broker.Account{})
}

func signInTwice(h *history) {
	h.use = broker.ConsentRequired
	l, r := signedIn(h.family, "r1")
	first := h.save(l, r, broker.Saved)
	if again := h.save(l, r, broker.Saved); again.Generation != first.Generation {
		h.t.Errorf("generation %d, and %d before", again.Generation, first.Generation)
	}
	h.save(h.presented("p", "r1"), refreshed("", "t2", "r1", "r2"), broker.Saved)
	h.save(l, r, broker.Superseded)
	h.current("r2") // r1 is spent
	h.drop("operation", "")
	h.save(l, r, broker.WasDropped)
	h.acquire("q", broker.Demand{}, broker.Unauthorized)
}

func signInOfBefore(h *history) {
	h.use = broker.ConsentRequired
	l, r := signedIn(h.family, "r1")
	h.save(l, r, broker.Saved)
	h.save(h.presented("p", "r1"), refreshed("", "t2", "r1", "r2"), broker.Saved)
	h.signIn("s1")
	h.save(l, r, broker.WasDropped)
	h.current("s1")
}
