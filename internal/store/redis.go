package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"math"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Redis is a broker.Store that replicas share. It keeps one hash per family, and
// every transition is one Lua script on that hash, which may be run twice or late
// and answers the same. Tokens are sealed before they leave for it.
//
// Redis may lose what it acknowledged. So each process keeps a mirror of the
// families that it uses, compares it with Redis every few seconds and whenever
// there is a reason to, and joins back what is missing. Until the replicas have
// had the time for that, no refresh token is given out.
type Redis struct {
	link   *link
	log    *slog.Logger
	keyset atomic.Pointer[Keyset]
	mirror *mirror
	sweeps *sweeper

	// origin begins the nonces of this process, and ends with a dash.
	origin string
	nonces atomic.Uint64
	// offset is what is added to the time, in ms: a test lets time pass with it.
	offset atomic.Int64
	// settled is when refresh tokens may be given out, in Unix ms of this
	// machine. Before that, other replicas may know newer ones than Redis does.
	settled atomic.Int64

	corrupt, unreadable, unconfirmed, restoredRecords, sweptTimes atomic.Int64

	// logged are the errors that were logged and would come again and again.
	logged sync.Map

	// subscribers are called without mirror.mu.
	subMu       sync.Mutex
	subscribers map[int]func(broker.Change)
	nextSub     int
}

// RedisOptions say where Redis is. What may change is in Access.
type RedisOptions struct {
	// Addresses of the server; of several nodes of a Cluster; or of Sentinels.
	Addresses []string
	// MasterName is set if the addresses are of Sentinels.
	MasterName string
	// Cluster tells that there is one, though there may be one address.
	Cluster  bool
	Username string
	// Lease is the length of the broker's leases.
	Lease time.Duration
	// Logger gets what operators should know; nil discards it.
	Logger *slog.Logger
}

// settleWindow is how long the replicas are given to put back what Redis may have
// lost. prelude.lua has the same.
const settleWindow = 2 * time.Second

// NewRedis returns a store that connects as it is needed: Redis need not be there
// yet. Close it when done.
func NewRedis(o RedisOptions, a Access) (*Redis, error) {
	switch {
	case len(o.Addresses) == 0:
		return nil, errors.New("preparing the Redis store: it has no address; set store.redis.addresses")
	case a.Keyset == nil:
		return nil, errors.New("preparing the Redis store: it has no keyset, and tokens must not be stored in clear; set store.encryption_keyset")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Redis{log: o.Logger, origin: rand.Text()[:10] + "-", subscribers: make(map[int]func(broker.Change))}
	r.mirror = newMirror(r.now)
	r.keyset.Store(a.Keyset)
	r.settle()
	r.sweeps = newSweeper(r)
	r.link = newLink(linkOptions{
		addresses: o.Addresses, masterName: o.MasterName, cluster: o.Cluster, username: o.Username, log: o.Logger,
		heard:       r.sweeps.hear,
		resync:      r.sweeps.resync,
		incarnation: r.incarnation,
	}, a)
	r.sweeps.start()
	return r, nil
}

var _ broker.Store = (*Redis)(nil)

// Use takes over a changed password, certificate or keyset.
func (r *Redis) Use(a Access) {
	if a.Keyset != nil {
		r.keyset.Store(a.Keyset)
	}
	r.link.use(a)
}

// Close ends what runs in the background, and returns when it has ended. What
// Redis has not taken in by then is lost with the process.
func (r *Redis) Close() {
	r.sweeps.stop()
	r.link.close()
}

// RedisStats is how the store fares. Counters count since the start.
type RedisStats struct {
	// Reachable says whether the last call was answered, and if not, since
	// when none was, and what went wrong last.
	Reachable        bool
	UnreachableSince time.Time
	LastError        string
	// Subscribed says whether changes are heard of.
	Subscribed bool
	// Calls by script and outcome.
	Calls map[Call]int64
	// Resubscriptions to changes, and Incarnations of Redis that were met: a
	// new one may have lost what the one before acknowledged.
	Resubscriptions, Incarnations int64
	// Families that this process has a mirror of, and Sweeps that have compared
	// them with Redis.
	Families int
	Sweeps   int64
	// Restored records: Redis had lost something of them.
	Restored int64
	// Unreadable records: sealed with a key that this process does not have, or
	// written by a newer version.
	Unreadable int64
	// Corrupt values: sealed with a known key, and not what was sealed.
	Corrupt int64
	// Unconfirmed writes, which must not be lost and were not replicated in
	// time.
	Unconfirmed int64
	// ClockOffset is how far Redis time is ahead of this machine's.
	ClockOffset time.Duration
}

// Call is what RedisStats counts by.
type Call struct{ Name, Outcome string }

// Stats returns how the store fares.
func (r *Redis) Stats() RedisStats {
	l := r.link.stats()
	s := RedisStats{
		Reachable: l.reachable, UnreachableSince: l.unreachableSince, LastError: string(l.lastFailure), Subscribed: l.subscribed,
		Calls:           make(map[Call]int64, len(l.calls)),
		Resubscriptions: max(0, l.subscriptions-1), Incarnations: l.incarnations,
		Families: r.mirror.size(), Sweeps: r.sweptTimes.Load(), Restored: r.restoredRecords.Load(),
		Unreadable: r.unreadable.Load(), Corrupt: r.corrupt.Load(), Unconfirmed: r.unconfirmed.Load(),
		ClockOffset: l.clockOffset,
	}
	for c, n := range l.calls {
		s.Calls[Call{Name: c.what, Outcome: string(c.outcome)}] = n
	}
	return s
}

// Acquire implements broker.Store.
func (r *Redis) Acquire(ctx context.Context, c broker.Claim) (broker.Acquisition, error) {
	again, absent := false, ""
	for range 6 { // each round mends something: one is the rule, two happen
		known, err := r.begin(ctx, c.Family)
		if err != nil {
			return broker.Acquisition{}, err
		}
		answer, err := r.call(ctx, "acquiring the lease of", acquireScript, c.Family, false,
			"owner", c.Owner, "length", c.Length.Milliseconds(), "floor", max(int64(c.Floor), known.floor), "slot", c.Slot,
			"life", ceil(c.Demand.Lifetime), "newer", int64(c.Demand.NewerThan), "reported", c.Demand.Not,
			"credentials", strings.Join(c.Credentials, " "), "consent", consentUses[c.Consent], "asked", flag(c.Asked),
			"settling", r.settling().Milliseconds(), "again", flag(again), "absent", absent, "peek", flag(c.Peek))
		if err != nil {
			return broker.Acquisition{}, err
		}
		change, agrees := r.mirror.wrote(c.Family, answer)
		r.announce(change)
		if !agrees {
			if err := r.sync(ctx, c.Family); err != nil {
				return broker.Acquisition{}, err
			}
			if !r.mirror.agrees(c.Family, answer) { // it was judged by what is no more
				again = true
				continue
			}
		}
		a, err := r.acquisition(ctx, c, answer)
		switch {
		case errors.Is(err, errDamagedToken):
			slot, _ := parseRegister(answer.out["s"])
			absent, again = slot.id, true
		case errors.Is(err, errDamagedConsent):
			if err := r.quarantine(ctx, c.Family, answer); err != nil {
				return broker.Acquisition{}, err
			}
			again = true
		default:
			return a, err
		}
	}
	return broker.Acquisition{}, fmt.Errorf("acquiring the lease of family %s: the record does not stay as it is; try again", c.Family)
}

// begin notes that a family is in use, and sees to it that Redis knows what was
// dropped here first.
func (r *Redis) begin(ctx context.Context, family string) (known, error) {
	known := r.mirror.use(family)
	if !known.late {
		return known, nil
	}
	if err := r.sync(ctx, family); err != nil {
		return known, err
	}
	return r.mirror.use(family), nil
}

var verdicts = map[string]broker.Verdict{
	"USABLE": broker.Usable, "GRANTED": broker.Granted, "BUSY": broker.Busy, "REFUSED": broker.Refused,
	"SHORT": broker.Short, "TOO_SOON": broker.TooSoon, "IN_DOUBT": broker.InDoubt, "UNKNOWN": broker.Unknown,
	"UNAUTHORIZED": broker.Unauthorized, "ENDED": broker.Ended, "FREE": broker.Free,
}

var (
	errDamagedToken   = errors.New("the access token is damaged")
	errDamagedConsent = errors.New("the refresh token is damaged")
)

// acquisition is what acquire has answered, opened. What is unreadable is not
// absent: whoever can read it must find it as it was.
func (r *Redis) acquisition(ctx context.Context, c broker.Claim, answer reply) (broker.Acquisition, error) {
	a := broker.Acquisition{Verdict: verdicts[answer.code], Wait: span(answer.out.number("wait"))}
	var err error
	a.Token, err = r.token(c.Family, c.Slot, answer)
	if errors.Is(err, ErrCorrupt) {
		return a, errDamagedToken
	}
	if a.Token == nil && (a.Verdict == broker.Usable || a.Verdict == broker.Short) {
		if err == nil { // dropped here, a moment ago
			err = errDamagedToken
		}
		return broker.Acquisition{}, err
	}
	switch a.Verdict {
	case broker.Granted:
		a.Fence, a.Failure = broker.Generation(answer.out.number("fence")), seenFailure(answer.out, answer.now)
		if err == nil && answer.out["r"] != "" {
			a.Consent, err = r.consent(c.Family, answer)
		}
		if errors.Is(err, ErrCorrupt) {
			return a, errDamagedConsent
		}
		if err != nil {
			_, _ = r.Fail(ctx, broker.Lease{Family: c.Family, Owner: c.Owner, Fence: a.Fence}, broker.Failure{Outcome: broker.Unsent}) // or it ends by itself
			return broker.Acquisition{}, err
		}
		// Redis may have been found to have gone back just now.
		if wait := r.settling(); wait > 0 && c.Consent != broker.NoConsent {
			a = broker.Acquisition{Verdict: broker.Unknown, Wait: wait}
		}
	case broker.Refused:
		a.Failure = seenFailure(answer.out, answer.now)
	case broker.Unauthorized:
		a.Consent = seenConsent(answer.out, answer.now)
	}
	if a.Verdict == broker.Unknown {
		r.ask(ctx, c.Family)
	}
	return a, nil
}

// ask has all replicas put back what they know of a family. Whether they hear it
// is not known; they sweep anyway.
func (r *Redis) ask(ctx context.Context, family string) {
	_ = r.link.publish(ctx, strings.Join([]string{whoHas, r.nonce(), "0", family}, " "))
}

// token is what the slot holds, or nil. An unreadable token that is over is like
// none: nobody has any use for it.
func (r *Redis) token(family, slot string, answer reply) (*broker.StoredToken, error) {
	s, ok := parseRegister(answer.out["s"])
	if !ok || r.mirror.buried(family, s.id) || r.mirror.ended(family, slot) {
		return nil, nil
	}
	p, err := r.open(answer.out["a"], family, accessPlace(slot))
	if err != nil {
		if s.over(answer.now) {
			err = nil
		}
		return nil, err
	}
	t := dated(broker.StoredToken{Access: broker.NewSecret(p.Token), Type: p.Type, Scopes: p.Scopes}, s, answer.now)
	return &t, nil
}

// consent is the one in the reply, or nil.
func (r *Redis) consent(family string, answer reply) (*broker.Consent, error) {
	c := seenConsent(answer.out, answer.now)
	if c == nil {
		return nil, nil
	}
	p, err := r.open(answer.out["rt"], family, refreshPlace)
	if err != nil {
		return nil, err
	}
	c.RefreshToken, c.Account = broker.NewSecret(p.Token), p.Account
	return c, nil
}

// Renew implements broker.Store.
func (r *Redis) Renew(ctx context.Context, l broker.Lease) (bool, error) {
	answer, err := r.call(ctx, "renewing the lease of", renewScript, l.Family, false,
		"owner", l.Owner, "fence", int64(l.Fence), "length", l.Length.Milliseconds())
	if err != nil {
		return false, err
	}
	r.took(l.Family, answer)
	return answer.code == "OK", nil
}

var intendVerdicts = map[string]broker.IntendVerdict{
	"OK": broker.Intended, "LOST": broker.IntendLost, "CHANGED": broker.IntendChanged,
	"IN_DOUBT": broker.IntendInDoubt, "SPENT": broker.IntendSpent, "SETTLING": broker.IntendChanged,
}

// Intend implements broker.Store.
func (r *Redis) Intend(ctx context.Context, l broker.Lease, p broker.Presentation) (broker.IntendVerdict, error) {
	if _, err := r.begin(ctx, l.Family); err != nil {
		return 0, err
	}
	if r.settling() > 0 { // Redis may have gone back since the lease was granted: claim again
		return broker.IntendChanged, nil
	}
	answer, err := r.call(ctx, "committing to present the refresh token of", intendScript, l.Family, true,
		"owner", l.Owner, "fence", int64(l.Fence), "refresh", p.RefreshID,
		"horizon", p.Horizon.Milliseconds(), "most", p.Most)
	if err != nil {
		return 0, err
	}
	r.took(l.Family, answer)
	verdict := intendVerdicts[answer.code]
	if verdict == broker.Intended && !answer.confirmed {
		r.unconfirmed.Add(1)
		verdict = broker.IntendUnconfirmed
	}
	return verdict, nil
}

var saveVerdicts = map[string]broker.SaveVerdict{
	"SAVED": broker.Saved, "STALE": broker.Stale, "SUPERSEDED": broker.Superseded, "DROPPED": broker.WasDropped,
}

// Save implements broker.Store.
func (r *Redis) Save(ctx context.Context, l broker.Lease, s broker.Result) (broker.StoredToken, broker.SaveVerdict, error) {
	for again := false; ; again = true {
		known, err := r.begin(ctx, l.Family)
		if err != nil {
			return broker.StoredToken{}, 0, err
		}
		answer, err := r.save(ctx, l, s, known)
		if err != nil {
			return broker.StoredToken{}, 0, err
		}
		agrees := r.took(l.Family, answer)
		verdict := saveVerdicts[answer.code]
		if verdict == broker.Superseded && !agrees && !again {
			// Redis may have gone back to a refresh token from before the one
			// that was spent, which is here still.
			if err := r.sync(ctx, l.Family); err != nil {
				return broker.StoredToken{}, 0, err
			}
			continue
		}
		if verdict != broker.Saved {
			return broker.StoredToken{}, verdict, nil
		}
		if durable(s) && !answer.confirmed {
			r.unconfirmed.Add(1)
		}
		kept, _ := parseRegister(answer.out["s"])
		return dated(s.Token, kept, answer.now), verdict, nil
	}
}

// durable tells what must not be lost: nobody could obtain it again.
func durable(s broker.Result) bool { return s.Durable || s.Spent != "" || !s.Refresh.IsEmpty() }

func (r *Redis) save(ctx context.Context, l broker.Lease, s broker.Result, known known) (reply, error) {
	const what = "saving what was obtained for"
	k := r.keyset.Load()
	token, err := sealPayload(k, payload{Token: s.Token.Access.Reveal(), Type: s.Token.Type, Scopes: s.Token.Scopes}, l.Family, accessPlace(s.Slot))
	if err != nil {
		return reply{}, fmt.Errorf("%s family %s: %w", what, l.Family, err)
	}
	refreshID, refresh := "", ""
	if !s.Refresh.IsEmpty() {
		refreshID = s.Refresh.ID()
		if refresh, err = sealPayload(k, payload{Token: s.Refresh.Reveal(), Account: s.Account}, l.Family, refreshPlace); err != nil {
			return reply{}, fmt.Errorf("%s family %s: %w", what, l.Family, err)
		}
	}
	was := ""
	if spent, ok := parseRegister(known.consent); ok && spent.id == s.Spent {
		was = known.consent
	}
	return r.call(ctx, what, saveScript, l.Family, durable(s),
		"owner", l.Owner, "fence", int64(l.Fence), "slot", s.Slot,
		"id", s.Token.Access.ID(), "token", token, "left", s.Token.Remaining.Milliseconds(), "life", s.Token.Lifetime.Milliseconds(),
		"spent", s.Spent, "refresh", refreshID, "sealed", refresh, "rotates", rotates[s.Rotates],
		"ends", s.Remaining.Milliseconds(), "supersede", flag(s.Supersede), "was", was)
}

// Fail implements broker.Store.
func (r *Redis) Fail(ctx context.Context, l broker.Lease, f broker.Failure) (broker.Failure, error) {
	rest := "forever"
	if f.Rest != broker.Forever {
		rest = strconv.FormatInt(f.Rest.Milliseconds(), 10)
	}
	answer, err := r.call(ctx, "remembering the failure of", failScript, l.Family, false,
		"owner", l.Owner, "fence", int64(l.Fence), "kind", failureKinds[f.Kind], "code", f.Code, "subject", f.Credential,
		"text", f.Text, "rest", rest, "jitter", f.Jitter, "outcome", outcomes[f.Outcome])
	if err != nil {
		return broker.Failure{}, err
	}
	if r.took(l.Family, answer); answer.before == answer.after { // waiters want to know that the lease is free
		r.announce(&broker.Change{Family: l.Family})
	}
	if answer.code != "OK" {
		return broker.Failure{}, nil
	}
	decided := seenFailure(answer.out, answer.now)
	if decided == nil {
		return broker.Failure{}, nil
	}
	decided.Jitter, decided.Outcome = f.Jitter, f.Outcome
	return *decided, nil
}

// Drop implements broker.Store. If Redis does not confirm it, the tokens are out
// of service here all the same, and Redis is told before anything else once it
// answers.
func (r *Redis) Drop(ctx context.Context, d broker.Drop) (broker.Dropped, error) {
	known := r.mirror.use(d.Family)
	d.Floor = max(d.Floor, broker.Generation(known.floor))
	var answer reply
	err := r.sync(ctx, d.Family) // so that what Redis has lost is dropped, too
	if err == nil {
		answer, err = r.drop(ctx, lateDrop{Drop: d, remember: r.mirror.remembered(d)})
	}
	if err != nil {
		r.mirror.dropLate(d)
		return broker.Dropped{}, err
	}
	dropped := broker.Dropped{Access: r.mirror.takeTokens(d)}
	for name, value := range answer.out {
		id, ok := strings.CutPrefix(name, "w:")
		if !ok {
			continue
		}
		words := strings.SplitN(value, " ", 4)
		if len(words) != 4 {
			continue
		}
		place := refreshPlace
		if words[2] == "access" {
			place = accessPlace(words[3])
		}
		p, err := r.open(answer.out["x:"+id], d.Family, place)
		switch secret := broker.NewSecret(p.Token); {
		case err != nil: // logged; it is out of service all the same
		case words[2] == "access":
			dropped.Access = append(dropped.Access, secret)
		default:
			dropped.Refresh = secret
		}
	}
	return dropped, nil
}

// drop runs the script. An instant of a late drop counts from when it was asked
// for, and no less by either clock.
func (r *Redis) drop(ctx context.Context, d lateDrop) (reply, error) {
	now, age := r.now(), time.Duration(0)
	if !d.since.IsZero() {
		age = max(-broker.Until(now, d.since), time.Millisecond)
	}
	args := []any{
		"operation", d.Operation, "token", d.Token, "job", d.Job, "remember", (d.Remember - age).Milliseconds(),
		"floor", int64(d.Floor), "age", age.Milliseconds(),
	}
	for id, until := range d.remember {
		args = append(args, "t:"+id, until.Sub(now).Milliseconds())
	}
	answer, err := r.call(ctx, "dropping tokens of", dropScript, d.Family, false, args...)
	if err != nil {
		return reply{}, err
	}
	r.took(d.Family, answer)
	r.mirror.dropDone(d.Family, d.Operation)
	return answer, nil
}

// Confirm implements broker.Store.
func (r *Redis) Confirm(ctx context.Context, family, id string) error {
	answer, err := r.call(ctx, "noting the revocation of a token of", confirmScript, family, false, "id", id)
	if err == nil {
		r.took(family, answer)
	}
	return err
}

// Reset implements broker.Store.
func (r *Redis) Reset(ctx context.Context, family string) error {
	answer, err := r.call(ctx, "forgetting the failure of", resetScript, family, false)
	if err == nil {
		r.took(family, answer)
	}
	return err
}

// Look implements broker.Store.
func (r *Redis) Look(ctx context.Context, family, slot string) (broker.Record, error) {
	if _, err := r.begin(ctx, family); err != nil {
		return broker.Record{}, err
	}
	const what = "looking at"
	answer, err := r.call(ctx, what, lookScript, family, false, "stamp", "", "only", "a:"+slot)
	if err != nil {
		return broker.Record{}, err
	}
	if !r.mirror.agrees(family, answer) {
		err := r.sync(ctx, family)
		if err == nil && !r.mirror.agrees(family, answer) {
			answer, err = r.call(ctx, what, lookScript, family, false, "stamp", "", "only", "a:"+slot)
		}
		if err != nil {
			return broker.Record{}, err
		}
	}
	record := broker.Record{Failure: seenFailure(answer.out, answer.now), Ended: answer.out.ended(slot, answer.now)}
	record.ToRevoke, record.ToRevokeSince = seenRevocations(answer.out, answer.now)
	if s, ok := answer.out.register("s:" + slot); ok && s.inService {
		answer.out["s"], answer.out["a"] = answer.out["s:"+slot], answer.out["a:"+slot]
		if record.Token, err = r.token(family, slot, answer); err != nil && !errors.Is(err, ErrCorrupt) {
			return broker.Record{}, err
		}
	}
	if record.Consent, err = r.consent(family, answer); err != nil && !errors.Is(err, ErrCorrupt) {
		return broker.Record{}, err
	}
	return record, nil
}

// Restore implements broker.Store.
func (r *Redis) Restore(family, slot string, t broker.StoredToken) {
	r.mirror.restore(family, slot, t)
	r.sweeps.want(family)
}

// Subscribe implements broker.Store.
func (r *Redis) Subscribe(changed func(broker.Change)) (stop func()) {
	r.subMu.Lock()
	defer r.subMu.Unlock()
	id := r.nextSub
	r.nextSub++
	r.subscribers[id] = changed
	return func() {
		r.subMu.Lock()
		defer r.subMu.Unlock()
		delete(r.subscribers, id)
	}
}

func (r *Redis) announce(c *broker.Change) {
	if c == nil {
		return
	}
	r.subMu.Lock()
	defer r.subMu.Unlock()
	for _, changed := range r.subscribers {
		changed(*c)
	}
}

// took takes in the reply of a transition, and reports whether the mirror has now
// what Redis has. If not, the two are compared soon.
func (r *Redis) took(family string, answer reply) (agrees bool) {
	change, agrees := r.mirror.wrote(family, answer)
	r.announce(change)
	if !agrees {
		r.sweeps.want(family)
	}
	return agrees
}

// quarantine takes a damaged refresh token out of the record, as if it had been
// lost: another replica may have it undamaged.
func (r *Redis) quarantine(ctx context.Context, family string, answer reply) error {
	damaged, _ := parseRegister(answer.out["r"])
	r.mirror.forget(family, answer.out["rt"])
	answer, err := r.call(ctx, "setting aside the damaged refresh token of", quarantineScript, family, false,
		"id", damaged.id, "sealed", answer.out["rt"])
	if err == nil {
		r.took(family, answer)
	}
	return err
}

// open opens a sealed value, and counts and logs those that cannot be.
func (r *Redis) open(sealed, family, place string) (payload, error) {
	p, err := openPayload(r.keyset.Load(), sealed, family, place)
	switch {
	case errors.Is(err, ErrCorrupt):
		if r.logOnce("stored value is damaged", family, sealed, err) {
			r.corrupt.Add(1)
		}
	case err != nil:
		if r.logOnce("stored value is unreadable", family, sealed, err) {
			r.unreadable.Add(1)
		}
	}
	return p, err
}

// logOnce logs what is wrong with a family, or with a value of it, the first time
// that it is met, and reports whether it was.
func (r *Redis) logOnce(message, family, value string, err error) bool {
	h := fnv.New64a()
	_, _ = h.Write([]byte(value))
	type met struct {
		message, family string
		value           uint64
	}
	if _, again := r.logged.LoadOrStore(met{message, family, h.Sum64()}, true); again {
		return false
	}
	r.log.Error(message, "family", family, "error", err)
	return true
}

// incarnation hears that Redis is not the one that it was, or that its clock has
// jumped: it may have gone back.
func (r *Redis) incarnation() {
	r.settle()
	r.sweeps.resync()
}

// settle opens the settle window.
func (r *Redis) settle() { r.settled.Store(r.now().Add(settleWindow).UnixMilli()) }

// settling is how long refresh tokens are not given out yet.
func (r *Redis) settling() time.Duration {
	return min(settleWindow, max(0, span(r.settled.Load()-r.now().UnixMilli())))
}

// now is this machine's time.
func (r *Redis) now() time.Time { return time.Now().Add(span(r.offset.Load())) }

// nonce is unique. All that this process sends begin with its origin.
func (r *Redis) nonce() string { return r.origin + strconv.FormatUint(r.nonces.Add(1), 36) }

func flag(b bool) string {
	if b {
		return "1"
	}
	return "0"
}

// ceil is a duration in ms, rounded up.
func ceil(d time.Duration) int64 {
	if d > math.MaxInt64-time.Millisecond {
		return d.Milliseconds()
	}
	return (d + time.Millisecond - 1).Milliseconds()
}
