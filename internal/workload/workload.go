// Package workload takes the server's certificate, and the authorities of its
// callers, from the SPIFFE Workload API.
//
// A [Source] watches the API from its own goroutine and holds what it said last.
// Each handshake gets settings made of that, so that a new certificate or
// authority is in force with the next handshake, and open connections stay. The
// API need not be there: until it has answered once handshakes fail, and
// [Source.Missing] says why; later its last word stays in force, for as long as
// the certificates in it last.
//
// A caller is verified twice, and both must agree: by crypto/tls, against the
// authorities of all trust domains that are believed, and by go-spiffe, as a
// SPIFFE identity against the authorities of its own trust domain alone. So the
// authority of one trust domain cannot make members of another.
package workload

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

const (
	// slowest is how long a source waits between attempts to reach the API at
	// most. The API is on the same machine, and certificates are short-lived.
	slowest = 5 * time.Second
	// repeat is how often trouble that goes on is logged.
	repeat = 5 * time.Minute
)

// Options of a Source.
type Options struct {
	// Address of the API: "unix:" and a path, or "tcp://" and host:port. Required.
	Address string
	// TrustDomains whose members are believed; none means the trust domain of
	// the server's own identity.
	TrustDomains []string
	// Logger is told of new certificates, and of trouble. Never nil.
	Logger *slog.Logger
}

// Source is what the Workload API says, at any time. Make it with [Open]. It may be
// used from several goroutines.
type Source struct {
	address string
	log     *slog.Logger
	client  *workloadapi.Client
	stop    context.CancelFunc
	done    chan struct{} // closed when the goroutine has ended

	// current is nil until the API has answered.
	current atomic.Pointer[material]

	mu      sync.Mutex
	domains []spiffeid.TrustDomain   // that the config names
	said    *workloadapi.X509Context // last; nil until the API has answered
	trouble error                    // since said, or the start; nil is none
	since   time.Time                // of trouble
	told    time.Time                // when it was last logged
	digest  [sha256.Size]byte        // of what was last logged as taken over
}

// material is what handshakes are made of. It is immutable.
type material struct {
	id          spiffeid.ID
	certificate tls.Certificate
	end         time.Time // of the certificate, or what it comes with
	authorities *x509.CertPool
	bundles     *x509bundle.Set // of the trust domains that are believed, and no others
	empty       []string        // trust domains that are believed and have no authority
}

// Open begins to watch the API. It does not wait for it, and fails for a mistake
// in the options only.
func Open(o Options) (*Source, error) {
	s := &Source{address: o.Address, log: o.Logger, done: make(chan struct{}), since: time.Now()}
	if err := s.Believe(o.TrustDomains); err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	// Left to itself gRPC would try an API that was away for long every two minutes.
	reconnect := grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: .2, MaxDelay: slowest},
		MinConnectTimeout: slowest,
	}
	var err error
	s.client, err = workloadapi.New(ctx, workloadapi.WithAddr(o.Address), workloadapi.WithBackoffStrategy(strategy{}),
		workloadapi.WithDialOptions(grpc.WithConnectParams(reconnect)))
	if err != nil {
		stop()
		return nil, fmt.Errorf("the address of the Workload API, %s: %w", o.Address, err)
	}
	s.stop = stop
	go s.watch(ctx)
	return s, nil
}

// Close ends the watching, and waits for it. What was said last stays in force.
func (s *Source) Close() {
	s.stop()
	<-s.done
	_ = s.client.Close() // nothing of ours is under way any more
}

// watch runs until ctx ends.
func (s *Source) watch(ctx context.Context) {
	defer close(s.done)
	for ctx.Err() == nil {
		// It comes back when the API says that asking again is no use, which is
		// different when it has been configured.
		_ = s.client.WatchX509Context(ctx, watcher{s, ctx})
		select {
		case <-ctx.Done():
		case <-time.After(slowest):
		}
	}
}

// Believe changes whose members are believed: these trust domains, or, if there
// is none, that of the server's own identity.
func (s *Source) Believe(trustDomains []string) error {
	var domains []spiffeid.TrustDomain
	for _, name := range trustDomains {
		domain, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return fmt.Errorf("trust domain %q: %w", name, err)
		}
		domains = append(domains, domain)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.domains = domains
	if s.said != nil {
		s.current.Store(materialOf(s.said, domains))
	}
	return nil
}

// TLS returns base with the certificate and the authorities of this moment. The
// identity in a caller's certificate is checked as the last step of the handshake;
// base.ClientAuth says whether there must be one. Until the API has answered, every
// handshake fails.
func (s *Source) TLS(base *tls.Config) *tls.Config {
	c := base.Clone()
	m := s.current.Load()
	if m == nil {
		c.ClientCAs = x509.NewCertPool() // not the system's
		c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, errors.New(s.Missing()) }
		return c
	}
	c.Certificates, c.ClientCAs, c.VerifyConnection = []tls.Certificate{m.certificate}, m.authorities, m.verify
	return c
}

// verify holds a caller to the rules of SPIFFE, and to its own trust domain.
// Whether a caller may come without a certificate is not decided here.
func (m *material) verify(state tls.ConnectionState) error {
	if len(state.PeerCertificates) == 0 {
		return nil
	}
	_, _, err := x509svid.Verify(state.PeerCertificates, m.bundles)
	return err
}

// Missing says what keeps all handshakes from succeeding; empty if nothing does.
func (s *Source) Missing() string {
	m := s.current.Load()
	switch {
	case m == nil:
		why := "it has not answered yet"
		if _, err := s.state(); err != nil {
			why = err.Error()
		}
		return fmt.Sprintf("no certificate from the Workload API at %s: %s", s.address, why)
	case time.Now().After(m.end):
		return fmt.Sprintf("the certificate from the Workload API at %s has ended at %s", s.address, m.end.UTC().Format(time.RFC3339))
	case len(m.bundles.Bundles()) == 0:
		return fmt.Sprintf("the Workload API at %s has no authority of %v, so no caller can prove itself", s.address, m.empty)
	}
	return ""
}

// Degraded names what works less well than it should, though some handshakes
// succeed.
func (s *Source) Degraded() []string {
	m := s.current.Load()
	if m == nil {
		return nil
	}
	var all []string
	if since, err := s.state(); err != nil {
		all = append(all, fmt.Sprintf("the Workload API at %s does not answer since %s, and the certificate ends at %s: %v",
			s.address, since.UTC().Format(time.RFC3339), m.end.UTC().Format(time.RFC3339), err))
	}
	for _, domain := range m.empty {
		all = append(all, fmt.Sprintf("the Workload API at %s has no authority of %s, whose members cannot prove themselves", s.address, domain))
	}
	return all
}

// state is the trouble there is, and since when.
func (s *Source) state() (time.Time, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.since, s.trouble
}

// Ends tells when the server's certificate ends, and for each trust domain that
// is believed, when its last authority does: authorities overlap when they are
// replaced. Both are zero until the API has answered.
func (s *Source) Ends() (certificate time.Time, domains map[string]time.Time) {
	m := s.current.Load()
	if m == nil {
		return time.Time{}, nil
	}
	domains = map[string]time.Time{}
	for _, bundle := range m.bundles.Bundles() {
		var last time.Time
		for _, authority := range bundle.X509Authorities() {
			if authority.NotAfter.After(last) {
				last = authority.NotAfter
			}
		}
		domains[bundle.TrustDomain().Name()] = last
	}
	return m.end, domains
}

// materialOf makes material of what the API said: the first identity is the
// server's, as the standard has it.
func materialOf(said *workloadapi.X509Context, domains []spiffeid.TrustDomain) *material {
	svid := said.DefaultSVID()
	m := &material{
		id: svid.ID, certificate: tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]},
		end: svid.Certificates[0].NotAfter, authorities: x509.NewCertPool(), bundles: x509bundle.NewSet(),
	}
	for _, certificate := range svid.Certificates {
		m.certificate.Certificate = append(m.certificate.Certificate, certificate.Raw)
		if certificate.NotAfter.Before(m.end) {
			m.end = certificate.NotAfter
		}
	}
	if len(domains) == 0 {
		domains = []spiffeid.TrustDomain{svid.ID.TrustDomain()}
	}
	for _, domain := range domains {
		bundle, ok := said.Bundles.Get(domain)
		if !ok || bundle.Empty() {
			m.empty = append(m.empty, domain.Name())
			continue
		}
		m.bundles.Add(bundle)
		for _, authority := range bundle.X509Authorities() {
			m.authorities.AddCert(authority)
		}
	}
	return m
}

// fingerprint tells whether there is something new in it.
func (m *material) fingerprint() [sha256.Size]byte {
	parts := slices.Clone(m.certificate.Certificate)
	bundles := m.bundles.Bundles()
	slices.SortFunc(bundles, func(a, b *x509bundle.Bundle) int { return a.TrustDomain().Compare(b.TrustDomain()) })
	for _, bundle := range bundles {
		for _, authority := range bundle.X509Authorities() {
			parts = append(parts, authority.Raw)
		}
	}
	return sha256.Sum256(bytes.Join(parts, nil))
}

// watcher is told by the client what the API says, one thing at a time.
type watcher struct {
	*Source
	ctx context.Context // of the watching
}

// OnX509ContextUpdate implements workloadapi.X509ContextWatcher.
func (w watcher) OnX509ContextUpdate(said *workloadapi.X509Context) {
	s := w.Source
	s.mu.Lock()
	defer s.mu.Unlock()
	m := materialOf(said, s.domains)
	s.current.Store(m)
	digest := m.fingerprint()
	if s.trouble != nil || digest != s.digest {
		s.log.Info("certificate taken from the Workload API", "identity", m.id.String(), "expire_time", m.end.UTC(), "trust_domains", namesOf(m.bundles))
	}
	if len(m.empty) > 0 && digest != s.digest {
		s.log.Warn("the Workload API has no authority of some trust domains, whose members cannot prove themselves", "trust_domains", m.empty)
	}
	s.said, s.trouble, s.told, s.digest = said, nil, time.Time{}, digest
}

// OnX509ContextWatchError implements workloadapi.X509ContextWatcher.
func (w watcher) OnX509ContextWatchError(err error) {
	s := w.Source
	if w.ctx.Err() != nil {
		return // it is we who end
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.trouble == nil {
		s.since = now
	}
	s.trouble = err
	if now.Sub(s.told) < repeat {
		return
	}
	s.told = now
	s.log.Warn("nothing from the Workload API, the last certificate stays", "address", s.address, "since", s.since.UTC(), "error", err)
}

func namesOf(bundles *x509bundle.Set) []string {
	var names []string
	for _, bundle := range bundles.Bundles() {
		names = append(names, bundle.TrustDomain().Name())
	}
	slices.Sort(names)
	return names
}

// strategy has the client try again at once, and then ever more slowly.
type strategy struct{}

func (strategy) NewBackoff() workloadapi.Backoff { return &delay{} }

// delay is how long to wait; the zero value is the beginning.
type delay struct{ next time.Duration }

func (d *delay) Next() time.Duration {
	d.next = min(max(2*d.next, 100*time.Millisecond), slowest)
	return d.next
}

func (d *delay) Reset() { d.next = 0 }
