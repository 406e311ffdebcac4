package client_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/client"
	"github.com/tokenbroker/tokenbroker/internal/testca"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// folder is a directory with files.
type folder struct {
	t   testing.TB
	dir string
}

func (f folder) path(name string) string { return filepath.Join(f.dir, name) }

// overwrite writes a file in place, as careless tools do.
func (f folder) overwrite(name string, content []byte) string {
	f.t.Helper()
	if err := os.WriteFile(f.path(name), content, 0o600); err != nil {
		f.t.Fatal(err)
	}
	return f.path(name)
}

// replace puts a file in place at once.
func (f folder) replace(name string, content []byte) string {
	f.t.Helper()
	if err := os.Rename(f.overwrite(name+".new", content), f.path(name)); err != nil {
		f.t.Fatal(err)
	}
	return f.path(name)
}

// headers is a broker that notes what says who calls.
type headers struct {
	pb.UnimplementedTokenBrokerServer
	mu   sync.Mutex
	seen []string // authorization of each call
	user string   // user agent of the last one
}

func (h *headers) WhoAmI(ctx context.Context, _ *pb.WhoAmIRequest) (*pb.WhoAmIResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.seen, h.user = append(h.seen, strings.Join(md["authorization"], " and ")), strings.Join(md["user-agent"], " and ")
	return &pb.WhoAmIResponse{}, nil
}

// serve runs a server until the test ends, and returns its address.
func (h *headers) serve(t testing.TB, network, address string, options ...grpc.ServerOption) string {
	t.Helper()
	ln, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(options...)
	pb.RegisterTokenBrokerServer(g, h)
	go func() { _ = g.Serve(ln) }() // until Stop
	t.Cleanup(g.Stop)
	return ln.Addr().String()
}

func whoami(t testing.TB, options ...client.Option) error {
	t.Helper()
	c, err := client.New(options...)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.Stub().WhoAmI(t.Context(), &pb.WhoAmIRequest{})
	return err
}

// Kubernetes replaces a token while a client runs: each call has the one that is
// there.
func TestTokenFileIsReadForEachCall(t *testing.T) {
	h := &headers{}
	f := folder{t, t.TempDir()}
	path := f.overwrite("token", []byte("one"))
	c, err := client.New(client.WithAddress(h.serve(t, "tcp", "127.0.0.1:0")), client.WithTokenFile(path), client.WithUserAgent("biller/1.2"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, token := range []string{"one", "two\n", "three\r\n"} {
		f.overwrite("token", []byte(token))
		if _, err := c.Stub().WhoAmI(t.Context(), &pb.WhoAmIRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Stub().WhoAmI(t.Context(), &pb.WhoAmIRequest{}); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("without the file: %v", err)
	}
	if got := strings.Join(h.seen, ", "); got != "Bearer one, Bearer two, Bearer three" || !strings.HasPrefix(h.user, "biller/1.2 ") {
		t.Errorf("the broker saw %s from %s", got, h.user)
	}
}

// What the program does not say comes from the environment, and what it says counts.
func TestEnvironment(t *testing.T) {
	h := &headers{}
	ca := testca.New(t)
	f := folder{t, t.TempDir()}
	leaf := ca.Leaf(testca.Loopback)
	certificate, key := testca.PEM(t, ca.Leaf(testca.Named("worker.test")))
	var names []string
	address := h.serve(t, "tcp", "127.0.0.1:0", grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{leaf}, ClientCAs: ca.Pool(), ClientAuth: tls.VerifyClientCertIfGiven,
		VerifyConnection: func(s tls.ConnectionState) error {
			name := "nobody"
			if len(s.PeerCertificates) > 0 {
				name = s.PeerCertificates[0].DNSNames[0]
			}
			names = append(names, name)
			return nil
		},
	})))
	t.Setenv("BROKER_ADDRESS", address)
	t.Setenv("BROKER_CA", f.overwrite("ca.crt", ca.PEM()))
	t.Setenv("BROKER_CERTIFICATE", f.overwrite("tls.crt", certificate))
	t.Setenv("BROKER_PRIVATE_KEY", f.overwrite("tls.key", key))
	t.Setenv("BROKER_TOKEN_FILE", f.overwrite("token", []byte("one")))
	if err := whoami(t); err != nil {
		t.Fatal(err)
	}
	if err := whoami(t, client.WithCertificate("", ""), client.WithTokenFile("")); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(names, ", "); got != "worker.test, nobody" || strings.Join(h.seen, ", ") != "Bearer one, " || !strings.HasPrefix(h.user, "token-broker-go ") {
		t.Errorf("the broker saw %s, %q, %s", got, h.seen, h.user)
	}
	plain := &headers{}
	socket := filepath.Join(f.dir, "s")
	plain.serve(t, "unix", socket)
	if err := whoami(t, client.WithAddress("unix:"+socket), client.WithCA(""), client.WithCertificate("", "")); err != nil || len(plain.seen) != 1 {
		t.Errorf("over a socket: %v", err)
	}
}

func TestFilesThatCannotBeUsed(t *testing.T) {
	ca := testca.New(t)
	certificate, key := testca.PEM(t, ca.Leaf(testca.Named("a.test")))
	_, other := testca.PEM(t, ca.Leaf(testca.Named("b.test")))
	f := folder{t, t.TempDir()}
	f.overwrite("good.crt", certificate)
	f.overwrite("good.key", key)
	f.overwrite("other.key", other)
	f.overwrite("empty", nil)
	f.overwrite("cut", append(ca.PEM(), ca.PEM()[:300]...))
	for name, c := range map[string]struct {
		option        client.Option
		setting, text string
	}{
		"no CA":                  {client.WithCA("/no/such/file"), "ca", "/no/such/file: no such file"},
		"empty CA":               {client.WithCA(f.path("empty")), "ca", "holds no PEM certificate"},
		"CA in the making":       {client.WithCA(f.path("cut")), "ca", "in the middle of a PEM block"},
		"no key":                 {client.WithCertificate(f.path("good.crt"), ""), "certificate and private-key", "go together"},
		"no certificate":         {client.WithCertificate("", f.path("good.key")), "certificate and private-key", "go together"},
		"missing key":            {client.WithCertificate(f.path("good.crt"), "/no/such/key"), "certificate and private-key", "/no/such/key: no such file"},
		"another key":            {client.WithCertificate(f.path("good.crt"), f.path("other.key")), "certificate and private-key", "does not match"},
		"a key as a certificate": {client.WithCertificate(f.path("good.key"), f.path("good.key")), "certificate and private-key", "holds no PEM certificate"},
		"no token":               {client.WithTokenFile("/no/such/file"), "token-file", "/no/such/file: no such file"},
		"an empty token":         {client.WithTokenFile(f.overwrite("line", []byte("\n"))), "token-file", "does not hold one token and nothing else"},
		"two tokens":             {client.WithTokenFile(f.overwrite("two", []byte("canary-1\ncanary-2"))), "token-file", "does not hold one token and nothing else"},
		"blanks":                 {client.WithTokenFile(f.overwrite("blanks", []byte(" canary"))), "token-file", "does not hold one token and nothing else"},
		"a huge token":           {client.WithTokenFile(f.overwrite("huge", []byte(strings.Repeat("canary", 10000)))), "token-file", "larger than"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := client.New(client.WithAddress("127.0.0.1:1"), c.option)
			var file *client.FileError
			if !errors.As(err, &file) || file.Setting != c.setting || !strings.Contains(err.Error(), c.text) || strings.Contains(err.Error(), "canary") {
				t.Errorf("got %v", err)
			}
		})
	}
}

// Nothing leaves this machine in clear, and who is not who he should be gets no
// call. The errors say which file it is about.
func TestWhoIsNotTrusted(t *testing.T) {
	ca, other := testca.New(t), testca.New(t)
	f := folder{t, t.TempDir()}
	h := &headers{}
	leaf := ca.Leaf(testca.Loopback)
	asks := grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{leaf}, ClientCAs: ca.Pool(), ClientAuth: tls.RequireAndVerifyClientCert}))
	secure, plain := h.serve(t, "tcp", "127.0.0.1:0", asks), h.serve(t, "tcp", "127.0.0.1:0")
	mine, key := testca.PEM(t, ca.Leaf(testca.Named("a.test")))
	strange, strangeKey := testca.PEM(t, other.Leaf(testca.Named("a.test")))
	good := client.WithCertificate(f.overwrite("my.crt", mine), f.overwrite("my.key", key))
	bad := client.WithCertificate(f.overwrite("their.crt", strange), f.overwrite("their.key", strangeKey))
	trust := func(a *testca.Authority) client.Option {
		c := a.Certificate()
		return client.WithCA(f.overwrite(c.SerialNumber.String(), a.PEM()))
	}
	elsewhere := client.WithDialOptions(grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", plain)
	}))
	for name, c := range map[string]struct {
		options []client.Option
		text    string
	}{
		"another authority":          {[]client.Option{client.WithAddress(secure), trust(other), good}, "not signed by an authority in the CA file " + f.path(other.Certificate().SerialNumber.String())},
		"the system's":               {[]client.Option{client.WithAddress(secure), good}, "no CA file is named"},
		"no TLS there":               {[]client.Option{client.WithAddress(plain), trust(ca), good}, "does not speak TLS"},
		"no certificate":             {[]client.Option{client.WithAddress(secure), trust(ca)}, ""}, // TLS 1.3 may tell, or hang up
		"a stranger's certificate":   {[]client.Option{client.WithAddress(secure), trust(ca), bad}, ""},
		"in clear to other machines": {[]client.Option{client.WithAddress("192.0.2.1:7443"), elsewhere, client.WithTokenFile(f.overwrite("token", []byte("canary")))}, "does not speak TLS"},
	} {
		t.Run(name, func(t *testing.T) {
			err := whoami(t, c.options...)
			if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %q", err, c.text)
			}
		})
	}
	if len(h.seen) > 0 {
		t.Errorf("calls came through: %q", h.seen)
	}
	if err := whoami(t, client.WithAddress(secure), trust(ca), good); err != nil {
		t.Error(err)
	}
}
