package oauth

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// APIRequest is one POST of JSON to an API of the authorization server's,
// authorized by a bearer token (RFC 6750 section 2.1).
type APIRequest struct {
	// Role is how messages call the API: "client administration".
	Role string
	// URL of the API.
	URL string
	// AllowInsecureHTTP admits an http:// URL of a host that is not a loopback
	// one.
	AllowInsecureHTTP bool
	// Token that authorizes the request.
	Token broker.Secret
	// Body is encoded as JSON. It holds no secret.
	Body any
}

// PostJSON makes one such request and returns the body of a success, which may
// hold a secret. It keeps the promises of a token request: it is sent once,
// follows no redirect and ends in time. The error is always a
// *[broker.IssueError]: ClientRejected for 401 and 403, RequestRejected for other
// refusals, with what the server says of them (RFC 9457), and Ambiguous where the
// server may have done what was asked for.
func (c *Client) PostJSON(ctx context.Context, request APIRequest) ([]byte, error) {
	to, err := parseEndpoint(request.Role, "its URL", request.URL, request.AllowInsecureHTTP)
	if err != nil {
		return nil, notMade(request, err)
	}
	body, err := json.Marshal(request.Body)
	if err != nil {
		return nil, notMade(request, err)
	}
	a := newAttempt(ctx, c, TokenRequest{Secrets: map[string]broker.Secret{"token": request.Token}})
	a.endpoint = to
	ctx, cancel := context.WithDeadline(ctx, a.deadline)
	defer cancel()
	answer, err := a.exchange(a.newJSONRequest(ctx, string(body)), c.transport.http)
	if err != nil {
		return nil, a.unanswered(ctx, err, answer)
	}
	if failure := a.judgeAPI(answer); failure != nil {
		return nil, failure
	}
	return answer.body, nil
}

func notMade(request APIRequest, err error) *broker.IssueError {
	return &broker.IssueError{
		Kind: broker.RequestRejected, Outcome: broker.Unsent,
		Text: fmt.Sprintf("the %s request could not be made: %v", request.Role, err),
	}
}

// newJSONRequest is an API request on the wire's terms.
func (a *attempt) newJSONRequest(ctx context.Context, body string) *http.Request {
	h := a.client.newHTTPRequest(ctx, a.endpoint.url, TokenRequest{})
	h.Body, h.ContentLength = readCloser(body), int64(len(body))
	h.Header.Set("Content-Type", "application/json")
	h.Header.Set("Authorization", "Bearer "+a.request.Secrets["token"].Reveal())
	return h
}

// judgeAPI reads a complete answer: nil is a success.
func (a *attempt) judgeAPI(answer *answer) *broker.IssueError {
	wait, asked := retryAfter(answer.header, answer.received)
	kind, told := broker.RequestRejected, broker.Answered
	switch status := answer.status; {
	case answer.isSuccess() && len(answer.body) > maxBodyBytes:
		kind, told = broker.Malformed, broker.OutcomeUnknown
	case answer.isSuccess():
		return nil
	case status == http.StatusTooManyRequests, asked && (status == http.StatusForbidden || status == http.StatusServiceUnavailable):
		kind = broker.Throttled
	case status == http.StatusServiceUnavailable, status == http.StatusTooEarly:
		kind = broker.Unavailable
	case status >= 500, status == http.StatusRequestTimeout: // whoever answers does not know what was done by then
		kind, told = broker.Ambiguous, broker.OutcomeUnknown
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		kind = broker.ClientRejected
	case status < 400:
		kind = broker.Malformed
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s answered %d", a.endpoint, answer.status)
	if answer.isRedirect() {
		b.WriteString(a.redirect(answer))
	}
	if said := a.redactor().show(problem(answer.body), maxProblemText); said != "" {
		fmt.Fprintf(&b, `: "%s"`, said)
	}
	return &broker.IssueError{Kind: kind, Text: b.String(), RetryAfter: wait, Trace: a.trail(answer.header), Outcome: told}
}

// maxProblemText is how much of a problem is repeated: there may be a field or
// two in it.
const maxProblemText = 400

// problem is what a server says of its refusal in Problem Details (RFC 9457),
// with the errors by field that ASP.NET adds; empty when it says nothing so.
func problem(body []byte) string {
	var p struct {
		Title, Detail string
		Errors        map[string]json.RawMessage
	}
	if json.Unmarshal(bytes.TrimPrefix(body, byteOrderMark), &p) != nil {
		return ""
	}
	said := []string{p.Title, p.Detail}
	for _, field := range slices.Sorted(maps.Keys(p.Errors)) {
		var messages []string
		if json.Unmarshal(p.Errors[field], &messages) == nil {
			said = append(said, field+": "+strings.Join(messages, ", "))
		}
	}
	return strings.Join(slices.DeleteFunc(said, func(s string) bool { return s == "" }), "; ")
}
