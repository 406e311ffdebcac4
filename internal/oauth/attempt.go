package oauth

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync/atomic"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// maxBodyBytes is far above any answer that holds tokens. More is refused
// whole rather than cut.
const maxBodyBytes = 1 << 20

// attempt is one request under way.
type attempt struct {
	client   *Client
	at       *endpoints // the server's
	endpoint endpoint   // the one that is asked
	request  TokenRequest
	timeout  time.Duration
	deadline time.Time     // when the timeout ends
	allotted time.Duration // until then, or until the context's own deadline
	progress atomic.Int32  // a stage
	oneTime  *oneTime      // nil unless the request is one
	hush     *redactor     // see redactor
}

// stage is how far an attempt has come. Net/http reports it from goroutines of
// its own.
type stage int32

const (
	resolving stage = iota
	connecting
	handshaking
	connected
	// sent: the first byte may have left. From here on the server may act.
	sent
)

func newAttempt(ctx context.Context, c *Client, request TokenRequest) *attempt {
	timeout := orDefault(request.Timeout, c.timeout)
	a := &attempt{
		client:   c,
		request:  request,
		timeout:  timeout,
		deadline: time.Now().Add(timeout),
		allotted: timeout,
	}
	if deadline, ok := ctx.Deadline(); ok {
		a.allotted = max(min(timeout, time.Until(deadline)), 0)
	}
	return a
}

// locate finds out where the server's endpoints are, within the attempt's time.
func (a *attempt) locate(ctx context.Context) (failure *broker.IssueError) {
	ctx, cancel := context.WithDeadline(ctx, a.deadline)
	defer cancel()
	a.at, failure = a.client.endpoints(ctx)
	return failure
}

// ask makes the request, to the attempt's endpoint. It returns a complete answer, or why there is none.
func (a *attempt) ask(ctx context.Context) (*answer, *broker.IssueError) {
	ctx, cancel := context.WithDeadline(ctx, a.deadline)
	defer cancel()
	if failure := a.sign(); failure != nil {
		return nil, failure
	}
	send := a.send
	if a.request.OneTime {
		send = a.sendOnce
	}
	answer, err := send(ctx)
	if err != nil {
		return nil, a.unanswered(ctx, err, answer)
	}
	return answer, nil
}

// redactor is made when a failure has to be told, which is seldom.
func (a *attempt) redactor() *redactor {
	if a.hush == nil {
		a.hush = newRedactor(a.client.clientID, a.request)
	}
	return a.hush
}

// answer is what came back. It is complete unless an error came with it.
type answer struct {
	status   int
	header   http.Header
	body     []byte
	received time.Time
}

// send makes a request that may share a connection with others.
func (a *attempt) send(ctx context.Context) (*answer, error) {
	return a.exchange(a.client.newHTTPRequest(ctx, a.endpoint.url, a.request), a.client.transport.http)
}

// exchange sends the request and reads the answer to its end. With an error the
// answer holds what came before it; nil when there was none at all.
func (a *attempt) exchange(request *http.Request, over http.RoundTripper) (*answer, error) {
	request = request.WithContext(httptrace.WithClientTrace(request.Context(), a.trace()))
	response, err := over.RoundTrip(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	answer := &answer{status: response.StatusCode, header: response.Header, received: time.Now()}
	if answer.bodyMatters() {
		answer.body, err = io.ReadAll(io.LimitReader(response.Body, maxBodyBytes+1))
	}
	return answer, err
}

// bodyMatters is false where the status says everything; after 101 the body is
// a connection that never ends.
func (a *answer) bodyMatters() bool {
	return a.status >= 200 && !a.isRedirect()
}

func (a *answer) isRedirect() bool { return a.status >= 300 && a.status < 400 }

// trace follows the request up to its first byte. A connection to a proxy
// counts as connecting. A one-time request notes its first byte by itself; see
// oneTime.
func (a *attempt) trace() *httptrace.ClientTrace {
	trace := &httptrace.ClientTrace{
		ConnectStart:      func(string, string) { a.reached(connecting) },
		TLSHandshakeStart: func() { a.reached(handshaking) },
		GotConn:           func(httptrace.GotConnInfo) { a.reached(connected) },
	}
	if a.oneTime != nil {
		trace.GotConn = func(got httptrace.GotConnInfo) {
			a.reached(connected)
			a.oneTime.arm(got.Conn)
		}
		return trace
	}
	trace.WroteHeaderField = func(string, []string) { a.reached(sent) }
	return trace
}

// reached notes that the attempt has come so far.
func (a *attempt) reached(s stage) {
	for {
		now := a.progress.Load()
		if now >= int32(s) || a.progress.CompareAndSwap(now, int32(s)) {
			return
		}
	}
}

func (a *attempt) stage() stage { return stage(a.progress.Load()) }

// unanswered is the failure of an attempt that got no complete answer. Once the
// first byte may have left it is ambiguous; before that the server cannot know.
func (a *attempt) unanswered(ctx context.Context, err error, partial *answer) *broker.IssueError {
	if a.stage() < sent {
		return a.notSent(ctx, err)
	}
	failure := &broker.IssueError{
		Kind:    broker.Ambiguous,
		Text:    fmt.Sprintf("%s %s; it may have acted on the request", a.endpoint, a.cut(ctx, err, partial)),
		Outcome: broker.OutcomeUnknown,
		Err:     a.redactor().cause(err),
	}
	if partial != nil {
		failure.RetryAfter, _ = retryAfter(partial.header, partial.received)
		failure.Trace = a.trail(partial.header)
	}
	return failure
}

// cut says how the answer failed to come.
func (a *attempt) cut(ctx context.Context, err error, partial *answer) string {
	var b strings.Builder
	if partial != nil {
		fmt.Fprintf(&b, "began to answer %d and ", partial.status)
	}
	switch {
	case a.ranOut(ctx):
		verb := "answer"
		if partial != nil {
			verb = "finish"
		}
		fmt.Fprintf(&b, "did not %s within %s", verb, a.within())
	case a.oneTime == nil && ctx.Err() == context.Canceled:
		b.WriteString("was given up before it had answered")
	default:
		fmt.Fprintf(&b, "broke the connection off before its answer was complete (%s)", a.redactor().show(err.Error(), maxProviderText))
	}
	return b.String()
}

// ranOut reports whether there was no more time to wait for the answer.
func (a *attempt) ranOut(ctx context.Context) bool {
	if a.oneTime != nil {
		return a.oneTime.over.Load()
	}
	return ctx.Err() == context.DeadlineExceeded
}

// within is the time that there was, as a person would say it. A context's
// deadline does not count any more once a one-time request is on its way.
func (a *attempt) within() time.Duration {
	d := a.allotted
	if a.oneTime != nil && a.stage() == sent {
		d = a.timeout
	}
	if d > time.Second {
		return d.Round(100 * time.Millisecond)
	}
	return d.Round(time.Millisecond)
}

func readCloser(s string) io.ReadCloser { return io.NopCloser(strings.NewReader(s)) }
