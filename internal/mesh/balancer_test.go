//go:build mesh

package mesh_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
	"github.com/tokenbroker/tokenbroker/internal/testproc"
)

// replicas are behind each balancer, as the files in deploy/ have it.
const replicas = 3

// balancer is a program in front of the replicas.
type balancer struct {
	// start runs it, and returns where it listens.
	start func(*testing.T, *place, []*broker) (address string)
	// asks for the health of replicas. Behind one that does not, a connection
	// can be made in the very moment in which a replica closes its door: callers
	// must wait until they are connected instead of failing, as docs/mesh.md says.
	asks bool
}

var balancers = map[string]balancer{
	"haproxy": {startHAProxy, true},
	"nginx":   {startNginx, false},
}

func startHAProxy(t *testing.T, p *place, brokers []*broker) string {
	t.Helper()
	testproc.Require(t, "haproxy")
	address := testproc.FreeAddress(t)
	change := []string{"bind :7443", "bind " + address}
	for i, b := range brokers {
		_, adminPort, _ := net.SplitHostPort(b.admin)
		change = append(change, fmt.Sprintf("broker-%d.example.com:7443 port 7444", i+1), b.address+" port "+adminPort)
	}
	startBalancer(t, address, exec.Command("haproxy", "-db", "-f", p.deployed("haproxy/haproxy.cfg", change...)))
	return address
}

func startNginx(t *testing.T, p *place, brokers []*broker) string {
	t.Helper()
	testproc.Require(t, "nginx")
	address := testproc.FreeAddress(t)
	change := []string{"listen 7443;", "listen " + address + ";", "/run/nginx.pid", p.path("nginx.pid")}
	// Where a build has the module built in, there is no file to load.
	if version, err := exec.Command("nginx", "-V").CombinedOutput(); err != nil {
		t.Fatal(err)
	} else if !strings.Contains(string(version), "--with-stream=dynamic") {
		change = append(change, "load_module modules/ngx_stream_module.so;", "")
	}
	for i, b := range brokers {
		change = append(change, fmt.Sprintf("broker-%d.example.com:7443", i+1), b.address)
	}
	file := p.deployed("nginx/nginx.conf", change...)
	// In one process, which ends with the test.
	startBalancer(t, address, exec.Command("nginx", "-e", "stderr", "-g", "daemon off; master_process off;", "-c", file))
	return address
}

// startBalancer returns when somebody listens there.
func startBalancer(t *testing.T, address string, cmd *exec.Cmd) {
	t.Helper()
	process := testproc.Start(t, cmd)
	process.Await(filepath.Base(cmd.Path)+" listens", 10*time.Second, func() bool {
		conn, err := net.DialTimeout("tcp", address, time.Second)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
}

// load is callers that ask all the time, until they are told to stop.
type load struct {
	running sync.WaitGroup
	stop    context.CancelFunc
	calls   atomic.Int64

	mu       sync.Mutex
	failures []error // guarded by mu
}

// begin has so many callers ask over a connection each, or over a new one for
// each call. They may be patient and wait until they are connected.
func begin(t *testing.T, p *place, address string, as identity, callers int, anew, patient bool) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{stop: cancel}
	t.Cleanup(l.end)
	for range callers {
		l.running.Go(func() {
			var conn *grpc.ClientConn
			for ctx.Err() == nil {
				if conn == nil || anew {
					conn = p.dial(address, as, grpc.WithDefaultCallOptions(grpc.WaitForReady(patient)))
				}
				l.ask(ctx, pb.NewTokenBrokerClient(conn))
				if anew {
					conn.Close()
				}
			}
		})
	}
	return l
}

// ask makes one call, and pauses as programs do that use their tokens.
func (l *load) ask(ctx context.Context, c pb.TokenBrokerClient) {
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
	defer cancel()
	_, err := c.IssueToken(call, &pb.IssueTokenRequest{Profile: "invoices"})
	l.calls.Add(1)
	if err != nil {
		l.mu.Lock()
		l.failures = append(l.failures, fmt.Errorf("%s: %w", time.Now().Format("15:04:05.000"), err))
		l.mu.Unlock()
	}
	select {
	case <-ctx.Done():
	case <-time.After(10 * time.Millisecond):
	}
}

// end returns when all calls have their answers.
func (l *load) end() {
	l.stop()
	l.running.Wait()
}

// failed are the calls that have failed so far.
func (l *load) failed() []error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.failures)
}

// behind starts a balancer in front of brokers.
func behind(t *testing.T, balancer balancer, more string) (*place, []*broker, string) {
	t.Helper()
	p := newPlace(t)
	var brokers []*broker
	for i := range replicas {
		brokers = append(brokers, p.newBroker(fmt.Sprintf("broker-%d", i+1), more))
	}
	brokers[0].start() // so that callers have somebody from the first moment
	address := balancer.start(t, p, brokers)
	settle(t, p, address)
	return p, brokers, address
}

// settle returns when the balancer has found out who is there: when many
// connections in a row got through.
func settle(t *testing.T, p *place, address string) {
	t.Helper()
	as := p.identity("settling", uris(worker))
	await(t, "the balancer knows its replicas", 30*time.Second, func() bool {
		for range 10 {
			conn, err := tls.Dial("tcp", address, &tls.Config{RootCAs: p.ca.Pool(), Certificates: []tls.Certificate{as.leaf}, NextProtos: []string{"h2"}})
			if err != nil {
				return false
			}
			conn.Close()
		}
		return true
	})
}

// soon is the pause after which something that others do is looked at again.
const soon = 10 * time.Millisecond

// await polls.
func await(t *testing.T, what string, within time.Duration, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); !condition(); time.Sleep(soon) {
		if time.Now().After(deadline) {
			t.Fatalf("waiting until %s: not within %v", what, within)
		}
	}
}

// servesMore returns a condition: the broker has handed out a few more tokens
// than by now.
func servesMore(b *broker) func() bool {
	before := b.served()
	return func() bool { return b.served() > before+10 }
}

// Callers that found a single replica are spread over those that come later, as
// their connections age, and notice nothing.
func TestConnectionsSpreadAsTheyAge(t *testing.T) {
	t.Parallel()
	for name, balancer := range balancers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, brokers, address := behind(t, balancer, "  limits: {connection_age: 10s}\n")
			callers := begin(t, p, address, p.identity("worker", uris(worker)), 9, false, false)
			await(t, "the first replica serves", 10*time.Second, servesMore(brokers[0]))
			for _, b := range brokers[1:] {
				b.start()
			}
			await(t, "each replica serves its share", 60*time.Second, func() bool { return evenly(t, brokers) })
			callers.end()
			if failures := callers.failed(); len(failures) > 0 {
				t.Errorf("%d of %d calls failed: %v", len(failures), callers.calls.Load(), failures[0])
			}
		})
	}
}

// evenly reports whether each replica serves half of what it would if the next
// few hundred calls were spread evenly, or more.
func evenly(t *testing.T, brokers []*broker) bool {
	t.Helper()
	const calls = 300
	shares := func() (each []int, all int) {
		for _, b := range brokers {
			n := b.served()
			each, all = append(each, n), all+n
		}
		return each, all
	}
	before, sum := shares()
	after, total := shares()
	for deadline := time.Now().Add(20 * time.Second); total < sum+calls && time.Now().Before(deadline); time.Sleep(soon) {
		after, total = shares()
	}
	for i := range after {
		if 2*len(brokers)*(after[i]-before[i]) < total-sum {
			return false
		}
	}
	return total >= sum+calls
}

// Each replica is stopped and started again under load. Neither callers that hold
// connections nor those that make a new one for each call notice.
func TestRollingRestartFailsNoCall(t *testing.T) {
	t.Parallel()
	for name, balancer := range balancers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, brokers, address := behind(t, balancer, "")
			for _, b := range brokers[1:] {
				b.start()
			}
			worker := p.identity("worker", uris(worker))
			settle(t, p, address)
			loads := []*load{begin(t, p, address, worker, 6, false, !balancer.asks), begin(t, p, address, worker, 4, true, !balancer.asks)}
			for i, b := range brokers {
				for j, other := range brokers { // also the one that has just come back
					await(t, fmt.Sprintf("replica %d serves", j+1), 20*time.Second, servesMore(other))
				}
				b.process.Signal(syscall.SIGTERM)
				select {
				case <-b.process.Exited():
				case <-time.After(30 * time.Second):
					t.Fatalf("replica %d has not ended\n%s", i+1, b.process.Log())
				}
				if code := b.process.ExitCode(); code != 0 {
					t.Errorf("replica %d ended with status %d", i+1, code)
				}
				b.start()
			}
			await(t, "all is well again", 20*time.Second, servesMore(brokers[0]))
			for i, l := range loads {
				l.end()
				if failures := l.failed(); len(failures) > 0 {
					t.Errorf("callers with %s: %d of %d calls failed: %v", []string{"connections that last", "a connection per call"}[i],
						len(failures), l.calls.Load(), failures)
				}
				t.Logf("%d calls", l.calls.Load())
			}
		})
	}
}
