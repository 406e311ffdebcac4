// Package storetest holds every broker.Store to one contract: what the
// interface's comments promise, told as histories. Walk looks for what no
// history tells, at random.
package storetest

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Subject is a store under test.
type Subject struct {
	Store broker.Store
	// Another is the store of another replica, which shares the data; nil if a
	// store is not shared.
	Another broker.Store
	// Advance lets time pass, as the store sees it.
	Advance func(time.Duration)
	// Interrupt makes the next transition of Store go wrong in that way, and
	// reports whether it can. Nil leaves it to an Interrupted around Store.
	Interrupt func(Interruption) bool

	// Lose makes the store forget all it was told while its replicas live on.
	// A store that cannot lose anything says why in Keeps instead; what
	// happens after a loss is then not shown.
	Lose  func()
	Keeps string
}

// groups of histories, by what they show.
var groups = []struct {
	name      string
	histories map[string]func(*history)
}{
	{"lease", leases},
	{"token", tokens},
	{"failure", failures},
	{"consent", consents},
	{"lineage", lineages},
	{"drop", drops},
	{"ticket", tickets},
	{"job", jobs},
	{"restored", restored},
	{"again", repeats},
	{"loss", losses},
}

// Run runs the contract; within runs each history with an empty store.
func Run(t *testing.T, within func(t *testing.T, history func(t *testing.T, s Subject))) {
	for _, group := range groups {
		t.Run(group.name, func(t *testing.T) {
			for name, run := range group.histories {
				t.Run(name, func(t *testing.T) {
					var notShown string
					within(t, func(t *testing.T, s Subject) { run(begin(t, s, &notShown)) })
					if notShown != "" {
						t.Skip("not shown: " + notShown)
					}
				})
			}
		})
	}
}

const (
	lease   = 3 * time.Second
	horizon = 15 * time.Second
	// most presentations of one refresh token that may be in doubt.
	most = 2
	hour = time.Hour
)

// history is a test in which replicas take turns. Whoever is called "p" uses
// Store, everybody else the store of another replica.
type history struct {
	t *testing.T
	Subject
	family string
	// use of refresh tokens by those who claim.
	use broker.ConsentUse
	// late has happen what an interruption has held back.
	late func() int
	// notShown is why this history cannot be told of the subject.
	notShown *string
}

func begin(t *testing.T, s Subject, notShown *string) *history {
	h := &history{t: t, Subject: s, family: "family", late: func() int { return 0 }, notShown: notShown}
	if s.Another == nil {
		h.Another = s.Store
	}
	if s.Interrupt == nil {
		i := Interrupt(s.Store)
		h.Store, h.late = i, i.Deliver
		h.Interrupt = func(k Interruption) bool { i.Next(k); return true }
	}
	return h
}

// cannot ends a history that the subject is not made for.
func (h *history) cannot(why string) {
	*h.notShown = why
	h.t.SkipNow()
}

func (h *history) ctx() context.Context { return h.t.Context() }

func (h *history) by(owner string) broker.Store {
	if owner == "p" {
		return h.Store
	}
	return h.Another
}

// must ends the history on an error.
func (h *history) must(what string, err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatalf("%s: %v", what, err)
	}
}

// want compares answers that print alike.
func (h *history) want(what string, got, want any) {
	h.t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		h.t.Errorf("%s: %v, want %v", what, got, want)
	}
}

// about wants a duration within a second of another, for what calls take.
func (h *history) about(what string, got, want time.Duration) {
	h.t.Helper()
	if got < want-time.Second || got > want+time.Second {
		h.t.Errorf("%s: %v, want about %v", what, got, want)
	}
}

// eventually waits for what a store does behind its callers' backs.
func (h *history) eventually(what string, ok func() bool) {
	h.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			h.t.Fatalf("%s did not happen", what)
		}
	}
}

// anew is a demand that no token meets.
var anew = broker.Demand{NewerThan: math.MaxInt64}

// claimOf is owner's claim to a slot of the family.
func (h *history) claimOf(owner, slot string, d broker.Demand) broker.Claim {
	return broker.Claim{Family: h.family, Slot: slot, Owner: owner, Length: lease, Credentials: []string{"secret"}, Demand: d, Consent: h.use}
}

// claim wants that verdict. While the store asks other replicas, which takes
// real time, it waits as it is told to.
func (h *history) claim(c broker.Claim, want broker.Verdict) broker.Acquisition {
	h.t.Helper()
	var a broker.Acquisition
	h.eventually("an answer to the claim of "+c.Owner, func() bool {
		var err error
		a, err = h.by(c.Owner).Acquire(h.ctx(), c)
		h.must("acquire by "+c.Owner, err)
		if a.Verdict != broker.Unknown {
			return true
		}
		time.Sleep(a.Wait)
		c.Asked = true
		return false
	})
	if a.Verdict != want {
		h.t.Fatalf("acquire by %s: verdict %d, want %d", c.Owner, a.Verdict, want)
	}
	return a
}

// acquire claims the family for owner, and wants that verdict.
func (h *history) acquire(owner string, d broker.Demand, want broker.Verdict) broker.Acquisition {
	h.t.Helper()
	return h.claim(h.claimOf(owner, "", d), want)
}

// grant takes the lease for owner, whatever token there is.
func (h *history) grant(owner, slot string) (broker.Lease, broker.Acquisition) {
	h.t.Helper()
	a := h.claim(h.claimOf(owner, slot, anew), broker.Granted)
	return broker.Lease{Family: h.family, Owner: owner, Fence: a.Fence, Length: lease}, a
}

func (h *history) lease(owner string) broker.Lease {
	h.t.Helper()
	l, _ := h.grant(owner, "")
	return l
}

func (h *history) renew(l broker.Lease, want bool) {
	h.t.Helper()
	if ok, err := h.by(l.Owner).Renew(h.ctx(), l); err != nil || ok != want {
		h.t.Fatalf("renew by %s: %t, %v; want %t", l.Owner, ok, err, want)
	}
}

// intend commits to presenting the refresh token of that name.
func (h *history) intend(l broker.Lease, refresh string, want broker.IntendVerdict) {
	h.t.Helper()
	v, err := h.by(l.Owner).Intend(h.ctx(), l, broker.Presentation{RefreshID: id(refresh), Horizon: horizon, Most: most})
	if err != nil || v != want {
		h.t.Fatalf("intend by %s: verdict %d, error %v; want %d", l.Owner, v, err, want)
	}
}

// save wants that verdict on a result.
func (h *history) save(l broker.Lease, r broker.Result, want broker.SaveVerdict) broker.StoredToken {
	h.t.Helper()
	got, v, err := h.by(l.Owner).Save(h.ctx(), l, r)
	if err != nil || v != want {
		h.t.Fatalf("save by %s: verdict %d, error %v; want %d", l.Owner, v, err, want)
	}
	if v == broker.Saved && got.Generation <= 0 {
		h.t.Errorf("saved under generation %d", got.Generation)
	}
	return got
}

func (h *history) fail(l broker.Lease, f broker.Failure) broker.Failure {
	h.t.Helper()
	got, err := h.by(l.Owner).Fail(h.ctx(), l, f)
	h.must("fail by "+l.Owner, err)
	return got
}

// drop takes the token of that name out of service, or the grant if it is
// empty.
func (h *history) drop(operation, token string) broker.Dropped {
	h.t.Helper()
	d := broker.Drop{Family: h.family, Operation: operation, Remember: 2 * hour}
	if token != "" {
		d.Token = id(token)
	}
	dropped, err := h.Store.Drop(h.ctx(), d)
	h.must("drop", err)
	return dropped
}

func (h *history) reset() {
	h.t.Helper()
	h.must("reset", h.Store.Reset(h.ctx(), h.family))
}

func (h *history) look(slot string) broker.Record {
	h.t.Helper()
	r, err := h.Another.Look(h.ctx(), h.family, slot)
	h.must("look", err)
	return r
}

// summary is all that can be seen of the family but for times and generations:
// what two slots hold, and what a newcomer would be told.
func (h *history) summary() string {
	h.t.Helper()
	var s strings.Builder
	for _, slot := range []string{"", "b"} {
		r := h.look(slot)
		if r.Token != nil && r.Token.Remaining > 0 {
			fmt.Fprintf(&s, "slot %q: %s; ", slot, r.Token.Access.Reveal())
		}
		if slot != "" {
			continue
		}
		if f := r.Failure; f != nil && f.Rest > 0 {
			fmt.Fprintf(&s, "failure %d, attempt %d; ", f.Kind, f.Attempts)
		}
		if c := r.Consent; c != nil {
			fmt.Fprintf(&s, "consent %s, rotates %d, %d in doubt; ", c.RefreshToken.Reveal(), c.Rotates, c.Presentations)
		}
		fmt.Fprintf(&s, "to revoke: %t; ", r.ToRevoke)
	}
	c := h.claimOf("newcomer", "", anew)
	c.Asked = true
	a, err := h.Another.Acquire(h.ctx(), c)
	h.must("acquire by a newcomer", err)
	if a.Verdict == broker.Granted {
		h.fail(broker.Lease{Family: h.family, Owner: c.Owner, Fence: a.Fence, Length: lease}, broker.Failure{Outcome: broker.Unsent})
	}
	fmt.Fprintf(&s, "verdict %d", a.Verdict)
	return s.String()
}

// id of the token of that name.
func id(name string) string { return broker.NewSecret(name).ID() }

func token(name string, lives time.Duration) broker.StoredToken {
	return broker.StoredToken{Access: broker.NewSecret(name), Type: "Bearer", Scopes: []string{"a", "b"}, Lifetime: lives, Remaining: lives}
}

// plain is a grant that came without a refresh token.
func plain(name string) broker.Result { return broker.Result{Token: token(name, hour)} }

// refreshed is what came for the refresh token that was spent.
func refreshed(slot, name, spent, refresh string) broker.Result {
	r := broker.Result{Slot: slot, Token: token(name, hour), Spent: id(spent), Refresh: broker.NewSecret(refresh), Rotates: broker.RotatesYes}
	if refresh == "" || refresh == spent {
		r.Rotates = broker.RotatesNo
	}
	return r
}

// signIn is what a person's consent brings: the refresh token of that name, and
// a token named after it.
func (h *history) signIn(refresh string) broker.StoredToken {
	h.t.Helper()
	l, r := signedIn(h.family, refresh)
	return h.save(l, r, broker.Saved)
}

func signedIn(family, refresh string) (broker.Lease, broker.Result) {
	return broker.Lease{Family: family, Owner: "person with " + refresh, Length: lease}, broker.Result{
		Token: token("token of "+refresh, hour), Refresh: broker.NewSecret(refresh), Remaining: 1000 * hour, Supersede: true,
	}
}

func transient(least time.Duration) broker.Failure {
	return broker.Failure{Kind: broker.Transient, Text: "down", Rest: least, Jitter: 1}
}

func dead(refresh string) broker.Failure {
	return broker.Failure{Kind: broker.Dead, Code: "invalid_grant", Text: "no", Credential: id(refresh), Rest: broker.Forever, Outcome: broker.Answered, Jitter: 1}
}

func rejected(credential string, rest time.Duration) broker.Failure {
	return broker.Failure{Kind: broker.Rejection, Code: "invalid_client", Text: "no", Credential: credential, Rest: rest, Jitter: 1}
}

// listen returns what the store has announced since, and a way to stop.
func (h *history) listen(s broker.Store) (heard chan broker.Change, stop func()) {
	heard = make(chan broker.Change, 100)
	return heard, s.Subscribe(func(c broker.Change) {
		select {
		case heard <- c:
		default:
		}
	})
}

// hears waits for a change of the family that is as it should be.
func (h *history) hears(heard <-chan broker.Change, what string, ok func(broker.Change) bool) {
	h.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		select {
		case c := <-heard:
			if c.Family == h.family && ok(c) {
				return
			}
		case <-deadline:
			h.t.Fatalf("%s was not announced", what)
		}
	}
}

func dropsAll(ids ...string) func(broker.Change) bool {
	return func(c broker.Change) bool {
		for _, id := range ids {
			if !slices.Contains(c.Dropped, id) {
				return false
			}
		}
		return true
	}
}
