package oauth_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
	"github.com/tokenbroker/tokenbroker/internal/testproc"
)

const rotated = `{"access_token":"abc.DEF-123","token_type":"Bearer","expires_in":3600,"refresh_token":"next-one"}`

// counted is a server that counts what arrives, on the wire and in it.
type counted struct {
	connections, closed, requests atomic.Int32
	protocols                     chan string
}

func (c *counted) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.requests.Add(1)
	c.protocols <- r.Proto
	io.WriteString(w, rotated)
}

func (c *counted) watch(s *httptest.Server) {
	s.EnableHTTP2 = true
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			c.connections.Add(1)
		case http.StateClosed:
			c.closed.Add(1)
		}
	}
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(what)
		}
	}
}

// Whatever connections others use, a one-time request has one of its own, over
// HTTP/1.1, and nobody uses it after.
func TestAOneTimeRequestHasAConnectionOfItsOwn(t *testing.T) {
	for name, shared := range map[string]string{"plain": "HTTP/1.1", "TLS": "HTTP/2.0"} {
		t.Run(name, func(t *testing.T) {
			c := &counted{protocols: make(chan string, 100)}
			s := httptest.NewUnstartedServer(c)
			c.watch(s)
			var trust *tls.Config
			if name == "plain" {
				s.Start()
			} else {
				s.StartTLS()
				trust = trusting(s)
			}
			t.Cleanup(s.Close)
			client := clientFor(t, s.URL+"/token", over(oauth.TransportConfig{TLS: trust}))
			var protocols []string
			for _, asked := range []oauth.TokenRequest{ask(broker.ClientCredentials), spend(nil), ask(broker.ClientCredentials), spend(nil), spend(nil)} {
				grant, err := client.RequestToken(t.Context(), asked)
				if err != nil {
					t.Fatal(err)
				}
				if grant.RefreshToken.Reveal() != "next-one" {
					t.Error("the refresh token did not arrive")
				}
				protocols = append(protocols, <-c.protocols)
			}
			if want := []string{shared, "HTTP/1.1", shared, "HTTP/1.1", "HTTP/1.1"}; !slices.Equal(protocols, want) {
				t.Errorf("the server saw %v, want %v", protocols, want)
			}
			if n, r := c.connections.Load(), c.requests.Load(); n != 4 || r != 5 {
				t.Errorf("%d requests took %d connections, want 5 over 4", r, n)
			}
			eventually(t, "the connections of one-time requests stay open", func() bool { return c.closed.Load() == 3 })
		})
	}
}

// The way through a proxy is no part of the request: Clear is asked after it.
func TestAOneTimeRequestOnTheWire(t *testing.T) {
	backend := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body) // a body cut short is not what is expected
		fmt.Fprintf(w, `{"access_token":%q}`, strings.ReplaceAll(r.Header.Get("Connection")+" "+string(body), "%", "."))
	}))
	defer backend.Close()
	log := proxy.route(t, "example.com:443", backend.Listener.Addr().String())
	client := clientFor(t, "https://example.com/token", over(oauth.TransportConfig{TLS: trusting(backend)}))
	asked := spend(func() error {
		if n := len(log()); n != 1 {
			t.Errorf("asked after %d requests to the proxy", n)
		}
		return nil
	})
	asked.ClientSecret, asked.Secrets["refresh_token"] = broker.NewSecret("s"), broker.NewSecret("r")
	grant, err := client.RequestToken(t.Context(), asked)
	if err != nil {
		t.Fatal(err)
	}
	const want = "close client_id=tester&client_secret=s&grant_type=refresh_token&refresh_token=r"
	if got := grant.AccessToken.Reveal(); got != want {
		t.Errorf("the server saw %s, want %s", got, want)
	}
}

// arrivals is a server, plain or with TLS, that tells how many bytes of requests
// have arrived. It answers each request.
type arrivals struct {
	address string
	trust   *tls.Config
	bytes   atomic.Int64
	ended   chan struct{} // one for each connection that has ended
}

func newArrivals(t *testing.T, secure bool) *arrivals {
	t.Helper()
	a := &arrivals{ended: make(chan struct{}, 100)}
	model := httptest.NewTLSServer(nil)
	t.Cleanup(model.Close)
	a.trust = trusting(model)
	a.address = serveTCP(t, func(c net.Conn) {
		defer func() { a.ended <- struct{}{} }()
		if secure {
			c = tls.Server(c, model.TLS)
		}
		read := io.TeeReader(c, a)
		if r, err := http.ReadRequest(bufio.NewReader(read)); err == nil {
			io.Copy(io.Discard, r.Body)
			fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(rotated), rotated)
			io.Copy(io.Discard, read)
		}
	})
	if secure {
		a.address = strings.Replace(a.address, "http:", "https:", 1)
	}
	return a
}

func (a *arrivals) Write(p []byte) (int, error) {
	a.bytes.Add(int64(len(p)))
	return len(p), nil
}

// nothing checks, once the connection has ended, that nothing has come over it.
func (a *arrivals) nothing(t *testing.T) {
	t.Helper()
	select {
	case <-a.ended:
	case <-time.After(10 * time.Second):
		t.Fatal("the connection did not end")
	}
	if n := a.bytes.Load(); n != 0 {
		t.Errorf("%d bytes arrived", n)
	}
}

// plainAndTLS runs a test against both kinds of server, reached directly and,
// with TLS, through a proxy as well.
func plainAndTLS(t *testing.T, test func(t *testing.T, a *arrivals, client *oauth.Client)) {
	for name, secure := range map[string]bool{"plain": false, "TLS": true} {
		t.Run(name, func(t *testing.T) {
			a := newArrivals(t, secure)
			test(t, a, clientFor(t, a.address, over(oauth.TransportConfig{TLS: a.trust})))
		})
	}
	t.Run("proxy", func(t *testing.T) {
		a := newArrivals(t, true)
		proxy.route(t, "example.com:443", strings.TrimSuffix(strings.TrimPrefix(a.address, "https://"), "/token"))
		test(t, a, clientFor(t, "https://example.com/token", over(oauth.TransportConfig{TLS: a.trust})))
	})
}

func TestClearIsAskedRightBeforeTheFirstByte(t *testing.T) {
	plainAndTLS(t, func(t *testing.T, a *arrivals, client *oauth.Client) {
		var asked atomic.Int32
		_, err := client.RequestToken(t.Context(), spend(func() error {
			asked.Add(1)
			if n := a.bytes.Load(); n != 0 {
				t.Errorf("asked after %d bytes had arrived", n)
			}
			return nil
		}))
		if err != nil || asked.Load() != 1 || a.bytes.Load() == 0 {
			t.Errorf("asked %d times, %d bytes arrived, error %v", asked.Load(), a.bytes.Load(), err)
		}
	})
}

func TestClearHoldsTheRequestBack(t *testing.T) {
	refusal := errors.New("the lease is lost, and here is " + canary)
	for name, clear := range map[string]func() error{
		"an error": func() error { return errors.New("the lease is lost") },
		"a secret": func() error { return refusal },
		"a panic":  func() error { panic(canary) },
	} {
		t.Run(name, func(t *testing.T) {
			plainAndTLS(t, func(t *testing.T, a *arrivals, client *oauth.Client) {
				var asked atomic.Int32
				grant, err := client.RequestToken(t.Context(), spend(func() error {
					asked.Add(1)
					return clear()
				}))
				e := failure(t, grant, err)
				wantKind(t, e, broker.Unavailable, "was not asked: the request was held back before its first byte")
				wantOutcome(t, e, broker.Unsent)
				if asked.Load() != 1 {
					t.Errorf("asked %d times", asked.Load())
				}
				a.nothing(t)
			})
		})
	}
}

func TestWhatClearSaysIsTheCause(t *testing.T) {
	lost := errors.New("the lease is lost")
	a := newArrivals(t, true)
	grant, err := clientFor(t, a.address, over(oauth.TransportConfig{TLS: a.trust})).
		RequestToken(t.Context(), spend(func() error { return lost }))
	if e := failure(t, grant, err); !errors.Is(e, lost) {
		t.Errorf("the cause is %v", e.Err)
	}
}

// Until the first byte is written a caller can give up, even in the last moment.
func TestACallerThatGivesUpBeforeTheFirstByte(t *testing.T) {
	plainAndTLS(t, func(t *testing.T, a *arrivals, client *oauth.Client) {
		gone := errors.New("gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		grant, err := client.RequestToken(ctx, spend(func() error {
			cancel(gone)
			return nil
		}))
		e := failure(t, grant, err)
		wantKind(t, e, broker.Unavailable, "was given up before it was sent")
		wantOutcome(t, e, broker.Unsent)
		if !errors.Is(e, gone) {
			t.Errorf("the cause is %v", e.Err)
		}
		a.nothing(t)
	})
}

func TestACallerThatGivesUpDuringTheHandshake(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	address := serveTCP(t, func(c net.Conn) {
		cancel()
		hold(c)
	})
	cleared := false
	grant, err := clientFor(t, strings.Replace(address, "http:", "https:", 1)).RequestToken(ctx, spend(func() error {
		cleared = true
		return nil
	}))
	wantOutcome(t, failure(t, grant, err), broker.Unsent)
	if cleared {
		t.Error("Clear was asked about a request that had nowhere to go")
	}
}

// stays reports whether the other side leaves the connection open for a while.
func stays(c net.Conn) bool {
	c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	_, err := c.Read(make([]byte, 1))
	return errors.Is(err, os.ErrDeadlineExceeded)
}

// Once the first byte was written, a caller that leaves, a deadline of its own
// and the end of its lease change nothing.
func TestNothingOfOursEndsARequestThatWasSent(t *testing.T) {
	for name, leave := range map[string]func(context.Context) (context.Context, context.CancelFunc){
		"cancelled": context.WithCancel,
		"deadline": func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, 200*time.Millisecond)
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := leave(t.Context())
			defer cancel()
			address := serveConn(t, func(c net.Conn, _ *http.Request) {
				if name == "cancelled" {
					cancel()
				}
				<-ctx.Done()
				if !stays(c) {
					t.Error("the connection was closed")
				}
				// In two parts, so that the body is read after the end as well.
				fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(rotated), rotated[:20])
				if !stays(c) {
					t.Error("the connection was closed in the middle of the answer")
				}
				io.WriteString(c, rotated[20:])
			})
			grant, err := clientFor(t, address).RequestToken(ctx, spend(nil))
			if err != nil {
				t.Fatal(err)
			}
			if grant.RefreshToken.Reveal() != "next-one" {
				t.Error("the refresh token was lost")
			}
		})
	}
}

// soft is a timeout that one-time requests of these tests run into. A machine
// that is busy with other things may take longer for something in between; what
// is shown there is shown by one of several tries.
const (
	soft  = 500 * time.Millisecond
	tries = 10
)

func TestAnAnswerThatIsLateByLittleIsRead(t *testing.T) {
	for range tries {
		from := time.Now()
		address := serveConn(t, func(c net.Conn, _ *http.Request) {
			timer := time.NewTimer(time.Until(from.Add(soft + 50*time.Millisecond)))
			defer timer.Stop()
			<-timer.C
			io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n"+rotated)
		})
		grant, err := clientFor(t, address, timeout(soft)).RequestToken(t.Context(), spend(nil))
		if err == nil && grant.RefreshToken.Reveal() == "next-one" && time.Since(from) > soft {
			return
		}
		t.Logf("after %v: %v", time.Since(from), err)
	}
	t.Error("no late answer was read")
}

// childAddress names the server to a process that makes one one-time request.
const childAddress = "OAUTH_TEST_CHILD_ADDRESS"

func beChild(address string) {
	client, err := oauth.NewClient(oauth.ProfileConfig{TokenURL: address, ClientID: "child", ClientAuth: oauth.ClientSecretPost, Timeout: 2 * soft})
	if err != nil {
		fmt.Println(err)
		return
	}
	grant, err := client.RequestToken(context.Background(), spend(nil))
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("obtained", grant.RefreshToken.Reveal())
}

// A process that stands still while its answer comes, and goes on when the
// timeout is long over, finds the answer in the socket.
func TestAnAnswerThatCameWhileTheProcessStoodStill(t *testing.T) {
	asked, answered := make(chan struct{}), make(chan struct{})
	frozen := make(chan struct{})
	address := serveConn(t, func(c net.Conn, _ *http.Request) {
		close(asked)
		<-frozen
		io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n"+rotated)
		c.(*net.TCPConn).CloseWrite()
		close(answered)
		hold(c)
	})
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childAddress+"="+address)
	child := testproc.Start(t, cmd)
	select {
	case <-asked:
	case <-child.Exited():
		t.Fatalf("the child ended before it had asked: %s", child.Log())
	}
	child.Pause()
	over := time.NewTimer(3 * soft)
	defer over.Stop()
	close(frozen)
	<-answered
	<-over.C
	child.Continue()
	<-child.Exited()
	if got := strings.TrimSpace(child.Log()); got != "obtained next-one" {
		t.Errorf("the child said %q", got)
	}
}

// A server that says nothing, or too little, cannot keep a one-time request for
// longer than its timeout and half a second.
func TestAStalledServerEndsAOneTimeRequest(t *testing.T) {
	for name, raw := range map[string]func(net.Conn, *http.Request){
		"silence":         func(c net.Conn, _ *http.Request) { hold(c) },
		"headers at once": sayAndHold("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"),
		"a dripping body": drip("HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", "a"),
		"dripping slowly": func(c net.Conn, _ *http.Request) {
			tick := time.NewTicker(40 * time.Millisecond)
			defer tick.Stop()
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
			for range tick.C {
				if _, err := io.WriteString(c, "a"); err != nil {
					return
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			client := clientFor(t, serveConn(t, raw), timeout(soft))
			for range tries {
				start := time.Now()
				grant, err := client.RequestToken(t.Context(), spend(nil))
				took := time.Since(start)
				e := failure(t, grant, err)
				if e.Outcome == broker.Unsent || took > soft+500*time.Millisecond {
					t.Logf("after %v: %v", took, err)
					continue
				}
				wantKind(t, e, broker.Ambiguous, "within 500ms; it may have acted on the request")
				wantOutcome(t, e, broker.OutcomeUnknown)
				if took < soft {
					t.Errorf("it took %v", took)
				}
				return
			}
			t.Error("it took too long each time")
		})
	}
}

// A connection is reset, not closed in order: what the kernel still holds of the
// request is not sent any more.
func TestAOneTimeConnectionIsReset(t *testing.T) {
	for name, raw := range map[string]string{
		"answered": "HTTP/1.1 200 OK\r\nContent-Length: " + fmt.Sprint(len(rotated)) + "\r\n\r\n" + rotated,
		"stalled":  "",
	} {
		t.Run(name, func(t *testing.T) {
			reset := make(chan error, 1)
			address := serveConn(t, func(c net.Conn, _ *http.Request) {
				io.WriteString(c, raw)
				_, err := io.Copy(io.Discard, c)
				reset <- err
			})
			clientFor(t, address, timeout(2*soft)).RequestToken(t.Context(), spend(nil))
			if err := <-reset; !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the connection ended with %v", err)
			}
		})
	}
}

// However it ends, a one-time request leaves nothing behind that runs.
func TestAOneTimeRequestLeavesNothingBehind(t *testing.T) {
	silent := serveConn(t, func(c net.Conn, _ *http.Request) { hold(c) })
	deaf := strings.Replace(serveTCP(t, hold), "http:", "https:", 1)
	answering := serve(t, reply{body: rotated})
	before := goleak.IgnoreCurrent()
	for _, tc := range []struct {
		address string
		clear   func() error
	}{
		{answering, nil},
		{answering, func() error { return errors.New("no") }},
		{silent, nil},
		{deaf, nil},
	} {
		_, _ = clientFor(t, tc.address, timeout(soft)).RequestToken(t.Context(), spend(tc.clear)) // either will do
	}
	goleak.VerifyNone(t, before)
}

// What the server sees of a request larger than one write is all or nothing as
// well: Clear is asked once.
func TestALargeOneTimeRequest(t *testing.T) {
	plainAndTLS(t, func(t *testing.T, a *arrivals, client *oauth.Client) {
		var asked atomic.Int32
		request := spend(func() error {
			asked.Add(1)
			if a.bytes.Load() != 0 {
				t.Error("asked too late")
			}
			return nil
		})
		request.Secrets["client_assertion"] = broker.NewSecret(string(bytes.Repeat([]byte("a.B-9"), 20_000)))
		if _, err := client.RequestToken(t.Context(), request); err != nil || asked.Load() != 1 {
			t.Errorf("asked %d times, error %v", asked.Load(), err)
		}
	})
}

// The timeout may be another one for a single request.
func TestATimeoutOfItsOwn(t *testing.T) {
	bothWays(t, func(t *testing.T, asked oauth.TokenRequest) {
		asked.Timeout = 200 * time.Millisecond
		grant, err := clientFor(t, serveConn(t, func(c net.Conn, _ *http.Request) { hold(c) })).RequestToken(t.Context(), asked)
		wantKind(t, failure(t, grant, err), broker.Ambiguous, "did not answer within 200ms")
	})
}
