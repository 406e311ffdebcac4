//go:build chaos

package fleet_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/tokenbroker/tokenbroker/internal/faultproxy"
	"github.com/tokenbroker/tokenbroker/internal/fleet"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// Bounds of what chaos does, which its checks allow for.
const (
	longestFault = 6 * time.Second
	chaosLife    = 30 * time.Second // of a token
)

// TestChaos breaks a fleet at random, two or three things at a time, while
// callers go on asking. It runs for $CHAOSTIME from the seed $CHAOSSEED, and
// says which one it took. In the end everything is put right, and the fleet must
// agree on tokens as if nothing had been.
func TestChaos(t *testing.T) {
	length, err := time.ParseDuration(os.Getenv("CHAOSTIME"))
	if err != nil {
		length = time.Minute
	}
	seed, err := strconv.ParseUint(os.Getenv("CHAOSSEED"), 10, 64)
	if err != nil {
		seed = rand.Uint64()
	}
	fmt.Printf("chaos for %v; to see it again: make chaos CHAOSTIME=%v CHAOSSEED=%d\n", length, length, seed)

	f := newFleet(t, options{
		replicas: 4, tokenLife: chaosLife, redis: testredis.Start(t, testredis.Options{Persist: true}),
		profile: []string{"    timeout: 3s"}, logLevel: "info",
		world: func(o *sandbox.Options) { o.LockoutFailures = 1000 },
	})
	f.allow.upTo, f.allow.presentations = true, 2
	// Each replica on its own for all of the time, renewing at three quarters,
	// and once more for each thing that was done.
	f.allow.requests = 2 * len(f.replicas) * int(length/(chaosLife*3/5)+2)
	f.allow.back, f.allow.cutOff = chaosLife/10+longestFault, longestFault

	c := &chaos{f: f, random: rand.New(rand.NewPCG(seed, 0)), t: t}
	crowds := []*crowd{}
	for _, q := range []fleet.Question{plain, personal} {
		crowds = append(crowds, f.gather(fleet.Crowd{Question: q, Callers: 20, Connections: 1, Again: true, Pause: 200 * time.Millisecond}))
	}
	for _, crowd := range crowds {
		crowd.begin()
	}
	for end := time.Now().Add(length); time.Now().Before(end); {
		c.strike()
		c.rest(100, 2500)
	}
	for _, undo := range c.undo {
		undo.do()
	}
	f.endpoint.ClearFaults()
	for _, q := range []fleet.Question{plain, personal} {
		f.await("all replicas have the same token", 90*time.Second, func() bool {
			tokens := map[string]bool{}
			for _, r := range f.replicas {
				a := r.ask(q)
				tokens[a.TokenID] = a.OK()
			}
			for _, ok := range tokens {
				return ok && len(tokens) == 1
			}
			return false
		})
	}
	for _, crowd := range crowds {
		c.sum(crowd.end())
	}
	t.Logf("%d token requests", f.endpoint.Calls().Total)
}

// sum tells what a crowd went through.
func (c *chaos) sum(answers []fleet.Answer) {
	c.t.Helper()
	slices.SortFunc(answers, func(a, b fleet.Answer) int { return a.End.Compare(b.End) })
	outcomes := map[string]int{}
	var served, gapFrom time.Time
	var gap time.Duration
	for _, a := range answers {
		if a.Code == codes.Internal || a.Code == codes.Unknown {
			c.t.Errorf("a call failed in a way that nobody planned: %v", a)
		}
		if !a.OK() {
			outcomes[strings.TrimSpace(a.Code.String()+" "+a.Reason)]++
			continue
		}
		outcomes["OK from "+a.Source]++
		if d := a.End.Sub(served); !served.IsZero() && d > gap {
			gap, gapFrom = d, served
		}
		served = a.End
	}
	c.t.Logf("%d calls for %s: %v; nobody was served for %v from %s", len(answers), answers[0].Question.Profile, outcomes,
		gap.Round(time.Millisecond), gapFrom.Format(clock))
}

// chaos is what is broken now, and how to put it right.
type chaos struct {
	t      *testing.T
	f      *harness
	random *rand.Rand
	undo   []undo
}

type undo struct {
	at time.Time
	do func()
}

// rest lets so many milliseconds pass, and puts right what is due.
func (c *chaos) rest(least, most int) {
	for end := time.Now().Add(c.between(least, most)); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		left := c.undo[:0]
		for _, u := range c.undo {
			if time.Now().After(u.at) {
				u.do()
			} else {
				left = append(left, u)
			}
		}
		c.undo = left
	}
}

func (c *chaos) between(least, most int) time.Duration {
	return time.Duration(least+c.random.IntN(most-least)) * time.Millisecond
}

// later puts right what was done, in some seconds.
func (c *chaos) later(do func()) {
	c.undo = append(c.undo, undo{time.Now().Add(c.between(300, int(longestFault/time.Millisecond))), do})
}

// strike does one thing.
func (c *chaos) strike() {
	f := c.f
	r := f.replicas[c.random.IntN(len(f.replicas))]
	q := []fleet.Question{plain, personal}[c.random.IntN(2)]
	dead := faultproxy.Path{Swallow: true}
	network := []faultproxy.Faults{
		{Refuse: true},
		{Requests: dead, Replies: dead},
		{On: faultproxy.SubscribedConnections, Requests: dead, Replies: dead},
		{Requests: faultproxy.Path{Hold: true}},
		{Replies: faultproxy.Path{Hold: true}},
		{Replies: faultproxy.Path{Delay: 300 * time.Millisecond}},
		{DropMessages: true},
		{CutReply: isScript},
		{CutMidReply: faultproxy.Times(3, isScript)},
		{CutRequest: faultproxy.Times(5, isScript)},
	}[c.random.IntN(10)]
	deed := []struct {
		name string
		do   func()
	}{
		{"kill", func() { r.kill(); r.start() }},
		{"restart", func() {
			r.process.Continue()
			r.stop()
			r.start()
		}},
		{"freeze", func() {
			r.process.Pause()
			c.later(r.process.Continue)
		}},
		{"network of one", func() {
			r.redis.Set(network)
			c.later(r.redis.Heal)
		}},
		{"network of all", func() {
			for _, r := range f.replicas {
				r.redis.Set(network)
				c.later(r.redis.Heal)
			}
		}},
		{"redis frozen", func() {
			f.redis.Pause()
			c.later(f.redis.Continue)
		}},
		{"redis restarted", func() { f.redis.Restart() }},
		{"redis restarted empty", func() { f.redis.RestartEmpty() }},
		{"redis flushed", func() { _, _ = f.redis.Try("FLUSHALL") }},
		{"scripts flushed", func() { _, _ = f.redis.Try("SCRIPT", "FLUSH") }},
		{"endpoint", func() {
			fault := []sandbox.Fault{
				{Status: 500}, {Status: 429, Headers: map[string]string{"Retry-After": "3"}}, {Hang: true},
				{Cut: sandbox.CutAfter}, {Cut: sandbox.CutBefore}, {Delay: 2 * time.Second},
			}[c.random.IntN(6)]
			fault.Times = -1
			if err := f.endpoint.Fault(fault); err != nil {
				c.t.Fatal(err)
			}
			c.later(f.endpoint.ClearFaults)
		}},
		{"revoke", func() {
			if a := r.askWithin(time.Second, q); a.OK() {
				_ = r.revoke(q, a.TokenID) // it may be out of reach
				f.allow.requests++
			}
		}},
		{"report", func() {
			if a := r.askWithin(time.Second, q); a.OK() {
				q.Rejected = a.TokenID
				r.askWithin(time.Second, q)
				f.allow.requests++
			}
		}},
	}[c.random.IntN(13)]
	c.t.Logf("%s: %s, replica %d, %s", time.Now().Format(clock), deed.name, r.index, q.Profile)
	deed.do()
}
