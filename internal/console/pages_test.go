package console_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/console"
)

// TestStatesInWords looks at what an operator reads about each state.
func TestStatesInWords(t *testing.T) {
	const day = 24 * time.Hour
	failed := func(s *broker.Status, state broker.State, reason broker.Reason, next time.Duration) {
		s.State, s.LastError = state, &broker.LastError{Reason: reason, Code: "some_code", Text: "requesting a token: no luck", Time: time.Now().Add(-3 * time.Minute), Attempts: 4}
		if next > 0 {
			s.LastError.NextAttempt = time.Now().Add(next)
		}
	}
	for name, c := range map[string]struct {
		change    func(*broker.Status)
		attention bool
		want      []string
		never     []string
	}{
		"ready": {func(*broker.Status) {}, false, []string{">OK<", "0123456789abcdef", "2000-01-01 00:40:00 UTC", "(in 40 min)", "ends with the token"}, []string{"Last error", "What to do"}},
		"idle": {func(s *broker.Status) { s.State, s.TokenID = broker.Idle, "" }, false,
			[]string{">Idle<", "no token at present"}, []string{"Renews"}},
		"backing off": {func(s *broker.Status) { failed(s, broker.BackingOff, broker.ReasonEndpointUnavailable, 90*time.Second) }, true,
			[]string{">Backing off until 00:01:30 UTC<", "Requesting a token: no luck.", "some_code", "4 in a row", "(3 min ago)", "(in 90 s)", "Mend what the error names"}, nil},
		"throttled": {func(s *broker.Status) { failed(s, broker.BackingOff, broker.ReasonEndpointThrottled, time.Minute) }, true,
			[]string{"asked for quiet"}, []string{"Mend"}},
		"rejected": {func(s *broker.Status) { failed(s, broker.CredentialsRejected, broker.ReasonCredentialsRejected, 0) }, true,
			[]string{">Credentials rejected<", "CREDENTIALS_REJECTED", "never by itself", "Correct what the error names"}, nil},
		"sign-in": {func(s *broker.Status) { failed(s, broker.AuthorizationRequired, broker.ReasonAuthorizationNeeded, 0) }, true,
			[]string{">Needs sign-in<", "Press Authorize"}, nil},
		"consent": {func(s *broker.Status) {
			s.Account, s.ConsentStart, s.ConsentEnd = broker.Account{Name: "alice"}, time.Now().Add(-7*day), time.Now().Add(23*day+time.Hour)
		}, false, []string{">OK<", "alice", "23 days left", "2000-01-24 01:00:00 UTC", "(7 days ago)"}, []string{"What to do"}},
		"consent ends soon": {func(s *broker.Status) { s.ConsentStart, s.ConsentEnd = time.Now().Add(-23*day), time.Now().Add(7*day) }, true,
			[]string{">OK, consent ends soon<", "7 days left", "Press Authorize before"}, nil},
		"consent ends today": {func(s *broker.Status) { s.ConsentStart, s.ConsentEnd = time.Now(), time.Now().Add(time.Hour) }, true,
			[]string{"less than a day left"}, nil},
		"consent without end": {func(s *broker.Status) { s.ConsentStart = time.Now() }, false, []string{"end not known", "does not name"}, nil},
		"no person": {func(s *broker.Status) { s.GrantType = broker.ClientCredentials }, false,
			[]string{"client credentials", "Refresh now", "Reset"}, []string{"Authorize", "Consent"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := codeProfile("review")
				c.change(s)
				r := newRig(t, newFake(s), func(o *console.Options) {
					o.LastCall = func(string) (string, time.Time) { return "spiffe://prod/worker", time.Now().Add(-time.Minute) }
				})
				_, body := r.do(request(http.MethodGet, "/profiles/review"))
				for _, want := range append(c.want, "spiffe://prod/worker", "(60 s ago)", "broker reset review") {
					if !strings.Contains(body, want) {
						t.Errorf("the page lacks %q: %s", want, body)
					}
				}
				for _, never := range c.never {
					if strings.Contains(body, never) {
						t.Errorf("the page has %q", never)
					}
				}
				_, list := r.do(request(http.MethodGet, "/"))
				if !strings.Contains(list, `data-state="review"`) || !strings.Contains(list, "1 profile.") {
					t.Errorf("the list: %s", list)
				}
				if _, list := r.do(request(http.MethodGet, "/?show=attention")); strings.Contains(list, `data-state="review"`) != c.attention {
					t.Errorf("needs attention: %v", !c.attention)
				}
			})
		})
	}
}

func TestActions(t *testing.T) {
	code, machine := codeProfile("review"), codeProfile("invoices")
	machine.GrantType = broker.ClientCredentials
	r := newRig(t, newFake(code, machine), nil)
	for path, want := range map[string]struct{ asked, to string }{
		"/profiles/review/refresh":   {"issue review not 0123456789abcdef", "/profiles/review?done=refreshed"},
		"/profiles/invoices/reset":   {"reset invoices", "/profiles/invoices?done=reset"},
		"/profiles/invoices/refresh": {"issue invoices not 0123456789abcdef", "/profiles/invoices?done=refreshed"},
	} {
		a, _ := r.do(post(path, nil))
		if did := r.broker.took(); !slices.Equal(did, []string{want.asked}) || a.StatusCode != http.StatusSeeOther || a.Header.Get("Location") != want.to {
			t.Errorf("%s: %v, %d %v", path, did, a.StatusCode, a.Header)
		}
	}
	if a, body := r.do(post("/profiles/invoices/authorize", nil)); a.StatusCode != http.StatusConflict || !strings.Contains(body, "client_credentials") || len(r.broker.took()) > 0 {
		t.Errorf("authorizing a client: %d %s", a.StatusCode, body)
	}
	if a, _ := r.do(post("/profiles/none/reset", nil)); a.StatusCode != http.StatusNotFound {
		t.Errorf("no such profile: %d", a.StatusCode)
	}
	if _, body := r.do(request(http.MethodGet, "/profiles/review?done=refreshed")); !strings.Contains(body, "There is a new token.") {
		t.Error("the page does not say what was done")
	}
	r.broker.err = &broker.Error{Reason: broker.ReasonRefreshTooSoon, Text: "obtained a moment ago"}
	if a, body := r.do(post("/profiles/review/refresh", nil)); a.StatusCode != http.StatusTooManyRequests || !strings.Contains(body, "Obtained a moment ago.") || !strings.Contains(body, `href="/profiles/review"`) {
		t.Errorf("refused: %d %s", a.StatusCode, body)
	}
	for _, want := range []string{"action=refresh operator=local profile=review outcome=ok", "action=reset operator=local profile=invoices outcome=ok", "action=refresh operator=local profile=review outcome=failed"} {
		if !strings.Contains(r.log.String(), want) {
			t.Errorf("the log lacks %q: %s", want, r.log)
		}
	}
}

// TestManyProfiles goes through more than fit on a page.
func TestManyProfiles(t *testing.T) {
	f := newFake()
	for i := range 900 {
		s := codeProfile(fmt.Sprintf("p%03d", i))
		f.profiles[s.Name] = s
	}
	r := newRig(t, f, nil)
	path, seen := "/", 0
	for pages := 0; path != ""; pages++ {
		_, body := r.do(request(http.MethodGet, path))
		n := strings.Count(body, "data-state=")
		if n == 0 || n > 200 || pages > 5 {
			t.Fatalf("%s: %d profiles on page %d", path, n, pages)
		}
		seen += n
		_, next, _ := strings.Cut(body, `<nav aria-label="Pages">`)
		path = ""
		if i := strings.Index(next, `">Next`); i >= 0 {
			path = strings.ReplaceAll(next[strings.LastIndex(next[:i], `"`)+1:i], "&amp;", "&")
		}
	}
	if seen != 900 {
		t.Errorf("saw %d profiles", seen)
	}
	if _, body := r.do(request(http.MethodGet, "/?q=P89")); strings.Count(body, "data-state=") != 10 || !strings.Contains(body, "10 profiles.") {
		t.Error("the search finds something else")
	}
	if _, body := r.do(request(http.MethodGet, "/?q=none")); !strings.Contains(body, "Show all") {
		t.Error("the search finds something where there is nothing")
	}
	_, last := r.do(request(http.MethodGet, "/?from=p850"))
	if !strings.Contains(last, "Profiles 851 to 900 of 900") || !strings.Contains(last, "from=p650") || strings.Contains(last, ">Next<") {
		t.Error("the last page")
	}
}

func TestAssets(t *testing.T) {
	r := newRig(t, newFake(), withToken) // anyone gets them
	for path, kind := range map[string]string{"/style.css": "text/css; charset=utf-8", "/console.js": "text/javascript; charset=utf-8"} {
		if a, body := r.do(request(http.MethodGet, path)); a.StatusCode != http.StatusOK || a.Header.Get("Content-Type") != kind || body == "" {
			t.Errorf("%s: %d %v", path, a.StatusCode, a.Header)
		}
	}
}
