package console

import (
	"context"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// actionTimeout is how long an action may take: less than the server gives an
// answer.
const actionTimeout = 25 * time.Second

// profile serves what is about one of the operator's profiles. One that does
// not exist looks like one that is not the operator's.
func (c *console) profile(next func(http.ResponseWriter, *http.Request, *operator, *broker.Status)) func(http.ResponseWriter, *http.Request, *operator) {
	return func(w http.ResponseWriter, r *http.Request, o *operator) {
		name := r.PathValue("name")
		ctx, cancel := context.WithTimeout(r.Context(), actionTimeout)
		defer cancel()
		d := c.decision(o, name)
		if !d.Allowed {
			c.record(r, o, name, false, d.By(), callerDenied)
			c.fail(w, r, o, noProfile())
			return
		}
		s, err := c.Broker.Status(ctx, name)
		if err != nil {
			c.record(r, o, name, false, d.By(), outcomeOf(err))
			c.fail(w, r, o, noProfile())
			return
		}
		if r.Method == http.MethodPost && !c.reserve(w, r, o, name) {
			return
		}
		next(w, r.WithContext(ctx), o, s)
	}
}

// audit tells the log and the audit log who did what and how it ended.
func (c *console) audit(r *http.Request, o *operator, action, profile string, err error) {
	d := c.decision(o, profile)
	c.record(r, o, profile, d.Allowed, d.By(), outcomeOf(err))
	c.tell(r, o, action, profile, err)
}

// tell tells the log.
func (c *console) tell(r *http.Request, o *operator, action, profile string, err error) {
	name := "nobody" // the callback is for anyone
	if o != nil {
		name = o.Name
	}
	if err != nil {
		c.Logger.Warn("console", "action", action, "operator", name, "profile", profile, "outcome", "failed", "error", err, "request_id", requestID(r))
		return
	}
	c.Logger.Info("console", "action", action, "operator", name, "profile", profile, "outcome", "ok", "request_id", requestID(r))
}

// finish answers an action.
func (c *console) finish(w http.ResponseWriter, r *http.Request, o *operator, action, profile, outcome string, err error) {
	c.audit(r, o, action, profile, err)
	if err != nil {
		p := c.problemOf(err, "Not done: "+action)
		p.Profile = profile
		c.fail(w, r, o, p)
		return
	}
	http.Redirect(w, r, "/profiles/"+profile+"?done="+outcome, http.StatusSeeOther)
}

func (c *console) refresh(w http.ResponseWriter, r *http.Request, o *operator, s *broker.Status) {
	_, _, err := c.Broker.Issue(r.Context(), broker.Ask{Profile: s.Name}, broker.Demand{Not: s.TokenID})
	c.finish(w, r, o, "refresh", s.Name, "refreshed", err)
}

func (c *console) reset(w http.ResponseWriter, r *http.Request, o *operator, s *broker.Status) {
	c.finish(w, r, o, "reset", s.Name, "reset", c.Broker.Reset(r.Context(), s.Name))
}

// departure is the page between the console and the authorization server. It
// has a link because a form's policy would forbid a redirect to another host,
// and because people should see where they are sent.
type departure struct {
	Profile, URL, Host string
	Expires, Now       time.Time
	// Unbound is the host that the browser comes back to when that is not this
	// one: then anyone with the link can complete the sign-in.
	Unbound string
}

// At makes moments of the times in a departure.
func (d departure) At(t time.Time) moment { return moment{d.Now, t} }

func (c *console) authorize(w http.ResponseWriter, r *http.Request, o *operator, s *broker.Status) {
	if s.GrantType != broker.AuthorizationCode {
		c.record(r, o, s.Name, true, c.decision(o, s.Name).By(), string(broker.ReasonInvalidRequest))
		c.fail(w, r, o, &problem{
			Status: http.StatusConflict, Title: "Nobody signs in for this profile", Profile: s.Name,
			Text: "Its grant is " + string(s.GrantType) + ". Only profiles of the grant authorization_code have a sign-in.",
		})
		return
	}
	browser, unbound := newBrowser(), ""
	if back := returnHost(s); !strings.EqualFold(back, hostname(r.Host)) {
		browser, unbound = broker.Secret{}, back // our cookie will not be there
	}
	in, err := c.Broker.StartAuthorization(r.Context(), s.Name, browser)
	if err != nil {
		c.finish(w, r, o, "authorize", s.Name, "", err)
		return
	}
	c.audit(r, o, "authorize", s.Name, nil)
	if !browser.IsEmpty() {
		c.setCookie(w, r, signInCookie(in.State), browser.Reveal(), time.Until(in.Expires))
	}
	d := departure{Profile: s.Name, URL: in.URL, Expires: in.Expires, Now: time.Now(), Unbound: unbound}
	if u, err := url.Parse(in.URL); err == nil {
		d.Host = u.Host
	}
	c.render(w, o, http.StatusOK, "departure", page{Title: "Sign in for " + s.Name, Body: d})
}

// returnHost is the host of the profile's redirect URL.
func returnHost(s *broker.Status) string {
	a, ok := s.Issuer.(broker.Authorizer)
	if !ok {
		return ""
	}
	u, err := url.Parse(a.RedirectURL())
	if err != nil {
		return ""
	}
	return u.Hostname()
}

func hostname(host string) string { return (&url.URL{Host: host}).Hostname() }

func (c *console) confirm(w http.ResponseWriter, r *http.Request, o *operator) {
	c.decide(w, r, o, "replace account", "replaced", c.Broker.ConfirmAuthorization)
}

func (c *console) abandon(w http.ResponseWriter, r *http.Request, o *operator) {
	c.decide(w, r, o, "keep account", "kept", c.Broker.AbandonAuthorization)
}

// decide ends a sign-in of another account than the one that the profile works
// with.
func (c *console) decide(w http.ResponseWriter, r *http.Request, o *operator, action, outcome string, end func(context.Context, string, func(string) bool) (*broker.Completion, error)) {
	ctx, cancel := context.WithTimeout(r.Context(), actionTimeout)
	defer cancel()
	if !c.reserve(w, r, o, "") {
		return
	}
	if err := r.ParseForm(); err != nil {
		c.record(r, o, "", false, "", string(broker.ReasonInvalidRequest))
		c.fail(w, r, o, &problem{Status: http.StatusBadRequest, Title: "Not done: " + action, Text: "The form could not be read."})
		return
	}
	in, err := end(ctx, r.PostForm.Get("ticket"), func(profile string) bool { return c.may(o, profile) })
	if err == nil && in.Ticket != "" { // it works with a third account by now
		c.ask(ctx, w, r, o, in)
		return
	}
	profile := ""
	if err == nil {
		profile = in.Profile
	}
	c.finish(w, r, o, action, profile, outcome, err)
}
