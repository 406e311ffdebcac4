package broker

import (
	"context"
	"fmt"
	"time"
)

// State of a profile, in a word.
type State int

// The states of a profile.
const (
	// Idle: nobody has asked for a token yet, or not for long.
	Idle State = iota + 1
	// Ready: there is a token.
	Ready
	// BackingOff: the last attempt failed; the next one waits.
	BackingOff
	// CredentialsRejected: the server refuses what the profile presents.
	CredentialsRejected
	// AuthorizationRequired: a person must sign in.
	AuthorizationRequired
)

// Status is what an operator wants to know of a profile. It holds no secret.
type Status struct {
	*Profile
	State State
	// Text is the state in words.
	Text string
	// TokenID is empty when no token lives; the times are then zero.
	TokenID                            string
	IssueTime, ExpireTime, RefreshTime time.Time
	// Account that has signed in, ConsentStart and ConsentEnd say of whom, since
	// when and until when the profile has a consent; zero where nobody knows.
	Account                  Account
	ConsentStart, ConsentEnd time.Time
	// wants tells why a person must sign in; empty if none must.
	wants string
	// LastError is nil when the last attempt succeeded.
	LastError *LastError
	// Served counts answers by Source since the process started.
	Served [Uncoordinated + 1]uint64
	// Named and Dedicated count those of them that were for a named job: the token
	// that all share, or one of its own.
	Named, Dedicated uint64
	// DedicatedTokens are the jobs that have, or wait for, a token of their own on
	// this replica.
	DedicatedTokens int
}

// LastError is the failure that stands in a profile's way.
type LastError struct {
	Reason Reason
	Code   string
	Text   string
	Time   time.Time
	// Attempts that failed in a row.
	Attempts int
	// NextAttempt is zero when there will be none by itself.
	NextAttempt time.Time
}

// Status tells how a profile fares, for its own scopes, as the store sees it
// and, when the store is out of reach, as memory does.
func (b *Broker) Status(ctx context.Context, name string) (*Status, error) {
	p, err := b.profile(name)
	if err != nil {
		return nil, err
	}
	start := time.Now()
	r, err := b.store.Look(ctx, p.own.family, p.own.slot)
	if err != nil {
		return p.glance(start), nil
	}
	if p.consentUse() != NoConsent {
		b.consents.note(p.own.family, r.Consent, start)
	}
	return p.status(r, true, start), nil
}

// Glance is Status as memory sees it, without I/O.
func (b *Broker) Glance(name string) (*Status, error) {
	p, err := b.profile(name)
	if err != nil {
		return nil, err
	}
	return p.glance(time.Now()), nil
}

func (p *profile) glance(now time.Time) *Status {
	r := p.own.record(now)
	consent, known := p.own.b.consents.known(p.own.family, now)
	r.Consent = consent
	return p.status(r, known, now)
}

// status puts a record, read at start, into an operator's words. Known tells that
// the record is right about the consent.
func (p *profile) status(r Record, known bool, start time.Time) *Status {
	s := &Status{Profile: p.Profile}
	for i := range p.served {
		s.Served[i] = p.served[i].Load()
	}
	s.Named, s.Dedicated, s.DedicatedTokens = p.named.Load(), p.dedicated.Load(), int(p.jobs.count.Load())
	if r.Token != nil && r.Token.Remaining > 0 {
		t := newToken(*r.Token, start, p.maxTokenAge())
		if known := p.own.token.Load(); known != nil && known.generation == t.generation {
			t = known
		}
		s.TokenID, s.IssueTime, s.ExpireTime, s.RefreshTime = t.ID, t.IssueTime, t.ExpireTime, t.RefreshTime
	}
	if f := r.Failure; f != nil && (f.Binds(p.own.credentials(p)...) || f.Kind == Dead && p.consentUse() == ConsentRequired) {
		s.LastError = lastError(p.Profile, *r.Failure, start)
	} else if r := p.gate.standing(p.Profile, start); r.Kind != NoFailure {
		f := r.Failure
		f.Rest, f.Age = r.rest(start), start.Sub(r.since)
		s.LastError = lastError(p.Profile, f, start)
	}
	if c := r.Consent; c != nil && p.consentUse() == ConsentRequired {
		s.Account, s.ConsentStart = c.Account, start.Add(-c.Age)
		if c.Remaining != Forever {
			s.ConsentEnd = start.Add(c.Remaining)
		}
	}
	if known && p.consentUse() == ConsentRequired && !r.Consent.lives() {
		s.wants = consentGone(r.Consent, start)
	}
	if s.LastError != nil && s.LastError.Reason == ReasonAuthorizationNeeded {
		s.wants = deadGrant
	}
	s.describe(start)
	return s
}

// record is what memory knows, in the store's terms.
func (e *entry) record(now time.Time) Record {
	e.mu.Lock()
	defer e.mu.Unlock()
	var r Record
	if t := e.token.Load(); t != nil {
		stored := t.stored(now)
		r.Token = &stored
	}
	if f := e.failure; f.Kind != NoFailure {
		f.Rest, f.Age = f.rest(now), now.Sub(f.since)
		r.Failure = &f.Failure
	}
	return r
}

func lastError(p *Profile, f Failure, start time.Time) *LastError {
	e := failureError(p, f, f.Rest)
	l := &LastError{Reason: e.Reason, Code: f.Code, Text: e.Text, Time: start.Add(-f.Age), Attempts: f.Attempts}
	if f.Rest != Forever {
		l.NextAttempt = start.Add(f.Rest)
	}
	return l
}

// ConsentWarning is how long before its end a consent is warned of.
const ConsentWarning = 7 * 24 * time.Hour

// describe derives the state.
func (s *Status) describe(now time.Time) {
	left := s.ConsentEnd.Sub(now)
	switch {
	case s.LastError != nil && s.LastError.Reason == ReasonCredentialsRejected:
		s.State, s.Text = CredentialsRejected, "the authorization server rejects this profile"
	case s.wants != "" && s.ConsentStart.IsZero() && s.TokenID != "":
		s.State, s.Text = Ready, fmt.Sprintf("there is a token, and no refresh token came with it: sign in again before it ends, on %s; %s", date(s.ExpireTime), s.signInAdvice())
	case s.wants != "":
		s.State, s.Text = AuthorizationRequired, fmt.Sprintf("a person must sign in: %s; %s", s.wants, s.signInAdvice())
	case s.LastError != nil:
		s.State, s.Text = BackingOff, fmt.Sprintf("%d failed in a row; next attempt %s", s.LastError.Attempts, restText(s.LastError.NextAttempt.Sub(now)))
	case s.TokenID != "":
		s.State, s.Text = Ready, "there is a token"
	default:
		s.State, s.Text = Idle, "no token at present; the next call gets one"
	}
	if s.State != Ready && s.State != Idle && s.TokenID != "" {
		s.Text += "; the current token is served until " + date(s.ExpireTime)
	}
	if s.GrantType == AuthorizationCode && !s.ConsentEnd.IsZero() && left > 0 && left <= ConsentWarning && s.State != AuthorizationRequired {
		s.Text += fmt.Sprintf("; the consent ends in %s, on %s: sign in again before that; %s", daysText(left), date(s.ConsentEnd), s.signInAdvice())
	}
}

func date(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// daysText is a span in days, or in hours where those are few.
func daysText(d time.Duration) string {
	const day = 24 * time.Hour
	if d >= 2*day {
		return fmt.Sprintf("%d days", d/day)
	}
	return fmt.Sprintf("%d hours", max(d/time.Hour, 1))
}
