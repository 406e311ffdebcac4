package broker_test

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// brittle is a store that fails while it has an error.
type brittle struct {
	broker.Store
	mu  sync.Mutex
	err error
	// restored counts what was handed over for later.
	restored []broker.StoredToken
}

func (s *brittle) fails(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

func (s *brittle) failing() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

func (s *brittle) Acquire(ctx context.Context, c broker.Claim) (broker.Acquisition, error) {
	if err := s.failing(); err != nil {
		return broker.Acquisition{}, err
	}
	return s.Store.Acquire(ctx, c)
}

func (s *brittle) Renew(ctx context.Context, l broker.Lease) (bool, error) {
	if err := s.failing(); err != nil {
		return false, err
	}
	return s.Store.Renew(ctx, l)
}

func (s *brittle) Intend(ctx context.Context, l broker.Lease, p broker.Presentation) (broker.IntendVerdict, error) {
	if err := s.failing(); err != nil {
		return 0, err
	}
	return s.Store.Intend(ctx, l, p)
}

func (s *brittle) Save(ctx context.Context, l broker.Lease, r broker.Result) (broker.StoredToken, broker.SaveVerdict, error) {
	if err := s.failing(); err != nil {
		return broker.StoredToken{}, 0, err
	}
	return s.Store.Save(ctx, l, r)
}

func (s *brittle) Fail(ctx context.Context, l broker.Lease, f broker.Failure) (broker.Failure, error) {
	if err := s.failing(); err != nil {
		return broker.Failure{}, err
	}
	return s.Store.Fail(ctx, l, f)
}

func (s *brittle) Keep(ctx context.Context, t broker.Ticket) error {
	if err := s.failing(); err != nil {
		return err
	}
	return s.Store.Keep(ctx, t)
}

func (s *brittle) Redeem(ctx context.Context, id, owner string) (broker.Redemption, error) {
	if err := s.failing(); err != nil {
		return broker.Redemption{}, err
	}
	return s.Store.Redeem(ctx, id, owner)
}

func (s *brittle) Own(ctx context.Context, id, owner string, life time.Duration) (string, error) {
	if err := s.failing(); err != nil {
		return "", err
	}
	return s.Store.Own(ctx, id, owner, life)
}

func (s *brittle) Drop(ctx context.Context, d broker.Drop) (broker.Dropped, error) {
	if err := s.failing(); err != nil {
		return broker.Dropped{}, err
	}
	return s.Store.Drop(ctx, d)
}

func (s *brittle) Look(ctx context.Context, family, slot string) (broker.Record, error) {
	if err := s.failing(); err != nil {
		return broker.Record{}, err
	}
	return s.Store.Look(ctx, family, slot)
}

func (s *brittle) Restore(family, slot string, t broker.StoredToken) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.restored = append(s.restored, t)
}

var errDown = errors.New("no reply within 500ms")

// replicas that share a store which each reaches by a way of its own.
func brittleFleet(t *testing.T, n int, profiles ...*broker.Profile) (*fleet, []*brittle) {
	f := start(t, 0)
	var ways []*brittle
	for range n {
		s := &brittle{Store: f.store}
		b := broker.New(s, broker.Options{Logger: slog.New(slog.NewTextHandler(f.log, nil))})
		b.Configure(profiles)
		f.replicas, ways = append(f.replicas, b), append(ways, s)
	}
	return f, ways
}

func all(ways []*brittle, err error) {
	for _, s := range ways {
		s.fails(err)
	}
}

func TestClientCredentialsGoOnWithoutTheStore(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f, ways := brittleFleet(t, 3, profile(e))
		all(ways, errDown)
		began := time.Now()
		for _, b := range f.replicas {
			token, source, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			if err != nil || source != broker.Uncoordinated {
				t.Fatalf("%v, %v, %v", token, source, err)
			}
		}
		if took := time.Since(began); took < 3*time.Second || took > 12*time.Second {
			t.Errorf("went on by themselves after %v, want a lease each", took)
		}
		// Ten hours of it: one request per replica and life, and never a caller left alone.
		for range 10 * 60 * 6 {
			for _, b := range f.replicas {
				if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(10 * time.Second)
		}
		if n := e.count(); n > 3*11 {
			t.Errorf("%d token requests by 3 replicas in ten lives", n)
		}
		for i, s := range ways {
			if len(s.restored) == 0 {
				t.Errorf("replica %d did not hand over its token", i)
			}
		}
		// Back again: one of them renews, for all.
		all(ways, nil)
		before := e.count()
		for range 6 * 60 {
			for _, b := range f.replicas {
				if _, source, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil || source == broker.Uncoordinated {
					t.Fatal(source, err)
				}
			}
			time.Sleep(10 * time.Second)
		}
		if n := e.count() - before; n > 2 {
			t.Errorf("%d token requests in the hour after", n)
		}
	})
}

func TestOneSlowReplyOfTheStoreIsWaitedOut(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f, ways := brittleFleet(t, 1, profile(e))
		all(ways, errDown)
		time.AfterFunc(2*time.Second, func() { all(ways, nil) })
		if _, source := f.ask(t, broker.Demand{}); source != broker.FromEndpoint {
			t.Errorf("source %v", source)
		}
	})
}

func TestStoreThatRefusesTwiceIsGone(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f, ways := brittleFleet(t, 1, profile(e))
		all(ways, broker.ErrStoreRefused)
		began := time.Now()
		if _, source := f.ask(t, broker.Demand{}); source != broker.Uncoordinated || time.Since(began) > time.Second {
			t.Errorf("source %v after %v", source, time.Since(began))
		}
	})
}

func TestPasswordsAndRefreshTokensAreNotUsedWithoutTheStore(t *testing.T) {
	for name, change := range map[string]func(*broker.Profile){
		"password":            password,
		"refresh token":       consent,
		"forbidden by hand":   func(p *broker.Profile) { p.Coordinated = true },
		"password, refreshed": func(p *broker.Profile) { password(p); p.RefreshTokens = true },
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				e := &endpoint{}
				f, ways := brittleFleet(t, 1, profile(e, change))
				all(ways, errDown)
				if refused := f.refused(t, broker.Demand{}, broker.ReasonStoreUnavailable); refused.RetryAfter <= 0 {
					t.Error("does not say when to try again")
				}
				if s, err := f.replicas[0].Status(t.Context(), "invoices"); err != nil || s.State != broker.Idle {
					t.Errorf("status %+v, %v: want what memory knows", s, err)
				}
				wantCalls(t, e, 0)
			})
		})
	}
}

func TestLivingTokenOutlivesTheStore(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f, ways := brittleFleet(t, 1, profile(e, password))
		token, _ := f.ask(t, broker.Demand{})
		all(ways, errDown)
		for time.Until(token.ExpireTime) > time.Second {
			began := time.Now()
			f.ask(t, broker.Demand{})
			if took := time.Since(began); took > time.Second {
				t.Fatalf("a caller waited %v", took)
			}
			time.Sleep(time.Second)
		}
		wantCalls(t, e, 1)
	})
}

func TestUnreadableRecordIsLeftAlone(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f, ways := brittleFleet(t, 1, profile(e))
		all(ways, broker.ErrUnreadable)
		began := time.Now()
		if _, source := f.ask(t, broker.Demand{}); source != broker.Uncoordinated || time.Since(began) > time.Second {
			t.Errorf("source %v after %v", source, time.Since(began))
		}
		for range 3600 {
			f.ask(t, broker.Demand{})
			time.Sleep(time.Second)
		}
		if n := e.count(); n > 2 {
			t.Errorf("%d token requests in an hour", n)
		}
		if len(ways[0].restored) > 0 {
			t.Error("a token was to be written over what cannot be read")
		}
	})
}

func TestReportsWithoutTheStoreDoNotDrainTheEndpoint(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f, ways := brittleFleet(t, 1, profile(e))
		all(ways, errDown)
		token, _ := f.ask(t, broker.Demand{})
		for range 600 {
			if next, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{Not: token.ID}); err == nil {
				token = next
			}
			time.Sleep(time.Second)
		}
		if n := e.count(); n > 3 {
			t.Errorf("%d token requests in ten minutes", n)
		}
	})
}

func TestEndpointDownWithoutTheStoreBacksOff(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: fails(broker.Unavailable, "", 0)}
		f, ways := brittleFleet(t, 1, profile(e))
		all(ways, errDown)
		for range 600 {
			if _, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err == nil {
				t.Fatal("got a token")
			}
			time.Sleep(time.Second)
		}
		if n := e.count(); n > 16 {
			t.Errorf("%d token requests in ten minutes", n)
		}
	})
}

func TestSaveThatFailsIsHandedOver(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: time.Second}
		f, ways := brittleFleet(t, 1, profile(e))
		time.AfterFunc(900*time.Millisecond, func() { all(ways, errDown) })
		if _, source := f.ask(t, broker.Demand{}); source != broker.FromEndpoint {
			t.Errorf("source %v", source)
		}
		synctest.Wait()
		if len(ways[0].restored) != 1 {
			t.Error("the token was not handed over")
		}
	})
}
