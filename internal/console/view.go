package console

import (
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// view is a profile in an operator's words.
type view struct {
	*broker.Status
	Now time.Time
	// Word is the state in a few words, with Icon and Class to find it by.
	Word, Icon, Class string
	// Attention: somebody has to do something, or will have to soon.
	Attention bool
	// Todo is what; empty if there is nothing.
	Todo string
	// Consent is how long it lasts; empty for grants without one.
	Consent string
	// CanAuthorize says that a person signs in for this profile.
	CanAuthorize bool
	// Host of the authorization server.
	Host       string
	LastCaller string
	LastCall   time.Time
}

func (c *console) view(s *broker.Status) view {
	v := view{Status: s, Now: time.Now(), CanAuthorize: s.GrantType == broker.AuthorizationCode, Host: s.Endpoint}
	if u, err := url.Parse(s.Endpoint); err == nil && u.Host != "" {
		v.Host = u.Host
	}
	if c.Options.LastCall != nil {
		v.LastCaller, v.LastCall = c.Options.LastCall(s.Name)
	}
	v.state()
	v.consent()
	return v
}

// state says how the profile fares and what to do about it.
func (v *view) state() {
	set := func(word, icon, class, todo string) { v.Word, v.Icon, v.Class, v.Todo = word, icon, class, todo }
	switch v.State {
	case broker.Ready:
		set("OK", "✓", "good", "")
	case broker.BackingOff:
		set("Backing off", "↻", "warn", "Mend what the error names. The next attempt comes by itself, or with the next call.")
		if next := v.LastError.NextAttempt; !next.IsZero() {
			v.Word = "Backing off until " + next.UTC().Format("15:04:05") + " UTC"
		}
		if v.LastError.Reason == broker.ReasonEndpointThrottled {
			v.Todo = "Wait: the authorization server asked for quiet, and a reset would only anger it."
		}
	case broker.CredentialsRejected:
		set("Credentials rejected", "✕", "bad", "Correct what the error names in the config: it is tried at once. If the authorization server was at fault, mend it there, then press Reset.")
	case broker.AuthorizationRequired:
		set("Needs sign-in", "✕", "bad", "Press Authorize, and have the account's owner sign in.")
	default:
		set("Idle", "○", "idle", "")
	}
	v.Attention = v.Class == "warn" || v.Class == "bad"
}

// consent says how long it lasts. That it ends soon is told beside the state,
// not instead of it.
func (v *view) consent() {
	left := v.ConsentEnd.Sub(v.Now)
	switch {
	case !v.ConsentEnd.IsZero() && left <= 0:
		v.Consent = "ended"
	case !v.ConsentEnd.IsZero():
		v.Consent = daysLeft(left)
	case !v.ConsentStart.IsZero():
		v.Consent = "end not known"
	case v.CanAuthorize && v.TokenID != "":
		v.Consent = "ends with the token"
	case v.CanAuthorize:
		v.Consent = "none"
	}
	if v.ConsentEnd.IsZero() || left > broker.ConsentWarning || v.State == broker.AuthorizationRequired {
		return
	}
	v.Attention = true
	if v.Class == "good" || v.Class == "idle" {
		v.Word, v.Icon, v.Class = v.Word+", consent ends soon", "!", "warn"
		v.Todo = "Press Authorize before the consent ends: no refresh prolongs it."
	}
}

func daysLeft(left time.Duration) string {
	switch days := int(left / (24 * time.Hour)); days {
	case 0:
		return "less than a day left"
	case 1:
		return "1 day left"
	default:
		return fmt.Sprintf("%d days left", days)
	}
}

// GrantName is the grant as people write it.
func (v view) GrantName() string { return strings.ReplaceAll(string(v.GrantType), "_", " ") }

// AccountName is what the account that signed in is called.
func (v view) AccountName() string { return accountName(v.Account) }

// StateText is what the broker says of the state, as a sentence.
func (v view) StateText() string { return sentence(v.Text) }

// ErrorText is the last error as a sentence.
func (v view) ErrorText() string { return sentence(v.LastError.Text) }

func accountName(a broker.Account) string {
	switch name, subject := plain(a.Name, 256), plain(a.Subject, 256); {
	case name != "" && subject != "" && name != subject:
		return name + " (" + subject + ")"
	case name != "":
		return name
	case subject != "":
		return subject
	}
	return "an account that the authorization server does not name"
}

// moment is a time, and when it is looked at.
type moment struct{ Now, T time.Time }

// At makes moments of the times in a view.
func (v view) At(t time.Time) moment { return moment{v.Now, t} }

func utc(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// stamp is a time as machines read it.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// distance from now, in words, in the largest unit that says enough.
func distance(now, t time.Time) string {
	d := t.Sub(now).Round(time.Second)
	if d == 0 {
		return "now"
	}
	var text string
	switch a := d.Abs(); {
	case a < 2*time.Minute:
		text = fmt.Sprintf("%d s", a/time.Second)
	case a < 2*time.Hour:
		text = fmt.Sprintf("%d min", a/time.Minute)
	case a < 48*time.Hour:
		text = fmt.Sprintf("%d h", a/time.Hour)
	default:
		text = fmt.Sprintf("%d days", a/(24*time.Hour))
	}
	if d < 0 {
		return text + " ago"
	}
	return "in " + text
}
