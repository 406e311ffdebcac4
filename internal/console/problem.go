package console

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// problem is a page that says what went wrong, and what to do.
type problem struct {
	Status       int
	Title        string
	Text, Advice string
	Code         string // the authorization server's error code
	Description  string // and its text
	Profile      string // to go on with
	Login        bool   // asks for the bearer token
	Return       string // after the login
	WrongToken   bool
	NotEncrypted bool
	Certificates bool // a client certificate would do as well
	RequestID    string
}

func loginNeeded(certificates bool) *problem {
	return &problem{
		Status: http.StatusUnauthorized, Title: "Log in", Login: true, Return: "/", Certificates: certificates,
		Text: "The console is for operators. The bearer token is what admin.bearer_token in the config refers to.",
	}
}

func wrongToken() *problem {
	p := loginNeeded(false)
	p.Text, p.WrongToken = "This is not the bearer token. It is what admin.bearer_token in the config refers to.", true
	return p
}

func certificateNeeded() *problem {
	return &problem{
		Status: http.StatusForbidden, Title: "A client certificate is needed",
		Text:   "The console is for operators, who are known by their certificates; your browser has shown none.",
		Advice: "Import a certificate that one of the authorities in admin.tls.client_ca has signed, and open the page in a new window.",
	}
}

func nobodysCertificate() *problem {
	return &problem{
		Status: http.StatusForbidden, Title: "The certificate names nobody",
		Text:   "An operator's certificate has exactly one URI name, such as a SPIFFE ID, or without one exactly one DNS name. The common name proves nothing.",
		Advice: "Have a certificate issued that does, and open the page in a new window.",
	}
}

func endedCertificate() *problem {
	return &problem{
		Status: http.StatusForbidden, Title: "The certificate has ended",
		Text:   "It was good when the browser connected.",
		Advice: "Import its successor, and open the page in a new window.",
	}
}

func strangeCertificate() *problem {
	return &problem{
		Status: http.StatusForbidden, Title: "The certificate is not believed any more",
		Text:   "Its authority is no longer among those that vouch for operators (admin.tls.client_ca).",
		Advice: "Import one of another authority, and open the page in a new window.",
	}
}

func revokedCertificate() *problem {
	return &problem{
		Status: http.StatusForbidden, Title: "The certificate has been revoked",
		Text:   "Its authority has put it, or the authority that issued it, on a list of certificates that are not to be believed.",
		Advice: "Import another, and open the page in a new window.",
	}
}

const turnOn = "Set admin.bearer_token, or admin.tls with client_ca, in the broker's config. Until then open the console on the broker's own machine, through an SSH tunnel or kubectl port-forward, at a loopback address."

func notFromHere() *problem {
	return &problem{
		Status: http.StatusForbidden, Title: "The console is off here",
		Text:   "Without a bearer token or client certificates the console is for this machine only: a direct connection from loopback, to localhost, 127.0.0.1 or [::1], not passed on by a proxy. Yours is not.",
		Advice: turnOn,
	}
}

func behindProxy() *problem {
	return &problem{
		Status: http.StatusForbidden, Title: "The console is off here",
		Text:   "admin.url says that a proxy passes requests on to this address, and no way is configured to tell operators from others.",
		Advice: "Set admin.bearer_token, or admin.tls with client_ca, in the broker's config. Or remove admin.url, if nothing but /oauth/callback is passed on, to have the console for the broker's own machine.",
	}
}

func consoleOff() *problem {
	return &problem{
		Status: http.StatusForbidden, Title: "The console is off here",
		Text:   "This address can be reached from other machines, and no way is configured to tell operators from others.",
		Advice: turnOn,
	}
}

func noProfile() *problem {
	return &problem{
		Status: http.StatusNotFound, Title: "No such profile",
		Text:   "There is no profile of this name, or it is not yours to administer.",
		Advice: "The policy says who may administer which profiles, with the operation admin.",
	}
}

// problemOf turns a failure of the broker into a page. Unknown failures are
// told to the log only.
func (c *console) problemOf(err error, title string) *problem {
	p := &problem{Status: http.StatusInternalServerError, Title: title, Text: "Something is wrong with the broker itself.", Advice: "Its log has more."}
	var e *broker.Error
	switch {
	case errors.As(err, &e):
		p.Status, p.Text, p.Code, p.Advice = statusOf(e.Reason), sentence(e.Text), plain(e.Code, 100), ""
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		p.Status, p.Text = http.StatusGatewayTimeout, "There was no answer in time."
		p.Advice = "What was begun may still succeed: look at the profile in a minute."
	default:
		c.Logger.Error("console", "title", title, "error", err)
	}
	return p
}

func statusOf(r broker.Reason) int {
	switch r {
	case broker.ReasonInvalidRequest:
		return http.StatusBadRequest
	case broker.ReasonProfileUnknown:
		return http.StatusNotFound
	case broker.ReasonEndpointUnavailable, broker.ReasonStoreUnavailable:
		return http.StatusServiceUnavailable
	case broker.ReasonEndpointThrottled, broker.ReasonRefreshTooSoon, broker.ReasonCallerThrottled:
		return http.StatusTooManyRequests
	}
	return http.StatusConflict
}

// sentence makes one of an error's text.
func sentence(text string) string {
	text = strings.TrimSuffix(plain(text, 2000), ".")
	if text == "" {
		return ""
	}
	first, n := utf8.DecodeRuneInString(text)
	return string(unicode.ToUpper(first)) + text[n:] + "."
}

// plain cuts foreign text to size, and takes out what is not seen or changes
// the direction of what follows. Templates escape the rest.
func plain(s string, most int) string {
	n := 0
	return strings.Map(func(r rune) rune {
		switch n++; {
		case n > most:
			return -1
		case r == unicode.ReplacementChar || !unicode.IsPrint(r):
			return ' '
		}
		return r
	}, s)
}
