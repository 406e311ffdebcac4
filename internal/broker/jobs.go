package broker

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A dedicated token is a job's own. It is obtained, shared by replicas and renewed
// like any other, in a slot that is the job's: of a family that is the job's, too,
// or of the consent's, where there is a refresh token, which must have one record
// only. What is different is that
//
//   - nobody else ever gets it: not even where the server gives one token twice,
//   - a job has one token at a time: no replica obtains one that the others do not
//     know, so without the store there is none,
//   - it ends once: after its revocation there is no other one for the job,
//   - nobody renews it that nobody follows,
//   - it leaves nothing behind: neither here nor in the store.

const (
	// defaultMaxDedicated dedicated tokens of a profile live here at a time.
	defaultMaxDedicated = 10_000
	// maxInConsent of a profile with refresh tokens: all are in one record.
	maxInConsent = 1000
	// jobRequests of one client are under way at a time for dedicated jobs: enough
	// to have 100 tokens in a second from an endpoint that takes 150 ms, and few
	// enough connections for the smallest one. All others wait in line, without a
	// lease. What is shared does not wait with them.
	jobRequests = 16
	// lineDeadline is for how long a flight waits for its turn: there must be time
	// left for the request.
	lineDeadline = flightDeadline - 10*time.Second
	// jobIdle is how soon an entry without a token is looked at.
	jobIdle = time.Minute
	// repeatPause is how long a server that has given a token twice is left alone:
	// those whose tokens say no more than the second then give another one.
	repeatPause = 1100 * time.Millisecond
)

// jobs of a profile that have, or wait for, a token here.
type jobs struct {
	entries sync.Map // jobKey -> *entry
	count   atomic.Int64
}

type jobKey struct{ id, scopes string }

// maxDedicated is how many dedicated tokens may live here.
func (p *Profile) maxDedicated() int64 {
	most := int64(p.MaxDedicated)
	if most <= 0 {
		most = defaultMaxDedicated
	}
	if p.RefreshTokens {
		most = min(most, maxInConsent)
	}
	return most
}

// jobName is what the store calls a job. Whoever may use the profile and knows the
// id is the job: a retry comes from another machine.
func (p *Profile) jobName(id string) string {
	return jobFamilyPrefix + Identity(p.Identity, p.Name, "job", id)
}

// jobPlace names the family and the slot of a job's token for these scopes.
func (p *Profile) jobPlace(id string, scopes []string) (family, slot string) {
	name := p.jobName(id)
	slot = name + "/" + Identity(append([]string{p.Identity}, scopes...)...)
	if p.RefreshTokens {
		family, _ = p.family(scopes)
		return family, slot
	}
	return name, slot
}

// isOf reports whether a slot is of the job, or the one slot that is meant.
func isOf(slot, job string) bool { return slot == job || JobOf(slot) == job }

// job returns the entry for a job's token.
func (b *Broker) job(p *profile, ask Ask) (*entry, error) {
	scopes, key := p.Scopes, jobKey{ask.Job, p.scopesKey}
	if len(ask.Scopes) > 0 {
		scopes = canonical(ask.Scopes)
		key.scopes = scopeKey(scopes)
	}
	if e, ok := p.jobs.entries.Load(key); ok && !e.(*entry).retired.Load() {
		return e.(*entry), nil
	}
	if err := p.has(scopes); err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	family, slot := p.jobPlace(ask.Job, canonical(scopes))
	if e := b.entries.find(family, slot); e != nil {
		return e, nil
	}
	if most := p.maxDedicated(); p.jobs.count.Load() >= most {
		return nil, &Error{
			Reason:     ReasonCallerThrottled,
			Text:       fmt.Sprintf("profile %s already has %d dedicated tokens on this replica, the most it may: end jobs that are done with RevokeToken, ask without job.dedicated for the token that everybody shares, or have max_dedicated_tokens of the profile raised", p.Name, most),
			RetryAfter: time.Minute,
		}
	}
	e := newEntry(b, family, slot, scopes)
	e.job = key
	e.adoptProfile(p)
	if (*b.profiles.Load())[p.Name] != p { // as in subset
		e.retire()
		return e, nil
	}
	b.entries.add(e)
	p.jobs.entries.Store(key, e)
	p.jobs.count.Add(1)
	e.tidier = time.AfterFunc(jobIdle, e.tidy)
	return e, nil
}

// isJob reports whether the entry is for a dedicated token.
func (e *entry) isJob() bool { return e.job.id != "" }

// tidy forgets the entry of a job that has no token, and waits for none, and else
// looks again when it may be so.
func (e *entry) tidy() {
	if !e.isJob() {
		return
	}
	b := e.b
	b.mu.Lock()
	defer b.mu.Unlock()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.retired.Load() {
		return
	}
	now := time.Now()
	if e.idle(now) && !(e.failure.BacksOff() && e.failure.rest(now) > 0) {
		e.retireNow()
		b.entries.remove(e)
		if p := (*b.profiles.Load())[e.profile.Name]; p != nil && p.jobs.entries.CompareAndDelete(e.job, e) {
			p.jobs.count.Add(-1)
		}
		return
	}
	wait := jobIdle
	if t := e.token.Load(); t != nil && t.remaining(now) > 0 {
		wait = t.remaining(now)
	}
	e.tidier.Reset(wait)
}

// inheritJobs takes over the jobs of the profile of the same name before.
func (p *profile) inheritJobs(old *profile) {
	old.jobs.entries.Range(func(key, value any) bool {
		if e := value.(*entry); !e.retired.Load() && len(without(e.scopes, p.Scopes)) == 0 {
			p.jobs.entries.Store(key, e)
			p.jobs.count.Add(1)
		}
		return true
	})
}

// entries are all that the profile leads to.
func (p *profile) entries() iter.Seq[*entry] {
	return func(yield func(*entry) bool) {
		for _, e := range p.all() {
			if !yield(e) {
				return
			}
		}
		p.jobs.entries.Range(func(_, value any) bool { return yield(value.(*entry)) })
	}
}

// endJob drops the tokens of a job, and has no other one obtained for it: all of
// them, or what was asked for with these scopes; only if the token with this id is
// in service, if it is not empty.
func (b *Broker) endJob(ctx context.Context, p *profile, ask Ask, id string) (Revocation, error) {
	if err := p.has(ask.Scopes); err != nil {
		return Revocation{}, err
	}
	family, slot := p.jobPlace(ask.Job, canonical(ask.Scopes))
	ends := p.jobName(ask.Job)
	if len(ask.Scopes) > 0 {
		ends = slot
	}
	// Here at once, whatever comes of the rest.
	known := make(map[string]Secret)
	b.mu.Lock()
	var entries []*entry
	for _, e := range b.entries[family] {
		if isOf(e.slot, ends) {
			entries = append(entries, e)
		}
	}
	b.mu.Unlock()
	drop := Drop{Family: family, Operation: newOwner(), Token: id, Job: ends, Remember: rememberDropped}
	for _, e := range entries {
		e.mu.Lock()
		if t := e.token.Load(); t != nil && (id == "" || t.ID == id) {
			known[t.ID] = t.Access
			e.drop(t.ID)
			e.ends = ends
		}
		drop.Floor = max(drop.Floor, e.floor)
		e.mu.Unlock()
	}
	turn := turn{lane: p.gate.ends} // all of them may end at once
	turn.await(ctx, nil, nil)
	defer turn.leave()
	if !turn.has {
		for _, e := range entries { // whoever looks has the store told
			e.announce()
		}
		return Revocation{}, ctx.Err()
	}
	var dropped Dropped
	err := thrice(ctx, func(ctx context.Context) (err error) {
		dropped, err = b.store.Drop(ctx, drop)
		return err
	})
	b.reach.observe(err)
	for _, e := range entries {
		e.announce()
	}
	for _, t := range dropped.Access {
		known[t.ID()] = t
	}
	if err == nil { // else they know what the store does not
		for _, e := range entries {
			e.tidy()
		}
	}
	var r Revocation
	at := newEntry(b, family, slot, nil)
	at.profile = p
	for tokenID, t := range known {
		confirmed, _ := b.revoke(ctx, p, at, t, err == nil)
		r.Confirmed = confirmed && (r.TokenID == "" || r.Confirmed)
		r.TokenID = tokenID
	}
	if _, ended := known[id]; ended { // with others, maybe
		r.TokenID = id
	}
	b.log.Info("job ended", "profile", p.Name, "token_id", r.TokenID, "tokens", len(known), "confirmed", r.Confirmed)
	if err != nil {
		failed := storeUnavailable(p.Profile, "revoking the token of", err)
		failed.Text = fmt.Sprintf("ending job %q of profile %s: the store is out of reach, so other replicas may hand its token out until it is back; this one does not any more; end it again", ask.Job, p.Name)
		return r, failed
	}
	return r, nil
}

// ended takes note of the job's end.
func (f *flight) ended(e *entry) {
	e.mu.Lock()
	if t := e.token.Load(); t != nil {
		e.drop(t.ID)
		e.tell()
	}
	e.mu.Unlock()
	f.err = jobEnded(f.profile.Profile, e.job.id)
}

// hasEnded asks the store whether the job has ended.
func (e *entry) hasEnded(ctx context.Context) (ended bool) {
	_ = detached(ctx, func(ctx context.Context) error {
		r, err := e.b.store.Look(ctx, e.family, e.slot)
		ended = err == nil && r.Ended
		return err
	})
	return ended
}

// owner is what the store calls whoever a token of the entry is for.
func (e *entry) owner() string {
	if e.isJob() {
		return e.slot
	}
	return e.family + " " + e.slot
}

// isAnothersHere reports whether the token that came is, by what memory knows,
// somebody else's already: what a job has, nobody else may get, and a job nothing
// that anybody has. What was obtained without the store nobody else could tell.
func (a *attempt) isAnothersHere(t StoredToken) bool {
	e, id := a.e, t.Access.ID()
	for x := range a.f.profile.entries() {
		if known := x.token.Load(); x != e && known != nil && known.ID == id && (x.isJob() || e.isJob()) {
			return true
		}
	}
	return false
}

// ownLate has the fleet know whose the token is, after it was saved. If it is a
// job's that another replica has told of, operators hear of it: the server gives
// tokens twice.
func (a *attempt) ownLate(t StoredToken) {
	a.e.b.background(func(ctx context.Context) {
		if another, _ := a.isAnothers(ctx, t); another {
			a.e.b.log.Warn("the token endpoint answered with a token that a job has", "profile", a.f.profile.Name, "token_id", t.Access.ID())
		}
	})
}

// isAnothers is isAnothersHere by what the fleet knows. An error says that nobody
// knows.
func (a *attempt) isAnothers(ctx context.Context, t StoredToken) (another bool, err error) {
	defer func() {
		if value := recover(); value != nil { // the refresh token that came must not be lost to it
			a.e.b.recovered(a.f.profile.Name, value)
			another, err = false, errors.New(brokerFailed)
		}
	}()
	e, id := a.e, t.Access.ID()
	if a.alone() {
		return false, nil
	}
	var owner string
	ask := detached // what is shared does without an answer
	if e.isJob() {
		ask = thrice
	}
	err = ask(ctx, func(ctx context.Context) (err error) {
		owner, err = e.b.store.Own(ctx, id, e.owner(), t.Lifetime+rememberRepeated)
		return err
	})
	switch {
	case err != nil:
		return false, err
	case owner == e.owner():
		return false, nil
	}
	return e.isJob() || strings.HasPrefix(owner, jobFamilyPrefix), nil
}

// rememberRepeated is how much longer than a token lives it is known whose it was,
// for clocks that differ.
const rememberRepeated = time.Minute

// codeRepeated marks the failure of a job whose token was another's already.
const codeRepeated = "token_repeated"

// repeated deals with a token that is somebody else's, or whose nobody knows if err
// is not nil. It is never revoked: it is in use. A refresh token that came with it
// is ours all the same.
func (a *attempt) repeated(ctx context.Context, g *Grant, r Result, err error) error {
	f, e := a.f, a.e
	text := "the token endpoint answered with a token that it has given before"
	if err != nil {
		text = "the store did not say whether the token that came is another's"
	}
	a.unusable = &IssueError{Kind: Malformed, Outcome: Answered, Text: text, Err: err}
	a.report("token request", a.unusable, "token_id", r.Token.Access.ID())
	if r.onlyOurs() {
		kept, saveErr := a.save(ctx, r)
		a.pass.succeed(ctx)
		if again := a.settled(ctx, &Grant{RefreshToken: g.RefreshToken}, r, kept, saveErr); again != nil {
			return again
		}
		e.forgive()
	} else {
		a.pass.succeed(ctx)
	}
	f.err = nil
	switch f.repeats++; {
	case err != nil:
		a.giveBack(ctx)
		f.err = storeUnavailable(f.profile.Profile, "requesting a token for", err)
	case f.repeats == 1:
		a.giveBack(ctx)
		f.pause(ctx, repeatPause+scale(repeatPause, between(0, 0.2)))
		return errAgain
	default:
		failure := Failure{Kind: Transient, Text: text, Outcome: Answered, Jitter: between(0.8, 1.2)}
		if e.isJob() {
			failure.Code = codeRepeated
		}
		decided, err := a.tell(ctx, failure)
		if err != nil || decided.Kind == NoFailure {
			decided = e.backOff(failure)
		}
		e.remember(f, decided)
		f.err = failureError(f.profile.Profile, decided, decided.Rest)
	}
	return nil
}

func jobEnded(p *Profile, id string) *Error {
	return &Error{
		Reason: ReasonJobEnded,
		Text:   fmt.Sprintf("requesting a token for profile %s: job %q has ended, because RevokeToken was called for it; work that goes on asks under another job id", p.Name, id),
	}
}

func dedicatedUnavailable(p *Profile, why string) *Error {
	return &Error{
		Reason: ReasonDedicatedUnavailable,
		Text:   fmt.Sprintf("requesting a dedicated token for profile %s: %s, so the job cannot have one of its own; ask without job.dedicated for the token that everybody shares", p.Name, why),
	}
}

// lane lets so many go at a time, and the others in the order in which they came: a
// channel serves its senders first come, first served.
type lane chan struct{}

// turn is a flight's place in a lane; none is needed where there is no lane.
type turn struct {
	lane lane
	has  bool
}

// try takes the turn if it is free, and reports whether the flight has it.
func (t *turn) try() bool {
	if t.lane == nil || t.has {
		return true
	}
	select {
	case t.lane <- struct{}{}:
		t.has = true
	default:
	}
	return t.has
}

// await waits for the turn, or until there is news, or ctx ends. It reports false
// when the wait is over without any of that.
func (t *turn) await(ctx context.Context, news <-chan struct{}, over <-chan time.Time) bool {
	select {
	case t.lane <- struct{}{}:
		t.has = true
	case <-news:
	case <-ctx.Done():
	case <-over:
		return false
	}
	return true
}

func (t *turn) leave() {
	if t.has {
		t.has = false
		<-t.lane
	}
}

// laneOf is where flights of the entry wait, or nil. All tokens of one consent are
// under one lease, so only one of them needs to be at it.
func (f *flight) laneOf(e *entry) lane {
	switch {
	case !e.isJob():
		return nil
	case f.profile.RefreshTokens:
		return f.profile.consentLane
	}
	return f.profile.gate.jobs
}

// learnedInLine is what stands in the flight's way by what others have met since it
// began to wait.
func (f *flight) learnedInLine(e *entry) *Error {
	now := time.Now()
	if full := f.profile.life.known(now); full > 0 && f.demand.TooLong(full) {
		return lifetimeUnavailable(f.profile.Profile, f.demand, full)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if r := e.standing(f.profile, now); r.Kind != NoFailure {
		return failureError(f.profile.Profile, r.Failure, r.rest(now))
	}
	return nil
}

// waitedInVain tells a caller whose turn has not come.
func waitedInVain(p *Profile) *Error {
	return &Error{
		Reason:     ReasonEndpointThrottled,
		Text:       fmt.Sprintf("requesting a dedicated token for profile %s: so many jobs ask for one that its turn has not come within %v; ask again, or have the jobs begin one after another", p.Name, lineDeadline),
		RetryAfter: scale(backoffFirst, between(1, 2)),
	}
}

// life is how long the tokens of a profile live, as far as it was seen here. It is
// believed until the token that showed it is over.
type life struct {
	mu    sync.Mutex
	full  time.Duration
	until time.Time
	// probe is held by the one request that finds out.
	probe lane
}

func newLife() *life { return &life{probe: make(lane, 1)} }

// saw takes note of a token: what lives longest counts.
func (l *life) saw(t *Token, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if t.lifetime >= l.full || Until(now, l.until) <= 0 {
		l.full, l.until = t.lifetime, t.ExpireTime
	}
}

// known is how long a new token would live, or zero.
func (l *life) known(now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if Until(now, l.until) <= 0 {
		return 0
	}
	return l.full
}

// probing has one request at a time find out how long tokens live, for those who
// want them to live long: thousands who ask for too much cost one request. It
// returns what is known by then.
func (l *life) probing(ctx context.Context) (full time.Duration, done func()) {
	if full := l.known(time.Now()); full > 0 {
		return full, func() {}
	}
	t := turn{lane: l.probe}
	t.await(ctx, nil, nil)
	if full := l.known(time.Now()); full > 0 || !t.has {
		t.leave()
		return full, func() {}
	}
	return 0, t.leave
}

// hopeless ends the attempt if no new token would live as long as is demanded.
func (a *attempt) hopeless(ctx context.Context, full time.Duration) bool {
	f := a.f
	if full == 0 || !f.demand.TooLong(full) {
		return false
	}
	a.giveBack(ctx)
	f.err = lifetimeUnavailable(f.profile.Profile, f.demand, full)
	return true
}

// concerns reports whether a change is about the entry's token, as far as it says.
func (e *entry) concerns(c Change) bool {
	return !e.isJob() || c.Slots == nil || slices.Contains(c.Slots, e.slot)
}

// isEnded reports whether a change says that the entry's job has ended.
func (e *entry) isEnded(c Change) bool {
	return e.isJob() && slices.ContainsFunc(c.Ended, func(job string) bool { return isOf(e.slot, job) })
}
