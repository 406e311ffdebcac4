package console

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// newBrowser is what a sign-in is bound to: only a browser that has it can
// complete the sign-in.
func newBrowser() broker.Secret { return broker.NewSecret(rand.Text()) }

// signInCookie names the cookie that binds one sign-in, so that several can be
// under way in one browser.
func signInCookie(state string) string { return "signin-" + broker.NewSecret(state).ID() }

// browserOf returns what the browser was given when the sign-in began.
func (c *console) browserOf(r *http.Request, state string) broker.Secret {
	cookie, err := r.Cookie(c.cookieName(r, signInCookie(state)))
	if err != nil {
		return broker.Secret{}
	}
	return broker.NewSecret(cookie.Value)
}

// answer is what an authorization server sends the browser back with (RFC 6749
// sections 4.1.2 and 4.1.2.1, RFC 9207).
type answer struct {
	state, code, iss   string
	error, description string
}

// readAnswer refuses what no honest server sends. Unknown parameters are
// ignored.
func readAnswer(r *http.Request) (answer, error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return answer{}, errors.New("the address cannot be read")
	}
	var a answer
	for name, p := range map[string]struct {
		to   *string
		most int
	}{
		"state": {&a.state, 1024}, "code": {&a.code, 4096}, "iss": {&a.iss, 2048}, "error": {&a.error, 256}, "error_description": {&a.description, 4096},
	} {
		values := query[name]
		switch {
		case len(values) > 1:
			return a, fmt.Errorf("the parameter %s is there %d times", name, len(values))
		case len(values) == 1 && len(values[0]) > p.most:
			return a, fmt.Errorf("the parameter %s is longer than %d characters", name, p.most)
		case len(values) == 1:
			*p.to = values[0]
		}
	}
	switch {
	case a.state == "":
		return a, errors.New("the parameter state is missing")
	case a.code == "" && a.error == "":
		return a, errors.New("there is neither a code nor an error")
	case a.code != "" && a.error != "":
		return a, errors.New("there are both a code and an error")
	}
	return a, nil
}

const startAgain = "Start the sign-in again, on the console or with 'broker authorize'. An address that was used, or is older than ten minutes, leads nowhere."

// callback is where browsers come back to.
func (c *console) callback(w http.ResponseWriter, r *http.Request) {
	// The address holds a code; it must not travel.
	w.Header().Set("Referrer-Policy", "no-referrer")
	if r.Method != http.MethodGet {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	if isPrefetch(r) { // it would spend the code before anyone has come back
		http.Error(w, "not before somebody is looking", http.StatusTooEarly)
		return
	}
	o, _ := c.identify(r)
	a, err := readAnswer(r)
	if err != nil {
		c.signedIn(r, o, "", &broker.Error{Reason: broker.ReasonInvalidRequest, Text: err.Error()})
		c.fail(w, r, nil, &problem{Status: http.StatusBadRequest, Title: "This is no answer to a sign-in", Text: sentence(err.Error()), Advice: startAgain})
		return
	}
	if !c.reserve(w, r, o, "") {
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), actionTimeout)
	defer cancel()
	back := broker.Callback{State: a.state, Code: broker.NewSecret(a.code), Issuer: a.iss, Path: r.URL.Path, Browser: c.browserOf(r, a.state)}
	if !back.Browser.IsEmpty() {
		c.setCookie(w, r, signInCookie(a.state), "", -time.Second)
	}
	if a.error != "" {
		c.refused(ctx, w, r, o, back, a)
		return
	}
	in, err := c.Broker.CompleteAuthorization(ctx, back)
	switch {
	case err != nil:
		c.signedIn(r, o, "", err)
		p := c.problemOf(err, "The sign-in is not complete")
		p.Advice = startAgain
		c.fail(w, r, nil, p)
	case in.Ticket != "":
		c.ask(ctx, w, r, o, in)
	case c.may(o, in.Profile):
		c.signedIn(r, o, in.Profile, nil)
		http.Redirect(w, r, "/profiles/"+in.Profile+"?done=signed-in", http.StatusSeeOther)
	default:
		c.signedIn(r, o, in.Profile, nil)
		http.Redirect(w, r, "/oauth/done", http.StatusSeeOther) // an address without the code
	}
}

// isPrefetch reports whether the browser asks before anyone wants the page.
func isPrefetch(r *http.Request) bool {
	for _, name := range []string{"Sec-Purpose", "Purpose", "X-Moz"} {
		if strings.Contains(strings.ToLower(r.Header.Get(name)), "prefetch") {
			return true
		}
	}
	return false
}

// signedIn tells the log and the audit log how a sign-in ended. It is the state
// that lets it through, whoever brings it.
func (c *console) signedIn(r *http.Request, o *operator, profile string, err error) {
	rule := ""
	if profile != "" {
		rule = byState
	}
	c.record(r, o, profile, profile != "", rule, outcomeOf(err))
	c.tell(r, o, "sign-in", profile, err)
}

// refused ends a sign-in that the authorization server has refused.
func (c *console) refused(ctx context.Context, w http.ResponseWriter, r *http.Request, o *operator, back broker.Callback, a answer) {
	profile, err := c.Broker.RefuseAuthorization(ctx, back)
	if err != nil { // whose text is this? Not that of a server that we asked
		c.signedIn(r, o, "", err)
		p := c.problemOf(err, "The sign-in is not complete")
		p.Advice = startAgain
		c.fail(w, r, nil, p)
		return
	}
	p := &problem{
		Status: http.StatusBadRequest, Title: "The sign-in was refused", Advice: startAgain,
		Text: "The authorization server sent an error instead of a code. Nothing has changed.",
		Code: plain(a.error, 100), Description: plain(a.description, 500),
	}
	if a.error == "access_denied" {
		p.Text = "Whoever signed in cancelled, or may not consent. Nothing has changed."
	}
	c.signedIn(r, o, profile, &broker.Error{Reason: broker.ReasonAuthorizationNeeded, Text: "refused: " + p.Code})
	if c.may(o, profile) {
		p.Profile = profile
	}
	c.fail(w, r, nil, p)
}

// question is the page that asks whether a working grant is to be replaced.
type question struct {
	Profile, Ticket   string
	Account, Previous string
}

// ask has an operator decide. Whoever is none cannot: the working grant stays.
func (c *console) ask(ctx context.Context, w http.ResponseWriter, r *http.Request, o *operator, in *broker.Completion) {
	if c.may(o, in.Profile) {
		c.audit(r, o, "sign-in of another account", in.Profile, nil)
		w.Header().Set("Referrer-Policy", "strict-origin") // the form's origin, but never the address
		c.render(w, o, http.StatusOK, "question", page{Title: "Replace the account?", Body: question{
			Profile: in.Profile, Ticket: in.Ticket, Account: accountName(in.Account), Previous: accountName(in.Previous),
		}})
		return
	}
	_, err := c.Broker.AbandonAuthorization(ctx, in.Ticket, nil)
	c.record(r, o, in.Profile, true, byState, anotherAccount)
	c.tell(r, o, "keep account", in.Profile, err)
	c.fail(w, r, nil, &problem{
		Status: http.StatusConflict, Title: "Another account is in use",
		Text:   "You have signed in as " + accountName(in.Account) + ". Profile " + in.Profile + " works with another account, which stays; yours was given up.",
		Advice: "Only an operator of the console can replace a working account: log in there first, then start the sign-in from the profile's page. Or sign in again as the account that is in use.",
	})
}

func (c *console) done(w http.ResponseWriter, _ *http.Request) {
	c.render(w, nil, http.StatusOK, "done", page{Title: "The sign-in is complete"})
}
