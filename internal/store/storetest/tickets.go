package storetest

import (
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

var tickets = map[string]func(*history){
	"it is redeemed by one owner":            redeemedOnce,
	"it is over when its life is":            ticketOver,
	"one that was lost is unknown":           ticketLost,
	"it is not kept anew after it was taken": ticketKeptAgain,
}

const ticketLife = 10 * time.Minute

func (h *history) ticket(id string) broker.Ticket {
	return broker.Ticket{ID: id, Content: broker.NewSecret("content of " + id), Life: ticketLife}
}

func (h *history) keep(id string) {
	h.t.Helper()
	h.must("keep", h.Store.Keep(h.ctx(), h.ticket(id)))
}

// redeem wants that verdict, and the content with it if there is one.
func (h *history) redeem(id, owner string, want broker.RedeemVerdict) broker.Redemption {
	h.t.Helper()
	r, err := h.by(owner).Redeem(h.ctx(), id, owner)
	h.must("redeem by "+owner, err)
	content := ""
	if want == broker.Redeemed {
		content = "content of " + id
	}
	if r.Verdict != want || r.Content.Reveal() != content {
		h.t.Fatalf("redeem by %s: verdict %d and %q; want %d and %q", owner, r.Verdict, r.Content.Reveal(), want, content)
	}
	return r
}

func redeemedOnce(h *history) {
	h.redeem("t1", "q", broker.TicketUnknown)
	h.keep("t1")
	h.keep("t2")
	h.Advance(2 * time.Minute)
	h.about("age", h.redeem("t1", "q", broker.Redeemed).Age, 2*time.Minute)
	h.redeem("t1", "p", broker.TicketTaken)
	h.Advance(3 * time.Minute)
	h.about("age", h.redeem("t1", "q", broker.Redeemed).Age, 5*time.Minute)
	h.redeem("t1", "r", broker.TicketTaken)
	h.redeem("t2", "p", broker.Redeemed)
}

func ticketOver(h *history) {
	h.keep("t1")
	h.keep("t2")
	h.redeem("t1", "q", broker.Redeemed)
	h.Advance(ticketLife - time.Second)
	h.redeem("t1", "q", broker.Redeemed)
	h.Advance(time.Second)
	h.redeem("t1", "q", broker.TicketUnknown)
	h.redeem("t2", "p", broker.TicketUnknown)
}

func ticketLost(h *history) {
	h.keep("t1")
	h.lose()
	h.redeem("t1", "p", broker.TicketUnknown)
	h.keep("t2")
	h.redeem("t2", "q", broker.Redeemed)
}

func ticketKeptAgain(h *history) {
	h.keep("t1")
	h.redeem("t1", "q", broker.Redeemed)
	h.Advance(time.Minute)
	h.keep("t1")
	h.redeem("t1", "p", broker.TicketTaken)
	h.about("age", h.redeem("t1", "q", broker.Redeemed).Age, time.Minute)
}
