package broker

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"time"
)

// flight obtains one token for everybody who waits for it. It is detached from
// its callers, and there is one per entry at a time.
type flight struct {
	profile *profile
	demand  Demand
	// changed is signalled when the family changed in the store.
	changed chan struct{}

	// done is closed when the flight has ended; what follows is written
	// before that and only read after it.
	done   chan struct{}
	token  *Token
	source Source
	err    *Error
	// repeated tells that the server returned the token we already had.
	repeated bool

	// resets of the entry when the flight began.
	resets int
}

// storeTimeout bounds one transition that must not be cut short by the
// flight's own end.
const storeTimeout = 500 * time.Millisecond

var (
	errLeaseLost = errors.New("the lease ended before the call did")
	errClosing   = errors.New("shutting down")
)

// fly claims the family until there is a token, a verdict, or no time left.
func (f *flight) fly(e *entry, floor Generation) {
	ctx, cancel := context.WithTimeout(e.b.ctx, flightDeadline)
	defer cancel()
	claim := Claim{
		Family:     e.family,
		Owner:      newOwner(),
		Length:     e.b.lease,
		Floor:      floor,
		Credential: f.profile.Credential,
		Demand:     f.demand,
	}
	for lost := 0; ; {
		start := time.Now()
		a, err := e.b.store.Acquire(ctx, claim)
		if ctx.Err() != nil && (err != nil || a.Verdict == Busy) {
			f.err = f.outOfTime(e)
			return
		}
		if err != nil {
			f.err = storeUnavailable(f.profile.Profile, "requesting a token for", err)
			return
		}
		switch a.Verdict {
		case Usable:
			f.token, f.source = e.adopt(*a.Token, start), FromStore
			return
		case Granted:
			lease := Lease{Family: e.family, Owner: claim.Owner, Fence: a.Fence, Length: claim.Length}
			if err := f.mint(ctx, e, lease, start); err == nil {
				return
			}
			// The lease was lost: whoever has it now may have an answer. But a
			// store that grants leases and cannot keep them must not have us
			// ask the endpoint again and again.
			if lost++; lost == 2 && ctx.Err() == nil {
				f.err = f.leaseNotKept(e)
				return
			}
		case Refused:
			e.keep(a.Token, start)
			e.remember(f, *a.Failure)
			f.err = failureError(f.profile.Profile, *a.Failure, a.Failure.Rest)
			return
		case Short:
			e.keep(a.Token, start)
			f.err = lifetimeUnavailable(f.profile.Profile, f.demand, a.Token.Lifetime)
			return
		case TooSoon:
			e.keep(a.Token, start)
			f.err = tooSoon(f.profile.Profile, f.demand, a.Wait)
			return
		case Busy:
			f.wait(ctx, min(pollInterval, a.Wait+rand.N(pollJitter)))
		}
		if ctx.Err() != nil {
			f.err = f.outOfTime(e)
			return
		}
	}
}

// wait returns when the family changed, after d, or when ctx ends.
func (f *flight) wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-f.changed:
	case <-timer.C:
	case <-ctx.Done():
	}
}

// leaseNotKept backs off, here only: the others may fare better.
func (f *flight) leaseNotKept(e *entry) *Error {
	e.mu.Lock()
	attempts := e.failure.Attempts + 1
	e.mu.Unlock()
	failure := Failure{
		Kind: Transient, Attempts: attempts, Rest: Backoff(attempts, 0, between(0.8, 1.2)),
		Text: "the store granted the lease and did not keep it while the token endpoint was asked",
	}
	e.remember(f, failure)
	e.b.log.Warn("token request given up twice: the store does not keep the lease", "profile", f.profile.Name, "next_attempt", restText(failure.Rest))
	err := storeUnavailable(f.profile.Profile, "requesting a token for", errLeaseLost)
	err.RetryAfter = failure.Rest
	return err
}

func (f *flight) outOfTime(e *entry) *Error {
	if e.b.ctx.Err() != nil {
		return shuttingDown(f.profile.Profile)
	}
	return &Error{
		Reason:     ReasonEndpointUnavailable,
		Text:       fmt.Sprintf("requesting a token for profile %s: no replica obtained one within %v; the token endpoint or the store is slow", f.profile.Name, flightDeadline),
		RetryAfter: backoffFirst,
	}
}

// mint makes the one call that the lease allows and brings home what came of
// it. It returns errLeaseLost when the outcome is somebody else's to decide.
// start is when the lease was asked for.
func (f *flight) mint(ctx context.Context, e *entry, lease Lease, start time.Time) (err error) {
	var pass *pass
	defer func() {
		if r := recover(); r != nil {
			e.b.recovered(f.profile, r)
			f.failed(ctx, e, lease, pass, &IssueError{Kind: Unavailable, Text: brokerFailed}, 0)
			err = nil
		}
	}()
	held, release := f.hold(ctx, e, lease, start)
	defer release()

	var failure remembered
	pass, failure, err = f.profile.gate.enter(held, f.profile.Profile)
	if err != nil || failure.Kind != NoFailure {
		f.giveBack(ctx, e, lease)
		if failure.Kind != NoFailure {
			f.err = failureError(f.profile.Profile, failure.Failure, failure.rest(time.Now()))
			return nil
		}
		return err
	}
	sent := time.Now()
	grant, err := f.profile.Issuer.Issue(held, Request{Scopes: e.scopes})
	took := time.Since(sent)
	if err == nil {
		err = f.malformed(grant, took)
	}
	if err == nil {
		pass.succeed()
		f.obtained(ctx, e, lease, grant, sent, took)
		return nil
	}
	var issueErr *IssueError
	if !errors.As(err, &issueErr) {
		issueErr = &IssueError{Kind: Unavailable, Text: "the request could not be made", Err: err}
	}
	if held.Err() != nil { // we stopped it ourselves: that says nothing about the endpoint
		pass.leave()
		f.giveBack(ctx, e, lease)
		e.b.log.Info("token request given up", "profile", f.profile.Name, "cause", context.Cause(held).Error())
		return errLeaseLost
	}
	f.failed(ctx, e, lease, pass, issueErr, took)
	return nil
}

// malformed refuses an answer that would have us ask again at once, for ever.
func (f *flight) malformed(g *Grant, took time.Duration) error {
	switch life := f.profile.lifetime(g.Lifetime); {
	case life < leastLifetime:
		return &IssueError{Kind: Malformed, Text: fmt.Sprintf("token endpoint %s answered with a token that lives only %v", f.profile.Endpoint, life)}
	case life-took <= Margin(life):
		return &IssueError{Kind: Malformed, Text: fmt.Sprintf("token endpoint %s took %v to answer with a token that lives %v", f.profile.Endpoint, took.Round(100*time.Millisecond), life)}
	}
	return nil
}

// obtained saves a grant and only then takes it into memory.
func (f *flight) obtained(ctx context.Context, e *entry, lease Lease, g *Grant, sent time.Time, took time.Duration) {
	life := f.profile.lifetime(g.Lifetime)
	scopes := g.Scopes
	if scopes == nil {
		scopes = e.scopes
	}
	token := StoredToken{Access: g.AccessToken, Type: g.TokenType, Scopes: scopes, Lifetime: life}
	id := g.AccessToken.ID()
	log := e.b.log.With("profile", f.profile.Name, "token_id", id)
	log.Info("token obtained", "lifetime", life, "took", took)
	if missing := without(e.scopes, scopes); len(missing) > 0 {
		log.Warn("token has fewer scopes than asked for", "missing", missing)
	}
	e.b.observe(Attempt{Profile: f.profile.Name, Outcome: "success", Duration: took})

	before := e.token.Load()
	f.repeated = before != nil && before.ID == id
	start := time.Now()
	token.Remaining = life - start.Sub(sent)
	saved, verdict, err := save(ctx, e.b.store, lease, Result{Token: token})
	f.source = FromEndpoint
	switch {
	case err != nil:
		// The token is good and the next replica will obtain its own: serve
		// it here under the generation that the lease reserved.
		log.Warn("token obtained but not saved", "error", err)
		token.Generation = lease.Fence
		e.forgive()
		f.token = e.adopt(token, start)
	case verdict == Saved:
		e.forgive()
		f.token = e.adopt(saved, start)
	default:
		// A later lease was granted; its outcome counts. Those who wait for
		// this one are served, the next caller looks again.
		token.Generation = lease.Fence
		f.token = newToken(token, start, f.profile.maxTokenAge())
	}
}

// save repeats the transition until it is answered: what was obtained must not
// be lost to one cut connection.
func save(ctx context.Context, store Store, lease Lease, result Result) (saved StoredToken, verdict SaveVerdict, err error) {
	for range 3 {
		err = detached(ctx, func(ctx context.Context) (err error) {
			saved, verdict, err = store.Save(ctx, lease, result)
			return err
		})
		if err == nil {
			break
		}
	}
	return saved, verdict, err
}

// failed remembers an attempt's failure for everybody.
func (f *flight) failed(ctx context.Context, e *entry, lease Lease, pass *pass, issueErr *IssueError, took time.Duration) {
	failure := failureOf(f.profile.Profile, issueErr)
	decided := failure
	err := detached(ctx, func(ctx context.Context) (err error) {
		decided, err = e.b.store.Fail(ctx, lease, failure)
		return err
	})
	if err != nil { // obeyed here all the same
		decided = failure
		decided.Attempts = 1
		if failure.BacksOff() {
			decided.Rest = Backoff(1, failure.Rest, failure.Jitter)
		}
	}
	if pass != nil {
		pass.fail(issueErr.Kind, decided)
	}
	if decided.Kind == NoFailure { // a reset overtook it: callers hear of it, nobody remembers
		f.err = failureError(f.profile.Profile, failure, 0)
	} else {
		e.remember(f, decided)
		f.err = failureError(f.profile.Profile, decided, decided.Rest)
	}
	attrs := []any{
		"profile", f.profile.Name, "outcome", issueErr.Kind.String(), "oauth_error", issueErr.Code,
		"error", issueErr.Text, "took", took, "attempts", decided.Attempts, "next_attempt", restText(decided.Rest),
	}
	if issueErr.Trace != "" {
		attrs = append(attrs, "server_trace", issueErr.Trace)
	}
	e.b.log.Warn("token request failed", attrs...)
	if issueErr.Err != nil {
		e.b.log.Debug("cause of the failed token request", "profile", f.profile.Name, "cause", issueErr.Err.Error())
	}
	e.b.observe(Attempt{Profile: f.profile.Name, Outcome: issueErr.Kind.String(), Duration: took})
}

// giveBack ends the lease without a verdict.
func (f *flight) giveBack(ctx context.Context, e *entry, lease Lease) {
	err := detached(ctx, func(ctx context.Context) error {
		_, err := e.b.store.Fail(ctx, lease, Failure{Kind: NoFailure})
		return err
	})
	if err != nil {
		e.b.log.Info("lease not given back; it ends by itself", "profile", f.profile.Name, "after", lease.Length)
	}
}

// detached runs a transition that must happen although ctx may have ended.
func detached(ctx context.Context, transition func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeout)
	defer cancel()
	return transition(ctx)
}

const brokerFailed = "the broker itself failed; its log has the place"

// recovered logs a panic without its value: nobody knows what is in it.
func (b *Broker) recovered(p *profile, value any) {
	b.log.Error("panic while requesting a token", "profile", p.Name, "type", fmt.Sprintf("%T", value), "stack", string(debug.Stack()))
}

// hold keeps the lease alive until release is called, and returns a context
// that ends before the lease can: each renewal counts from before it was sent.
func (f *flight) hold(ctx context.Context, e *entry, lease Lease, start time.Time) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	reliable := lease.Length - leaseMargin(lease.Length)
	watchdog := time.AfterFunc(time.Until(start.Add(reliable)), func() { cancel(errLeaseLost) })
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if r := recover(); r != nil { // without renewals the lease cannot be relied on
				e.b.recovered(f.profile, r)
				cancel(errLeaseLost)
			}
		}()
		tick := time.NewTicker(lease.Length / 3)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			start := time.Now()
			call, cancelCall := context.WithTimeout(ctx, storeTimeout)
			ok, err := e.b.store.Renew(call, lease)
			cancelCall()
			switch {
			case err != nil: // the next tick tries again; the watchdog is the judge
			case !ok:
				cancel(errLeaseLost)
			case watchdog.Stop():
				watchdog.Reset(time.Until(start.Add(reliable)))
			}
		}
	}()
	return ctx, func() {
		watchdog.Stop()
		cancel(nil)
		<-done
	}
}
