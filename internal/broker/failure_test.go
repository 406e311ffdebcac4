package broker_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

func TestWrongSecretIsTriedOnce(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: time.Second, answer: fails(broker.ClientRejected, "invalid_client", 0)}
		p := profile(e)
		f := start(t, 5, p)
		storm := func() {
			var wg sync.WaitGroup
			for i := range 10_000 {
				wg.Go(func() {
					scopes := [][]string{nil, {"a"}, {"a", "b"}}[i%3]
					_, _, err := f.replicas[i%5].Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: scopes}, broker.Demand{})
					var be *broker.Error
					if !errors.As(err, &be) || be.Reason != broker.ReasonCredentialsRejected {
						t.Errorf("got %v", err)
					} else if !strings.Contains(be.Text, "client_secret") || !strings.Contains(be.Text, "broker reset invoices") {
						t.Errorf("the message does not say what to do: %s", be.Text)
					}
				})
			}
			wg.Wait()
		}
		// Subsets of the scopes are families of their own; within one process
		// the client is tried once for all of them, across processes once per
		// family.
		storm()
		tried := e.count()
		if tried > 3 {
			t.Fatalf("%d token requests for three families", tried)
		}
		for range 29 {
			time.Sleep(time.Minute)
			f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
		}
		wantCalls(t, e, tried)
	})
}

// Some servers refuse a client by the status 401 alone.
func TestClientRefusedWithoutACode(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: fails(broker.ClientRejected, "", 0)}
		f := start(t, 1, profile(e))
		for range 3 {
			_, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			if be := (*broker.Error)(nil); !errors.As(err, &be) || be.Reason != broker.ReasonCredentialsRejected || !strings.Contains(be.Text, "correct client_id and client_secret") {
				t.Errorf("got %v", err)
			}
		}
		wantCalls(t, e, 1)
	})
}

func TestWrongSecretOneProfileOneRequest(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: time.Second, answer: fails(broker.ClientRejected, "invalid_client", 0)}
		f := start(t, 5, profile(e))
		var wg sync.WaitGroup
		for i := range 10_000 {
			wg.Go(func() {
				if _, _, err := f.replicas[i%5].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err == nil {
					t.Error("got a token")
				}
			})
		}
		wg.Wait()
		wantCalls(t, e, 1)
		time.Sleep(29 * time.Minute)
		f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
		wantCalls(t, e, 1)
		time.Sleep(2 * time.Minute) // 30 minutes have passed: once more
		f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
		f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
		wantCalls(t, e, 2)
	})
}

func TestWrongSecretOfOneReplicaIsTriedOnceForAllSubsets(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: time.Second, answer: fails(broker.ClientRejected, "invalid_client", 0)}
		f := start(t, 1, profile(e))
		var wg sync.WaitGroup
		for _, scopes := range [][]string{nil, {"a"}, {"b"}, {"c"}, {"a", "b"}} {
			wg.Go(func() {
				if _, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: scopes}, broker.Demand{}); err == nil {
					t.Error("got a token")
				}
			})
		}
		wg.Wait()
		wantCalls(t, e, 1)
	})
}

func TestWrongPasswordIsNeverTriedAgainByItself(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: fails(broker.UserRejected, "invalid_grant", 0)}
		f := start(t, 2, profile(e))
		for range 400 {
			refused := f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
			if !strings.Contains(refused.Text, "password") {
				t.Fatalf("the message does not speak of the password: %s", refused.Text)
			}
			time.Sleep(24 * time.Hour)
		}
		wantCalls(t, e, 1)
	})
}

// A password is wrong whatever the client's secret is, for all scopes and
// replicas: only another password is tried.
func TestRefusedPasswordOutlivesTheClientsSecret(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: fails(broker.UserRejected, "invalid_grant", 0)}
		with := func(secret, password string) *broker.Profile {
			return profile(e, func(p *broker.Profile) {
				p.GrantType, p.Credential, p.UserCredential = broker.Password, secret+password, password
			})
		}
		f := start(t, 2, with("secret-1", "wrong"))
		f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
		for _, b := range f.replicas {
			b.Configure([]*broker.Profile{with("secret-2", "wrong")})
		}
		f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
		late := broker.New(f.store, broker.Options{}) // knows what the store knows
		defer late.Close()
		late.Configure([]*broker.Profile{with("secret-3", "wrong")})
		for _, scopes := range [][]string{nil, {"a"}} {
			if _, _, err := late.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: scopes}, broker.Demand{}); err == nil {
				t.Error("got a token")
			}
		}
		wantCalls(t, e, 1)
		e.set(func(e *endpoint) { e.answer = nil })
		late.Configure([]*broker.Profile{with("secret-3", "right")})
		if _, _, err := late.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
			t.Error(err)
		}
		wantCalls(t, e, 2)
	})
}

func TestNewCredentialEndsARefusal(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: fails(broker.ClientRejected, "invalid_client", 0)}
		f := start(t, 2, profile(e))
		f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)

		good := &endpoint{}
		corrected := profile(good, func(p *broker.Profile) { p.Credential = "secret-2" })
		f.replicas[0].Configure([]*broker.Profile{corrected})
		f.ask(t, broker.Demand{})
		wantCalls(t, good, 1)
		// The replica that still has the old secret is served what the other obtained.
		if _, _, err := f.replicas[1].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
			t.Error(err)
		}
		wantCalls(t, e, 1)
	})
}

func TestRefusalOfAnOldCredentialDoesNotBindANewOne(t *testing.T) {
	in(t, func(t *testing.T) {
		old := &endpoint{takes: 2 * time.Second, answer: fails(broker.ClientRejected, "invalid_client", 0)}
		good := &endpoint{}
		f := start(t, 1, profile(old))
		go f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
		time.Sleep(time.Second)
		f.replicas[0].Configure([]*broker.Profile{profile(good, func(p *broker.Profile) { p.Credential = "secret-2" })})
		f.ask(t, broker.Demand{}) // joins the old flight, is not bound by it, and flies once more
		wantCalls(t, old, 1)
		wantCalls(t, good, 1)
	})
}

func TestResetTriesAgainOnce(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: fails(broker.UserRejected, "invalid_grant", 0)}
		f := start(t, 2, profile(e))
		f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
		if err := f.replicas[1].Reset(t.Context(), "invoices"); err != nil { // on another replica
			t.Fatal(err)
		}
		f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
		f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
		wantCalls(t, e, 2)
		e.set(func(e *endpoint) { e.answer = nil })
		if err := f.replicas[0].Reset(t.Context(), "invoices"); err != nil {
			t.Fatal(err)
		}
		f.ask(t, broker.Demand{})
	})
}

func TestFailureFromBeforeAResetIsNotRemembered(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 2 * time.Second, answer: func(n int) (*broker.Grant, error) {
			if n == 1 {
				return fails(broker.UserRejected, "invalid_grant", 0)(n)
			}
			return grant(n, 0), nil
		}}
		f := start(t, 1, profile(e))
		first := make(chan error)
		go func() {
			_, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			first <- err
		}()
		time.Sleep(time.Second)
		if err := f.replicas[0].Reset(t.Context(), "invoices"); err != nil {
			t.Fatal(err)
		}
		if err := <-first; err == nil {
			t.Fatal("the first caller got a token")
		}
		f.ask(t, broker.Demand{})
	})
}

func TestRefusedScopeRestsFiveMinutes(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: fails(broker.RequestRejected, "invalid_scope", 0)}
		f := start(t, 1, profile(e))
		for range 4 {
			refused := f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
			if refused.Code != "invalid_scope" || !strings.Contains(refused.Text, "scopes") {
				t.Errorf("got %q, code %q", refused.Text, refused.Code)
			}
			time.Sleep(time.Minute)
		}
		wantCalls(t, e, 1)
		time.Sleep(2 * time.Minute)
		f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
		wantCalls(t, e, 2)
	})
}

func TestRefusalKeepsTheLivingToken(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 1, profile(e))
		token, _ := f.ask(t, broker.Demand{})
		e.set(func(e *endpoint) { e.answer = fails(broker.ClientRejected, "invalid_client", 0) })
		for time.Until(token.ExpireTime) > time.Second {
			f.ask(t, broker.Demand{})
			time.Sleep(time.Second)
		}
		wantCalls(t, e, 2) // the renewal, once
		time.Sleep(2 * time.Second)
		f.refused(t, broker.Demand{}, broker.ReasonCredentialsRejected)
	})
}

func TestImpossibleLifetimeIsMalformed(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{lives: 9 * time.Second}
		f := start(t, 1, profile(e))
		f.refused(t, broker.Demand{}, broker.ReasonEndpointUnavailable)
		wantCalls(t, e, 1)
	})
}

// slowReplies has the store's answers to failures on their way until told.
type slowReplies struct {
	broker.Store
	arrive chan struct{}
}

func (s slowReplies) Fail(ctx context.Context, l broker.Lease, f broker.Failure) (broker.Failure, error) {
	decided, err := s.Store.Fail(ctx, l, f)
	<-s.arrive
	return decided, err
}

func TestResetIsNotUndoneByAFailureOnItsWay(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: fails(broker.UserRejected, "invalid_grant", 0)}
		f := start(t, 1, profile(e))
		s := slowReplies{f.store, make(chan struct{})}
		b := broker.New(s, broker.Options{})
		defer b.Close()
		b.Configure([]*broker.Profile{profile(e)})
		go b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
		synctest.Wait() // failed in the store, the reply is on its way
		e.set(func(e *endpoint) { e.answer = nil })
		if err := b.Reset(t.Context(), "invoices"); err != nil {
			t.Fatal(err)
		}
		close(s.arrive)
		synctest.Wait()
		if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
			t.Errorf("after the reset: %v", err)
		}
	})
}

func TestRefusedReplicaServesWhatAnotherObtained(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: fails(broker.UserRejected, "invalid_grant", 0)}
		f := start(t, 2, profile(e))
		for _, b := range f.replicas {
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err == nil {
				t.Fatal("got a token")
			}
		}
		good := &endpoint{}
		f.replicas[0].Configure([]*broker.Profile{profile(good, func(p *broker.Profile) { p.Credential = "secret-2" })})
		f.ask(t, broker.Demand{})
		synctest.Wait()
		if _, _, err := f.replicas[1].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
			t.Errorf("the store holds a valid token: %v", err)
		}
		wantCalls(t, e, 1)
	})
}

func TestRefusedPasswordIsNotRepeatedAfterAnothersSuccess(t *testing.T) {
	in(t, func(t *testing.T) {
		bad := &endpoint{answer: fails(broker.UserRejected, "invalid_grant", 0)}
		good := &endpoint{}
		f := start(t, 2, profile(bad, password))
		f.replicas[0].Configure([]*broker.Profile{profile(good, password, func(p *broker.Profile) { p.Credential = "secret-2" })})
		if _, _, err := f.replicas[1].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err == nil {
			t.Fatal("got a token")
		}
		for range 24 * 12 { // both in use, the token is renewed many times
			f.ask(t, broker.Demand{})
			synctest.Wait()
			if _, _, err := f.replicas[1].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
				t.Fatalf("the replica with the old password: %v", err)
			}
			time.Sleep(5 * time.Minute)
		}
		wantCalls(t, bad, 1)
	})
}

func TestResetHeardFromAnotherReplicaResumesRenewals(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 2, profile(e))
		token, _ := f.ask(t, broker.Demand{})
		e.set(func(e *endpoint) { e.answer = fails(broker.UserRejected, "invalid_grant", 0) })
		for time.Until(token.ExpireTime) > 5*time.Minute {
			f.ask(t, broker.Demand{})
			time.Sleep(time.Second)
		}
		e.set(func(e *endpoint) { e.answer, e.takes = nil, 5*time.Second })
		if err := f.replicas[1].Reset(t.Context(), "invoices"); err != nil {
			t.Fatal(err)
		}
		for range 400 {
			began := time.Now()
			f.ask(t, broker.Demand{})
			if time.Since(began) > 0 {
				t.Fatalf("a caller waited %v", time.Since(began))
			}
			time.Sleep(time.Second)
		}
	})
}
