package service

import (
	"context"
	"slices"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
)

// right is what a stream lives by: its caller may do op with the profile, and
// what proves who the caller is has not ended. It belongs to the goroutine that
// handles the stream.
//
// Whoever serves a stream judges before each message, so that none leaves after
// the right is lost, and whenever what it was judged by changes, so that the
// stream ends at once. As long as all of that still allows it, the stream notices
// nothing.
type right struct {
	s       *Service
	call    *call
	profile string
	op      access.Operation
	scopes  []string // that the caller names

	// What it was judged by last, and what is closed when that is replaced.
	trust                       *trusted
	policy                      *access.Policy
	trustChanged, policyChanged <-chan struct{}
	// ends is when the proof does; zero is never.
	ends time.Time
	// undecided: one configuration is replacing another and they do not agree.
	// Until the policy changes nothing may be sent, and nothing is refused.
	undecided bool
}

// obtain is authorize, for as long as the stream of ctx lasts.
func (s *Service) obtain(ctx context.Context, profile string, op access.Operation, scopes []string) (*right, error) {
	if _, err := s.authorize(ctx, profile, op, scopes); err != nil {
		return nil, err
	}
	return &right{s: s, call: callFrom(ctx), profile: profile, op: op, scopes: scopes}, nil
}

// judge returns why the caller has lost its right, or nil.
func (r *right) judge() error {
	k := r.call
	if trust := r.s.trust.Load(); trust != r.trust || !r.ends.IsZero() && time.Now().After(r.ends) {
		ends, err := k.provenUntil(trust)
		if err != nil {
			k.policy, k.outcome.decision = nil, access.Decision{Rule: access.NoRule}
			return err
		}
		r.trust, r.trustChanged, r.ends = trust, trust.changed, ends
	}
	policy, changed := r.s.access.Current()
	asked := r.s.asked(r.profile, r.scopes)
	if policy == r.policy && !r.undecided && slices.Equal(asked, k.scopes) {
		return nil
	}
	r.policy, r.policyChanged = policy, changed
	d := policy.Decide(k.caller, r.op, r.profile, asked)
	if r.undecided = !d.Allowed && policy.Passing(); r.undecided {
		return nil
	}
	k.policy, k.scopes, k.outcome.decision = policy, asked, d
	if !d.Allowed {
		return denied(k.caller, r.profile, r.op)
	}
	return nil
}
