package serviceaccount

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

const (
	// refreshAge is when keys are fetched again, while the old ones are used.
	refreshAge = 5 * time.Minute
	// staleAge is when keys are so old that tokens wait for newer ones. Nobody
	// came for so long.
	staleAge = 2 * refreshAge
	// fetchInterval is the least time from one fetch to the next, whatever
	// tokens ask for. It doubles with each failure in a row, up to
	// maxFetchInterval.
	fetchInterval    = 10 * time.Second
	maxFetchInterval = time.Minute
	// fetchTimeout ends a fetch. It is longer than what oauth allows, which
	// knows better what went wrong.
	fetchTimeout = 15 * time.Second
)

// remote is a keyring whose keys are behind a URL. The last good ones stay until
// there are others.
type remote struct {
	cluster string
	source  *Source
	fetch   func(ctx context.Context, s *Source) ([]byte, error)
	log     *slog.Logger

	keys atomic.Pointer[Keys] // nil until they are known

	mu       sync.Mutex // guards the rest; never held during a fetch
	fetched  time.Time  // when keys came; zero if none did
	next     time.Time  // from when on they may be fetched
	failures int        // in a row
	failure  string     // the last one's words; empty if there was none
	flight   *flight    // under way; nil when none is
}

// flight is one fetch that all share who want it. Done is closed at its end.
type flight struct{ done chan struct{} }

// newRemote returns the keyring of a cluster, with what the previous Verifier
// knows of it.
func newRemote(c Cluster, o Options) *remote {
	r := &remote{cluster: c.Name, source: c.Source, fetch: o.Fetch, log: o.Logger}
	if r.fetch == nil {
		r.fetch = fetchFrom(c.Source)
	}
	if o.Previous == nil || o.Previous.clusters[c.Issuer] == nil {
		return r
	}
	if known, ok := o.Previous.clusters[c.Issuer].keys.(*remote); ok && known.source.sameServer(c.Source) {
		known.mu.Lock()
		defer known.mu.Unlock()
		r.keys.Store(known.keys.Load())
		r.fetched = known.fetched
		if known.failures == 0 { // else the new token may be what it takes
			r.next = known.next
		}
	}
	return r
}

// fetchFrom asks a source's URL over connections of its own.
func fetchFrom(s *Source) func(context.Context, *Source) ([]byte, error) {
	transport := oauth.NewTransport(oauth.TransportConfig{TLS: &tls.Config{RootCAs: s.CA, MinVersion: tls.VersionTLS12}})
	return func(ctx context.Context, s *Source) ([]byte, error) { return transport.KeySet(ctx, s.URL, s.Token) }
}

func (s *Source) sameServer(other *Source) bool {
	return s.URL == other.URL && (s.CA == nil) == (other.CA == nil) && (s.CA == nil || s.CA.Equal(other.CA))
}

func (r *remote) current() *Keys { return r.keys.Load() }

// find implements keyring.
func (r *remote) find(ctx context.Context, id string) (key, *Keys, error) {
	keys := r.keys.Load()
	k, known := keys.find(id)
	flight, age := r.join(known)
	if flight != nil && (!known || age >= staleAge) {
		select {
		case <-flight.done:
		case <-ctx.Done():
			return key{}, nil, &Unavailable{"its keys have not come yet"}
		}
		keys = r.keys.Load()
		k, known = keys.find(id)
	}
	if known {
		return k, keys, nil
	}
	// It may be the cluster's newest, which the last fetch was to bring.
	if why := r.why(); keys == nil || why != "" {
		return key{}, nil, &Unavailable{"its keys could not be fetched: " + why}
	}
	return key{}, nil, errUnknownKey
}

// join returns the fetch under way, and how old the keys are. One is begun where
// it is due: a key is missing, or all are old, and the last was long enough ago.
func (r *remote) join(known bool) (*flight, time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	age := since(r.fetched)
	due := !known || age >= refreshAge
	if due && r.flight == nil && !time.Now().Before(r.next) {
		r.flight = &flight{done: make(chan struct{})}
		// It is nobody's in particular, so it ends with nobody's call, and
		// within its own time-out.
		go r.fly(r.flight)
	}
	if !due {
		return nil, age
	}
	return r.flight, age
}

// since is the time since t by the clock that says more: the monotonic one
// stands still while a machine sleeps, the other one may be set back.
func since(t time.Time) time.Duration {
	return max(time.Since(t), time.Now().Round(0).Sub(t.Round(0)))
}

// fly makes a fetch, and ends it whatever happens.
func (r *remote) fly(f *flight) {
	ctx, cancel := context.WithTimeout(context.Background(), fetchTimeout)
	defer cancel()
	keys, err := r.get(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	defer close(f.done)
	r.flight = nil
	if err != nil {
		r.failed(err)
		return
	}
	now := time.Now()
	r.fetched, r.next, r.failures, r.failure = now, now.Add(fetchInterval), 0, ""
	if was := r.keys.Load(); was == nil || !was.same(keys) {
		r.keys.Store(keys)
		r.log.Info("keys of service accounts fetched", "cluster", r.cluster, "keys", len(keys.byID))
	}
}

func (r *remote) get(ctx context.Context) (*Keys, error) {
	data, err := r.fetch(ctx, r.source)
	if authority := (x509.UnknownAuthorityError{}); errors.As(err, &authority) {
		return nil, fmt.Errorf("%w; or name it in ca", err)
	}
	if err != nil {
		return nil, err
	}
	keys, err := ParseKeys(data)
	if err != nil {
		return nil, fmt.Errorf("the answer cannot be used: %w", err)
	}
	return keys, nil
}

// failed notes that a fetch was in vain. It is called with the lock held.
func (r *remote) failed(err error) {
	wait := fetchInterval << min(r.failures, 10)
	r.failures, r.failure = r.failures+1, err.Error()
	r.next = time.Now().Add(min(wait, maxFetchInterval))
	r.log.Warn("keys of service accounts not fetched", "cluster", r.cluster, "known", r.keys.Load() != nil, "error", err.Error())
}

// why says why the last fetch was in vain; empty if it was not.
func (r *remote) why() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.failure
}
