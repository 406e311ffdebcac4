package broker

import (
	"context"
	"errors"
	"time"
)

// attempt is one token request under way: who may hear of it, and by what
// right it is made.
type attempt struct {
	f *flight
	e *entry
	// lease that the request is made under; its Owner is empty for one that
	// goes on without the store.
	lease Lease
	pass  *pass
	// spent is the refresh token that is presented; empty if none is.
	spent Secret
	// consent that it is of.
	consent *Consent
	sent    time.Time
	took    time.Duration
	// unusable tells why nobody may have the access token that came.
	unusable *IssueError
}

func (a *attempt) alone() bool { return a.lease.Owner == "" }

// mint makes the one call that the lease allows and brings home what came of
// it. It returns errLeaseLost when the outcome is somebody else's to decide, and
// errAgain when the store knows more by now. start is when the lease was asked
// for.
func (f *flight) mint(ctx context.Context, e *entry, lease Lease, granted Acquisition, start time.Time) error {
	a := &attempt{f: f, e: e, lease: lease, consent: granted.Consent}
	return a.guarded(ctx, func() error {
		held, lasts, release := e.b.hold(ctx, f.profile.Name, lease, start)
		defer release()
		if a.consent != nil {
			e.keep(granted.Token, start)
			if stop := a.weigh(ctx); stop {
				return nil
			}
		}
		return a.enter(held, func(held context.Context) error {
			if a.consent != nil {
				return a.refresh(held, lasts)
			}
			return a.request(held)
		})
	})
}

// mintAlone makes a call without the store: every replica makes its own, but
// each only as its own memory needs it.
func (f *flight) mintAlone(ctx context.Context, e *entry, unreadable bool) {
	if t := e.token.Load(); t != nil && f.demand.Not == t.ID {
		if wait := holdOffLast - time.Since(t.IssueTime); wait > 0 { // the store would know how often it was refused
			f.err = tooSoon(f.profile.Profile, f.demand, wait)
			return
		}
	}
	a := &attempt{f: f, e: e}
	if a.guarded(ctx, func() error { return a.enter(ctx, a.request) }) != nil {
		f.err = f.outOfTime(e)
	}
	if f.token != nil && !unreadable {
		e.b.store.Restore(e.family, e.slot, f.token.stored(time.Now()))
	}
}

// guarded turns a panic into a failure like any other.
func (a *attempt) guarded(ctx context.Context, run func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			a.e.b.recovered(a.f.profile.Name, r)
			a.failed(ctx, &IssueError{Kind: Unavailable, Text: brokerFailed})
			err = nil
		}
	}()
	return run()
}

// enter runs call with the right to present the profile's credential, unless
// something stands in the way.
func (a *attempt) enter(ctx context.Context, call func(context.Context) error) error {
	pass, failure, err := a.f.profile.gate.enter(ctx, a.e.b, a.f.profile, !a.alone())
	if pass != nil {
		a.pass = pass
		defer pass.leave()
		return call(pass.ctx)
	}
	a.giveBack(ctx)
	if failure.Kind != NoFailure {
		a.f.err = failureError(a.f.profile.Profile, failure.Failure, failure.rest(time.Now()))
		return nil
	}
	if errors.Is(err, errNoRecord) {
		a.f.err = storeUnavailable(a.f.profile.Profile, "requesting a token for", err)
		return nil
	}
	return err
}

// request obtains the grant anew.
func (a *attempt) request(ctx context.Context) error {
	call := ctx
	if !a.f.profile.repeatable() { // a password that was sent has been tried, whatever we hear of it
		if ctx.Err() != nil {
			a.giveBack(ctx)
			return errLeaseLost
		}
		call = context.WithoutCancel(ctx)
	}
	if a.f.demand.Lifetime > 0 {
		full, done := a.f.profile.life.probing(ctx)
		defer done()
		if a.hopeless(ctx, full) {
			return nil
		}
	}
	grant, issueErr := a.issue(call, Request{Scopes: a.e.scopes})
	switch {
	case issueErr == nil:
		return a.obtained(ctx, grant)
	case ctx.Err() != nil && !issueErr.Kind.refuses(): // we stopped it ourselves: that says nothing about the endpoint
		a.giveBack(ctx)
		a.e.b.log.Info("token request given up", "profile", a.f.profile.Name, "cause", context.Cause(ctx).Error())
		return errLeaseLost
	default:
		a.failed(ctx, issueErr)
	}
	return nil
}

// issue makes the one request.
func (a *attempt) issue(ctx context.Context, r Request) (*Grant, *IssueError) {
	a.sent = time.Now()
	grant, err := a.f.profile.Issuer.Issue(ctx, r)
	a.took = time.Since(a.sent)
	if err == nil {
		return grant, nil
	}
	return nil, asIssueError(err)
}

func asIssueError(err error) *IssueError {
	var issueErr *IssueError
	if !errors.As(err, &issueErr) {
		issueErr = &IssueError{Kind: Unavailable, Text: "the request could not be made", Err: err}
	}
	return issueErr
}

// failed remembers an attempt's failure for everybody.
func (a *attempt) failed(ctx context.Context, issueErr *IssueError) {
	f, e := a.f, a.e
	failure := failureOf(f.profile.Profile, issueErr)
	if issueErr.Kind == GrantDead && !a.spent.IsEmpty() {
		failure.Kind, failure.Credential = Dead, a.spentID()
	}
	if issueErr.Kind == RequestRejected {
		failure.Credential = e.request(f.profile)
	}
	failure.Outcome = issueErr.Outcome
	tell := failure
	if failure.Kind == Rejection && IsJobFamily(e.family) {
		// It is about the profile, and known there. The job's record is its own, and
		// nobody resets it.
		tell = Failure{Kind: NoFailure, Outcome: failure.Outcome}
		f.profile.gate.refuse(failure, a.resets())
	}
	decided, err := a.tell(ctx, tell)
	// What nobody could be told is obeyed here all the same, and so is a refusal
	// that the lease did not live to tell; remember knows of resets.
	if a.alone() || err != nil || decided.Kind == NoFailure && failure.Kind == Rejection {
		decided = e.backOff(failure)
	}
	if a.pass != nil {
		a.pass.fail(ctx, issueErr.Kind, decided)
	}
	if decided.Kind == NoFailure { // a reset overtook it: callers hear of it, nobody remembers
		f.err = failureError(f.profile.Profile, failure, 0)
	} else {
		e.remember(f, decided)
		f.err = failureError(f.profile.Profile, decided, decided.Rest)
	}
	a.report("token request", issueErr, "attempts", decided.Attempts, "next_attempt", restText(decided.Rest))
}

// resets of the client when the attempt began.
func (a *attempt) resets() int {
	if a.pass == nil {
		return -1
	}
	return a.pass.resets
}

// report tells operators how what was tried has failed.
func (a *attempt) report(tried string, err *IssueError, more ...any) {
	log := a.e.b.log.With("profile", a.f.profile.Name)
	attrs := append([]any{"outcome", err.Kind.String(), "oauth_error", err.Code, "error", err.Text, "took", a.took}, more...)
	if err.Trace != "" {
		attrs = append(attrs, "server_trace", err.Trace)
	}
	log.Warn(tried+" failed", attrs...)
	if err.Err != nil {
		log.Debug("cause of the failed "+tried, "cause", err.Err.Error())
	}
	a.e.b.observe(Attempt{Profile: a.f.profile.Name, Outcome: err.Kind.String(), Duration: a.took})
}

// giveBack ends the lease without a verdict, and takes a presentation that was
// committed to and not sent back.
func (a *attempt) giveBack(ctx context.Context) {
	if _, err := a.tell(ctx, Failure{Kind: NoFailure, Outcome: Unsent}); err != nil {
		a.e.b.log.Info("lease not given back; it ends by itself", "profile", a.f.profile.Name, "after", a.lease.Length)
	}
}

// tell has the store know how the attempt failed. A presentation of which it
// has not heard what became counts as one in doubt, and two of those cost a
// person a sign-in; a refusal that it has not heard of is tried again by others.
// Those are told until the store has heard.
func (a *attempt) tell(ctx context.Context, f Failure) (decided Failure, err error) {
	if a.alone() {
		return Failure{}, nil
	}
	if err = thrice(ctx, func(ctx context.Context) (err error) {
		decided, err = a.e.b.store.Fail(ctx, a.lease, f)
		return err
	}); err == nil {
		return decided, nil
	}
	if !a.spent.IsEmpty() && f.Outcome != OutcomeUnknown || f.Kind == Rejection {
		a.e.b.insist(func(ctx context.Context) error {
			_, err := a.e.b.store.Fail(ctx, a.lease, f)
			return err
		}, func(error) {})
	}
	return Failure{}, err
}
