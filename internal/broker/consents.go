package broker

import (
	"context"
	"sync"
	"time"
)

// consents are what this process has seen of them last, by family: whose they
// are, since when and until when. The store knows better; this is for those who
// must not ask it.
type consents struct{ families sync.Map } // string -> seenConsent

// seenConsent is a consent as it was seen, or nil for none, and when.
type seenConsent struct {
	*Consent
	at time.Time
}

// note keeps what a call that was begun at start has said of a family.
func (s *consents) note(family string, c *Consent, start time.Time) {
	if c != nil {
		kept := *c
		kept.RefreshToken = Secret{}
		c = &kept
	}
	s.families.Store(family, seenConsent{c, start})
}

// known returns what was seen last, as of now, and whether anything was.
func (s *consents) known(family string, now time.Time) (*Consent, bool) {
	v, ok := s.families.Load(family)
	if !ok || v.(seenConsent).Consent == nil {
		return nil, ok
	}
	seen := v.(seenConsent)
	c, passed := *seen.Consent, -Until(now, seen.at)
	c.Age += passed
	if c.Remaining != Forever {
		c.Remaining -= passed
	}
	return &c, true
}

// retain forgets all families but these.
func (s *consents) retain(families roster) {
	s.families.Range(func(family, _ any) bool {
		if families[family.(string)] == nil {
			s.families.Delete(family)
		}
		return true
	})
}

// meetConsent has a look at the consent, which another replica may have obtained.
func (e *entry) meetConsent(ctx context.Context) {
	start := time.Now()
	if r, err := e.b.store.Look(ctx, e.family, e.slot); err == nil {
		e.b.consents.note(e.family, r.Consent, start)
	}
}
