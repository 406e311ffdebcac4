package broker

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"sync"
	"time"
)

// keeper looks after the client secrets of one client whose profiles have a
// Rotation: it has the profiles present what the store's record says, and renews
// what is about to end. Every replica has one; they agree by the record.
type keeper struct {
	b       *Broker
	profile *Profile // as configured; of several, any
	stop    context.CancelFunc
	// changed is signalled when the record has changed.
	changed chan struct{}
	// delay spreads replicas, and the profiles of a new configuration.
	delay time.Duration
	began time.Time

	// known is closed when the record was read, and its secrets are presented.
	known     chan struct{}
	knownOnce sync.Once

	// reading is held by whoever reads the record, until its secrets are presented.
	reading chan struct{}

	// mu guards what was read last.
	mu         sync.Mutex
	record     secretRecord
	generation Generation
}

const (
	// firstRotation of secrets whose end nobody knows, which are those of the
	// configuration, comes so long after the start, and spreadRotation later at
	// the most. So does any other after it is due.
	firstRotation  = time.Minute
	spreadRotation = 10 * time.Minute
	// keeperPatience is how soon a keeper tries again what it could not do.
	keeperPatience = 10 * time.Second
	// keeperLooks is how often the record is read although nothing happens.
	keeperLooks = time.Hour
)

// startKeepers starts the keepers that profiles need, which go on from those that
// there are, and stops all others. b.configuring is held.
func (b *Broker) startKeepers(configured []*Profile) {
	kept := make(map[string]*keeper)
	for _, p := range configured {
		family := p.secretsFamily()
		if p.Rotation == nil || kept[family] != nil {
			continue
		}
		k := b.keepers[family]
		if k == nil || k.profile != p { // what the old one knows goes on to the new one
			k = newKeeper(b, p, k)
		}
		kept[family] = k
	}
	for family, k := range b.keepers {
		if kept[family] != k {
			k.stop()
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.keepers = kept
}

func newKeeper(b *Broker, p *Profile, old *keeper) *keeper {
	k := &keeper{
		b: b, profile: p, changed: make(chan struct{}, 1), known: make(chan struct{}), reading: make(chan struct{}, 1),
		delay: rand.N(spreadRotation), began: time.Now(),
	}
	var ctx context.Context
	ctx, k.stop = context.WithCancel(b.ctx)
	if old != nil {
		k.delay, k.began = old.delay, old.began
		old.mu.Lock()
		k.record, k.generation = old.record, old.generation
		old.mu.Unlock()
		if old.isKnown() {
			k.tellKnown()
		}
	}
	if b.takeOff() {
		go func() {
			defer b.flights.Done()
			k.run(ctx)
		}()
	}
	return k
}

// with is the profile as it presents these secrets, before its own. Nothing else
// of it changes.
func (b *Broker) with(p *Profile, secrets []Secret) *Profile {
	if len(secrets) == 0 {
		return p
	}
	changed, err := p.Rotation.With(secrets)
	if err != nil {
		b.log.Error("the client secrets in the store cannot be used", "profile", p.Name, "error", err)
		return p
	}
	now := *p
	now.Issuer, now.Credential = changed.Issuer, changed.Credential
	return &now
}

func (k *keeper) tellKnown() { k.knownOnce.Do(func() { close(k.known) }) }

func (k *keeper) isKnown() bool {
	select {
	case <-k.known:
		return true
	default:
		return false
	}
}

// hear has the record read soon.
func (k *keeper) hear() {
	select {
	case k.changed <- struct{}{}:
	default:
	}
}

// secrets that the record has in use.
func (k *keeper) secrets() []Secret {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.record.inUse()
}

// read has all profiles present what the record says now.
func (k *keeper) read(ctx context.Context) error {
	select {
	case k.reading <- struct{}{}:
		defer func() { <-k.reading }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	found, err := k.b.store.Look(ctx, k.profile.secretsFamily(), "")
	if err != nil {
		return err
	}
	record, err := secretsIn(found.Token)
	if err != nil {
		return err
	}
	k.mu.Lock()
	before := k.record.inUse()
	if found.Token != nil && found.Token.Generation > k.generation {
		k.record, k.generation = record, found.Token.Generation
	}
	changed := !slices.EqualFunc(before, k.record.inUse(), Secret.Equal)
	k.mu.Unlock()
	if changed {
		k.b.represent()
		k.b.log.Info("client secrets taken from the store", "profile", k.profile.Name)
	}
	k.tellKnown()
	return nil
}

// represent has all profiles present what their keepers know.
func (b *Broker) represent() {
	b.configuring.Lock()
	defer b.configuring.Unlock()
	b.replace(b.configured)
}

func (k *keeper) run(ctx context.Context) {
	for ctx.Err() == nil {
		waitFor(ctx, k.changed, k.turn(ctx))
	}
}

// turn does what there is to do, and returns when to look again.
func (k *keeper) turn(ctx context.Context) (wait time.Duration) {
	defer func() {
		if r := recover(); r != nil {
			k.b.log.Error("panic while keeping client secrets", "profile", k.profile.Name, "type", fmt.Sprintf("%T", r), "stack", string(debug.Stack()))
			wait = rotationRestFirst
		}
	}()
	if err := k.read(ctx); err != nil {
		if !errors.Is(err, context.Canceled) {
			k.b.log.Warn("client secrets not read from the store; those known here are used", "profile", k.profile.Name, "error", err)
		}
		return keeperPatience
	}
	k.mu.Lock()
	record := k.record
	k.mu.Unlock()
	due := k.due(record)
	if wait := Until(time.Now(), due); wait > 0 {
		return min(wait, keeperLooks)
	}
	r, err := k.b.renewalOf(k.profile, "")
	if err == nil {
		r.finish = true
		r.needed = func(now secretRecord) bool { return !k.renewalDue(now).After(time.Now()) }
		_, err = r.run(ctx)
	}
	if err != nil {
		if ctx.Err() == nil && !errors.Is(err, errRotationBusy) {
			k.b.log.Error("client secret not renewed; the present one stays in use", "profile", k.profile.Name, "error", err)
		}
		return keeperPatience
	}
	return time.Second // nothing that is due goes on and on
}

// due is when something is to be done about the record.
func (k *keeper) due(r secretRecord) time.Time {
	due := k.renewalDue(r)
	if rewrite := r.Written.Add(rewriteAfter + k.delay); r.Current != nil && rewrite.Before(due) {
		due = rewrite
	}
	for _, s := range r.Previous {
		if s.End.Before(due) {
			due = s.End
		}
	}
	return due
}

// renewalDue is when there is to be another secret.
func (k *keeper) renewalDue(r secretRecord) time.Time {
	due := r.NotBefore
	switch {
	case r.Candidate != nil || r.Intent != "": // somebody is at it, or was
		return due
	case r.Current == nil:
		due = later(due, k.began.Add(firstRotation+k.delay))
	default:
		// A server that gives shorter lives than asked for must not have us
		// renew on and on.
		half := r.Current.Start.Add(r.Current.End.Sub(r.Current.Start) / 2)
		due = later(due, later(half, r.Current.End.Add(-k.profile.Rotation.Before)).Add(k.delay))
		due = later(due, r.Current.Created.Add(leastSecretLife/2)) // whatever it says
	}
	return due
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// renewalOf prepares the renewal of a profile's client secret, by the right of
// the token of the profile admin: empty is what the configuration says.
func (b *Broker) renewalOf(p *Profile, admin string) (*renewal, error) {
	r := &renewal{b: b, profile: p, admin: admin}
	var ok bool
	if r.own, ok = p.Issuer.(Administrator); !ok {
		return nil, notAdministered(p)
	}
	r.spec = ClientSecretSpec{TenantID: r.own.Tenant(), ClientID: r.own.ClientID()}
	if p.Rotation != nil {
		if p.Rotation.Lifetime > 0 {
			// Less than a day is refused, and some of it passes on the way.
			r.spec.End = time.Now().Add(max(p.Rotation.Lifetime, leastSecretLife+time.Minute))
		}
		if admin == "" {
			r.admin = p.Rotation.AdminProfile
		}
	}
	if r.admin == "" {
		r.admin = p.Name
	}
	return r, nil
}

// awaitSecrets has the store say which client secrets are in use before the first
// request presents any: that of the configuration may have ended long ago. While
// the store is out of reach it is presented all the same.
func (f *flight) awaitSecrets(ctx context.Context, e *entry) {
	k := f.profile.keeper
	if k == nil || f.profile.informed {
		return
	}
	for began := time.Now(); !k.isKnown() && ctx.Err() == nil; {
		err := k.read(ctx)
		if ctx.Err() == nil {
			e.b.reach.observe(err)
		}
		if err == nil {
			break
		}
		if errors.Is(err, ErrUnreadable) || time.Since(began) >= e.b.lease || e.b.reach.lost(e.b.lease) {
			e.b.log.Warn("the client secrets in the store are not known: that of the configuration is used", "profile", f.profile.Name, "error", err)
			break
		}
		f.pause(ctx, storeRetry)
	}
	if f.profile.replaced.Load() {
		e.mu.Lock()
		f.profile = e.profile
		e.mu.Unlock()
	}
}
