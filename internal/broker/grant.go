package broker

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// What a token request brought is saved before anything else is done with it: a
// refresh token that came is good whatever is to be said of the rest. Whose the
// access token is, is asked before only where no refresh token can be lost by it, and
// for jobs, which must not have another's for a moment.

// obtained brings home a grant.
func (a *attempt) obtained(ctx context.Context, g *Grant) error {
	a.unusable = a.malformed(g)
	result := a.result(g)
	if a.unusable != nil && !result.onlyOurs() {
		a.failed(ctx, a.unusable)
		return nil
	}
	askFirst := a.e.isJob() || !result.onlyOurs()
	if a.unusable == nil {
		another, err := a.isAnothersHere(result.Token), error(nil)
		if !another && askFirst {
			another, err = a.isAnothers(ctx, result.Token)
		}
		if another || err != nil && a.e.isJob() {
			return a.repeated(ctx, g, result, err)
		}
	}
	if a.alone() {
		a.pass.succeed(ctx)
		a.account(result.Token)
		a.f.token, a.f.source = a.e.adoptOwn(result.Token, a.sent), Uncoordinated
		return nil
	}
	before := a.e.token.Load()
	kept, err := a.save(ctx, result)
	if a.unusable == nil && !askFirst {
		a.ownLate(result.Token)
	}
	a.pass.succeed(ctx)
	a.account(result.Token)
	if before != nil && before.ID == result.Token.Access.ID() {
		a.f.quiet = max(before.remaining(time.Now())/2, noProgress)
	}
	return a.settled(ctx, g, result, kept, err)
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

// result is what a grant holds, as of when the request was sent.
func (a *attempt) result(g *Grant) Result {
	life, scopes := a.f.profile.lifetime(g.Lifetime), g.Scopes
	if scopes == nil {
		scopes = a.e.scopes
	}
	r := Result{
		Slot:  a.e.slot,
		Token: StoredToken{Access: g.AccessToken, Type: g.TokenType, Scopes: scopes, Lifetime: life, Remaining: life},
		Spent: a.spentID(), Refresh: g.RefreshToken, Account: g.Account, Rotates: a.rotates(g),
	}
	if a.spent.IsEmpty() {
		r.Remaining = a.f.profile.ConsentLifetime
	} else if a.consent.Account != (Account{}) {
		r.Account = a.consent.Account
	}
	if a.f.profile.consentUse() == NoConsent { // nobody asked for a refresh token, and nobody would use it
		r.Refresh = Secret{}
	}
	return r
}

// onlyOurs reports whether the result holds what nobody could obtain again.
func (r Result) onlyOurs() bool { return !r.Refresh.IsEmpty() || r.Spent != "" }

// account tells operators of the token.
func (a *attempt) account(t StoredToken) {
	log := a.e.b.log.With("profile", a.f.profile.Name, "token_id", t.Access.ID())
	log.Info("token obtained", "lifetime", t.Lifetime, "took", a.took)
	if a.alone() {
		log.Warn("token obtained without the store, which is out of reach")
	}
	if missing := without(a.e.scopes, t.Scopes); len(missing) > 0 {
		log.Warn("token has fewer scopes than asked for", "missing", missing)
	}
	a.e.b.observe(Attempt{Profile: a.f.profile.Name, Outcome: "success", Duration: a.took})
}

// kept is what the store made of a result.
type kept struct {
	token   StoredToken
	verdict SaveVerdict
	// start is when the call that was answered was begun.
	start time.Time
}

// save repeats the transition until it is answered: what was obtained must not
// be lost to one cut connection.
func (a *attempt) save(ctx context.Context, r Result) (k kept, err error) {
	for range 3 {
		if k, err = a.saveOnce(ctx, r); err == nil {
			break
		}
	}
	return k, err
}

func (a *attempt) saveOnce(ctx context.Context, r Result) (k kept, err error) {
	defer func() {
		if value := recover(); value != nil { // what came must not be lost to it
			a.e.b.recovered(a.f.profile.Name, value)
			err = errors.New(brokerFailed)
		}
		a.e.b.reach.observe(err)
	}()
	k.start = time.Now()
	r.Token.Remaining = r.Token.Lifetime - k.start.Sub(a.sent)
	if a.unusable != nil {
		r.Token.Remaining = 0
	}
	if r.Remaining > 0 {
		r.Remaining = max(r.Remaining-k.start.Sub(a.sent), time.Millisecond)
	}
	err = detached(ctx, func(ctx context.Context) (err error) {
		k.token, k.verdict, err = a.e.b.store.Save(ctx, a.lease, r)
		return err
	})
	return k, err
}

// settled decides what callers get of a result that was saved, or not.
func (a *attempt) settled(ctx context.Context, g *Grant, r Result, k kept, err error) error {
	f, e := a.f, a.e
	f.source = FromEndpoint
	log := e.b.log.With("profile", f.profile.Name, "token_id", r.Token.Access.ID())
	job := e.isJob() && a.unusable == nil
	switch {
	case err != nil && job:
		// Another replica may obtain one: what is handed out must be what all know.
		// Nor is it handed over for later, when that one may be in use.
		log.Warn("dedicated token obtained but not saved", "error", err)
		if r.onlyOurs() {
			a.saveLater(g, r)
		}
		f.err = storeUnavailable(f.profile.Profile, "requesting a token for", err)
	case err != nil:
		// The token is good: it is served here under the generation that the
		// lease reserved. What comes next depends on whether the grant repeats.
		log.Warn("token obtained but not saved", "error", err)
		if a.unusable == nil {
			f.token = e.adoptUnsaved(r.Token, a.lease.Fence, a.sent)
		}
		if r.onlyOurs() {
			a.saveLater(g, r)
		} else if f.token != nil {
			e.b.store.Restore(e.family, e.slot, f.token.stored(time.Now()))
		}
	case k.verdict == Saved && a.unusable == nil:
		e.forgive()
		f.token = e.adopt(k.token, k.start)
	case k.verdict == Saved:
	case k.verdict == WasDropped:
		log.Warn("token obtained, but a revocation has overtaken it")
		a.giveBack(ctx)
		a.discard(ctx, g)
		if e.isJob() && e.hasEnded(ctx) {
			f.ended(e)
			return nil
		}
		e.remember(f, e.backOff(Failure{Kind: Transient, Jitter: between(0.8, 1.2), Text: "what the endpoint returned was revoked"}))
		f.err = revokedMeanwhile(f.profile.Profile)
	case k.verdict == Superseded:
		// Another consent was given, or a later refresh was saved: what this
		// one brought may be another person's.
		a.giveBack(ctx)
		if job && e.hasEnded(ctx) { // or the record may have it: see saveLater
			a.discard(ctx, &Grant{AccessToken: g.AccessToken})
		}
		return errAgain
	case job: // what the later lease brings is the job's token
		return errAgain
	default:
		// A later lease was granted, whose outcome counts. Those who wait for
		// this one are served, the next caller looks again.
		r.Token.Generation = a.lease.Fence
		if f.token = newToken(r.Token, a.sent, f.profile.maxTokenAge()); e.isDropped(f.token.ID) {
			f.token = nil
		}
	}
	if a.unusable != nil && f.err == nil { // saved for its refresh token; nobody gets the rest
		failure := e.backOff(failureOf(f.profile.Profile, a.unusable))
		e.remember(f, failure)
		f.err = failureError(f.profile.Profile, failure, failure.Rest)
	}
	return nil
}

// saveLater goes on saving, for as long as the process lives, while callers are
// served from memory.
func (a *attempt) saveLater(g *Grant, r Result) {
	b, release := a.e.b, a.e.b.unsaved.hold(a.e.family)
	log := b.log.With("profile", a.f.profile.Name)
	log.Error("grant not saved yet: only this process has it; it goes on trying")
	var k kept
	b.insist(func(ctx context.Context) (err error) {
		k, err = a.saveOnce(ctx, r)
		return err
	}, func(err error) {
		defer release()
		switch {
		case err != nil:
			log.Error("grant lost: the store did not take it in before this process had to stop; a person may have to sign in again", "error", err)
		case k.verdict == Saved:
			log.Info("grant saved at last")
			if a.unusable == nil {
				a.e.adopt(k.token, k.start)
			}
		default:
			log.Warn("grant not saved: another one has taken its place, or it was revoked")
			// A job's was not handed out here; the record may have it all the same,
			// when the save had happened and a later refresh came in between.
			if !a.e.isJob() || k.verdict == WasDropped {
				a.e.dropNow(r.Token.Access.ID())
				a.e.announce()
			}
			if k.verdict == WasDropped {
				a.discard(context.Background(), g)
			}
		}
	})
}

// keepTrying is for how long a process that was asked to stop goes on telling
// the store what only it knows.
const keepTrying = 10 * time.Second

// insist repeats a transition in the background until the store has answered,
// or this process had to stop; then it calls ended. It is called within a
// flight, so that nobody waits for an end of all flights now.
func (b *Broker) insist(try func(context.Context) error, ended func(error)) {
	b.flights.Add(1)
	go func() {
		defer b.flights.Done()
		limit, cancel := context.WithCancel(context.Background())
		defer cancel()
		defer context.AfterFunc(b.ctx, func() { time.AfterFunc(keepTrying, cancel) })()
		for wait := storeRetry; ; wait = min(2*wait, time.Second) {
			err := detached(limit, try)
			if err == nil || limit.Err() != nil {
				ended(err)
				return
			}
			waitFor(limit, nil, wait)
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
	for kind, t := range map[TokenKind]Secret{RefreshToken: g.RefreshToken, AccessToken: g.AccessToken} {
		if t.IsEmpty() {
			continue
		}
		if err := revoker.Revoke(ctx, t, kind); err != nil {
			a.e.b.log.Warn("token that nobody may use not revoked", "profile", a.f.profile.Name, "token_id", t.ID(), "error", err)
		}
	}
}
