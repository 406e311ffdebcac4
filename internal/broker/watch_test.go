package broker_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// follower takes all that a watch brings, until it ends.
type follower struct {
	mu     sync.Mutex // guards all but done
	tokens []*broker.Token
	at     []time.Time
	err    error
	ended  time.Time
	done   chan struct{}
}

// follow begins to follow the token of a replica, until ctx ends.
func follow(ctx context.Context, b *broker.Broker, ask broker.Ask, d broker.Demand) *follower {
	f := &follower{done: make(chan struct{})}
	w := b.Watch(ask)
	go func() {
		defer close(f.done)
		defer w.Close()
		for {
			t, _, _, err := w.Next(ctx, d)
			f.mu.Lock()
			if err != nil {
				f.err, f.ended = err, time.Now()
				f.mu.Unlock()
				return
			}
			f.tokens, f.at = append(f.tokens, t), append(f.at, time.Now())
			f.mu.Unlock()
		}
	}()
	return f
}

// revealed are the tokens that have come so far.
func (f *follower) revealed() (all []string) {
	synctest.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, t := range f.tokens {
		all = append(all, t.Access.Reveal())
	}
	return all
}

// want compares with what the watch has brought so far.
func (f *follower) want(t *testing.T, tokens ...string) {
	t.Helper()
	if got := f.revealed(); !slices.Equal(got, tokens) {
		t.Fatalf("the watch brought %v, want %v; %v", got, tokens, f.err)
	}
}

// wantEnd waits for the end, and checks its reason.
func (f *follower) wantEnd(t *testing.T, reason broker.Reason) *broker.Error {
	t.Helper()
	<-f.done
	var e *broker.Error
	if !errors.As(f.err, &e) || e.Reason != reason {
		t.Fatalf("the watch ended with %v, want %s", f.err, reason)
	}
	return e
}

var invoices = broker.Ask{Profile: "invoices"}

func TestWatchedTokenIsRenewedAheadForAllReplicas(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: time.Second}
		f := start(t, 3, profile(e))
		ctx, leave := context.WithCancel(t.Context())
		var all []*follower
		for _, b := range f.replicas {
			for range 10 {
				all = append(all, follow(ctx, b, invoices, broker.Demand{}))
			}
		}
		time.Sleep(10*time.Hour + 10*time.Minute) // and nobody calls Issue
		leave()
		if n := e.count(); n < 10*100/85 || n > 10*100/75+2 {
			t.Errorf("%d token requests in ten hours for all three replicas", n)
		}
		for _, w := range all {
			<-w.done
			if len(w.tokens) != e.count() {
				t.Fatalf("a watch brought %d tokens of %d", len(w.tokens), e.count())
			}
			for i := range w.tokens[1:] {
				if left := w.tokens[i].ExpireTime.Sub(w.at[i+1]); left < 5*time.Minute {
					t.Errorf("a successor came %v before its predecessor's end", left)
				}
			}
		}
		// Nobody watches any more.
		n := e.count()
		time.Sleep(24 * time.Hour)
		if e.count() > n+1 {
			t.Errorf("%d more token requests for nobody", e.count()-n)
		}
	})
}

// A watch that begins when the renewal was left undone brings it about.
func TestWatchRousesADormantToken(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e))
		f.ask(t, broker.Demand{})
		time.Sleep(102 * time.Minute)
		wantCalls(t, e, 2)
		follow(t.Context(), f.replicas[0], invoices, broker.Demand{}).want(t, "token-2", "token-3")
	})
}

func TestWatchBringsWhatAnyReplicaFinds(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 3, profile(e))
		var all []*follower
		for _, b := range f.replicas {
			all = append(all, follow(t.Context(), b, invoices, broker.Demand{}))
		}
		synctest.Wait()
		time.Sleep(time.Minute)
		if _, _, err := f.replicas[1].Issue(t.Context(), invoices, broker.Demand{Not: broker.NewSecret("token-1").ID()}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		for _, w := range all {
			w.want(t, "token-1", "token-2")
		}
		if _, err := f.replicas[2].Revoke(t.Context(), invoices, ""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Second)
		for _, w := range all {
			w.want(t, "token-1", "token-2", "token-3")
		}
		wantCalls(t, e, 3)
	})
}

func TestManyWatchesWithFloorsShareAFlight(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: time.Second}
		f := start(t, 1, profile(e))
		f.ask(t, broker.Demand{})
		time.Sleep(20 * time.Minute)
		var all []*follower
		floors := map[*follower]time.Duration{}
		for i := range 500 {
			floor := 45*time.Minute + time.Duration(i)*time.Second
			w := follow(t.Context(), f.replicas[0], invoices, broker.Demand{Lifetime: floor})
			all, floors[w] = append(all, w), floor
		}
		time.Sleep(2 * time.Second)
		wantCalls(t, e, 2)
		time.Sleep(20 * time.Minute) // the floors are above what is left, and hold for what is sent
		if err := f.replicas[0].Reset(t.Context(), "invoices"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		wantCalls(t, e, 2)
		time.Sleep(5 * time.Hour)
		if n := e.count(); n > 2+5*100/75+1 {
			t.Errorf("%d token requests: floors cost some", n)
		}
		for _, w := range all {
			synctest.Wait()
			if len(w.tokens) < 6 {
				t.Errorf("a watch brought %d tokens", len(w.tokens))
			}
			for i, token := range w.tokens {
				if left := token.ExpireTime.Sub(w.at[i]); left < floors[w] {
					t.Errorf("a token came with %v, want %v", left, floors[w])
				}
			}
		}
		follow(t.Context(), f.replicas[0], invoices, broker.Demand{Lifetime: time.Hour}).wantEnd(t, broker.ReasonLifetimeUnavailable)
	})
}

func TestWatchIsSilentWhileItsTokenLives(t *testing.T) {
	for name, c := range map[string]struct {
		answer func(int) (*broker.Grant, error)
		reason broker.Reason
		waits  bool // waiting helps
	}{
		"the endpoint is down":        {fails(broker.Unavailable, "", 0), broker.ReasonEndpointUnavailable, true},
		"the endpoint throttles":      {fails(broker.Throttled, "", time.Hour), broker.ReasonEndpointThrottled, true},
		"the credentials are refused": {fails(broker.ClientRejected, "invalid_client", 0), broker.ReasonCredentialsRejected, false},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				e := &endpoint{}
				f := start(t, 1, profile(e))
				w := follow(t.Context(), f.replicas[0], invoices, broker.Demand{})
				w.want(t, "token-1")
				e.set(func(e *endpoint) { e.answer = c.answer })
				time.Sleep(time.Hour - time.Second)
				w.want(t, "token-1")
				select {
				case <-w.done:
					t.Fatalf("it ended while the token lives: %v", w.err)
				default:
				}
				err := w.wantEnd(t, c.reason)
				if late := w.ended.Sub(w.tokens[0].ExpireTime); late < 0 || late > time.Second {
					t.Errorf("it ended %v after its token", late)
				}
				if (err.RetryAfter > 0) != c.waits {
					t.Errorf("told to come back in %v", err.RetryAfter)
				}
			})
		})
	}
}

// What comes back while the last token lives is nobody's loss.
func TestWatchGoesOnWhenWhatFailedIsWellAgain(t *testing.T) {
	for name, heal := range map[string]func(t *testing.T, f *fleet, e *endpoint){
		"by itself": func(*testing.T, *fleet, *endpoint) {},
		"by a reset": func(t *testing.T, f *fleet, _ *endpoint) {
			if err := f.replicas[1].Reset(t.Context(), "invoices"); err != nil {
				t.Fatal(err)
			}
		},
		"by another secret": func(_ *testing.T, f *fleet, e *endpoint) {
			for _, b := range f.replicas {
				b.Configure([]*broker.Profile{profile(e, func(p *broker.Profile) { p.Credential = "secret-2" })})
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				kind, within := broker.ClientRejected, 2*time.Second
				if name == "by itself" {
					kind, within = broker.Unavailable, time.Minute
				}
				e := &endpoint{}
				f := start(t, 2, profile(e))
				w := follow(t.Context(), f.replicas[0], invoices, broker.Demand{})
				w.want(t, "token-1")
				e.set(func(e *endpoint) { e.answer = fails(kind, "invalid_client", 0) })
				if _, err := f.replicas[1].Revoke(t.Context(), invoices, ""); err != nil { // so that no token at all is left
					t.Fatal(err)
				}
				time.Sleep(time.Minute)
				w.want(t, "token-1")
				asked := e.count()
				if asked > 8 {
					t.Errorf("%d token requests in a minute", asked)
				}
				e.set(func(e *endpoint) { e.answer = nil })
				heal(t, f, e)
				time.Sleep(within)
				w.want(t, "token-1", fmt.Sprintf("token-%d", e.count()))
			})
		})
	}
}

func TestWatchAcrossReloads(t *testing.T) {
	newToken := func(int) (*broker.Grant, error) {
		return &broker.Grant{AccessToken: broker.NewSecret("new-token"), TokenType: "Bearer", Lifetime: time.Hour}, nil
	}
	for name, c := range map[string]struct {
		change func(*broker.Profile)
		want   []string
		calls  int // of the new endpoint
	}{
		"of the same":         {func(*broker.Profile) {}, []string{"token-1"}, 0},
		"to another secret":   {func(p *broker.Profile) { p.Credential = "secret-2" }, []string{"token-1"}, 0},
		"to another identity": {func(p *broker.Profile) { p.Identity = "another tenant" }, []string{"token-1", "new-token"}, 1},
		"to other scopes":     {func(p *broker.Profile) { p.Scopes = []string{"a"} }, []string{"token-1", "new-token"}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				old, fresh := &endpoint{}, &endpoint{answer: newToken, takes: time.Second}
				f := start(t, 1, profile(old))
				w := follow(t.Context(), f.replicas[0], invoices, broker.Demand{})
				w.want(t, "token-1")
				f.replicas[0].Configure([]*broker.Profile{profile(fresh, c.change)})
				time.Sleep(2 * time.Second)
				w.want(t, c.want...)
				wantCalls(t, fresh, c.calls)
				f.replicas[0].Configure([]*broker.Profile{profile(old, func(p *broker.Profile) { p.Name = "payroll" })})
				w.wantEnd(t, broker.ReasonProfileUnknown)
			})
		})
	}
	t.Run("to fewer scopes than it follows", func(t *testing.T) {
		in(t, func(t *testing.T) {
			e := &endpoint{}
			f := start(t, 1, profile(e))
			w := follow(t.Context(), f.replicas[0], broker.Ask{Profile: "invoices", Scopes: []string{"a", "b"}}, broker.Demand{})
			w.want(t, "token-1")
			f.replicas[0].Configure([]*broker.Profile{profile(e, func(p *broker.Profile) { p.Scopes = []string{"a"} })})
			w.wantEnd(t, broker.ReasonInvalidRequest)
		})
	})
	t.Run("to an endpoint that is down", func(t *testing.T) {
		in(t, func(t *testing.T) {
			old, fresh := &endpoint{}, &endpoint{answer: fails(broker.Unavailable, "", 0)}
			f := start(t, 1, profile(old))
			w := follow(t.Context(), f.replicas[0], invoices, broker.Demand{})
			w.want(t, "token-1")
			f.replicas[0].Configure([]*broker.Profile{profile(fresh, func(p *broker.Profile) { p.Identity = "another tenant" })})
			time.Sleep(10 * time.Minute)
			w.want(t, "token-1")
			fresh.set(func(e *endpoint) { e.answer = newToken })
			time.Sleep(2 * time.Minute)
			w.want(t, "token-1", "new-token")
		})
	})
}

// Subsets that nobody uses make room for others; one that is watched is used.
func TestWatchedSubsetIsNotForgotten(t *testing.T) {
	in(t, func(t *testing.T) {
		var all []string
		for i := range 300 {
			all = append(all, fmt.Sprintf("s%03d", i))
		}
		e := &endpoint{}
		f := start(t, 1, profile(e, func(p *broker.Profile) { p.Scopes = all }))
		b := f.replicas[0]
		w := follow(t.Context(), b, broker.Ask{Profile: "invoices", Scopes: all[:1]}, broker.Demand{})
		w.want(t, "token-1")
		e.set(func(e *endpoint) { e.answer = fails(broker.Unavailable, "", 0) })
		if _, err := b.Revoke(t.Context(), broker.Ask{Profile: "invoices", Scopes: all[:1]}, ""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second) // and it has none any more
		for _, s := range all[1:] {
			_, _, _ = b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{s}}, broker.Demand{})
		}
		e.set(func(e *endpoint) { e.answer = nil })
		time.Sleep(5 * time.Minute)
		if got := w.revealed(); len(got) != 2 {
			t.Errorf("the watch brought %v; %v", got, w.err)
		}
	})
}

// Nobody is told that an endpoint is at fault when it is we who stop.
func TestDrainOfAWatch(t *testing.T) {
	for name, takes := range map[string]time.Duration{"without a token": time.Minute, "with one": 0} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				e := &endpoint{takes: takes}
				f := start(t, 1, profile(e))
				w := follow(t.Context(), f.replicas[0], invoices, broker.Demand{})
				synctest.Wait()
				f.replicas[0].Drain()
				if takes == 0 {
					time.Sleep(59 * time.Minute)
					w.want(t, "token-1")
				}
				if err := w.wantEnd(t, broker.ReasonShuttingDown); err.RetryAfter <= 0 {
					t.Error("it is not told when to come back")
				}
				f.replicas[0].Close()
				late := follow(t.Context(), f.replicas[0], invoices, broker.Demand{})
				late.wantEnd(t, broker.ReasonShuttingDown) // and not that there is no such profile
			})
		})
	}
}

// A store that is restored, or whose messages are lost, tells in its own time.
func TestWatchOfATokenThatComesFromTheStore(t *testing.T) {
	in(t, func(t *testing.T) {
		p := profile(&endpoint{})
		f, ways := brittleFleet(t, 1, p)
		w := follow(t.Context(), f.replicas[0], invoices, broker.Demand{})
		w.want(t, "token-1")
		all(ways, errDown)
		if _, err := f.replicas[0].Revoke(t.Context(), invoices, ""); err == nil {
			t.Fatal("revoked without the store")
		}
		time.Sleep(2 * time.Minute)
		all(ways, nil)
		time.Sleep(2 * time.Minute)
		if got := w.revealed(); len(got) < 2 {
			t.Errorf("the watch brought %v; %v", got, w.err)
		}
	})
}

// A replica that cannot claim anything hears of what others obtain all the same.
func TestWatchOfATokenThatAnotherReplicaObtains(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		var down atomic.Bool
		f := seamed(t, 1, profile(e, func(p *broker.Profile) { p.Coordinated = true }), func(s *seam) {
			s.acquire = func(broker.Claim) error {
				if down.Load() {
					return errDown
				}
				return nil
			}
		})
		other := broker.New(f.store, broker.Options{})
		t.Cleanup(other.Close)
		other.Configure([]*broker.Profile{profile(e)})
		w := follow(t.Context(), f.replicas[0], invoices, broker.Demand{})
		w.want(t, "token-1")
		down.Store(true)
		if _, err := other.Revoke(t.Context(), invoices, ""); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		w.want(t, "token-1")
		if _, _, err := other.Issue(t.Context(), invoices, broker.Demand{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
		w.want(t, "token-1", "token-2")
	})
}

// Watches that begin and end while all changes neither miss the last token, nor
// leave anything behind.
func TestNoNewsIsLost(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: time.Millisecond}
		f := start(t, 2, profile(e))
		b := f.replicas[0]
		var all []*follower
		for i := range 300 {
			all = append(all, follow(t.Context(), f.replicas[i%2], invoices, broker.Demand{}))
			switch i % 3 {
			case 0:
				go func() { _, _ = b.Revoke(t.Context(), invoices, "") }()
			case 1:
				change := func(p *broker.Profile) { p.Identity = fmt.Sprint("tenant ", i/50) }
				go f.replicas[i%2].Configure([]*broker.Profile{profile(e, change)})
			}
			time.Sleep(time.Duration(i%5) * time.Millisecond)
		}
		for _, b := range f.replicas {
			b.Configure([]*broker.Profile{profile(e)})
		}
		time.Sleep(10 * time.Second)
		current, _ := f.ask(t, broker.Demand{})
		overtaken := 0
		for i, w := range all {
			got := w.revealed()
			if len(got) == 0 && w.err != nil && strings.Contains(w.err.Error(), "a revocation has overtaken") {
				overtaken++ // as it happens to those who call Issue
				continue
			}
			if w.err != nil || len(got) == 0 || got[len(got)-1] != current.Access.Reveal() {
				t.Fatalf("watch %d brought %v, and the token is %s; %v", i, got, current.Access.Reveal(), w.err)
			}
		}
		if overtaken > len(all)/2 {
			t.Errorf("%d of %d watches were overtaken by a revocation: this shows little", overtaken, len(all))
		}
	})
}
