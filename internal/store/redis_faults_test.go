package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/faultproxy"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
)

const aFamily = "0123456789abcdef"

var aKey = recordKey(aFamily)

// never is a demand that no token meets.
var never = broker.Demand{NewerThan: math.MaxInt64}

func claimOf(owner string, use broker.ConsentUse) broker.Claim {
	return broker.Claim{Family: aFamily, Owner: owner, Length: 3 * time.Second, Credentials: []string{"secret"}, Demand: never, Consent: use}
}

func aToken(name string) broker.StoredToken {
	return broker.StoredToken{Access: broker.NewSecret(name), Type: "Bearer", Lifetime: time.Hour, Remaining: time.Hour}
}

// acquire wants a verdict.
func acquire(t *testing.T, r *Redis, c broker.Claim, want broker.Verdict) broker.Acquisition {
	t.Helper()
	a, err := r.Acquire(t.Context(), c)
	if err != nil || a.Verdict != want {
		t.Fatalf("acquire by %s: verdict %d, %v; want %d", c.Owner, a.Verdict, err, want)
	}
	return a
}

func leaseFor(t *testing.T, r *Redis, owner string, use broker.ConsentUse) broker.Lease {
	t.Helper()
	a := acquire(t, r, claimOf(owner, use), broker.Granted)
	return broker.Lease{Family: aFamily, Owner: owner, Fence: a.Fence, Length: 3 * time.Second}
}

func save(t *testing.T, r *Redis, l broker.Lease, s broker.Result, want broker.SaveVerdict) {
	t.Helper()
	if _, v, err := r.Save(t.Context(), l, s); err != nil || v != want {
		t.Fatalf("save by %s: verdict %d, %v; want %d", l.Owner, v, err, want)
	}
}

// signIn gives the family a consent.
func signIn(t *testing.T, r *Redis, refresh string) {
	t.Helper()
	save(t, r, broker.Lease{Family: aFamily, Owner: "person " + refresh}, broker.Result{
		Token: aToken("at-" + refresh), Refresh: broker.NewSecret(refresh), Supersede: true,
	}, broker.Saved)
}

// refresh spends one refresh token and gets another.
func refresh(t *testing.T, r *Redis, spent, next string) {
	t.Helper()
	save(t, r, leaseFor(t, r, "refresh "+next, broker.ConsentRequired), broker.Result{
		Token: aToken("at-" + next), Spent: broker.NewSecret(spent).ID(), Refresh: broker.NewSecret(next), Rotates: broker.RotatesYes,
	}, broker.Saved)
}

// inStep waits until the replicas have what Redis has.
func inStep(t *testing.T, server *testredis.Server, replicas ...*Redis) {
	t.Helper()
	eventually(t, "all replicas are in step", 20*time.Second, func() bool {
		stamp, _ := server.Do("HGET", aKey, "c").(string)
		for _, r := range replicas {
			if known, _ := r.mirror.registers(aFamily); known != stamp {
				return false
			}
		}
		return true
	})
}

func silent(r *Redis) *bytes.Buffer {
	var log bytes.Buffer
	r.log = slog.New(slog.NewTextHandler(&log, nil))
	return &log
}

func newReplicas(t *testing.T, n int) (*testredis.Server, []*Redis) {
	server, k := testredis.Start(t, testredis.Options{}), testKeyset(t)
	replicas := make([]*Redis, n)
	for i := range replicas {
		replicas[i] = replica(t, server.Address(), k)
	}
	return server, replicas
}

// A replica that was away while others went on is the first to come back to a
// Redis that has lost everything. The refresh token that it knows was spent long
// ago, and must not be given to anybody.
func TestAnOldRefreshTokenIsNotGivenOutAfterALoss(t *testing.T) {
	server, replicas := newReplicas(t, 3)
	p, away, newcomer := replicas[0], replicas[1], replicas[2]
	signIn(t, p, "r1")
	inStep(t, server, p, away)
	away.sweeps.stop() // deaf from now on
	refresh(t, p, "r1", "r2")
	refresh(t, p, "r2", "r3")
	server.Flush()

	var wait time.Duration
	for _, r := range []*Redis{away, newcomer} {
		wait = max(wait, acquire(t, r, claimOf("back", broker.ConsentRequired), broker.Unknown).Wait)
	}
	// The one who knows better was asked, and answers in that time.
	eventually(t, "the newest refresh token is back", 20*time.Second, func() bool {
		rec, err := newcomer.Look(t.Context(), aFamily, "")
		return err == nil && rec.Consent != nil && rec.Consent.RefreshToken.Reveal() == "r3"
	})
	for _, r := range replicas {
		r.offset.Add(wait.Milliseconds())
	}
	for i, r := range []*Redis{away, newcomer} {
		c := claimOf(fmt.Sprint("back", i), broker.ConsentRequired)
		c.Asked = true
		a := acquire(t, r, c, broker.Granted)
		if a.Consent.RefreshToken.Reveal() != "r3" {
			t.Error("an old refresh token was given out")
		}
		if _, err := r.Fail(t.Context(), broker.Lease{Family: aFamily, Owner: c.Owner, Fence: a.Fence}, broker.Failure{}); err != nil {
			t.Fatal(err)
		}
	}
}

// While other replicas may know a newer refresh token than Redis does, tokens are
// answered with and nothing is presented.
func TestNoPresentationInTheSettleWindow(t *testing.T) {
	server, replicas := newReplicas(t, 1)
	r := replicas[0]
	signIn(t, r, "r1")
	held := leaseFor(t, r, "p", broker.ConsentRequired)
	r.incarnation()

	v, err := r.Intend(t.Context(), held, broker.Presentation{RefreshID: broker.NewSecret("r1").ID(), Horizon: time.Second, Most: 2})
	if err != nil || v != broker.IntendChanged { // not one that may be sent in need
		t.Errorf("intend: %d, %v", v, err)
	}
	if a := acquire(t, r, claimOf("p", broker.ConsentRequired), broker.Unknown); a.Wait <= 0 || a.Wait > settleWindow {
		t.Errorf("the holder of the lease waits %v", a.Wait)
	}
	if _, err := r.Fail(t.Context(), held, broker.Failure{Outcome: broker.Unsent}); err != nil {
		t.Fatal(err)
	}
	for _, use := range []broker.ConsentUse{broker.ConsentPreferred, broker.ConsentRequired} {
		acquire(t, r, claimOf("q", use), broker.Unknown)
		usable := claimOf("q", use)
		usable.Demand = broker.Demand{}
		acquire(t, r, usable, broker.Usable)
	}
	acquire(t, r, broker.Claim{Family: "plain", Owner: "q", Length: time.Second, Demand: never}, broker.Granted)

	r.offset.Add(settleWindow.Milliseconds() + 1)
	if a := acquire(t, r, claimOf("q", broker.ConsentRequired), broker.Granted); a.Consent == nil {
		t.Error("granted without the consent")
	}
	// A process that starts waits as well.
	started, err := NewRedis(RedisOptions{Addresses: []string{server.Address()}}, Access{Keyset: r.keyset.Load()})
	if err != nil {
		t.Fatal(err)
	}
	defer started.Close()
	if started.settling() == 0 {
		t.Error("a process that starts gives out refresh tokens at once")
	}
}

// The refresh that was under way when Redis went back saves its token: what it
// has spent is put back first.
func TestARefreshIsSavedAlthoughRedisWentBack(t *testing.T) {
	server, replicas := newReplicas(t, 1)
	r := replicas[0]
	signIn(t, r, "r1")
	old := server.Do("DUMP", aKey)
	refresh(t, r, "r1", "r2")
	l := leaseFor(t, r, "p", broker.ConsentRequired)
	server.Do("RESTORE", aKey, 0, old, "REPLACE")
	save(t, r, l, broker.Result{
		Token: aToken("at-r3"), Spent: broker.NewSecret("r2").ID(), Refresh: broker.NewSecret("r3"), Rotates: broker.RotatesYes,
	}, broker.Saved)
	rec, err := r.Look(t.Context(), aFamily, "")
	if err != nil || rec.Consent == nil || rec.Consent.RefreshToken.Reveal() != "r3" || rec.Token.Access.Reveal() != "at-r3" {
		t.Errorf("%+v, %v", rec, err)
	}
}

// A drop that Redis could not be told of counts here at once, reaches Redis
// before anything else does, and does not touch what came after it.
func TestALateDrop(t *testing.T) {
	server, k := testredis.Start(t, testredis.Options{}), testKeyset(t)
	proxy := faultproxy.New(t, server.Address())
	p, q := replica(t, proxy.Address(), k), replica(t, server.Address(), k)
	signIn(t, p, "r1")
	inStep(t, server, p, q)
	underWay := leaseFor(t, p, "p", broker.ConsentRequired)

	proxy.Set(faultproxy.Faults{Refuse: true})
	d := broker.Drop{Family: aFamily, Operation: "drop", Remember: time.Hour}
	if _, err := p.Drop(t.Context(), d); err == nil {
		t.Fatal("a drop that Redis was not told of is confirmed")
	}
	if !p.mirror.buried(aFamily, broker.NewSecret("at-r1").ID()) {
		t.Error("the token is in service here")
	}
	if _, err := p.Acquire(t.Context(), claimOf("p", broker.ConsentRequired)); err == nil {
		t.Error("answered without Redis")
	}
	usable := claimOf("q", broker.ConsentRequired)
	usable.Demand = broker.Demand{}
	acquire(t, q, usable, broker.Usable) // nobody has told it

	later := ""
	if rand.IntN(2) == 0 { // a person signs in before the drop arrives
		later = "r2"
		for _, r := range []*Redis{p, q} {
			r.offset.Add(10)
		}
		signIn(t, q, later)
	}
	proxy.Heal()
	eventually(t, "a save after the drop", 20*time.Second, func() bool {
		_, v, err := p.Save(t.Context(), underWay, broker.Result{
			Token: aToken("at-late"), Spent: broker.NewSecret("r1").ID(), Refresh: broker.NewSecret("late"), Rotates: broker.RotatesYes,
		})
		if err == nil && v != broker.WasDropped {
			t.Errorf("a refresh from before the drop: verdict %d", v)
		}
		return err == nil
	})
	rec, err := q.Look(t.Context(), aFamily, "")
	switch {
	case err != nil:
		t.Fatal(err)
	case later == "" && (rec.Token != nil || rec.Consent != nil):
		t.Errorf("after the drop there is %+v", rec)
	case later != "" && (rec.Consent == nil || rec.Consent.RefreshToken.Reveal() != later):
		t.Errorf("the late drop took what came after it: %+v", rec)
	}
	dropped, err := p.Drop(t.Context(), d) // asked once more by whoever got the error
	if err != nil || later == "" && dropped.Refresh.Reveal() != "r1" {
		t.Errorf("the drop again: %+v, %v", dropped.Refresh.IsEmpty(), err)
	}
}

// What was dropped stays dropped when Redis loses it and a replica that has
// missed it comes first.
func TestADropOutlivesALoss(t *testing.T) {
	server, replicas := newReplicas(t, 2)
	p, deaf := replicas[0], replicas[1]
	save(t, p, leaseFor(t, p, "p", broker.NoConsent), broker.Result{Token: aToken("t1")}, broker.Saved)
	inStep(t, server, p, deaf)
	deaf.sweeps.stop()
	id := broker.NewSecret("t1").ID()
	if _, err := p.Drop(t.Context(), broker.Drop{Family: aFamily, Operation: "drop", Token: id, Remember: time.Hour}); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var heard []string
	defer deaf.Subscribe(func(c broker.Change) {
		mu.Lock()
		defer mu.Unlock()
		heard = append(heard, c.Dropped...)
	})()
	server.Flush()
	if err := deaf.sync(t.Context(), aFamily); err != nil { // it puts back what it knows
		t.Fatal(err)
	}
	inStep(t, server, p)
	if rec, err := p.Look(t.Context(), aFamily, ""); err != nil || rec.Token != nil {
		t.Errorf("the token is back: %+v, %v", rec.Token, err)
	}
	if err := deaf.sync(t.Context(), aFamily); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(heard) != 1 || heard[0] != id {
		t.Errorf("the deaf replica heard of %v", heard)
	}
}

// Without a single word, a sweep brings everything in step.
func TestSweepsBringEverythingInStep(t *testing.T) {
	server, k := testredis.Start(t, testredis.Options{}), testKeyset(t)
	proxy := faultproxy.New(t, server.Address())
	p, q := replica(t, server.Address(), k), replica(t, proxy.Address(), k)
	const families = 3*sweepBatch/2 + 1
	for i := range families {
		if a, err := q.Acquire(t.Context(), broker.Claim{Family: fmt.Sprint(i), Owner: "q", Length: time.Millisecond}); err != nil || a.Verdict != broker.Granted {
			t.Fatal(a.Verdict, err)
		}
	}
	proxy.Set(faultproxy.Faults{DropMessages: true})
	var heard sync.Map
	defer q.Subscribe(func(c broker.Change) { heard.Store(c.Family, true) })()
	for _, r := range []*Redis{p, q} {
		r.offset.Add(1000)
	}
	for i := range families {
		c := broker.Claim{Family: fmt.Sprint(i), Owner: "p", Length: time.Second}
		a, err := p.Acquire(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if _, v, err := p.Save(t.Context(), broker.Lease{Family: c.Family, Owner: "p", Fence: a.Fence}, broker.Result{Token: aToken("t" + c.Family)}); err != nil || v != broker.Saved {
			t.Fatal(v, err)
		}
	}
	q.sweeps.sweep(inUse)
	for i := range families {
		if _, ok := heard.Load(fmt.Sprint(i)); !ok {
			t.Fatalf("not heard of family %d", i)
		}
	}
	server.Flush()
	q.sweeps.sweep(0)
	if n := server.Do("DBSIZE").(int64); n != families {
		t.Errorf("%d records are back, not %d", n, families)
	}
	eventually(t, "a sweep that finds nothing", 20*time.Second, func() bool {
		before := server.CommandStats()["evalsha"]
		q.sweeps.sweep(0)
		return server.CommandStats()["evalsha"] == before
	})
}

// Whoever cannot read a value leaves it as it is, and does without.
func TestWhatIsUnreadableIsLeftAlone(t *testing.T) {
	server, k := testredis.Start(t, testredis.Options{}), testKeyset(t)
	p, q := replica(t, server.Address(), k), replica(t, server.Address(), testKeyset(t))
	log := silent(q)
	save(t, p, leaseFor(t, p, "p", broker.NoConsent), broker.Result{Token: aToken("t1")}, broker.Saved)
	usable := claimOf("q", broker.NoConsent)
	usable.Demand = broker.Demand{}
	for _, c := range []broker.Claim{usable, claimOf("q", broker.NoConsent)} {
		if a, err := q.Acquire(t.Context(), c); !errors.Is(err, broker.ErrUnreadable) {
			t.Errorf("verdict %d, %v", a.Verdict, err)
		}
	}
	leaseFor(t, p, "p again", broker.NoConsent) // was given back
	if _, err := q.Look(t.Context(), aFamily, ""); !errors.Is(err, broker.ErrUnreadable) {
		t.Error(err)
	}
	signIn(t, p, "r1")
	p.offset.Add(2 * time.Hour.Milliseconds())
	q.offset.Add(2 * time.Hour.Milliseconds())
	if a, err := q.Acquire(t.Context(), claimOf("q", broker.ConsentRequired)); !errors.Is(err, broker.ErrUnreadable) {
		t.Errorf("an ended token and a consent: verdict %d, %v", a.Verdict, err)
	}
	if a := acquire(t, p, claimOf("p", broker.ConsentRequired), broker.Granted); a.Consent.RefreshToken.Reveal() != "r1" {
		t.Error("the consent is not as it was")
	}
	if n := strings.Count(log.String(), "\n"); n != int(q.Stats().Unreadable) || n == 0 || n > 3 {
		t.Errorf("%d counted, and logged:\n%s", q.Stats().Unreadable, log)
	}
	server.Do("HSET", aKey, "v", "2")
	if _, err := p.Acquire(t.Context(), claimOf("p", broker.NoConsent)); !errors.Is(err, broker.ErrUnreadable) {
		t.Errorf("a record of a newer layout: %v", err)
	}
}

func TestADamagedAccessTokenIsReplaced(t *testing.T) {
	server, replicas := newReplicas(t, 1)
	r := replicas[0]
	log := silent(r)
	save(t, r, leaseFor(t, r, "p", broker.NoConsent), broker.Result{Token: aToken("t1")}, broker.Saved)
	server.Do("HSET", aKey, "a:", "never sealed")
	for _, d := range []broker.Demand{{}, {Lifetime: 59*time.Minute + 59*time.Second}, {Not: broker.NewSecret("t1").ID()}} {
		c := claimOf("q", broker.NoConsent)
		c.Demand = d
		a := acquire(t, r, c, broker.Granted)
		if a.Token != nil {
			t.Errorf("granted with %+v", a.Token)
		}
		if _, err := r.Fail(t.Context(), broker.Lease{Family: aFamily, Owner: "q", Fence: a.Fence}, broker.Failure{}); err != nil {
			t.Fatal(err)
		}
	}
	if rec, err := r.Look(t.Context(), aFamily, ""); err != nil || rec.Token != nil {
		t.Errorf("%+v, %v", rec, err)
	}
	save(t, r, leaseFor(t, r, "q", broker.NoConsent), broker.Result{Token: aToken("t2")}, broker.Saved)
	usable := claimOf("r", broker.NoConsent)
	usable.Demand = broker.Demand{}
	acquire(t, r, usable, broker.Usable)
	if n := r.Stats().Corrupt; n != 1 || strings.Count(log.String(), "damaged") != 1 {
		t.Errorf("counted %d, logged:\n%s", n, log)
	}
}

// A damaged refresh token is one that was lost: another replica may have it.
func TestADamagedRefreshTokenIsSetAside(t *testing.T) {
	for _, known := range []bool{true, false} {
		t.Run(fmt.Sprintf("another has it: %t", known), func(t *testing.T) {
			server, replicas := newReplicas(t, 2)
			p, q := replicas[0], replicas[1]
			signIn(t, p, "r1")
			if known {
				inStep(t, server, p)
			} else {
				p.Close()
			}
			server.Do("HSET", aKey, "rt", "never sealed", "c", "damaged")
			want := broker.Unauthorized
			if known {
				want = broker.Granted
			}
			c := claimOf("q", broker.ConsentRequired)
			var a broker.Acquisition
			eventually(t, "a verdict", 20*time.Second, func() bool {
				var err error
				a, err = q.Acquire(t.Context(), c)
				if err != nil {
					t.Fatal(err)
				}
				if a.Verdict == broker.Unknown {
					c.Asked = true
					if known {
						eventually(t, "the answer", 20*time.Second, func() bool { return server.Do("HGET", aKey, "rt") != nil })
					}
					for _, r := range replicas {
						r.offset.Add(a.Wait.Milliseconds())
					}
				}
				return a.Verdict != broker.Unknown
			})
			if a.Verdict != want || known && a.Consent.RefreshToken.Reveal() != "r1" {
				t.Errorf("verdict %d, %+v", a.Verdict, a.Consent)
			}
			if kept := server.Do("HGET", aKey, "q:"+broker.NewSecret("r1").ID()); kept != "never sealed" {
				t.Errorf("%q was kept", kept)
			}
		})
	}
}

func TestForeignKeysAreLeftAlone(t *testing.T) {
	server, replicas := newReplicas(t, 1)
	r := replicas[0]
	log := silent(r)
	for _, foreign := range [][]any{{"SET", aKey, "x"}, {"HSET", aKey, "a", "b"}, {"HSET", aKey, "v", "1", "s:", "x y", "r", "1 2 3 4 5 6 7 8", "l", "x"}} {
		server.Flush()
		server.Do(foreign...)
		for range 3 {
			if _, err := r.Acquire(t.Context(), claimOf("p", broker.NoConsent)); !errors.Is(err, ErrForeign) {
				t.Errorf("%v: %v", foreign, err)
			}
		}
		r.sweeps.sweep(0)
	}
	if n := strings.Count(log.String(), "\n"); n != 1 {
		t.Errorf("logged:\n%s", log)
	}
}

// When Redis is full, nothing new is begun, and what is under way is brought home.
func TestAFullRedis(t *testing.T) {
	server, replicas := newReplicas(t, 1)
	r := replicas[0]
	l := leaseFor(t, r, "p", broker.NoConsent)
	server.Do("CONFIG", "SET", "maxmemory", "1")
	if a, err := r.Acquire(t.Context(), broker.Claim{Family: "another", Owner: "p", Length: time.Second}); err == nil {
		t.Errorf("acquire: verdict %d", a.Verdict)
	}
	if ok, err := r.Renew(t.Context(), l); !ok || err != nil {
		t.Errorf("renew: %t, %v", ok, err)
	}
	save(t, r, l, broker.Result{Token: aToken("t1")}, broker.Saved)
	if rec, err := r.Look(t.Context(), aFamily, ""); err != nil || rec.Token == nil {
		t.Errorf("look: %+v, %v", rec, err)
	}
	if _, err := r.Drop(t.Context(), broker.Drop{Family: aFamily, Operation: "drop", Remember: time.Hour}); err != nil {
		t.Errorf("drop: %v", err)
	}
	if err := r.Reset(t.Context(), aFamily); err != nil {
		t.Errorf("reset: %v", err)
	}
}

// A user without rights to the channel is none who cannot save.
func TestAUserThatMayNotPublish(t *testing.T) {
	server := testredis.Start(t, testredis.Options{Users: []string{"default on nopass ~* resetchannels +@all"}})
	r, err := NewRedis(RedisOptions{Addresses: []string{server.Address()}}, Access{Keyset: testKeyset(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	l := leaseFor(t, r, "p", broker.NoConsent)
	save(t, r, l, broker.Result{Token: aToken("t1")}, broker.Saved)
	save(t, r, l, broker.Result{Token: aToken("t1")}, broker.Saved)
}

// A record ends by itself, a day after what is in it, unless it holds what cannot
// be had again.
func TestHowLongRecordsAreKept(t *testing.T) {
	server, replicas := newReplicas(t, 1)
	r := replicas[0]
	ttl := func(what string, want time.Duration) {
		t.Helper()
		got := time.Duration(server.Do("PTTL", aKey).(int64)) * time.Millisecond
		if want < 0 && got >= 0 || want >= 0 && (got < want-10*time.Second || got > want) {
			t.Errorf("%s: kept for %v, want %v", what, got, want)
		}
	}
	const day = 24 * time.Hour
	l := leaseFor(t, r, "p", broker.NoConsent)
	ttl("a lease", day+3*time.Second)
	save(t, r, l, broker.Result{Token: aToken("t1")}, broker.Saved)
	ttl("a token", day+time.Hour)
	l = leaseFor(t, r, "q", broker.NoConsent)
	fail := func(f broker.Failure) {
		t.Helper()
		if _, err := r.Fail(t.Context(), l, f); err != nil {
			t.Fatal(err)
		}
	}
	fail(broker.Failure{Kind: broker.Rejection, Credential: "other", Rest: broker.Forever})
	ttl("a rejection", -1)
	if err := r.Reset(t.Context(), aFamily); err != nil {
		t.Fatal(err)
	}
	ttl("none", day+time.Hour)
	l = leaseFor(t, r, "r", broker.NoConsent)
	fail(broker.Failure{Kind: broker.Throttling, Rest: 3 * time.Hour, Jitter: 1})
	ttl("a request for quiet", day+3*time.Hour)
	signIn(t, r, "r1")
	ttl("a consent", -1)
	if _, err := r.Drop(t.Context(), broker.Drop{Family: aFamily, Operation: "drop", Remember: 10 * time.Hour}); err != nil {
		t.Fatal(err)
	}
	ttl("a tombstone", day+10*time.Hour)
}

// The scripts judge demands by the rules of the broker, which are in Go.
func TestScriptsJudgeAsTheRulesSay(t *testing.T) {
	_, replicas := newReplicas(t, 1)
	r := replicas[0]
	for i := range 500 {
		family := fmt.Sprint("family", i)
		life := time.Duration(10+rand.IntN(8000)) * time.Second
		left := time.Duration(rand.Int64N(int64(life))).Truncate(time.Millisecond)
		l := broker.Lease{Family: family, Owner: "p"}
		a, err := r.Acquire(t.Context(), broker.Claim{Family: family, Owner: "p", Length: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		l.Fence = a.Fence
		kept, _, err := r.Save(t.Context(), l, broker.Result{Token: broker.StoredToken{Access: broker.NewSecret(family), Lifetime: life, Remaining: left}})
		if err != nil {
			t.Fatal(err)
		}
		d := broker.Demand{Lifetime: []time.Duration{
			0, life, left + time.Second, left - time.Second, life - max(10*time.Second, life/100) + time.Millisecond, life - max(10*time.Second, life/100),
		}[rand.IntN(6)]}
		if rand.IntN(4) == 0 {
			d.NewerThan = kept.Generation - 1 + broker.Generation(rand.IntN(2))
		}
		if left-broker.Margin(life) < time.Second && left > broker.Margin(life) || left < time.Second { // ends meanwhile
			continue
		}
		a, err = r.Acquire(t.Context(), broker.Claim{Family: family, Owner: "q", Length: time.Second, Demand: d})
		if err != nil {
			t.Fatal(err)
		}
		want := broker.Granted
		switch {
		case d.Meets("", kept.Generation, life, left) && kept.Generation > d.NewerThan:
			want = broker.Usable
		case d.TooLong(life):
			want = broker.Short
		}
		if a.Verdict != want {
			t.Errorf("life %v, left %v, demand %+v: verdict %d, want %d", life, left, d, a.Verdict, want)
		}
	}
	for i := range 12 {
		for _, jitter := range []float64{0.8, 1, 1.1937} {
			for _, least := range []time.Duration{0, 7 * time.Second, time.Hour} {
				family := fmt.Sprint("failing", i, jitter, least)
				var got broker.Failure
				for n := range i + 1 {
					r.offset.Add(2 * time.Hour.Milliseconds())
					owner := fmt.Sprint(n)
					a, err := r.Acquire(t.Context(), broker.Claim{Family: family, Owner: owner, Length: time.Second})
					if err != nil {
						t.Fatal(err)
					}
					got, err = r.Fail(t.Context(), broker.Lease{Family: family, Owner: owner, Fence: a.Fence}, broker.Failure{Kind: broker.Transient, Jitter: jitter, Rest: least})
					if err != nil {
						t.Fatal(err)
					}
				}
				if want := broker.Backoff(i+1, least, jitter); got.Rest != want.Truncate(time.Millisecond) {
					t.Errorf("attempt %d, jitter %v, least %v: rests %v, want %v", i+1, jitter, least, got.Rest, want)
				}
			}
		}
	}
}

// No secret is in Redis in clear, nor in what is logged.
func TestNothingSecretIsInRedis(t *testing.T) {
	server, replicas := newReplicas(t, 2)
	r := replicas[0]
	log := silent(r)
	signIn(t, r, "r1-very-secret")
	refresh(t, r, "r1-very-secret", "r2-very-secret")
	r.Restore(aFamily, "b", aToken("b-very-secret"))
	if err := r.sync(t.Context(), aFamily); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Drop(t.Context(), broker.Drop{Family: aFamily, Operation: "drop", Remember: time.Hour}); err != nil {
		t.Fatal(err)
	}
	if all := fmt.Sprint(server.Do("HGETALL", aKey), log); strings.Contains(all, "very-secret") {
		t.Error(all)
	}
}

func TestClosingLeavesNothingBehind(t *testing.T) {
	server := testredis.Start(t, testredis.Options{})
	ignored := goleak.IgnoreCurrent()
	r := replica(t, server.Address(), testKeyset(t))
	save(t, r, leaseFor(t, r, "p", broker.NoConsent), broker.Result{Token: aToken("t1")}, broker.Saved)
	r.Close()
	goleak.VerifyNone(t, ignored)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := r.Acquire(ctx, claimOf("p", broker.NoConsent)); err == nil {
		t.Error("a closed store answers")
	}
}

// Starting needs no Redis, and one that comes later is used.
func TestRedisComesLater(t *testing.T) {
	server := testredis.Start(t, testredis.Options{})
	server.Kill()
	r, err := NewRedis(RedisOptions{Addresses: []string{server.Address()}}, Access{Keyset: testKeyset(t)})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := r.Acquire(t.Context(), claimOf("p", broker.NoConsent)); !errors.Is(err, broker.ErrStoreRefused) {
		t.Errorf("acquire: %v", err)
	}
	r.Restore(aFamily, "", aToken("t1"))
	server.Restart()
	usable := claimOf("p", broker.NoConsent)
	usable.Demand = broker.Demand{}
	eventually(t, "what was obtained meanwhile", 20*time.Second, func() bool {
		a, err := r.Acquire(t.Context(), usable)
		return err == nil && a.Verdict == broker.Usable && a.Token.Access.Reveal() == "t1"
	})
	if s := r.Stats(); !s.Reachable || s.Calls[Call{Name: "acquire", Outcome: "ok"}] == 0 {
		t.Errorf("%+v", s)
	}
}

// A presentation is committed to where it survives the loss of the master, or not
// at all; asking again asks for that again.
func TestAnIntentThatIsNotReplicated(t *testing.T) {
	master, copied := testredis.Start(t, testredis.Options{}), testredis.Start(t, testredis.Options{})
	host, port, _ := strings.Cut(master.Address(), ":")
	copied.Do("REPLICAOF", host, port)
	eventually(t, "the replica is in step", 20*time.Second, func() bool {
		return strings.Contains(master.Info("replication")["slave0"], "state=online")
	})
	r := replica(t, master.Address(), testKeyset(t))
	signIn(t, r, "r1")
	l := leaseFor(t, r, "p", broker.ConsentRequired)
	intend := func() broker.IntendVerdict {
		t.Helper()
		v, err := r.Intend(t.Context(), l, broker.Presentation{RefreshID: broker.NewSecret("r1").ID(), Horizon: time.Minute, Most: 2})
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	copied.Pause()
	for range 2 { // the second time over a connection that has written nothing else
		if v := intend(); v != broker.IntendUnconfirmed {
			t.Fatalf("verdict %d while the replica stands still", v)
		}
	}
	copied.Continue()
	eventually(t, "the replica has it", 20*time.Second, func() bool {
		if ok, err := r.Renew(t.Context(), l); !ok || err != nil {
			t.Fatalf("renew: %t, %v", ok, err)
		}
		return intend() == broker.Intended
	})
	if a, err := r.Look(t.Context(), aFamily, ""); err != nil || a.Consent.Presentations != 1 {
		t.Errorf("%+v, %v", a.Consent, err)
	}
	if n := r.Stats().Unconfirmed; n < 2 {
		t.Errorf("%d unconfirmed", n)
	}
}

// The record of a job ends soon after what is in it, and so does that of whose its
// token is.
func TestHowLongJobsAreKept(t *testing.T) {
	server, replicas := newReplicas(t, 1)
	r := replicas[0]
	const family, slot = "job.1", "job.1/a"
	ttl := func(what, key string, want time.Duration) {
		t.Helper()
		got := time.Duration(server.Do("PTTL", key).(int64)) * time.Millisecond
		if got < want-10*time.Second || got > want {
			t.Errorf("%s: kept for %v, want %v", what, got, want)
		}
	}
	claim := broker.Claim{Family: family, Slot: slot, Owner: "p", Length: 3 * time.Second}
	a, err := r.Acquire(t.Context(), claim)
	if err != nil || a.Verdict != broker.Granted {
		t.Fatalf("verdict %d, %v", a.Verdict, err)
	}
	ttl("a lease", recordKey(family), 2*time.Minute+3*time.Second)
	l := broker.Lease{Family: family, Owner: "p", Fence: a.Fence, Length: 3 * time.Second}
	save(t, r, l, broker.Result{Slot: slot, Token: aToken("t1")}, broker.Saved)
	ttl("a token", recordKey(family), time.Hour+2*time.Minute)
	if _, err := r.Own(t.Context(), "t1", slot, time.Hour); err != nil {
		t.Fatal(err)
	}
	ttl("the owner of a token", ownerKey("t1"), time.Hour)
	r.offset.Add((20 * time.Minute).Milliseconds())
	if _, err := r.Drop(t.Context(), broker.Drop{Family: family, Operation: "o", Job: "job.1", Remember: 10 * time.Minute}); err != nil {
		t.Fatal(err)
	}
	ttl("a job that has ended", recordKey(family), 40*time.Minute+10*time.Minute+2*time.Minute)
	if got := r.mirror.size(); got != 1 {
		t.Fatalf("%d families in memory, want that of the job", got)
	}
	r.mirror.sweepable(0)
	if r.mirror.size() != 1 {
		t.Error("the end of the job is forgotten before its token would have ended")
	}
	r.offset.Add((51 * time.Minute).Milliseconds())
	r.mirror.sweepable(0)
	if got := r.mirror.size(); got != 0 {
		t.Errorf("%d families in memory after the token would have ended, want none", got)
	}
}

// What jobs leave in a record that others use goes with the next change of it.
func TestJobsLeaveNothingInASharedRecord(t *testing.T) {
	server, replicas := newReplicas(t, 1)
	r := replicas[0]
	before := func() int64 { return server.Do("HLEN", aKey).(int64) }
	shared := func(n int) {
		t.Helper()
		l := leaseFor(t, r, fmt.Sprint("shared", n), broker.NoConsent)
		save(t, r, l, broker.Result{Slot: "own", Token: aToken(fmt.Sprint("t", n))}, broker.Saved)
	}
	shared(1)
	without := before()
	for i := range 100 {
		slot := fmt.Sprintf("job.%d/a", i)
		l := leaseFor(t, r, slot, broker.NoConsent)
		save(t, r, l, broker.Result{Slot: slot, Token: aToken(slot)}, broker.Saved)
		if i%2 == 0 {
			dropped, err := r.Drop(t.Context(), broker.Drop{Family: aFamily, Operation: slot, Job: broker.JobOf(slot), Remember: 10 * time.Minute})
			if err != nil || len(dropped.Access) != 1 {
				t.Fatalf("dropped %d tokens, %v", len(dropped.Access), err)
			}
			if err := r.Confirm(t.Context(), aFamily, dropped.Access[0].ID()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := before(); got <= without {
		t.Fatalf("%d fields with the jobs, %d without: they are elsewhere", got, without)
	}
	r.offset.Add((time.Hour + 11*time.Minute).Milliseconds())
	shared(2)
	if got := before() - 1; got > without { // and the operations of drops
		t.Errorf("%d fields after all jobs have ended, want %d: %v", got, without, server.Do("HKEYS", aKey))
	}
}
