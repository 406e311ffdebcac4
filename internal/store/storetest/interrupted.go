package storetest

import (
	"context"
	"errors"
	"sync"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Interruption is a way for a transition to go wrong. Its caller gets an error
// each time, and cannot tell which it was.
type Interruption int

const (
	// Lost: the transition never reached the store.
	Lost Interruption = iota + 1
	// Cut: it happened; the answer was lost.
	Cut
	// Late: it has yet to happen, whatever its caller does meanwhile.
	Late
)

// Interruptions are all of them.
var Interruptions = []Interruption{Lost, Cut, Late}

func (i Interruption) String() string { return [...]string{"undisturbed", "lost", "cut", "late"}[i] }

var errInterrupted = errors.New("the connection was cut")

// Interrupted is a store whose transitions can be made to go wrong.
type Interrupted struct {
	broker.Store

	mu   sync.Mutex
	next Interruption
	late []func()
}

// Interrupt returns a store whose transitions are those of s.
func Interrupt(s broker.Store) *Interrupted { return &Interrupted{Store: s} }

// Next makes the next transition go wrong.
func (s *Interrupted) Next(i Interruption) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next = i
}

// Deliver has happen what is late, and returns how much that was.
func (s *Interrupted) Deliver() int {
	s.mu.Lock()
	late := s.late
	s.late = nil
	s.mu.Unlock()
	for _, transition := range late {
		transition()
	}
	return len(late)
}

func (s *Interrupted) do(ctx context.Context, transition func(context.Context) error) error {
	s.mu.Lock()
	how := s.next
	s.next = 0
	if how == Late {
		s.late = append(s.late, func() { _ = transition(context.WithoutCancel(ctx)) })
	}
	s.mu.Unlock()
	switch how {
	case Lost, Late:
		return errInterrupted
	case Cut:
		return errors.Join(errInterrupted, transition(ctx))
	}
	return transition(ctx)
}

// answered is do for a transition with an answer.
func answered[T any](ctx context.Context, s *Interrupted, transition func(context.Context) (T, error)) (T, error) {
	var answer, nothing T
	err := s.do(ctx, func(ctx context.Context) (err error) {
		answer, err = transition(ctx)
		return err
	})
	if err != nil {
		return nothing, err
	}
	return answer, nil
}

// Acquire implements broker.Store.
func (s *Interrupted) Acquire(ctx context.Context, c broker.Claim) (broker.Acquisition, error) {
	return answered(ctx, s, func(ctx context.Context) (broker.Acquisition, error) { return s.Store.Acquire(ctx, c) })
}

// Renew implements broker.Store.
func (s *Interrupted) Renew(ctx context.Context, l broker.Lease) (bool, error) {
	return answered(ctx, s, func(ctx context.Context) (bool, error) { return s.Store.Renew(ctx, l) })
}

// Intend implements broker.Store.
func (s *Interrupted) Intend(ctx context.Context, l broker.Lease, p broker.Presentation) (broker.IntendVerdict, error) {
	return answered(ctx, s, func(ctx context.Context) (broker.IntendVerdict, error) { return s.Store.Intend(ctx, l, p) })
}

// Save implements broker.Store.
func (s *Interrupted) Save(ctx context.Context, l broker.Lease, r broker.Result) (broker.StoredToken, broker.SaveVerdict, error) {
	type saved struct {
		token   broker.StoredToken
		verdict broker.SaveVerdict
	}
	a, err := answered(ctx, s, func(ctx context.Context) (saved, error) {
		t, v, err := s.Store.Save(ctx, l, r)
		return saved{t, v}, err
	})
	return a.token, a.verdict, err
}

// Keep implements broker.Store.
func (s *Interrupted) Keep(ctx context.Context, t broker.Ticket) error {
	return s.do(ctx, func(ctx context.Context) error { return s.Store.Keep(ctx, t) })
}

// Redeem implements broker.Store.
func (s *Interrupted) Redeem(ctx context.Context, id, owner string) (broker.Redemption, error) {
	return answered(ctx, s, func(ctx context.Context) (broker.Redemption, error) { return s.Store.Redeem(ctx, id, owner) })
}

// Fail implements broker.Store.
func (s *Interrupted) Fail(ctx context.Context, l broker.Lease, f broker.Failure) (broker.Failure, error) {
	return answered(ctx, s, func(ctx context.Context) (broker.Failure, error) { return s.Store.Fail(ctx, l, f) })
}

// Drop implements broker.Store.
func (s *Interrupted) Drop(ctx context.Context, d broker.Drop) (broker.Dropped, error) {
	return answered(ctx, s, func(ctx context.Context) (broker.Dropped, error) { return s.Store.Drop(ctx, d) })
}

// Confirm implements broker.Store.
func (s *Interrupted) Confirm(ctx context.Context, family, id string) error {
	return s.do(ctx, func(ctx context.Context) error { return s.Store.Confirm(ctx, family, id) })
}

// Reset implements broker.Store.
func (s *Interrupted) Reset(ctx context.Context, family string) error {
	return s.do(ctx, func(ctx context.Context) error { return s.Store.Reset(ctx, family) })
}

// Look implements broker.Store.
func (s *Interrupted) Look(ctx context.Context, family, slot string) (broker.Record, error) {
	return answered(ctx, s, func(ctx context.Context) (broker.Record, error) { return s.Store.Look(ctx, family, slot) })
}
