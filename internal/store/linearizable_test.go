package store

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
)

// What replicas see of one family must be as if all transitions had happened one
// after the other, each at some moment between its call and its return. A
// transition whose reply was lost may have happened then, or later, or never.

// family is the state of the model: the fence that was reserved last, the token
// that is current, and those that were dropped. A drop may take the lease that
// was under way with it.
type family struct {
	fence   broker.Generation
	taken   bool
	token   string
	dropped string // ids, each followed by a blank
}

type input struct {
	call  string // "acquire", "save", "drop" or "look"
	fence broker.Generation
	token string
}

type output struct {
	lost    bool
	granted bool
	fence   broker.Generation
	verdict broker.SaveVerdict
	token   string
}

var families = (&porcupine.NondeterministicModel{
	Init: func() []any { return []any{family{}} },
	Step: func(state, in, out any) []any {
		s, i, o := state.(family), in.(input), out.(output)
		if !o.lost {
			return s.step(i, o)
		}
		next := []any{s} // never happened
		switch i.call {
		case "save":
			next = append(next, s.step(i, output{verdict: broker.Saved, token: i.token})...)
		case "drop":
			next = append(next, s.step(i, output{})...)
		}
		return next
	},
	Equal: func(a, b any) bool { return a == b },
	DescribeOperation: func(in, out any) string {
		return fmt.Sprintf("%+v -> %+v", in, out)
	},
}).ToModel()

// step returns the state after a transition, or nothing if it cannot have
// answered so.
func (s family) step(i input, o output) []any {
	gone := slices.Contains(strings.Fields(s.dropped), i.token)
	switch i.call {
	case "acquire":
		if !o.granted {
			return []any{s}
		}
		if o.fence <= s.fence { // fences rise
			return nil
		}
		s.fence, s.taken = o.fence, false
	case "save":
		switch o.verdict {
		case broker.Saved:
			if i.fence < s.fence || gone {
				return nil
			}
			s.token = i.token
		case broker.Stale:
			if i.fence >= s.fence && !s.taken {
				return nil
			}
		case broker.WasDropped:
			if !gone {
				return nil
			}
		}
	case "drop":
		s.dropped += i.token + " "
		s.taken = true
		if s.token == i.token {
			s.token = ""
		}
	case "look":
		if o.token != s.token {
			return nil
		}
	}
	return []any{s}
}

var errReplyLost = errors.New("the reply was lost")

func TestRedisIsLinearizable(t *testing.T) {
	server := testredis.Start(t, testredis.Options{})
	k := testKeyset(t)
	replicas := []*Redis{replica(t, server.Address(), k), replica(t, server.Address(), k), replica(t, server.Address(), k)}
	for round := range 25 {
		seed := rand.Uint64()
		history := walkTogether(t, replicas, fmt.Sprint("family-", round), seed)
		result, _ := porcupine.CheckOperationsVerbose(families, history, 20*time.Second)
		if result != porcupine.Ok {
			for _, o := range history {
				t.Logf("%d: %d-%d %s", o.ClientId, o.Call, o.Return, families.DescribeOperation(o.Input, o.Output))
			}
			t.Fatalf("seed %d: no order of these explains the answers (%s)", seed, result)
		}
	}
}

// walkTogether has several owners on several replicas take leases of one family,
// save under them, drop tokens and look, all at once, and returns what each saw.
func walkTogether(t *testing.T, replicas []*Redis, name string, seed uint64) []porcupine.Operation {
	const owners, steps = 6, 12
	var mu sync.Mutex
	var history []porcupine.Operation
	began := time.Now()
	var wg sync.WaitGroup
	for owner := range owners {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(owner)))
			store := replicas[owner%len(replicas)]
			note := func(in input, run func() output) output {
				call := time.Since(began).Nanoseconds()
				out := run()
				end := time.Since(began).Nanoseconds()
				if out.lost {
					end = math.MaxInt64
				}
				mu.Lock()
				defer mu.Unlock()
				history = append(history, porcupine.Operation{ClientId: owner, Input: in, Call: call, Output: out, Return: end})
				return out
			}
			var last string
			for step := range steps {
				who := fmt.Sprintf("%d-%d", owner, step)
				got := note(input{call: "acquire"}, func() output {
					a, err := store.Acquire(t.Context(), broker.Claim{
						Family: name, Owner: who, Length: 5 * time.Millisecond, Demand: broker.Demand{NewerThan: math.MaxInt64},
					})
					return output{lost: err != nil, granted: a.Verdict == broker.Granted, fence: a.Fence}
				})
				if got.granted {
					time.Sleep(time.Duration(r.IntN(8)) * time.Millisecond) // some leases run out
					token := broker.StoredToken{Access: broker.NewSecret(name + who), Lifetime: time.Hour, Remaining: time.Hour}
					lease := broker.Lease{Family: name, Owner: who, Fence: got.fence, Length: 5 * time.Millisecond}
					last = token.Access.ID()
					note(input{call: "save", fence: got.fence, token: last}, func() output {
						return lossy(r, func(ctx context.Context) (output, error) {
							_, verdict, err := store.Save(ctx, lease, broker.Result{Token: token})
							return output{verdict: verdict}, err
						})
					})
				}
				if last != "" && r.IntN(6) == 0 {
					note(input{call: "drop", token: last}, func() output {
						return lossy(r, func(ctx context.Context) (output, error) {
							_, err := store.Drop(ctx, broker.Drop{Family: name, Operation: who, Token: last, Remember: time.Hour})
							return output{}, err
						})
					})
				}
				note(input{call: "look"}, func() output {
					record, err := store.Look(t.Context(), name, "")
					out := output{lost: err != nil}
					if record.Token != nil {
						out.token = record.Token.Access.ID()
					}
					return out
				})
			}
		})
	}
	wg.Wait()
	return history
}

// lossy loses a reply now and then: of a transition that happened, or that was
// never sent.
func lossy(r *rand.Rand, run func(context.Context) (output, error)) output {
	if r.IntN(10) == 0 {
		return output{lost: true}
	}
	out, err := run(context.Background())
	if r.IntN(10) == 0 {
		err = errReplyLost
	}
	if err != nil {
		return output{lost: true}
	}
	return out
}
