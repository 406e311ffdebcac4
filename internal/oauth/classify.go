package oauth

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"
	"unicode"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// verdicts are the registered error codes that our requests can be answered with
// (RFC 6749 section 5.2, RFC 8707 section 2, RFC 8628 section 3.5, RFC 7009
// section 2.2.1; the two of a server in trouble come from section 4.1.2.1 of RFC
// 6749). Anything else that stands in "error" is prose.
var verdicts = map[string]broker.IssueErrorKind{
	"invalid_client":          broker.ClientRejected,
	"invalid_grant":           broker.GrantDead, // see condemned
	"invalid_request":         broker.RequestRejected,
	"invalid_scope":           broker.RequestRejected,
	"invalid_target":          broker.RequestRejected,
	"unauthorized_client":     broker.RequestRejected,
	"unsupported_grant_type":  broker.RequestRejected,
	"unsupported_token_type":  broker.RequestRejected,
	"access_denied":           broker.RequestRejected,
	"server_error":            broker.Unavailable,
	"temporarily_unavailable": broker.Unavailable,
}

// judge reads a complete answer: a grant, or the failure that it stands for.
func (a *attempt) judge(answer *answer) (*broker.Grant, *broker.IssueError) {
	m, err := answer.read()
	if err == nil && answer.isSuccess() && !m.hasError() {
		var grant *broker.Grant
		if grant, err = m.grant(); err == nil {
			return grant, nil
		}
	}
	return nil, a.refusal(answer, m, err)
}

// refusal is what a complete answer that is no success stands for. m is what
// could be read of it, unusable why that is not what was asked for, if it could.
func (a *attempt) refusal(answer *answer, m members, unusable error) *broker.IssueError {
	code := m.code()
	wait, asked := retryAfter(answer.header, answer.received)
	kind := classify(answer.status, asked, code, a.request.GrantType)
	if a.client.unauthorizedRefuses && answer.status == http.StatusUnauthorized && code == "" && unusable != flawPage {
		kind = broker.ClientRejected
	}
	return &broker.IssueError{
		Kind:       kind,
		Code:       code,
		Text:       a.describe(answer, code, m, unusable, wait),
		RetryAfter: wait,
		Trace:      a.trail(answer.header),
		Outcome:    outcome(answer, m),
	}
}

// outcome says what a refusal tells about what was presented. A gateway that
// gave up waiting does not know what the server behind it did, and a success
// that cannot be read may be the only trace of a new token.
func outcome(answer *answer, m members) broker.Outcome {
	switch {
	case answer.status == http.StatusGatewayTimeout, answer.status == http.StatusRequestTimeout:
		return broker.OutcomeUnknown
	case answer.isSuccess() && !m.hasError():
		return broker.OutcomeUnknown
	}
	return broker.Answered
}

func (a *answer) isSuccess() bool { return a.status >= 200 && a.status < 300 }

// classify says what a failure means for the next attempt. A code is a verdict
// only where the status agrees that there is one: the statuses of servers in
// trouble come first, and without a code no 4xx is a verdict at all, because
// gateways and firewalls answer so too.
func classify(status int, asked bool, code string, grantType broker.GrantType) broker.IssueErrorKind {
	switch {
	case status == http.StatusTooManyRequests,
		asked && (status == http.StatusForbidden || status == http.StatusServiceUnavailable):
		return broker.Throttled
	case status >= 500, status == http.StatusRequestTimeout, status == http.StatusTooEarly:
		return broker.Unavailable
	case status < 200, status >= 300 && status < 400:
		return broker.Malformed
	case code == "invalid_grant":
		return condemned(grantType)
	case code != "":
		return verdicts[code]
	case status >= 400:
		return broker.Unavailable
	}
	return broker.Malformed
}

// condemned is what invalid_grant refuses: that which was presented.
func condemned(grantType broker.GrantType) broker.IssueErrorKind {
	switch grantType {
	case broker.ClientCredentials:
		return broker.ClientRejected
	case broker.Password:
		return broker.UserRejected
	}
	return broker.GrantDead
}

// hasError reports whether the answer says that it is an error, which some
// servers do under status 200. An empty value counts as none.
func (m members) hasError() bool {
	s, err := stringMember(m["error"])
	return err != nil || s != ""
}

// code is the registered error code, which servers with a schema of their own
// may put into error_code and prose into error; empty when there is none.
func (m members) code() string {
	for _, name := range []string{"error", "error_code"} {
		if s := m.text(name); verdicts[s] != 0 {
			return s
		}
	}
	return ""
}

// prose is what the provider says about its error to people.
func (m members) prose() string {
	var said []string
	if s := m.text("error"); verdicts[s] == 0 {
		said = append(said, s)
	}
	for _, name := range []string{"error_description", "error_hint", "details"} {
		said = append(said, m.text(name))
	}
	return strings.TrimSpace(strings.Join(said, " "))
}

// describe puts an answer into words: what was asked, what came, and what the
// provider says about it as far as it may be shown.
func (a *attempt) describe(answer *answer, code string, m members, unusable error, wait time.Duration) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s answered %d", a.endpoint, answer.status)
	switch {
	case code != "":
		b.WriteString(" " + code)
	case answer.isRedirect():
		b.WriteString(a.redirect(answer))
	case unusable != nil:
		fmt.Fprintf(&b, " with %s", unusable)
	default:
		b.WriteString(" without a registered OAuth error code")
	}
	if said := a.redactor().show(m.prose(), maxProviderText); said != "" {
		fmt.Fprintf(&b, `: "%s"`, said)
	}
	if wait > 0 {
		fmt.Fprintf(&b, "; it asks to wait %s", wait.Round(time.Second))
	}
	if answer.status == http.StatusNotFound || answer.status == http.StatusMethodNotAllowed {
		fmt.Fprintf(&b, "; check that the URL is that of a %s endpoint", a.endpoint.role)
	}
	return b.String()
}

// redirect says no more of the target than its scheme and host: what follows
// may repeat what was sent.
func (a *attempt) redirect(answer *answer) string {
	const refused = ", which is not followed: put the endpoint's final URL into the configuration"
	to, err := url.Parse(answer.header.Get("Location"))
	if err != nil || to.Host == "" {
		return " with a redirect" + refused
	}
	target := a.redactor().show(to.Scheme+"://"+to.Host, maxProviderText)
	return " with a redirect to " + strings.TrimPrefix(target, "://") + refused
}

const maxTrace = 64

// trail is the server's own id of a failure, for its support.
func (a *attempt) trail(header http.Header) string {
	id := header.Get("X-Trace-ID")
	foreign := strings.IndexFunc(id, func(c rune) bool { return c > unicode.MaxASCII || !isTokenRune(c) && c != ':' }) >= 0
	if len(id) > maxTrace || foreign || a.redactor().finds(id) {
		return ""
	}
	return id
}
