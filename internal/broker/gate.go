package broker

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"sync"
	"time"
)

// gate is what all families of one client have in common. Authorization servers
// throttle and lock out clients, not scopes: what one family learns of that
// holds for all, and a credential that has never worked is tried by one call at
// a time. What the fleet shares of it is a record in the store like any family's
// (see client), whose token proves that the credential has worked.
type gate struct {
	mu sync.Mutex
	// pause holds back whoever would call: the server asked for quiet, or
	// did not answer the call that tried an unproven credential.
	pause remembered
	// rejections by the credential that was refused.
	rejections map[string]remembered
	// proven is the credential that worked last.
	proven string
	// resets counts, so that a failure from before a reset does not count.
	resets int

	// trial is held by the one call that presents an unproven credential.
	trial chan struct{}
	// changed is signalled when the client's record in the store changed.
	changed chan struct{}
	// jobs is the line of those who would call for a job, ends that of those who
	// would end one.
	jobs, ends lane
}

// maxRejections bounds the refused credentials that a gate remembers; a
// configuration has one or two at a time.
const maxRejections = 64

// proofLife is how long a credential that has worked is taken for proven by
// replicas that have not seen it work.
const proofLife = 24 * time.Hour

// errNoRecord says that the store could not tell what stands in a credential's
// way, and the grant must not go on without knowing.
var errNoRecord = errors.New("what is known of the client cannot be read")

func newGate() *gate {
	return &gate{rejections: make(map[string]remembered), trial: make(chan struct{}, 1), changed: make(chan struct{}, 1), jobs: make(lane, jobRequests), ends: make(lane, jobRequests)}
}

// pass is the right to make one call.
type pass struct {
	g       *gate
	b       *Broker
	profile *profile
	// ctx ends with the right.
	ctx    context.Context
	resets int
	// shared tells that the store is asked and told.
	shared bool
	// trial tells that this is the one call of this process that tries the
	// credential, under lease the one of the fleet.
	trial   bool
	lease   Lease
	release func()
}

// enter waits until p's credential may be presented. It returns the failure that
// stands in the way instead, or why ctx ended. A password is never taken for
// proven: presenting a changed one for several families at once locks accounts.
// Shared asks the fleet as well.
func (g *gate) enter(ctx context.Context, b *Broker, p *profile, shared bool) (*pass, remembered, error) {
	for {
		g.mu.Lock()
		trial := !g.trusts(p.Profile)
		g.mu.Unlock()
		if trial {
			select {
			case g.trial <- struct{}{}:
			case <-ctx.Done():
				return nil, remembered{}, context.Cause(ctx)
			}
		}
		pass, failure := g.admit(ctx, b, p, trial)
		if pass == nil || !shared {
			return pass, failure, nil
		}
		pass.shared = true
		switch ok, failure, err := pass.ask(); {
		case ok:
			return pass, remembered{}, nil
		case !errors.Is(err, errAgain):
			return nil, failure, err
		}
	}
}

// ask consults the fleet, and leaves unless the call may be made; also when the
// store panics.
func (p *pass) ask() (ok bool, failure remembered, err error) {
	defer func() {
		if !ok {
			p.leave()
		}
	}()
	failure, err = p.consult()
	return failure.Kind == NoFailure && err == nil, failure, err
}

// admit judges by what this process knows.
func (g *gate) admit(ctx context.Context, b *Broker, p *profile, trial bool) (*pass, remembered) {
	g.mu.Lock()
	defer g.mu.Unlock()
	failure := g.failure(p.Profile, time.Now())
	if trial && (failure.Kind != NoFailure || g.trusts(p.Profile)) { // the call before this one has told
		trial = false
		<-g.trial
	}
	if failure.Kind != NoFailure {
		return nil, failure
	}
	return &pass{g: g, b: b, profile: p, ctx: ctx, resets: g.resets, trial: trial}, remembered{}
}

// trusts reports whether p may call beside others. g.mu is held.
func (g *gate) trusts(p *Profile) bool { return p.GrantType != Password && g.proven == p.Credential }

// consult learns from the store what other replicas know of the client, and has
// one call of the fleet at a time try what is not proven.
func (p *pass) consult() (remembered, error) {
	for p.ctx.Err() == nil {
		start := time.Now()
		r, err := p.b.store.Look(p.ctx, p.profile.client(), "")
		if err != nil {
			return p.unread(err)
		}
		if f := r.Failure; f != nil && f.Binds(p.profile.credentials()...) {
			return p.g.learn(*f, start, p.resets), nil
		}
		refused := r.Failure != nil && r.Failure.Kind == Rejection
		if refused && !p.trial { // it worked once, and was refused since
			p.g.disprove(p.profile.Credential)
			return remembered{}, errAgain
		}
		if !p.trial || r.Token != nil && r.Token.Remaining > 0 && !refused && p.profile.GrantType != Password {
			p.g.prove(p)
			return remembered{}, nil
		}
		a, err := p.claim(start)
		switch {
		case err != nil:
			return p.unread(err)
		case a.Verdict == Granted:
			return remembered{}, nil
		case a.Verdict == Busy:
			waitFor(p.ctx, p.g.changed, min(pollInterval, a.Wait+rand.N(pollJitter)))
		}
	}
	return remembered{}, context.Cause(p.ctx)
}

// claim asks for the lease of the client's record.
func (p *pass) claim(start time.Time) (Acquisition, error) {
	c := seize(p.profile.client(), p.b.lease, p.profile.credentials()...) // whatever proof there is
	a, err := p.b.store.Acquire(p.ctx, c)
	if err == nil && a.Verdict == Granted {
		p.lease = c.lease(a.Fence)
		p.ctx, _, p.release = p.b.hold(p.ctx, p.profile.Name, p.lease, start)
	}
	return a, err
}

// unread decides about a client whose record cannot be read: a client secret is
// refused once too often at the worst, a password may lock an account.
func (p *pass) unread(err error) (remembered, error) {
	if p.ctx.Err() != nil {
		return remembered{}, context.Cause(p.ctx)
	}
	if p.profile.repeatable() && !p.profile.Coordinated {
		return remembered{}, nil
	}
	return remembered{}, errors.Join(errNoRecord, err)
}

// settle ends the lease of the client's record, if the pass has one.
func (p *pass) settle(ctx context.Context, end func(context.Context) error) error {
	if p.lease.Owner == "" {
		return nil
	}
	p.release()
	err := detached(ctx, end) // the lease ends by itself
	p.lease = Lease{}
	return err
}

// proofOf is what the client's record holds when its credential has worked.
func proofOf(p *Profile) Result {
	return Result{Token: StoredToken{Access: NewSecret(p.Credential), Type: "proof", Lifetime: proofLife, Remaining: proofLife}}
}

// succeed says that the server took the credential.
func (p *pass) succeed(ctx context.Context) {
	_ = p.settle(ctx, func(ctx context.Context) error {
		_, _, err := p.b.store.Save(ctx, p.lease, proofOf(p.profile.Profile))
		return err
	})
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	defer p.letNextIn()
	p.g.proven = p.profile.Credential
	for _, c := range p.profile.credentials() {
		delete(p.g.rejections, c)
	}
	if p.g.pause.Kind == Transient {
		p.g.pause = remembered{}
	}
}

// fail says how the call failed, and what was decided about it.
func (p *pass) fail(ctx context.Context, kind IssueErrorKind, f Failure) {
	rejected := kind == ClientRejected || kind == UserRejected
	if f.Kind == NoFailure || !rejected && kind != Throttled && !(p.trial && f.Kind == Transient) {
		return // it says nothing about the client
	}
	if p.lease.Owner == "" && p.shared {
		call, cancel := context.WithTimeout(context.WithoutCancel(ctx), storeTimeout)
		p.ctx = call
		_, _ = p.claim(time.Now()) // if another call has the lease, that one will tell
		defer cancel()
	}
	lease := p.lease
	tell := func(ctx context.Context) error {
		_, err := p.b.store.Fail(ctx, lease, f)
		return err
	}
	if p.settle(ctx, tell) != nil && rejected { // another replica would try it again
		p.b.insist(tell, func(error) {})
	}
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	defer p.letNextIn()
	if p.resets != p.g.resets {
		return
	}
	r := remembered{Failure: f, since: time.Now()}
	if rejected && p.g.proven == p.profile.Credential {
		p.g.proven = ""
	}
	p.g.note(r)
}

// leave says that the call came to nothing, through no fault of the server. It
// does nothing after succeed or fail.
func (p *pass) leave() {
	_ = p.settle(p.ctx, func(ctx context.Context) error {
		_, err := p.b.store.Fail(ctx, p.lease, Failure{Kind: NoFailure})
		return err
	})
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	p.letNextIn()
}

// letNextIn ends the trial, once. g.mu is held.
func (p *pass) letNextIn() {
	if p.trial {
		p.trial = false
		<-p.g.trial
	}
}

// prove notes that another replica has seen the credential work.
func (g *gate) prove(p *pass) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if p.trial { // else it is taken for proven, or was refused a moment ago
		g.proven = p.profile.Credential
		p.letNextIn()
	}
}

// disprove notes that the credential was refused, somewhere in the fleet, after
// it had worked: whether it does again is for one call to try.
func (g *gate) disprove(credential string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.proven == credential {
		g.proven = ""
	}
}

// learn takes over a failure that the store knows.
func (g *gate) learn(f Failure, start time.Time, resets int) remembered {
	g.mu.Lock()
	defer g.mu.Unlock()
	r := remembered{Failure: f, since: start}
	if resets == g.resets {
		g.note(r)
	}
	return r
}

// note remembers a failure of the client. g.mu is held.
func (g *gate) note(r remembered) {
	if r.Kind == Rejection {
		g.reject(r)
	} else if r.rest(r.since) > g.pause.rest(r.since) {
		g.pause = r
	}
}

// reject remembers a refusal. g.mu is held.
func (g *gate) reject(r remembered) {
	if _, known := g.rejections[r.Credential]; !known && len(g.rejections) >= maxRejections {
		oldest := ""
		for c, known := range g.rejections {
			if oldest == "" || known.since.Before(g.rejections[oldest].since) {
				oldest = c
			}
		}
		delete(g.rejections, oldest)
	}
	g.rejections[r.Credential] = r
}

// failure that holds p back, if any. g.mu is held.
func (g *gate) failure(p *Profile, now time.Time) remembered {
	for _, c := range p.credentials() {
		if r := g.rejections[c]; r.binds(now, c) {
			return r
		}
	}
	if g.pause.binds(now) {
		return g.pause
	}
	return remembered{}
}

// refuse remembers that a request was refused, for all jobs that would make it. It
// is forgotten with a reset.
func (g *gate) refuse(f Failure, resets int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if resets == g.resets {
		g.reject(remembered{Failure: f, since: time.Now()})
	}
}

// refused is the refusal of such a request, if it stands.
func (g *gate) refused(request string, now time.Time) remembered {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r := g.rejections[request]; r.binds(now, request) {
		return r
	}
	return remembered{}
}

// standing is the failure that holds p back, if any.
func (g *gate) standing(p *Profile, now time.Time) remembered {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.failure(p, now)
}

// hear wakes the call that waits for another replica's trial.
func (g *gate) hear() {
	select {
	case g.changed <- struct{}{}:
	default:
	}
}

// holdsAnything reports whether something is lost by forgetting the gate.
func (g *gate) holdsAnything(now time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	maps.DeleteFunc(g.rejections, func(_ string, r remembered) bool { return r.rest(now) <= 0 })
	return len(g.rejections) > 0 || g.pause.rest(now) > 0
}

func (g *gate) reset() {
	g.mu.Lock()
	defer g.mu.Unlock()
	clear(g.rejections)
	g.pause = remembered{}
	g.resets++
}
