package fleet_test

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/fleet"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// allowance is what a test may cost. It is judged after every test.
type allowance struct {
	// requests to the token endpoint: exactly so many, or, with upTo, so many
	// at the most.
	requests int
	upTo     bool
	// presentations of one refresh token.
	presentations int
	// back is how much older than the token before a token may be: replicas
	// that each obtained one while they could not share agree on one later.
	back time.Duration
	// cutOff is how long the test keeps a replica from hearing of a drop.
	cutOff time.Duration
}

const (
	// dropBound is how long a token that was taken out of service may still be
	// handed out by a replica that did not hear of it.
	dropBound = 15 * time.Second
	// claimPrecision of the end that is written in a token.
	claimPrecision = time.Second
)

// check is made once, after every test, before any process is killed.
func (f *harness) check() {
	f.mu.Lock()
	checked := f.checked
	f.checked = true
	f.mu.Unlock()
	if checked {
		return
	}
	f.checkAnswers()
	f.checkEndpoint()
	f.checkStore()
	f.checkExits()
	f.checkLogs()
	if f.t.Failed() {
		f.report()
	}
}

// checkAnswers: nobody got a token that had ended, or that had been taken out of
// service for long, or an older one than before from the same replica.
func (f *harness) checkAnswers() {
	f.mu.Lock()
	defer f.mu.Unlock()
	tokens := f.endpoint.issues()
	lines := map[string][]fleet.Answer{} // by replica and what was asked for
	for _, a := range f.answers {
		if !a.OK() {
			continue
		}
		if _, known := tokens[a.TokenID]; !known {
			f.t.Errorf("a token that the endpoint never issued: %v", a)
			continue
		}
		if late := a.End.Sub(a.Ends); late > claimPrecision {
			f.t.Errorf("a token was served %v after its end: %v", late, a)
		}
		if at, dropped := f.drops[a.TokenID]; dropped && a.Begin.Sub(at) > dropBound+f.allow.cutOff {
			f.t.Errorf("a token was served %v after it was dropped: %v", a.Begin.Sub(at), a)
		}
		line := fmt.Sprint(a.Replica, a.Question.Profile, a.Question.Scopes)
		lines[line] = append(lines[line], a)
	}
	for _, answers := range lines {
		f.checkOrder(answers, tokens)
	}
}

// checkOrder compares answers of one replica: a call that began after another
// had ended must not get an older token.
func (f *harness) checkOrder(answers []fleet.Answer, tokens map[string]issued) {
	byEnd := slices.SortedFunc(slices.Values(answers), func(a, b fleet.Answer) int { return a.End.Compare(b.End) })
	byBegin := slices.SortedFunc(slices.Values(answers), func(a, b fleet.Answer) int { return a.Begin.Compare(b.Begin) })
	var newest fleet.Answer // of those that ended before the one that is looked at began
	ended := 0
	for _, a := range byBegin {
		for ; ended < len(byEnd) && byEnd[ended].End.Before(a.Begin); ended++ {
			if e := byEnd[ended]; newest.TokenID == "" || tokens[e.TokenID].at.After(tokens[newest.TokenID].at) {
				newest = e
			}
		}
		if newest.TokenID == "" || newest.TokenID == a.TokenID {
			continue
		}
		if back := tokens[newest.TokenID].at.Sub(tokens[a.TokenID].at); back > f.allow.back {
			f.t.Errorf("a token %v older than the one before:\n%v\n%v", back, newest, a)
			return // one is enough
		}
	}
}

// checkEndpoint: the endpoint was not asked more often than the test allows.
func (f *harness) checkEndpoint() {
	var calls sandbox.Calls
	f.await("the sandbox has counted all requests that arrived", 5*time.Second, func() bool {
		calls = f.endpoint.Calls()
		return calls.Total == len(f.endpoint.seen())
	})
	if calls.Total > f.allow.requests || calls.Total < f.allow.requests && !f.allow.upTo {
		f.t.Errorf("%d token requests, want %d (at most: %v)", calls.Total, f.allow.requests, f.allow.upTo)
	}
	for id, n := range f.endpoint.presentations() {
		if n > f.allow.presentations {
			f.t.Errorf("refresh token %s was presented %d times, want %d at most", id, n, f.allow.presentations)
		}
	}
}

// mostKeys of Redis are looked into; thousands of jobs have one each.
const mostKeys = 300

// checkStore: nothing in Redis can be read without the keyset.
func (f *harness) checkStore() {
	if f.redis == nil || !f.redis.Alive() {
		return
	}
	f.redis.Continue()
	keys, err := f.redis.Try("KEYS", "*")
	if err != nil {
		f.t.Errorf("looking into Redis: %v", err)
		return
	}
	secrets := f.endpoint.confidential()
	list, _ := keys.([]any)
	for _, key := range list[:min(len(list), mostKeys)] {
		content, err := f.redis.Try("HGETALL", key)
		if err != nil { // not a hash: then the serialised value has to do
			content, _ = f.redis.Try("DUMP", key)
		}
		for _, s := range secrets {
			if strings.Contains(fmt.Sprint(content), s) {
				f.t.Errorf("Redis has a secret in clear, in %v: %.8s…", key, s)
			}
		}
	}
}

// checkExits: whoever lives ends when asked, in time and without complaint, and
// nobody ended before.
func (f *harness) checkExits() {
	var stopping []*replica
	for _, r := range f.replicas {
		if r.process == nil {
			continue
		}
		r.process.Continue()
		if r.process.Alive() {
			r.terminate()
			stopping = append(stopping, r)
		}
	}
	for _, r := range stopping {
		r.awaitExit()
	}
	for _, r := range f.replicas {
		for i, p := range r.processes {
			if p.Alive() || r.killed[p] {
				continue
			}
			if code := p.ExitCode(); code != 0 {
				f.t.Errorf("replica %d, process %d: exit status %d", r.index, i, code)
			}
		}
	}
}

// checkLogs: no panic, and no secret.
func (f *harness) checkLogs() {
	secrets := f.endpoint.confidential()
	for _, r := range f.replicas {
		for _, p := range r.processes {
			text := p.Log()
			for _, word := range []string{"panic", "goroutine 1 [", "fatal error", "DATA RACE"} {
				if strings.Contains(text, word) {
					f.t.Errorf("the log of replica %d says %q", r.index, word)
				}
			}
			for _, s := range secrets {
				if strings.Contains(text, s) {
					f.t.Errorf("the log of replica %d has a secret: %.8s…", r.index, s)
				}
			}
		}
	}
}

// report helps to find out why a test failed.
func (f *harness) report() {
	for _, r := range f.endpoint.seen() {
		f.t.Logf("token request: %s %s by replica %d at %s, answered at %s with %d %s, token %s", r.grant, r.client, r.replica,
			r.arrived.Format(clock), r.answered.Format(clock), r.status, r.code, r.tokenID)
	}
	for _, r := range f.replicas {
		if r.process != nil {
			f.t.Logf("end of the log of replica %d:\n%s", r.index, r.tail())
		}
	}
}

const clock = "15:04:05.000"

// await polls until the condition holds.
func (f *harness) await(what string, within time.Duration, condition func() bool) {
	f.t.Helper()
	for deadline := time.Now().Add(within); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			f.t.Fatalf("waiting until %s: not within %v", what, within)
		}
	}
}

// receive waits for something that must come.
func receive[T any](f *harness, what string, ch <-chan T) T {
	f.t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(40 * time.Second):
		f.t.Fatalf("waiting until %s: not within 40 s", what)
		panic("unreachable")
	}
}
