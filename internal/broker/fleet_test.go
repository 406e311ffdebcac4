package broker_test

import (
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// What replicas share of a client, across its families.

// storm asks every replica for every subset at once, and wants that reason.
func (f *fleet) storm(t *testing.T, reason broker.Reason) {
	t.Helper()
	var wg sync.WaitGroup
	for _, b := range f.replicas {
		for _, s := range subsets {
			wg.Go(func() {
				_, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: s}, broker.Demand{})
				var be *broker.Error
				if !errors.As(err, &be) || be.Reason != reason {
					t.Errorf("got %v, want %s", err, reason)
				}
			})
		}
	}
	wg.Wait()
}

func TestWrongCredentialIsTriedOnceByTheWholeFleet(t *testing.T) {
	for name, c := range map[string]struct {
		kind   broker.IssueErrorKind
		change func(*broker.Profile)
	}{
		"secret":   {broker.ClientRejected, func(*broker.Profile) {}},
		"password": {broker.UserRejected, password},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				e := &endpoint{takes: 2 * time.Second, answer: fails(c.kind, "invalid_grant", 0)}
				f := start(t, 5, profile(e, c.change))
				f.storm(t, broker.ReasonCredentialsRejected)
				wantCalls(t, e, 1)
				if c.kind == broker.ClientRejected {
					time.Sleep(31 * time.Minute)
					f.storm(t, broker.ReasonCredentialsRejected)
					wantCalls(t, e, 2)
				}
			})
		})
	}
}

func TestProvenSecretThatIsRevokedCostsOneRequestPerReplica(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 5, profile(e))
		f.ask(t, broker.Demand{})
		e.set(func(e *endpoint) { e.answer = fails(broker.ClientRejected, "invalid_client", 0) })
		for _, s := range subsets {
			for _, b := range f.replicas {
				if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: s}, broker.Demand{}); err == nil {
					t.Error("got a token")
				}
			}
		}
		wantCalls(t, e, 2)
		time.Sleep(31 * time.Minute)
		f.storm(t, broker.ReasonCredentialsRejected) // what was proven once is no more
		wantCalls(t, e, 3)
	})
}

func TestThrottleBindsTheWholeFleet(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{}
		f := start(t, 5, profile(e))
		for _, b := range f.replicas { // the secret is proven on all of them
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
				t.Fatal(err)
			}
		}
		e.set(func(e *endpoint) { e.answer = fails(broker.Throttled, "", 10*time.Minute) })
		asked := e.count()
		for _, s := range subsets {
			for _, b := range f.replicas {
				if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: s}, broker.Demand{}); err == nil {
					t.Error("got a token")
				}
			}
		}
		wantCalls(t, e, asked+1)
	})
}

func TestResetReachesWhatOnlyAnotherReplicaKnows(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{answer: fails(broker.RequestRejected, "invalid_scope", 0)}
		f := start(t, 2, profile(e))
		other := f.replicas[1]
		if _, _, err := other.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{"a"}}, broker.Demand{}); err == nil {
			t.Fatal("got a token")
		}
		e.set(func(e *endpoint) { e.answer = nil })
		if err := f.replicas[0].Reset(t.Context(), "invoices"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		for _, b := range f.replicas {
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{"a"}}, broker.Demand{}); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestReplicasDoNotEachWaitForAProof(t *testing.T) {
	in(t, func(t *testing.T) {
		e := &endpoint{takes: 2 * time.Second}
		f := start(t, 5, profile(e))
		began := time.Now()
		var wg sync.WaitGroup
		for i, b := range f.replicas {
			wg.Go(func() {
				if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: subsets[i]}, broker.Demand{}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if took := time.Since(began); took > 2*e.takes+time.Second {
			t.Errorf("five families took %v, want the proof and then all others at once: %v", took, 2*e.takes)
		}
		wantCalls(t, e, 5)
	})
}

func TestWorkingCredentialOfAnotherReplicaDoesNotFreeARefusedOne(t *testing.T) {
	in(t, func(t *testing.T) {
		bad := &endpoint{answer: fails(broker.UserRejected, "invalid_grant", 0)}
		old := profile(bad, password)
		f := start(t, 2, old)
		f.replicas[0].Configure([]*broker.Profile{profile(&endpoint{}, password, func(p *broker.Profile) { p.Credential = "secret-2" })})
		if _, _, err := f.replicas[1].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err == nil {
			t.Fatal("got a token")
		}
		f.ask(t, broker.Demand{})
		// A process with the old password that remembers nothing.
		fresh := broker.New(f.store, broker.Options{})
		defer fresh.Close()
		fresh.Configure([]*broker.Profile{old})
		for _, s := range subsets {
			if _, _, err := fresh.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: s}, broker.Demand{}); err == nil {
				t.Error("got a token")
			}
		}
		wantCalls(t, bad, 1)
	})
}
