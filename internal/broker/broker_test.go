package broker_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// in runs a test in virtual time.
func in(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	t.Parallel()
	synctest.Test(t, test)
}

func TestManyCallersOneRequest(t *testing.T) {
	for _, replicas := range []int{1, 5} {
		t.Run(fmt.Sprintf("%d replicas", replicas), func(t *testing.T) {
			in(t, func(t *testing.T) {
				e := &endpoint{takes: 2 * time.Second}
				f := start(t, replicas, profile(e))
				var wg sync.WaitGroup
				began := time.Now()
				for i := range 10_000 {
					wg.Go(func() {
						token, _, err := f.replicas[i%replicas].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
						if err != nil {
							t.Errorf("issue: %v", err)
						} else if got := token.Access.Reveal(); got != "token-1" {
							t.Errorf("got %s, want token-1", got)
						}
						if took := time.Since(began); took > e.takes+250*time.Millisecond {
							t.Errorf("waited %v for an answer that took %v", took, e.takes)
						}
					})
				}
				wg.Wait()
				wantCalls(t, e, 1)
			})
		})
	}
}

func TestSourceTellsWhereTheTokenCameFrom(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 2, profile(e))
		for _, want := range []struct {
			replica int
			source  broker.Source
		}{{0, broker.FromEndpoint}, {0, broker.FromMemory}, {1, broker.FromStore}, {1, broker.FromMemory}} {
			_, source, err := f.replicas[want.replica].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			if err != nil || source != want.source {
				t.Fatalf("replica %d: source %v, error %v; want source %v", want.replica, source, err, want.source)
			}
		}
		wantCalls(t, e, 1)
	})
}

func TestCallerThatLeavesCancelsNothing(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 5 * time.Second}
		f := start(t, 1, profile(e))
		stays := make(chan error)
		impatient, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		go func() {
			time.Sleep(500 * time.Millisecond)
			_, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			stays <- err
		}()
		if _, _, err := f.replicas[0].Issue(impatient, broker.Ask{Profile: "invoices"}, broker.Demand{}); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("the impatient caller got %v, want its own deadline", err)
		}
		if err := <-stays; err != nil {
			t.Fatalf("the patient caller got %v", err)
		}
		wantCalls(t, e, 1)
	})
}

func TestTokenOfLoneCallerThatLeavesIsSaved(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 5 * time.Second}
		f := start(t, 2, profile(e))
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		if _, _, err := f.replicas[0].Issue(ctx, broker.Ask{Profile: "invoices"}, broker.Demand{}); !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v, want context.Canceled", err)
		}
		time.Sleep(5 * time.Second)
		if _, source := f.ask(t, broker.Demand{}); source != broker.FromMemory {
			t.Errorf("source %v, want memory", source)
		}
		if _, source, err := f.replicas[1].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil || source != broker.FromStore {
			t.Errorf("the other replica: source %v, error %v; want the store", source, err)
		}
		wantCalls(t, e, 1)
	})
}

func TestSlowEndpointKeepsTheLease(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 9 * time.Second} // three leases
		f := start(t, 3, profile(e))
		var wg sync.WaitGroup
		for _, b := range f.replicas {
			wg.Go(func() {
				if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
					t.Errorf("issue: %v", err)
				}
			})
		}
		wg.Wait()
		wantCalls(t, e, 1)
	})
}

func TestDeadHolderDelaysOthersByOneLease(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e))
		// A replica took the lease and died: nobody renews it.
		family := broker.Identity(broker.Identity("https://id.example.com", "invoices"), "a", "b", "c")
		a, err := f.store.Acquire(t.Context(), broker.Claim{Family: family, Owner: "dead", Length: 3 * time.Second, Credentials: []string{"secret-1"}})
		if err != nil || a.Verdict != broker.Granted {
			t.Fatalf("acquire: %v, %v", a.Verdict, err)
		}
		began := time.Now()
		f.ask(t, broker.Demand{})
		if took := time.Since(began); took < 2*time.Second || took > 3500*time.Millisecond {
			t.Errorf("served after %v, want about one lease of 3s", took)
		}
		wantCalls(t, e, 1)
	})
}

func TestExpiredTokenIsNeverServed(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{lives: time.Minute}
		f := start(t, 1, profile(e))
		token, _ := f.ask(t, broker.Demand{})
		e.set(func(e *endpoint) { e.answer = fails(broker.Unavailable, "", 0) })
		for time.Until(token.ExpireTime) > 0 {
			if got, _ := f.ask(t, broker.Demand{}); got.ID != token.ID {
				t.Fatalf("got another token %s", got.ID)
			}
			time.Sleep(100 * time.Millisecond)
		}
		f.refused(t, broker.Demand{}, broker.ReasonEndpointUnavailable)
	})
}

func TestTokensInUseAreRenewedAhead(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: time.Second}
		f := start(t, 3, profile(e))
		for _, b := range f.replicas {
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
				t.Fatal(err)
			}
		}
		for range 10 * 3600 {
			for _, b := range f.replicas {
				began := time.Now()
				token, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
				if err != nil {
					t.Fatal(err)
				}
				if time.Since(began) > 0 {
					t.Fatalf("a caller waited %v", time.Since(began))
				}
				if time.Until(token.ExpireTime) < 5*time.Minute {
					t.Fatalf("a caller got a token with %v left", time.Until(token.ExpireTime))
				}
			}
			time.Sleep(time.Second)
		}
		// An hour's token is renewed at 75 to 85 % of its life.
		if n := e.count(); n < 10*100/85 || n > 10*100/75+1 {
			t.Errorf("%d token requests in ten hours for all three replicas", n)
		}
	})
}

func TestIdleTokensAreLeftToExpire(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e))
		f.ask(t, broker.Demand{})
		time.Sleep(24 * time.Hour)
		wantCalls(t, e, 2) // one renewal: it had been asked for within its last life
	})
}

func TestDormantTokenIsRousedByItsNextCaller(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e))
		f.ask(t, broker.Demand{})
		// The second token, obtained after 44 to 51 minutes, is past its own
		// renewal, unasked for, and lives.
		time.Sleep(102 * time.Minute)
		wantCalls(t, e, 2)
		if token, source := f.ask(t, broker.Demand{}); source != broker.FromMemory || token.Access.Reveal() != "token-2" {
			t.Fatalf("got %s from %v, want token-2 from memory", token.ID, source)
		}
		synctest.Wait()
		wantCalls(t, e, 3)
		if token, _ := f.ask(t, broker.Demand{}); token.Access.Reveal() != "token-3" {
			t.Errorf("the renewed token is not served")
		}
	})
}

func TestLongTokensAreRenewedDaily(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{lives: 30 * 24 * time.Hour}
		f := start(t, 1, profile(e))
		for range 10 * 24 {
			token, _ := f.ask(t, broker.Demand{})
			if age := time.Since(token.IssueTime); age > 24*time.Hour {
				t.Fatalf("served a token %v old", age)
			}
			time.Sleep(time.Hour)
		}
		if n := e.count(); n < 10 || n > 12 {
			t.Errorf("%d token requests in ten days", n)
		}
	})
}

func TestEndpointDownForAnHourWhileTheTokenIsValid(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{lives: 10 * time.Hour}
		f := start(t, 1, profile(e))
		f.ask(t, broker.Demand{})
		time.Sleep(7 * time.Hour)
		before := e.count()
		lines := strings.Count(f.log.String(), "\n")
		e.set(func(e *endpoint) { e.answer = fails(broker.Unavailable, "", 0) })
		calls := 0
		for e.count() == before { // until the first renewal fails
			f.ask(t, broker.Demand{})
			time.Sleep(time.Second)
		}
		for range 3600 {
			for range 10 {
				f.ask(t, broker.Demand{})
				calls++
			}
			time.Sleep(time.Second)
		}
		synctest.Wait()
		attempts := e.count() - before
		if logged := strings.Count(f.log.String(), "\n") - lines; logged != attempts {
			t.Errorf("%d log lines for %d attempts and %d calls", logged, attempts, calls)
		}
		checkBackoff(t, e.since(before))
	})
}

// checkBackoff wants 5, 10, 20, 40, 60, 60 ... seconds within a fifth, and a
// second for what the calls themselves take.
func checkBackoff(t *testing.T, calls []time.Time) {
	t.Helper()
	if len(calls) < 3 {
		t.Fatalf("only %d attempts", len(calls))
	}
	want := 5 * time.Second
	for i := 1; i < len(calls); i++ {
		got := calls[i].Sub(calls[i-1])
		if got < want*8/10 || got > want*12/10+time.Second {
			t.Errorf("attempt %d came %v after the one before, want about %v", i+1, got, want)
		}
		want = min(2*want, time.Minute)
	}
}

func TestEndpointDownOnAColdStartBacksOffForEverybody(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: fails(broker.Unavailable, "", 0)}
		f := start(t, 5, profile(e))
		began := time.Now()
		for time.Since(began) < 10*time.Minute {
			for _, b := range f.replicas {
				_, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
				var be *broker.Error
				if !errors.As(err, &be) || be.Reason != broker.ReasonEndpointUnavailable || be.RetryAfter <= 0 {
					t.Fatalf("got %#v, want %s with a time to retry", err, broker.ReasonEndpointUnavailable)
				}
			}
			time.Sleep(100 * time.Millisecond)
		}
		checkBackoff(t, e.since(0))
		e.set(func(e *endpoint) { e.answer = nil })
		time.Sleep(73 * time.Second)
		f.ask(t, broker.Demand{})
	})
}

func TestThrottledClientIsLeftAloneByAllItsFamilies(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: fails(broker.Throttled, "", 7*time.Minute)}
		f := start(t, 1, profile(e))
		began := time.Now()
		refused := f.refused(t, broker.Demand{}, broker.ReasonEndpointThrottled)
		if refused.RetryAfter < 7*time.Minute {
			t.Errorf("told to retry in %v, the server said 7m", refused.RetryAfter)
		}
		e.set(func(e *endpoint) { e.answer = nil })
		for time.Since(began) < 7*time.Minute-time.Second {
			for _, scopes := range [][]string{nil, {"a"}, {"a", "b"}} {
				if _, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: scopes}, broker.Demand{}); err == nil {
					t.Fatalf("scopes %v got a token %v after the server asked for quiet", scopes, time.Since(began))
				}
			}
			time.Sleep(10 * time.Second)
		}
		wantCalls(t, e, 1)
		time.Sleep(time.Minute)
		f.ask(t, broker.Demand{})
		wantCalls(t, e, 2)
	})
}

func TestScopeSubsets(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e))
		ask := func(scopes ...string) (string, error) {
			token, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: scopes}, broker.Demand{})
			if err != nil {
				return "", err
			}
			return token.Access.Reveal(), nil
		}
		for _, c := range []struct {
			scopes []string
			want   string
		}{
			{nil, "token-1"}, {[]string{"b", "a", "c"}, "token-1"}, {[]string{"a"}, "token-2"},
			{[]string{"b", "a"}, "token-3"}, {[]string{"a", "b", "a"}, "token-3"}, {[]string{"a"}, "token-2"},
		} {
			if got, err := ask(c.scopes...); got != c.want {
				t.Errorf("scopes %v: got %s, %v; want %s", c.scopes, got, err, c.want)
			}
		}
		_, err := ask("a", "d")
		var be *broker.Error
		if !errors.As(err, &be) || be.Reason != broker.ReasonInvalidRequest || be.Field != "scopes" {
			t.Errorf("a scope that is not in the profile: %v", err)
		}
		wantCalls(t, e, 3)
	})
}

func TestScopeSubsetsAreBounded(t *testing.T) {
	in(t, func(t *testing.T) {
		var all []string
		for i := range 400 {
			all = append(all, fmt.Sprintf("s%03d", i))
		}
		e := &endpoint{}
		f := start(t, 1, profile(e, func(p *broker.Profile) { p.Scopes = all }))
		got, refused := 0, 0
		for _, s := range all {
			_, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{s}}, broker.Demand{})
			var be *broker.Error
			switch {
			case err == nil:
				got++
			case errors.As(err, &be) && be.Reason == broker.ReasonCallerThrottled && be.RetryAfter > 0:
				refused++
			default:
				t.Fatal(err)
			}
		}
		if got != 256 || refused != 144 {
			t.Errorf("%d subsets got tokens and %d were refused, want 256 and 144", got, refused)
		}
		time.Sleep(3 * time.Hour) // the tokens end, unused: there is room again
		if _, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{"s399"}}, broker.Demand{}); err != nil {
			t.Error(err)
		}
	})
}

func TestUnknownProfile(t *testing.T) {
	in(t, func(t *testing.T) {
		f := start(t, 1, profile(&endpoint{}))
		_, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "nothing"}, broker.Demand{})
		var be *broker.Error
		if !errors.As(err, &be) || be.Reason != broker.ReasonProfileUnknown {
			t.Errorf("got %v", err)
		}
	})
}

func TestPanicInTheIssuerIsAFailureLikeAnyOther(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: func(n int) (*broker.Grant, error) {
			if n == 1 {
				panic("secret-1 is in this text")
			}
			return grant(n, 0), nil
		}}
		f := start(t, 1, profile(e))
		f.refused(t, broker.Demand{}, broker.ReasonEndpointUnavailable)
		if strings.Contains(f.log.String(), "secret-1") {
			t.Error("the panic's value reached the log")
		}
		time.Sleep(7 * time.Second)
		f.ask(t, broker.Demand{})
	})
}

func TestCloseGivesTheLeaseBack(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 8 * time.Second}
		f := start(t, 2, profile(e))
		failed := make(chan error)
		go func() {
			_, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			failed <- err
		}()
		time.Sleep(time.Second)
		f.replicas[0].Close()
		var be *broker.Error
		if err := <-failed; !errors.As(err, &be) || be.Reason != broker.ReasonShuttingDown || be.RetryAfter <= 0 {
			t.Fatalf("got %v", err)
		}
		began := time.Now()
		if _, _, err := f.replicas[1].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > e.takes {
			t.Errorf("the other replica was served after %v: it waited for the lease", took)
		}
		if _, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err == nil {
			t.Error("a closed broker went to the endpoint")
		}
	})
}

func TestFailedSubsetsMakeRoom(t *testing.T) {
	in(t, func(t *testing.T) {
		var all []string
		for i := range 300 {
			all = append(all, fmt.Sprintf("s%03d", i))
		}
		e := &endpoint{answer: fails(broker.Unavailable, "", 0)}
		f := start(t, 1, profile(e, func(p *broker.Profile) { p.Scopes = all }))
		for _, s := range all[:256] {
			if _, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{s}}, broker.Demand{}); err == nil {
				t.Fatal("got a token")
			}
		}
		e.set(func(e *endpoint) { e.answer = nil })
		time.Sleep(2 * time.Minute)
		if _, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: all[299:]}, broker.Demand{}); err != nil {
			t.Errorf("after the outage: %v", err)
		}
	})
}

func TestMakingRoomLeavesOtherProfilesAlone(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		narrow := profile(e, func(p *broker.Profile) { p.Name, p.Scopes = "narrow", []string{"a"} })
		f := start(t, 1, profile(e), narrow)
		b := f.replicas[0]
		for _, scopes := range [][]string{{"a"}, {"b"}} { // the first is narrow's own, the second makes room
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: scopes}, broker.Demand{}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(3 * time.Hour) // until the token is over
		}
		e.set(func(e *endpoint) { e.takes = 5 * time.Second })
		blocked := 0
		for range 6 * 3600 {
			began := time.Now()
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "narrow"}, broker.Demand{}); err != nil {
				t.Fatal(err)
			}
			if time.Since(began) > 0 {
				blocked++
			}
			time.Sleep(time.Second)
		}
		if blocked != 1 {
			t.Errorf("callers waited for the endpoint %d times in six hours, want once", blocked)
		}
	})
}

func TestProfileThatGoesAwayIsNotServedToThoseWhoWait(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 2 * time.Second}
		f := start(t, 1, profile(e))
		time.AfterFunc(time.Second, func() { f.replicas[0].Configure(nil) })
		f.refused(t, broker.Demand{}, broker.ReasonProfileUnknown)
	})
}

func TestLivingTokenIsServedWhileTheEndpointHangs(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{lives: 10 * time.Hour}
		f := start(t, 1, profile(e))
		token, _ := f.ask(t, broker.Demand{})
		e.set(func(e *endpoint) { e.takes, e.answer = 10*time.Second, fails(broker.Ambiguous, "", 0) })
		for time.Until(token.ExpireTime) > 90*time.Second {
			f.ask(t, broker.Demand{})
			time.Sleep(30 * time.Second)
		}
		var wg sync.WaitGroup
		for time.Until(token.ExpireTime) > 4*time.Second { // into the margin, and through it
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				if _, _, err := f.replicas[0].Issue(ctx, broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
					t.Errorf("with %v of a valid token left: %v", time.Until(token.ExpireTime), err)
				}
			})
			time.Sleep(100 * time.Millisecond)
		}
		wg.Wait()
	})
}

// brokenStore panics where a bug would.
type brokenStore struct{ broker.Store }

func (brokenStore) Acquire(context.Context, broker.Claim) (broker.Acquisition, error) {
	panic("secret-1 is in this text")
}

func TestPanicInTheStoreIsAFailureLikeAnyOther(t *testing.T) {
	in(t, func(t *testing.T) {
		f := start(t, 1, profile(&endpoint{}))
		b := broker.New(brokenStore{f.store}, broker.Options{})
		defer b.Close()
		b.Configure([]*broker.Profile{profile(&endpoint{})})
		for range 2 {
			_, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			var be *broker.Error
			if !errors.As(err, &be) || be.Reason != broker.ReasonEndpointUnavailable {
				t.Errorf("got %v", err)
			}
		}
	})
}

// oddStore does what the memory store does, but for what a test has it do.
type oddStore struct {
	broker.Store
	overtaken bool // every save comes too late
	forgetful bool // no lease can be renewed
}

func (s oddStore) Save(ctx context.Context, l broker.Lease, r broker.Result) (broker.StoredToken, broker.SaveVerdict, error) {
	if s.overtaken {
		return broker.StoredToken{}, broker.Stale, nil
	}
	return s.Store.Save(ctx, l, r)
}

func (s oddStore) Renew(ctx context.Context, l broker.Lease) (bool, error) {
	if s.forgetful {
		return false, errors.New("no permission")
	}
	return s.Store.Renew(ctx, l)
}

func TestTokenOfAnOvertakenLeaseServesThoseWhoWaitedForIt(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e))
		b := broker.New(oddStore{Store: f.store, overtaken: true}, broker.Options{})
		defer b.Close()
		b.Configure([]*broker.Profile{profile(e)})
		for n := 1; n <= 2; n++ { // and nobody else: it is not kept
			if token, source, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil || source != broker.FromEndpoint {
				t.Errorf("%v, %v, %v", token, source, err)
			}
		}
	})
}

func TestStoreThatDoesNotKeepLeasesDoesNotDrainTheEndpoint(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 3 * time.Second} // longer than a lease without renewals
		f := start(t, 1, profile(e))
		b := broker.New(oddStore{Store: f.store, forgetful: true}, broker.Options{})
		defer b.Close()
		b.Configure([]*broker.Profile{profile(e)})
		for began := time.Now(); time.Since(began) < 10*time.Minute; time.Sleep(time.Second) {
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err == nil {
				t.Fatal("got a token")
			}
		}
		if n := e.count(); n > 40 {
			t.Errorf("%d token requests in ten minutes", n)
		}
	})
}

func TestWaitingAcrossAReload(t *testing.T) {
	newToken := func(int) (*broker.Grant, error) {
		return &broker.Grant{AccessToken: broker.NewSecret("new-token"), TokenType: "Bearer", Lifetime: time.Hour}, nil
	}
	t.Run("to another identity", func(t *testing.T) {
		in(t, func(t *testing.T) {
			old, fresh := &endpoint{takes: 2 * time.Second}, &endpoint{answer: newToken}
			f := start(t, 1, profile(old))
			time.AfterFunc(time.Second, func() {
				f.replicas[0].Configure([]*broker.Profile{profile(fresh, func(p *broker.Profile) { p.Identity = "another tenant" })})
			})
			if token, _ := f.ask(t, broker.Demand{}); token.Access.Reveal() != "new-token" {
				t.Error("handed yesterday's token")
			}
		})
	})
	t.Run("to other scopes", func(t *testing.T) {
		in(t, func(t *testing.T) {
			old, fresh := &endpoint{takes: 2 * time.Second}, &endpoint{answer: newToken}
			f := start(t, 1, profile(old))
			time.AfterFunc(time.Second, func() {
				f.replicas[0].Configure([]*broker.Profile{profile(fresh, func(p *broker.Profile) { p.Scopes = []string{"a"} })})
			})
			if token, _ := f.ask(t, broker.Demand{}); token.Access.Reveal() != "new-token" {
				t.Error("handed a token of yesterday's scopes")
			}
		})
	})
	t.Run("to a new secret", func(t *testing.T) {
		in(t, func(t *testing.T) {
			old, fresh := &endpoint{takes: 2 * time.Second}, &endpoint{}
			fresh.answer = func(n int) (*broker.Grant, error) {
				return &broker.Grant{AccessToken: broker.NewSecret(fmt.Sprint("new-", n)), TokenType: "Bearer", Lifetime: time.Hour}, nil
			}
			f := start(t, 1, profile(old))
			b := f.replicas[0]
			var wg sync.WaitGroup
			for _, d := range []broker.Demand{{}, {Not: broker.NewSecret("token-1").ID()}} { // the second is not served by the first's flight
				wg.Go(func() { b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, d) })
				time.Sleep(time.Second / 2)
			}
			b.Configure([]*broker.Profile{profile(fresh, func(p *broker.Profile) { p.Credential = "secret-2" })})
			wg.Wait()
			presented := old.count()
			for range 600 {
				time.Sleep(time.Minute)
				f.ask(t, broker.Demand{})
			}
			wantCalls(t, old, presented)
			if fresh.count() < 10 {
				t.Errorf("the new secret was presented %d times in ten hours", fresh.count())
			}
		})
	})
	t.Run("to a new secret that is refused", func(t *testing.T) {
		in(t, func(t *testing.T) {
			old := &endpoint{takes: 2 * time.Second, answer: fails(broker.ClientRejected, "invalid_client", 0)}
			fresh := &endpoint{answer: fails(broker.ClientRejected, "invalid_client", 0)}
			f := start(t, 1, profile(old))
			time.AfterFunc(time.Second, func() {
				f.replicas[0].Configure([]*broker.Profile{profile(fresh, func(p *broker.Profile) { p.Credential = "secret-2" })})
			})
			f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
			wantCalls(t, old, 1)
			wantCalls(t, fresh, 1)
		})
	})
}
