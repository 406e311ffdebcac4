package service

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// WatchToken is one goroutine for each stream, which waits in one place for all
// that may concern it. It never waits for its reader.
func (s *tokenBroker) WatchToken(r *pb.WatchTokenRequest, stream grpc.ServerStreamingServer[pb.WatchTokenResponse]) error {
	ctx := stream.Context()
	right, err := s.obtain(ctx, r.GetProfile(), access.Watch, r.GetScopes())
	if err != nil {
		return err
	}
	requestID(ctx) // one for all that the audit log says of the stream
	callFrom(ctx).outcome.job = r.GetJob().GetId()
	w := &watcher{
		s: s.Service, stream: stream, right: right, call: callFrom(ctx), profile: r.GetProfile(),
		watch: s.broker.Watch(askOf(r)), demand: broker.Demand{Lifetime: r.GetMinLifetime().AsDuration()},
		sent: newDeparture(), leaves: s.leaves(ctx), timer: time.NewTimer(0),
	}
	defer w.watch.Close()
	defer w.timer.Stop()
	if s.broker.Has(w.profile) { // what callers name must not make a metric
		open := s.watches.open.WithLabelValues(w.profile)
		open.Inc()
		defer open.Dec()
		s.watches.sent.WithLabelValues(w.profile) // from zero
	}
	for {
		if err := w.step(ctx); err != nil {
			return err
		}
	}
}

// watcher is a stream of WatchToken.
type watcher struct {
	s       *Service
	stream  grpc.ServerStream
	right   *right
	call    *call
	profile string
	watch   *broker.Watch
	demand  broker.Demand
	// sent tells when the last token that was sent has left.
	sent *departure
	// leaves is when the stream must end for the age of its connection.
	leaves time.Time
	// unwritten is until when the audit log need not be asked for a place again.
	unwritten time.Time
	timer     *time.Timer
}

// step does what there is to do, and waits until there may be more. It returns
// how the stream ends.
func (w *watcher) step(ctx context.Context) error {
	view, err := w.watch.Look(w.demand)
	if lost := w.right.judge(); lost != nil {
		return lost // whatever else there is
	}
	switch {
	case w.right.undecided:
		view = broker.View{}
	case err != nil:
		return fromBroker(err, w.call.caller, w.profile, access.Watch)
	case view.Token != nil && !w.sent.waiting && !time.Now().Before(w.unwritten):
		if sent, err := w.send(ctx, view); sent || err != nil {
			return err // and look again
		}
	}
	if view.Token != nil && !w.sent.waiting {
		sooner(&view.Again, w.unwritten)
	}
	sooner(&view.Again, w.right.ends)
	sooner(&view.Again, w.leaves)
	if view.Again.IsZero() {
		w.timer.Stop()
	} else {
		w.timer.Reset(time.Until(view.Again) + 1)
	}
	select {
	case <-view.News:
	case <-view.Landed:
	case <-w.sent.gone:
		w.sent.waiting = false
	case <-w.right.policyChanged:
	case <-w.right.trustChanged:
	case <-w.timer.C:
		if !w.leaves.IsZero() && !time.Now().Before(w.leaves) {
			return shuttingDown(w.profile, "this connection has been open for as long as it may be: watch again, on a new one")
		}
	case <-w.s.leaving:
		return shuttingDown(w.profile, "this replica is stopping: watch again, on a new connection, which leads to another one")
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// sooner makes at the earlier of both times; zero is never.
func sooner(at *time.Time, other time.Time) {
	if !other.IsZero() && (at.IsZero() || other.Before(*at)) {
		*at = other
	}
}

// send sends the token of a view, unless the audit log must have a line of it and
// cannot: then the caller goes on with the one that it has, as long as that lives.
func (w *watcher) send(ctx context.Context, view broker.View) (sent bool, err error) {
	s, k := w.s, w.call
	if err := s.reserve(ctx); err != nil {
		if w.watch.Lives() {
			w.unwritten = time.Now().Add(later())
			return false, nil
		}
		return false, err
	}
	data, err := encoded(view.Token, view.Source)
	if err != nil {
		return false, err
	}
	// The line comes first, as it does for the answers of other calls.
	k.outcome.tokenID, k.outcome.source = view.Token.ID, view.Source
	s.record(ctx, pb.TokenBroker_WatchToken_FullMethodName, "ok")
	k.outcome.tokenID, k.outcome.source, k.told = "", 0, true
	w.sent.waiting = true
	if err := w.stream.SendMsg(prepared{data, w.sent}); err != nil {
		if ctx.Err() != nil { // it says the same in other words
			return false, ctx.Err()
		}
		return false, err
	}
	w.watch.HandedOn(view)
	s.calls.note(w.profile, k.caller)
	s.watches.sent.WithLabelValues(w.profile).Inc()
	return true, nil
}

// encoded is the answer with the token, for departure. It is encoded once, however
// many get it.
func encoded(t *broker.Token, source broker.Source) (*[]byte, error) {
	if data := t.Encoded[source].Load(); data != nil {
		return data, nil
	}
	m := &pb.WatchTokenResponse{Token: new(tokenMessage).fill(t), Source: sourceOf(source)}
	data, err := proto.MarshalOptions{}.MarshalAppend(make([]byte, 0, max(proto.Size(m), leastData)), m)
	if err != nil {
		return nil, fmt.Errorf("encoding the answer: %w", err)
	}
	t.Encoded[source].Store(&data)
	return &data, nil
}

// shuttingDown sends a caller to another connection. It need not wait, but they
// are many, and should not come back all in one instant.
func shuttingDown(profile, text string) error {
	return failure{profile: profile, cause: &broker.Error{
		Reason: broker.ReasonShuttingDown, Text: text, RetryAfter: (leastAway + rand.N(mostAway-leastAway)).Truncate(time.Millisecond),
	}}
}

const leastAway, mostAway = 20 * time.Millisecond, 500 * time.Millisecond

// watchMetrics tell of the streams of WatchToken.
type watchMetrics struct {
	open *prometheus.GaugeVec
	sent *prometheus.CounterVec
}

func newWatchMetrics() watchMetrics {
	return watchMetrics{
		open: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "watch_streams", Help: "Streams of WatchToken that are open, by profile.",
		}, []string{"profile"}),
		sent: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "watch_tokens_sent_total", Help: "Tokens that streams of WatchToken have sent, by profile.",
		}, []string{"profile"}),
	}
}
