package storetest

import (
	"slices"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Tokens of jobs: each in a slot of its own, which ends once and for all.

var jobs = map[string]func(*history){
	"it ends with all its tokens":                    jobEnds,
	"one token of it ends alone":                     jobSlotEnds,
	"what is under way for it is dropped":            jobUnderWay,
	"it ends only with the token that is meant":      jobEndsByToken,
	"one that never had a token is closed, too":      jobWithoutToken,
	"it is over when its tokens would be":            jobEndIsForgotten,
	"the token that is meant takes the others along": jobEndsByOneToken,
	"its end is repeatable":                          jobEndsTwice,
	"its end is announced":                           jobEndAnnounced,
	"its end outlives a loss":                        jobEndRestored,
	"its token does not come back by a restoration":  jobTokenRestored,
	"its end leaves the consent alone":               jobEndLeavesConsent,
	"who peeks takes no lease":                       jobPeek,
	"an access token has one owner":                  jobOwns,
}

const jobSlot, jobOther, neighbor = "job.1/a", "job.1/b", "job.2/a"

// inSlot is a grant for a slot that came without a refresh token.
func inSlot(slot, name string) broker.Result {
	return broker.Result{Slot: slot, Token: token(name, hour)}
}

// give has a slot hold a token.
func (h *history) give(slot, name string) broker.StoredToken {
	h.t.Helper()
	l, _ := h.grant("p", slot)
	return h.save(l, inSlot(slot, name), broker.Saved)
}

// end ends a job, or a slot of one, or only if it has the token of that name.
func (h *history) end(operation, job, token string) broker.Dropped {
	h.t.Helper()
	d := broker.Drop{Family: h.family, Operation: operation, Job: job, Remember: 10 * time.Minute}
	if token != "" {
		d.Token = id(token)
	}
	dropped, err := h.Store.Drop(h.ctx(), d)
	h.must("end of the job", err)
	return dropped
}

// wantEnded wants everybody to see that the slot's job has ended.
func (h *history) wantEnded(slot string) {
	h.t.Helper()
	for _, owner := range []string{"p", "q"} {
		h.claim(h.claimOf(owner, slot, broker.Demand{}), broker.Ended)
		h.claim(h.claimOf(owner, slot, anew), broker.Ended)
	}
	if r := h.look(slot); !r.Ended || r.Token != nil {
		h.t.Errorf("slot %s: ended %t, token %+v", slot, r.Ended, r.Token)
	}
}

// wantServed wants everybody to get the token of that name.
func (h *history) wantServed(slot, name string) {
	h.t.Helper()
	for _, owner := range []string{"p", "q"} {
		if a := h.claim(h.claimOf(owner, slot, broker.Demand{}), broker.Usable); a.Token.Access.Reveal() != name {
			h.t.Errorf("slot %s: %s, want %s", slot, a.Token.Access.Reveal(), name)
		}
	}
	if h.look(slot).Ended {
		h.t.Errorf("slot %s has ended", slot)
	}
}

func jobEnds(h *history) {
	h.give(jobSlot, "t1")
	h.give(jobOther, "t2")
	h.give(neighbor, "t3")
	h.give("", "t4")
	h.want("dropped", names(h.end("operation", "job.1", "")), []string{"t1", "t2"})
	h.wantEnded(jobSlot)
	h.wantEnded(jobOther)
	h.wantEnded("job.1/never asked for")
	h.wantServed(neighbor, "t3")
	h.wantServed("", "t4")
	if !h.look(jobSlot).ToRevoke {
		h.t.Error("nothing waits for its revocation")
	}
	for _, name := range []string{"t1", "t2"} {
		h.must("confirm", h.Another.Confirm(h.ctx(), h.family, id(name)))
	}
	if h.look(jobSlot).ToRevoke {
		h.t.Error("what was revoked waits for its revocation")
	}
}

func jobSlotEnds(h *history) {
	h.give(jobSlot, "t1")
	h.give(jobOther, "t2")
	h.want("dropped", names(h.end("operation", jobSlot, "")), []string{"t1"})
	h.wantEnded(jobSlot)
	h.wantServed(jobOther, "t2")
}

func jobUnderWay(h *history) {
	l, _ := h.grant("q", jobSlot)
	h.want("dropped", names(h.end("operation", "job.1", "")), []string{})
	h.save(l, inSlot(jobSlot, "t1"), broker.WasDropped)
	h.wantEnded(jobSlot)
	h.Advance(lease)
	h.save(l, inSlot(jobSlot, "t1"), broker.WasDropped)
}

func jobEndsByToken(h *history) {
	h.give(jobSlot, "t1")
	h.give(jobSlot, "t2")
	h.want("dropped", names(h.end("operation", "job.1", "t1")), []string{})
	h.wantServed(jobSlot, "t2")
	h.want("dropped", names(h.end("another", "job.1", "t2")), []string{"t2"})
	h.wantEnded(jobSlot)
	h.want("dropped again", names(h.end("another", "job.1", "t2")), []string{"t2"})
}

func jobEndsByOneToken(h *history) {
	heard, stop := h.listen(h.Another)
	defer stop()
	h.give(jobSlot, "t1")
	h.give(jobOther, "t2")
	h.give(neighbor, "t3")
	h.wantServed(jobSlot, "t1")
	h.wantServed(jobOther, "t2")
	h.want("dropped", names(h.end("operation", "job.1", "t1")), []string{"t1", "t2"})
	h.hears(heard, "the end of both tokens", dropsAll(id("t1"), id("t2")))
	h.wantEnded(jobSlot)
	h.wantEnded(jobOther)
	h.wantServed(neighbor, "t3")
}

func jobWithoutToken(h *history) {
	h.want("dropped", names(h.end("operation", "job.1", "")), []string{})
	h.wantEnded(jobSlot)
	h.Advance(10*time.Minute + time.Second)
	h.give(jobSlot, "t1")
	h.wantServed(jobSlot, "t1")
}

func jobEndIsForgotten(h *history) {
	h.give(jobSlot, "t1")
	h.Advance(20 * time.Minute)
	h.end("operation", "job.1", "")
	h.Advance(40 * time.Minute) // the token would have ended
	h.wantEnded(jobSlot)
	h.Advance(9 * time.Minute)
	h.wantEnded(jobSlot)
	h.Advance(time.Minute + time.Second)
	h.give(jobSlot, "t2")
	h.wantServed(jobSlot, "t2")
}

func jobEndsTwice(h *history) {
	h.give(jobSlot, "t1")
	h.want("dropped", names(h.end("operation", "job.1", "")), []string{"t1"})
	h.want("repeated", names(h.end("operation", "job.1", "")), []string{"t1"})
	h.want("by another", names(h.end("another", "job.1", "")), []string{"t1"}) // it is to be revoked still
	h.must("confirm", h.Store.Confirm(h.ctx(), h.family, id("t1")))
	h.want("once more", names(h.end("third", "job.1", "")), []string{})
	h.wantEnded(jobSlot)
}

func jobEndAnnounced(h *history) {
	heard, stop := h.listen(h.Another)
	defer stop()
	h.give(jobSlot, "t1")
	h.wantServed(jobSlot, "t1")
	h.end("operation", "job.1", "")
	h.hears(heard, "the end of the job", func(c broker.Change) bool {
		return dropsAll(id("t1"))(c) && slices.Equal(c.Ended, []string{"job.1"})
	})
}

func jobEndRestored(h *history) {
	h.give(jobSlot, "t1")
	h.wantServed(jobSlot, "t1")
	h.end("operation", "job.1", "")
	h.wantEnded(jobSlot)
	h.lose()
	h.eventually("the end of the job in the store", func() bool { return h.look(jobSlot).Ended })
	h.wantEnded(jobSlot)
}

func jobTokenRestored(h *history) {
	h.give(jobSlot, "t1")
	h.end("operation", "job.1", "")
	h.Another.Restore(h.family, jobSlot, token("t2", hour))
	h.Another.Restore(h.family, "b", token("t3", hour))
	h.eventually("another restored token's arrival", func() bool { return h.look("b").Token != nil })
	h.wantEnded(jobSlot)
}

func jobEndLeavesConsent(h *history) {
	h.use = broker.ConsentRequired
	h.signIn("r1")
	l, _ := h.grant("p", jobSlot)
	h.intend(l, "r1", broker.Intended)
	h.save(l, refreshed(jobSlot, "t2", "r1", "r2"), broker.Saved)
	l, _ = h.grant("p", jobSlot)
	h.intend(l, "r2", broker.Intended)
	h.want("dropped", names(h.end("operation", "job.1", "")), []string{"t2"})
	// The refresh token that comes is good; the access token that comes is not.
	h.save(l, refreshed(jobSlot, "t3", "r2", "r3"), broker.Superseded)
	h.claim(h.claimOf("q", jobSlot, broker.Demand{}), broker.Ended)
	r := h.look("")
	if r.Consent == nil || r.Consent.RefreshToken.Reveal() != "r3" || r.Consent.Presentations != 0 {
		h.t.Errorf("consent %+v", r.Consent)
	}
	h.wantServed("", "token of r1")
	_, a := h.grant("q", "")
	if a.Consent == nil || a.Consent.RefreshToken.Reveal() != "r3" {
		h.t.Errorf("granted with consent %+v", a.Consent)
	}
}

func jobPeek(h *history) {
	c := h.claimOf("q", jobSlot, broker.Demand{})
	c.Peek = true
	h.claim(c, broker.Free)
	h.claim(c, broker.Free)
	l, _ := h.grant("p", jobSlot)
	h.claim(c, broker.Busy)
	h.save(l, inSlot(jobSlot, "t1"), broker.Saved)
	h.claim(c, broker.Usable)
	c.Demand = anew
	h.claim(c, broker.Free)
	h.end("operation", "job.1", "")
	h.claim(c, broker.Ended)
}

func jobOwns(h *history) {
	own := func(by, token, owner, want string, life time.Duration) {
		h.t.Helper()
		got, err := h.by(by).Own(h.ctx(), id(token), owner, life)
		h.must("own", err)
		h.want("owner of "+token, got, want)
	}
	own("p", "t1", "job.1/a", "job.1/a", hour)
	own("q", "t1", "job.2/a", "job.1/a", hour)
	own("q", "t2", "job.2/a", "job.2/a", hour)
	own("q", "t1", "job.1/a", "job.1/a", time.Minute) // which does not shorten it
	h.Advance(hour - time.Second)
	own("q", "t1", "job.2/a", "job.1/a", hour)
	h.Advance(2 * time.Second)
	own("q", "t1", "job.2/a", "job.2/a", hour)
	own("p", "t1", "job.1/a", "job.2/a", hour)
}
