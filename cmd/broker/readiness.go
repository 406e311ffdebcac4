package main

import (
	"net/http"
	"sync"
	"time"
)

const (
	// lingering is for how long a replica that is asked to stop goes on to take
	// in connections, if somebody watches its readiness: balancers look every
	// few seconds, and Kubernetes takes a moment to tell all nodes. Whoever
	// connects too late is cut off in the handshake, which is a failed call.
	lingering = 5 * time.Second
	// watchedEvery is how often readiness is asked for where it is watched.
	watchedEvery = time.Minute
)

// readiness says whether this replica can answer calls, and knows whether
// anybody watches that.
type readiness struct {
	mu       sync.Mutex // guards all below
	draining bool
	last     time.Time // when it was asked for; zero: never
	before   time.Time // when it was asked for before that
}

// watched notes who asks for /readyz, and passes all requests on. Pages that
// people look at ask for readiness as well, which is nobody's watch.
func (r *readiness) watched(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		if request.URL.Path == "/readyz" {
			r.asked()
		}
		next.ServeHTTP(w, request)
	})
}

// asked notes that somebody watches.
func (r *readiness) asked() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.before, r.last = r.last, time.Now()
}

// missing names what stands against answering calls.
func (r *readiness) missing() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.draining {
		return []string{"this replica is shutting down"}
	}
	return nil
}

// leave ends the readiness. It returns for how long all else should go on, for
// those who watch to notice.
func (r *readiness) leave() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.draining = true
	if r.before.IsZero() || time.Since(r.before) >= 2*watchedEvery || time.Since(r.last) >= watchedEvery {
		return 0
	}
	return lingering
}
