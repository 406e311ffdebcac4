package broker_test

import (
	"context"
	"errors"
	"fmt"
	mrand "math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

func ofJob(id string, scopes ...string) broker.Ask {
	return broker.Ask{Profile: "invoices", Job: id, Scopes: scopes}
}

// wantFailure wants that failure.
func wantFailure(t *testing.T, err error, reason broker.Reason) *broker.Error {
	t.Helper()
	var e *broker.Error
	if !errors.As(err, &e) || e.Reason != reason {
		t.Fatalf("got %v, want %s", err, reason)
	}
	return e
}

// give wants a token for what is asked for.
func give(t *testing.T, b *broker.Broker, ask broker.Ask, d broker.Demand) *broker.Token {
	t.Helper()
	token, _, err := b.Issue(t.Context(), ask, d)
	if err != nil {
		t.Fatalf("job %q: %v", ask.Job, err)
	}
	return token
}

// served collects who got which token.
type served struct {
	mu     sync.Mutex
	tokens map[string]map[string]bool // by who asked
}

func (s *served) got(who, token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tokens == nil {
		s.tokens = make(map[string]map[string]bool)
	}
	if s.tokens[who] == nil {
		s.tokens[who] = make(map[string]bool)
	}
	s.tokens[who][token] = true
}

// wantOneEach wants one token for each who asked, and no token for two of them.
func (s *served) wantOneEach(t *testing.T, n int) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.tokens) != n {
		t.Errorf("%d got tokens, want %d", len(s.tokens), n)
	}
	owner := make(map[string]string)
	for who, tokens := range s.tokens {
		if len(tokens) != 1 {
			t.Errorf("%s got %d tokens, want one", who, len(tokens))
		}
		for token := range tokens {
			if other, taken := owner[token]; taken {
				t.Errorf("%s and %s have one token", who, other)
			}
			owner[token] = who
		}
	}
}

func TestEveryJobHasOneTokenOnAllReplicas(t *testing.T) {
	for name, grants := range map[string]struct {
		jobs  int
		world func(t *testing.T) (p *broker.Profile, f *fleet, calls func() int)
	}{
		"client credentials": {500, func(t *testing.T) (*broker.Profile, *fleet, func() int) {
			e := &endpoint{takes: 100 * time.Millisecond}
			p := profile(e)
			return p, start(t, 3, p), e.count
		}},
		"password": {100, func(t *testing.T) (*broker.Profile, *fleet, func() int) {
			e := &endpoint{takes: 20 * time.Millisecond}
			p := profile(e, password)
			return p, start(t, 3, p), e.count
		}},
		"a person's consent": {100, func(t *testing.T) (*broker.Profile, *fleet, func() int) {
			s := newIDP()
			s.takes = 20 * time.Millisecond
			p := s.consented()
			f := start(t, 3, p)
			s.signIn(t, f.store, p)
			return p, f, func() int { return s.grants() - 1 }
		}},
		"a password, then refresh tokens": {100, func(t *testing.T) (*broker.Profile, *fleet, func() int) {
			s := newIDP()
			s.takes = 20 * time.Millisecond
			p := s.consented(passwordThenRefresh)
			return p, start(t, 3, p), s.grants
		}},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				_, f, calls := grants.world(t)
				var s served
				var wg sync.WaitGroup
				ask := func(who string, b *broker.Broker, a broker.Ask) {
					wg.Go(func() {
						token, _, err := b.Issue(t.Context(), a, broker.Demand{})
						if err != nil {
							t.Errorf("%s: %v", who, err)
							return
						}
						s.got(who, token.ID)
					})
				}
				for i := range grants.jobs {
					for _, b := range f.replicas {
						ask(fmt.Sprint("job ", i), b, ofJob(fmt.Sprint(i)))
						ask(fmt.Sprint("job ", i), b, ofJob(fmt.Sprint(i), "b", "c", "a")) // all there are
						ask("all others", b, broker.Ask{Profile: "invoices", Named: true})
					}
				}
				wg.Wait()
				// A replica that was started anew has nothing but the store.
				fresh := broker.New(f.store, broker.Options{})
				defer fresh.Close()
				fresh.Configure([]*broker.Profile{grantsProfile(f)})
				for i := range grants.jobs {
					ask(fmt.Sprint("job ", i), fresh, ofJob(fmt.Sprint(i)))
				}
				wg.Wait()
				s.wantOneEach(t, grants.jobs+1)
				// A person's sign-in has brought the token that all share.
				if got := calls(); got > grants.jobs+1 || got < grants.jobs {
					t.Errorf("%d token requests for %d jobs and the rest", got, grants.jobs)
				}
			})
		})
	}
}

// grantsProfile is the profile that the fleet serves.
func grantsProfile(f *fleet) *broker.Profile {
	s, _ := f.replicas[0].Glance("invoices")
	return s.Profile
}

func TestJobEndsEverywhere(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 3, profile(e, func(p *broker.Profile) { p.Issuer = revoking{e} }))
		a, b := ofJob("nightly"), f.replicas[2]
		token := give(t, f.replicas[0], a, broker.Demand{})
		subset := give(t, f.replicas[0], ofJob("nightly", "a"), broker.Demand{})
		neighbor := give(t, f.replicas[0], ofJob("weekly"), broker.Demand{})
		for _, r := range f.replicas {
			if give(t, r, a, broker.Demand{}).ID != token.ID {
				t.Error("another token for the same job")
			}
		}
		watch := b.Watch(a)
		defer watch.Close()
		_, _, news, err := watch.Next(t.Context(), broker.Demand{})
		if err != nil {
			t.Fatal(err)
		}
		r, err := f.replicas[1].Revoke(t.Context(), a, "")
		if err != nil || !r.Confirmed || r.TokenID != token.ID && r.TokenID != subset.ID {
			t.Fatalf("%+v, %v", r, err)
		}
		synctest.Wait()
		select {
		case <-news:
		default:
			t.Error("who watches has not heard")
		}
		for i, want := range []int{1, 0, 1} { // the other job, and who watches
			if _, jobs := f.replicas[i].Entries(); jobs != want {
				t.Errorf("replica %d has places for %d jobs, want %d", i, jobs, want)
			}
		}
		_, _, _, err = watch.Next(t.Context(), broker.Demand{})
		wantFailure(t, err, broker.ReasonJobEnded)
		for range 30 { // half an hour
			for _, r := range f.replicas {
				for _, d := range []broker.Demand{{}, {Not: token.ID}} {
					for _, ask := range []broker.Ask{a, ofJob("nightly", "a"), ofJob("nightly", "b")} {
						_, _, err := r.Issue(t.Context(), ask, d)
						wantFailure(t, err, broker.ReasonJobEnded)
					}
				}
			}
			time.Sleep(time.Minute)
		}
		if give(t, b, ofJob("weekly"), broker.Demand{}).ID != neighbor.ID {
			t.Error("another job's token went with it")
		}
		if again, err := b.Revoke(t.Context(), a, ""); err != nil || again.TokenID != "" || again.Confirmed {
			t.Errorf("ending it again: %+v, %v", again, err)
		}
		wantCalls(t, e, 3)
		if len(e.revoked) != 2 {
			t.Errorf("the server was asked to revoke %v", e.revoked)
		}
		time.Sleep(41 * time.Minute) // the token would have ended, and ten minutes more
		if give(t, b, a, broker.Demand{}).ID == token.ID {
			t.Error("the token that was revoked")
		}
	})
}

func TestJobEndsForSomeScopesOnly(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 2, profile(e))
		give(t, f.replicas[0], ofJob("nightly", "a"), broker.Demand{})
		whole := give(t, f.replicas[0], ofJob("nightly"), broker.Demand{})
		if _, err := f.replicas[1].Revoke(t.Context(), ofJob("nightly", "a"), ""); err != nil {
			t.Fatal(err)
		}
		_, _, err := f.replicas[0].Issue(t.Context(), ofJob("nightly", "a"), broker.Demand{})
		wantFailure(t, err, broker.ReasonJobEnded)
		if give(t, f.replicas[1], ofJob("nightly"), broker.Demand{}).ID != whole.ID {
			t.Error("the other token went with it")
		}
		_, err = f.replicas[0].Revoke(t.Context(), ofJob("nightly", "z"), "")
		wantFailure(t, err, broker.ReasonInvalidRequest)
	})
}

func TestJobEndsOnlyWithTheTokenThatIsMeant(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 2, profile(e))
		old := give(t, f.replicas[0], ofJob("nightly"), broker.Demand{})
		time.Sleep(2 * time.Minute)
		now := give(t, f.replicas[0], ofJob("nightly"), broker.Demand{Not: old.ID})
		for _, b := range f.replicas {
			if r, err := b.Revoke(t.Context(), ofJob("nightly"), old.ID); err != nil || r.TokenID != "" {
				t.Errorf("%+v, %v", r, err)
			}
			if give(t, b, ofJob("nightly"), broker.Demand{}).ID != now.ID {
				t.Error("the current token went with an old one")
			}
		}
		if r, err := f.replicas[1].Revoke(t.Context(), ofJob("nightly"), now.ID); err != nil || r.TokenID != now.ID {
			t.Errorf("%+v, %v", r, err)
		}
		_, _, err := f.replicas[0].Issue(t.Context(), ofJob("nightly"), broker.Demand{})
		wantFailure(t, err, broker.ReasonJobEnded)
	})
}

func TestTokenOnItsWayToAJobThatEndsIsRevoked(t *testing.T) {
	for name, change := range map[string]func(*broker.Profile){"client credentials": func(*broker.Profile) {}, "password": password} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				e := &endpoint{takes: 5 * time.Second}
				f := start(t, 2, profile(e, change, func(p *broker.Profile) { p.Issuer = revoking{e} }))
				var wg sync.WaitGroup
				for _, b := range f.replicas {
					wg.Go(func() {
						_, _, err := b.Issue(t.Context(), ofJob("nightly"), broker.Demand{})
						wantFailure(t, err, broker.ReasonJobEnded)
					})
				}
				time.Sleep(time.Second)
				if r, err := f.replicas[1].Revoke(t.Context(), ofJob("nightly"), ""); err != nil || r.TokenID != "" {
					t.Fatalf("%+v, %v", r, err)
				}
				wg.Wait()
				wantCalls(t, e, 1)
				if len(e.revoked) != 1 {
					t.Errorf("the server was asked to revoke %v", e.revoked)
				}
				for _, b := range f.replicas {
					if all, jobs := b.Entries(); all != 1 || jobs != 0 {
						t.Errorf("%d entries, %d of jobs are left", all, jobs)
					}
				}
			})
		})
	}
}

func TestConsentSurvivesTheEndOfAJobWhoseTokenIsOnItsWay(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		s.takes = 5 * time.Second
		p := s.consented()
		f := start(t, 2, p)
		s.signIn(t, f.store, p)
		done := make(chan error)
		go func() {
			_, _, err := f.replicas[0].Issue(t.Context(), ofJob("nightly"), broker.Demand{})
			done <- err
		}()
		time.Sleep(time.Second)
		if _, err := f.replicas[1].Revoke(t.Context(), ofJob("nightly"), ""); err != nil {
			t.Fatal(err)
		}
		wantFailure(t, <-done, broker.ReasonJobEnded)
		if len(s.asked()) != 1 || !strings.HasPrefix(s.asked()[0], "access-") {
			t.Errorf("the server was asked to revoke %v, want the access token alone", s.asked())
		}
		give(t, f.replicas[1], ofJob("weekly"), broker.Demand{})
		f.ask(t, broker.Demand{NewerThan: 0})
		if s.isDead() || s.mostPresented() > 1 {
			t.Errorf("dead %t, a refresh token was presented %d times", s.isDead(), s.mostPresented())
		}
	})
}

func TestJobThatAskedOnceCostsNoSecondToken(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 2, profile(e))
		give(t, f.replicas[0], ofJob("once"), broker.Demand{})
		time.Sleep(3 * time.Hour)
		wantCalls(t, e, 1)

		token := give(t, f.replicas[0], ofJob("again"), broker.Demand{})
		time.Sleep(time.Until(token.RefreshTime) + time.Second)
		if give(t, f.replicas[0], ofJob("again"), broker.Demand{}).ID != token.ID { // and it is renewed meanwhile
			t.Error("another token before the first has ended")
		}
		synctest.Wait()
		wantCalls(t, e, 3)
		next := give(t, f.replicas[1], ofJob("again"), broker.Demand{})
		if next.ID == token.ID || give(t, f.replicas[0], ofJob("again"), broker.Demand{}).ID != next.ID {
			t.Error("the successor is not the job's on all replicas")
		}
		time.Sleep(3 * time.Hour)
		wantCalls(t, e, 3)

		watch := f.replicas[0].Watch(ofJob("followed"))
		_, _, _, err := watch.Next(t.Context(), broker.Demand{})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Hour)
		if n := e.count(); n < 6 || n > 9 {
			t.Errorf("%d token requests, want one per life of the token that is followed", n)
		}
		n := e.count()
		watch.Close()
		time.Sleep(5 * time.Hour)
		wantCalls(t, e, n)
		for _, b := range f.replicas {
			if all, jobs := b.Entries(); all != 1 || jobs != 0 {
				t.Errorf("%d entries, %d of jobs are left", all, jobs)
			}
		}
	})
}

func TestJobsLeaveNothingInMemory(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: func(n int) (*broker.Grant, error) {
			if n%5 == 0 {
				return fails(broker.Malformed, "", 0)(n)
			}
			return grant(n, time.Hour), nil
		}}
		f := start(t, 2, profile(e))
		for i := range 1000 {
			ask := ofJob(fmt.Sprint(i))
			_, _, _ = f.replicas[i%2].Issue(t.Context(), ask, broker.Demand{}) // some fail
			if i%3 == 0 {
				if _, err := f.replicas[0].Revoke(t.Context(), ask, ""); err != nil {
					t.Fatal(err)
				}
			}
		}
		if _, jobs := f.replicas[0].Entries(); jobs == 0 {
			t.Error("no job has a token")
		}
		time.Sleep(time.Hour + 2*time.Minute)
		synctest.Wait()
		for _, b := range f.replicas {
			if all, jobs := b.Entries(); all != 1 || jobs != 0 {
				t.Errorf("%d entries, %d of jobs are left", all, jobs)
			}
		}
	})
}

func TestRejectedTokenOfAJobIsReplacedUnderTheUsualRules(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 2, profile(e))
		shared, _ := f.ask(t, broker.Demand{})
		token := give(t, f.replicas[0], ofJob("nightly"), broker.Demand{})
		_, _, err := f.replicas[1].Issue(t.Context(), ofJob("nightly"), broker.Demand{Not: token.ID})
		wantFailure(t, err, broker.ReasonRefreshTooSoon)
		time.Sleep(time.Minute)
		var s served
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				next, _, err := f.replicas[i%2].Issue(t.Context(), ofJob("nightly"), broker.Demand{Not: token.ID})
				if err != nil {
					t.Error(err)
					return
				}
				s.got("nightly", next.ID)
			})
		}
		wg.Wait()
		s.wantOneEach(t, 1)
		wantCalls(t, e, 3)
		if now, _ := f.ask(t, broker.Demand{}); now.ID != shared.ID {
			t.Error("the token that all share was replaced, too")
		}
	})
}

func TestTooManyJobsAreThrottled(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e, func(p *broker.Profile) { p.MaxDedicated = 100 }))
		b := f.replicas[0]
		for i := range 100 {
			give(t, b, ofJob(fmt.Sprint(i)), broker.Demand{})
		}
		_, _, err := b.Issue(t.Context(), ofJob("one too many"), broker.Demand{})
		if e := wantFailure(t, err, broker.ReasonCallerThrottled); e.RetryAfter <= 0 || !strings.Contains(e.Text, "RevokeToken") {
			t.Errorf("retry after %v: %s", e.RetryAfter, e.Text)
		}
		give(t, b, ofJob("7"), broker.Demand{})
		f.ask(t, broker.Demand{})
		if _, err := b.Revoke(t.Context(), ofJob("7"), ""); err != nil {
			t.Fatal(err)
		}
		give(t, b, ofJob("one too many"), broker.Demand{})
		s, err := b.Glance("invoices")
		if err != nil || s.DedicatedTokens != 100 || s.Dedicated != 102 || s.Named != 0 {
			t.Errorf("%d dedicated tokens, %d answers with one, %d to named jobs, %v", s.DedicatedTokens, s.Dedicated, s.Named, err)
		}
		b.Configure([]*broker.Profile{profile(e, func(p *broker.Profile) { p.MaxDedicated = 100 })}) // a reload
		_, _, err = b.Issue(t.Context(), ofJob("still one too many"), broker.Demand{})
		wantFailure(t, err, broker.ReasonCallerThrottled)
		n := e.count()
		give(t, b, ofJob("8"), broker.Demand{})
		wantCalls(t, e, n)
		time.Sleep(time.Hour + time.Minute)
		give(t, b, ofJob("another"), broker.Demand{})
	})
}

func TestFloodOfJobsIsBounded(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: time.Second}
		f := start(t, 1, profile(e))
		b := f.replicas[0]
		give(t, b, ofJob("first"), broker.Demand{}) // the credential is proven
		began := time.Now()
		var mu sync.Mutex
		var got, refused int
		var order []int
		var wg sync.WaitGroup
		for i := range 2000 {
			time.Sleep(time.Microsecond) // they come one after another
			wg.Go(func() {
				_, _, err := b.Issue(t.Context(), ofJob(fmt.Sprint(i)), broker.Demand{})
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					got++
					order = append(order, i)
					return
				}
				refused++
				if e := wantFailure(t, err, broker.ReasonEndpointThrottled); e.RetryAfter <= 0 {
					t.Error("no word of when to come back")
				}
				if took := time.Since(began); took > 21*time.Second {
					t.Errorf("refused after %v", took)
				}
			})
		}
		time.Sleep(5 * time.Second)
		asked := time.Now()
		f.ask(t, broker.Demand{}) // what is shared does not wait with them
		if took := time.Since(asked); took > e.takes+100*time.Millisecond {
			t.Errorf("the token that all share took %v behind the flood", took)
		}
		wg.Wait()
		if e.most > 16+1 {
			t.Errorf("%d requests under way at once", e.most)
		}
		if got < 16*18 || got+refused != 2000 {
			t.Errorf("%d jobs got a token in 20 s, %d none; want 16 a second", got, refused)
		}
		for i, job := range order {
			if job > i+32 || job < i-32 {
				t.Errorf("job %d was served as number %d: that is not fair", job, i)
				break
			}
		}
		wantCalls(t, e, got+2)
	})
}

func TestFloodDoesNotKeepAJobFromWhatTheStoreHas(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 2, profile(e))
		token := give(t, f.replicas[0], ofJob("known"), broker.Demand{})
		e.set(func(e *endpoint) { e.takes = 5 * time.Second })
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() { _, _, _ = f.replicas[1].Issue(t.Context(), ofJob(fmt.Sprint(i)), broker.Demand{}) })
		}
		time.Sleep(time.Second)
		asked := time.Now()
		if give(t, f.replicas[1], ofJob("known"), broker.Demand{}).ID != token.ID {
			t.Error("another token")
		}
		if took := time.Since(asked); took > 100*time.Millisecond {
			t.Errorf("it took %v", took)
		}
		wg.Wait()
	})
}

func TestWithoutTheStoreAJobGetsNoOtherToken(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f, ways := brittleFleet(t, 2, profile(e))
		token := give(t, f.replicas[0], ofJob("nightly"), broker.Demand{})
		all(ways, errDown)
		if give(t, f.replicas[0], ofJob("nightly"), broker.Demand{}).ID != token.ID {
			t.Error("memory has another token")
		}
		for _, ask := range []broker.Ask{ofJob("nightly"), ofJob("new")} {
			_, _, err := f.replicas[1].Issue(t.Context(), ask, broker.Demand{})
			if e := wantFailure(t, err, broker.ReasonStoreUnavailable); e.RetryAfter <= 0 {
				t.Error("no word of when to come back")
			}
		}
		wantCalls(t, e, 1)
		if _, source := f.ask(t, broker.Demand{}); source != broker.Uncoordinated {
			t.Errorf("the token that all share came from %v", source)
		}
		_, err := f.replicas[0].Revoke(t.Context(), ofJob("nightly"), "")
		wantFailure(t, err, broker.ReasonStoreUnavailable)
		_, _, err = f.replicas[0].Issue(t.Context(), ofJob("nightly"), broker.Demand{})
		wantFailure(t, err, broker.ReasonStoreUnavailable) // not the token
	})
}

func TestTokenOfAJobThatCannotBeSavedIsNotHandedOut(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 500 * time.Millisecond}
		f, ways := brittleFleet(t, 1, profile(e))
		time.AfterFunc(250*time.Millisecond, func() { all(ways, errDown) })
		_, _, err := f.replicas[0].Issue(t.Context(), ofJob("nightly"), broker.Demand{})
		wantFailure(t, err, broker.ReasonStoreUnavailable)
	})
}

// clock is a server whose tokens say no more than the second.
func clock(lives time.Duration) func(int) (*broker.Grant, error) {
	return func(int) (*broker.Grant, error) {
		return &broker.Grant{AccessToken: broker.NewSecret(fmt.Sprint("issued at ", time.Now().Unix())), TokenType: "Bearer", Lifetime: lives}, nil
	}
}

func TestServerThatRepeatsItselfWithinASecond(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: clock(time.Hour)}
		f := start(t, 3, profile(e, func(p *broker.Profile) { p.Issuer = revoking{e} }))
		var s served
		var wg sync.WaitGroup
		for i, b := range f.replicas {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 2 * time.Second)
				for range 2 {
					for n, ask := range []broker.Ask{{Profile: "invoices"}, ofJob(fmt.Sprint("job of ", i))} {
						token, _, err := b.Issue(t.Context(), ask, broker.Demand{})
						if err != nil {
							t.Errorf("%v: %v", ask, err)
							continue
						}
						s.got(fmt.Sprint(n*(i+1)), token.ID)
					}
				}
			})
		}
		wg.Wait()
		s.wantOneEach(t, 4)
		if len(e.revoked) > 0 {
			t.Errorf("%v were revoked, which are in use", e.revoked)
		}
	})
}

func TestServerThatGivesEverybodyOneToken(t *testing.T) {
	for name, c := range map[string]struct {
		first, then broker.Ask
		reason      broker.Reason
	}{
		"a job, after all others":   {broker.Ask{Profile: "invoices"}, ofJob("nightly"), broker.ReasonDedicatedUnavailable},
		"a job, after another":      {ofJob("weekly"), ofJob("nightly"), broker.ReasonDedicatedUnavailable},
		"all others, after a job":   {ofJob("nightly"), broker.Ask{Profile: "invoices"}, broker.ReasonEndpointUnavailable},
		"a subset, after a job":     {ofJob("nightly"), broker.Ask{Profile: "invoices", Scopes: []string{"a"}}, broker.ReasonEndpointUnavailable},
		"another subset of the job": {ofJob("nightly"), ofJob("nightly", "a"), broker.ReasonDedicatedUnavailable},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				e := &endpoint{answer: func(int) (*broker.Grant, error) { return grant(1, time.Hour), nil }}
				f := start(t, 2, profile(e, func(p *broker.Profile) { p.Issuer = revoking{e} }))
				token := give(t, f.replicas[0], c.first, broker.Demand{})
				for range 20 {
					for _, b := range f.replicas {
						_, _, err := b.Issue(t.Context(), c.then, broker.Demand{})
						wantFailure(t, err, c.reason)
					}
					time.Sleep(time.Second)
				}
				if n := e.count(); n > 1+2*5 {
					t.Errorf("%d token requests in half a minute", n)
				}
				if give(t, f.replicas[0], c.first, broker.Demand{}).ID != token.ID || len(e.revoked) > 0 {
					t.Errorf("who had it has lost it: %v were revoked", e.revoked)
				}
			})
		})
	}
}

func TestConsentSurvivesAServerThatRepeatsAccessTokens(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		p := s.consented()
		p.Issuer = repeating{s}
		f := start(t, 2, p)
		s.signIn(t, f.store, p)
		token := give(t, f.replicas[0], ofJob("nightly"), broker.Demand{})
		_, _, err := f.replicas[1].Issue(t.Context(), ofJob("weekly"), broker.Demand{})
		wantFailure(t, err, broker.ReasonDedicatedUnavailable)
		if give(t, f.replicas[1], ofJob("nightly"), broker.Demand{}).ID != token.ID {
			t.Error("who had it has lost it")
		}
		if s.isDead() || s.mostPresented() > 1 || len(s.asked()) > 0 {
			t.Errorf("dead %t, presented %d times, revoked %v", s.isDead(), s.mostPresented(), s.asked())
		}
	})
}

// repeating rotates refresh tokens, and gives one access token again and again.
type repeating struct{ *idp }

func (s repeating) Issue(ctx context.Context, r broker.Request) (*broker.Grant, error) {
	g, err := s.idp.Issue(ctx, r)
	if g != nil {
		g.AccessToken = broker.NewSecret("the same as ever")
	}
	return g, err
}

func TestWrongSecretIsNotTriedJobByJob(t *testing.T) {
	for name, c := range map[string]struct {
		answer func(int) (*broker.Grant, error)
		most   int
		change func(*broker.Profile)
	}{
		"secret":   {fails(broker.ClientRejected, "invalid_client", 0), 1, func(*broker.Profile) {}},
		"password": {fails(broker.UserRejected, "invalid_grant", 0), 1, password},
		"scopes":   {fails(broker.RequestRejected, "invalid_scope", 0), 2 * 16, func(*broker.Profile) {}},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				e := &endpoint{takes: 100 * time.Millisecond, answer: c.answer}
				f := start(t, 2, profile(e, c.change))
				var wg sync.WaitGroup
				for i := range 1000 {
					wg.Go(func() {
						_, _, err := f.replicas[i%2].Issue(t.Context(), ofJob(fmt.Sprint(i)), broker.Demand{})
						wantFailure(t, err, broker.ReasonCredentialsRejected)
					})
				}
				wg.Wait()
				if n := e.count(); n > c.most {
					t.Errorf("%d token requests, want %d at most", n, c.most)
				}
				e.set(func(e *endpoint) { e.answer = nil })
				if err := f.replicas[0].Reset(t.Context(), "invoices"); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				for i := range 100 {
					give(t, f.replicas[i%2], ofJob(fmt.Sprint(i)), broker.Demand{})
				}
			})
		})
	}
}

func TestJobsThatAskForTooLongALifeCostOneRequestPerLife(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: time.Second}
		f := start(t, 2, profile(e))
		began := time.Now()
		for time.Since(began) < 3*time.Hour {
			var wg sync.WaitGroup
			for i := range 1000 {
				wg.Go(func() {
					_, _, err := f.replicas[i%2].Issue(t.Context(), ofJob(fmt.Sprint(began, i, time.Now())), broker.Demand{Lifetime: time.Duration(2+i) * time.Hour})
					if e := wantFailure(t, err, broker.ReasonLifetimeUnavailable); !strings.Contains(e.Text, "lives 1h0m0s in all; ask for 59m20s at most") {
						t.Error(e.Text)
					}
				})
			}
			wg.Wait()
			time.Sleep(10 * time.Minute)
		}
		if n := e.count(); n > 2*4 {
			t.Errorf("%d token requests in three hours, want one per life and replica", n)
		}
		// Tokens live longer now: that is seen when the last one is over.
		e.set(func(e *endpoint) { e.lives = 10 * time.Hour })
		time.Sleep(time.Hour)
		give(t, f.replicas[0], ofJob("long"), broker.Demand{Lifetime: 5 * time.Hour})
	})
}

func TestFloorsUpToTheLimitCostABoundedNumberOfRequests(t *testing.T) {
	for _, life := range []time.Duration{time.Minute, 20 * time.Minute, time.Hour, 24 * time.Hour} {
		for _, job := range []string{"", "nightly"} {
			t.Run(fmt.Sprintf("%v, job %q", life, job), func(t *testing.T) {
				in(t, func(t *testing.T) {
					e := &endpoint{lives: life}
					f := start(t, 3, profile(e))
					r := mrand.New(mrand.NewPCG(1, 2))
					most := broker.LongestFloor(life)
					ask := broker.Ask{Profile: "invoices", Job: job}
					give(t, f.replicas[0], ask, broker.Demand{})
					const steps = 200
					for range steps {
						var wg sync.WaitGroup
						for i := range 20 {
							floor := time.Duration(r.Int64N(int64(most))) + time.Nanosecond
							if i%3 == 0 {
								floor = most
							}
							wg.Go(func() {
								token, _, err := f.replicas[i%3].Issue(t.Context(), ask, broker.Demand{Lifetime: floor})
								if err != nil {
									t.Errorf("%v of %v: %v", floor, life, err)
								} else if left := time.Until(token.ExpireTime); left < floor {
									t.Errorf("%v left, asked for %v", left, floor)
								}
							})
						}
						wg.Wait()
						time.Sleep(life / steps)
					}
					// One hundred in a life, or one in ten seconds where that is less, and the first.
					if n, bound := e.count(), int(min(100, life/(10*time.Second)))+2; n > bound {
						t.Errorf("%d token requests in a life, want %d at most", n, bound)
					}
				})
			})
		}
	}
}
