//go:build faults

package fleet_test

import (
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// Whatever an endpoint does instead of answering, the fleet tries as one: the
// next attempt, whoever makes it, keeps its distance from the last, and callers
// hear at once how long that is.
func TestEndpointFails(t *testing.T) {
	const (
		timeout = 2 * time.Second
		outage  = 20 * time.Second
	)
	for name, c := range map[string]struct {
		fault  sandbox.Fault
		reason string
		rest   time.Duration // more than the back-off, if the server says so
	}{
		"500":        {fault: sandbox.Fault{Status: 500, Body: "out of order"}},
		"502":        {fault: sandbox.Fault{Status: 502, Body: "<html>bad gateway</html>"}},
		"429":        {fault: sandbox.Fault{Status: 429, Headers: map[string]string{"Retry-After": "12"}}, reason: "ENDPOINT_THROTTLED", rest: 12 * time.Second},
		"503":        {fault: sandbox.Fault{Status: 503, Headers: map[string]string{"Retry-After": "12"}}, reason: "ENDPOINT_THROTTLED", rest: 12 * time.Second},
		"hang":       {fault: sandbox.Fault{Hang: true}},
		"slow drip":  {fault: sandbox.Fault{SlowDrip: 100 * time.Millisecond}},
		"html":       {fault: sandbox.Fault{Body: "<html>sign in</html>", Headers: map[string]string{"Content-Type": "text/html"}}},
		"empty":      {fault: sandbox.Fault{Status: 200}},
		"redirect":   {fault: sandbox.Fault{Status: 307, Headers: map[string]string{"Location": "http://vantage.test/elsewhere"}}},
		"cut before": {fault: sandbox.Fault{Cut: sandbox.CutBefore}},
		"cut after":  {fault: sandbox.Fault{Cut: sandbox.CutAfter}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, options{profile: []string{"    timeout: " + timeout.String()}})
			f.allow.requests, f.allow.upTo = 5, true
			c.fault.Times = -1
			if err := f.endpoint.Fault(c.fault); err != nil {
				t.Fatal(err)
			}
			for end := time.Now().Add(outage); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
				for _, a := range f.askAll(plain, f.replicas, 5) {
					if a.OK() || a.RetryAfter <= 0 || a.Reason != "ENDPOINT_UNAVAILABLE" && a.Reason != c.reason {
						t.Fatalf("want a typed error with a time to retry: %v, %v", a, a.RetryAfter)
					}
					if took := a.End.Sub(a.Begin); took > timeout+3*time.Second {
						t.Errorf("the error took %v: %v", took, a)
					}
				}
			}
			f.endpoint.ClearFaults()
			f.await("the fleet recovers", 40*time.Second, func() bool { return f.replicas[0].ask(plain).OK() })
			for _, r := range f.replicas {
				r.must(plain)
			}
			wantBackoff(t, f.endpoint.seen(), c.rest)
		})
	}
}

// wantBackoff checks the distance of each request from the end of the one
// before: 5 s, doubling, less a fifth of jitter, or what the server asked for.
func wantBackoff(t *testing.T, requests []request, least time.Duration) {
	t.Helper()
	rest := 5 * time.Second
	for i := 1; i < len(requests); i++ {
		want := max(rest*8/10, least)
		if distance := requests[i].arrived.Sub(requests[i-1].answered); distance < want-50*time.Millisecond {
			t.Errorf("request %d came %v after the one before, want %v", i+1, distance, want)
		}
		rest = min(2*rest, time.Minute)
	}
	if len(requests) < 2 {
		t.Errorf("%d requests: it was not tried again", len(requests))
	}
}

// Doubt about a refresh token while the access token lives costs nobody
// anything: it is served, and the refresh token rests.
func TestAnswerToARefreshIsLost(t *testing.T) {
	t.Parallel()
	f := newFleet(t, options{
		tokenLife: time.Minute,
		profile:   []string{"    timeout: 2s"},
		world:     func(o *sandbox.Options) { o.Clients[1].ReuseGrace = time.Hour },
	})
	f.allow.requests, f.allow.upTo, f.allow.presentations = 3, true, 2
	first := f.replicas[0].must(personal)
	for _, r := range f.replicas {
		r.must(personal)
	}
	if err := f.endpoint.Fault(sandbox.Fault{Grant: "refresh_token", Cut: sandbox.CutAfter}); err != nil {
		t.Fatal(err)
	}
	// Over the whole life of the token, and into that of the next.
	for end := first.Ends.Add(10 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		for _, r := range f.replicas {
			if a := r.ask(personal); !a.OK() && a.Reason != "ENDPOINT_UNAVAILABLE" {
				t.Fatalf("a call failed: %v", a)
			}
		}
	}
	if a := f.replicas[0].ask(personal); !a.OK() || a.TokenID == first.TokenID {
		t.Errorf("after the token's end: %v", a)
	}
}
