package broker

import (
	"context"
	"maps"
	"sync"
	"time"
)

// gate is what all families of one client have in common. Authorization servers
// throttle and lock out clients, not scopes: what one family learns of that
// holds for all, and a credential that has never worked is tried by one call at
// a time.
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
}

// maxRejections bounds the refused credentials that a gate remembers; a
// configuration has one or two at a time.
const maxRejections = 64

func newGate() *gate {
	return &gate{rejections: make(map[string]remembered), trial: make(chan struct{}, 1)}
}

// pass is the right to make one call.
type pass struct {
	g          *gate
	credential string
	resets     int
	trial      bool
}

// enter waits until p's credential may be presented. It returns the failure that
// stands in the way instead, or why ctx ended. A password is never taken for
// proven: presenting a changed one for several families at once locks accounts.
func (g *gate) enter(ctx context.Context, p *Profile) (*pass, remembered, error) {
	g.mu.Lock()
	trial := !g.trusts(p)
	g.mu.Unlock()
	if trial {
		select {
		case g.trial <- struct{}{}:
		case <-ctx.Done():
			return nil, remembered{}, context.Cause(ctx)
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	failure := g.failure(p.Credential, time.Now())
	if trial && (failure.Kind != NoFailure || g.trusts(p)) { // the call before this one has told
		trial = false
		<-g.trial
	}
	if failure.Kind != NoFailure {
		return nil, failure, nil
	}
	return &pass{g: g, credential: p.Credential, resets: g.resets, trial: trial}, remembered{}, nil
}

// trusts reports whether p may call beside others. g.mu is held.
func (g *gate) trusts(p *Profile) bool { return p.GrantType != Password && g.proven == p.Credential }

// succeed says that the server took the credential.
func (p *pass) succeed() {
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	defer p.letNextIn()
	p.g.proven = p.credential
	delete(p.g.rejections, p.credential)
	if p.g.pause.Kind == Transient {
		p.g.pause = remembered{}
	}
}

// fail says how the call failed, and what was decided about it.
func (p *pass) fail(kind IssueErrorKind, f Failure) {
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	defer p.letNextIn()
	if p.resets != p.g.resets || f.Kind == NoFailure {
		return
	}
	r := remembered{Failure: f, since: time.Now()}
	switch {
	case kind == ClientRejected, kind == UserRejected:
		if p.g.proven == p.credential {
			p.g.proven = ""
		}
		p.g.reject(p.credential, r)
	case kind == Throttled, p.trial && f.Kind == Transient:
		if r.rest(r.since) > p.g.pause.rest(r.since) {
			p.g.pause = r
		}
	}
}

// leave says that the call came to nothing, through no fault of the server.
func (p *pass) leave() {
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

// reject remembers a refusal. g.mu is held.
func (g *gate) reject(credential string, r remembered) {
	if _, known := g.rejections[credential]; !known && len(g.rejections) >= maxRejections {
		oldest := ""
		for c, known := range g.rejections {
			if oldest == "" || known.since.Before(g.rejections[oldest].since) {
				oldest = c
			}
		}
		delete(g.rejections, oldest)
	}
	g.rejections[credential] = r
}

// failure that holds the credential back, if any. g.mu is held.
func (g *gate) failure(credential string, now time.Time) remembered {
	if r := g.rejections[credential]; r.binds(credential, now) {
		return r
	}
	if g.pause.binds(credential, now) {
		return g.pause
	}
	return remembered{}
}

// standing is the failure that holds the credential back, if any.
func (g *gate) standing(credential string, now time.Time) remembered {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.failure(credential, now)
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
