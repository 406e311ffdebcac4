package broker_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// What is odd about jobs: replies that are late, callers that leave, a store that
// panics.

// tardy is a store some of whose calls take long, or panic.
type tardy struct {
	broker.Store
	look, drop time.Duration
	own        func()
}

func (s *tardy) Look(ctx context.Context, family, slot string) (broker.Record, error) {
	time.Sleep(s.look)
	return s.Store.Look(ctx, family, slot)
}

func (s *tardy) Drop(ctx context.Context, d broker.Drop) (broker.Dropped, error) {
	time.Sleep(s.drop)
	return s.Store.Drop(ctx, d)
}

func (s *tardy) Own(ctx context.Context, id, owner string, life time.Duration) (string, error) {
	if s.own != nil {
		s.own()
	}
	return s.Store.Own(ctx, id, owner, life)
}

// join adds a replica that reaches the store by s.
func (f *fleet) join(s *tardy, p *broker.Profile) *broker.Broker {
	s.Store = f.store
	b := broker.New(s, broker.Options{})
	b.Configure([]*broker.Profile{p})
	f.replicas = append(f.replicas, b)
	return b
}

// A replica whose memory has a token before the job's last one hears of the job's
// end like any other.
func TestJobEndsWhereItsLastTokenHasNotArrived(t *testing.T) {
	in(t, func(t *testing.T) {
		p := profile(&endpoint{})
		f := start(t, 1, p)
		a, b := f.replicas[0], f.join(&tardy{look: time.Second}, p)
		first := give(t, a, ofJob("nightly"), broker.Demand{})
		if give(t, b, ofJob("nightly"), broker.Demand{}).ID != first.ID {
			t.Fatal("another token for the same job")
		}
		watch := follow(t.Context(), b, ofJob("nightly"), broker.Demand{})
		watch.want(t, "token-1")
		time.Sleep(2 * time.Minute)
		if give(t, a, ofJob("nightly"), broker.Demand{Not: first.ID}).ID == first.ID {
			t.Fatal("no successor")
		}
		if _, err := a.Revoke(t.Context(), ofJob("nightly"), ""); err != nil { // while b is looking for it
			t.Fatal(err)
		}
		synctest.Wait()
		if _, _, err := b.Issue(t.Context(), ofJob("nightly"), broker.Demand{}); err == nil {
			t.Error("a token after the end")
		}
		time.Sleep(time.Minute)
		_, _, err := b.Issue(t.Context(), ofJob("nightly"), broker.Demand{})
		wantFailure(t, err, broker.ReasonJobEnded)
		watch.wantEnd(t, broker.ReasonJobEnded)
	})
}

// Whoever names one token ends the job, with all tokens that it has.
func TestJobEndsWithAllItsTokensByTheIDOfOne(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 2, profile(e, func(p *broker.Profile) { p.Issuer = revoking{e} }))
		for _, b := range f.replicas {
			give(t, b, ofJob("nightly", "a"), broker.Demand{})
		}
		token := give(t, f.replicas[0], ofJob("nightly"), broker.Demand{})
		if r, err := f.replicas[0].Revoke(t.Context(), ofJob("nightly"), token.ID); err != nil || r.TokenID != token.ID || !r.Confirmed {
			t.Fatalf("%+v, %v", r, err)
		}
		synctest.Wait()
		for _, b := range f.replicas {
			_, _, err := b.Issue(t.Context(), ofJob("nightly", "a"), broker.Demand{})
			wantFailure(t, err, broker.ReasonJobEnded)
		}
		if len(e.revoked) != 2 {
			t.Errorf("the server was asked to revoke %v, want both", e.revoked)
		}
	})
}

// A caller who leaves before it is the turn of the end has taken the token out of
// service here: who follows it hears of that.
func TestWatchHearsOfAnEndWhoseCallerHasLeft(t *testing.T) {
	in(t, func(t *testing.T) {
		p := profile(&endpoint{})
		f := start(t, 0)
		b := f.join(&tardy{drop: 400 * time.Millisecond}, p)
		watch := follow(t.Context(), b, ofJob("nightly"), broker.Demand{})
		watch.want(t, "token-1")
		var wg sync.WaitGroup
		for i := range 16 {
			wg.Go(func() {
				if _, err := b.Revoke(t.Context(), ofJob(fmt.Sprint(i)), ""); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		ctx, leave := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer leave()
		if _, err := b.Revoke(ctx, ofJob("nightly"), ""); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
		wg.Wait()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		select {
		case <-watch.done:
		default:
			t.Fatal("the watch has not heard")
		}
		watch.wantEnd(t, broker.ReasonJobEnded)
	})
}

// A bug of the store where the owner of a token is asked for costs no consent.
func TestPanicBesideAnOwnerLosesNoRefreshToken(t *testing.T) {
	for name, ask := range map[string]broker.Ask{"shared": invoices, "a job's": ofJob("nightly")} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				s := newIDP()
				p := s.consented()
				f := start(t, 0)
				boom := true
				b := f.join(&tardy{own: func() {
					if boom {
						boom = false
						panic("own")
					}
				}}, p)
				s.signIn(t, f.store, p)
				time.Sleep(2 * time.Hour)
				_, _, _ = b.Issue(t.Context(), ask, broker.Demand{})
				time.Sleep(time.Hour)
				if _, _, err := b.Issue(t.Context(), ask, broker.Demand{}); boom || err != nil || s.isDead() || s.mostPresented() > 1 {
					t.Errorf("%v; grant dead: %t; presented %d times", err, s.isDead(), s.mostPresented())
				}
			})
		})
	}
}
