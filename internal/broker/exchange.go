package broker

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// CompleteAuthorization ends a sign-in that any replica has started: it
// exchanges the code, once, and makes the grant the profile's. The error is an
// *Error or ctx's; the end of ctx cancels nothing once the code was sent.
func (b *Broker) CompleteAuthorization(ctx context.Context, c Callback) (*Completion, error) {
	return b.aside(ctx, func(ctx context.Context) (*Completion, error) {
		s, p, err := b.arrive(ctx, c)
		if err != nil {
			return nil, err
		}
		done, err := b.complete(ctx, p, s, c)
		return done, withProfile(err, p)
	})
}

// ConfirmAuthorization makes the grant that a ticket stands for the profile's. If
// a third account has come meanwhile, there is another ticket. Allowed is as in
// Callback.
func (b *Broker) ConfirmAuthorization(ctx context.Context, ticket string, allowed func(profile string) bool) (*Completion, error) {
	return b.aside(ctx, func(ctx context.Context) (*Completion, error) {
		a, h, err := b.takeUp(ctx, ticket, allowed)
		if err != nil {
			return nil, err
		}
		now, err := a.look(ctx)
		agreed := err != nil || now.Consent.isOf(h.Previous) // without the store, what was asked stands
		done, err := a.conclude(ctx, h.grant(), now.Consent, agreed)
		if err == nil && done.Ticket == "" {
			done.Previous = h.Previous
		}
		return done, withProfile(err, a.f.profile)
	})
}

// AbandonAuthorization gives the grant up that a ticket stands for, and has the
// server revoke it where it can.
func (b *Broker) AbandonAuthorization(ctx context.Context, ticket string, allowed func(profile string) bool) (*Completion, error) {
	return b.aside(ctx, func(ctx context.Context) (*Completion, error) {
		a, h, err := b.takeUp(ctx, ticket, allowed)
		if err != nil {
			return nil, err
		}
		a.discard(ctx, h.grant())
		b.log.Info("sign-in of another account abandoned", "profile", h.Profile)
		return &Completion{Profile: h.Profile, Account: h.Account, Previous: h.Previous}, nil
	})
}

// aside runs what does not end with its caller, and returns what came of it, or
// ctx's error if that ends first.
func (b *Broker) aside(ctx context.Context, run func(context.Context) (*Completion, error)) (*Completion, error) {
	if !b.takeOff() {
		return nil, &Error{
			Reason: ReasonEndpointUnavailable, RetryAfter: 100 * time.Millisecond, Err: errClosing,
			Text: "completing a sign-in: this replica is shutting down; ask another one",
		}
	}
	var done *Completion
	var err error
	ended := make(chan struct{})
	go func() {
		defer b.flights.Done()
		defer close(ended)
		defer func() {
			if r := recover(); r != nil {
				b.recovered("", r)
				done, err = nil, &Error{Reason: ReasonEndpointUnavailable, Text: "completing a sign-in: " + brokerFailed + "; start again"}
			}
		}()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flightDeadline)
		defer cancel()
		done, err = run(ctx)
	}()
	select {
	case <-ended:
		return done, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func withProfile(err error, p *profile) error {
	var e *Error
	if errors.As(err, &e) {
		e.Profile = p.Name
	}
	return err
}

// complete exchanges the code. Whose grant the profile has is asked before, while
// an answer of the store may still be waited for, and once more when the server
// has answered: somebody else may have signed in meanwhile.
func (b *Broker) complete(ctx context.Context, p *profile, s started, c Callback) (*Completion, error) {
	authorizer := p.Issuer.(Authorizer)
	if err := authorizer.CheckIssuer(ctx, c.Issuer); err != nil {
		return nil, b.wrongIssuer(p, asIssueError(err))
	}
	a := b.signIn(p)
	has, err := a.look(ctx)
	if b.reach.observe(err); err != nil {
		return nil, startAgain(storeUnavailable(p.Profile, "signing in for", err))
	}
	g, err := a.exchange(ctx, CodeExchange{Code: c.Code, Verifier: NewSecret(s.Verifier)})
	if err != nil {
		return nil, err
	}
	if now, err := a.look(ctx); err == nil {
		has = now
	}
	return a.conclude(ctx, g, has.Consent, c.ReplaceAccount)
}

// look is what the store has of the profile.
func (a *attempt) look(ctx context.Context) (r Record, err error) {
	err = thrice(ctx, func(ctx context.Context) (err error) {
		r, err = a.e.b.store.Look(ctx, a.e.family, a.e.slot)
		return err
	})
	return r, err
}

// conclude makes the grant the profile's. If that works with a grant of another
// account, which nobody has agreed to replace, it is set aside instead.
func (a *attempt) conclude(ctx context.Context, g *Grant, old *Consent, agreed bool) (done *Completion, err error) {
	done = &Completion{Profile: a.f.profile.Name, Account: g.Account}
	if !agreed && old.lives() && old.Account.Subject != "" && !old.isOf(g.Account) {
		done.Previous = old.Account
		done.Ticket, err = a.setAside(ctx, g, old.Account)
	} else {
		err = a.install(ctx, g)
	}
	if err != nil {
		return nil, err
	}
	return done, nil
}

// wrongIssuer ends a sign-in that was answered by another server than the one
// that the browser was sent to: its code is that server's business.
func (b *Broker) wrongIssuer(p *profile, err *IssueError) *Error {
	if err.Kind != Malformed && !err.Kind.refuses() { // its own metadata cannot be had
		return startAgain(signInFailed(p.Profile, failureOf(p.Profile, err), err.RetryAfter))
	}
	b.log.Warn("sign-in not completed: another issuer has answered", "profile", p.Name, "error", err.Text)
	return &Error{
		Reason: ReasonInvalidRequest, Field: "iss",
		Text: fmt.Sprintf("signing in for profile %s: %s", p.Name, err.Text),
	}
}

// signIn is the attempt that a person's sign-in is: under no lease, because its
// grant wins over what is under way.
func (b *Broker) signIn(p *profile) *attempt {
	return &attempt{
		f: &flight{profile: p}, e: p.own,
		lease: Lease{Family: p.own.family, Owner: newOwner(), Length: b.lease},
	}
}

// exchange makes the one request, when the client may make one.
func (a *attempt) exchange(ctx context.Context, x CodeExchange) (*Grant, error) {
	a.f.awaitSecrets(ctx, a.e)
	p, b := a.f.profile, a.e.b
	pass, failure, err := p.gate.enter(ctx, b, p, true)
	switch {
	case pass != nil:
	case failure.Kind != NoFailure:
		return nil, startAgain(signInFailed(p.Profile, failure.Failure, failure.rest(time.Now())))
	case errors.Is(err, errNoRecord):
		return nil, startAgain(storeUnavailable(p.Profile, "signing in for", err))
	default:
		return nil, startAgain(a.f.outOfTime(a.e))
	}
	defer pass.leave()
	a.sent = time.Now()
	g, err := p.Issuer.(Authorizer).Exchange(context.WithoutCancel(pass.ctx), x)
	a.took = time.Since(a.sent)
	if err != nil {
		return nil, a.refused(ctx, pass, asIssueError(err))
	}
	pass.succeed(ctx)
	return g, nil
}

// refused tells of an exchange that failed. What it says of the client is
// remembered; the code is spent.
func (a *attempt) refused(ctx context.Context, pass *pass, err *IssueError) *Error {
	p := a.f.profile
	failure := a.e.backOff(failureOf(p.Profile, err))
	pass.fail(ctx, err.Kind, failure)
	a.report("sign-in", err)
	switch {
	case err.Kind == GrantDead:
		e := authorizationNeeded(p.Profile, "")
		e.Code = err.Code
		e.Text = fmt.Sprintf("signing in for profile %s: the authorization server refuses the code: %s", p.Name, err.Text)
		return startAgain(e)
	case failure.Kind == Transient: // the next one may be made at once
		failure.Rest = 0
	}
	return startAgain(signInFailed(p.Profile, failure, failure.Rest))
}

// install makes the grant the profile's. It is in the store before anybody hears
// of it.
func (a *attempt) install(ctx context.Context, g *Grant) error {
	p, e := a.f.profile, a.e
	if a.unusable = a.malformed(g); a.unusable != nil && g.RefreshToken.IsEmpty() {
		return startAgain(signInFailed(p.Profile, failureOf(p.Profile, a.unusable), 0))
	}
	r := a.result(g)
	r.Supersede = true
	k, err := a.save(ctx, r)
	switch {
	case err != nil:
		a.saveLater(g, r)
		return &Error{
			Reason: ReasonStoreUnavailable, Err: err,
			Text: fmt.Sprintf("signing in for profile %s: the store is out of reach; nothing is lost yet: this replica has the grant and goes on trying to save it, so look at the profile again before anybody signs in once more", p.Name),
		}
	case k.verdict == WasDropped:
		a.discard(ctx, g)
		return startAgain(revokedMeanwhile(p.Profile))
	case k.verdict == Saved && a.unusable == nil:
		e.adopt(k.token, k.start)
	}
	a.welcome(r)
	return nil
}

// welcome tells operators of the consent.
func (a *attempt) welcome(r Result) {
	p, e := a.f.profile, a.e
	log := e.b.log.With("profile", p.Name)
	if r.Refresh.IsEmpty() {
		e.b.consents.note(e.family, nil, a.sent)
		log.Warn("signed in, but no refresh token came: a person must sign in again when the access token ends; add the scope offline_access to the profile, and allow the client offline access")
		return
	}
	consent := &Consent{Account: r.Account, Remaining: Forever}
	if r.Remaining > 0 {
		consent.Remaining = r.Remaining
	}
	e.b.consents.note(e.family, consent, a.sent)
	log.Info("signed in", "token_id", r.Token.Access.ID(), "consent_lifetime", r.Remaining)
}

// held is a grant of another account than the profile's, until somebody has
// decided.
type held struct {
	subject
	Access   string        `json:"access"`
	Type     string        `json:"type"`
	Scopes   []string      `json:"scopes"`
	Lifetime time.Duration `json:"lifetime"`
	Refresh  string        `json:"refresh,omitempty"`
	Account  Account       `json:"account"`
	Previous Account       `json:"previous"`
	// Age since the grant was asked for, when it was set aside.
	Age time.Duration `json:"age"`
}

func (h held) grant() *Grant {
	return &Grant{
		AccessToken: NewSecret(h.Access), TokenType: h.Type, Scopes: h.Scopes, Lifetime: h.Lifetime,
		RefreshToken: NewSecret(h.Refresh), Account: h.Account,
	}
}

func heldID(ticket string) string { return Identity("grant", ticket) }

// setAside keeps the grant until somebody has decided, and returns its ticket. One
// that cannot be kept is given up: the profile's own works.
func (a *attempt) setAside(ctx context.Context, g *Grant, previous Account) (ticket string, err error) {
	p := a.f.profile
	ticket = random()
	err = a.e.b.keep(ctx, heldID(ticket), held{
		subject: p.subject(), Access: g.AccessToken.Reveal(), Type: g.TokenType, Scopes: g.Scopes, Lifetime: g.Lifetime,
		Refresh: g.RefreshToken.Reveal(), Account: g.Account, Previous: previous, Age: time.Since(a.sent),
	})
	if err != nil {
		a.discard(ctx, g)
		return "", startAgain(storeUnavailable(p.Profile, "signing in for", err))
	}
	a.e.b.log.Info("signed in with another account; the grant in use stays until that is confirmed", "profile", p.Name)
	return ticket, nil
}

// takeUp redeems the ticket of a grant that was set aside.
func (b *Broker) takeUp(ctx context.Context, ticket string, allowed func(profile string) bool) (*attempt, held, error) {
	h, age, err := redeem[held](ctx, b, heldID(ticket), "ticket")
	if err != nil {
		return nil, h, err
	}
	p, err := b.about(h.subject, allowed, "ticket")
	if err != nil {
		return nil, h, err
	}
	a := b.signIn(p)
	a.took = h.Age + age
	a.sent = time.Now().Add(-a.took)
	return a, h, nil
}

// signInFailed tells whoever signs in of a failure.
func signInFailed(p *Profile, f Failure, rest time.Duration) *Error {
	e := failureError(p, f, rest)
	e.Text = fmt.Sprintf("signing in for profile %s: %s", p.Name, f.Text)
	if f.Kind == Rejection {
		e.Text += "; " + rejectedAdvice(p, f, rest)
	} else if rest > 0 {
		e.Text += "; the endpoint is left alone; next attempt " + restText(rest)
	}
	return e
}

// startAgain tells that the sign-in is over: repeating the call does not help.
func startAgain(e *Error) *Error {
	e.RetryAfter = 0
	e.Text += "; start the sign-in again"
	return e
}
