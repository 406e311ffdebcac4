package broker

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// A refresh token that can be used once is spent by the first byte that leaves.
// So its presentation is committed to in the store before that, nothing of ours
// cancels it after that, and what came back is saved before anything else. When
// nobody knows whether an answer came, the access token at hand is served to
// its end, and only then is the refresh token presented once more: whoever holds
// the answer has had all that time to save it. Only the server's word about this
// very refresh token ends a consent.

const (
	// mostPresentations of one refresh token that may be in doubt.
	mostPresentations = 2
	// horizonSpare is how much longer than the request itself its presenter is
	// given to bring home the answer.
	horizonSpare = 5 * time.Second
	// doubtEnds is how long before the end of the access token at hand a
	// refresh token in doubt is presented once more, at the most.
	doubtEnds = time.Minute
	// doubtPatience is for how long after its presentation a refresh token in
	// doubt is left alone for the sake of the other access tokens of the
	// family, when there is none that serves the caller.
	doubtPatience = 10 * time.Minute
)

func (a *attempt) spentID() string {
	if a.spent.IsEmpty() {
		return ""
	}
	return a.spent.ID()
}

// rotates is what a grant shows of the server's refresh tokens.
func (a *attempt) rotates(g *Grant) Rotates {
	switch {
	case a.spent.IsEmpty():
		return RotatesUnknown
	case g.RefreshToken.IsEmpty() || g.RefreshToken.Equal(a.spent):
		return RotatesNo
	}
	return RotatesYes
}

// reusable reports whether presenting the refresh token once too often harms
// nothing.
func (a *attempt) reusable() bool {
	return a.f.profile.Reusable || a.consent.Rotates == RotatesNo
}

// weigh decides about a refresh token whose last presentations nobody knows the
// outcome of. It reports whether the flight ends here.
func (a *attempt) weigh(ctx context.Context) (stop bool) {
	f, c := a.f, a.consent
	grace := f.profile.Grace > 0 && c.PresentedAge < f.profile.Grace
	if c.Presentations == 0 || a.reusable() || grace && c.Presentations < mostPresentations {
		return false
	}
	now := time.Now()
	left, t := a.e.b.doubtLasts(a.e.family, now), a.e.token.Load()
	serves := t != nil && (f.ahead || t.serves(f.demand, now))
	if !serves {
		left = min(left, doubtPatience-c.PresentedAge)
	}
	switch {
	case left > 0 && serves:
		a.giveBack(ctx)
		f.token, f.source, f.quiet = t, FromMemory, left
	case f.profile.consentUse() == ConsentPreferred && (left > 0 || c.Presentations >= mostPresentations):
		a.consent = nil // obtained anew instead
		return false
	case left > 0:
		a.giveBack(ctx)
		f.err = answerAwaited(f.profile.Profile, left)
	case c.Presentations < mostPresentations:
		return false
	default:
		a.giveBack(ctx)
		f.err = authorizationNeeded(f.profile.Profile, fmt.Sprintf(
			"the refresh token was presented %d times and no answer came back, so nobody knows whether it is still good; 'broker reset %s' has it tried again", c.Presentations, f.profile.Name))
	}
	return true
}

// doubtLasts is for how long a refresh token in doubt is left alone: while an
// access token of the family, in any slot, is far from its end.
func (b *Broker) doubtLasts(family string, now time.Time) (left time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, e := range b.entries[family] {
		if t := e.token.Load(); t != nil {
			left = max(left, t.remaining(now)-min(doubtEnds, t.lifetime/4))
		}
	}
	return left
}

// refresh spends the refresh token. lasts is the lease's.
func (a *attempt) refresh(ctx context.Context, lasts func() bool) error {
	if a.e.b.unsaved.has(a.e.family) { // since this flight began: its successor is here
		a.giveBack(ctx)
		return errAgain
	}
	a.spent = a.consent.RefreshToken
	if err := a.intend(ctx); err != nil || a.f.err != nil {
		return err
	}
	grant, issueErr := a.issue(ctx, Request{
		Scopes:       a.e.scopes,
		RefreshToken: a.spent,
		Clear: func() error {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if !lasts() {
				return errLeaseLost
			}
			return nil
		},
	})
	switch {
	case issueErr == nil:
		return a.obtained(ctx, grant)
	case issueErr.Outcome == Unsent && (ctx.Err() != nil || errors.Is(issueErr, errLeaseLost)):
		a.giveBack(ctx)
		return errLeaseLost
	case issueErr.Kind == GrantDead:
		return a.condemned(ctx, issueErr)
	default:
		a.failed(ctx, issueErr)
	}
	return nil
}

// intend commits to the presentation.
func (a *attempt) intend(ctx context.Context) error {
	most := mostPresentations
	if a.reusable() {
		most = maxPresentations
	}
	verdict, err := a.e.b.store.Intend(ctx, a.lease, Presentation{
		RefreshID: a.spent.ID(), Horizon: a.f.profile.timeout() + horizonSpare, Most: most,
	})
	if err == nil && verdict == IntendUnconfirmed && a.atItsEnd() {
		a.e.b.log.Warn("refresh token is presented although the store could not replicate that: the access token has ended", "profile", a.f.profile.Name)
		verdict = Intended
	}
	switch {
	case err == nil && verdict == Intended:
		return nil
	case err == nil && verdict == IntendLost:
		return errLeaseLost
	case err == nil && verdict != IntendUnconfirmed:
		a.giveBack(ctx)
		return errAgain
	}
	a.giveBack(ctx)
	if ctx.Err() != nil {
		return errLeaseLost
	}
	if err == nil {
		err = errors.New("it has not replicated what must not be lost; check its replicas")
	}
	a.f.err = storeUnavailable(a.f.profile.Profile, "presenting the refresh token of", err)
	return nil
}

// maxPresentations of a refresh token that can be used many times.
const maxPresentations = 1 << 30

// atItsEnd reports whether there is no access token left to wait with.
func (a *attempt) atItsEnd() bool {
	t := a.e.token.Load()
	return t == nil || t.remaining(time.Now()) <= Margin(t.lifetime)
}

// condemned hears that the refresh token is no longer good. If the record has
// another one by now, somebody's refresh won, and that verdict is about the
// past.
func (a *attempt) condemned(ctx context.Context, issueErr *IssueError) error {
	var r Record
	err := detached(ctx, func(ctx context.Context) (err error) {
		r, err = a.e.b.store.Look(ctx, a.e.family, a.e.slot)
		return err
	})
	if err == nil && r.Consent != nil && !r.Consent.RefreshToken.Equal(a.spent) {
		a.giveBack(ctx)
		return errAgain
	}
	a.failed(ctx, issueErr)
	if a.f.profile.consentUse() == ConsentPreferred {
		a.f.err = nil
		a.e.forgive()
		return errAgain
	}
	return nil
}
