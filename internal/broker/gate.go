package broker

import (
	"context"
	"sync"
	"time"
)

// gate is what all families of one client have in common. Authorization servers
// throttle and lock out clients, not scopes: what one family learns of that
// holds for all, and a credential that has never worked is tried by one call at
// a time.
type gate struct {
	mu sync.Mutex
	// failure that holds back every family of the client.
	failure remembered
	// proven is the credential that worked last.
	proven string
	// resets counts, so that a failure from before a reset does not count.
	resets int

	// trial is held by the one call that presents an unproven credential.
	trial chan struct{}
}

func newGate() *gate { return &gate{trial: make(chan struct{}, 1)} }

// pass is the right to make one call.
type pass struct {
	g          *gate
	credential string
	resets     int
	trial      bool
}

// enter waits until the credential may be presented. It returns the failure that
// stands in the way instead, or ctx's error.
func (g *gate) enter(ctx context.Context, credential string) (*pass, remembered, error) {
	trial := false
	if !g.isProven(credential) {
		select {
		case g.trial <- struct{}{}:
			trial = true
		case <-ctx.Done():
			return nil, remembered{}, context.Cause(ctx)
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.failure.binds(credential, time.Now()) {
		if trial {
			<-g.trial
		}
		return nil, g.failure, nil
	}
	return &pass{g: g, credential: credential, resets: g.resets, trial: trial}, remembered{}, nil
}

func (g *gate) isProven(credential string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.proven == credential
}

// leave says how the call ended; a nil error proves the credential. Only the
// first call of it lets the next one in.
func (p *pass) leave(err *IssueError, f Failure) {
	p.g.mu.Lock()
	defer p.g.mu.Unlock()
	if p.trial {
		p.trial = false
		<-p.g.trial
	}
	switch {
	case err == nil:
		p.g.proven = p.credential
		p.g.failure = remembered{}
	case p.resets != p.g.resets:
	case err.Kind == ClientRejected, err.Kind == UserRejected:
		p.g.proven = ""
		p.g.failure = remembered{Failure: f, since: time.Now()}
	case err.Kind == Throttled:
		p.g.failure = remembered{Failure: f, since: time.Now()}
	}
}

func (g *gate) standing(credential string, now time.Time) remembered {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.failure.binds(credential, now) {
		return g.failure
	}
	return remembered{}
}

func (g *gate) reset() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.failure = remembered{}
	g.resets++
}
