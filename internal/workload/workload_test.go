package workload_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	workloadpb "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"

	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/workload"
	"github.com/tokenbroker/tokenbroker/internal/workload/workloadtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// stage is a source that watches an API.
type stage struct {
	*testing.T
	api    *workloadtest.API
	source *workload.Source
	log    *buffer
}

func newStage(t *testing.T, api *workloadtest.API, trustDomains ...string) *stage {
	t.Helper()
	s := &stage{T: t, api: api, log: &buffer{}}
	var err error
	s.source, err = workload.Open(workload.Options{Address: api.Address(), TrustDomains: trustDomains, Logger: slog.New(slog.NewJSONHandler(s.log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.source.Close)
	return s
}

func (s *stage) await(what string, condition func() bool) {
	s.Helper()
	for deadline := time.Now().Add(30 * time.Second); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			s.Fatalf("waiting until %s: not within 30 s; missing %q\n%s", what, s.source.Missing(), s.log)
		}
	}
}

func (s *stage) ready() {
	s.Helper()
	s.await("it is ready", func() bool { return s.source.Missing() == "" })
}

var base = &tls.Config{MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAndVerifyClientCert, SessionTicketsDisabled: true}

// meet has a client with that certificate connect. It returns what the server
// made of it, and what the server showed.
func (s *stage) meet(client tls.Certificate) (tls.ConnectionState, *x509.Certificate, error) {
	s.Helper()
	return s.meetWith(base, client)
}

func (s *stage) meetWith(base *tls.Config, client tls.Certificate) (tls.ConnectionState, *x509.Certificate, error) {
	s.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.Fatal(err)
	}
	defer ln.Close()
	var shown *x509.Certificate
	met := make(chan struct{})
	go func() {
		defer close(met)
		conn, err := tls.Dial("tcp", ln.Addr().String(), &tls.Config{
			InsecureSkipVerify: true, // the server's verdict is what counts here
			Certificates:       []tls.Certificate{client},
			VerifyConnection: func(state tls.ConnectionState) error {
				shown = state.PeerCertificates[0]
				return nil
			},
		})
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = conn.Read(make([]byte, 1)) // until the server closes
	}()
	raw, err := ln.Accept()
	if err != nil {
		s.Fatal(err)
	}
	conn := tls.Server(raw, &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return s.source.TLS(base), nil }})
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	err = conn.Handshake()
	state := conn.ConnectionState()
	conn.Close()
	<-met
	return state, shown, err
}

func answer(t *testing.T, d *workloadtest.Domain, change func(*x509.Certificate), federated ...*workloadtest.Domain) *workloadpb.X509SVIDResponse {
	t.Helper()
	r := &workloadpb.X509SVIDResponse{Svids: []*workloadpb.X509SVID{d.SVID(t, d.Member("/broker", change))}, FederatedBundles: map[string][]byte{}}
	for _, other := range federated {
		r.FederatedBundles[other.ID()] = other.Certificate().Raw
	}
	return r
}

func TestNothingUntilTheAPIAnswers(t *testing.T) {
	api, domain := workloadtest.New(t), workloadtest.NewDomain(t, "prod.test")
	api.Stop()
	s := newStage(t, api)
	if _, _, err := s.meet(domain.Member("/worker", nil)); err == nil {
		t.Error("a handshake succeeded without a certificate")
	}
	s.await("the trouble is named", func() bool {
		return strings.HasPrefix(s.source.Missing(), "no certificate from the Workload API at "+api.Address()+": ") && strings.Contains(s.source.Missing(), "Unavailable")
	})
	if end, domains := s.source.Ends(); !end.IsZero() || domains != nil {
		t.Errorf("ends: %v, %v", end, domains)
	}

	api.Start() // it has nothing to say yet
	s.await("it has asked", func() bool { return api.Asked() > 0 })
	if s.source.Missing() == "" {
		t.Error("ready without an answer")
	}
	end := time.Now().Add(10 * time.Minute).UTC().Truncate(time.Second)
	api.Say(answer(t, domain, func(c *x509.Certificate) { c.NotAfter = end }))
	s.ready()
	state, shown, err := s.meet(domain.Member("/worker", nil))
	if err != nil {
		t.Fatal(err)
	}
	if len(state.VerifiedChains) == 0 || state.VerifiedChains[0][0].URIs[0].String() != "spiffe://prod.test/worker" || shown.URIs[0].String() != "spiffe://prod.test/broker" {
		t.Errorf("verified %v, shown %v", state.VerifiedChains, shown.URIs)
	}
	got, domains := s.source.Ends()
	if !got.Equal(end) || len(domains) != 1 || !domains["prod.test"].Equal(domain.Certificate().NotAfter) {
		t.Errorf("ends: %v, %v", got, domains)
	}
	if log := s.log.String(); strings.Count(log, "nothing from the Workload API") != 1 || !strings.Contains(log, `"identity":"spiffe://prod.test/broker"`) {
		t.Errorf("the log has\n%s", log)
	}
}

// TestMembers has two trust domains that are believed, one that is federated and
// is not, and one that the API does not know.
func TestMembers(t *testing.T) {
	api := workloadtest.New(t)
	own, friend, other, stranger := workloadtest.NewDomain(t, "own.test"), workloadtest.NewDomain(t, "friend.test"), workloadtest.NewDomain(t, "other.test"), workloadtest.NewDomain(t, "stranger.test")
	api.Say(answer(t, own, nil, friend, other))
	s := newStage(t, api, "own.test", "friend.test")
	s.ready()
	claiming := func(d *workloadtest.Domain, name string) tls.Certificate {
		return (&workloadtest.Domain{Authority: d.Authority, Name: name}).Member("/worker", nil)
	}
	uris := func(d *workloadtest.Domain, all ...string) tls.Certificate {
		return d.Member("/worker", func(c *x509.Certificate) {
			c.URIs = nil
			for _, raw := range all {
				u, err := url.Parse(raw)
				if err != nil {
					t.Fatal(err)
				}
				c.URIs = append(c.URIs, u)
			}
		})
	}
	between := &workloadtest.Domain{Authority: own.Intermediate("between"), Name: "own.test"}
	for name, c := range map[string]struct {
		client tls.Certificate
		ok     bool
	}{
		"a member":                              {own.Member("/worker", nil), true},
		"a member, by an intermediate":          {between.Member("/worker", nil), true},
		"a member of a federated trust domain":  {friend.Member("/worker", nil), true},
		"of one that is not believed":           {other.Member("/worker", nil), false},
		"of one that nobody knows":              {stranger.Member("/worker", nil), false},
		"of ours, by our friend's authority":    {claiming(friend, "own.test"), false},
		"of our friend's, by our authority":     {claiming(own, "friend.test"), false},
		"of another's, by our authority":        {claiming(own, "other.test"), false},
		"of ours, by an intermediate elsewhere": {(&workloadtest.Domain{Authority: friend.Intermediate("between"), Name: "own.test"}).Member("/worker", nil), false},
		"a DNS name only":                       {own.Leaf(testca.Named("worker.example.com")), false},
		"no name at all":                        {own.Leaf(func(*x509.Certificate) {}), false},
		"two identities":                        {uris(own, "spiffe://own.test/a", "spiffe://own.test/b"), false},
		"a URI that is no SPIFFE ID":            {uris(own, "https://own.test/worker"), false},
		"an authority":                          {own.Member("/worker", func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }), false},
		"a key that signs certificates":         {own.Member("/worker", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCertSign }), false},
		"ended":                                 {own.Member("/worker", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), false},
		"not begun":                             {own.Member("/worker", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), false},
		"not for clients":                       {own.Member("/worker", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }), false},
		"no certificate":                        {tls.Certificate{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if _, _, err := s.meet(c.client); (err == nil) != c.ok {
				t.Errorf("got %v, want success: %t", err, c.ok)
			}
		})
	}

	// Whom to believe can change.
	if err := s.source.Believe(nil); err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.meet(friend.Member("/worker", nil)); err == nil {
		t.Error("a member of another trust domain was accepted, though none is named")
	}
	if _, _, err := s.meet(own.Member("/worker", nil)); err != nil {
		t.Errorf("a member of our own: %v", err)
	}
	if err := s.source.Believe([]string{"not a domain"}); err == nil {
		t.Error("that is no trust domain")
	}
}

// Callers may prove themselves otherwise, where the config says so; a certificate
// must be good all the same.
func TestCertificatesThatAreNotNeeded(t *testing.T) {
	api, own, other := workloadtest.New(t), workloadtest.NewDomain(t, "own.test"), workloadtest.NewDomain(t, "other.test")
	optional := base.Clone()
	optional.ClientAuth = tls.VerifyClientCertIfGiven
	api.Stop()
	s := newStage(t, api)
	if _, _, err := s.meetWith(optional, tls.Certificate{}); err == nil {
		t.Error("a handshake succeeded before there was a certificate")
	}
	api.Start()
	api.Say(answer(t, own, nil))
	s.ready()
	for name, c := range map[string]struct {
		client tls.Certificate
		ok     bool
	}{
		"none":         {tls.Certificate{}, true},
		"a member's":   {own.Member("/worker", nil), true},
		"a stranger's": {other.Member("/worker", nil), false},
		"of nobody":    {own.Leaf(testca.Named("worker.example.com")), false},
	} {
		if _, _, err := s.meetWith(optional, c.client); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestFirstOfSeveralIdentitiesIsTheServers(t *testing.T) {
	api, one, two := workloadtest.New(t), workloadtest.NewDomain(t, "one.test"), workloadtest.NewDomain(t, "two.test")
	api.Say(&workloadpb.X509SVIDResponse{Svids: []*workloadpb.X509SVID{one.SVID(t, one.Member("/first", nil)), two.SVID(t, two.Member("/second", nil))}})
	s := newStage(t, api)
	s.ready()
	_, shown, err := s.meet(one.Member("/worker", nil))
	if err != nil || shown.URIs[0].String() != "spiffe://one.test/first" {
		t.Errorf("shown %v, %v", shown.URIs, err)
	}
	if _, _, err := s.meet(two.Member("/worker", nil)); err == nil {
		t.Error("a member of the other identity's trust domain was accepted")
	}
}

// TestLastWordStays has the API say things that cannot be used, and go away.
func TestLastWordStays(t *testing.T) {
	domain, other := workloadtest.NewDomain(t, "prod.test"), workloadtest.NewDomain(t, "other.test")
	good := func() *workloadpb.X509SVIDResponse { return answer(t, domain, nil) }
	for name, spoil := range map[string]func(*workloadtest.API){
		"no identity any more":  func(a *workloadtest.API) { a.Refuse(codes.PermissionDenied, "no identity issued") },
		"not to be asked again": func(a *workloadtest.API) { a.Refuse(codes.InvalidArgument, "security header missing") },
		"canceled":              func(a *workloadtest.API) { a.Refuse(codes.Canceled, "gone") },
		"an empty answer":       func(a *workloadtest.API) { a.Say(&workloadpb.X509SVIDResponse{}) },
		"a certificate that is none": func(a *workloadtest.API) {
			r := good()
			r.Svids[0].X509Svid = []byte("certificate")
			a.Say(r)
		},
		"a key that is none": func(a *workloadtest.API) {
			r := good()
			r.Svids[0].X509SvidKey = nil
			a.Say(r)
		},
		"another's key": func(a *workloadtest.API) {
			r := good()
			r.Svids[0].X509SvidKey = good().Svids[0].X509SvidKey
			a.Say(r)
		},
		"a bundle that is none": func(a *workloadtest.API) {
			r := good()
			r.Svids[0].Bundle = []byte{1, 2, 3}
			a.Say(r)
		},
		"a federated bundle that is none": func(a *workloadtest.API) {
			r := good()
			r.FederatedBundles[other.ID()] = []byte{1}
			a.Say(r)
		},
		"a trust domain that is none": func(a *workloadtest.API) {
			r := good()
			r.FederatedBundles["spiffe://a b"] = other.Certificate().Raw
			a.Say(r)
		},
		"gone": func(a *workloadtest.API) { a.Stop() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			api := workloadtest.New(t)
			api.Say(good())
			s := newStage(t, api)
			s.ready()
			_, before, err := s.meet(domain.Member("/worker", nil))
			if err != nil {
				t.Fatal(err)
			}
			spoil(api)
			s.await("the trouble is told", func() bool { return len(s.source.Degraded()) == 1 })
			if missing := s.source.Missing(); missing != "" {
				t.Errorf("missing: %s", missing)
			}
			_, after, err := s.meet(domain.Member("/worker", nil))
			if err != nil || !after.Equal(before) {
				t.Errorf("the last certificate is not in force: %v", err)
			}
			if name == "gone" {
				api.Start()
			}
			api.Say(good())
			s.await("the trouble is over", func() bool { return len(s.source.Degraded()) == 0 })
			if _, after, err = s.meet(domain.Member("/worker", nil)); err != nil || after.Equal(before) {
				t.Errorf("the new certificate is not in force: %v", err)
			}
			if log := s.log.String(); strings.Count(log, "nothing from the Workload API") != 1 || strings.Count(log, "certificate taken") != 2 {
				t.Errorf("the log has\n%s", log)
			}
		})
	}
}

func TestTrustDomainsWithoutAuthorities(t *testing.T) {
	api, domain := workloadtest.New(t), workloadtest.NewDomain(t, "prod.test")
	empty := answer(t, domain, nil)
	empty.Svids[0].Bundle = nil
	api.Say(empty)
	s := newStage(t, api)
	want := "the Workload API at " + api.Address() + " has no authority of [prod.test], so no caller can prove itself"
	s.await("that is told", func() bool { return s.source.Missing() == want })
	if _, _, err := s.meet(domain.Member("/worker", nil)); err == nil {
		t.Error("a caller was accepted whom nobody vouches for")
	}

	api.Say(answer(t, domain, nil))
	s.ready()
	if err := s.source.Believe([]string{"prod.test", "missing.test"}); err != nil {
		t.Fatal(err)
	}
	if got := s.source.Degraded(); len(got) != 1 || !strings.Contains(got[0], "no authority of missing.test") {
		t.Errorf("degraded: %q", got)
	}
	if _, _, err := s.meet(domain.Member("/worker", nil)); err != nil {
		t.Error(err)
	}
}

func TestEndedCertificateIsTold(t *testing.T) {
	api, domain := workloadtest.New(t), workloadtest.NewDomain(t, "prod.test")
	api.Say(answer(t, domain, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }))
	s := newStage(t, api)
	s.await("that is told", func() bool { return strings.Contains(s.source.Missing(), "has ended at ") })
}

func TestAuthoritiesThatChange(t *testing.T) {
	api, old := workloadtest.New(t), workloadtest.NewDomain(t, "prod.test")
	renewed := workloadtest.NewDomain(t, "prod.test")
	api.Say(answer(t, old, nil))
	s := newStage(t, api)
	s.ready()
	both := answer(t, renewed, nil)
	both.Svids[0].Bundle = append(bytes.Clone(old.Certificate().Raw), renewed.Certificate().Raw...)
	api.Say(both)
	s.await("the new authority is believed", func() bool { _, _, err := s.meet(renewed.Member("/worker", nil)); return err == nil })
	if _, _, err := s.meet(old.Member("/worker", nil)); err != nil {
		t.Errorf("while both are there: %v", err)
	}
	api.Say(answer(t, renewed, nil))
	s.await("the old authority is believed no more", func() bool { _, _, err := s.meet(old.Member("/worker", nil)); return err != nil })
}

func TestBadOptions(t *testing.T) {
	for _, o := range []workload.Options{
		{Address: "/run/api.sock"}, {Address: "http://127.0.0.1:1"}, {Address: "tcp://localhost:1"},
		{Address: "unix:///run/api.sock", TrustDomains: []string{"UPPER CASE"}},
	} {
		o.Logger = slog.New(slog.DiscardHandler)
		if s, err := workload.Open(o); err == nil {
			s.Close()
			t.Errorf("%+v was accepted", o)
		}
	}
}

var errNone = errors.New("none")

// A source can be asked while it changes.
func TestManyAtOnce(t *testing.T) {
	api, domain := workloadtest.New(t), workloadtest.NewDomain(t, "prod.test")
	api.Say(answer(t, domain, nil))
	s := newStage(t, api)
	s.ready()
	member := domain.Member("/worker", nil)
	stop, failed := make(chan struct{}), make(chan error, 8)
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			result := errNone
			for {
				select {
				case <-stop:
					failed <- result
					return
				default:
				}
				if _, _, err := s.meet(member); err != nil {
					failed <- err
					return
				}
				result = nil
				s.source.Degraded()
				s.source.Ends()
			}
		})
	}
	for i := range 50 {
		end := time.Now().Add(time.Duration(i+1) * time.Minute).UTC().Truncate(time.Second)
		api.Say(answer(t, domain, func(c *x509.Certificate) { c.NotAfter = end }))
		s.await(fmt.Sprintf("certificate %d is in force", i), func() bool { got, _ := s.source.Ends(); return got.Equal(end) })
		if err := s.source.Believe([]string{"prod.test", fmt.Sprintf("other%d.test", i)}); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	group.Wait()
	for range 8 {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
}
