package broker_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// chaos fails every transition now and then, before or after it was applied,
// and is down for a while.
type chaos struct {
	broker.Store
	mu        sync.Mutex
	r         *mrand.Rand
	p         float64
	downUntil time.Time
}

func (s *chaos) draw() (before, after bool, wait time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.p == 0 {
		return
	}
	if time.Now().Before(s.downUntil) {
		return true, false, 500 * time.Millisecond
	}
	if s.r.Float64() < s.p/10 {
		s.downUntil = time.Now().Add(time.Duration(s.r.Float64() * float64(8*time.Second)))
	}
	x := s.r.Float64()
	return x < s.p, x > 1-s.p, time.Duration(s.r.Float64() * float64(100*time.Millisecond))
}

func around[T any](ctx context.Context, s *chaos, run func() (T, error)) (zero T, err error) {
	before, after, wait := s.draw()
	if before || after {
		wait = 500 * time.Millisecond
	}
	if before {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
		return zero, errDown
	}
	v, err := run()
	select {
	case <-time.After(wait):
	case <-ctx.Done():
		return zero, ctx.Err()
	}
	if after {
		return zero, errDown
	}
	return v, err
}

type two[A, B any] struct {
	a A
	b B
}

func (s *chaos) Acquire(ctx context.Context, c broker.Claim) (broker.Acquisition, error) {
	return around(ctx, s, func() (broker.Acquisition, error) { return s.Store.Acquire(ctx, c) })
}
func (s *chaos) Renew(ctx context.Context, l broker.Lease) (bool, error) {
	return around(ctx, s, func() (bool, error) { return s.Store.Renew(ctx, l) })
}
func (s *chaos) Intend(ctx context.Context, l broker.Lease, p broker.Presentation) (broker.IntendVerdict, error) {
	return around(ctx, s, func() (broker.IntendVerdict, error) { return s.Store.Intend(ctx, l, p) })
}
func (s *chaos) Save(ctx context.Context, l broker.Lease, r broker.Result) (broker.StoredToken, broker.SaveVerdict, error) {
	v, err := around(ctx, s, func() (two[broker.StoredToken, broker.SaveVerdict], error) {
		t, v, err := s.Store.Save(ctx, l, r)
		return two[broker.StoredToken, broker.SaveVerdict]{t, v}, err
	})
	return v.a, v.b, err
}
func (s *chaos) Fail(ctx context.Context, l broker.Lease, f broker.Failure) (broker.Failure, error) {
	return around(ctx, s, func() (broker.Failure, error) { return s.Store.Fail(ctx, l, f) })
}
func (s *chaos) Own(ctx context.Context, id, owner string, life time.Duration) (string, error) {
	return around(ctx, s, func() (string, error) { return s.Store.Own(ctx, id, owner, life) })
}
func (s *chaos) Drop(ctx context.Context, d broker.Drop) (broker.Dropped, error) {
	return around(ctx, s, func() (broker.Dropped, error) { return s.Store.Drop(ctx, d) })
}
func (s *chaos) Look(ctx context.Context, family, slot string) (broker.Record, error) {
	return around(ctx, s, func() (broker.Record, error) { return s.Store.Look(ctx, family, slot) })
}

// A consent survives whatever becomes of the replies of the store, and of the
// replicas: nothing is presented twice, and nobody must sign in.
func TestConsentSurvivesAStoreThatFailsAtRandom(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			in(t, func(t *testing.T) {
				s := newIDP()
				s.takes, s.lives = time.Second, 5*time.Minute
				p := s.consented()
				f := start(t, 0)
				log := &buffer{}
				options := broker.Options{Logger: slog.New(slog.NewTextHandler(log, nil))}
				var ways []*chaos
				for i := range 3 {
					c := &chaos{Store: f.store, r: mrand.New(mrand.NewPCG(seed, uint64(i)))}
					b := broker.New(c, options)
					b.Configure([]*broker.Profile{p})
					f.replicas, ways = append(f.replicas, b), append(ways, c)
				}
				s.signIn(t, f.store, p)
				for _, c := range ways {
					c.mu.Lock()
					c.p = 0.25
					c.mu.Unlock()
				}
				r := mrand.New(mrand.NewPCG(seed, 99))
				fr := mrand.New(mrand.NewPCG(seed, 98))
				s.set(func(s *idp) {
					s.fault = func(int) fault {
						switch fr.IntN(10) {
						case 0:
							return refused
						case 1:
							return unsent
						}
						return none
					}
				})
				var bmu sync.Mutex
				reasons := map[string]int{}
				var mu sync.Mutex
				var wg sync.WaitGroup
				for range 2000 {
					bmu.Lock()
					b := f.replicas[r.IntN(3)]
					bmu.Unlock()
					if r.IntN(100) == 0 {
						i := r.IntN(3)
						bmu.Lock()
						old := f.replicas[i]
						f.replicas[i] = broker.New(ways[i], options)
						f.replicas[i].Configure([]*broker.Profile{p})
						bmu.Unlock()
						wg.Go(old.Close)
					}
					var d broker.Demand
					report := r.IntN(20) == 0
					var scopes []string
					if r.IntN(2) == 0 {
						scopes = subsets[r.IntN(3)]
					}
					wg.Go(func() {
						began := time.Now()
						tok, _, err := b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: scopes}, d)
						if err == nil && report {
							tok, _, err = b.Issue(t.Context(), broker.Ask{Profile: "invoices", Scopes: scopes}, broker.Demand{Not: tok.ID})
						}
						if err == nil && time.Until(tok.ExpireTime) <= 0 {
							t.Error("expired")
						}
						took := time.Since(began)
						var be *broker.Error
						key := "ok"
						if errors.As(err, &be) {
							key = string(be.Reason)
						}
						mu.Lock()
						reasons[key]++
						if took > 15*time.Second {
							reasons["slow "+key]++
						}
						mu.Unlock()
					})
					if r.IntN(50) == 0 {
						f.replicas[r.IntN(3)].Configure([]*broker.Profile{p})
					}
					time.Sleep(time.Duration(r.IntN(6000)) * time.Millisecond)
				}
				for _, c := range ways {
					c.mu.Lock()
					c.p = 0
					c.mu.Unlock()
				}
				wg.Wait()
				time.Sleep(10 * time.Second)
				synctest.Wait()
				s.set(func(s *idp) { s.fault = nil })
				// Of a store that does not answer a process in its last ten seconds the
				// consent may die; the process says so.
				if s.isDead() && !strings.Contains(log.String(), "grant lost") {
					t.Errorf("dead:\n%s", log)
				}
				if !s.isDead() {
					time.Sleep(time.Minute)
					f.ask(t, broker.Demand{})
				}
				if testing.Verbose() {
					t.Log(reasons)
				}
			})
		})
	}
}

// A job has one token wherever it asks, and after its end none, whatever becomes of
// the replies of the store, and of the replicas.
func TestJobsSurviveAStoreThatFailsAtRandom(t *testing.T) {
	for name, consented := range map[string]bool{"client credentials": false, "a person's consent": true} {
		for seed := range uint64(15) {
			t.Run(fmt.Sprint(name, " ", seed), func(t *testing.T) {
				in(t, func(t *testing.T) {
					f := start(t, 0)
					e := &endpoint{takes: 300 * time.Millisecond, lives: 1000 * time.Hour}
					p := profile(e)
					if consented {
						s := newIDP()
						s.takes, s.lives = e.takes, e.lives
						p = s.consented()
						s.signIn(t, f.store, p)
					}
					var ways []*chaos
					for i := range 3 {
						c := &chaos{Store: f.store, r: mrand.New(mrand.NewPCG(seed, uint64(i))), p: 0.2}
						b := broker.New(c, broker.Options{})
						b.Configure([]*broker.Profile{p})
						f.replicas, ways = append(f.replicas, b), append(ways, c)
					}
					r := mrand.New(mrand.NewPCG(seed, 99))
					var got served
					var mu sync.Mutex
					ended, reasons := map[string]bool{}, map[string]int{}
					var wg sync.WaitGroup
					for range 600 {
						i, job := r.IntN(3), fmt.Sprint(r.IntN(30))
						if r.IntN(50) == 0 {
							old := f.replicas[i]
							f.replicas[i] = broker.New(ways[i], broker.Options{})
							f.replicas[i].Configure([]*broker.Profile{p})
							wg.Go(old.Close)
						}
						b, ends := f.replicas[i], r.IntN(25) == 0
						wg.Go(func() {
							if ends {
								if _, err := b.Revoke(t.Context(), ofJob(job), ""); err == nil {
									synctest.Wait() // others have heard
									mu.Lock()
									defer mu.Unlock()
									ended[job] = true
								}
								return
							}
							mu.Lock()
							over := ended[job]
							mu.Unlock()
							token, _, err := b.Issue(t.Context(), ofJob(job), broker.Demand{})
							var be *broker.Error
							mu.Lock()
							defer mu.Unlock()
							switch errors.As(err, &be); {
							case err == nil && over:
								t.Errorf("job %s got a token after its end", job)
							case err == nil:
								got.got(job, token.ID)
								reasons["ok"]++
							default:
								reasons[string(be.Reason)]++
							}
						})
						time.Sleep(time.Duration(r.IntN(800)) * time.Millisecond)
					}
					wg.Wait()
					for job, tokens := range got.tokens {
						if len(tokens) != 1 {
							t.Errorf("job %s got %d tokens", job, len(tokens))
						}
					}
					if reasons["ok"] == 0 && reasons["AUTHORIZATION_REQUIRED"] == 0 || len(ended) == 0 { // a consent may die with its process
						t.Errorf("nothing was shown: %v, %d ended", reasons, len(ended))
					}
					if testing.Verbose() {
						t.Log(reasons, len(ended), "ended")
					}
				})
			})
		}
	}
}
