// Package workloadtest is a SPIFFE Workload API for tests: a real gRPC server on
// a unix socket that says what a test tells it to.
package workloadtest

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/internal/testca"
)

// What the API hands out.
type (
	// Answer is all that a workload gets.
	Answer = workload.X509SVIDResponse
	// SVID is one of its identities.
	SVID = workload.X509SVID
)

// Domain is a trust domain with one authority.
type Domain struct {
	*testca.Authority
	Name string
}

// NewDomain returns a trust domain that nobody knew before.
func NewDomain(t testing.TB, name string) *Domain { return &Domain{testca.New(t), name} }

// Member returns the certificate of a member, as change, which may be nil,
// completes it. The path begins with a slash.
func (d *Domain) Member(path string, change func(*x509.Certificate)) tls.Certificate {
	return d.Leaf(func(c *x509.Certificate) {
		c.URIs = []*url.URL{{Scheme: "spiffe", Host: d.Name, Path: path}}
		c.KeyUsage = x509.KeyUsageDigitalSignature
		if change != nil {
			change(c)
		}
	})
}

// SVID returns a certificate as the API hands it out, with the domain's
// authority.
func (d *Domain) SVID(t testing.TB, member tls.Certificate) *SVID {
	t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(member.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	var chain []byte
	for _, der := range member.Certificate {
		chain = append(chain, der...)
	}
	return &SVID{SpiffeId: member.Leaf.URIs[0].String(), X509Svid: chain, X509SvidKey: key, Bundle: d.Certificate().Raw}
}

// ID is what the API calls the trust domain.
func (d *Domain) ID() string { return "spiffe://" + d.Name }

// API is the server. It begins without an answer: who asks waits.
type API struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	t      testing.TB
	socket string

	mu      sync.Mutex
	server  *grpc.Server // nil while it is away
	served  chan struct{}
	answer  *Answer
	refusal error         // instead of an answer
	changed chan struct{} // closed when answer or refusal have changed
	asked   int           // how many times the API was asked
}

// New starts an API. It ends with the test.
func New(t testing.TB) *API {
	t.Helper()
	dir, err := os.MkdirTemp("", "workload") // short: a socket's path has little room
	if err != nil {
		t.Fatal(err)
	}
	a := &API{t: t, socket: filepath.Join(dir, "api.sock"), changed: make(chan struct{})}
	t.Cleanup(func() {
		a.Stop()
		os.RemoveAll(dir)
	})
	a.Start()
	return a
}

// Address of the API.
func (a *API) Address() string { return "unix://" + a.socket }

// Start brings the API back.
func (a *API) Start() {
	a.t.Helper()
	ln, err := net.Listen("unix", a.socket)
	if err != nil {
		a.t.Fatal(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	server, served := grpc.NewServer(), make(chan struct{})
	a.server, a.served = server, served
	workload.RegisterSpiffeWorkloadAPIServer(server, a)
	go func() {
		defer close(served)
		_ = server.Serve(ln) // until Stop
	}()
}

// Stop takes the API away, open streams included.
func (a *API) Stop() {
	a.mu.Lock()
	server, served := a.server, a.served
	a.server = nil
	a.mu.Unlock()
	if server != nil {
		server.Stop()
		<-served
	}
}

// Say is the answer from now on, on open streams, too.
func (a *API) Say(answer *Answer) { a.set(answer, nil) }

// Refuse is what becomes of all streams from now on.
func (a *API) Refuse(code codes.Code, text string) { a.set(nil, status.Error(code, text)) }

// Asked is how many times the API was asked.
func (a *API) Asked() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.asked
}

func (a *API) set(answer *Answer, refusal error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.answer, a.refusal = answer, refusal
	close(a.changed)
	a.changed = make(chan struct{})
}

// FetchX509SVID implements the API.
func (a *API) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	if md, _ := metadata.FromIncomingContext(stream.Context()); len(md.Get("workload.spiffe.io")) != 1 || md.Get("workload.spiffe.io")[0] != "true" {
		return status.Error(codes.InvalidArgument, "the security header is missing")
	}
	a.mu.Lock()
	a.asked++
	a.mu.Unlock()
	for {
		a.mu.Lock()
		answer, refusal, changed := a.answer, a.refusal, a.changed
		a.mu.Unlock()
		if refusal != nil {
			return refusal
		}
		if answer != nil {
			if err := stream.Send(answer); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}
