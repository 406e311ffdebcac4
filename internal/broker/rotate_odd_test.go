package broker_test

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

// What a server may answer, and what a store may do, that no rotation expects.

// TestSecretsOfOddLivesAreKept has a server give its secrets lives that it does not
// document: they must neither be lost nor be renewed on and on.
func TestSecretsOfOddLivesAreKept(t *testing.T) {
	for name, ends := range map[string]time.Time{
		"without end":    time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC), // as .NET says it
		"ended at birth": time.Date(1999, 1, 1, 0, 0, 0, 0, time.UTC),
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				v := newVault(5 * day)
				v.says = ends
				f := start(t, 2, rotating(v, nil))
				time.Sleep(day)
				if _, _, created := v.counts(); created == 0 || created > 3 {
					t.Errorf("%d secrets were created in a day", created)
				}
				v.set(func() { v.secrets[0].end = time.Now() })
				for _, b := range f.replicas {
					if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{"a"}}, broker.Demand{}); err != nil {
						t.Error(err)
					}
				}
			})
		})
	}
}

// TestFileIsRotatedBesideAnOldRecord has a profile's secret in a file where it
// was in the store before.
func TestFileIsRotatedBesideAnOldRecord(t *testing.T) {
	in(t, func(t *testing.T) {
		v := newVault(5 * day)
		w := &files{written: make(map[string]string)}
		b := broker.New(store.NewMemory(), broker.Options{SecretFiles: w})
		defer b.Close()
		b.Configure([]*broker.Profile{rotating(v, nil)})
		for range 2 {
			if _, err := b.RotateClientSecret(t.Context(), "invoices", "", time.Now().Add(2*day)); err != nil {
				t.Fatal(err)
			}
		}
		p := rotating(v, nil)
		inFile(p)
		b.Configure([]*broker.Profile{p})
		time.Sleep(3 * day) // the second choice has ended
		if _, err := b.RotateClientSecret(t.Context(), "invoices", "", time.Time{}); err != nil || w.written["/secret"] != "made-3" {
			t.Errorf("got %v, and the file has %q", err, w.written)
		}
	})
}

// TestSecretInUseIsNotReportedAsUnknown loses the answer to the save of a
// candidate for so long that another replica has put it into use meanwhile:
// nobody must be told to remove it.
func TestSecretInUseIsNotReportedAsUnknown(t *testing.T) {
	in(t, func(t *testing.T) {
		v := newVault(5 * day)
		shared := store.NewMemory()
		record, _ := broker.SecretFamilies(rotating(v, nil))
		log := &buffer{}
		other := broker.New(shared, broker.Options{Logger: slog.New(slog.NewTextHandler(log, nil))})
		defer other.Close()
		other.Configure([]*broker.Profile{rotating(v, nil)})
		saves := 0
		s := &deafStore{Store: shared}
		s.saved = func(l broker.Lease) error {
			if l.Family == record {
				saves++
			}
			if l.Family != record || saves != 2 { // the first is the intent, the second the candidate
				return nil
			}
			s.deaf.Store(true) // so that the lease ends
			if _, err := other.RotateClientSecret(t.Context(), "invoices", "", time.Time{}); err != nil {
				t.Error(err)
			}
			s.deaf.Store(false)
			return errDead
		}
		b := broker.New(s, broker.Options{Logger: slog.New(slog.NewTextHandler(log, nil))})
		defer b.Close()
		b.Configure([]*broker.Profile{rotating(v, nil)})
		_, err := b.RotateClientSecret(t.Context(), "invoices", "", time.Time{})
		if text := log.String(); strings.Contains(text, "nobody knows") || strings.Contains(text, "panic") {
			t.Errorf("rotating: %v; the log has\n%s", err, text)
		}
		if _, _, created := v.counts(); created != 1 {
			t.Errorf("%d secrets were created", created)
		}
	})
}

// deafStore is told of saves that were made. An error keeps it from hearing so.
type deafStore struct {
	broker.Store
	saved func(broker.Lease) error
	deaf  atomic.Bool
}

func (s *deafStore) Renew(ctx context.Context, l broker.Lease) (bool, error) {
	if s.deaf.Load() {
		return false, errDead
	}
	return s.Store.Renew(ctx, l)
}

func (s *deafStore) Save(ctx context.Context, l broker.Lease, r broker.Result) (broker.StoredToken, broker.SaveVerdict, error) {
	t, v, err := s.Store.Save(ctx, l, r)
	if deaf := s.saved(l); deaf != nil {
		return broker.StoredToken{}, 0, deaf
	}
	return t, v, err
}

// TestSameDescriptionTwiceHidesNoSecret has a caller describe the next secret
// like the one of which nobody has heard.
func TestSameDescriptionTwiceHidesNoSecret(t *testing.T) {
	in(t, func(t *testing.T) {
		v := newVault(5 * day)
		m := &mortal{}
		shared, log := store.NewMemory(), &buffer{}
		record, lease := broker.SecretFamilies(rotating(v, nil))
		spec := broker.ClientSecretSpec{ClientID: "c", Description: "for invoices"}
		create := func(s broker.Store, point func(string) error) error {
			b := broker.New(s, broker.Options{Logger: slog.New(slog.NewTextHandler(log, nil))})
			defer b.Close()
			b.Configure([]*broker.Profile{rotating(v, point)})
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			_, _, err := b.CreateClientSecret(ctx, "invoices", spec, "invoices")
			return err
		}
		dies := func(what string) error {
			if what == "after creating" {
				m.mu.Lock()
				m.dead = true
				m.mu.Unlock()
			}
			return m.at("issue")
		}
		if create(&mortalStore{shared, m, record, lease}, dies) == nil {
			t.Fatal("the replica did not die")
		}
		if err := create(shared, nil); err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(log.String(), "a client secret may exist that nobody knows"); n < 1 {
			t.Error("of the first secret nobody was told")
		}
	})
}

// TestNobodyIsQuickerThanTheSecretsOfTheStore has a caller ask while another
// reader of the record is about to have its secrets presented.
func TestNobodyIsQuickerThanTheSecretsOfTheStore(t *testing.T) {
	in(t, func(t *testing.T) {
		v := newVault(5 * day)
		f := start(t, 1, rotating(v, nil))
		if _, err := f.replicas[0].RotateClientSecret(t.Context(), "invoices", "", time.Time{}); err != nil {
			t.Fatal(err)
		}
		v.set(func() { v.secrets[0].end = time.Now() })
		time.Sleep(5 * time.Minute) // the token has ended
		p := rotating(v, nil)
		with := p.Rotation.With
		p.Rotation.With = func(s []broker.Secret) (*broker.Profile, error) {
			time.Sleep(time.Second)
			return with(s)
		}
		record, _ := broker.SecretFamilies(p)
		takes := 100 * time.Millisecond // to read the record; who reads it next is slower
		fresh := broker.New(&seam{Store: f.store, look: func(family string) error {
			if family == record {
				wait := takes
				takes = 500 * time.Millisecond
				time.Sleep(wait)
			}
			return nil
		}}, broker.Options{})
		defer fresh.Close()
		fresh.Configure([]*broker.Profile{p})
		synctest.Wait()
		if _, _, err := fresh.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
			t.Error(err)
		}
		if _, refused, _ := v.counts(); refused > 0 {
			t.Errorf("the client was refused %d times", refused)
		}
	})
}

// TestSecretOfADayIsNotRefused rotates with the shortest life that can be
// configured: what is asked for must be a day when it arrives.
func TestSecretOfADayIsNotRefused(t *testing.T) {
	in(t, func(t *testing.T) {
		v := newVault(5 * day)
		p := rotating(v, nil)
		p.Rotation.Lifetime = day
		f := start(t, 1, p)
		if _, err := f.replicas[0].RotateClientSecret(t.Context(), "invoices", "", time.Time{}); err != nil {
			t.Fatal(err)
		}
		if life := v.secrets[1].end.Sub(v.created[0]); life < day || life > day+time.Minute {
			t.Errorf("a secret was asked for that lives %v", life)
		}
	})
}

// TestSecretOfACallerWhoLeftIsToldOf has whom a secret is for leave while it is
// created: nobody has it.
func TestSecretOfACallerWhoLeftIsToldOf(t *testing.T) {
	in(t, func(t *testing.T) {
		v := newVault(5 * day)
		f := start(t, 1, rotating(v, nil))
		ctx, cancel := context.WithTimeout(t.Context(), v.takes/2)
		defer cancel()
		s, _, err := f.replicas[0].CreateClientSecret(ctx, "invoices", broker.ClientSecretSpec{ClientID: "other", Description: "for others"}, "")
		if _, _, created := v.counts(); created != 1 || !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v, %v after %d creations", s, err, created)
		}
		if text := f.log.String(); !strings.Contains(text, "a client secret may exist that nobody knows") || !strings.Contains(text, `client_id=other description="for others"`) {
			t.Errorf("of the secret nobody is told:\n%s", text)
		}
	})
}
