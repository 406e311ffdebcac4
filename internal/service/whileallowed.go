package service

import (
	"context"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
)

// whileAllowed runs serve, which is what a stream does, for as long as the caller
// of the stream may do op with the profile: it is refused if it may not, and when
// it no longer may, because the policy has changed, the context that serve is
// given ends at once, and the caller is told so whatever serve returns. The same
// holds for what proves who the caller is: its end, and a new Trust by which it
// proves nothing. As long as all of that still allows it, serve notices nothing.
//
// Serve must return when its context ends, must send nothing from then on, and may
// look at the context before each message. A message that is being sent at that
// moment may still arrive.
func (s *Service) whileAllowed(ctx context.Context, profile string, op access.Operation, scopes []string, serve func(context.Context) error) error {
	c, err := s.authorize(ctx, profile, op, scopes)
	if err != nil {
		return err
	}
	k := callFrom(ctx)
	ctx, stop := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		s.awaitDenial(ctx, stop, k, profile, op, scopes)
	}()
	defer func() { <-watched }()
	defer stop(nil) // also if serve panics
	err = serve(ctx)

	switch lost := context.Cause(ctx).(type) {
	case denial:
		k.policy, k.scopes, k.outcome.decision = lost.policy, lost.scopes, lost.decision
		return denied(c, profile, op)
	case failure: // the caller is not known any more
		k.policy, k.outcome.decision = nil, access.Decision{Rule: access.NoRule}
		return lost
	}
	return err
}

// awaitDenial stops what the call does when its caller is not known any more, or
// the policy no longer allows it. It returns when that is so, or when ctx ends.
func (s *Service) awaitDenial(ctx context.Context, stop context.CancelCauseFunc, k *call, profile string, op access.Operation, scopes []string) {
	for {
		trust := s.trust.Load()
		ends, err := k.provenUntil(trust)
		if err != nil {
			stop(err)
			return
		}
		policy, changed := s.access.Current()
		asked := s.asked(profile, scopes)
		if d := policy.Decide(k.caller, op, profile, asked); !d.Allowed && !policy.Passing() {
			stop(denial{policy, asked, d})
			return
		}
		select {
		case <-changed:
		case <-trust.changed:
		case <-after(ends):
		case <-ctx.Done():
			return
		}
	}
}

// after is a channel that gets something when a time is over; never if it is zero.
func after(end time.Time) <-chan time.Time {
	if end.IsZero() {
		return nil
	}
	return time.After(time.Until(end) + 1)
}

// denial is the cause for which a stream ends whose caller has lost its right.
type denial struct {
	policy   *access.Policy
	scopes   []string
	decision access.Decision
}

func (denial) Error() string { return "the policy no longer allows it" }
