package console_test

import (
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/console"
)

// begin presses Authorize and returns the answer.
func (r *rig) begin(change ...func(*http.Request)) (*http.Response, string) {
	r.t.Helper()
	r.broker.signIn = &broker.SignIn{URL: "https://id.example.com/authorize?state=S&x=%3Cy%3E", State: "S", Expires: time.Now().Add(10 * time.Minute)}
	a, body := r.do(post("/profiles/review/authorize", nil, change...))
	if a.StatusCode != http.StatusOK {
		r.t.Fatalf("authorize: %d %s", a.StatusCode, body)
	}
	r.broker.took()
	return a, body
}

func TestSignInIsBoundToItsBrowser(t *testing.T) {
	r := newRig(t, newFake(codeProfile("review")), nil)
	a, body := r.begin()
	if !strings.Contains(body, `href="https://id.example.com/authorize?state=S&amp;x=%3Cy%3E"`) || !strings.Contains(body, "Continue to id.example.com") {
		t.Errorf("no link to the server: %s", body)
	}
	if len(a.Cookies()) != 1 {
		t.Fatalf("cookies: %v", a.Cookies())
	}
	if c := a.Cookies()[0]; !c.HttpOnly || c.SameSite != http.SameSiteLaxMode || c.MaxAge < 590 || c.MaxAge > 600 || r.broker.browser.IsEmpty() || c.Value != r.broker.browser.Reveal() {
		t.Errorf("the cookie: %v", c)
	}
	first := r.broker.browser
	r.begin()
	if first.Equal(r.broker.browser) {
		t.Error("two sign-ins are bound to one value")
	}

	// Back in the same browser, the broker gets all that there is.
	r.broker.done = &broker.Completion{Profile: "review"}
	back, _ := r.do(request(http.MethodGet, "/oauth/callback/eu?state=S&code=C%2B1&iss=https%3A%2F%2Fid.example.com&session_state=ignored", cookies(a)))
	want := broker.Callback{State: "S", Issuer: "https://id.example.com", Path: "/oauth/callback/eu"}
	got := r.broker.back
	if got.Code.Reveal() != "C+1" || !got.Browser.Equal(first) {
		t.Error("the broker got another code, or another browser")
	}
	got.Code, got.Browser = broker.Secret{}, broker.Secret{}
	if got.State != want.State || got.Issuer != want.Issuer || got.Path != want.Path || got.ReplaceAccount {
		t.Errorf("the broker got %+v", got)
	}
	if back.StatusCode != http.StatusSeeOther || back.Header.Get("Location") != "/profiles/review?done=signed-in" || back.Header.Get("Referrer-Policy") != "no-referrer" {
		t.Errorf("back: %d %v", back.StatusCode, back.Header)
	}
	if len(back.Cookies()) != 1 || back.Cookies()[0].MaxAge >= 0 {
		t.Errorf("the cookie stays: %v", back.Cookies())
	}
	// In another one, there is nothing to show for it.
	r.do(request(http.MethodGet, "/oauth/callback?state=S&code=C"))
	if !r.broker.back.Browser.IsEmpty() {
		t.Error("a browser without the cookie has one")
	}
	for _, s := range []string{"C+1", first.Reveal()} {
		if strings.Contains(r.log.String(), s) {
			t.Errorf("the log has %s: %s", s, r.log)
		}
	}
}

// TestSignInThatComesBackElsewhere has a redirect URL at another host, where the
// cookie of this one would not be sent.
func TestSignInThatComesBackElsewhere(t *testing.T) {
	r := newRig(t, newFake(codeProfile("review")), nil)
	a, body := r.begin(func(r *http.Request) { r.Host = "localhost:7444" })
	if len(a.Cookies()) != 0 || !r.broker.browser.IsEmpty() || !strings.Contains(body, "comes back to 127.0.0.1") {
		t.Errorf("cookies %v, page %s", a.Cookies(), body)
	}
}

func TestCallbackOfPersonWhoIsNoOperator(t *testing.T) {
	r := newRig(t, newFake(codeProfile("review")), withToken)
	r.broker.done = &broker.Completion{Profile: "review"}
	a, _ := r.do(request(http.MethodGet, "/oauth/callback?state=S&code=C"))
	if a.StatusCode != http.StatusSeeOther || a.Header.Get("Location") != "/oauth/done" {
		t.Errorf("back: %d %v", a.StatusCode, a.Header)
	}
	if a, body := r.do(request(http.MethodGet, "/oauth/done")); a.StatusCode != http.StatusOK || !strings.Contains(body, "close this window") {
		t.Errorf("done: %d %s", a.StatusCode, body)
	}

	// Another account than the one in use is for operators to decide.
	r.broker.took()
	r.broker.done = &broker.Completion{Profile: "review", Ticket: "T", Account: broker.Account{Name: "mallory"}, Previous: broker.Account{Name: "alice"}}
	a, body := r.do(request(http.MethodGet, "/oauth/callback?state=S&code=C"))
	if a.StatusCode != http.StatusConflict || !strings.Contains(body, "mallory") || strings.Contains(body, "alice") || strings.Contains(body, `value="T"`) {
		t.Errorf("another account: %d %s", a.StatusCode, body)
	}
	if did := r.broker.took(); !slices.Equal(did, []string{"complete", "abandon T"}) {
		t.Errorf("another account: %v", did)
	}
}

func TestCallbackAsksBeforeItReplacesAnAccount(t *testing.T) {
	r := newRig(t, newFake(codeProfile("review")), nil)
	r.broker.done = &broker.Completion{
		Profile: "review", Ticket: "T<", Account: broker.Account{Name: "mallory@example.com", Subject: "2"}, Previous: broker.Account{Name: "alice@example.com", Subject: "1"},
	}
	a, body := r.do(request(http.MethodGet, "/oauth/callback?state=S&code=C"))
	if a.StatusCode != http.StatusOK || a.Header.Get("Referrer-Policy") != "strict-origin" {
		t.Errorf("the question: %d %v", a.StatusCode, a.Header)
	}
	for _, want := range []string{"mallory@example.com (2)", "alice@example.com (1)", `action="/oauth/confirm"`, `action="/oauth/abandon"`, `value="T&lt;"`} {
		if !strings.Contains(body, want) {
			t.Errorf("the question lacks %s", want)
		}
	}
	for path, want := range map[string][2]string{"/oauth/confirm": {"confirm T", "/profiles/review?done=replaced"}, "/oauth/abandon": {"abandon T", "/profiles/review?done=kept"}} {
		r.broker.took()
		a, _ := r.do(post(path, url.Values{"ticket": {"T"}}))
		if did := r.broker.took(); !slices.Equal(did, []string{want[0]}) || a.StatusCode != http.StatusSeeOther || a.Header.Get("Location") != want[1] {
			t.Errorf("%s: %v, %d %v", path, did, a.StatusCode, a.Header)
		}
	}

	// A third account that came meanwhile is asked about in its turn.
	r.broker.ended = &broker.Completion{Profile: "review", Ticket: "U", Account: broker.Account{Name: "mallory"}, Previous: broker.Account{Name: "carol"}}
	a, body = r.do(post("/oauth/confirm", url.Values{"ticket": {"T"}}))
	if a.StatusCode != http.StatusOK || a.Header.Get("Referrer-Policy") != "strict-origin" || !strings.Contains(body, "carol") || !strings.Contains(body, `value="U"`) {
		t.Errorf("the next question: %d %s", a.StatusCode, body)
	}
}

// TestCallbackRefuses has answers that no honest server sends. None of them
// reaches the broker.
func TestCallbackRefuses(t *testing.T) {
	r := newRig(t, newFake(codeProfile("review")), withToken)
	for what, query := range map[string]string{
		"nothing":          "",
		"no state":         "code=C",
		"no answer":        "state=S",
		"two states":       "state=S&state=S&code=C",
		"two codes":        "state=S&code=C&code=D",
		"two issuers":      "state=S&code=C&iss=a&iss=b",
		"two errors":       "state=S&error=a&error=b",
		"a code, an error": "state=S&code=C&error=access_denied",
		"a long state":     "code=C&state=" + strings.Repeat("S", 1025),
		"a long code":      "state=S&code=" + strings.Repeat("C", 4097),
		"a broken escape":  "state=S&code=%zz",
		"a semicolon":      "state=S;code=C",
	} {
		a, body := r.do(request(http.MethodGet, "/oauth/callback?"+query))
		if a.StatusCode != http.StatusBadRequest || !strings.Contains(body, "Start the sign-in again") || a.Header.Get("Referrer-Policy") != "no-referrer" {
			t.Errorf("%s: %d %s", what, a.StatusCode, body)
		}
	}
	for what, early := range map[string]func(*http.Request){
		"HEAD":     func(r *http.Request) { r.Method = http.MethodHead },
		"prefetch": header("Sec-Purpose", "prefetch"), "prerender": header("Sec-Purpose", "prefetch;prerender"), "Purpose": header("Purpose", "prefetch"),
		"POST": func(r *http.Request) { r.Method = http.MethodPost },
	} {
		if a, _ := r.do(request(http.MethodGet, "/oauth/callback?state=S&code=C", early)); a.StatusCode != http.StatusNoContent && a.StatusCode != http.StatusTooEarly && a.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("%s: %d", what, a.StatusCode)
		}
	}
	if did := r.broker.took(); len(did) > 0 {
		t.Errorf("the broker was asked: %v", did)
	}

	// What the broker refuses is told in its words.
	for status, err := range map[int]error{
		http.StatusBadRequest:          &broker.Error{Reason: broker.ReasonInvalidRequest, Text: "this sign-in is not known <b>"},
		http.StatusServiceUnavailable:  &broker.Error{Reason: broker.ReasonStoreUnavailable, Text: "the store is out of reach <b>"},
		http.StatusConflict:            &broker.Error{Reason: broker.ReasonAuthorizationNeeded, Code: "invalid_grant", Text: "the code is no longer good <b>"},
		http.StatusInternalServerError: errors.New("a private cause"),
	} {
		r.broker.err = err
		a, body := r.do(request(http.MethodGet, "/oauth/callback?state=S&code=C"))
		if a.StatusCode != status || strings.Contains(body, "<b>") || strings.Contains(body, "private") || status != 500 && !strings.Contains(body, "&lt;b&gt;") {
			t.Errorf("%v: %d %s", err, a.StatusCode, body)
		}
	}
}

// hostile is what a server could send to be shown.
const hostile = `<script>alert(1)</script>"'><img src=x onerror=alert(1)>` + "\u202e\x07"

func TestErrorAnswers(t *testing.T) {
	r := newRig(t, newFake(codeProfile("review")), nil)
	a, body := r.do(request(http.MethodGet, "/oauth/callback?state=S&error=access_denied&error_description="+url.QueryEscape(hostile)))
	if a.StatusCode != http.StatusBadRequest || !strings.Contains(body, "access_denied") || !strings.Contains(body, "&lt;script&gt;") || !strings.Contains(body, "cancelled") {
		t.Errorf("%d %s", a.StatusCode, body)
	}
	wantHarmless(t, body)
	if did := r.broker.took(); !slices.Equal(did, []string{"refuse"}) || r.broker.back.State != "S" {
		t.Errorf("the state is not burnt: %v", did)
	}
	// Without a sign-in that it belongs to, it is anybody's text.
	r.broker.err = &broker.Error{Reason: broker.ReasonInvalidRequest, Text: "this sign-in is not known"}
	if _, body := r.do(request(http.MethodGet, "/oauth/callback?state=X&error=e&error_description=call+0900+123")); strings.Contains(body, "0900") {
		t.Errorf("a stranger's text is shown: %s", body)
	}
}

func wantHarmless(t *testing.T, body string) {
	t.Helper()
	for _, never := range []string{"<script>", "<img", "\u202e", "\x07", `"'>`} {
		if strings.Contains(body, never) {
			t.Errorf("the page has %q: %s", never, body)
		}
	}
}

// TestHostileText puts hostile text wherever a server's text is shown.
func TestHostileText(t *testing.T) {
	p := codeProfile("review")
	p.Account = broker.Account{Name: hostile, Subject: hostile}
	p.ConsentStart, p.Text, p.Endpoint = time.Now(), hostile, "https://x/"+hostile
	p.Scopes = []string{hostile}
	p.LastError = &broker.LastError{Reason: broker.ReasonCredentialsRejected, Code: hostile, Text: hostile, Time: time.Now()}
	r := newRig(t, newFake(p), func(o *console.Options) {
		o.LastCall = func(string) (string, time.Time) { return hostile, time.Now() }
		o.Degraded = func() []string { return []string{hostile} }
	})
	r.broker.done = &broker.Completion{Profile: "review", Ticket: "T", Account: p.Account, Previous: p.Account}
	for _, path := range []string{"/", "/profiles/review", "/?q=" + url.QueryEscape(hostile), "/oauth/callback?state=S&code=C"} {
		_, body := r.do(request(http.MethodGet, path))
		wantHarmless(t, body)
	}
	r.broker.err = &broker.Error{Reason: broker.ReasonEndpointUnavailable, Code: hostile, Text: hostile}
	_, body := r.do(post("/profiles/review/refresh", nil))
	wantHarmless(t, body)
}
