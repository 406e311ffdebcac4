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

// attempt is one token request under way.
type attempt struct {
	client   *Client
	request  TokenRequest
	allotted time.Duration // until the timeout or the context's deadline
	progress atomic.Int32  // a stage; it only grows
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
	allotted := c.timeout
	if deadline, ok := ctx.Deadline(); ok {
		allotted = min(allotted, time.Until(deadline))
	}
	return &attempt{client: c, request: request, allotted: max(allotted, 0)}
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

// send makes the request and reads the answer to its end. With an error the
// answer holds what came before it; nil when there was none at all.
func (a *attempt) send(ctx context.Context) (*answer, error) {
	ctx = httptrace.WithClientTrace(ctx, a.trace())
	response, err := a.client.transport.http.RoundTrip(a.client.newHTTPRequest(ctx, a.request))
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
// counts as connecting.
func (a *attempt) trace() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{
		ConnectStart:      func(string, string) { a.reached(connecting) },
		TLSHandshakeStart: func() { a.reached(handshaking) },
		GotConn:           func(httptrace.GotConnInfo) { a.reached(connected) },
		WroteHeaderField:  func(string, []string) { a.reached(sent) },
	}
}

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
	failure := &broker.IssueError{Err: a.redactor().cause(err)}
	if a.stage() < sent {
		failure.Kind = broker.Unavailable
		failure.Text = fmt.Sprintf("%s was not reached: %s", a.endpoint(), a.unsent(ctx, err))
		return failure
	}
	failure.Kind = broker.Ambiguous
	failure.Text = fmt.Sprintf("%s %s; it may have acted on the request", a.endpoint(), a.cut(ctx, err, partial))
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
	switch ctx.Err() {
	case context.DeadlineExceeded:
		verb := "answer"
		if partial != nil {
			verb = "finish"
		}
		fmt.Fprintf(&b, "did not %s within %s", verb, a.within())
	case context.Canceled:
		b.WriteString("was given up before it had answered")
	default:
		fmt.Fprintf(&b, "broke the connection off before its answer was complete (%s)", a.redactor().show(err.Error(), maxProviderText))
	}
	return b.String()
}

func (a *attempt) endpoint() string { return "token endpoint " + a.client.Endpoint() }

// within is the time that there was, as a person would say it.
func (a *attempt) within() time.Duration {
	if a.allotted > time.Second {
		return a.allotted.Round(100 * time.Millisecond)
	}
	return a.allotted.Round(time.Millisecond)
}

func readCloser(s string) io.ReadCloser { return io.NopCloser(strings.NewReader(s)) }
