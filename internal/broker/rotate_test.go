package broker_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

// vault is an authorization server with one client and its secrets, in virtual
// time. It is the other side: tests believe its counts.
type vault struct {
	mu      sync.Mutex
	secrets []vaultSecret
	// tokens that were issued, and refusals of the client.
	tokens, refused int
	// creating counts the creations under way, and overlapped tells that there
	// were ever two.
	creating   int
	overlapped bool
	created    []time.Time
	// takes is how long a creation takes; slow is how long after it a secret
	// is not known yet.
	takes, slow time.Duration
	// answers is how long a token request takes.
	answers time.Duration
	// lives is what secrets live whose end is not asked for.
	lives time.Duration
	// says is when it tells that secrets end, if not when they do.
	says time.Time
	// refuses what is asked of the administration, and loses its answers.
	refuses *broker.IssueError
	loses   bool
}

type vaultSecret struct {
	value, description string
	start, end         time.Time
}

func newVault(ends time.Duration) *vault {
	now := time.Now()
	return &vault{secrets: []vaultSecret{{"configured", "by hand", now, now.Add(ends)}}, lives: 180 * day, takes: time.Second}
}

// accepts reports whether the server takes a secret now. v.mu is held.
func (v *vault) accepts(value string) bool {
	now := time.Now()
	return slices.ContainsFunc(v.secrets, func(s vaultSecret) bool {
		return s.value == value && !now.Before(s.start) && now.Before(s.end)
	})
}

func (v *vault) counts() (tokens, refused, created int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.tokens, v.refused, len(v.created)
}

func (v *vault) set(change func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	change()
}

// presenter is a profile's issuer: it presents secrets in their order, the next
// one on invalid_client only. Point is told of what it is about to do, and has
// done: an error keeps it from that, or from hearing the answer.
type presenter struct {
	*vault
	secrets []broker.Secret
	point   func(string) error
}

var errInvalidClient = &broker.IssueError{Kind: broker.ClientRejected, Code: "invalid_client", Outcome: broker.Answered, Text: "invalid_client"}

func (p *presenter) at(what string) error {
	if p.point == nil {
		return nil
	}
	return p.point(what)
}

func (p *presenter) Issue(ctx context.Context, _ broker.Request) (*broker.Grant, error) {
	if err := p.at("issue"); err != nil {
		return nil, err
	}
	time.Sleep(p.answers)
	for _, s := range p.secrets {
		if p.present(s) == nil {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.tokens++
			return grant(p.tokens, time.Minute), nil
		}
	}
	return nil, errInvalidClient
}

func (p *presenter) present(s broker.Secret) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.accepts(s.Reveal()) {
		return nil
	}
	p.refused++
	return errInvalidClient
}

func (p *presenter) Prove(_ context.Context, s broker.Secret) error {
	if err := p.at("before proving"); err != nil {
		return err
	}
	err := p.present(s)
	if dead := p.at("after proving"); dead != nil {
		return dead
	}
	return err
}

func (p *presenter) CreateClient(context.Context, broker.Secret, broker.ClientSpec) error {
	return errors.ErrUnsupported
}
func (p *presenter) Tenant() string   { return "t" }
func (p *presenter) ClientID() string { return "c" }

func (p *presenter) CreateClientSecret(_ context.Context, token broker.Secret, spec broker.ClientSecretSpec) (*broker.ClientSecret, error) {
	if err := p.at("before creating"); err != nil {
		return nil, err
	}
	v := p.vault
	v.mu.Lock()
	v.creating++
	v.overlapped = v.overlapped || v.creating > 1
	v.mu.Unlock()
	time.Sleep(v.takes)
	s, err := v.create(spec)
	if dead := p.at("after creating"); dead != nil {
		return nil, dead
	}
	return s, err
}

func (v *vault) create(spec broker.ClientSecretSpec) (*broker.ClientSecret, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.creating--
	if v.refuses != nil {
		return nil, v.refuses
	}
	now := time.Now()
	if spec.End.IsZero() {
		spec.End = now.Add(v.lives)
	}
	v.created = append(v.created, now)
	made := vaultSecret{fmt.Sprintf("made-%d", len(v.created)), spec.Description, now.Add(v.slow), spec.End}
	v.secrets = append(v.secrets, made)
	if v.loses {
		return nil, &broker.IssueError{Kind: broker.Ambiguous, Outcome: broker.OutcomeUnknown, Text: "the answer was lost"}
	}
	told := made.end
	if !v.says.IsZero() {
		told = v.says
	}
	return &broker.ClientSecret{Value: broker.NewSecret(made.value), Start: now, End: told}, nil
}

// rotating is a profile whose secret is renewed 30 days before its end.
func rotating(v *vault, point func(string) error) *broker.Profile {
	with := func(newer []broker.Secret) *broker.Profile {
		secrets := append(slices.Clone(newer), broker.NewSecret("configured"))
		return profile(nil, func(p *broker.Profile) {
			p.Issuer = &presenter{v, secrets, point}
			p.Credential = broker.Fingerprint([]byte("key"), secrets...)
		})
	}
	p := with(nil)
	p.Rotation = &broker.SecretRotation{
		Before: 30 * day,
		With:   func(s []broker.Secret) (*broker.Profile, error) { return with(s), nil },
	}
	return p
}

// mortal is a replica that dies at some point of what it does: from then on
// nothing of it reaches the store or the server.
type mortal struct {
	mu     sync.Mutex
	points []string
	dies   int // at which point; 0 is never
	dead   bool
}

var errDead = &broker.IssueError{Kind: broker.Unavailable, Outcome: broker.Unsent, Text: "the replica is dead"}

func (m *mortal) at(what string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return errDead
	}
	if what == "issue" { // not of the rotation
		return nil
	}
	m.points = append(m.points, what)
	m.dead = len(m.points) == m.dies
	if m.dead {
		return errDead
	}
	return nil
}

func (m *mortal) isDead() bool { return m.at("issue") != nil }

// mortalStore counts the transitions of a rotation as points.
type mortalStore struct {
	broker.Store
	*mortal
	record, lease string
}

func (s *mortalStore) around(family, what string, transition func()) error {
	name := map[string]string{s.record: "the record", s.lease: "the lease"}[family]
	if name == "" {
		if s.isDead() {
			return errDead
		}
		transition()
		return nil
	}
	if err := s.at("before " + what + " " + name); err != nil {
		return err
	}
	transition()
	return s.at("after " + what + " " + name)
}

func (s *mortalStore) Acquire(ctx context.Context, c broker.Claim) (a broker.Acquisition, err error) {
	dead := s.around(c.Family, "acquiring", func() { a, err = s.Store.Acquire(ctx, c) })
	return a, errors.Join(dead, err)
}

func (s *mortalStore) Save(ctx context.Context, l broker.Lease, r broker.Result) (t broker.StoredToken, v broker.SaveVerdict, err error) {
	dead := s.around(l.Family, "saving", func() { t, v, err = s.Store.Save(ctx, l, r) })
	return t, v, errors.Join(dead, err)
}

func (s *mortalStore) Fail(ctx context.Context, l broker.Lease, f broker.Failure) (d broker.Failure, err error) {
	dead := s.around(l.Family, "giving back", func() { d, err = s.Store.Fail(ctx, l, f) })
	return d, errors.Join(dead, err)
}

func (s *mortalStore) Look(ctx context.Context, family, slot string) (r broker.Record, err error) {
	if s.isDead() {
		return r, errDead
	}
	return s.Store.Look(ctx, family, slot)
}

func (s *mortalStore) Renew(ctx context.Context, l broker.Lease) (bool, error) {
	if s.isDead() {
		return false, errDead
	}
	return s.Store.Renew(ctx, l)
}

// crash has one of three replicas rotate under load and die at a point, and
// returns what points there are. The others must see it through.
func crash(t *testing.T, dies int) []string {
	v := newVault(5 * day)
	m := &mortal{dies: dies}
	shared := store.NewMemory()
	log := &buffer{}
	record, lease := broker.SecretFamilies(rotating(v, nil))
	var replicas []*broker.Broker
	for i := range 3 {
		s, point := broker.Store(shared), (func(string) error)(nil)
		if i == 0 {
			s, point = &mortalStore{shared, m, record, lease}, m.at
		}
		b := broker.New(s, broker.Options{Logger: slog.New(slog.NewTextHandler(log, nil))})
		defer b.Close()
		b.Configure([]*broker.Profile{rotating(v, point)})
		replicas = append(replicas, b)
	}
	ctx, stop := context.WithCancel(t.Context())
	var load sync.WaitGroup
	defer load.Wait()
	defer stop()
	for i, b := range replicas {
		load.Go(func() {
			for ; ctx.Err() == nil; time.Sleep(time.Second) {
				_, _, err := b.Issue(ctx, broker.Ask{Profile: "invoices"}, broker.Demand{})
				if err != nil && ctx.Err() == nil && !(i == 0 && m.isDead()) {
					t.Errorf("replica %d: %v", i, err)
				}
			}
		})
	}
	time.Sleep(10 * time.Second)
	call, cancel := context.WithTimeout(ctx, 30*time.Second)
	rotated, err := replicas[0].RotateClientSecret(call, "invoices", "", time.Time{})
	cancel()
	if dies == 0 && (err != nil || rotated.Delivery != broker.ToStore) {
		t.Fatalf("rotating: %+v, %v", rotated, err)
	}
	points := slices.Clone(m.points)
	if dies > 0 && !m.isDead() {
		t.Fatal("the replica did not die")
	}
	time.Sleep(30 * time.Minute)
	tokens, refused, created := v.counts()
	if refused > 0 {
		t.Errorf("the client was refused %d times", refused)
	}
	if created < 1 || created > 2 || v.overlapped {
		t.Errorf("%d secrets were created, at once: %v", created, v.overlapped)
	}
	if created == 2 && v.created[1].Sub(v.created[0]) < time.Minute {
		t.Errorf("the second secret was created %v after the first", v.created[1].Sub(v.created[0]))
	}
	if orphans := strings.Count(log.String(), "a client secret may exist that nobody knows"); orphans < created-1 {
		t.Errorf("%d secrets were created, and of %d it was told that nobody knows them", created, orphans)
	}
	// The new secret is in use: that of the configuration is of no use any more.
	v.set(func() { v.secrets[0].end = time.Now() })
	time.Sleep(5 * time.Minute)
	if after, refused, _ := v.counts(); refused > 0 || after <= tokens {
		t.Errorf("without the old secret there were %d refusals and %d tokens", refused, after-tokens)
	}
	if text := log.String(); strings.Contains(text, "made-") || strings.Contains(text, "configured\"") {
		t.Error("a secret is in the log")
	}
	return points
}

// TestRotationSurvivesACrashAtEachPoint is the table: every transition of the
// store and every request that a rotation makes, before and after it.
func TestRotationSurvivesACrashAtEachPoint(t *testing.T) {
	var points []string
	synctest.Test(t, func(t *testing.T) { points = crash(t, 0) })
	for _, step := range []string{"after saving the record", "before creating", "after creating", "after proving"} {
		if !slices.Contains(points, step) {
			t.Fatalf("the points %q lack %q", points, step)
		}
	}
	for i, point := range points {
		t.Run(fmt.Sprintf("%02d %s", i+1, point), func(t *testing.T) {
			in(t, func(t *testing.T) { crash(t, i+1) })
		})
	}
}

func TestSecretIsRenewedBeforeItsEnd(t *testing.T) {
	in(t, func(t *testing.T) {
		v := newVault(20 * day)
		f := start(t, 3, rotating(v, nil))
		for range 2 * 365 {
			for i, b := range f.replicas {
				if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
					t.Fatalf("after %v replica %d: %v", time.Since(v.secrets[0].start), i, err)
				}
			}
			time.Sleep(day)
		}
		// One soon after the start, because nobody knows when that of the
		// configuration ends, and then every 150 days.
		_, refused, created := v.counts()
		if created != 5 || v.created[0].Sub(v.secrets[0].start) > 15*time.Minute {
			t.Errorf("%d secrets were created, at %v", created, v.created)
		}
		for i := 1; i < len(v.created); i++ {
			if gap := v.created[i].Sub(v.created[i-1]); gap < 150*day || gap > 150*day+time.Hour {
				t.Errorf("secret %d was created %v after the one before", i+1, gap)
			}
		}
		if refused > 0 {
			t.Errorf("the client was refused %d times", refused)
		}
	})
}

// TestRecordOfSecretsIsSealedAnew sees to it that no key of the store is needed
// for long after it was replaced: a secret is renewed but twice a year.
func TestRecordOfSecretsIsSealedAnew(t *testing.T) {
	in(t, func(t *testing.T) {
		v := newVault(5 * day)
		f := start(t, 3, rotating(v, nil))
		time.Sleep(time.Hour)
		family, _ := broker.SecretFamilies(rotating(v, nil))
		seen := make(map[string]bool)
		for range 3 {
			r, err := f.store.Look(t.Context(), family, "")
			if err != nil {
				t.Fatal(err)
			}
			seen[r.Token.Access.ID()] = true
			time.Sleep(day + time.Hour)
		}
		if _, _, created := v.counts(); len(seen) != 3 || created != 1 {
			t.Errorf("in three days the record was written %d times, and %d secrets created", len(seen), created)
		}
	})
}

// TestRestartAfterTheConfiguredSecretEnded starts replicas that know but a dead
// secret, beside a store that has the living one.
func TestRestartAfterTheConfiguredSecretEnded(t *testing.T) {
	in(t, func(t *testing.T) {
		v := newVault(day)
		f := start(t, 1, rotating(v, nil))
		time.Sleep(2 * day)
		f.stop()
		var wg sync.WaitGroup
		for range 3 {
			b := broker.New(f.store, broker.Options{})
			defer b.Close()
			b.Configure([]*broker.Profile{rotating(v, nil)})
			for _, s := range subsets {
				wg.Go(func() {
					if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: s}, broker.Demand{}); err != nil {
						t.Error(err)
					}
				})
			}
		}
		wg.Wait()
		if _, refused, created := v.counts(); refused > 0 || created != 1 {
			t.Errorf("%d refusals, %d secrets created", refused, created)
		}
	})
}

// visitor is a presenter that exchanges codes and revokes tokens, too.
type visitor struct{ *presenter }

func (visitor) AuthorizationURL(context.Context, broker.AuthorizationRequest) (string, error) {
	return "https://id.example.com/authorize", nil
}
func (visitor) CheckIssuer(context.Context, string) error { return nil }
func (visitor) RedirectURL() string                       { return "https://broker.example.com/oauth/callback" }

func (v visitor) Exchange(ctx context.Context, _ broker.CodeExchange) (*broker.Grant, error) {
	return v.Issue(ctx, broker.Request{})
}

func (v visitor) Revoke(ctx context.Context, _ broker.Secret, _ broker.TokenKind) error {
	_, err := v.Issue(ctx, broker.Request{})
	return err
}

// A sign-in and a revocation know the living secret as well, though they come
// before any token request.
func TestSignInAfterTheConfiguredSecretEnded(t *testing.T) {
	in(t, func(t *testing.T) {
		v := newVault(day)
		f := start(t, 1, rotating(v, nil))
		time.Sleep(2 * day)
		f.stop()
		visited := func(p *broker.Profile) *broker.Profile {
			p.GrantType, p.RefreshTokens = broker.AuthorizationCode, true
			p.Issuer = visitor{p.Issuer.(*presenter)}
			return p
		}
		p := visited(rotating(v, nil))
		with := p.Rotation.With
		p.Rotation.With = func(secrets []broker.Secret) (*broker.Profile, error) {
			p, err := with(secrets)
			return visited(p), err
		}
		for range 2 { // each knows nothing yet
			b := broker.New(f.store, broker.Options{})
			defer b.Close()
			b.Configure([]*broker.Profile{p})
			s, err := b.StartAuthorization(t.Context(), "invoices", broker.Secret{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := b.CompleteAuthorization(t.Context(), broker.Callback{State: s.State, Code: broker.NewSecret("code")}); err != nil {
				t.Error(err)
			}
		}
		b := broker.New(f.store, broker.Options{})
		defer b.Close()
		b.Configure([]*broker.Profile{p})
		if r, err := b.Revoke(t.Context(), broker.Ask{Profile: "invoices"}, ""); err != nil || !r.Confirmed {
			t.Errorf("revoked %+v, %v", r, err)
		}
		if _, refused, _ := v.counts(); refused > 0 {
			t.Errorf("%d refusals", refused)
		}
	})
}

func TestWithoutTheStoreTheConfiguredSecretIsUsed(t *testing.T) {
	in(t, func(t *testing.T) {
		v := newVault(5 * day)
		down := errors.New("the store is down")
		s := &seam{
			Store: store.NewMemory(), look: func(string) error { return down },
			acquire: func(broker.Claim) error { return down },
		}
		b := broker.New(s, broker.Options{})
		defer b.Close()
		b.Configure([]*broker.Profile{rotating(v, nil)})
		if _, source, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil || source != broker.Uncoordinated {
			t.Errorf("got a token from %v, %v", source, err)
		}
		time.Sleep(time.Hour)
		if _, _, created := v.counts(); created > 0 {
			t.Error("a secret was created that could not be saved")
		}
	})
}

func TestReloadKeepsTheSecretsOfTheStore(t *testing.T) {
	in(t, func(t *testing.T) {
		v := newVault(day)
		f := start(t, 2, rotating(v, nil))
		time.Sleep(2 * day)
		for range 3 {
			for _, b := range f.replicas {
				b.Configure([]*broker.Profile{rotating(v, nil)})
				if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
					t.Error(err)
				}
			}
			time.Sleep(time.Hour)
		}
		if _, refused, created := v.counts(); refused > 0 || created != 1 {
			t.Errorf("%d refusals, %d secrets created", refused, created)
		}
	})
}

func TestOldSecretIsSecondChoiceUntilItsEnd(t *testing.T) {
	in(t, func(t *testing.T) {
		v := newVault(5 * day)
		f := start(t, 2, rotating(v, nil))
		for range 2 {
			if _, err := f.replicas[0].RotateClientSecret(t.Context(), "invoices", "", time.Now().Add(90*day)); err != nil {
				t.Fatal(err)
			}
		}
		v.set(func() { v.secrets[2].end = time.Now() }) // the newest is taken back
		synctest.Wait()
		if _, _, err := f.replicas[1].Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{"a"}}, broker.Demand{}); err != nil {
			t.Errorf("the second choice was not tried: %v", err)
		}
		if _, refused, _ := v.counts(); refused != 1 {
			t.Errorf("the client was refused %d times, want the newest secret once", refused)
		}
	})
}

// TestRotatedSecretNeedsNoTrial has all replicas ask for much with the new
// secret at once: it is proven for all of them.
func TestRotatedSecretNeedsNoTrial(t *testing.T) {
	in(t, func(t *testing.T) {
		v := newVault(5 * day)
		f := start(t, 3, rotating(v, nil))
		if _, err := f.replicas[0].RotateClientSecret(t.Context(), "invoices", "", time.Time{}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		v.answers = 2 * time.Second
		began := time.Now()
		var wg sync.WaitGroup
		for i, s := range subsets {
			wg.Go(func() {
				if _, _, err := f.replicas[i%3].Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: s}, broker.Demand{}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if took := time.Since(began); took > v.answers+time.Second {
			t.Errorf("%d families took %v, want all at once: %v", len(subsets), took, v.answers)
		}
	})
}

func TestRotationsAtOnceMakeOneSecret(t *testing.T) {
	in(t, func(t *testing.T) {
		v := newVault(5 * day)
		f := start(t, 3, rotating(v, nil))
		var wg sync.WaitGroup
		for _, b := range f.replicas {
			wg.Go(func() {
				if _, err := b.RotateClientSecret(t.Context(), "invoices", "", time.Time{}); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if _, _, created := v.counts(); created != 1 || v.overlapped {
			t.Errorf("%d secrets were created", created)
		}
	})
}

// TestFailedRotationsBackOff counts what a server that refuses, or loses its
// answers, is asked in an hour.
func TestFailedRotationsBackOff(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*vault)
		most   int // requests in three hours, by three replicas
	}{
		"refused": {func(v *vault) {
			v.refuses = &broker.IssueError{Kind: broker.ClientRejected, Outcome: broker.Answered, Text: "no administrator"}
		}, 0},
		"answers lost":                 {func(v *vault) { v.loses = true }, 9},
		"secrets that are never valid": {func(v *vault) { v.slow = 1000 * day }, 9},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				v := newVault(5 * day)
				tc.change(v)
				f := start(t, 3, rotating(v, nil))
				time.Sleep(3 * time.Hour)
				_, _, created := v.counts()
				if created > tc.most || tc.most > 0 && created < 5 {
					t.Errorf("%d secrets were created in three hours, want between 5 and %d", created, tc.most)
				}
				for i := 1; i < created; i++ {
					if gap, want := v.created[i].Sub(v.created[i-1]), min(time.Minute<<(i-1), time.Hour); gap < want {
						t.Errorf("secret %d was created %v after the one before, want %v", i+1, gap, want)
					}
				}
				if _, _, err := f.replicas[2].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
					t.Errorf("the old secret is not used any more: %v", err)
				}
				orphans := strings.Count(f.log.String(), "a client secret may exist that nobody knows")
				if orphans < created {
					t.Errorf("%d of %d useless secrets were told of", orphans, created)
				}
			})
		})
	}
}

func TestNewSecretMayTakeAMomentToWork(t *testing.T) {
	in(t, func(t *testing.T) {
		v := newVault(5 * day)
		v.slow = 10 * time.Second
		f := start(t, 1, rotating(v, nil))
		if _, err := f.replicas[0].RotateClientSecret(t.Context(), "invoices", "", time.Time{}); err != nil {
			t.Error(err)
		}
		if _, _, created := v.counts(); created != 1 {
			t.Errorf("%d secrets were created", created)
		}
	})
}

// files are secret files in memory.
type files struct {
	broken  error
	written map[string]string
}

func (f *files) Check(string) error { return f.broken }
func (f *files) Write(path string, s broker.Secret) error {
	f.written[path] = s.Reveal()
	return nil
}

func TestSecretGoesWhereTheProfileReadsIt(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*broker.Profile)
		files  *files
		spec   broker.ClientSecretSpec
		reason broker.Reason // empty: it works
		field  string
		want   broker.Delivery
	}{
		"store":          {want: broker.ToStore},
		"file":           {change: inFile, want: broker.ToFile},
		"nowhere":        {change: func(p *broker.Profile) { p.Rotation = nil }, reason: broker.ReasonInvalidRequest},
		"file is a link": {change: inFile, files: &files{broken: errors.New("it is a link")}, reason: broker.ReasonStoreUnavailable},
		"other client":   {spec: broker.ClientSecretSpec{ClientID: "other"}, reason: broker.ReasonInvalidRequest, field: "client_id"},
		"other tenant":   {spec: broker.ClientSecretSpec{TenantID: "other"}, reason: broker.ReasonInvalidRequest, field: "client_id"},
		"later":          {spec: broker.ClientSecretSpec{Start: time.Now().AddDate(100, 0, 0)}, reason: broker.ReasonInvalidRequest, field: "start_time"},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				v := newVault(5 * day)
				p := rotating(v, nil)
				if tc.change != nil {
					tc.change(p)
				}
				if tc.files == nil {
					tc.files = &files{written: make(map[string]string)}
				}
				b := broker.New(store.NewMemory(), broker.Options{SecretFiles: tc.files})
				defer b.Close()
				b.Configure([]*broker.Profile{p})
				if tc.spec.ClientID == "" {
					tc.spec.ClientID = "c"
				}
				s, delivery, err := b.CreateClientSecret(t.Context(), "invoices", tc.spec, "invoices")
				_, _, created := v.counts()
				if tc.reason != "" {
					var e *broker.Error
					if !errors.As(err, &e) || e.Reason != tc.reason || e.Field != tc.field || created != 0 {
						t.Errorf("got %v after %d creations, want %s of %q before any", err, created, tc.reason, tc.field)
					}
					return
				}
				if err != nil || delivery != tc.want || !s.Value.IsEmpty() || created != 1 {
					t.Fatalf("got %+v by %v, %v, after %d creations", s, delivery, err, created)
				}
				if tc.want == broker.ToFile && tc.files.written["/secret"] != "made-1" {
					t.Errorf("the file has %q", tc.files.written)
				}
			})
		})
	}
}

func inFile(p *broker.Profile) { p.Rotation, p.SecretFile = nil, "/secret" }
