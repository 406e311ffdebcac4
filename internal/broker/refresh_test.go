package broker_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// consent makes the profile one that a person signs in for.
func consent(p *broker.Profile) { p.GrantType, p.RefreshTokens = broker.AuthorizationCode, true }

// passwordThenRefresh makes it one that a password starts, and refresh tokens
// carry on.
func passwordThenRefresh(p *broker.Profile) { p.GrantType, p.RefreshTokens = broker.Password, true }

// idp is an authorization server that rotates refresh tokens, and revokes the
// grant when one is used twice. It is the other side: tests believe its counts.
type idp struct {
	mu sync.Mutex
	// takes is how long an answer takes; lives is the life of access tokens.
	takes, lives time.Duration
	// grace is for how long a used refresh token is accepted once more.
	grace time.Duration
	// tolerant servers refuse a used refresh token without revoking the grant.
	tolerant bool
	// reusable refresh tokens are not replaced.
	reusable bool
	// refuses a scope.
	refuses string
	// fault decides what becomes of the next request, when set.
	fault func(n int) fault

	issued    int
	passwords int
	current   string
	used      map[string]time.Time
	dead      bool
	presented map[string]int
	revoked   []string
}

type fault int

const (
	none    fault = iota
	lost          // acted upon, and the answer is cut
	refused       // a complete 503, not acted upon
	unsent        // never left
	paused        // acted upon; the answer reaches a process that wakes up an hour later
)

func newIDP() *idp {
	return &idp{lives: time.Hour, used: make(map[string]time.Time), presented: make(map[string]int)}
}

func (s *idp) set(change func(s *idp)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

func (s *idp) Issue(ctx context.Context, r broker.Request) (*broker.Grant, error) {
	s.mu.Lock()
	takes := s.takes
	s.mu.Unlock()
	if r.RefreshToken.IsEmpty() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.passwords++
		s.dead = false
		return s.grant(), nil
	}
	n, f := s.arrive(r.RefreshToken.Reveal())
	if f == unsent {
		return nil, &broker.IssueError{Kind: broker.Unavailable, Outcome: broker.Unsent, Text: "no connection"}
	}
	if err := r.Clear(); err != nil {
		s.set(func(s *idp) { s.presented[r.RefreshToken.Reveal()]-- })
		return nil, &broker.IssueError{Kind: broker.Unavailable, Outcome: broker.Unsent, Text: "kept back", Err: err}
	}
	time.Sleep(takes) // nothing cancels it now
	if f == refused {
		return nil, &broker.IssueError{Kind: broker.Unavailable, Outcome: broker.Answered, Text: fmt.Sprint("503 to request ", n)}
	}
	s.mu.Lock()
	no := slices.Contains(r.Scopes, s.refuses)
	s.mu.Unlock()
	if no {
		return nil, &broker.IssueError{Kind: broker.RequestRejected, Code: "invalid_scope", Outcome: broker.Answered, Text: "invalid_scope"}
	}
	g, err := s.spend(r.RefreshToken.Reveal())
	if f == paused {
		time.Sleep(time.Hour)
	}
	if f == lost {
		return nil, &broker.IssueError{Kind: broker.Ambiguous, Outcome: broker.OutcomeUnknown, Text: "the connection was cut"}
	}
	return g, err
}

func (s *idp) arrive(token string) (int, fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := none
	n := 1
	for _, times := range s.presented {
		n += times
	}
	if s.fault != nil {
		f = s.fault(n)
	}
	if f != unsent {
		s.presented[token]++
	}
	return n, f
}

func (s *idp) spend(token string) (*broker.Grant, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	used, twice := s.used[token]
	switch {
	case s.dead:
	case token == s.current && (s.reusable || !twice):
		s.used[token] = time.Now()
		return s.grant(), nil
	case twice && time.Since(used) < s.grace:
		return s.grant(), nil
	case twice:
		s.dead = !s.tolerant
	}
	return nil, &broker.IssueError{Kind: broker.GrantDead, Outcome: broker.Answered, Code: "invalid_grant", Text: "invalid_grant"}
}

func (s *idp) grant() *broker.Grant {
	s.issued++
	if s.current == "" || !s.reusable {
		s.current = fmt.Sprint("refresh-", s.issued)
	}
	return &broker.Grant{
		AccessToken: broker.NewSecret(fmt.Sprint("access-", s.issued)), TokenType: "Bearer",
		Lifetime: s.lives, RefreshToken: broker.NewSecret(s.current),
	}
}

func (s *idp) Revoke(_ context.Context, token broker.Secret, _ broker.TokenKind) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revoked = append(s.revoked, token.Reveal())
	return nil
}

func (s *idp) isDead() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dead
}

// asked are the tokens that the server was asked to revoke.
func (s *idp) asked() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.revoked)
}

// grants is how many it has issued.
func (s *idp) grants() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.issued
}

// mostPresented is how often the most presented refresh token was.
func (s *idp) mostPresented() (most int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.presented {
		most = max(most, n)
	}
	return most
}

func (s *idp) consented(change ...func(*broker.Profile)) *broker.Profile {
	p := profile(nil, append([]func(*broker.Profile){consent}, change...)...)
	p.Issuer = s
	return p
}

// signIn is a person who consents.
func (s *idp) signIn(t *testing.T, store broker.Store, p *broker.Profile) {
	t.Helper()
	s.mu.Lock()
	s.dead = false
	g := s.grant()
	s.mu.Unlock()
	family, slot := broker.FamilyOf(p)
	_, verdict, err := store.Save(t.Context(), broker.Lease{Family: family, Owner: rand()}, broker.Result{
		Slot: slot, Supersede: true, Refresh: g.RefreshToken,
		Token: broker.StoredToken{Access: g.AccessToken, Type: "Bearer", Scopes: p.Scopes, Lifetime: s.lives, Remaining: s.lives},
	})
	if err != nil || verdict != broker.Saved {
		t.Fatalf("signing in: verdict %d, %v", verdict, err)
	}
}

var owners struct {
	sync.Mutex
	n int
}

func rand() string {
	owners.Lock()
	defer owners.Unlock()
	owners.n++
	return fmt.Sprint("person-", owners.n)
}

// A scope that the server refuses holds up those who ask for it, and nobody else.
func TestRefusedScopesHoldNobodyElseUp(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		s.refuses = "a"
		p := s.consented(func(p *broker.Profile) { p.Scopes = []string{"b", "c", "a"} })
		f := start(t, 2, p)
		s.signIn(t, f.store, p)
		for i, scopes := range [][]string{{"a"}, {"a"}, {"b"}, {"c"}} {
			_, _, err := f.replicas[i%2].Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: scopes}, broker.Demand{})
			if e := (*broker.Error)(nil); scopes[0] == "a" && (!errors.As(err, &e) || e.Reason != broker.ReasonCredentialsRejected) || scopes[0] != "a" && err != nil {
				t.Errorf("%v: %v", scopes, err)
			}
		}
		asked := len(s.asked())
		for range 100 {
			if _, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: []string{"a"}}, broker.Demand{}); err == nil {
				t.Error("got a token")
			}
		}
		if now := len(s.asked()); now != asked {
			t.Errorf("the refused scope was asked for %d times more", now-asked)
		}
	})
}

func TestRefreshTokensAreSpentOnceEach(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		s.takes = 2 * time.Second
		p := s.consented()
		f := start(t, 5, p)
		f.refused(t, broker.Demand{}, broker.ReasonAuthorizationNeeded)
		s.signIn(t, f.store, p)
		for range 12 * 60 * 2 { // two days in use, on all replicas, for all scopes
			var wg sync.WaitGroup
			for i, b := range f.replicas {
				for _, scopes := range [][]string{nil, subsets[i]} {
					wg.Go(func() {
						if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: scopes}, broker.Demand{}); err != nil {
							t.Error(err)
						}
					})
				}
			}
			wg.Wait()
			time.Sleep(2 * time.Minute)
		}
		if n := s.mostPresented(); n != 1 || s.isDead() {
			t.Errorf("a refresh token was presented %d times, grant dead: %t", n, s.isDead())
		}
		if s.passwords > 0 {
			t.Error("a grant was obtained without a person")
		}
	})
}

func TestPasswordIsUsedOnceAndRefreshTokensAfterIt(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		f := start(t, 3, s.consented(passwordThenRefresh))
		for range 24 * 12 {
			for _, b := range f.replicas {
				if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(5 * time.Minute)
		}
		if s.passwords != 1 || s.mostPresented() != 1 {
			t.Errorf("password used %d times, a refresh token presented %d times", s.passwords, s.mostPresented())
		}
		// The grant dies: the password starts a new one, without a person.
		s.set(func(s *idp) { s.dead = true })
		for range 24 * 12 {
			f.ask(t, broker.Demand{})
			time.Sleep(5 * time.Minute)
		}
		if s.passwords != 2 || s.mostPresented() != 1 {
			t.Errorf("password used %d times, a refresh token presented %d times", s.passwords, s.mostPresented())
		}
	})
}

func TestDeadGrantIsPresentedOnceByTheFleet(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		p := s.consented()
		f := start(t, 5, p)
		s.signIn(t, f.store, p)
		token, _ := f.ask(t, broker.Demand{})
		s.set(func(s *idp) { s.dead = true })
		for time.Until(token.ExpireTime) > 2*time.Second {
			for _, b := range f.replicas { // served to the end
				if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(time.Second)
		}
		time.Sleep(3 * time.Second)
		for range 100 {
			for _, b := range f.replicas {
				_, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
				var be *broker.Error
				if !errors.As(err, &be) || be.Reason != broker.ReasonAuthorizationNeeded {
					t.Fatalf("got %v", err)
				}
			}
			time.Sleep(time.Hour)
		}
		if n := s.mostPresented(); n != 1 {
			t.Errorf("presented %d times", n)
		}
		s.signIn(t, f.store, p)
		synctest.Wait()
		for _, b := range f.replicas {
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
				t.Errorf("after a new consent: %v", err)
			}
		}
	})
}

func TestLostAnswerIsNotAVerdict(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		p := s.consented()
		f := start(t, 2, p)
		s.signIn(t, f.store, p)
		token, _ := f.ask(t, broker.Demand{})
		s.set(func(s *idp) { s.fault = func(int) fault { return lost } })
		var second time.Time
		for time.Until(token.ExpireTime) > time.Second {
			if _, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
				t.Fatal(err)
			}
			if s.mostPresented() == 2 && second.IsZero() {
				second = time.Now()
			}
			time.Sleep(time.Second)
		}
		if left := token.ExpireTime.Sub(second); left > 61*time.Second {
			t.Errorf("presented once more with %v of the access token left", left)
		}
		time.Sleep(10 * time.Minute)
		for range 10 {
			f.refused(t, broker.Demand{}, broker.ReasonAuthorizationNeeded)
			time.Sleep(10 * time.Minute)
		}
		if n := s.mostPresented(); n != 2 {
			t.Errorf("presented %d times, want twice", n)
		}
		// The refresh token is kept: a reset allows one more try.
		if err := f.replicas[0].Reset(t.Context(), "invoices"); err != nil {
			t.Fatal(err)
		}
		s.set(func(s *idp) { s.fault, s.dead = nil, false; clear(s.used); s.current = "refresh-1" })
		f.ask(t, broker.Demand{})
	})
}

// The lease, the intent and the horizon of a process that was paused in the
// middle of a refresh all run out.
func TestPausedPresenterIsWaitedForAndHealsTheRecord(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		s.tolerant, s.lives = true, 30*time.Minute
		p := s.consented()
		f, ways := brittleFleet(t, 3, p)
		s.signIn(t, f.store, p)
		for _, b := range f.replicas {
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
				t.Fatal(err)
			}
		}
		s.set(func(s *idp) {
			s.fault = func(n int) fault {
				if n == 1 {
					return paused
				}
				return none
			}
		})
		time.Sleep(20 * time.Minute)
		went := time.Now()
		report, _ := f.ask(t, broker.Demand{})
		go f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{Not: report.ID}) // its refresh is the one that pauses
		time.Sleep(time.Second)
		ways[0].fails(errDown)
		awake := f.replicas[1:]
		for range 8 * 60 { // served to the end, and nobody presents
			for _, b := range awake {
				if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
					t.Fatalf("after %v: %v", time.Since(went), err)
				}
			}
			if s.mostPresented() != 1 {
				t.Fatalf("presented again after %v, while the access token lived", time.Since(went))
			}
			time.Sleep(time.Second)
		}
		time.Sleep(5 * time.Minute)
		for range 3 {
			for _, b := range awake {
				_, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
				var be *broker.Error
				if !errors.As(err, &be) || be.Reason != broker.ReasonAuthorizationNeeded {
					t.Fatalf("got %v", err)
				}
			}
			time.Sleep(time.Minute)
		}
		if n := s.mostPresented(); n != 2 {
			t.Fatalf("presented %d times, want twice", n)
		}
		ways[0].fails(nil)
		time.Sleep(time.Hour) // it wakes up with the answer
		s.set(func(s *idp) { s.fault = nil })
		for _, b := range f.replicas {
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
				t.Errorf("after the late answer: %v", err)
			}
		}
	})
}

func TestLostAnswerWithAGraceIsRepeatedInIt(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		s.grace = 30 * time.Second
		p := s.consented(func(p *broker.Profile) { p.Grace = s.grace })
		f := start(t, 2, p)
		s.signIn(t, f.store, p)
		s.set(func(s *idp) {
			s.fault = func(n int) fault {
				if n == 1 {
					return lost
				}
				return none
			}
		})
		for range 4 * 3600 {
			f.ask(t, broker.Demand{})
			time.Sleep(time.Second)
		}
		if s.isDead() || s.mostPresented() != 2 {
			t.Errorf("dead %t, presented %d times", s.isDead(), s.mostPresented())
		}
	})
}

func TestAnswersThatAreNoGrantTakeThePresentationBack(t *testing.T) {
	for name, kind := range map[string]fault{"503": refused, "never sent": unsent} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				s := newIDP()
				p := s.consented()
				f := start(t, 2, p)
				s.signIn(t, f.store, p)
				f.ask(t, broker.Demand{})
				s.set(func(s *idp) { s.fault = func(int) fault { return kind } })
				time.Sleep(61 * time.Minute)
				for range 60 {
					f.refused(t, broker.Demand{}, broker.ReasonEndpointUnavailable)
					time.Sleep(time.Minute)
				}
				s.set(func(s *idp) { s.fault = nil })
				time.Sleep(2 * time.Minute)
				f.ask(t, broker.Demand{}) // an hour of it has cost no consent
				if s.isDead() {
					t.Error("the grant is dead")
				}
			})
		})
	}
}

func TestReusableRefreshTokenIsSimplyUsedAgain(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		s.reusable = true
		p := s.consented(func(p *broker.Profile) { p.Reusable = true })
		f := start(t, 2, p)
		s.signIn(t, f.store, p)
		s.set(func(s *idp) { s.fault = func(n int) fault { return fault(n % 2) } }) // every second answer is lost
		for range 24 * 60 {
			f.ask(t, broker.Demand{})
			time.Sleep(time.Minute)
		}
	})
}

func TestRefreshIsFinishedAndSavedWhenTheProcessStops(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		s.takes = 5 * time.Second
		p := s.consented()
		f := start(t, 2, p)
		s.signIn(t, f.store, p)
		time.Sleep(61 * time.Minute)
		going := f.replicas[1]
		go going.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
		time.Sleep(time.Second) // the request is on its way
		going.Close()
		if _, source := f.ask(t, broker.Demand{}); source == broker.FromEndpoint {
			t.Error("refreshed again")
		}
		if n := s.mostPresented(); n != 1 {
			t.Errorf("presented %d times", n)
		}
	})
}

func TestRefreshThatCannotBeSavedIsKeptUntilItCan(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		s.takes, s.lives = 2*time.Second, 10*time.Minute
		p := s.consented()
		f, ways := brittleFleet(t, 2, p)
		s.signIn(t, f.store, p)
		time.Sleep(11 * time.Minute)
		time.AfterFunc(time.Second, func() { all(ways, errDown) })
		f.ask(t, broker.Demand{}) // served although only this process has it
		if f.replicas[0].Unsaved() != 1 {
			t.Error("nobody is told that the grant is not saved")
		}
		for range 300 { // and on and on, while the store is away
			f.ask(t, broker.Demand{})
			time.Sleep(time.Second)
		}
		all(ways, nil)
		time.Sleep(5 * time.Second)
		if f.replicas[0].Unsaved() != 0 {
			t.Error("the grant is still not saved")
		}
		if _, source, err := f.replicas[1].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil || source != broker.FromStore {
			t.Errorf("the other replica: %v, %v", source, err)
		}
		if s.mostPresented() != 1 {
			t.Errorf("presented %d times", s.mostPresented())
		}
	})
}

func TestLeaseLostDuringARefreshCancelsNothing(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		s.takes = 8 * time.Second
		p := s.consented()
		f, ways := brittleFleet(t, 2, p)
		s.signIn(t, f.store, p)
		time.Sleep(61 * time.Minute)
		time.AfterFunc(time.Second, func() { ways[0].fails(errDown) })
		time.AfterFunc(7*time.Second, func() { ways[0].fails(nil) })
		var wg sync.WaitGroup
		for _, b := range f.replicas {
			wg.Go(func() {
				if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
					t.Error(err)
				}
			})
			time.Sleep(100 * time.Millisecond)
		}
		wg.Wait()
		if s.mostPresented() != 1 || s.isDead() {
			t.Errorf("presented %d times, dead %t", s.mostPresented(), s.isDead())
		}
	})
}

func TestNewConsentWinsOverARefreshUnderWay(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		s.takes = 4 * time.Second
		p := s.consented()
		f := start(t, 2, p)
		s.signIn(t, f.store, p)
		time.Sleep(61 * time.Minute)
		go f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
		time.Sleep(time.Second)
		s.set(func(s *idp) { s.takes = 0 })
		s.signIn(t, f.store, p)
		time.Sleep(10 * time.Second)
		for range 300 {
			f.ask(t, broker.Demand{})
			time.Sleep(time.Minute)
		}
	})
}

func TestRevokedTokenIsServedByNobody(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		p := s.consented()
		f := start(t, 3, p)
		s.signIn(t, f.store, p)
		for _, b := range f.replicas {
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
				t.Fatal(err)
			}
		}
		token, _ := f.ask(t, broker.Demand{})
		r, err := f.replicas[0].Revoke(t.Context(), broker.Ask{Profile: "invoices"}, "")
		if err != nil || !r.Confirmed || r.TokenID != token.ID {
			t.Fatalf("%+v, %v", r, err)
		}
		synctest.Wait()
		for _, b := range f.replicas {
			next, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			if err != nil || next.ID == token.ID {
				t.Errorf("%v, %v", next, err)
			}
		}
		if again, err := f.replicas[1].Revoke(t.Context(), broker.Ask{Profile: "invoices"}, token.ID); err != nil || again.Confirmed {
			t.Errorf("revoking it again: %+v, %v", again, err)
		}
		if len(s.asked()) != 1 || s.asked()[0] != token.Access.Reveal() {
			t.Errorf("the server was asked to revoke %v", s.asked())
		}
	})
}

// silent is a process that dies between the drop and the revocation.
type silent struct{ *idp }

func (silent) Revoke(context.Context, broker.Secret, broker.TokenKind) error {
	return &broker.IssueError{Kind: broker.Unavailable, Text: "this process is dead"}
}

func TestRevocationIsFinishedByAnotherReplica(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		p := s.consented()
		f := start(t, 3, p)
		s.signIn(t, f.store, p)
		for _, b := range f.replicas {
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
				t.Fatal(err)
			}
		}
		dies := s.consented()
		dies.Issuer = silent{s}
		f.replicas[0].Configure([]*broker.Profile{dies})
		r, err := f.replicas[0].Revoke(t.Context(), broker.Ask{Profile: "invoices"}, "")
		if err != nil || r.Confirmed {
			t.Fatalf("%+v, %v", r, err)
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if len(s.asked()) != 1 || broker.NewSecret(s.asked()[0]).ID() != r.TokenID {
			t.Errorf("the server was asked to revoke %v", s.asked())
		}
	})
}

func TestRevocationWithoutTheStoreSaysWhatIsLeft(t *testing.T) {
	in(t, func(t *testing.T) {
		s := newIDP()
		p := s.consented()
		f, ways := brittleFleet(t, 2, p)
		s.signIn(t, f.store, p)
		token, _ := f.ask(t, broker.Demand{})
		all(ways, errDown)
		_, err := f.replicas[0].Revoke(t.Context(), broker.Ask{Profile: "invoices"}, "")
		var be *broker.Error
		if !errors.As(err, &be) || be.Reason != broker.ReasonStoreUnavailable || be.RetryAfter <= 0 {
			t.Fatalf("got %v", err)
		}
		if next, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err == nil && next.ID == token.ID {
			t.Error("it is still handed out here")
		}
		if len(s.asked()) != 1 {
			t.Error("the server was not asked")
		}
	})
}
