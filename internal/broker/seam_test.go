package broker_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

// seam is a store whose transitions a test intercepts.
type seam struct {
	broker.Store
	acquire func(broker.Claim) error
	renew   func(broker.Lease) error
	save    func(broker.Lease, broker.Result) error
	fail    func(broker.Lease, broker.Failure) error
	look    func(family string) error
	own     func()
}

func (s *seam) Own(ctx context.Context, id, owner string, life time.Duration) (string, error) {
	if s.own != nil {
		s.own()
	}
	return s.Store.Own(ctx, id, owner, life)
}

func (s *seam) Acquire(ctx context.Context, c broker.Claim) (broker.Acquisition, error) {
	if s.acquire != nil {
		if err := s.acquire(c); err != nil {
			return broker.Acquisition{}, err
		}
	}
	return s.Store.Acquire(ctx, c)
}
func (s *seam) Renew(ctx context.Context, l broker.Lease) (bool, error) {
	if s.renew != nil {
		if err := s.renew(l); err != nil {
			return false, err
		}
	}
	return s.Store.Renew(ctx, l)
}
func (s *seam) Save(ctx context.Context, l broker.Lease, r broker.Result) (broker.StoredToken, broker.SaveVerdict, error) {
	if s.save != nil {
		if err := s.save(l, r); err != nil {
			return broker.StoredToken{}, 0, err
		}
	}
	return s.Store.Save(ctx, l, r)
}
func (s *seam) Fail(ctx context.Context, l broker.Lease, f broker.Failure) (broker.Failure, error) {
	if s.fail != nil {
		if err := s.fail(l, f); err != nil {
			return broker.Failure{}, err
		}
	}
	return s.Store.Fail(ctx, l, f)
}
func (s *seam) Look(ctx context.Context, family, slot string) (broker.Record, error) {
	if s.look != nil {
		if err := s.look(family); err != nil {
			return broker.Record{}, err
		}
	}
	return s.Store.Look(ctx, family, slot)
}

func seamed(t *testing.T, n int, p *broker.Profile, change func(*seam)) *fleet {
	f := start(t, 0)
	for range n {
		s := &seam{Store: f.store}
		change(s)
		b := broker.New(s, broker.Options{})
		b.Configure([]*broker.Profile{p})
		f.replicas = append(f.replicas, b)
	}
	return f
}

func TestRestedRefusalIsTriedOnceByProvenReplicas(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 5, profile(e))
		for i, b := range f.replicas { // the secret works on all of them
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: subsets[i]}, broker.Demand{}); err != nil {
				t.Fatal(err)
			}
		}
		e.set(func(e *endpoint) {
			e.answer, e.takes = fails(broker.ClientRejected, "invalid_client", 0), time.Second
		})
		asked := e.count()
		if _, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err == nil {
			t.Fatal("got a token")
		}
		wantCalls(t, e, asked+1)
		time.Sleep(2 * time.Hour) // refused, and rested
		asked = e.count()
		f.replicas[0].Close()
		f.replicas = f.replicas[1:] // the others have not seen it refused
		f.storm(t, broker.ReasonCredentialsRejected)
		wantCalls(t, e, asked+1)
	})
}

func TestOtherSlotDoesNotPresentWhatIsSpentAndUnsaved(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		p := s.consented()
		var down atomic.Bool
		down.Store(true)
		f := seamed(t, 1, p, func(x *seam) {
			x.save = func(l broker.Lease, r broker.Result) error {
				if r.Spent != "" && down.Load() {
					return errDown
				}
				return nil
			}
		})
		s.signIn(t, f.store, p)
		time.Sleep(2 * time.Hour)
		s.set(func(s *idp) { s.takes = 2 * time.Second })
		b := f.replicas[0]
		var wg sync.WaitGroup
		for _, scopes := range [][]string{nil, {"a"}} {
			wg.Go(func() { b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: scopes}, broker.Demand{}) })
			time.Sleep(100 * time.Millisecond)
		}
		wg.Wait()
		if n := s.mostPresented(); n != 1 || s.isDead() {
			t.Errorf("presented %d times by one process that has its successor; grant dead: %t", n, s.isDead())
		}
		down.Store(false)
		time.Sleep(5 * time.Second)
	})
}

func TestUnsavedGrantOutOfTokenSaysStoreUnavailable(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		s.takes, s.lives = 2*time.Second, 10*time.Minute
		p := s.consented()
		f, ways := brittleFleet(t, 1, p)
		s.signIn(t, f.store, p)
		time.Sleep(11 * time.Minute)
		time.AfterFunc(time.Second, func() { all(ways, errDown) })
		f.ask(t, broker.Demand{})
		time.Sleep(11 * time.Minute)
		began := time.Now()
		_, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
		var be *broker.Error
		if took := time.Since(began); !errors.As(err, &be) || be.Reason != broker.ReasonStoreUnavailable || took > 5*time.Second {
			t.Errorf("after %v: %v", took, err)
		}
		all(ways, nil)
	})
}

func TestNoDemandPresentsARefreshTokenInDoubtEarly(t *testing.T) {
	for name, ask := range map[string]func(t *testing.T, b *broker.Broker, id string){
		"report": func(t *testing.T, b *broker.Broker, id string) {
			b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{Not: id})
		},
		"lifetime": func(t *testing.T, b *broker.Broker, _ string) {
			b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{Lifetime: 50 * time.Minute})
		},
		"other scopes": func(t *testing.T, b *broker.Broker, _ string) {
			b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{"a"}}, broker.Demand{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				s := newIDP()
				p := s.consented()
				f, ways := brittleFleet(t, 2, p)
				s.signIn(t, f.store, p)
				for _, b := range f.replicas {
					if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
						t.Fatal(err)
					}
				}
				s.set(func(s *idp) {
					s.fault = func(n int) fault {
						if n == 1 {
							return paused
						}
						return none
					}
				})
				time.Sleep(20 * time.Minute)
				token, _ := f.ask(t, broker.Demand{})
				go f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{Not: token.ID}) // pauses with the answer
				time.Sleep(time.Second)
				ways[0].fails(errDown)
				time.Sleep(time.Minute)
				ask(t, f.replicas[1], token.ID)
				if n := s.mostPresented(); n != 1 || s.isDead() {
					t.Errorf("presented %d times with %v of the access token left; grant dead: %t", n, time.Until(token.ExpireTime), s.isDead())
				}
				ways[0].fails(nil)
				time.Sleep(2 * time.Hour)
			})
		})
	}
}

func TestPanicInConsultLeavesTheTrial(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		boom := true
		f := seamed(t, 1, profile(e), func(x *seam) {
			x.look = func(string) error {
				if boom {
					panic("look")
				}
				return nil
			}
		})
		f.refused(t, broker.Demand{}, broker.ReasonEndpointUnavailable)
		boom = false
		time.Sleep(time.Minute)
		f.ask(t, broker.Demand{})
	})
}

func TestOldOutageDoesNotMakeOneSlowReplyAnotherOne(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f, ways := brittleFleet(t, 1, profile(e))
		f.ask(t, broker.Demand{})
		all(ways, errDown)
		f.replicas[0].Revoke(t.Context(), broker.Ask{Profile: "invoices"}, "")
		all(ways, nil)
		time.Sleep(2 * time.Hour) // the store is well, and nobody asks it
		all(ways, errDown)
		time.AfterFunc(50*time.Millisecond, func() { all(ways, nil) })
		if _, source := f.ask(t, broker.Demand{}); source != broker.FromEndpoint {
			t.Errorf("source %v: one slow reply, and it went on alone", source)
		}
	})
}

func TestRefusalIsToldAgainIfTheStoreDoesNotAnswerOnce(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: time.Second, answer: fails(broker.UserRejected, "invalid_grant", 0)}
		f := start(t, 0)
		for range 5 {
			cut := map[string]bool{}
			var mu sync.Mutex
			s := &seam{Store: f.store, fail: func(l broker.Lease, _ broker.Failure) error {
				mu.Lock()
				defer mu.Unlock()
				if !cut[l.Family] { // one cut connection each
					cut[l.Family] = true
					return errDown
				}
				return nil
			}}
			b := broker.New(s, broker.Options{})
			b.Configure([]*broker.Profile{profile(e, password)})
			f.replicas = append(f.replicas, b)
		}
		for range 5 {
			for _, b := range f.replicas {
				b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			}
			time.Sleep(time.Minute)
		}
		wantCalls(t, e, 1)
	})
}

// woken is an issuer whose process was stopped while the answer came: it is
// there when the process goes on, and so is the end of the lease.
type woken struct {
	*endpoint
}

func (w woken) Issue(ctx context.Context, r broker.Request) (*broker.Grant, error) {
	return w.endpoint.Issue(context.WithoutCancel(ctx), r)
}

func TestRefusalThatComesAfterTheLeaseIsARefusal(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 10 * time.Second, answer: fails(broker.UserRejected, "invalid_grant", 0)}
		p := profile(e, password)
		p.Issuer = woken{endpoint: e}
		f := seamed(t, 1, p, func(x *seam) {
			x.renew = func(broker.Lease) error { return errDown }
		})
		for range 20 {
			f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			time.Sleep(time.Minute)
		}
		wantCalls(t, e, 1)
	})
}

func TestRepeatedRevokedTokenUnsavedIsNoLoop(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 100 * time.Millisecond, answer: func(int) (*broker.Grant, error) { return grant(1, time.Hour), nil }}
		var cut bool
		f := seamed(t, 1, profile(e), func(x *seam) {
			x.save = func(l broker.Lease, r broker.Result) error {
				if cut && r.Token.Type == "Bearer" {
					return errDown
				}
				return nil
			}
		})
		f.ask(t, broker.Demand{})
		if _, err := f.replicas[0].Revoke(t.Context(), broker.Ask{Profile: "invoices"}, ""); err != nil {
			t.Fatal(err)
		}
		cut = true
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		asked := e.count()
		_, _, err := f.replicas[0].Issue(ctx, broker.Ask{Profile: "invoices"}, broker.Demand{})
		var be *broker.Error
		if !errors.As(err, &be) || e.count()-asked > 2 {
			t.Errorf("%d token requests for one call, which heard %v", e.count()-asked, err)
		}
	})
}

func TestRevokeByIdReachesASubsetsToken(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e))
		b := f.replicas[0]
		token, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{"a"}}, broker.Demand{})
		if err != nil {
			t.Fatal(err)
		}
		r, err := b.Revoke(t.Context(), broker.Ask{Profile: "invoices"}, token.ID)
		next, _, _ := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{"a"}}, broker.Demand{})
		if err == nil && r.TokenID == token.ID && next.ID == token.ID {
			t.Error("said to be revoked, and handed out")
		}
	})
}

func TestRevokeWithoutTheStoreReachesAllSlotsHere(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		p := s.consented()
		f, ways := brittleFleet(t, 1, p)
		s.signIn(t, f.store, p)
		b := f.replicas[0]
		token, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{"a"}}, broker.Demand{})
		if err != nil {
			t.Fatal(err)
		}
		all(ways, errDown)
		_, err = b.Revoke(t.Context(), broker.Ask{Profile: "invoices"}, token.ID)
		t.Log(err) // "this one does not any more"
		if next, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{"a"}}, broker.Demand{}); err == nil && next.ID == token.ID {
			t.Error("it is still handed out here")
		}
	})
}

func TestNobodyIsRefusedWhileTheStoreGoesAway(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f, ways := brittleFleet(t, 1, profile(e))
		token, _ := f.ask(t, broker.Demand{})
		all(ways, errDown)
		bad := 0
		for time.Until(token.ExpireTime) > -30*time.Second {
			if _, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
				bad++
				t.Logf("%v before the end: %v", time.Until(token.ExpireTime), err)
			}
			time.Sleep(100 * time.Millisecond)
		}
		if bad > 0 {
			t.Errorf("%d callers were refused, though the grant goes on without the store", bad)
		}
	})
}

func TestDemandForLifeWhileTheStoreIsAway(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f, ways := brittleFleet(t, 1, profile(e))
		token, _ := f.ask(t, broker.Demand{})
		all(ways, errDown)
		for time.Until(token.RefreshTime) > 0 {
			f.ask(t, broker.Demand{})
			time.Sleep(time.Second)
		}
		for range 10 {
			if _, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{Lifetime: 30 * time.Minute}); err != nil {
				t.Errorf("%v", err)
			}
			time.Sleep(time.Second)
		}
	})
}

func TestTooShortTokensOfAConsentAreNeitherServedNorAskedForForEver(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		p := s.consented()
		f := start(t, 3, p)
		s.signIn(t, f.store, p)
		time.Sleep(2 * time.Hour)
		s.set(func(s *idp) { s.lives = 5 * time.Second })
		issued := s.grants()
		served := 0
		for range 3600 {
			for _, b := range f.replicas {
				if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err == nil {
					served++
				}
			}
			time.Sleep(time.Second)
		}
		if n := s.grants() - issued; n > 200 || served > 0 {
			t.Errorf("%d refreshes in an hour, %d answers with a token that lives 5s", n, served)
		}
	})
}

func TestRefreshTokenThatNobodyAskedFor(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: time.Second}
		e.answer = func(n int) (*broker.Grant, error) {
			g := grant(n, 10*time.Minute)
			g.RefreshToken = broker.NewSecret("refresh")
			return g, nil
		}
		f, ways := brittleFleet(t, 1, profile(e))
		time.AfterFunc(900*time.Millisecond, func() { all(ways, errDown) })
		f.ask(t, broker.Demand{})
		time.Sleep(11 * time.Minute)
		began := time.Now()
		_, source, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
		if err != nil || source != broker.Uncoordinated {
			t.Errorf("after %v: %v, %v; unsaved %d", time.Since(began), source, err, f.replicas[0].Unsaved())
		}
		all(ways, nil)
	})
}

func TestPanicBesideASaveLosesNoRefreshToken(t *testing.T) {
	for name, where := range map[string]string{"observer": "observer", "proof": "proof", "save": "save"} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				s := newIDP()
				p := s.consented()
				boom := true
				f := start(t, 0)
				st := &seam{Store: f.store, save: func(l broker.Lease, r broker.Result) error {
					if boom && (where == "proof" && r.Token.Type == "proof" || where == "save" && r.Spent != "") {
						boom = false
						panic(where)
					}
					return nil
				}}
				b := broker.New(st, broker.Options{Observe: func(broker.Attempt) {
					if boom && where == "observer" {
						boom = false
						panic(where)
					}
				}})
				b.Configure([]*broker.Profile{p})
				f.replicas = append(f.replicas, b)
				s.signIn(t, f.store, p)
				time.Sleep(2 * time.Hour)
				b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
				time.Sleep(time.Hour)
				if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil || s.isDead() {
					t.Errorf("%v; grant dead: %t", err, s.isDead())
				}
			})
		})
	}
}

func TestNothingIsWrittenBeforeTheGrant(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		p := s.consented()
		var mu sync.Mutex
		var order []string
		wrote := func(what string) {
			mu.Lock()
			defer mu.Unlock()
			order = append(order, what)
		}
		f := seamed(t, 1, p, func(x *seam) {
			x.save = func(l broker.Lease, r broker.Result) error { wrote(r.Token.Type); return nil }
			x.own = func() { wrote("whose it is") }
		})
		s.signIn(t, f.store, p)
		time.Sleep(2 * time.Hour)
		f.ask(t, broker.Demand{})
		synctest.Wait()
		if len(order) == 0 || order[0] != "Bearer" || !slices.Contains(order, "whose it is") {
			t.Errorf("writes in this order: %v", order)
		}
	})
}

func TestResetHasARefreshTokenInDoubtTriedAgain(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		p := s.consented()
		f := start(t, 2, p)
		s.signIn(t, f.store, p)
		s.set(func(s *idp) { s.fault = func(int) fault { return lost } })
		for range 120 {
			f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			time.Sleep(time.Minute)
		}
		if n := s.mostPresented(); n != 2 {
			t.Fatal(n)
		}
		f.replicas[0].Reset(t.Context(), "invoices")
		for range 120 {
			f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			time.Sleep(time.Minute)
		}
		if n := s.mostPresented(); n != 4 {
			t.Errorf("presented %d times", n)
		}
	})
}

func TestIntendsWithoutAnAnswerCostNoConsent(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		p := s.consented()
		f := start(t, 0)
		st := &lateIntend{Store: f.store}
		b := broker.New(st, broker.Options{})
		b.Configure([]*broker.Profile{p})
		f.replicas = append(f.replicas, b)
		s.signIn(t, f.store, p)
		time.Sleep(2 * time.Hour)
		for range 3 { // three failovers, each a second long
			st.arm(true)
			b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			st.arm(false)
			time.Sleep(time.Minute)
		}
		if n := s.mostPresented(); n != 0 {
			t.Fatal(n)
		}
		f.ask(t, broker.Demand{})
	})
}

type lateIntend struct {
	broker.Store
	mu    sync.Mutex
	armed bool
	gone  time.Time
}

func (s *lateIntend) arm(on bool) { s.mu.Lock(); defer s.mu.Unlock(); s.armed = on }
func (s *lateIntend) Intend(ctx context.Context, l broker.Lease, p broker.Presentation) (broker.IntendVerdict, error) {
	v, err := s.Store.Intend(ctx, l, p)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.armed {
		s.armed, s.gone = false, time.Now().Add(time.Second)
		return 0, errDown
	}
	return v, err
}
func (s *lateIntend) Fail(ctx context.Context, l broker.Lease, f broker.Failure) (broker.Failure, error) {
	s.mu.Lock()
	gone := time.Now().Before(s.gone)
	s.mu.Unlock()
	if gone {
		select {
		case <-ctx.Done():
		case <-time.After(500 * time.Millisecond):
		}
		return broker.Failure{}, errDown
	}
	return s.Store.Fail(ctx, l, f)
}

var _ = synctest.Wait
var _ = store.NewMemory

func TestCallerDoesNotHearWhatARenewalAheadMayNotDo(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		p := profile(e)
		var mu sync.Mutex
		var gone bool
		began := make(chan struct{}, 100)
		f := seamed(t, 1, p, func(x *seam) {
			x.acquire = func(c broker.Claim) error {
				mu.Lock()
				defer mu.Unlock()
				if gone {
					select {
					case began <- struct{}{}:
					default:
					}
					return errDown
				}
				return nil
			}
			x.look = func(string) error {
				mu.Lock()
				defer mu.Unlock()
				if gone {
					return errDown
				}
				return nil
			}
		})
		token, _ := f.ask(t, broker.Demand{})
		time.Sleep(time.Minute)
		f.ask(t, broker.Demand{})
		mu.Lock()
		gone = true
		mu.Unlock()
		go func() {
			for range 55 * 60 {
				f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
				time.Sleep(time.Second)
			}
		}()
		<-began // the renewal ahead has begun
		time.Sleep(time.Second)
		if _, source, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{Not: token.ID}); err != nil || source != broker.Uncoordinated {
			t.Errorf("%v, %v", source, err)
		}
		time.Sleep(time.Hour)
	})
}

func TestRefusalThatComesAfterAPauseIsARefusal(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 10 * time.Second, answer: fails(broker.UserRejected, "invalid_grant", 0)}
		p := profile(e, password)
		p.Issuer = woken{endpoint: e}
		f := seamed(t, 1, p, func(x *seam) { // stopped for ten seconds with the answer on its way
			x.renew = func(broker.Lease) error {
				if e.count() == 1 {
					return errDown
				}
				return nil
			}
		})
		for range 20 {
			f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			time.Sleep(time.Minute)
		}
		wantCalls(t, e, 1)
	})
}

func TestPasswordAndLeasesThatAreNotKept(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 5 * time.Second, answer: fails(broker.UserRejected, "invalid_grant", 0)}
		f := seamed(t, 2, profile(e, password), func(x *seam) {
			x.renew = func(broker.Lease) error { return errDown }
		})
		for range 10 {
			for _, b := range f.replicas {
				b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			}
			time.Sleep(time.Minute)
		}
		wantCalls(t, e, 1)
	})
}

func TestServerThatRepeatsARevokedTokenIsLeftAlone(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: func(int) (*broker.Grant, error) { return grant(1, time.Hour), nil }}
		f := start(t, 3, profile(e))
		f.ask(t, broker.Demand{})
		if _, err := f.replicas[0].Revoke(t.Context(), broker.Ask{Profile: "invoices"}, ""); err != nil {
			t.Fatal(err)
		}
		for began := time.Now(); time.Since(began) < 10*time.Minute; time.Sleep(time.Second) {
			for _, b := range f.replicas {
				b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			}
		}
		if n := e.count(); n > 45 {
			t.Errorf("%d token requests in ten minutes", n)
		}
	})
}

func TestRevokedWithoutTheStoreIsReplacedWhenItIsBack(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f, ways := brittleFleet(t, 1, profile(e))
		f.ask(t, broker.Demand{})
		all(ways, errDown)
		f.replicas[0].Revoke(t.Context(), broker.Ask{Profile: "invoices"}, "")
		all(ways, nil)
		time.Sleep(time.Minute)
		if _, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
			t.Error(err)
		}
	})
}

// later is an issuer whose answers are on the way for some time.
type later struct {
	*idp
	way time.Duration
}

func (l later) Issue(ctx context.Context, r broker.Request) (*broker.Grant, error) {
	g, err := l.idp.Issue(ctx, r)
	if !r.RefreshToken.IsEmpty() {
		time.Sleep(l.way)
	}
	return g, err
}

func TestNobodyGetsATokenOfTheConsentThatWasReplaced(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		p := s.consented()
		p.Issuer = later{s, 4 * time.Second}
		f := start(t, 1, p)
		s.signIn(t, f.store, p)
		time.Sleep(61 * time.Minute)
		time.AfterFunc(time.Second, func() { s.signIn(t, f.store, p) }) // issues access-3
		token, _ := f.ask(t, broker.Demand{})
		if got := token.Access.Reveal(); got != "access-3" {
			t.Errorf("got %s, of the consent that was replaced", got)
		}
	})
}

type slowIntend struct{ broker.Store }

func (s slowIntend) Intend(ctx context.Context, l broker.Lease, p broker.Presentation) (broker.IntendVerdict, error) {
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-time.After(300 * time.Millisecond):
	}
	return s.Store.Intend(ctx, l, p)
}

func TestShutdownDuringAnIntentSaysSo(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		p := s.consented()
		f := start(t, 0)
		b := broker.New(slowIntend{f.store}, broker.Options{})
		b.Configure([]*broker.Profile{p})
		f.replicas = append(f.replicas, b)
		s.signIn(t, f.store, p)
		time.Sleep(2 * time.Hour)
		time.AfterFunc(100*time.Millisecond, b.Drain)
		_, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
		var be *broker.Error
		if !errors.As(err, &be) || be.Reason != broker.ReasonShuttingDown {
			t.Errorf("%v", err)
		}
	})
}

func TestStragglingResetDoesNotHideARefusal(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: fails(broker.UserRejected, "invalid_grant", 0)}
		p := profile(e, password)
		f := start(t, 1, p)
		e.set(func(e *endpoint) { e.takes = time.Second })
		family, _ := broker.FamilyOf(p)
		time.AfterFunc(500*time.Millisecond, func() { f.store.Reset(t.Context(), family) }) // of a replica that heard late of a reset of the client
		f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
		for range 5 {
			f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
			time.Sleep(time.Minute)
		}
		wantCalls(t, e, 1)
	})
}

// hung is a store whose calls end with their time-out while it hangs.
type hung struct {
	broker.Store
	on atomic.Bool
}

func (s *hung) hang(ctx context.Context) error {
	if !s.on.Load() {
		return ctx.Err()
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(500 * time.Millisecond):
		return errDown
	}
}
func (s *hung) Acquire(ctx context.Context, c broker.Claim) (broker.Acquisition, error) {
	if err := s.hang(ctx); err != nil {
		return broker.Acquisition{}, err
	}
	return s.Store.Acquire(ctx, c)
}
func (s *hung) Fail(ctx context.Context, l broker.Lease, f broker.Failure) (broker.Failure, error) {
	if err := s.hang(ctx); err != nil {
		return broker.Failure{}, err
	}
	return s.Store.Fail(ctx, l, f)
}
func (s *hung) Save(ctx context.Context, l broker.Lease, r broker.Result) (broker.StoredToken, broker.SaveVerdict, error) {
	if err := s.hang(ctx); err != nil {
		return broker.StoredToken{}, 0, err
	}
	return s.Store.Save(ctx, l, r)
}
func (s *hung) Renew(ctx context.Context, l broker.Lease) (bool, error) {
	if err := s.hang(ctx); err != nil {
		return false, err
	}
	return s.Store.Renew(ctx, l)
}
func (s *hung) Look(ctx context.Context, family, slot string) (broker.Record, error) {
	if err := s.hang(ctx); err != nil {
		return broker.Record{}, err
	}
	return s.Store.Look(ctx, family, slot)
}

func hungFleet(t *testing.T, p *broker.Profile) (*fleet, *hung) {
	f := start(t, 0)
	s := &hung{Store: f.store}
	b := broker.New(s, broker.Options{})
	b.Configure([]*broker.Profile{p})
	f.replicas = append(f.replicas, b)
	return f, s
}

func TestCallerWhoLeavesARevocationSaysNothingOfTheStore(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f, s := hungFleet(t, profile(e))
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		f.replicas[0].Revoke(ctx, broker.Ask{Profile: "invoices"}, "")
		time.Sleep(time.Hour)
		s.on.Store(true)
		time.AfterFunc(100*time.Millisecond, func() { s.on.Store(false) })
		if _, source := f.ask(t, broker.Demand{}); source != broker.FromEndpoint {
			t.Errorf("source %v", source)
		}
	})
}
