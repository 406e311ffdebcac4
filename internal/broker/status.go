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
	// LastError is nil when the last attempt succeeded.
	LastError *LastError
	// Served counts answers by Source since the process started.
	Served [Uncoordinated + 1]uint64
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
		r = p.own.record(start)
	}
	return p.status(r, start), nil
}

// Glance is Status as memory sees it, without I/O.
func (b *Broker) Glance(name string) (*Status, error) {
	p, err := b.profile(name)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return p.status(p.own.record(now), now), nil
}

// status puts a record, read at start, into an operator's words.
func (p *profile) status(r Record, start time.Time) *Status {
	s := &Status{Profile: p.Profile}
	for i := range p.served {
		s.Served[i] = p.served[i].Load()
	}
	if r.Token != nil && r.Token.Remaining > 0 {
		t := newToken(*r.Token, start, p.maxTokenAge())
		if known := p.own.token.Load(); known != nil && known.generation == t.generation {
			t = known
		}
		s.TokenID, s.IssueTime, s.ExpireTime, s.RefreshTime = t.ID, t.IssueTime, t.ExpireTime, t.RefreshTime
	}
	if f := r.Failure; f != nil && (f.Binds(p.Credential) || f.Kind == Dead && p.consentUse() == ConsentRequired) {
		s.LastError = lastError(p.Profile, *r.Failure, start)
	} else if r := p.gate.standing(p.Credential, start); r.Kind != NoFailure {
		f := r.Failure
		f.Rest, f.Age = r.rest(start), start.Sub(r.since)
		s.LastError = lastError(p.Profile, f, start)
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

// describe derives the state.
func (s *Status) describe(now time.Time) {
	switch {
	case s.LastError != nil && s.LastError.Reason == ReasonCredentialsRejected:
		s.State, s.Text = CredentialsRejected, "the authorization server rejects this profile"
	case s.LastError != nil && s.LastError.Reason == ReasonAuthorizationNeeded:
		s.State, s.Text = AuthorizationRequired, "a person must sign in: the refresh token is no longer good"
	case s.LastError != nil:
		s.State, s.Text = BackingOff, fmt.Sprintf("%d failed in a row; next attempt %s", s.LastError.Attempts, restText(s.LastError.NextAttempt.Sub(now)))
	case s.TokenID != "":
		s.State, s.Text = Ready, "there is a token"
	default:
		s.State, s.Text = Idle, "no token at present; the next call gets one"
	}
	if s.LastError != nil && s.TokenID != "" {
		s.Text += "; the current token is served until " + s.ExpireTime.UTC().Format(time.RFC3339)
	}
}
