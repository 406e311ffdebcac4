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

const day = 24 * time.Hour

func TestSignInIsStartedHereAndCompletedThere(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		f := start(t, 3, d.profile())
		f.refused(t, broker.Demand{}, broker.ReasonAuthorizationNeeded)
		s := f.begins(t, 0)
		if len(s.State) < 43 || time.Until(s.Expires) != 10*time.Minute || f.begins(t, 0).State == s.State {
			t.Errorf("started %+v", s)
		}
		c := d.opens(t, s, ann)
		began := time.Now()
		done, err := f.replicas[1].CompleteAuthorization(t.Context(), c)
		if err != nil || *done != (broker.Completion{Profile: "invoices", Account: ann}) {
			t.Fatalf("%+v, %v", done, err)
		}
		synctest.Wait()
		for i, b := range f.replicas {
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
				t.Errorf("replica %d: %v", i, err)
			}
			synctest.Wait()
			status, err := b.Glance("invoices")
			if err != nil || status.Account != ann || !status.ConsentStart.Equal(began) || !status.ConsentEnd.Equal(began.Add(30*day)) {
				t.Errorf("replica %d: %+v", i, status)
			}
		}
		d.wantExchanges(t, 1)
		for _, secret := range []string{s.State, c.State, "code-1", "refresh-1", "access-1", ann.Name} {
			if strings.Contains(f.log.String(), secret) {
				t.Errorf("%q is in the log", secret)
			}
		}
	})
}

func TestTokenOfASignInIsRenewedBeforeItsEnd(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		f := start(t, 1, d.profile())
		f.signsIn(t, d, ann)
		first, _ := f.ask(t, broker.Demand{})
		time.Sleep(time.Until(first.ExpireTime) - time.Minute)
		if token, source := f.ask(t, broker.Demand{}); token.ID == first.ID || source != broker.FromMemory {
			t.Errorf("a minute before its end the token is the same: %v, from %v", token.ID == first.ID, source)
		}
	})
}

func TestStateIsGoodForOneSignIn(t *testing.T) {
	browser := broker.NewSecret("browser")
	for name, c := range map[string]struct {
		change func(t *testing.T, f *fleet, d *door, c *broker.Callback)
		tells  string
	}{
		"unknown": {func(_ *testing.T, _ *fleet, _ *door, c *broker.Callback) { c.State = "invented" }, ""},
		"too old": {func(*testing.T, *fleet, *door, *broker.Callback) { time.Sleep(10 * time.Minute) }, ""},
		"of another browser": {func(_ *testing.T, _ *fleet, _ *door, c *broker.Callback) {
			c.Browser = broker.NewSecret("another")
		}, ""},
		"of no browser":        {func(_ *testing.T, _ *fleet, _ *door, c *broker.Callback) { c.Browser = broker.Secret{} }, ""},
		"at another redirect":  {func(_ *testing.T, _ *fleet, _ *door, c *broker.Callback) { c.Path = "/callback/other" }, ""},
		"of a profile unknown": {func(_ *testing.T, f *fleet, _ *door, _ *broker.Callback) { f.replicas[1].Configure(nil) }, ""},
		"of a profile hidden": {func(_ *testing.T, _ *fleet, _ *door, c *broker.Callback) {
			c.Allowed = func(string) bool { return false }
		}, ""},
		"of a profile replaced": {func(_ *testing.T, f *fleet, d *door, _ *broker.Callback) {
			f.replicas[1].Configure([]*broker.Profile{d.profile(func(p *broker.Profile) { p.Identity = "another client" })})
		}, "has changed"},
		"of other scopes": {func(_ *testing.T, f *fleet, d *door, _ *broker.Callback) {
			f.replicas[1].Configure([]*broker.Profile{d.profile(func(p *broker.Profile) { p.Scopes = []string{"a"} })})
		}, "has changed"},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				d := newDoor()
				f := start(t, 2, d.profile())
				s, err := f.replicas[0].StartAuthorization(t.Context(), "invoices", browser)
				if err != nil {
					t.Fatal(err)
				}
				right := d.opens(t, s, ann)
				right.Browser = browser
				wrong := right
				c.change(t, f, d, &wrong)
				_, err = f.replicas[1].CompleteAuthorization(t.Context(), wrong)
				e := wantReason(t, err, broker.ReasonInvalidRequest, "state")
				unknown := c.tells == "" && e.Profile == "" && !strings.Contains(e.Text, "invoices")
				if !strings.Contains(e.Text, "start again") || !unknown && !strings.Contains(e.Text, c.tells) {
					t.Errorf("it says %q", e.Text)
				}
				if wrong.State == right.State { // it is used up all the same
					_, err = f.replicas[0].CompleteAuthorization(t.Context(), right)
					wantReason(t, err, broker.ReasonInvalidRequest, "state")
				}
				d.wantExchanges(t, 0)
			})
		})
	}
}

func TestStateIsRedeemedByOneReplica(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		d.takes = 2 * time.Second
		f := start(t, 5, d.profile())
		c := d.opens(t, f.begins(t, 0), ann)
		var wg sync.WaitGroup
		completed := make(chan bool, 10)
		for _, b := range append(f.replicas, f.replicas...) {
			wg.Go(func() {
				_, err := b.CompleteAuthorization(t.Context(), c)
				if completed <- err == nil; err != nil {
					wantReason(t, err, broker.ReasonInvalidRequest, "state")
				}
			})
		}
		wg.Wait()
		n := 0
		for range 10 {
			if <-completed {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%d of them completed it", n)
		}
		d.wantExchanges(t, 1)
	})
}

func TestCallerThatLeavesLosesNothing(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		d.takes = 5 * time.Second
		f := start(t, 2, d.profile())
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := f.replicas[1].CompleteAuthorization(ctx, d.opens(t, f.begins(t, 0), ann)); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v", err)
		}
		f.replicas[1].Close() // waits for it
		f.ask(t, broker.Demand{})
		d.wantExchanges(t, 1)
	})
}

func TestExchangeThatFailsIsNotRepeated(t *testing.T) {
	for name, c := range map[string]struct {
		down   broker.IssueError
		reason broker.Reason
		// shared tells that the next one is not even sent.
		shared bool
	}{
		"refused code":   {broker.IssueError{Kind: broker.GrantDead, Code: "invalid_grant", Text: "no"}, broker.ReasonAuthorizationNeeded, false},
		"refused client": {broker.IssueError{Kind: broker.ClientRejected, Code: "invalid_client", Text: "no"}, broker.ReasonCredentialsRejected, true},
		"refused scope":  {broker.IssueError{Kind: broker.RequestRejected, Code: "invalid_scope", Text: "no"}, broker.ReasonCredentialsRejected, false},
		"throttled":      {broker.IssueError{Kind: broker.Throttled, Text: "no", RetryAfter: 10 * time.Minute}, broker.ReasonEndpointThrottled, true},
		"lost answer":    {broker.IssueError{Kind: broker.Ambiguous, Text: "no"}, broker.ReasonEndpointUnavailable, false},
		"out of reach":   {broker.IssueError{Kind: broker.Unavailable, Text: "no"}, broker.ReasonEndpointUnavailable, false},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				d := newDoor()
				f := start(t, 2, d.profile())
				f.signsIn(t, d, ann) // the client is proven
				token, _ := f.ask(t, broker.Demand{})
				one, other := d.opens(t, f.begins(t, 0), ann), d.opens(t, f.begins(t, 0), ann)
				d.set(func(*idp) { d.down = &c.down })
				for _, b := range f.replicas {
					_, err := b.CompleteAuthorization(t.Context(), one)
					if e := wantReason(t, err, map[bool]broker.Reason{true: c.reason, false: broker.ReasonInvalidRequest}[b == f.replicas[0]], map[bool]string{false: "state"}[b == f.replicas[0]]); !strings.Contains(e.Text, "again") || e.RetryAfter != 0 {
						t.Errorf("it says %q, and to wait %v", e.Text, e.RetryAfter)
					}
				}
				d.wantExchanges(t, 2)
				_, err := f.replicas[1].CompleteAuthorization(t.Context(), other)
				wantReason(t, err, c.reason, "")
				d.wantExchanges(t, map[bool]int{true: 2, false: 3}[c.shared])
				if still, _ := f.ask(t, broker.Demand{}); still.ID != token.ID {
					t.Error("the grant in use is not any more")
				}
			})
		})
	}
}

func TestSignInAnsweredByAnotherIssuer(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		f := start(t, 2, d.profile())
		c := d.opens(t, f.begins(t, 0), ann)
		good := c
		c.Issuer = "https://evil.example.com"
		_, err := f.replicas[1].CompleteAuthorization(t.Context(), c)
		wantReason(t, err, broker.ReasonInvalidRequest, "iss")
		_, err = f.replicas[1].CompleteAuthorization(t.Context(), good)
		wantReason(t, err, broker.ReasonInvalidRequest, "state")
		d.wantExchanges(t, 0)
	})
}

func TestCodeOfAnotherProfileIsRefusedByTheServer(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		other := &door{idp: d.idp, client: "letters", redirect: d.redirect, codes: d.codes}
		f := start(t, 2, d.profile(), other.profile(func(p *broker.Profile) { p.Name, p.Identity = "letters", "letters" }))
		c := d.opens(t, f.begins(t, 0), ann)
		s, err := f.replicas[0].StartAuthorization(t.Context(), "letters", broker.Secret{})
		if err != nil {
			t.Fatal(err)
		}
		swapped := other.opens(t, s, ann)
		swapped.Code = c.Code
		_, err = f.replicas[1].CompleteAuthorization(t.Context(), swapped)
		wantReason(t, err, broker.ReasonAuthorizationNeeded, "")
		if other.exchanges != 1 || d.exchanges != 0 {
			t.Errorf("%d and %d exchanges", other.exchanges, d.exchanges)
		}
	})
}

func TestSignInNeedsTheRightGrant(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		f := start(t, 1, d.profile(passwordThenRefresh))
		_, err := f.replicas[0].StartAuthorization(t.Context(), "invoices", broker.Secret{})
		wantReason(t, err, broker.ReasonInvalidRequest, "profile")
		_, err = f.replicas[0].StartAuthorization(t.Context(), "nothing", broker.Secret{})
		wantReason(t, err, broker.ReasonProfileUnknown, "")
		f.replicas[0].Configure([]*broker.Profile{d.profile()})
		d.set(func(*idp) { d.down = &broker.IssueError{Kind: broker.Unavailable, Text: "the metadata cannot be had"} })
		_, err = f.replicas[0].StartAuthorization(t.Context(), "invoices", broker.Secret{})
		wantReason(t, err, broker.ReasonEndpointUnavailable, "")
	})
}

func TestSignInWithoutTheStore(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		d.takes = 2 * time.Second
		f, ways := brittleFleet(t, 2, d.profile())
		all(ways, errDown)
		_, err := f.replicas[0].StartAuthorization(t.Context(), "invoices", broker.Secret{})
		wantReason(t, err, broker.ReasonStoreUnavailable, "")

		all(ways, nil)
		c := d.opens(t, f.begins(t, 0), ann)
		all(ways, errDown)
		_, err = f.replicas[1].CompleteAuthorization(t.Context(), c)
		wantReason(t, err, broker.ReasonStoreUnavailable, "")
		d.wantExchanges(t, 0)
		all(ways, nil)
		time.AfterFunc(time.Second, func() { all(ways, errDown) })
		_, err = f.replicas[1].CompleteAuthorization(t.Context(), c) // the store never heard of it: it is still good
		if e := wantReason(t, err, broker.ReasonStoreUnavailable, ""); e.RetryAfter != 0 {
			t.Errorf("to be repeated after %v", e.RetryAfter)
		}
		d.wantExchanges(t, 1)
		if f.replicas[1].Unsaved() != 1 {
			t.Error("nobody is told that the grant is not saved")
		}
		if _, _, err := f.replicas[1].Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err == nil {
			t.Error("a token was handed out before it was saved")
		}
		time.Sleep(time.Hour / 2)
		all(ways, nil)
		time.Sleep(2 * time.Second)
		f.ask(t, broker.Demand{})
		status, err := f.replicas[0].Status(t.Context(), "invoices")
		if left := time.Until(status.ConsentEnd); err != nil || left < 30*day-31*time.Minute || left > 30*day-30*time.Minute {
			t.Errorf("the consent ends in %v, counted from the exchange: %v", left, err)
		}
		d.wantExchanges(t, 1)
	})
}

func TestAnotherAccountIsAskedAbout(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		f := start(t, 3, d.profile())
		f.signsIn(t, d, ann)
		f.signsIn(t, d, ann) // the same one again needs no question
		token, _ := f.ask(t, broker.Demand{})
		done := f.signsIn(t, d, bob)
		if done.Ticket == "" || done.Account != bob || done.Previous != ann || done.Profile != "invoices" {
			t.Fatalf("%+v", done)
		}
		if still, _ := f.ask(t, broker.Demand{}); still.ID != token.ID {
			t.Error("the grant in use is not any more")
		}
		nobody := func(string) bool { return false }
		second := f.signsIn(t, d, bob)
		_, err := f.replicas[0].ConfirmAuthorization(t.Context(), second.Ticket, nobody)
		if e := wantReason(t, err, broker.ReasonInvalidRequest, "ticket"); e.Profile != "" {
			t.Errorf("it tells of %s", e.Profile)
		}
		time.Sleep(9 * time.Minute)
		confirmed, err := f.replicas[0].ConfirmAuthorization(t.Context(), done.Ticket, nil)
		if err != nil || *confirmed != (broker.Completion{Profile: "invoices", Account: bob, Previous: ann}) {
			t.Fatalf("%+v, %v", confirmed, err)
		}
		synctest.Wait()
		for _, b := range f.replicas {
			got, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			if err != nil || got.ID == token.ID {
				t.Errorf("%v, %v", got, err)
			} else if left := time.Until(got.ExpireTime); left > 51*time.Minute || left < 50*time.Minute {
				t.Errorf("%v are left, counted from the exchange", left)
			}
			status, _ := b.Status(t.Context(), "invoices")
			if left := time.Until(status.ConsentEnd); status.Account != bob || left != 30*day-9*time.Minute {
				t.Errorf("%+v", status)
			}
		}
		_, err = f.replicas[1].ConfirmAuthorization(t.Context(), done.Ticket, nil)
		wantReason(t, err, broker.ReasonInvalidRequest, "ticket")
	})
}

func TestAnotherAccountIsAbandoned(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		f := start(t, 2, d.profile())
		f.signsIn(t, d, ann)
		token, _ := f.ask(t, broker.Demand{})
		done := f.signsIn(t, d, bob)
		abandoned, err := f.replicas[0].AbandonAuthorization(t.Context(), done.Ticket, nil)
		if err != nil || abandoned.Account != bob || abandoned.Previous != ann {
			t.Fatalf("%+v, %v", abandoned, err)
		}
		if asked := fmt.Sprint(d.asked()); !strings.Contains(asked, "refresh-2") || !strings.Contains(asked, "access-2") || len(d.asked()) != 2 {
			t.Errorf("revoked: %s", asked)
		}
		_, err = f.replicas[0].ConfirmAuthorization(t.Context(), done.Ticket, nil)
		wantReason(t, err, broker.ReasonInvalidRequest, "ticket")
		if still, _ := f.ask(t, broker.Demand{}); still.ID != token.ID {
			t.Error("the grant in use is not any more")
		}
	})
}

func TestAnotherAccountThatNobodyDecidesAboutInTime(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		d.lives = 5 * time.Minute
		f := start(t, 2, d.profile())
		f.signsIn(t, d, ann)
		done := f.signsIn(t, d, bob)
		time.Sleep(6 * time.Minute)
		if _, err := f.replicas[0].ConfirmAuthorization(t.Context(), done.Ticket, nil); err != nil {
			t.Fatal(err) // the access token is over, the refresh token is not
		}
		f.ask(t, broker.Demand{})
		if s, _ := f.replicas[0].Status(t.Context(), "invoices"); s.Account != bob {
			t.Errorf("%+v", s)
		}
		done = f.signsIn(t, d, ann)
		time.Sleep(10 * time.Minute)
		_, err := f.replicas[0].ConfirmAuthorization(t.Context(), done.Ticket, nil)
		wantReason(t, err, broker.ReasonInvalidRequest, "ticket")
	})
}

func TestAnotherAccountWhereNothingIsLost(t *testing.T) {
	for name, lose := range map[string]func(t *testing.T, f *fleet, d *door, c *broker.Callback){
		"told to replace": func(_ *testing.T, _ *fleet, _ *door, c *broker.Callback) { c.ReplaceAccount = true },
		"dead": func(t *testing.T, f *fleet, d *door, _ *broker.Callback) {
			d.set(func(s *idp) { s.dead = true })
			time.Sleep(2 * time.Hour)
			f.refused(t, broker.Demand{}, broker.ReasonAuthorizationNeeded)
		},
		"over": func(*testing.T, *fleet, *door, *broker.Callback) { time.Sleep(30 * day) },
	} {
		t.Run(name, func(t *testing.T) {
			in(t, func(t *testing.T) {
				d := newDoor()
				f := start(t, 2, d.profile())
				f.signsIn(t, d, ann)
				var c broker.Callback
				lose(t, f, d, &c)
				replace := c.ReplaceAccount
				c = d.opens(t, f.begins(t, 0), bob)
				c.ReplaceAccount = replace
				done, err := f.replicas[1].CompleteAuthorization(t.Context(), c)
				if err != nil || done.Ticket != "" {
					t.Fatalf("%+v, %v", done, err)
				}
				f.ask(t, broker.Demand{})
				if s, _ := f.replicas[0].Status(t.Context(), "invoices"); s.Account != bob {
					t.Errorf("%+v", s)
				}
			})
		})
	}
}

func TestSignInThatTheServerRefuses(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		f := start(t, 2, d.profile())
		c := d.opens(t, f.begins(t, 0), ann)
		if name, err := f.replicas[1].RefuseAuthorization(t.Context(), c); err != nil || name != "invoices" {
			t.Fatalf("%q, %v", name, err)
		}
		_, err := f.replicas[0].RefuseAuthorization(t.Context(), c)
		wantReason(t, err, broker.ReasonInvalidRequest, "state")
		_, err = f.replicas[0].CompleteAuthorization(t.Context(), c)
		wantReason(t, err, broker.ReasonInvalidRequest, "state")
		d.wantExchanges(t, 0)
	})
}

func TestReplicaThatIsShuttingDownLeavesTheStateToOthers(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		f := start(t, 2, d.profile())
		c := d.opens(t, f.begins(t, 0), ann)
		f.replicas[0].Drain()
		_, err := f.replicas[0].CompleteAuthorization(t.Context(), c)
		wantReason(t, err, broker.ReasonEndpointUnavailable, "")
		if _, err := f.replicas[1].CompleteAuthorization(t.Context(), c); err != nil {
			t.Error(err)
		}
	})
}

func TestConsentEndsWhenItWasSaid(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		d.lives = day
		f := start(t, 2, d.profile())
		began := time.Now()
		f.signsIn(t, d, ann)
		for time.Since(began) < 30*day-time.Hour { // refreshed day by day
			f.ask(t, broker.Demand{})
			synctest.Wait()
			for _, look := range []func() (*broker.Status, error){
				func() (*broker.Status, error) { return f.replicas[1].Status(t.Context(), "invoices") },
				func() (*broker.Status, error) { return f.replicas[0].Glance("invoices") },
			} {
				s, err := look()
				if err != nil || s.State != broker.Ready || !s.ConsentEnd.Equal(began.Add(30*day)) {
					t.Fatalf("%+v, %v", s, err)
				}
				left := time.Until(s.ConsentEnd)
				if warned := strings.Contains(s.Text, "sign in again"); warned != (left <= 7*day) {
					t.Fatalf("%v before the end it says %q", left, s.Text)
				}
				if left == 6*day && (!strings.Contains(s.Text, "ends in 6 days") || !strings.Contains(s.Text, "https://broker.example.com/profiles/invoices")) {
					t.Errorf("it says %q", s.Text)
				}
			}
			time.Sleep(time.Hour)
		}
		presented := d.mostPresented()
		time.Sleep(2*time.Hour + day)
		for _, b := range f.replicas {
			_, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			e := wantReason(t, err, broker.ReasonAuthorizationNeeded, "")
			if !strings.Contains(e.Text, "ended on "+began.Add(30*day).UTC().Format(time.RFC3339)) || e.ConsoleURL == "" || !strings.Contains(e.Text, e.ConsoleURL) {
				t.Errorf("it says %q", e.Text)
			}
			if s, _ := b.Glance("invoices"); s.State != broker.AuthorizationRequired {
				t.Errorf("state %d: %s", s.State, s.Text)
			}
		}
		if presented != 1 || d.mostPresented() != 1 {
			t.Errorf("presented %d times", d.mostPresented())
		}
		f.signsIn(t, d, ann)
		f.ask(t, broker.Demand{})
	})
}

func TestPasswordFollowsAConsentThatIsOver(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		d.lives = day
		f := start(t, 2, d.profile(passwordThenRefresh))
		for range 31 {
			f.ask(t, broker.Demand{})
			time.Sleep(day)
		}
		f.ask(t, broker.Demand{})
		if d.passwords != 2 || d.mostPresented() != 1 {
			t.Errorf("password used %d times, a refresh token presented %d times", d.passwords, d.mostPresented())
		}
	})
}

func TestSignInWithoutARefreshTokenLastsOneToken(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		d.silent = true
		f := start(t, 2, d.profile())
		f.signsIn(t, d, ann)
		if !strings.Contains(f.log.String(), "offline_access") {
			t.Error("nobody is warned")
		}
		token, _ := f.ask(t, broker.Demand{})
		if s, _ := f.replicas[0].Status(t.Context(), "invoices"); s.State != broker.Ready || !strings.Contains(s.Text, "sign in again") {
			t.Errorf("state %d: %s", s.State, s.Text)
		}
		for time.Until(token.ExpireTime) > time.Second {
			f.ask(t, broker.Demand{})
			time.Sleep(time.Second)
		}
		time.Sleep(time.Second)
		f.refused(t, broker.Demand{}, broker.ReasonAuthorizationNeeded)
		if s, _ := f.replicas[0].Status(t.Context(), "invoices"); s.State != broker.AuthorizationRequired {
			t.Errorf("state %d: %s", s.State, s.Text)
		}
	})
}

func TestDeadGrantIsToldToAllAndEndsForAll(t *testing.T) {
	in(t, func(t *testing.T) {
		d := newDoor()
		f := start(t, 5, d.profile())
		f.signsIn(t, d, ann)
		f.ask(t, broker.Demand{})
		d.set(func(s *idp) { s.dead = true })
		time.Sleep(2 * time.Hour)
		for _, b := range f.replicas {
			_, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{})
			if e := wantReason(t, err, broker.ReasonAuthorizationNeeded, ""); e.Code != "invalid_grant" || !strings.Contains(e.Text, "broker authorize invoices") {
				t.Errorf("it says %q", e.Text)
			}
			if s, _ := b.Status(t.Context(), "invoices"); s.State != broker.AuthorizationRequired || s.LastError == nil {
				t.Errorf("state %d: %s", s.State, s.Text)
			}
		}
		if n := d.mostPresented(); n != 1 {
			t.Errorf("presented %d times", n)
		}
		f.signsIn(t, d, ann)
		synctest.Wait()
		for i, b := range f.replicas { // at once: no verdict lives on anywhere
			if _, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices"}, broker.Demand{}); err != nil {
				t.Errorf("replica %d: %v", i, err)
			}
			if s, _ := b.Status(t.Context(), "invoices"); s.State != broker.Ready || s.LastError != nil {
				t.Errorf("state %d: %s", s.State, s.Text)
			}
		}
	})
}

// A question is about one account: when a third has come meanwhile, it is asked
// again.
func TestAnotherAccountThatCameMeanwhileIsAskedAbout(t *testing.T) {
	carol := broker.Account{Subject: "3", Name: "carol@example.com"}
	t.Run("before the answer", func(t *testing.T) {
		in(t, func(t *testing.T) {
			d := newDoor()
			f := start(t, 2, d.profile())
			f.signsIn(t, d, ann)
			first, second := f.signsIn(t, d, bob), f.signsIn(t, d, carol)
			if _, err := f.replicas[0].ConfirmAuthorization(t.Context(), second.Ticket, nil); err != nil {
				t.Fatal(err)
			}
			again, err := f.replicas[0].ConfirmAuthorization(t.Context(), first.Ticket, nil)
			if err != nil || again.Ticket == "" || again.Account != bob || again.Previous != carol {
				t.Fatalf("%+v, %v", again, err)
			}
			if s, _ := f.replicas[1].Status(t.Context(), "invoices"); s.Account != carol {
				t.Errorf("%+v", s)
			}
			if done, err := f.replicas[1].ConfirmAuthorization(t.Context(), again.Ticket, nil); err != nil || done.Ticket != "" {
				t.Fatalf("%+v, %v", done, err)
			}
			if s, _ := f.replicas[0].Status(t.Context(), "invoices"); s.Account != bob {
				t.Errorf("%+v", s)
			}
		})
	})
	t.Run("during the exchange", func(t *testing.T) {
		in(t, func(t *testing.T) {
			d := newDoor()
			f := start(t, 2, d.profile())
			one, other := d.opens(t, f.begins(t, 0), ann), d.opens(t, f.begins(t, 0), bob)
			d.takes = 5 * time.Second
			var wg sync.WaitGroup
			wg.Go(func() {
				if done, err := f.replicas[0].CompleteAuthorization(t.Context(), one); err != nil || done.Ticket != "" {
					t.Errorf("%+v, %v", done, err)
				}
			})
			time.Sleep(time.Second)
			done, err := f.replicas[1].CompleteAuthorization(t.Context(), other)
			if err != nil || done.Ticket == "" || done.Previous != ann {
				t.Errorf("%+v, %v", done, err)
			}
			wg.Wait()
			if s, _ := f.replicas[0].Status(t.Context(), "invoices"); s.Account != ann {
				t.Errorf("%+v", s)
			}
		})
	})
}
