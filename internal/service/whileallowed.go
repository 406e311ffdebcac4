package service

import (
	"context"
	"errors"

	"github.com/tokenbroker/tokenbroker/internal/access"
)

// whileAllowed runs serve, which is what a stream does, for as long as the caller
// of the stream may do op with the profile: it is refused if it may not, and when
// it no longer may, because the policy has changed, the context that serve is
// given ends at once, and the caller is told so whatever serve returns. As long as
// a new policy still allows it, serve notices nothing.
//
// Serve must return when its context ends, must send nothing from then on, and may
// look at the context before each message. A message that is being sent at that
// moment may still arrive.
func (s *Service) whileAllowed(ctx context.Context, profile string, op access.Operation, scopes []string, serve func(context.Context) error) error {
	c, err := s.authorize(ctx, profile, op, scopes)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		s.awaitDenial(ctx, stop, c, profile, op, scopes)
	}()
	defer func() { <-watched }()
	defer stop(nil) // also if serve panics
	err = serve(ctx)

	var lost denial
	if errors.As(context.Cause(ctx), &lost) {
		k := callFrom(ctx)
		k.policy, k.scopes, k.outcome.decision = lost.policy, lost.scopes, lost.decision
		return denied(c, profile, op)
	}
	return err
}

// awaitDenial stops what the caller does when the policy no longer allows it. It
// returns when that is so, or when ctx ends.
func (s *Service) awaitDenial(ctx context.Context, stop context.CancelCauseFunc, c *access.Caller, profile string, op access.Operation, scopes []string) {
	for {
		policy, changed := s.access.Current()
		asked := s.asked(profile, scopes)
		if d := policy.Decide(c, op, profile, asked); !d.Allowed {
			stop(denial{policy, asked, d})
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// denial is the cause for which a stream ends whose caller has lost its right.
type denial struct {
	policy   *access.Policy
	scopes   []string
	decision access.Decision
}

func (denial) Error() string { return "the policy no longer allows it" }
