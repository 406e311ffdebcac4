package broker_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// subsets of the test profile's scopes, each a family of its own.
var subsets = [][]string{{"a"}, {"b"}, {"c"}, {"a", "b"}, {"a", "c"}, {"b", "c"}}

func password(p *broker.Profile) { p.GrantType = broker.Password }

func TestColdFamiliesOfOneClientWaitForOneProofOnly(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 2 * time.Second}
		var scopes []string
		for i := range 20 {
			scopes = append(scopes, fmt.Sprintf("s%02d", i))
		}
		f := start(t, 1, profile(e, func(p *broker.Profile) { p.Scopes = scopes }))
		began := time.Now()
		var wg sync.WaitGroup
		for _, s := range scopes {
			wg.Go(func() {
				if _, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{s}}, broker.Demand{}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if took := time.Since(began); took > 2*e.takes {
			t.Errorf("20 families took %v, want the proof and then all others at once: %v", took, 2*e.takes)
		}
		wantCalls(t, e, 20)
	})
}

func TestHangingEndpointIsTriedOnceForAllFamiliesOfAnUnprovenClient(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 10 * time.Second, answer: fails(broker.Ambiguous, "", 0)}
		f := start(t, 1, profile(e))
		began := time.Now()
		var wg sync.WaitGroup
		for _, s := range subsets {
			wg.Go(func() {
				if _, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: s}, broker.Demand{}); err == nil {
					t.Error("got a token")
				}
			})
		}
		wg.Wait()
		if took := time.Since(began); took > e.takes {
			t.Errorf("the last family heard after %v, want %v", took, e.takes)
		}
		wantCalls(t, e, 1)
	})
}

func TestSuccessOfAnEarlierCallDoesNotEndAThrottle(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e))
		f.ask(t, broker.Demand{})
		b := f.replicas[0]
		e.set(func(e *endpoint) { e.takes = 2 * time.Second })
		go b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{"a"}}, broker.Demand{})
		time.Sleep(time.Second)
		e.set(func(e *endpoint) { e.takes, e.answer = 0, fails(broker.Throttled, "", 10*time.Minute) })
		if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{"b"}}, broker.Demand{}); err == nil {
			t.Fatal("got a token")
		}
		throttled := e.count()
		time.Sleep(2 * time.Second) // the earlier call has succeeded
		for _, s := range [][]string{{"c"}, {"b", "c"}} {
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: s}, broker.Demand{}); err == nil {
				t.Error("got a token")
			}
		}
		wantCalls(t, e, throttled)
	})
}

func TestSuccessOfOneCredentialDoesNotFreeAnother(t *testing.T) {
	in(t, func(t *testing.T) {
		bad := &endpoint{answer: fails(broker.UserRejected, "invalid_grant", 0)}
		good := &endpoint{}
		f := start(t, 1,
			profile(bad, password),
			profile(good, password, func(p *broker.Profile) { p.Name, p.Credential, p.Scopes = "right", "secret-2", []string{"x"} }))
		b := f.replicas[0]
		for _, s := range subsets {
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: s}, broker.Demand{}); err == nil {
				t.Fatal("got a token")
			}
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "right"}, broker.Demand{}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * time.Hour)
		}
		wantCalls(t, bad, 1)
	})
}

func TestChangedPasswordIsPresentedOnce(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e, password))
		f.ask(t, broker.Demand{})
		e.set(func(e *endpoint) { e.takes, e.answer = time.Second, fails(broker.UserRejected, "invalid_grant", 0) })
		var wg sync.WaitGroup
		for _, s := range subsets {
			wg.Go(func() {
				if _, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: s}, broker.Demand{}); err == nil {
					t.Error("got a token")
				}
			})
		}
		wg.Wait()
		wantCalls(t, e, 2)
	})
}

func TestReloadThatDropsAProfileForgetsNoRefusal(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: fails(broker.UserRejected, "invalid_grant", 0)}
		f := start(t, 1, profile(e, password))
		b := f.replicas[0]
		for _, s := range subsets {
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: s}, broker.Demand{}); err == nil {
				t.Error("got a token")
			}
			b.Configure(nil)
			b.Configure([]*broker.Profile{profile(e, password)})
		}
		wantCalls(t, e, 1)
	})
}

func TestRefusalOfAnOldCredentialIsRememberedBesideTheNewOnes(t *testing.T) {
	in(t, func(t *testing.T) {
		bad := &endpoint{answer: fails(broker.UserRejected, "invalid_grant", 0)}
		flaky := &endpoint{answer: fails(broker.Unavailable, "", 0)}
		old := profile(bad, password)
		f := start(t, 1, old)
		b := f.replicas[0]
		for range 3 {
			f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
			b.Configure([]*broker.Profile{profile(flaky, password, func(p *broker.Profile) { p.Credential = "secret-2" })})
			f.refused(t, broker.Demand{}, broker.ReasonEndpointUnavailable)
			time.Sleep(10 * time.Minute)
			b.Configure([]*broker.Profile{old})
		}
		wantCalls(t, bad, 1)
	})
}

func TestShorterThrottleDoesNotReplaceALongerOne(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e))
		f.ask(t, broker.Demand{})
		b := f.replicas[0]
		refuse := func(s []string) {
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: s}, broker.Demand{}); err == nil {
				t.Error("got a token")
			}
		}
		e.set(func(e *endpoint) { e.takes, e.answer = 2*time.Second, fails(broker.Throttled, "", 0) })
		var wg sync.WaitGroup
		wg.Go(func() { refuse([]string{"a"}) })
		time.Sleep(time.Second)
		e.set(func(e *endpoint) { e.takes, e.answer = 0, fails(broker.Throttled, "", 10*time.Minute) })
		refuse([]string{"b"})
		wg.Wait() // the first has heard 429 without a time
		throttled := e.count()
		time.Sleep(5 * time.Minute)
		refuse([]string{"c"})
		wantCalls(t, e, throttled)
	})
}

func TestOurOwnDeadlineIsNotTheEndpointsFailure(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 20 * time.Second} // slow, and well
		f := start(t, 1, profile(e, password))  // which is presented by one call at a time
		b := f.replicas[0]
		var wg sync.WaitGroup
		for _, s := range subsets[:2] {
			wg.Go(func() { b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: s}, broker.Demand{}) })
		}
		wg.Wait()
		for _, s := range subsets[:2] {
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: s}, broker.Demand{}); err != nil {
				t.Errorf("held back though the endpoint never failed: %v", err)
			}
		}
	})
}

func TestReloadsDoNotAskAServerThatRepeatsItsToken(t *testing.T) {
	in(t, func(t *testing.T) {
		began, e := time.Now(), &endpoint{}
		e.answer = func(int) (*broker.Grant, error) { return grant(1, time.Hour-time.Since(began)), nil }
		f := start(t, 1, profile(e))
		f.ask(t, broker.Demand{})
		time.Sleep(52 * time.Minute)
		asked := e.count()
		for range 20 {
			f.ask(t, broker.Demand{})
			f.replicas[0].Configure([]*broker.Profile{profile(e)})
			time.Sleep(time.Second)
		}
		if n := e.count() - asked; n > 1 { // one may be due in these twenty seconds
			t.Errorf("%d token requests for twenty reloads", n)
		}
	})
}
