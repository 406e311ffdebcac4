package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// A ticket is a Redis hash of its own, "tb1:ticket:{ID}", which ends by itself:
//
//	sealed      the content, sealed
//	kept ends   since when and until when, in milliseconds of Redis time
//	owner       who has redeemed it
//
// No process has a copy of it: one that is lost is unknown.
func ticketKey(id string) string { return "tb1:ticket:{" + id + "}" }

// ticketPlace is what the content is bound to, beside the id.
const ticketPlace = "ticket"

// Keep implements broker.Store.
func (r *Redis) Keep(ctx context.Context, t broker.Ticket) error {
	const what = "keeping a ticket"
	sealed, err := sealPayload(r.keyset.Load(), payload{Token: t.Content.Reveal()}, t.ID, ticketPlace)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	_, err = r.onTicket(ctx, what, keepScript, t.ID, "sealed", sealed, "life", t.Life.Milliseconds())
	return err
}

var redeemVerdicts = map[string]broker.RedeemVerdict{
	"REDEEMED": broker.Redeemed, "UNKNOWN": broker.TicketUnknown, "TAKEN": broker.TicketTaken,
}

// Redeem implements broker.Store.
func (r *Redis) Redeem(ctx context.Context, id, owner string) (broker.Redemption, error) {
	const what = "redeeming a ticket"
	answer, err := r.onTicket(ctx, what, redeemScript, id, "owner", owner)
	if err != nil {
		return broker.Redemption{}, err
	}
	verdict := redeemVerdicts[answer.code]
	if verdict != broker.Redeemed {
		return broker.Redemption{Verdict: verdict}, nil
	}
	p, err := r.open(answer.out["sealed"], id, ticketPlace)
	switch {
	case errors.Is(err, ErrCorrupt):
		return broker.Redemption{Verdict: broker.TicketUnknown}, nil
	case err != nil:
		return broker.Redemption{}, fmt.Errorf("%s: %w", what, err)
	}
	return broker.Redemption{Verdict: verdict, Content: broker.NewSecret(p.Token), Age: span(answer.out.number("age"))}, nil
}

// onTicket runs a script on a ticket. what is being attempted begins the error.
func (r *Redis) onTicket(ctx context.Context, what string, s *script, id string, args ...any) (answer reply, err error) {
	// Whoever has redeemed it must not be forgotten: the code would be sent twice.
	raw, _, err := r.link.runDurably(ctx, s, ticketKey(id), append([]any{r.offset.Load(), r.nonce()}, args...)...)
	if err == nil {
		err = answer.parse(raw)
	}
	if err != nil {
		return reply{}, r.explained(fmt.Errorf("%s: %w", what, err), id)
	}
	return answer, nil
}

// memTicket is a ticket in memory.
type memTicket struct {
	broker.Ticket
	kept  time.Time
	owner string
}

func (t *memTicket) over(now time.Time) bool { return broker.Until(now, t.kept.Add(t.Life)) <= 0 }

// Keep implements broker.Store.
func (m *Memory) Keep(_ context.Context, t broker.Ticket) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	for id, old := range m.tickets {
		if old.over(now) {
			delete(m.tickets, id)
		}
	}
	if m.tickets[t.ID] == nil {
		m.tickets[t.ID] = &memTicket{Ticket: t, kept: now}
	}
	return nil
}

// Redeem implements broker.Store.
func (m *Memory) Redeem(_ context.Context, id, owner string) (broker.Redemption, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now, t := time.Now(), m.tickets[id]
	switch {
	case t == nil || t.over(now):
		return broker.Redemption{Verdict: broker.TicketUnknown}, nil
	case t.owner != "" && t.owner != owner:
		return broker.Redemption{Verdict: broker.TicketTaken}, nil
	}
	t.owner = owner
	return broker.Redemption{Verdict: broker.Redeemed, Content: t.Content, Age: now.Sub(t.kept)}, nil
}
