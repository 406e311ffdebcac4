//go:build mesh

package mesh_test

import (
	"cmp"
	"context"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/testproc"
)

const (
	uriSAN    = pb.IdentityProof_IDENTITY_PROOF_URI_SAN
	dnsSAN    = pb.IdentityProof_IDENTITY_PROOF_DNS_SAN
	forwarded = pb.IdentityProof_IDENTITY_PROOF_FORWARDED
)

// Headers that name a caller.
const (
	xfcc = "x-forwarded-client-cert"
	l5d  = "l5d-client-id"
)

// trusts is a part of the message Server: the proxy is believed about everybody.
func trusts(proxy, header string) string {
	return fmt.Sprintf("  forwarders: [{peers: [%q], header: %s}]\n", proxy, header)
}

// envoy starts one with a file of deploy/envoy, and returns where it listens.
// Files of the identities "envoy", for callers, and "sidecar", for the broker,
// are in place.
func (p *place) envoy(file string, b *broker, oldnew ...string) (address string) {
	p.t.Helper()
	path := cmp.Or(os.Getenv("ENVOY_BIN"), repository+"/bin/envoy")
	if _, err := os.Stat(path); err != nil {
		p.t.Fatal("this test needs Envoy: run make mesh, which brings it, or set ENVOY_BIN")
	}
	address = testproc.FreeAddress(p.t)
	endpoint := func(address string) string {
		host, port, _ := net.SplitHostPort(address)
		return fmt.Sprintf("address: %s, port_value: %s", host, port)
	}
	oldnew = append(oldnew, "address: 0.0.0.0, port_value: 8443", endpoint(address))
	if b.socket {
		oldnew = append(oldnew, "/run/broker/broker.sock", strings.TrimPrefix(b.address, "unix:"))
	} else {
		oldnew = append(oldnew, "address: broker.example.com, port_value: 7443", endpoint(b.address))
	}
	if file != "passthrough.yaml" {
		oldnew = append(oldnew, "/etc/envoy/tls.crt", p.path("envoy.crt"), "/etc/envoy/tls.key", p.path("envoy.key"),
			"/etc/envoy/callers-ca.crt", p.path("ca.crt"))
		if !b.socket {
			oldnew = append(oldnew, "/etc/envoy/client.crt", p.path("sidecar.crt"), "/etc/envoy/client.key", p.path("sidecar.key"),
				"/etc/envoy/broker-ca.crt", p.path("ca.crt"), "san_type: DNS, matcher: { exact: broker.example.com }",
				"san_type: IP_ADDRESS, matcher: { exact: 127.0.0.1 }")
		}
	}
	cmd := exec.Command(path, "--config-path", p.deployed("envoy/"+file, oldnew...), "--concurrency", "1", "--use-dynamic-base-id", "--log-level", "info")
	process := testproc.Start(p.t, cmd)
	process.Await("Envoy listens", 30*time.Second, func() bool {
		conn, err := net.DialTimeout("tcp", address, time.Second)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return address
}

// terminating starts Envoy as deploy/envoy/terminating.yaml has it, with some of
// it replaced, and a broker behind that believes it.
func terminating(t *testing.T, oldnew ...string) (p *place, b *broker, address string) {
	t.Helper()
	p = newPlace(t)
	p.identity("envoy", uris(sidecar)) // which Envoy tells the broker as By
	p.identity("sidecar", uris(sidecar))
	b = p.startBroker("broker", trusts(sidecar, xfcc))
	return p, b, p.envoy("terminating.yaml", b, oldnew...)
}

// claiming is a context of calls that come with a header of the caller's own.
func claiming(t *testing.T, header string, values ...string) context.Context {
	ctx := within(t)
	for _, v := range values {
		ctx = metadata.AppendToOutgoingContext(ctx, header, v)
	}
	return ctx
}

// wantUnknown fails the test unless a caller that claims something is told that
// nobody knows it, whatever it asks, and the token endpoint hears nothing of it.
func wantUnknown(t *testing.T, ctx context.Context, b *broker, c pb.TokenBrokerClient) {
	t.Helper()
	if me, err := c.WhoAmI(ctx, &pb.WhoAmIRequest{}); err == nil {
		t.Errorf("it passes for %s by %s", me.Caller, me.Proof)
	} else {
		wantReason(t, err, "CALLER_UNKNOWN")
	}
	_, err := c.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"})
	wantReason(t, err, "CALLER_UNKNOWN")
	if n := b.served(); n != 0 {
		t.Errorf("%d tokens were handed out", n)
	}
}

// wantIntruder fails the test unless a caller is taken for the intruder, whom
// the policy allows nothing.
func wantIntruder(t *testing.T, ctx context.Context, c pb.TokenBrokerClient) {
	t.Helper()
	me, err := c.WhoAmI(ctx, &pb.WhoAmIRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if me.Caller != intruder || len(me.Permissions) != 0 {
		t.Errorf("it passes for %s, with %v", me.Caller, me.Permissions)
	}
	_, err = c.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"})
	wantReason(t, err, "CALLER_DENIED")
}

func TestEnvoyEndsTLSAndForwardsWhoCalls(t *testing.T) {
	t.Parallel()
	p, _, address := terminating(t)
	t.Run("URI SAN", func(t *testing.T) {
		wantCaller(t, p.caller(address, p.identity("uri", uris(worker))), worker, forwarded, sidecar)
	})
	t.Run("DNS SAN", func(t *testing.T) {
		wantCaller(t, p.caller(address, p.identity("dns", testca.Named(workerDNS))), "dns:"+workerDNS, forwarded, sidecar)
	})
	t.Run("URI SAN before DNS SAN", func(t *testing.T) {
		both := p.identity("both", func(c *x509.Certificate) {
			uris(worker)(c)
			testca.Named("other.mesh.test")(c)
		})
		wantCaller(t, p.caller(address, both), worker, forwarded, sidecar)
	})
	t.Run("somebody else", func(t *testing.T) {
		wantIntruder(t, within(t), p.caller(address, p.identity("intruder", uris(intruder))))
	})
	t.Run("a stream", func(t *testing.T) {
		stream, err := healthpb.NewHealthClient(p.dial(address, p.identity("watcher", uris(worker)))).Watch(within(t), &healthpb.HealthCheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if health, err := stream.Recv(); err != nil || health.Status != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("health: %v, %v", health, err)
		}
	})
}

func TestCertificatesThatNameNobodyThroughEnvoy(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*x509.Certificate){
		"two URI SANs":         uris(worker, intruder),
		"the same one twice":   uris(worker, worker),
		"two DNS SANs":         testca.Named(workerDNS, "other.mesh.test"),
		"no SAN":               func(c *x509.Certificate) { c.Subject.CommonName = workerDNS },
		"a URI with a comma":   uris(worker + ",URI=" + worker),
		"a URI with separator": uris(intruder + ";URI=" + worker),
		"a DNS name with more": testca.Named("x;URI=" + worker),
		"a DNS name with hops": testca.Named("x,URI=" + worker),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, b, address := terminating(t)
			wantUnknown(t, within(t), b, p.caller(address, p.identity("odd", change)))
		})
	}
}

// Envoy may be told to hand on more of a certificate than its names. What people
// write into it must not become a name.
func TestSubjectsBecomeNoNamesThroughEnvoy(t *testing.T) {
	t.Parallel()
	p, _, address := terminating(t, "{ uri: true, dns: true }", "{ subject: true, cert: true, chain: true, uri: true, dns: true }")
	wantCaller(t, p.caller(address, p.identity("worker", uris(worker))), worker, forwarded, sidecar)
	for name, subject := range map[string]string{
		"plain":                "worker",
		"separators":           "x;URI=" + worker + ",URI=" + worker,
		"a quote":              `x";URI=` + worker + `;Subject="`,
		"an escaped quote":     `x\";URI=` + worker + `;Subject="`,
		"two backslashes":      `x\\";URI=` + worker + `;Subject="`,
		"a backslash last":     `x\`,
		"two backslashes last": `x\\`,
		"another element":      `x",URI=` + worker + `;Subject="`,
		"not ASCII":            "x\u201d;URI=" + worker,
		"a line of its own":    "x\r\nx-forwarded-client-cert: URI=" + worker,
	} {
		t.Run(name, func(t *testing.T) {
			c := p.caller(address, p.identity("odd", func(c *x509.Certificate) {
				uris(intruder)(c)
				c.Subject.CommonName = subject
			}))
			me, err := c.WhoAmI(within(t), &pb.WhoAmIRequest{})
			switch {
			case err != nil:
				wantReason(t, err, "CALLER_UNKNOWN")
			case me.Caller != intruder:
				t.Errorf("it passes for %s", me.Caller)
			}
			if _, err := c.IssueToken(within(t), &pb.IssueTokenRequest{Profile: "invoices"}); err == nil {
				t.Error("it got a token")
			}
			t.Logf("seen as %q, %v", me.GetCaller(), status.Convert(err).Message())
		})
	}
}

func TestEnvoyForwardsOverASocket(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		uid     int
		trusted bool
	}{
		"of the user that is listed": {os.Getuid(), true},
		"of another user":            {os.Getuid() + 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPlace(t)
			p.identity("envoy", testca.Loopback)
			forwarder := fmt.Sprintf("unix:uid:%d", c.uid)
			b := p.startBroker("broker.sock", trusts(forwarder, xfcc))
			address := p.envoy("terminating-socket.yaml", b)
			caller := p.caller(address, p.identity("worker", uris(worker)))
			if !c.trusted {
				wantUnknown(t, within(t), b, caller)
				return
			}
			wantCaller(t, caller, worker, forwarded, forwarder)
			wantIntruder(t, claiming(t, xfcc, "URI="+worker), p.caller(address, p.identity("intruder", uris(intruder))))
		})
	}
}

func TestEnvoyPassesTLSThrough(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	b := p.startBroker("broker", "")
	address := p.envoy("passthrough.yaml", b)
	wantCaller(t, p.caller(address, p.identity("uri", uris(worker))), worker, uriSAN, "")
	wantCaller(t, p.caller(address, p.identity("dns", testca.Named(workerDNS))), "dns:"+workerDNS, dnsSAN, "")
	wantIntruder(t, within(t), p.caller(address, p.identity("intruder", uris(intruder))))
}

// claims are what an intruder may send to pass for the worker.
var claims = map[string][]string{
	"as Envoy writes it":       {"By=" + sidecar + ";Hash=" + strings.Repeat("0", 64) + ";Subject=\"\";URI=" + worker},
	"the name alone":           {"URI=" + worker},
	"in two elements":          {"URI=" + intruder + ",URI=" + worker},
	"in two headers":           {"URI=" + worker, "URI=" + worker},
	"by a DNS name":            {"DNS=" + workerDNS},
	"left open, to be grown":   {"URI=" + worker + `;Subject="`},
	"ending with a comma":      {"URI=" + worker + ","},
	"nothing":                  {""},
	"the name without its key": {worker},
}

func TestForgedHeaderThroughEnvoy(t *testing.T) {
	t.Parallel()
	for mode, oldnew := range map[string][]string{
		"SANITIZE_SET": nil,
		// Wrong in different ways.
		"APPEND_FORWARD":      {"SANITIZE_SET\n", "APPEND_FORWARD\n"},
		"ALWAYS_FORWARD_ONLY": {"SANITIZE_SET\n", "ALWAYS_FORWARD_ONLY\n"},
		"FORWARD_ONLY":        {"SANITIZE_SET\n", "FORWARD_ONLY\n"},
		"SANITIZE":            {"SANITIZE_SET\n", "SANITIZE\n"},
	} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			p, b, address := terminating(t, oldnew...)
			c := p.caller(address, p.identity("intruder", uris(intruder)))
			for name, values := range claims {
				t.Run(name, func(t *testing.T) {
					switch {
					case mode == "SANITIZE_SET": // the claim is replaced
						wantIntruder(t, claiming(t, xfcc, values...), c)
					case mode == "SANITIZE": // the claim is removed, and nobody named
						wantUnknown(t, claiming(t, xfcc, values...), b, c)
					case mode == "APPEND_FORWARD" && values[0] == "":
						// Envoy does not send an empty element: the only one is its own.
						wantIntruder(t, claiming(t, xfcc, values...), c)
					case mode == "APPEND_FORWARD":
						wantUnknown(t, claiming(t, xfcc, values...), b, c)
						_, err := c.WhoAmI(claiming(t, xfcc, "URI="+worker), &pb.WhoAmIRequest{})
						if text := status.Convert(err).Message(); !strings.Contains(text, "more than one element") {
							t.Errorf("the error does not say what is wrong with Envoy: %s", text)
						}
					default:
						believed(t, claiming(t, xfcc, values...), c, values)
					}
				})
			}
		})
	}
}

// believed is about proxies that hand on what callers say, which no broker can
// tell from what they have found out themselves: what is not ambiguous is
// believed, and nothing else.
func believed(t *testing.T, ctx context.Context, c pb.TokenBrokerClient, values []string) {
	t.Helper()
	me, err := c.WhoAmI(ctx, &pb.WhoAmIRequest{})
	clear := len(values) == 1 && strings.Contains(values[0], "=") && !strings.ContainsAny(values[0], ",") && strings.Count(values[0], `"`)%2 == 0
	switch {
	case !clear:
		wantReason(t, err, "CALLER_UNKNOWN")
	case err != nil || me.Caller == intruder:
		t.Errorf("this mode is expected to let callers lie, and did not: %v, %v", me, err)
	}
}

// No header is believed that does not come from the proxy, and the proxy is
// nobody without one.
func TestForgedHeaderAroundEnvoy(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		as     string // URI in the certificate
		server string // more of the message Server
		header string // none: no claim
	}{
		"past the proxy":                       {intruder, trusts(sidecar, xfcc), xfcc},
		"past the proxy, in Linkerd's header":  {intruder, trusts(sidecar, xfcc), l5d},
		"past the proxy, by the worker itself": {worker, trusts(sidecar, xfcc), xfcc},
		"where no proxy is listed":             {sidecar, "", xfcc},
		"where another proxy is listed":        {sidecar, trusts(sidecar+"2", xfcc), xfcc},
		"by the proxy, in the other header":    {sidecar, trusts(sidecar, xfcc), l5d},
		"by the proxy, about nobody":           {sidecar, trusts(sidecar, xfcc), ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newPlace(t)
			b := p.startBroker("broker", c.server)
			ctx := within(t)
			switch c.header {
			case xfcc:
				ctx = claiming(t, xfcc, "URI="+worker)
			case l5d:
				ctx = claiming(t, l5d, workerDNS)
			}
			wantUnknown(t, ctx, b, p.caller(b.address, p.identity("caller", uris(c.as))))
		})
	}
	t.Run("through a proxy that is not listed", func(t *testing.T) {
		t.Parallel()
		p := newPlace(t)
		p.identity("envoy", testca.Loopback)
		p.identity("sidecar", uris(sidecar))
		b := p.startBroker("broker", trusts(sidecar+"2", xfcc))
		wantUnknown(t, within(t), b, p.caller(p.envoy("terminating.yaml", b), p.identity("worker", uris(worker))))
	})
	t.Run("through a proxy that may not speak for the caller", func(t *testing.T) {
		t.Parallel()
		p := newPlace(t)
		p.identity("envoy", testca.Loopback)
		p.identity("sidecar", uris(sidecar))
		b := p.startBroker("broker", fmt.Sprintf("  forwarders: [{peers: [%q], header: %s, callers: [%q]}]\n", sidecar, xfcc, "spiffe://mesh.test/ns/elsewhere/sa/*"))
		address := p.envoy("terminating.yaml", b)
		wantUnknown(t, within(t), b, p.caller(address, p.identity("worker", uris(worker))))
		wantIntruder(t, within(t), p.caller(address, p.identity("intruder", uris(intruder))))
	})
}

// Linkerd's proxy is not here: a caller with its certificate simulates it, which
// sends the header that it would.
func TestSimulatedLinkerd(t *testing.T) {
	t.Parallel()
	const proxy = "broker.tokens.serviceaccount.identity.linkerd.cluster.local"
	p := newPlace(t)
	b := p.startBroker("broker", trusts("dns:"+proxy, l5d))
	c := p.caller(b.address, p.identity("proxy", testca.Named(proxy)))
	for name, values := range map[string][]string{"empty": {""}, "twice": {workerDNS, workerDNS}, "a list": {workerDNS + "," + workerDNS}, "none": nil} {
		t.Run(name, func(t *testing.T) { wantUnknown(t, claiming(t, l5d, values...), b, c) })
	}
	t.Run("Envoy's header", func(t *testing.T) { wantUnknown(t, claiming(t, xfcc, "DNS="+workerDNS), b, c) })
	ctx := claiming(t, l5d, workerDNS)
	me, err := c.WhoAmI(ctx, &pb.WhoAmIRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if me.Caller != "dns:"+workerDNS || me.Proof != forwarded || me.Forwarder != "dns:"+proxy {
		t.Errorf("the broker sees %v", me)
	}
	if _, err := c.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Error(err)
	}
	_, err = c.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "secret"})
	wantReason(t, err, "CALLER_DENIED")
}
