package broker

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// entry is what memory knows of one family.
type entry struct {
	b      *Broker
	family string
	// slot is the token's place in the family; empty where there is but one.
	slot string
	// scopes to ask for.
	scopes []string
	// job whose token it is; empty for what is shared.
	job jobKey
	// ends is what was asked to end of the job: this slot, or all. Guarded by mu.
	ends string

	// token that callers get. Only adopt writes it, under mu; anyone reads it.
	token atomic.Pointer[Token]
	// used is when a caller last asked, in Unix seconds.
	used atomic.Int64
	// watches are those who follow the token.
	watches atomic.Int32
	// dormant tells that the token came due for renewal while nobody asked
	// for it; the next caller rouses it.
	dormant atomic.Bool

	// mu guards what follows. It is never held across I/O.
	mu sync.Mutex
	// profile that the next renewal presents.
	profile *profile
	// flight under way, or nil. Whoever sets it starts it; landing clears it.
	flight *flight
	// failure that holds callers back, and how often it was forgotten on
	// request: what is on its way from before a reset does not count.
	failure remembered
	resets  int
	// floor is the highest generation seen, kept when the token is gone.
	floor Generation
	// quiet is until when the endpoint is left alone although the token is
	// due: it returned the one that we already had, or may have answered a
	// refresh that nobody has heard of yet.
	quiet time.Time
	// dropped are the ids of the last tokens that must not be served again.
	dropped []string
	// verdict is that a person must sign in, and stands until then: callers in
	// their thousands need not each have the store say it again.
	verdict      *Error
	verdictUntil time.Time
	// reloading tells that what the store has is being fetched.
	reloading bool
	// timer fires when the token is due for renewal.
	timer *time.Timer
	// news is closed, and replaced, when callers get another token or none, or
	// what kept one from them may not any more; nil while nobody waits for that.
	// It changes under mu; anyone reads it.
	news atomic.Pointer[chan struct{}]
	// tidier fires when the entry of a job may be forgotten.
	tidier *time.Timer
	// retired entries are renewed no more, and no new caller finds them. Only
	// retire writes it, under mu; anyone reads it.
	retired atomic.Bool
}

// remembered is a failure with the instant at which it ends.
type remembered struct {
	Failure
	since time.Time
}

func (r remembered) rest(now time.Time) time.Duration {
	if r.Rest == Forever {
		return Forever
	}
	return r.Rest - now.Sub(r.since)
}

func (r remembered) binds(now time.Time, credentials ...string) bool {
	return r.Binds(credentials...) && r.rest(now) > 0
}

func newEntry(b *Broker, family, slot string, scopes []string) *entry {
	return &entry{b: b, family: family, slot: slot, scopes: scopes}
}

// touch notes that a caller asked. Once a second is enough, and keeps callers
// on many cores from fighting over one cache line.
func (e *entry) touch(now time.Time) {
	if s := now.Unix(); e.used.Load() != s {
		e.used.Store(s)
	}
}

// spent reports whether the entry holds nothing that the store and the gate do
// not know as well.
func (e *entry) spent(now time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.idle(now)
}

// idle is spent; e.mu is held.
func (e *entry) idle(now time.Time) bool {
	t := e.token.Load()
	return e.flight == nil && e.watches.Load() == 0 && (t == nil || t.remaining(now) <= 0)
}

// adoptProfile makes p the profile of the next renewal.
func (e *entry) adoptProfile(p *profile) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.profile = p
	e.tell()
	if e.flight == nil { // a new credential may end what held the renewal back
		e.schedule(time.Now(), 0)
	}
}

// retire ends renewals for good.
func (e *entry) retire() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.retireNow()
}

// retireNow is retire; e.mu is held.
func (e *entry) retireNow() {
	e.retired.Store(true)
	e.dormant.Store(false)
	e.tell()
	for _, timer := range []*time.Timer{e.timer, e.tidier} {
		if timer != nil {
			timer.Stop()
		}
	}
}

// forgetFailure is what a reset does to the entry.
func (e *entry) forgetFailure() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.forget(time.Now())
}

// failed reports whether a failure holds callers back here.
func (e *entry) failed(now time.Time) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.failure.Kind != NoFailure && e.failure.rest(now) > 0
}

// forget is forgetFailure; e.mu is held.
func (e *entry) forget(now time.Time) {
	e.failure = remembered{}
	e.verdict = nil
	e.resets++
	e.tell()
	if e.flight == nil {
		e.schedule(now, 0)
	}
}

// forgive clears the failure after a success of our own.
func (e *entry) forgive() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.failure = remembered{}
}

// obtain waits for a token that meets the demand: that of the flight under way,
// and if its outcome says nothing about this demand, that of the next one. The
// flight that asks for just this has the last word.
func (e *entry) obtain(ctx context.Context, p *profile, d Demand) (*Token, Source, error) {
	for {
		if p.replaced.Load() {
			return nil, 0, errReplaced
		}
		t, f, err := e.join(p, d)
		if t != nil {
			return t, FromMemory, nil
		}
		if err != nil {
			return e.orLiving(d, err)
		}
		patience, stop := e.patience(ctx, d)
		select {
		case <-f.done:
			stop()
		case <-patience:
			if t := e.token.Load(); t != nil && t.serves(d, time.Now()) {
				return t, FromMemory, nil
			}
			continue
		case <-ctx.Done():
			stop()
			return nil, 0, ctx.Err()
		}
		if t, source, err, settled := e.settle(f, p, d); settled && err != nil {
			return e.orLiving(d, err)
		} else if settled {
			return t, source, nil
		}
	}
}

// settle says what the outcome of a flight that has landed means to a caller of
// p, if it says anything about this demand; if not, that is for the next flight.
func (e *entry) settle(f *flight, p *profile, d Demand) (t *Token, source Source, err *Error, settled bool) {
	if f.ahead && f.err != nil && f.err.Reason == ReasonStoreUnavailable {
		return nil, 0, nil, false // a renewal ahead may not go on alone; a flight for a caller may
	}
	ours := f.demand == d && f.profile.Credential == p.Credential
	switch now := time.Now(); {
	case f.token != nil && f.token.meets(d, now):
		return f.token, f.source, nil, true
	case f.err != nil && (ours || f.err.binds(d, f.demand, e.credentials(p))):
		return nil, 0, f.err, true
	case f.token != nil && ours:
		return nil, 0, unmet(p, d, f.token), true
	}
	return nil, 0, nil, false
}

// errReplaced never reaches a caller: Issue begins anew.
var errReplaced = errors.New("the configuration changed meanwhile")

// leastPatience is how long a caller waits for a better token than the living
// one in memory, which is in its last moments.
const leastPatience = 500 * time.Millisecond

// patience ends when the living token, if there is one that serves, is better
// than waiting on; half of the caller's own time at the most.
func (e *entry) patience(ctx context.Context, d Demand) (<-chan time.Time, func()) {
	now := time.Now()
	if t := e.token.Load(); t == nil || !t.serves(d, now) {
		return nil, func() {}
	}
	wait := leastPatience
	if deadline, ok := ctx.Deadline(); ok {
		wait = min(wait, deadline.Sub(now)/2)
	}
	timer := time.NewTimer(wait)
	return timer.C, func() { timer.Stop() }
}

// orLiving returns the token in memory if it serves, though it is in its last
// moments, and else the error.
func (e *entry) orLiving(d Demand, err *Error) (*Token, Source, error) {
	if t := e.token.Load(); t != nil && t.serves(d, time.Now()) {
		return t, FromMemory, nil
	}
	return nil, 0, err
}

// join returns a token that arrived in the meantime, or the flight to wait for,
// or why none is started.
func (e *entry) join(p *profile, d Demand) (*Token, *flight, *Error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	t := e.token.Load()
	if t != nil && (t.meets(d, now) || now.Before(e.quiet) && t.serves(d, now)) {
		return t, nil, nil
	}
	if e.flight != nil {
		return nil, e.flight, nil
	}
	full := p.life.known(now)
	if t != nil && t.remaining(now) > 0 {
		full = t.lifetime
	}
	if full > 0 && d.TooLong(full) {
		return nil, nil, lifetimeUnavailable(p.Profile, d, full)
	}
	if r := e.standing(p, now); r.Kind != NoFailure {
		return nil, nil, failureError(p.Profile, r.Failure, r.rest(now))
	}
	if e.verdict != nil && now.Before(e.verdictUntil) {
		return nil, nil, e.verdict
	}
	if !p.replaced.Load() {
		e.profile = p
	}
	return nil, e.launch(d, false), nil
}

// credentials are all whose refusal binds p here.
func (e *entry) credentials(p *profile) []string { return append(p.credentials(), e.request(p)) }

// request names what is asked for here. All jobs ask for the same.
func (e *entry) request(p *profile) string {
	_, slot, _ := strings.Cut(e.slot, "/")
	return p.request(cmp.Or(slot, e.slot))
}

// standing returns the failure that holds p back: the family's own, or that of
// its client.
func (e *entry) standing(p *profile, now time.Time) remembered {
	if e.failure.binds(now, e.credentials(p)...) {
		return e.failure
	}
	if e.isJob() {
		if r := p.gate.refused(e.request(p), now); r.Kind != NoFailure {
			return r
		}
	}
	return p.gate.standing(p.Profile, now)
}

// launch starts a flight for e.profile, ahead of need or not. e.mu is held.
func (e *entry) launch(d Demand, ahead bool) *flight {
	f := &flight{
		profile: e.profile,
		demand:  d,
		ahead:   ahead,
		done:    make(chan struct{}),
		changed: make(chan struct{}, 1),
		resets:  e.resets,
	}
	if !e.b.takeOff() {
		f.err = shuttingDown(e.profile.Profile)
		close(f.done)
		return f
	}
	e.dormant.Store(false)
	e.flight = f
	floor := e.floor
	go func() {
		defer e.b.flights.Done()
		defer e.tidy()
		defer e.land(f)
		defer func() {
			if r := recover(); r != nil {
				e.b.recovered(f.profile.Name, r)
				f.token, f.err = nil, &Error{
					Reason:     ReasonEndpointUnavailable,
					Text:       fmt.Sprintf("requesting a token for profile %s: %s", f.profile.Name, brokerFailed),
					RetryAfter: backoffFirst,
				}
			}
		}()
		f.fly(e, floor)
	}()
	return f
}

// noPerson is how soon a renewal that needs a person is looked at again: a
// sign-in brings it forward.
const noPerson = time.Minute

// land ends a flight: it says when to look for the next token, then lets the
// callers go.
func (e *entry) land(f *flight) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.flight = nil
	now, pause := time.Now(), time.Second
	e.verdict = nil
	switch {
	case f.err != nil:
		pause = backoffFirst
		if f.err.Reason == ReasonAuthorizationNeeded {
			pause = noPerson
			e.verdict, e.verdictUntil = f.err, now.Add(pollInterval)
		}
	case f.quiet > 0:
		pause = f.quiet
		e.quiet = now.Add(pause)
	}
	e.schedule(now, pause)
	close(f.done)
}

// adopt takes a token from the store into memory, unless memory already knows a
// newer one, and returns the one to serve. start is when the call that returned
// it was begun.
func (e *entry) adopt(s StoredToken, start time.Time) *Token {
	e.mu.Lock()
	defer e.mu.Unlock()
	if slices.Contains(e.dropped, s.Access.ID()) { // a reply from before the drop
		return nil
	}
	if old := e.token.Load(); old != nil {
		newer := old.generation > s.Generation
		// Reading the same token again never lengthens what memory knows,
		// or each reading would add the time that the reply took.
		same := old.generation == s.Generation && old.remaining(start) > 0
		if newer || same {
			return old
		}
	}
	t := newToken(s, start, e.profile.maxTokenAge())
	e.floor = max(e.floor, s.Generation)
	if e.failure.BacksOff() { // a rejection may be of another credential than the one that worked
		e.failure = remembered{}
	}
	e.token.Store(t)
	e.profile.life.saw(t, start)
	e.tell()
	if e.flight == nil { // nobody else looks for its successor
		e.schedule(time.Now(), 0)
	}
	return t
}

// adoptOwn takes a token into memory that the store has no generation for.
func (e *entry) adoptOwn(s StoredToken, start time.Time) *Token {
	e.mu.Lock()
	s.Generation = e.floor
	if t := e.token.Load(); t != nil {
		s.Generation = max(s.Generation, t.generation)
	}
	s.Generation++
	e.mu.Unlock()
	return e.adoptUnsaved(s, s.Generation, start)
}

// adoptUnsaved takes a token into memory under a generation that the store will
// exceed once it takes it in.
func (e *entry) adoptUnsaved(s StoredToken, g Generation, start time.Time) *Token {
	s.Generation = g
	s.Remaining = s.Lifetime // as of when it was asked for
	e.forgive()
	return e.adopt(s, start)
}

// backOff decides about a failure here, where the store cannot.
func (e *entry) backOff(f Failure) Failure {
	e.mu.Lock()
	defer e.mu.Unlock()
	f.Attempts = e.failure.Attempts + 1
	if f.BacksOff() {
		f.Rest = Backoff(f.Attempts, f.Rest, f.Jitter)
	}
	return f
}

// maxDropped bounds how many dropped tokens an entry remembers; the store
// knows all of them, this covers what is on its way.
const maxDropped = 64

// drop takes tokens out of service at once. Those who watch hear of it from tell,
// once the store knows: else it would give them the same token again. e.mu is held.
func (e *entry) drop(ids ...string) {
	for _, id := range ids {
		if t := e.token.Load(); t != nil && t.ID == id {
			e.token.Store(nil)
		}
		if !slices.Contains(e.dropped, id) {
			e.dropped = append(e.dropped, id)
		}
	}
	e.dropped = e.dropped[max(0, len(e.dropped)-maxDropped):]
}

func (e *entry) isDropped(id string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Contains(e.dropped, id)
}

// dropNow takes a token out of service.
func (e *entry) dropNow(id string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.drop(id)
}

// keep adopts a token that came beside a verdict, if it lives.
func (e *entry) keep(s *StoredToken, start time.Time) {
	if s != nil && s.Remaining > 0 {
		e.adopt(*s, start)
	}
}

// remember holds callers back until the failure has rested, unless a reset came
// after the flight began.
func (e *entry) remember(f *flight, failure Failure) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.resets == f.resets {
		e.failure = remembered{Failure: failure, since: time.Now()}
	}
}

// schedule sets the timer for the token's renewal, at least pause from now and
// not while a failure stands. e.mu is held.
func (e *entry) schedule(now time.Time, pause time.Duration) {
	t := e.token.Load()
	if e.retired.Load() || t == nil || t.remaining(now) <= 0 {
		return
	}
	wait := max(Until(now, t.renewTime), Until(now, e.quiet), pause)
	if r := e.standing(e.profile, now); r.Kind != NoFailure {
		rest := r.rest(now)
		if rest == Forever {
			return // a new credential or a reset schedules again
		}
		wait = max(wait, rest)
	}
	if e.timer == nil {
		e.timer = time.AfterFunc(wait, e.renew)
	} else {
		e.timer.Reset(wait)
	}
}

// renew looks for a successor of the token if somebody follows it, or has asked
// for it within its last life, and leaves it alone otherwise.
func (e *entry) renew() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.renewNow(false)
}

// renewNow is renew; asked tells that somebody asks for it now. e.mu is held.
func (e *entry) renewNow(asked bool) {
	now := time.Now()
	t := e.token.Load()
	if e.retired.Load() || e.flight != nil || t == nil || t.remaining(now) <= 0 {
		return
	}
	if r := e.standing(e.profile, now); r.Kind != NoFailure {
		e.schedule(now, 0)
		return
	}
	life := min(t.lifetime, e.profile.maxTokenAge())
	unwanted := !asked && e.isJob() // its work may be done
	if e.watches.Load() == 0 && (unwanted || now.Sub(time.Unix(e.used.Load(), 0)) > life) {
		e.dormant.Store(true)
		return
	}
	e.launch(Demand{NewerThan: t.generation}, true)
}

// rouse starts the renewal that was left undone because nobody asked.
func (e *entry) rouse() {
	if e.dormant.CompareAndSwap(true, false) {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.renewNow(true)
	}
}

// hear wakes a waiting flight, or fetches what another replica obtained.
func (e *entry) hear(c Change) {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := time.Now()
	if c.Reset {
		e.forget(now)
	}
	dropped := c.Dropped
	if t := e.token.Load(); t != nil && e.isEnded(c) { // the store may have had a later one
		dropped = append(slices.Clip(dropped), t.ID)
	}
	for _, id := range dropped {
		if !slices.Contains(e.dropped, id) {
			e.drop(id)
			e.tell()
			if !e.isJob() || IsJobFamily(e.family) { // else others do
				e.seeRevoked(id)
			}
			if e.tidier != nil && !e.retired.Load() {
				e.tidier.Reset(0) // its place is free for another job
			}
		}
	}
	e.verdict = nil
	if e.flight != nil {
		select {
		case e.flight.changed <- struct{}{}:
		default: // it has a change to look at already
		}
		return
	}
	missed := e.token.Load() != nil || e.watches.Load() > 0 || e.standing(e.profile, now).Kind != NoFailure
	switch {
	case c.Generation <= e.floor || e.retired.Load() || !e.concerns(c):
	case missed && !e.reloading:
		e.reloading = e.b.background(e.reload)
	case !missed && e.profile.consentUse() == ConsentRequired && !e.isJob():
		e.b.background(e.meetConsent)
	}
}

// reload fetches what another replica obtained. It takes no lease: news must
// never cost a token request.
func (e *entry) reload(ctx context.Context) {
	e.mu.Lock()
	e.reloading = false // what changes from here on needs another look
	e.mu.Unlock()
	start := time.Now()
	r, err := e.b.store.Look(ctx, e.family, e.slot)
	if err != nil {
		return // the next change or renewal brings it
	}
	e.keep(r.Token, start)
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.profile.consentUse() != NoConsent {
		e.b.consents.note(e.family, r.Consent, start)
	}
	if e.flight == nil {
		e.schedule(time.Now(), 0)
	}
}

func unmet(p *profile, d Demand, t *Token) *Error {
	if d.Not == t.ID {
		return &Error{
			Reason:     ReasonEndpointUnavailable,
			Text:       fmt.Sprintf("refreshing the token of profile %s: the authorization server returned the very token %s that was reported as rejected; if it keeps doing so, ask its operators why the resource server refuses that token", p.Name, t.ID),
			RetryAfter: noProgress,
		}
	}
	if d.Lifetime <= t.lifetime-Margin(t.lifetime) {
		return &Error{
			Reason:     ReasonEndpointUnavailable,
			Text:       fmt.Sprintf("requesting a token for profile %s: the token that came has %v left, too little to hand out; ask again", p.Name, max(t.remaining(time.Now()), 0).Round(time.Second)),
			RetryAfter: backoffFirst,
		}
	}
	return lifetimeUnavailable(p.Profile, d, t.lifetime)
}
