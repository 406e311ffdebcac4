package store

import (
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// memConsent is a refresh token, and what is known of its presentations. It is
// replaced as a whole by the next refresh token.
type memConsent struct {
	secret  broker.Secret
	account broker.Account
	id      string
	// origin is the id of the first refresh token of the grant.
	origin     string
	generation broker.Generation
	rotates    broker.Rotates
	began      time.Time
	ends       time.Time // zero: nobody knows
	// dead tells that the server has said so.
	dead bool

	// presentations whose outcome nobody knows, and when the last of all was
	// committed to.
	presentations int
	presented     time.Time
	// intent is the last of them while its outcome is unknown; until is its
	// horizon.
	intent memLease
}

// intend commits to presenting the refresh token.
func (r *memRecord) intend(l broker.Lease, p broker.Presentation, now time.Time) broker.IntendVerdict {
	c := r.consent
	switch {
	case !r.lease.is(l) || !r.lease.live(now):
		return broker.IntendLost
	case !c.is(p.RefreshID):
		return broker.IntendChanged
	case c.presentedBy(l): // before
		return broker.Intended
	case c.intent.live(now):
		return broker.IntendInDoubt
	case c.presentations >= p.Most && c.rotates != broker.RotatesNo:
		return broker.IntendSpent
	}
	c.intent = memLease{owner: l.Owner, fence: l.Fence, until: now.Add(p.Horizon)}
	c.presented = now
	c.presentations++
	return broker.Intended
}

func (c *memConsent) is(id string) bool { return c != nil && c.id == id }

// from reports whether the grant began with this refresh token.
func (c *memConsent) from(refresh broker.Secret) bool { return c != nil && c.origin == refresh.ID() }

func (c *memConsent) lives(now time.Time) bool {
	return c != nil && !c.dead && (c.ends.IsZero() || broker.Until(now, c.ends) > 0)
}

// inDoubt reports whether somebody other than owner may still be waiting for
// the answer to a presentation.
func (c *memConsent) inDoubt(owner string, now time.Time) bool {
	return c != nil && c.intent.live(now) && c.intent.owner != owner
}

// presentedBy reports whether the presentation that was committed to last is
// that of the lease, and its outcome unknown.
func (c *memConsent) presentedBy(l broker.Lease) bool {
	return c != nil && c.intent.owner != "" && c.intent.is(l)
}

// ended takes note of the outcome of the presentation that was committed to
// last.
func (c *memConsent) ended(o broker.Outcome, now time.Time) {
	if o == broker.OutcomeUnknown {
		if c.intent.live(now) {
			c.intent.until = now
		}
		return
	}
	c.intent = memLease{}
	c.presentations = max(c.presentations-1, 0)
}

// proved takes note of a refresh under the fence that left the refresh token as
// it is. A later presentation may still be under way.
func (c *memConsent) proved(fence broker.Generation, rotates broker.Rotates) {
	c.dead, c.presentations = false, 0
	if rotates != broker.RotatesUnknown {
		c.rotates = rotates
	}
	if c.intent.fence > fence {
		c.presentations = 1
	} else {
		c.intent = memLease{}
	}
}

// successor is the consent after this one: of the same grant if its refresh
// token was spent for it.
func (c *memConsent) successor(s broker.Result, g broker.Generation, now time.Time) *memConsent {
	id := s.Refresh.ID()
	next := &memConsent{secret: s.Refresh, account: s.Account, id: id, origin: id, generation: g, rotates: s.Rotates, began: now}
	if s.Remaining > 0 {
		next.ends = now.Add(s.Remaining)
	}
	if s.Spent != "" && c != nil {
		next.origin, next.began, next.ends = c.origin, c.began, c.ends
	}
	return next
}

// seen is the consent as of now.
func (c *memConsent) seen(now time.Time) *broker.Consent {
	if c == nil {
		return nil
	}
	s := &broker.Consent{
		RefreshToken: c.secret, Account: c.account, Dead: c.dead, Generation: c.generation, Rotates: c.rotates,
		Age: now.Sub(c.began), Remaining: broker.Forever, Presentations: c.presentations,
	}
	if !c.ends.IsZero() {
		s.Remaining = broker.Until(now, c.ends)
	}
	if c.presentations > 0 {
		s.PresentedAge = now.Sub(c.presented)
	}
	return s
}
