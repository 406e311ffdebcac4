package broker

import (
	"context"
	"errors"
	"fmt"
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
}

func (a *attempt) alone() bool { return a.lease.Owner == "" }

// mint makes the one call that the lease allows and brings home what came of
// it. It returns errLeaseLost when the outcome is somebody else's to decide, and
// errAgain when the store knows more by now. start is when the lease was asked
// for.
func (f *flight) mint(ctx context.Context, e *entry, lease Lease, granted Acquisition, start time.Time) error {
	a := &attempt{f: f, e: e, lease: lease, consent: granted.Consent}
	return a.guarded(ctx, func() error {
		held, release := e.b.hold(ctx, f.profile, lease, start)
		defer release()
		if a.consent != nil {
			e.keep(granted.Token, start)
			if stop := a.weigh(ctx); stop {
				return nil
			}
		}
		return a.enter(held, func(held context.Context) error {
			if a.consent != nil {
				return a.refresh(held, start)
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
	_ = a.guarded(ctx, func() error { return a.enter(ctx, a.request) })
	if f.token == nil && f.err == nil {
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
			a.e.b.recovered(a.f.profile, r)
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
	grant, issueErr := a.issue(ctx, Request{Scopes: a.e.scopes})
	switch {
	case issueErr == nil:
		a.obtained(ctx, grant)
	case ctx.Err() != nil: // we stopped it ourselves: that says nothing about the endpoint
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
	var issueErr *IssueError
	if !errors.As(err, &issueErr) {
		issueErr = &IssueError{Kind: Unavailable, Text: "the request could not be made", Err: err}
	}
	return nil, issueErr
}

// malformed refuses an answer that would have us ask again at once, for ever.
func (a *attempt) malformed(g *Grant) *IssueError {
	p := a.f.profile
	switch life := p.lifetime(g.Lifetime); {
	case life < leastLifetime:
		return &IssueError{Kind: Malformed, Outcome: Answered, Text: fmt.Sprintf("token endpoint %s answered with a token that lives only %v", p.Endpoint, life)}
	case life-a.took <= Margin(life):
		return &IssueError{Kind: Malformed, Outcome: Answered, Text: fmt.Sprintf("token endpoint %s took %v to answer with a token that lives %v", p.Endpoint, a.took.Round(100*time.Millisecond), life)}
	}
	return nil
}

// obtained saves a grant and only then judges it and takes it into memory: a
// refresh token that came with it is good whatever is to be said of the rest.
func (a *attempt) obtained(ctx context.Context, g *Grant) {
	f, e := a.f, a.e
	unusable := a.malformed(g)
	if unusable != nil && g.RefreshToken.IsEmpty() && a.spent.IsEmpty() {
		a.failed(ctx, unusable)
		return
	}
	a.pass.succeed(ctx)
	result := Result{Slot: e.slot, Token: a.token(g), Spent: a.spentID(), Refresh: g.RefreshToken, Rotates: a.rotates(g)}
	id := result.Token.Access.ID()
	log := e.b.log.With("profile", f.profile.Name, "token_id", id)
	log.Info("token obtained", "lifetime", result.Token.Lifetime, "took", a.took)
	if missing := without(e.scopes, result.Token.Scopes); len(missing) > 0 {
		log.Warn("token has fewer scopes than asked for", "missing", missing)
	}
	e.b.observe(Attempt{Profile: f.profile.Name, Outcome: "success", Duration: a.took})

	f.source = FromEndpoint
	if a.alone() {
		f.source = Uncoordinated
		log.Warn("token obtained without the store, which is out of reach", "lifetime", result.Token.Lifetime)
		f.token = e.adoptOwn(result.Token, a.sent)
		return
	}
	before := e.token.Load()
	if before != nil && before.ID == id {
		f.quiet = max(before.remaining(time.Now())/2, noProgress)
	}
	saved, verdict, start, err := a.save(ctx, result)
	switch {
	case err != nil:
		// The token is good: serve it here under the generation that the lease
		// reserved. What comes next depends on whether the grant repeats.
		log.Warn("token obtained but not saved", "error", err)
		f.token = e.adoptUnsaved(result.Token, a.lease.Fence, a.sent)
		if result.onlyOurs() {
			a.saveLater(result)
		} else if f.token != nil {
			e.b.store.Restore(e.family, e.slot, f.token.stored(time.Now()))
		}
	case verdict == Saved:
		e.forgive()
		f.token = e.adopt(saved, start)
	case verdict == WasDropped:
		log.Warn("token obtained, but the grant was revoked meanwhile")
		a.discard(ctx, g)
		f.err = revokedMeanwhile(f.profile.Profile)
	default:
		// A later lease was granted, or another consent was given; its outcome
		// counts. Those who wait for this one are served, the next caller looks
		// again.
		result.Token.Generation = a.lease.Fence
		if f.token = newToken(result.Token, a.sent, f.profile.maxTokenAge()); e.isDropped(id) {
			f.token, f.err = nil, revokedMeanwhile(f.profile.Profile)
		}
	}
	if unusable != nil { // saved for its refresh token; nobody gets the rest
		failure := e.backOff(failureOf(f.profile.Profile, unusable))
		e.remember(f, failure)
		f.token, f.err = nil, failureError(f.profile.Profile, failure, failure.Rest)
	}
}

// token is what a grant holds for callers, as of when the request was sent.
func (a *attempt) token(g *Grant) StoredToken {
	life, scopes := a.f.profile.lifetime(g.Lifetime), g.Scopes
	if scopes == nil {
		scopes = a.e.scopes
	}
	return StoredToken{Access: g.AccessToken, Type: g.TokenType, Scopes: scopes, Lifetime: life, Remaining: life}
}

// save repeats the transition until it is answered: what was obtained must not
// be lost to one cut connection. start is when the call that was answered was
// begun.
func (a *attempt) save(ctx context.Context, r Result) (saved StoredToken, verdict SaveVerdict, start time.Time, err error) {
	for range 3 {
		start = time.Now()
		r.Token.Remaining = r.Token.Lifetime - start.Sub(a.sent)
		err = detached(ctx, func(ctx context.Context) (err error) {
			saved, verdict, err = a.e.b.store.Save(ctx, a.lease, r)
			return err
		})
		a.e.b.reach.observe(err)
		if err == nil {
			break
		}
	}
	return saved, verdict, start, err
}

// onlyOurs reports whether the result holds what nobody could obtain again.
func (r Result) onlyOurs() bool { return !r.Refresh.IsEmpty() || r.Spent != "" }

// keepTrying is for how long a process that was asked to stop goes on trying to
// save what only it has.
const keepTrying = 20 * time.Second

// saveLater goes on saving, for as long as the process lives, while callers are
// served from memory.
func (a *attempt) saveLater(r Result) {
	b, release := a.e.b, a.e.b.unsaved.hold(a.e.family)
	log := b.log.With("profile", a.f.profile.Name)
	b.flights.Add(1) // within a flight, so that nobody waits for zero now
	go func() {
		defer b.flights.Done()
		defer release()
		limit, cancel := context.WithCancel(context.Background())
		defer cancel()
		defer context.AfterFunc(b.ctx, func() { time.AfterFunc(keepTrying, cancel) })()
		for wait := storeRetry; ; wait = min(2*wait, time.Second) {
			saved, verdict, start, err := a.save(limit, r)
			if err == nil {
				log.Info("grant saved at last", "verdict", verdict)
				if verdict == Saved {
					a.e.adopt(saved, start)
				}
				return
			}
			waitFor(limit, nil, wait)
			if limit.Err() != nil {
				log.Error("grant lost: the store did not take it in before this process had to stop; a person may have to sign in again", "error", err)
				return
			}
			if wait < time.Second && 2*wait >= time.Second {
				log.Error("grant not saved yet: only this process has it; it goes on trying", "error", err)
			}
		}
	}()
}

// discard revokes what must not be kept, as far as the server can.
func (a *attempt) discard(ctx context.Context, g *Grant) {
	revoker, ok := a.f.profile.Issuer.(Revoker)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.f.profile.timeout())
	defer cancel()
	for _, t := range []struct {
		value Secret
		kind  TokenKind
	}{{g.RefreshToken, RefreshToken}, {g.AccessToken, AccessToken}} {
		if t.value.IsEmpty() {
			continue
		}
		if err := revoker.Revoke(ctx, t.value, t.kind); err != nil {
			a.e.b.log.Warn("token that nobody may use not revoked", "profile", a.f.profile.Name, "token_id", t.value.ID(), "error", err)
		}
	}
}

// failed remembers an attempt's failure for everybody.
func (a *attempt) failed(ctx context.Context, issueErr *IssueError) {
	f, e := a.f, a.e
	failure := failureOf(f.profile.Profile, issueErr)
	if issueErr.Kind == GrantDead && !a.spent.IsEmpty() {
		failure.Kind, failure.Credential = Dead, a.spentID()
	}
	failure.Outcome = issueErr.Outcome
	decided := failure
	err := errNoRecord
	if !a.alone() {
		err = detached(ctx, func(ctx context.Context) (err error) {
			decided, err = e.b.store.Fail(ctx, a.lease, failure)
			return err
		})
	}
	if err != nil { // obeyed here all the same
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
	attrs := []any{
		"profile", f.profile.Name, "outcome", issueErr.Kind.String(), "oauth_error", issueErr.Code,
		"error", issueErr.Text, "took", a.took, "attempts", decided.Attempts, "next_attempt", restText(decided.Rest),
	}
	if issueErr.Trace != "" {
		attrs = append(attrs, "server_trace", issueErr.Trace)
	}
	e.b.log.Warn("token request failed", attrs...)
	if issueErr.Err != nil {
		e.b.log.Debug("cause of the failed token request", "profile", f.profile.Name, "cause", issueErr.Err.Error())
	}
	e.b.observe(Attempt{Profile: f.profile.Name, Outcome: issueErr.Kind.String(), Duration: a.took})
}

// giveBack ends the lease without a verdict, and takes a presentation that was
// committed to and not sent back.
func (a *attempt) giveBack(ctx context.Context) {
	if a.alone() {
		return
	}
	err := detached(ctx, func(ctx context.Context) error {
		_, err := a.e.b.store.Fail(ctx, a.lease, Failure{Kind: NoFailure, Outcome: Unsent})
		return err
	})
	if err != nil {
		a.e.b.log.Info("lease not given back; it ends by itself", "profile", a.f.profile.Name, "after", a.lease.Length)
	}
}
