package service

import (
	"context"
	"testing"
	"time"

	"google.golang.org/grpc/tap"

	"github.com/tokenbroker/tokenbroker/internal/admission"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// Every method has a deadline, but for streams; and a caller's own stays if it
// is sooner.
func TestDeadlines(t *testing.T) {
	s := newBench(t, nil)
	const health, ours = "/grpc.health.v1.Health/", "/tokenbroker.v1."
	quick := map[string]bool{
		ours + "TokenBroker/WhoAmI": true, ours + "ProfileAdmin/ListProfiles": true, ours + "ProfileAdmin/GetProfile": true, health + "Check": true, health + "List": true,
	}
	streams := map[string]bool{ours + "TokenBroker/WatchToken": true, health + "Watch": true}
	left := func(ctx context.Context, method string) time.Duration {
		t.Helper()
		ctx, err := s.arrive(ctx, &tap.Info{FullMethodName: method})
		if err != nil {
			t.Fatal(err)
		}
		deadline, ok := ctx.Deadline()
		if !ok {
			return 0
		}
		return time.Until(deadline).Round(time.Second)
	}
	if len(s.methods) < 15 {
		t.Fatalf("only %d methods", len(s.methods))
	}
	for method := range s.methods {
		for _, limit := range []time.Duration{5 * time.Second, time.Minute} {
			s.SetLimits(admission.Limits{Deadline: limit})
			want := limit
			if quick[method] {
				want = min(limit, 10*time.Second)
			}
			if streams[method] {
				want = 0
			}
			ctx, cancel := context.WithCancel(called(t.Context()))
			if got := left(ctx, method); got != want {
				t.Errorf("%s within %s: %s, want %s", method, limit, got, want)
			}
			soon, cancelSoon := context.WithTimeout(ctx, 3*time.Second)
			if got := left(soon, method); got != 3*time.Second {
				t.Errorf("%s within %s, the caller's 3 s: %s", method, limit, got)
			}
			far, cancelFar := context.WithTimeout(ctx, time.Hour)
			if got := left(far, method); !streams[method] && got != want {
				t.Errorf("%s within %s, the caller's hour: %s, want %s", method, limit, got, want)
			}
			cancelFar()
			cancelSoon()
			cancel()
		}
	}
	s.limiter.room.sweep()
	if n := s.limiter.calls.Now() + s.limiter.health.Now(); n != 0 {
		t.Errorf("%d calls are under way", n)
	}
}

// A call that is refused after its message does not wait for that as long as it
// likes, and no more than so many do.
func TestRefusedCallsDoNotWait(t *testing.T) {
	s := newBench(t, nil)
	s.SetLimits(admission.Limits{Calls: 1})
	ctx, end := context.WithTimeout(called(t.Context()), time.Hour)
	defer end()
	const first = 1
	for n := range first + mostLate + 100 {
		ctx, err := s.arrive(ctx, &tap.Info{FullMethodName: pb.TokenBroker_IssueToken_FullMethodName})
		if err != nil {
			t.Fatalf("call %d: %v", n, err)
		}
		want := lateMessage
		switch {
		case n < first:
			want = time.Minute
		case n >= first+mostLate:
			want = noMessage
		}
		deadline, _ := ctx.Deadline()
		if left := time.Until(deadline); left > want {
			t.Fatalf("call %d has %s, want %s at most", n, left, want)
		}
	}
	if n := s.limiter.late.Now(); n != mostLate {
		t.Errorf("%d calls wait to be refused, want %d", n, mostLate)
	}
	end()
	s.limiter.room.sweep()
	if n := s.limiter.late.Now() + s.limiter.calls.Now(); n != 0 {
		t.Errorf("%d calls are still counted", n)
	}
}
