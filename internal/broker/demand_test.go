package broker_test

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

func TestBurstOfReportsCostsOneRequest(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: time.Second}
		f := start(t, 5, profile(e))
		token, _ := f.ask(t, broker.Demand{})
		time.Sleep(time.Minute + time.Second)
		var wg sync.WaitGroup
		for i := range 1000 {
			wg.Go(func() {
				got, _, err := f.replicas[i%5].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{Not: token.ID})
				if err != nil {
					t.Errorf("issue: %v", err)
				} else if got.ID == token.ID {
					t.Error("got the token that was reported")
				}
			})
		}
		wg.Wait()
		wantCalls(t, e, 2)
		// A straggler's report of the old token is answered with the new one.
		if got, source := f.ask(t, broker.Demand{Not: token.ID}); got.ID == token.ID || source != broker.FromMemory {
			t.Errorf("got %s from %v", got.ID, source)
		}
		wantCalls(t, e, 2)
	})
}

func TestReportOfAFreshTokenIsTooSoon(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e))
		token, _ := f.ask(t, broker.Demand{})
		refused := f.refused(t, broker.Demand{Not: token.ID}, broker.ReasonRefreshTooSoon)
		if refused.RetryAfter <= 0 || refused.RetryAfter > 10*time.Second {
			t.Errorf("told to retry in %v, want at most 10s", refused.RetryAfter)
		}
		// The token itself goes on being served to those who do not complain.
		f.ask(t, broker.Demand{})
		time.Sleep(refused.RetryAfter)
		f.ask(t, broker.Demand{Not: token.ID})
		wantCalls(t, e, 2)
	})
}

func TestResourceServerThatRefusesEverythingDoesNotDrainTheEndpoint(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 3, profile(e))
		token, _ := f.ask(t, broker.Demand{})
		rejected := token.ID
		began := time.Now()
		for i := 0; time.Since(began) < 10*time.Minute; i++ {
			got, _, err := f.replicas[i%3].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{Not: rejected})
			if err == nil {
				rejected = got.ID
			}
			time.Sleep(100 * time.Millisecond)
		}
		if n := e.count(); n > 8 {
			t.Errorf("%d token requests in ten minutes, want at most 8", n)
		}
	})
}

func TestReportAndPlainCallerDoNotGetEachOthersVerdict(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e))
		token, _ := f.ask(t, broker.Demand{})
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { f.refused(t, broker.Demand{Not: token.ID}, broker.ReasonRefreshTooSoon) })
			wg.Go(func() { f.ask(t, broker.Demand{}) })
			wg.Go(func() {
				_, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{Lifetime: 50 * time.Minute})
				if err != nil {
					t.Errorf("50 minutes of an hour: %v", err)
				}
			})
		}
		wg.Wait()
		wantCalls(t, e, 1)
	})
}

func TestMinimumLifetime(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e))
		f.ask(t, broker.Demand{})
		time.Sleep(20 * time.Minute)
		token, source := f.ask(t, broker.Demand{Lifetime: 50 * time.Minute})
		if source != broker.FromEndpoint || time.Until(token.ExpireTime) < 50*time.Minute {
			t.Errorf("got a token from %v that lives %v", source, time.Until(token.ExpireTime))
		}
		wantCalls(t, e, 2)
		time.Sleep(time.Minute)
		for _, asked := range []time.Duration{time.Hour - 30*time.Second, time.Hour, 2 * time.Hour} {
			f.refused(t, broker.Demand{Lifetime: asked}, broker.ReasonLifetimeUnavailable)
		}
		wantCalls(t, e, 2)
	})
}

func TestMinimumLifetimeOnAColdBrokerIsJudgedByTheNewToken(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e))
		for range 10 {
			f.refused(t, broker.Demand{Lifetime: 2 * time.Hour}, broker.ReasonLifetimeUnavailable)
		}
		f.ask(t, broker.Demand{})
		wantCalls(t, e, 1)
	})
}

func TestDemandsNearTheFullLifeAreBounded(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e))
		f.ask(t, broker.Demand{})
		for range 3600 {
			f.ask(t, broker.Demand{Lifetime: broker.LongestFloor(time.Hour)})
			time.Sleep(time.Second)
		}
		if n := e.count(); n > 101 {
			t.Errorf("%d token requests in an hour, want one per 36 s at most", n)
		}
	})
}

func TestServerThatRepeatsItsTokenIsNotAskedInALoop(t *testing.T) {
	in(t, func(t *testing.T) {
		began := time.Now()
		e := &endpoint{}
		e.answer = func(int) (*broker.Grant, error) {
			return grant(1, time.Hour-time.Since(began)), nil
		}
		f := start(t, 1, profile(e))
		for time.Since(began) < time.Hour-20*time.Second {
			f.ask(t, broker.Demand{})
			time.Sleep(time.Second)
		}
		if n := e.count(); n > 12 {
			t.Errorf("%d token requests in an hour for one token", n)
		}
	})
}

func TestShortTokensAreUsableAndNotAskedForInALoop(t *testing.T) {
	for _, lives := range []time.Duration{10 * time.Second, 20 * time.Second, time.Minute} {
		t.Run(lives.String(), func(t *testing.T) {
			in(t, func(t *testing.T) {
				e := &endpoint{lives: lives}
				f := start(t, 2, profile(e))
				for range 6000 {
					f.ask(t, broker.Demand{})
					time.Sleep(100 * time.Millisecond)
				}
				if n, most := e.count(), int(10*time.Minute/(lives/2))+1; n > most {
					t.Errorf("%d token requests in ten minutes, want at most %d", n, most)
				}
			})
		})
	}
}

func TestReportOfATokenThatTheServerRepeats(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: func(int) (*broker.Grant, error) { return grant(1, 0), nil }}
		f := start(t, 1, profile(e))
		token, _ := f.ask(t, broker.Demand{})
		time.Sleep(2 * time.Minute)
		f.refused(t, broker.Demand{Not: token.ID}, broker.ReasonEndpointUnavailable)
		wantCalls(t, e, 2)
		f.refused(t, broker.Demand{Not: token.ID}, broker.ReasonRefreshTooSoon)
		wantCalls(t, e, 2)
	})
}

func TestReconfigure(t *testing.T) {
	in(t, func(t *testing.T) {
		e, other := &endpoint{}, &endpoint{}
		f := start(t, 1, profile(e))
		b := f.replicas[0]
		token, _ := f.ask(t, broker.Demand{})

		// The same identity keeps its token, also under a new secret.
		b.Configure([]*broker.Profile{profile(e, func(p *broker.Profile) { p.Credential = "secret-2" })})
		if got, source := f.ask(t, broker.Demand{}); got.ID != token.ID || source != broker.FromMemory {
			t.Errorf("a new secret lost the token: %s from %v", got.ID, source)
		}
		// Another identity never serves yesterday's token.
		other.answer = func(int) (*broker.Grant, error) { return grant(77, 0), nil }
		b.Configure([]*broker.Profile{profile(other, func(p *broker.Profile) { p.Identity = "another tenant" })})
		if got, _ := f.ask(t, broker.Demand{}); got.Access.Reveal() != "token-77" {
			t.Error("served the token of another identity")
		}
		// A profile that is gone is gone, and nothing renews it.
		b.Configure(nil)
		f.refused(t, broker.Demand{}, broker.ReasonProfileUnknown)
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		wantCalls(t, e, 1)
		wantCalls(t, other, 1)
	})
}

func TestProfilesOfOneIdentityShareTheToken(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e), profile(e, func(p *broker.Profile) { p.Name, p.Scopes = "twin", []string{"c", "b", "a"} }))
		f.ask(t, broker.Demand{})
		if _, source, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "twin"}, broker.Demand{}); err != nil || source != broker.FromMemory {
			t.Errorf("source %v, error %v", source, err)
		}
		wantCalls(t, e, 1)
	})
}

func TestServerThatRepeatsItsTokenPastItsFirstEnd(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: func(int) (*broker.Grant, error) { return grant(1, time.Hour), nil }} // a sliding session
		f := start(t, 1, profile(e))
		for range 3 * 3600 {
			f.ask(t, broker.Demand{})
			time.Sleep(time.Second)
		}
		if n := e.count(); n > 3*12 {
			t.Errorf("%d token requests in three hours", n)
		}
	})
}

func TestTokenThatIsNearlyOverWhenItArrives(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 9500 * time.Millisecond, lives: 10 * time.Second}
		f := start(t, 1, profile(e))
		for range 100 {
			f.refused(t, broker.Demand{}, broker.ReasonEndpointUnavailable)
			time.Sleep(600 * time.Millisecond)
		}
		if n := e.count(); n > 5 {
			t.Errorf("%d token requests in a minute", n)
		}
	})
}

// far is a store a network away.
type far struct{ broker.Store }

func (f far) Acquire(ctx context.Context, c broker.Claim) (broker.Acquisition, error) {
	time.Sleep(time.Millisecond)
	return f.Store.Acquire(ctx, c)
}

func TestPlainCallersOfAColdReplicaAmongReporters(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e))
		token, _ := f.ask(t, broker.Demand{})
		for range 50 {
			b := broker.New(far{f.store}, broker.Options{}) // a replica that has just started
			b.Configure([]*broker.Profile{profile(e)})
			var wg sync.WaitGroup
			for i := range 3 { // clients that report, and retry at once
				wg.Go(func() {
					time.Sleep(time.Duration(i) * 100 * time.Microsecond)
					for range 5 {
						if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{Not: token.ID}); err == nil {
							t.Error("a report right after the mint got a token")
						}
					}
				})
			}
			wg.Go(func() {
				time.Sleep(500 * time.Microsecond)
				if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
					t.Errorf("a plain caller, while the store holds a fresh token: %v", err)
				}
			})
			wg.Wait()
			b.Close()
		}
		wantCalls(t, e, 1)
	})
}
