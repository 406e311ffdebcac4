package broker

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"
)

// Revocation tells what became of a token that was to be revoked.
type Revocation struct {
	// TokenID of the token that was dropped; empty if there was none.
	TokenID string
	// Confirmed tells that the authorization server revoked it, too.
	Confirmed bool
}

// rememberDropped is how much longer than a dropped token would have lived its
// id is known as dropped, for clocks that differ.
const rememberDropped = 10 * time.Minute

// Revoke drops a token of the profile for good, the current one if id is empty,
// and asks the authorization server to revoke it. A job ends with it: no other one
// is obtained for it until that would have ended by itself. The error is an *Error or
// ctx's; what the server says is not an error.
func (b *Broker) Revoke(ctx context.Context, ask Ask, id string) (Revocation, error) {
	if ask.Job != "" {
		p, err := b.profile(ask.Profile)
		if err != nil {
			return Revocation{}, err
		}
		return b.endJob(ctx, p, ask, id)
	}
	p, e, err := b.find(ask)
	if err != nil {
		return Revocation{}, err
	}
	for _, x := range p.all() { // whoever names a token need not know its scopes
		if t := x.token.Load(); len(ask.Scopes) == 0 && ask.Job == "" && id != "" && t != nil && t.ID == id {
			e = x
		}
	}
	known, err := e.current(ctx)
	if id == "" && known == nil {
		if err != nil {
			return Revocation{}, storeUnavailable(p.Profile, "revoking the token of", err)
		}
		return Revocation{}, nil
	}
	remember := p.maxTokenAge()
	if known != nil && (id == "" || id == known.ID) {
		id, remember = known.ID, known.remaining(time.Now())
	} else {
		known = nil
	}
	// Here at once, whatever comes of the rest.
	b.mu.Lock()
	family := slices.Clone(b.entries[e.family])
	b.mu.Unlock()
	for _, x := range family {
		x.dropNow(id)
	}
	e.mu.Lock()
	e.drop(id)
	drop := Drop{Family: e.family, Operation: newOwner(), Token: id, Remember: remember + rememberDropped, Floor: e.floor}
	e.mu.Unlock()

	var dropped Dropped
	err = thrice(ctx, func(ctx context.Context) (err error) {
		dropped, err = b.store.Drop(ctx, drop)
		return err
	})
	b.reach.observe(err)
	for _, x := range family {
		x.announce()
	}
	if err == nil && known == nil {
		for _, t := range dropped.Access {
			known = &Token{Access: t, ID: t.ID()}
		}
	}
	r := Revocation{TokenID: id}
	said := "the authorization server was not asked: the token itself is not known here"
	if known != nil {
		r.Confirmed, said = b.revoke(ctx, p, e, known.Access, err == nil)
	}
	b.log.Info("token revoked", "profile", p.Name, "token_id", id, "confirmed", r.Confirmed)
	if err != nil {
		failed := storeUnavailable(p.Profile, "revoking the token of", err)
		failed.Text = fmt.Sprintf("revoking token %s of profile %s: the store is out of reach, so other replicas may hand it out until it is back; this one does not any more, and %s", id, p.Name, said)
		return r, failed
	}
	return r, nil
}

// revocationTakes is how long whoever drops a token is given to have the server
// revoke it, before the others see to it.
const revocationTakes = 30 * time.Second

// seeRevoked comes back to a token that another replica has dropped: if that
// one died before the server had revoked it, this one does.
func (e *entry) seeRevoked(id string) {
	time.AfterFunc(scale(revocationTakes, between(1, 2)), func() {
		e.b.background(func(ctx context.Context) {
			e.mu.Lock()
			p := e.profile
			e.mu.Unlock()
			r, err := e.b.store.Look(ctx, e.family, e.slot)
			if err != nil || !r.ToRevoke || r.ToRevokeSince < revocationTakes {
				return
			}
			dropped, err := e.b.store.Drop(ctx, Drop{Family: e.family, Operation: newOwner(), Token: id, Remember: rememberDropped})
			if err != nil {
				return
			}
			for _, t := range dropped.Access {
				if confirmed, _ := e.b.revoke(ctx, p, e, t, true); confirmed {
					e.b.log.Info("revocation finished for another replica", "profile", p.Name, "token_id", id)
				}
			}
		})
	})
}

// dropAgain tells the store of a token that was dropped here: it has not heard,
// or has forgotten.
func (e *entry) dropAgain(ctx context.Context, id string) {
	d := Drop{Family: e.family, Operation: newOwner(), Token: id, Remember: e.b.rememberFor(e)}
	if e.isJob() { // whose token is dropped with its end only
		e.mu.Lock()
		d.Job, d.Remember = cmp.Or(e.ends, e.slot), rememberDropped
		e.mu.Unlock()
	}
	_ = detached(ctx, func(ctx context.Context) error {
		_, err := e.b.store.Drop(ctx, d)
		return err
	})
}

// rememberFor is for how long any token of the entry may live on.
func (b *Broker) rememberFor(e *entry) time.Duration {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.profile.maxTokenAge() + rememberDropped
}

// current is the token that callers get now, from memory or else the store.
func (e *entry) current(ctx context.Context) (*Token, error) {
	start := time.Now()
	r, err := e.b.store.Look(ctx, e.family, e.slot)
	if ctx.Err() == nil { // a caller who left says nothing of the store
		e.b.reach.observe(err)
	}
	if err == nil {
		e.keep(r.Token, start)
	}
	if t := e.token.Load(); t != nil && t.remaining(time.Now()) > 0 {
		return t, nil
	}
	return nil, err
}

// revoke asks the server, and tells the store when it has confirmed. It returns
// what the server said.
func (b *Broker) revoke(ctx context.Context, p *profile, e *entry, token Secret, confirm bool) (confirmed bool, said string) {
	f := &flight{profile: p}
	f.awaitSecrets(ctx, e)
	p = f.profile
	revoker, ok := p.Issuer.(Revoker)
	if !ok {
		return false, "the authorization server offers no revocation"
	}
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), p.timeout())
	defer cancel()
	if err := revoker.Revoke(call, token, AccessToken); err != nil {
		b.log.Warn("token not revoked at the authorization server", "profile", p.Name, "token_id", token.ID(), "error", err)
		return false, "the authorization server did not confirm it: " + err.Error()
	}
	if confirm {
		_ = detached(ctx, func(ctx context.Context) error { return b.store.Confirm(ctx, e.family, token.ID()) }) // it is forgotten in time anyway
	}
	return true, "the authorization server has revoked it"
}
