package client_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/oauth2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/client"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

var _ oauth2.TokenSource = (*client.TokenSource)(nil)

// want fails the test unless the source has this token.
func want(t testing.TB, s *client.TokenSource, value string) {
	t.Helper()
	got, err := s.Token()
	if err != nil {
		t.Fatal(err)
	}
	if got.AccessToken != value {
		t.Fatalf("got the token %s, want %s", got.AccessToken, value)
	}
}

// wantReason fails the test unless the error has the code and the reason.
func wantReason(t testing.TB, err error, code codes.Code, reason client.Reason) *client.Error {
	t.Helper()
	var e *client.Error
	if !errors.As(err, &e) {
		t.Fatalf("got %T %v, want a *client.Error", err, err)
	}
	if e.Code != code || e.Reason != reason || status.Code(err) != code {
		t.Fatalf("got %v %q with status %v, want %v %q: %v", e.Code, e.Reason, status.Code(err), code, reason, err)
	}
	return e
}

// TestMillionTokensWithOneCall is the promise of the hot path.
func TestMillionTokensWithOneCall(t *testing.T) {
	f := newFake(t)
	f.watch = always(token("one", time.Now(), time.Hour))
	s := f.client().TokenSource("invoices")
	want(t, s, "one")
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	began := time.Now()
	for range 1_000_000 {
		if got, err := s.Token(); err != nil || got.AccessToken != "one" {
			t.Fatal(got, err)
		}
	}
	took := time.Since(began)
	t.Logf("1,000,000 tokens in %v on one core", took)
	if took > time.Second && !raceEnabled {
		t.Errorf("1,000,000 tokens took %v, want a second at most", took)
	}
	if n := f.all(); n != 1 {
		t.Errorf("the broker had %d calls, want 1", n)
	}
}

func BenchmarkToken(b *testing.B) {
	f := newFake(b)
	f.watch = always(token("one", time.Now(), time.Hour))
	s := f.client().TokenSource("invoices")
	want(b, s, "one")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Token(); err != nil {
			b.Fatal(err)
		}
	}
}

// Sources that ask for the same share a stream, others do not.
func TestSourcesShareAStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		var mu sync.Mutex
		var asked []string
		ended := make(chan string, 10)
		f.watch = func(r *pb.WatchTokenRequest, tokens chan<- *pb.Token, ctx context.Context) error {
			what := fmt.Sprintf("%s %v %v %q %v", r.GetProfile(), r.GetScopes(), r.GetMinLifetime().AsDuration(), r.GetJob().GetId(), r.GetJob().GetDedicated())
			mu.Lock()
			asked = append(asked, what)
			mu.Unlock()
			defer func() { ended <- what }()
			return always(token("one", time.Now(), time.Hour))(r, tokens, ctx)
		}
		c := f.client()
		first := c.TokenSource("p", client.WithScopes("b", "a"), client.WithMinLifetime(time.Minute), client.WithDedicatedJob("j"))
		second := c.TokenSource("p", client.WithScopes("a", "b", "a"), client.WithMinLifetime(time.Minute), client.WithDedicatedJob("j"))
		for _, s := range []*client.TokenSource{
			first, second, c.TokenSource("p"), c.TokenSource("p", client.WithScopes("a")), c.TokenSource("p", client.WithMinLifetime(time.Second)),
			c.TokenSource("p", client.WithJob("j")), c.TokenSource("q"), c.TokenSource("q"),
		} {
			want(t, s, "one")
		}
		mu.Lock()
		slices.Sort(asked)
		if got, want := strings.Join(asked, "; "), `p [] 0s "" false; p [] 0s "j" false; p [] 1s "" false; p [a b] 1m0s "j" true; p [a] 0s "" false; q [] 0s "" false`; got != want {
			t.Errorf("streams: %s, want %s", got, want)
		}
		mu.Unlock()
		first.Close()
		first.Close() // counts once
		want(t, second, "one")
		select {
		case what := <-ended:
			t.Errorf("the stream of %s ended though a source is left", what)
		default:
		}
		second.Close()
		if what := <-ended; !strings.Contains(what, "[a b]") {
			t.Errorf("the stream of %s ended", what)
		}
		if _, err := second.Token(); !errors.Is(err, client.ErrClosed) {
			t.Errorf("a closed source: %v", err)
		}
		want(t, c.TokenSource("p", client.WithScopes("a", "b"), client.WithMinLifetime(time.Minute), client.WithDedicatedJob("j")), "one")
	})
}

// The successor takes over as soon as it comes; nobody waits.
func TestSuccessorTakesOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.watch = func(_ *pb.WatchTokenRequest, tokens chan<- *pb.Token, ctx context.Context) error {
			for n := 1; ; n++ {
				tokens <- token(fmt.Sprint("token-", n), time.Now(), time.Hour)
				select {
				case <-time.After(45 * time.Minute):
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}
		s := f.client().TokenSource("invoices")
		current, err := s.Current(t.Context())
		if err != nil || current.AccessToken() != "token-1" || current.Type() != "Bearer" || current.Source != pb.Source_SOURCE_MEMORY {
			t.Fatalf("%v, %v", current, err)
		}
		for n := 2; n < 5; n++ {
			next, err := s.Next(t.Context(), current)
			if err != nil {
				t.Fatal(err)
			}
			want(t, s, fmt.Sprint("token-", n))
			if current = next; next.AccessToken() != fmt.Sprint("token-", n) || next.OAuth2().Extra("id") != next.ID {
				t.Errorf("got %v", next)
			}
		}
		if n := f.all(); n != 1 {
			t.Errorf("%d calls", n)
		}
	})
}

// TestBrokerAway: nobody hears of it while the token is good; then errors come, and
// the end of the trouble is found by itself.
func TestBrokerAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.watch = always(token("one", time.Now(), time.Hour))
		s := f.client().TokenSource("invoices")
		want(t, s, "one")
		time.Sleep(time.Minute)
		f.stop()
		began, dials := time.Now(), f.dialed()
		for range 58 {
			want(t, s, "one")
			time.Sleep(time.Minute)
		}
		attempts := f.dialed() - dials
		if least, most := int(time.Since(began)/(2*longest))-5, int(time.Since(began)/(longest/2))+20; attempts < least || attempts > most {
			t.Errorf("%d attempts to connect in %v, want %d to %d", attempts, time.Since(began), least, most)
		}
		time.Sleep(51 * time.Second) // into the margin of 10 s
		asked := time.Now()
		_, err := s.Token()
		wantReason(t, err, codes.Unavailable, "")
		if waited := time.Since(asked); waited > 31*time.Second || !strings.Contains(err.Error(), "nobody listens there") {
			t.Errorf("waited %v for %v", waited, err)
		}
		f.watch = always(token("two", time.Now(), time.Hour))
		f.start()
		restarted := time.Now()
		for {
			if got, err := s.Token(); err == nil {
				if got.AccessToken != "two" {
					t.Errorf("got %s", got.AccessToken)
				}
				break
			}
		}
		if took := time.Since(restarted); took > 50*time.Second {
			t.Errorf("it took %v to come back", took)
		}
	})
}

// longest wait between attempts.
const longest = 30 * time.Second

// A stream that stood is opened again at once; one that ends soon each time is not.
func TestStreamsThatEnd(t *testing.T) {
	for name, c := range map[string]struct {
		stands      time.Duration
		end         error
		least, most int // streams in an hour
	}{
		"aged connections":   {5 * time.Minute, refusal(codes.Unavailable, client.ReasonShuttingDown, 0), 12, 13},
		"ended well":         {5 * time.Minute, nil, 12, 13},
		"a proxy that cuts":  {time.Millisecond, refusal(codes.Unavailable, "", 0), 100, 300},
		"asked for patience": {5 * time.Minute, refusal(codes.ResourceExhausted, client.ReasonCallerThrottled, 5*time.Minute), 6, 7},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				f.watch = func(_ *pb.WatchTokenRequest, tokens chan<- *pb.Token, ctx context.Context) error {
					tokens <- token("one", time.Now(), 24*time.Hour)
					select {
					case <-time.After(c.stands):
						return c.end
					case <-ctx.Done():
						return ctx.Err()
					}
				}
				s := f.client().TokenSource("invoices")
				for range 3600 {
					want(t, s, "one")
					time.Sleep(time.Second)
				}
				if n := len(f.calls("WatchToken")); n < c.least || n > c.most {
					t.Errorf("%d streams in an hour, want %d to %d", n, c.least, c.most)
				}
			})
		})
	}
}

// TestFinalEnds: who is refused hears it at once, however often he asks, and the
// broker does not.
func TestFinalEnds(t *testing.T) {
	for code, reason := range map[codes.Code]client.Reason{
		codes.InvalidArgument: client.ReasonInvalidRequest, codes.PermissionDenied: client.ReasonCallerDenied,
		codes.Unauthenticated: client.ReasonCallerUnknown, codes.FailedPrecondition: client.ReasonAuthorizationRequired,
	} {
		t.Run(string(reason), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFake(t)
				var healed atomic.Bool
				f.watch = func(r *pb.WatchTokenRequest, tokens chan<- *pb.Token, ctx context.Context) error {
					if healed.Load() {
						return always(token("one", time.Now(), time.Hour))(r, tokens, ctx)
					}
					return refusal(code, reason, 0)
				}
				s := f.client().TokenSource("invoices")
				began := time.Now()
				_, err := s.Token()
				if e := wantReason(t, err, code, reason); e.Metadata["request_id"] != "r-1" || time.Since(began) != 0 {
					t.Errorf("%v after %v", e.Metadata, time.Since(began))
				}
				for range 600 {
					asked := time.Now()
					_, err := s.Token()
					wantReason(t, err, code, reason)
					if waited := time.Since(asked); waited > 0 {
						t.Fatalf("waited %v", waited)
					}
					time.Sleep(time.Second)
				}
				if n := len(f.calls("WatchToken")); n < 20 || n > 60 { // 9 while the wait grows, then one each 15 to 31 s
					t.Errorf("%d calls in 10 minutes", n)
				}
				n := len(f.calls("WatchToken"))
				time.Sleep(time.Hour)
				if more := len(f.calls("WatchToken")) - n; more > 1 {
					t.Errorf("%d calls in an hour in which nobody asked", more)
				}
				healed.Store(true)
				want(t, s, "one") // without an error in between: the wait is over
			})
		})
	}
}

// Who has lost the right keeps the token, and is asked for again when its successor is due.
func TestRightIsLostAndGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		began := time.Now()
		f.watch = func(r *pb.WatchTokenRequest, tokens chan<- *pb.Token, ctx context.Context) error {
			switch len(f.calls("WatchToken")) {
			case 1:
				tokens <- token("one", began, time.Hour)
				return refusal(codes.PermissionDenied, client.ReasonCallerDenied, 0)
			}
			return always(token("two", time.Now(), time.Hour))(r, tokens, ctx)
		}
		s := f.client().TokenSource("invoices")
		for time.Since(began) < 54*time.Minute {
			want(t, s, "one")
			time.Sleep(time.Second)
		}
		synctest.Wait()
		want(t, s, "two")
		if n := f.calls("WatchToken"); len(n) != 2 || n[1].Sub(began) != 54*time.Minute {
			t.Errorf("streams at %v", n)
		}
	})
}

// Who follows by Next notices sooner that the right is there again.
func TestFollowerIsToldOfTheRight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		began := time.Now()
		f.watch = func(r *pb.WatchTokenRequest, tokens chan<- *pb.Token, ctx context.Context) error {
			switch {
			case len(f.calls("WatchToken")) == 1:
				tokens <- token("one", began, 24*time.Hour)
				fallthrough
			case time.Since(began) < 10*time.Minute:
				return refusal(codes.PermissionDenied, client.ReasonCallerDenied, 0)
			}
			return always(token("two", time.Now(), time.Hour))(r, tokens, ctx)
		}
		s := f.client().TokenSource("invoices")
		one, err := s.Next(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		two, err := s.Next(t.Context(), one)
		if err != nil || two.AccessToken() != "two" || time.Since(began) > 11*time.Minute {
			t.Errorf("got %v, %v after %v", two, err, time.Since(began))
		}
		if n := len(f.calls("WatchToken")); n < 20 || n > 60 {
			t.Errorf("%d streams", n)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := s.Next(ctx, two); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

// TestDeadConnection has packets vanish: nobody says that the stream is over.
func TestDeadConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.watch = func(r *pb.WatchTokenRequest, tokens chan<- *pb.Token, ctx context.Context) error {
			return always(token(fmt.Sprint("token-", len(f.calls("WatchToken"))), time.Now(), time.Hour))(r, tokens, ctx)
		}
		s := f.client().TokenSource("invoices")
		one, err := s.Next(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		began := time.Now()
		f.freeze()
		two, err := s.Next(t.Context(), one)
		if took := time.Since(began); err != nil || two.AccessToken() != "token-2" || took > time.Minute {
			t.Errorf("%v, %v after %v", two, err, took)
		}
	})
}

// TestSlowConnections: who asks waits for a slow one, and hears of one that does not
// come.
func TestSlowConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.watch = always(token("one", time.Now(), time.Hour))
		f.slow = 8 * time.Second
		want(t, f.client().TokenSource("invoices"), "one")
		f.slow = time.Hour
		began := time.Now()
		s := f.client().TokenSource("invoices")
		_, err := s.Token()
		wantReason(t, err, codes.Unavailable, "")
		if took := time.Since(began); took > 15*time.Second {
			t.Errorf("it took %v: %v", took, err)
		}
		f.mu.Lock()
		f.slow = 0
		f.mu.Unlock()
		for began = time.Now(); ; {
			if _, err := s.Token(); err == nil {
				break
			}
			if time.Since(began) > time.Minute {
				t.Fatal("no token though the connection comes")
			}
		}
	})
}

// TestWhoWaits has callers wait for the first token.
func TestWhoWaits(t *testing.T) {
	late := func(after time.Duration) func(*pb.WatchTokenRequest, chan<- *pb.Token, context.Context) error {
		return func(r *pb.WatchTokenRequest, tokens chan<- *pb.Token, ctx context.Context) error {
			select {
			case <-time.After(after):
			case <-ctx.Done():
				return ctx.Err()
			}
			return always(token("one", time.Now(), time.Hour))(r, tokens, ctx)
		}
	}
	t.Run("all get the first token", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			f.watch = late(30 * time.Second)
			s := f.client().TokenSource("invoices")
			var wg sync.WaitGroup
			for range 100 {
				wg.Go(func() { want(t, s, "one") })
			}
			wg.Wait()
			if n := f.all(); n != 1 {
				t.Errorf("%d calls", n)
			}
		})
	})
	t.Run("his time is over", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			f.watch = late(30 * time.Second)
			s := f.client().TokenSource("invoices")
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			_, err := s.TokenContext(ctx)
			wantReason(t, err, codes.DeadlineExceeded, "")
			if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "profile invoices") {
				t.Error(err)
			}
			want(t, s, "one") // the stream goes on
			if n := f.all(); n != 1 {
				t.Errorf("%d calls", n)
			}
		})
	})
	t.Run("he leaves", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			f.watch = late(30 * time.Second)
			s := f.client().TokenSource("invoices")
			ctx, cancel := context.WithCancel(t.Context())
			time.AfterFunc(time.Second, cancel)
			_, err := s.TokenContext(ctx)
			wantReason(t, err, codes.Canceled, "")
			if !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	})
	t.Run("the broker is silent", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			f.watch = late(time.Hour)
			s := f.client().TokenSource("invoices")
			began := time.Now()
			_, err := s.Token()
			wantReason(t, err, codes.DeadlineExceeded, "")
			if waited := time.Since(began); waited != 40*time.Second {
				t.Errorf("waited %v", waited)
			}
		})
	})
	t.Run("the broker asks for more patience than there is", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			f.watch = func(*pb.WatchTokenRequest, chan<- *pb.Token, context.Context) error {
				return refusal(codes.ResourceExhausted, client.ReasonEndpointThrottled, 5*time.Minute)
			}
			s := f.client().TokenSource("invoices")
			began := time.Now()
			for range 100 {
				_, err := s.Token()
				if e := wantReason(t, err, codes.ResourceExhausted, client.ReasonEndpointThrottled); e.RetryAfter != 5*time.Minute {
					t.Error(e.RetryAfter)
				}
			}
			if n := f.all(); n != 1 || time.Since(began) != 0 {
				t.Errorf("%d calls in %v", n, time.Since(began))
			}
		})
	})
	t.Run("the last error is what he gets", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			f.watch = func(r *pb.WatchTokenRequest, tokens chan<- *pb.Token, ctx context.Context) error {
				if len(f.calls("WatchToken")) == 1 {
					return refusal(codes.Unavailable, client.ReasonEndpointUnavailable, 10*time.Second)
				}
				return late(time.Hour)(r, tokens, ctx)
			}
			s := f.client().TokenSource("invoices")
			_, err := s.Token()
			wantReason(t, err, codes.Unavailable, client.ReasonEndpointUnavailable)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			_, err = s.TokenContext(ctx)
			wantReason(t, err, codes.Unavailable, client.ReasonEndpointUnavailable)
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
			if calls := f.calls("WatchToken"); len(calls) != 2 || calls[1].Sub(calls[0]) < 10*time.Second {
				t.Errorf("calls at %v", calls)
			}
		})
	})
	t.Run("the client is closed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			f := newFake(t)
			f.watch = late(time.Hour)
			c := f.client()
			s := c.TokenSource("invoices")
			var wg sync.WaitGroup
			for range 10 {
				wg.Go(func() {
					_, err := s.Token()
					wantReason(t, err, codes.Canceled, "")
					if !errors.Is(err, client.ErrClosed) {
						t.Error(err)
					}
				})
			}
			synctest.Wait()
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			wg.Wait()
			for _, late := range []*client.TokenSource{s, c.TokenSource("invoices"), c.TokenSource("other")} {
				if _, err := late.Token(); !errors.Is(err, client.ErrClosed) {
					t.Error(err)
				}
				if _, err := late.Rejected(t.Context(), &oauth2.Token{AccessToken: "x"}); !errors.Is(err, client.ErrClosed) {
					t.Error(err)
				}
				late.Close()
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	})
}

// An older broker is asked at refresh_time, and may learn the method meanwhile.
func TestBrokerWithoutWatchToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		began := time.Now()
		f.issue = func(*pb.IssueTokenRequest) (*pb.Token, error) {
			switch n := len(f.calls("IssueToken")); n {
			case 3: // a moment of weakness
				return nil, refusal(codes.FailedPrecondition, client.ReasonAuthorizationRequired, 0)
			default:
				return token(fmt.Sprint("token-", n), time.Now(), time.Hour), nil
			}
		}
		s := f.client().TokenSource("invoices")
		want(t, s, "token-1")
		for time.Since(began) < 119*time.Minute {
			if _, err := s.Token(); err != nil && time.Since(began) < 110*time.Minute {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
		}
		want(t, s, "token-4")
		if calls := f.calls("IssueToken"); len(calls) != 4 || calls[1].Sub(began) != 54*time.Minute || calls[2].Sub(began) != 108*time.Minute {
			t.Errorf("asked at %v", calls)
		}
	})
}

// TestClosedAfterARefusal: the refusal is not the answer any more.
func TestClosedAfterARefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		f.watch = func(*pb.WatchTokenRequest, chan<- *pb.Token, context.Context) error {
			return refusal(codes.PermissionDenied, client.ReasonCallerDenied, 0)
		}
		s := f.client().TokenSource("invoices")
		_, err := s.Token()
		wantReason(t, err, codes.PermissionDenied, client.ReasonCallerDenied)
		s.Close()
		if _, err := s.Token(); !errors.Is(err, client.ErrClosed) {
			t.Error(err)
		}
	})
}

// TestNothingIsLeft: when a client is closed nothing of it runs.
func TestNothingIsLeft(t *testing.T) {
	before := goleak.IgnoreCurrent()
	f := newFake(t)
	f.watch = always(token("one", time.Now(), time.Hour))
	c := f.client()
	for n := range 50 {
		want(t, c.TokenSource(fmt.Sprint("profile-", n)), "one")
	}
	c.TokenSource("never-used")
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	f.stop()
	goleak.VerifyNone(t, before)
}

// TestNothingShowsAToken prints all there is.
func TestNothingShowsAToken(t *testing.T) {
	f := newFake(t)
	f.watch = always(token("canary-token", time.Now(), time.Hour))
	f.renew = func(*pb.RefreshTokenRequest) (*pb.Token, error) {
		return nil, refusal(codes.PermissionDenied, client.ReasonCallerDenied, 0)
	}
	c := f.client()
	s := c.TokenSource("invoices")
	current, err := s.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, refused := s.Rejected(t.Context(), current.OAuth2())
	type inside struct {
		source   *client.TokenSource
		token    *client.Token
		byItself client.Token
	}
	var b strings.Builder
	log := slog.New(slog.NewJSONHandler(&b, nil))
	for _, thing := range []any{c, s, current, *current, refused, inside{s, current, *current}, &inside{s, current, *current}, s.Transport(nil), s.PerRPCCredentials(), []any{s, current}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%d", "%q", "%x"} {
			fmt.Fprintf(&b, verb+"\n", thing)
		}
		log.Info("x", "thing", thing)
	}
	if strings.Contains(b.String(), "canary") || strings.Contains(b.String(), fmt.Sprintf("%x", "canary")) {
		t.Errorf("a token is shown:\n%s", b.String())
	}
	if !strings.Contains(b.String(), current.ID) || !strings.Contains(b.String(), "profile invoices") {
		t.Errorf("neither id nor profile is shown:\n%s", b.String())
	}
}

// TestSchedule holds the waits to their bounds.
func TestSchedule(t *testing.T) {
	for tries := range 40 {
		most := longest
		if tries < 9 {
			most = 100 * time.Millisecond << tries
		}
		seen := map[time.Duration]bool{}
		for range 100 {
			got := client.WaitAfter(tries)
			if got < most/2 || got > most {
				t.Errorf("after %d tries: %v, want %v to %v", tries, got, most/2, most)
			}
			seen[got] = true
		}
		if len(seen) < 50 {
			t.Errorf("after %d tries: only %d different waits", tries, len(seen))
		}
	}
}
