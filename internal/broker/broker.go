// Package broker is the heart of the service: it answers from memory, lets one
// flight per token at a time talk to a token endpoint, and agrees with other
// replicas through a Store about who that is and what came back.
//
// A request states a demand (lives at least so long, is not the token that was
// refused). If the token in memory meets it, that is the answer: no lock, no
// I/O. If not, the caller joins the one flight for that token. The flight is
// detached from its callers: one that leaves stops waiting and cancels nothing.
// It acquires the family's lease from the store, which may answer with a token
// that another replica obtained; else it asks the Issuer once, saves what came,
// and only then hands it out. A failure is remembered by all, bound to what was
// tried, so that nobody hammers an endpoint or locks an account.
//
// Tokens in use are renewed before they end, behind their callers' backs. A
// valid token outlives any outage; an expired one is never served.
//
// The package knows no gRPC, Redis, HTTP or YAML. What it needs it asks for
// through two interfaces: Store and Issuer.
package broker

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Options of a Broker. The zero value is ready to use.
type Options struct {
	// Lease is how long a dead replica can hold others up; zero means 3 s.
	Lease time.Duration
	// Logger gets one line per attempt at an endpoint; nil discards them.
	Logger *slog.Logger
	// Observe is told of each attempt at an endpoint; nil is nobody. It must
	// not block.
	Observe func(Attempt)
	// SecretFiles writes new client secrets to files; nil is for a process that
	// writes none.
	SecretFiles SecretFiles
}

// Attempt is one token request as it ended.
type Attempt struct {
	Profile string
	// Outcome is "success" or the IssueErrorKind's name.
	Outcome  string
	Duration time.Duration
}

// Broker hands out tokens for profiles. All its methods may be called from any
// goroutine.
type Broker struct {
	store   Store
	lease   time.Duration
	log     *slog.Logger
	observe func(Attempt)
	// secretFiles may be nil.
	secretFiles SecretFiles

	// configuring guards configured, which are the profiles as Configure was
	// given them, and is held while they are put in force.
	configuring sync.Mutex
	configured  []*Profile

	// profiles by name, replaced as a whole; the map is never written to.
	profiles atomic.Pointer[map[string]*profile]

	// mu guards entries, which holds what memory knows, for all families that
	// the configuration reaches, and the gates by identity and by the store's
	// record of the client. It is never held across I/O and never taken to
	// answer from memory.
	mu      sync.Mutex
	entries roster
	gates   map[string]*gate
	clients map[string]*gate
	// keepers by the record of client secrets that they keep; Configure alone
	// replaces the map.
	keepers map[string]*keeper

	reach   reach
	unsaved unsaved
	// consents are those that were seen last.
	consents consents

	// stop ends what flights do for their callers.
	ctx  context.Context
	stop context.CancelFunc
	// life guards closed, and flights.Add against a Wait under way.
	life        sync.Mutex
	closed      bool
	flights     sync.WaitGroup
	unsubscribe func()
}

// profile is a Profile with what memory holds for it.
type profile struct {
	*Profile
	own  *entry
	gate *gate
	// keeper of its client secrets, or nil; informed tells that they were known
	// when it was made.
	keeper   *keeper
	informed bool

	// jobs with a token of their own, and the line of those that have a place in
	// the consent's record.
	jobs        jobs
	consentLane lane
	// life of its tokens.
	life *life
	// scopesKey is scopeKey of its scopes.
	scopesKey string

	// replaced by a later configuration: it must not become an entry's
	// profile again. Only Configure writes it.
	replaced atomic.Bool

	// subsets of the scopes that callers asked for, by scopeKey.
	subsets sync.Map // string -> *entry
	// served counts answers by Source.
	served [Uncoordinated + 1]atomic.Uint64
	// named and dedicated count the answers to those that named a job.
	named, dedicated atomic.Uint64
	// last is when the last caller was served, in Unix seconds; zero if none was.
	last atomic.Int64
}

// maxSubsets bounds the scope subsets in use per profile: each is a token, and a
// token request, of its own.
const maxSubsets = 256

// New returns a broker without profiles. Close it when done.
func New(store Store, o Options) *Broker {
	b := &Broker{
		store:   store,
		lease:   orDefault(o.Lease, 3*time.Second),
		log:     o.Logger,
		observe: o.Observe,

		secretFiles: o.SecretFiles,

		entries: make(roster),
		gates:   make(map[string]*gate),
	}
	if b.log == nil {
		b.log = slog.New(slog.DiscardHandler)
	}
	if b.observe == nil {
		b.observe = func(Attempt) {}
	}
	b.ctx, b.stop = context.WithCancel(context.Background())
	b.profiles.Store(&map[string]*profile{})
	b.unsubscribe = store.Subscribe(b.changed)
	return b
}

// Configure replaces all profiles at once. Tokens and remembered failures stay
// wherever what would be issued is the same as before. Flights of profiles that
// went away finish and are saved, and are never served.
func (b *Broker) Configure(configured []*Profile) {
	b.configuring.Lock()
	defer b.configuring.Unlock()
	b.configured = configured
	b.startKeepers(configured)
	b.replace(configured)
}

// replace puts profiles in force, with the client secrets that are known of them.
// b.configuring is held.
func (b *Broker) replace(configured []*Profile) {
	presenting := make([]*profile, len(configured))
	for i, c := range configured { // while callers still have the old ones
		presenting[i] = b.presenting(c)
	}
	b.mu.Lock()
	defer b.mu.Unlock()

	before := *b.profiles.Load()
	for _, p := range before {
		p.replaced.Store(true)
	}
	next := make(map[string]*profile, len(configured))
	entries := make(roster, len(configured))
	gates := make(map[string]*gate, len(configured))
	clients := make(map[string]*gate, len(configured))
	for _, p := range presenting {
		c := p.Profile
		if p.gate = cmp.Or(gates[c.Identity], b.gates[c.Identity]); p.gate == nil {
			p.gate = newGate()
		}
		gates[c.Identity], clients[c.client()] = p.gate, p.gate
		family, slot := c.family(canonical(c.Scopes))
		if p.own = cmp.Or(entries.find(family, slot), b.entries.find(family, slot)); p.own == nil {
			p.own = newEntry(b, family, slot, c.Scopes)
		}
		p.life, p.consentLane, p.scopesKey = newLife(), make(lane, 1), scopeKey(canonical(c.Scopes))
		if old := before[c.Name]; old != nil {
			p.inherit(old)
		}
		for e := range p.entries() {
			entries.add(e)
			e.adoptProfile(p)
		}
		next[c.Name] = p
	}
	for family, es := range b.entries {
		for _, e := range es {
			if entries.find(family, e.slot) == nil {
				e.retire()
			}
		}
	}
	now := time.Now()
	for identity, g := range b.gates {
		if gates[identity] == nil && g.holdsAnything(now) {
			gates[identity] = g // a profile that comes back must not try a refused password again
		}
	}
	b.consents.retain(entries)
	b.entries, b.gates, b.clients = entries, gates, clients
	b.profiles.Store(&next)
}

// presenting is a profile with the client secrets that its keeper knows.
func (b *Broker) presenting(c *Profile) *profile {
	p := &profile{Profile: c}
	if c.Rotation == nil {
		return p
	}
	b.mu.Lock()
	p.keeper = b.keepers[c.secretsFamily()]
	b.mu.Unlock()
	if p.keeper != nil {
		p.informed = p.keeper.isKnown()
		p.Profile = b.with(c, p.keeper.secrets())
	}
	return p
}

// inherit takes over what old, the profile of the same name before, has counted
// and the subsets of its scopes that it still leads to.
func (p *profile) inherit(old *profile) {
	for i := range p.served {
		p.served[i].Store(old.served[i].Load())
	}
	p.last.Store(old.last.Load())
	p.named.Store(old.named.Load())
	p.dedicated.Store(old.dedicated.Load())
	p.consentLane = old.consentLane
	if old.Identity != p.Identity {
		return
	}
	if slices.Equal(old.Scopes, p.Scopes) && old.DefaultLifetime == p.DefaultLifetime {
		p.life = old.life
	}
	p.inheritJobs(old)
	old.subsets.Range(func(key, value any) bool {
		if e := value.(*entry); !e.retired.Load() && len(without(e.scopes, p.Scopes)) == 0 {
			p.subsets.Store(key, e)
		}
		return true
	})
}

// Ask says which token is meant.
type Ask struct {
	// Profile by its name.
	Profile string
	// Scopes are a subset of the profile's; none means all of them.
	Scopes []string
	// Job has a token of its own, which no other job ever gets; empty means the
	// token that everybody shares.
	Job string
	// Named tells that a job was named, dedicated or not. It is counted.
	Named bool
}

// Issue returns a token that meets the demand, waiting for one until ctx ends.
// The error is an *Error or ctx's.
func (b *Broker) Issue(ctx context.Context, ask Ask, d Demand) (*Token, Source, error) {
	for {
		p, e, err := b.find(ask)
		if err != nil {
			return nil, 0, err
		}
		t, source, err := e.serve(ctx, p, d)
		if errors.Is(err, errReplaced) {
			continue // under a new configuration the answer may be another
		}
		if err == nil {
			p.countJob(ask)
		}
		return t, source, err
	}
}

// countJob counts an answer to who named a job.
func (p *profile) countJob(ask Ask) {
	switch {
	case ask.Job != "":
		p.dedicated.Add(1)
	case ask.Named:
		p.named.Add(1)
	}
}

// find returns the profile and the entry that are meant.
func (b *Broker) find(ask Ask) (*profile, *entry, error) {
	p, err := b.profile(ask.Profile)
	if err != nil {
		return nil, nil, err
	}
	e := p.own
	switch {
	case ask.Job != "":
		if e, err = b.job(p, ask); err != nil {
			return nil, nil, err
		}
	case len(ask.Scopes) > 0:
		if e, err = b.subset(p, ask.Scopes); err != nil {
			return nil, nil, err
		}
	}
	return p, e, nil
}

// serve returns a token that meets the demand of a caller of p; errReplaced if p
// was replaced before there was one.
func (e *entry) serve(ctx context.Context, p *profile, d Demand) (*Token, Source, error) {
	now := time.Now()
	e.touch(now)
	t, source := e.token.Load(), FromMemory
	var err error
	if t != nil && t.meets(d, now) {
		if e.dormant.Load() {
			e.rouse()
		}
	} else if t, source, err = e.obtain(ctx, p, d.rounded()); p.replaced.Load() && ctx.Err() == nil && !errors.Is(err, errClosing) {
		return nil, 0, errReplaced
	} else if err != nil {
		return nil, 0, err
	}
	p.handedOut(source, now)
	return t, source, nil
}

// handedOut notes that a caller was served.
func (p *profile) handedOut(source Source, now time.Time) {
	p.served[source].Add(1)
	if s := now.Unix(); p.last.Load() != s { // as in entry.touch
		p.last.Store(s)
	}
}

func (b *Broker) profile(name string) (*profile, error) {
	if p := (*b.profiles.Load())[name]; p != nil {
		return p, nil
	}
	return nil, &Error{Reason: ReasonProfileUnknown, Text: fmt.Sprintf("there is no profile %q", name)}
}

// subset returns the entry for some of the profile's scopes.
func (b *Broker) subset(p *profile, scopes []string) (*entry, error) {
	scopes = canonical(scopes)
	key := scopeKey(scopes)
	if e, ok := p.subsets.Load(key); ok && !e.(*entry).retired.Load() {
		return e.(*entry), nil
	}
	if err := p.has(scopes); err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	family, slot := p.family(scopes)
	e := b.entries.find(family, slot)
	if e == nil {
		if !b.roomForSubset(p) {
			return nil, &Error{
				Reason:     ReasonCallerThrottled,
				Text:       fmt.Sprintf("profile %s already has tokens for %d subsets of its scopes, the most it may; ask for the same subsets again, or for none", p.Name, maxSubsets),
				RetryAfter: time.Minute,
			}
		}
		e = newEntry(b, family, slot, scopes)
		e.adoptProfile(p)
		if (*b.profiles.Load())[p.Name] == p {
			b.entries.add(e)
		} else { // p was replaced a moment ago: serve this call, keep nothing
			e.retire()
		}
	}
	p.subsets.Store(key, e)
	return e, nil
}

// has refuses scopes that the profile does not have.
func (p *profile) has(scopes []string) error {
	if unknown := without(scopes, p.Scopes); len(unknown) > 0 {
		return &Error{
			Reason: ReasonInvalidRequest, Field: "scopes",
			Text: fmt.Sprintf("scope %q is not among those of profile %s; ask for some of those, or for none to get all", unknown[0], p.Name),
		}
	}
	return nil
}

// roomForSubset makes room by forgetting subsets that nobody uses any more.
// b.mu is held.
func (b *Broker) roomForSubset(p *profile) bool {
	n, now := 0, time.Now()
	p.subsets.Range(func(key, value any) bool {
		e := value.(*entry)
		if !e.spent(now) {
			n++
			return true
		}
		p.subsets.Delete(key)
		if !b.reached(e) {
			b.entries.remove(e)
			e.retire()
		}
		return true
	})
	return n < maxSubsets
}

// reached reports whether any profile still leads to e: profiles of one identity
// share their entries.
func (b *Broker) reached(e *entry) bool {
	for _, p := range *b.profiles.Load() {
		if slices.Contains(p.all(), e) {
			return true
		}
	}
	return false
}

// Reset forgets the failures remembered for a profile, so that the next call
// tries again.
func (b *Broker) Reset(ctx context.Context, name string) error {
	p, err := b.profile(name)
	if err != nil {
		return err
	}
	// The client's own record last: whoever hears of that one forgets what it
	// holds for families that only it knows.
	families := []string{}
	for _, e := range p.all() {
		families = append(families, e.family)
	}
	slices.Sort(families)
	for _, family := range append(slices.Compact(families), p.client()) {
		if err := b.store.Reset(ctx, family); err != nil {
			return storeUnavailable(p.Profile, "forgetting the failure of", err)
		}
	}
	p.gate.reset()
	for e := range p.entries() {
		e.forgetFailure()
	}
	return nil
}

// all entries of the profile but those of jobs, its own first.
func (p *profile) all() []*entry {
	es := []*entry{p.own}
	p.subsets.Range(func(_, value any) bool {
		if e := value.(*entry); e != p.own {
			es = append(es, e)
		}
		return true
	})
	return es
}

// Profiles returns the names of all profiles, sorted.
func (b *Broker) Profiles() []string { return slices.Sorted(maps.Keys(*b.profiles.Load())) }

// changed hears from the store that a family is no longer as it was.
func (b *Broker) changed(c Change) {
	b.mu.Lock()
	entries := slices.Clone(b.entries[c.Family])
	g := b.clients[c.Family]
	k := b.keepers[c.Family]
	b.mu.Unlock()
	if k != nil {
		k.hear()
	}
	for _, e := range entries {
		e.hear(c)
	}
	if g != nil && c.Reset {
		b.forgive(g)
	}
	if g != nil {
		g.hear()
	}
}

// forgive is what a reset of a client, somewhere in the fleet, does here: also
// the failures of families that only this replica knows are forgotten. Resets
// of families do not come back to clients, so this ends.
func (b *Broker) forgive(g *gate) {
	g.reset()
	now := time.Now()
	for _, p := range *b.profiles.Load() {
		if p.gate != g {
			continue
		}
		for e := range p.entries() {
			if e.failed(now) {
				b.background(func(ctx context.Context) {
					_ = b.store.Reset(ctx, e.family) // its own record says so again when it is asked
				})
			}
			e.forgetFailure()
		}
	}
}

// backgroundTimeout covers a few transitions and one request.
const backgroundTimeout = 15 * time.Second

// background runs what nobody waits for, and Close does. It returns false when
// the broker is closed.
func (b *Broker) background(run func(context.Context)) bool {
	if !b.takeOff() {
		return false
	}
	go func() {
		defer b.flights.Done()
		defer func() {
			if r := recover(); r != nil {
				b.log.Error("panic in the background", "type", fmt.Sprintf("%T", r), "stack", string(debug.Stack()))
			}
		}()
		ctx, cancel := context.WithTimeout(b.ctx, backgroundTimeout)
		defer cancel()
		run(ctx)
	}()
	return true
}

// takeOff registers a flight, unless the broker is closed.
func (b *Broker) takeOff() bool {
	b.life.Lock()
	defer b.life.Unlock()
	if b.closed {
		return false
	}
	b.flights.Add(1)
	return true
}

// Drain gives back what flights hold and starts no more. Callers that wait get
// SHUTTING_DOWN, so that they turn to another replica; those whom memory
// can answer are answered still.
func (b *Broker) Drain() {
	b.life.Lock()
	b.closed = true
	b.life.Unlock()
	b.stop()
}

// Close drains, and returns when nothing of the broker runs any more.
func (b *Broker) Close() {
	b.Drain()
	b.unsubscribe()
	b.flights.Wait()
	b.Configure(nil)
}

func newOwner() string { return rand.Text() }

// LastServed is when the call was made that got a token of the profile last, to
// the second; zero if none has since this process started.
func (b *Broker) LastServed(name string) time.Time {
	if p := (*b.profiles.Load())[name]; p != nil && p.last.Load() != 0 {
		return time.Unix(p.last.Load(), 0)
	}
	return time.Time{}
}

// Scopes returns the profile's own scopes; none if the server decides, or there
// is no such profile. They must not be changed.
func (b *Broker) Scopes(name string) []string {
	if p := (*b.profiles.Load())[name]; p != nil {
		return p.Scopes
	}
	return nil
}

// Has reports whether there is a profile of that name.
func (b *Broker) Has(name string) bool { return (*b.profiles.Load())[name] != nil }
