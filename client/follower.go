package client

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

const (
	// patience bounds the wait of one who asks, and a call on his behalf.
	patience = 40 * time.Second
	// steady is how long a stream must have stood for its end to be no sign of
	// trouble.
	steady = 10 * time.Second
	// young is the age below which the broker would not replace a token. As long a
	// token is not reported again after a report that has failed.
	young = 10 * time.Second
)

// follower keeps one token fresh, with a goroutine that begins with the first use
// and lasts until the follower ends.
type follower struct {
	client *Client
	demand demand
	users  int // sources; guarded by client.mu

	ctx  context.Context // ends with the follower
	stop context.CancelFunc
	once sync.Once // starts the goroutine

	held atomic.Pointer[Token] // the last one that came; written with mu held

	mu      sync.Mutex
	ended   bool          // guarded by mu
	changed chan struct{} // guarded by mu; closed with each event, and replaced
	last    *failure      // guarded by mu; how the last attempt ended; nil since a token came
	report  *report       // guarded by mu; the last one; nil before the first
}

// failure is the end of an attempt to get tokens. It is not changed.
type failure struct {
	err   *Error
	until time.Time     // the earliest time of the next attempt
	asked chan struct{} // of one element: somebody wants the next attempt. Used if err is Final
}

// report is about one token that a server has refused.
type report struct {
	id    string
	done  chan struct{} // closed when the broker has answered; what follows is set by then
	err   *Error        // nil: there is a successor
	until time.Time     // before then the broker is not told again
}

func newFollower(c *Client, d demand) *follower {
	f := &follower{client: c, demand: d, changed: make(chan struct{})}
	f.ctx, f.stop = context.WithCancel(c.ctx)
	return f
}

// end ends the stream, and has all who ask get ErrClosed.
func (f *follower) end() {
	f.stop()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	f.held.Store(nil)
	f.tell()
}

// tell wakes those who wait. f.mu is held.
func (f *follower) tell() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// current returns a good token: the one at hand, or the next.
func (f *follower) current(ctx context.Context) (*Token, *Error) {
	if t := f.held.Load(); t.good(time.Now()) {
		return t, nil
	}
	return f.await(ctx)
}

// next returns a good token other than the previous one. Who waits for it wants to
// know whether what kept the broker from sending it is over.
func (f *follower) next(ctx context.Context, previous *Token) (*Token, *Error) {
	for {
		f.mu.Lock()
		changed, last, t, now := f.changed, f.last, f.held.Load(), time.Now()
		f.mu.Unlock()
		if !t.good(now) {
			return f.await(ctx) // which is another one: the previous does not become good again
		}
		if previous == nil || t.ID != previous.ID {
			return t, nil
		}
		wake := t.until
		if last != nil && last.err.Final() {
			if now.Before(last.until) {
				wake = earlier(wake, last.until)
			} else {
				last.ask()
			}
		}
		timer := time.NewTimer(wake.Sub(now))
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, outOfTime(f.demand, ctx.Err(), nil)
		}
		timer.Stop()
	}
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// await waits for a good token when there is none.
func (f *follower) await(ctx context.Context) (*Token, *Error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	f.once.Do(func() { f.client.run(f.run) })
	f.mu.Lock()
	before, ended, t := f.last, f.ended, f.held.Load()
	f.mu.Unlock()
	switch {
	case ended:
		return nil, closedError(f.demand)
	case t.good(time.Now()): // it has come meanwhile
		return t, nil
	case before != nil && before.stands(ctx):
		return nil, before.err
	}
	for {
		f.mu.Lock()
		changed, last, ended, t := f.changed, f.last, f.ended, f.held.Load()
		f.mu.Unlock()
		switch {
		case ended:
			return nil, closedError(f.demand)
		case t.good(time.Now()):
			return t, nil
		case last != nil && last != before:
			return nil, last.err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			var err *Error
			if last != nil {
				err = last.err
			}
			return nil, outOfTime(f.demand, ctx.Err(), err)
		}
	}
}

// stands reports whether a failure is the answer to who asks now: the next attempt
// is too far away. If it is not, it is made.
func (l *failure) stands(ctx context.Context) bool {
	if wait := time.Until(l.until); wait > 0 {
		deadline, _ := ctx.Deadline() // await has set one
		return l.err.Final() || l.until.After(deadline)
	}
	l.ask()
	return false
}

// ask has the next attempt made after an error that is Final.
func (l *failure) ask() {
	select {
	case l.asked <- struct{}{}:
	default: // somebody has asked already
	}
}

// run goes from stream to stream until the follower ends.
func (f *follower) run() {
	for tries := 0; ; {
		began := time.Now()
		brought, err := f.follow()
		if f.ctx.Err() != nil {
			return
		}
		stood := brought && time.Since(began) >= steady
		if stood {
			tries = 0
		}
		if err == nil || stood && !err.Final() && err.RetryAfter == 0 {
			continue
		}
		l := f.failed(err, waitAfter(tries))
		tries++
		f.pause(l)
		if f.ctx.Err() != nil {
			return
		}
	}
}

const (
	firstWait   = 100 * time.Millisecond
	longestWait = 30 * time.Second
)

// waitAfter is how long to wait after so many failures in a row, before the one that
// has just happened. Half of it is random.
func waitAfter(tries int) time.Duration {
	most := longestWait
	if tries < 9 { // 100 ms << 9 is more
		most = firstWait << tries
	}
	return most/2 + rand.N(most/2+1)
}

// failed tells those who wait why there is no token, and returns when to try again.
func (f *follower) failed(err *Error, wait time.Duration) *failure {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err.Reason == ReasonJobEnded { // whoever ended it has revoked the token
		f.held.Store(nil)
	}
	f.last = &failure{err: err, until: time.Now().Add(max(wait, err.RetryAfter)), asked: make(chan struct{}, 1)}
	f.tell()
	return f.last
}

// pause returns when the next attempt is due.
func (f *follower) pause(l *failure) {
	ctx, cancel := context.WithDeadline(f.ctx, l.until)
	defer cancel()
	conn := f.client.conn
	if state := conn.GetState(); state != connectivity.Ready && l.err.unreached() {
		// The connection has a back-off of its own: as soon as it stands, there is no
		// reason to wait any longer.
		for conn.Connect(); state != connectivity.Ready && conn.WaitForStateChange(ctx, state); state = conn.GetState() {
		}
		return
	}
	<-ctx.Done()
	if !l.err.Final() {
		return
	}
	// Somebody had to act; who asks wants to know whether that was done. So does who
	// has a token that should have been replaced by now.
	var due <-chan time.Time
	if t := f.held.Load(); t != nil && t.RefreshTime.After(time.Now()) {
		timer := time.NewTimer(time.Until(t.RefreshTime))
		defer timer.Stop()
		due = timer.C
	}
	select {
	case <-l.asked:
	case <-due:
	case <-f.ctx.Done():
	}
}

// follow takes tokens from one stream until it ends, and reports whether there was
// any. The error is nil if another stream is to be opened at once.
func (f *follower) follow() (brought bool, failed *Error) {
	ctx, cancel := context.WithCancel(f.ctx)
	defer cancel()
	d := f.demand
	stream, err := f.client.stub.WatchToken(ctx, &pb.WatchTokenRequest{Profile: d.profile, Scopes: d.scopes, MinLifetime: d.lifetime(), Job: d.jobMessage()})
	for err == nil {
		var r *pb.WatchTokenResponse
		if r, err = stream.Recv(); err == nil {
			err = f.take(r.GetToken(), r.GetSource(), "")
			brought = brought || err == nil
		}
	}
	switch {
	case !brought && status.Code(err) == codes.Unimplemented:
		return f.poll()
	case errors.Is(err, io.EOF):
		err = status.Error(codes.Unavailable, "the broker has ended the stream")
	}
	return brought, newError(d.doing(), err)
}

// poll takes one token from a broker that has no streams, and returns when its
// successor is due.
func (f *follower) poll() (brought bool, failed *Error) {
	d := f.demand
	r, err := f.client.stub.IssueToken(f.ctx, &pb.IssueTokenRequest{Profile: d.profile, Scopes: d.scopes, MinLifetime: d.lifetime(), Job: d.jobMessage()})
	if err == nil {
		err = f.take(r.GetToken(), r.GetSource(), "")
	}
	if err != nil {
		return false, newError(d.doing(), err)
	}
	t := f.held.Load()
	if t == nil { // the follower has ended
		return true, nil
	}
	due := time.NewTimer(max(time.Until(t.RefreshTime), t.margin(), time.Second))
	defer due.Stop()
	select {
	case <-due.C:
	case <-f.ctx.Done():
	}
	return true, nil
}

// take makes a token the one at hand. If it was sent for a refused one, and there is
// another good one by then, that stays: the stream will not send it again.
func (f *follower) take(sent *pb.Token, source pb.Source, refused string) error {
	t, err := newToken(sent, source)
	if err != nil {
		return status.Error(codes.Internal, err.Error())
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		return nil
	}
	f.last = nil
	is := f.held.Load()
	// A replica that has not heard of a report yet may still send what was reported.
	replaced := is.good(time.Now()) && is.ID != t.ID && (f.report != nil && f.report.id == t.ID || refused != "" && refused != is.ID)
	if !replaced && (is == nil || is.ID != t.ID) {
		f.held.Store(t)
	}
	f.tell()
	return nil
}

// rejected returns a token other than the one that a server has refused.
func (f *follower) rejected(ctx context.Context, id string) (*Token, *Error) {
	if t := f.held.Load(); t.good(time.Now()) && t.ID != id {
		return t, nil
	}
	r, err := f.reporting(id)
	if err != nil {
		return nil, err
	}
	select {
	case <-r.done:
	case <-f.ctx.Done():
		return nil, closedError(f.demand)
	case <-ctx.Done():
		return nil, outOfTime(f.demand, ctx.Err(), nil)
	}
	if r.err != nil {
		return nil, r.err
	}
	return f.current(ctx)
}

// reporting returns the report of a token: the one that there is, or a new one.
func (f *follower) reporting(id string) (*report, *Error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended {
		return nil, closedError(f.demand)
	}
	r := &report{id: id, done: make(chan struct{})}
	now := time.Now()
	if before := f.report; before != nil && before.id == id {
		select {
		case <-before.done:
			if before.err == nil || now.Before(before.until) {
				return before, nil
			}
		default:
			return before, nil
		}
	}
	if t := f.held.Load(); t != nil && t.ID == id {
		if left := young - now.Sub(t.IssueTime); left > 0 {
			return nil, &Error{
				Code: codes.ResourceExhausted, Reason: ReasonRefreshTooSoon, RetryAfter: left, doing: "replacing a token of profile " + f.demand.profile,
				Message: "the refused token was obtained a moment ago; another one would hardly fare better",
			}
		}
	}
	f.report = r
	f.client.run(func() { f.refresh(r) })
	return r, nil
}

// refresh tells the broker of a refused token.
func (f *follower) refresh(r *report) {
	defer close(r.done)
	ctx, cancel := context.WithTimeout(f.ctx, patience)
	defer cancel()
	d := f.demand
	out, err := f.client.stub.RefreshToken(ctx, &pb.RefreshTokenRequest{
		Profile: d.profile, Scopes: d.scopes, MinLifetime: d.lifetime(), Job: d.jobMessage(), RejectedTokenId: r.id,
	})
	if err == nil {
		err = f.take(out.GetToken(), out.GetSource(), r.id)
	}
	if err != nil {
		r.err = newError("replacing a token of profile "+d.profile, err)
		r.until = time.Now().Add(max(young, r.err.RetryAfter))
	}
}

// revoke has the broker revoke the current token.
func (f *follower) revoke(ctx context.Context) (confirmed bool, failed *Error) {
	d := f.demand
	r, err := f.client.stub.RevokeToken(ctx, &pb.RevokeTokenRequest{Profile: d.profile, Scopes: d.scopes, Job: d.jobMessage()})
	if err != nil {
		return false, newError("revoking the token of profile "+d.profile, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if t := f.held.Load(); t != nil && t.ID == r.GetTokenId() {
		f.held.Store(nil)
		f.tell()
	}
	return r.GetOutcome() == pb.RevocationOutcome_REVOCATION_OUTCOME_CONFIRMED, nil
}
