package faultproxy_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tokenbroker/tokenbroker/internal/faultproxy"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// short is a wait after which something counts as not coming.
const short = 100 * time.Millisecond

// client of a Redis, line by line.
type client struct {
	t    *testing.T
	conn net.Conn
	r    *bufio.Reader
}

func dial(t *testing.T, address string) *client {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &client{t, conn, bufio.NewReader(conn)}
}

func (c *client) send(words ...string) {
	c.t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", len(words))
	for _, w := range words {
		fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(w), w)
	}
	if _, err := io.WriteString(c.conn, b.String()); err != nil {
		c.t.Fatal(err)
	}
}

// line reads one line, or fails after the wait.
func (c *client) line(wait time.Duration) (string, error) {
	c.t.Helper()
	if err := c.conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
		c.t.Fatal(err)
	}
	line, err := c.r.ReadString('\n')
	return strings.TrimSpace(line), err
}

func (c *client) want(line string) {
	c.t.Helper()
	if got, err := c.line(5 * time.Second); got != line || err != nil {
		c.t.Errorf("got %q, %v; want %q", got, err, line)
	}
}

func (c *client) wantNothing() {
	c.t.Helper()
	if got, err := c.line(short); !errors.Is(err, os.ErrDeadlineExceeded) {
		c.t.Errorf("got %q, %v; want silence", got, err)
	}
}

func (c *client) wantReset() {
	c.t.Helper()
	if got, err := c.line(5 * time.Second); !errors.Is(err, syscall.ECONNRESET) {
		c.t.Errorf("got %q, %v; want a reset connection", got, err)
	}
}

func rig(t *testing.T) (*testredis.Server, *faultproxy.Proxy) {
	t.Helper()
	s := testredis.Start(t, testredis.Options{})
	return s, faultproxy.New(t, s.Address())
}

func TestHealthyNetworkPassesEverything(t *testing.T) {
	t.Parallel()
	s, p := rig(t)
	c := dial(t, p.Address())
	c.send("SET", "k", "a\r\nb")
	c.want("+OK")
	c.send("MGET", "k", "none")
	for _, line := range []string{"*2", "$4", "a", "b", "$-1"} {
		c.want(line)
	}
	if got := s.Do("GET", "k"); got != "a\r\nb" {
		t.Errorf("stored %q", got)
	}
	if got := p.Commands(); got["set"] != 1 || got["mget"] != 1 || len(got) != 2 {
		t.Errorf("counted %v", got)
	}
	if open, ever := p.Connections(); open != 1 || ever != 1 {
		t.Errorf("%d connections open, %d ever", open, ever)
	}
}

func TestRefuse(t *testing.T) {
	t.Parallel()
	_, p := rig(t)
	c := dial(t, p.Address())
	c.send("PING")
	c.want("+PONG")
	p.Set(faultproxy.Faults{Refuse: true})
	c.wantReset()
	if _, err := net.Dial("tcp", p.Address()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dialling: %v", err)
	}
	p.Heal()
	c = dial(t, p.Address())
	c.send("PING")
	c.want("+PONG")
}

func TestDelayIsLatencyNotThroughput(t *testing.T) {
	t.Parallel()
	_, p := rig(t)
	c := dial(t, p.Address())
	p.Set(faultproxy.Faults{Requests: faultproxy.Path{Delay: 100 * time.Millisecond}, Replies: faultproxy.Path{Delay: 100 * time.Millisecond}})
	began := time.Now()
	for range 50 {
		c.send("PING")
	}
	for range 50 {
		c.want("+PONG")
	}
	if took := time.Since(began); took < 200*time.Millisecond || took > 3*time.Second {
		t.Errorf("50 commands took %v, want a little over 200ms", took)
	}
}

func TestHeldBytesArriveLate(t *testing.T) {
	t.Parallel()
	s, p := rig(t)
	c := dial(t, p.Address())
	p.Set(faultproxy.Faults{Requests: faultproxy.Path{Hold: true}})
	c.send("SET", "k", "v")
	c.wantNothing()
	if got := s.Do("GET", "k"); got != nil {
		t.Errorf("executed though held: %v", got)
	}
	p.Heal()
	c.want("+OK")
}

func TestSwallowedConnectionStaysDead(t *testing.T) {
	t.Parallel()
	s, p := rig(t)
	c := dial(t, p.Address())
	p.Set(faultproxy.Faults{Replies: faultproxy.Path{Swallow: true}})
	c.send("SET", "k", "v")
	c.wantNothing()
	if got := s.Do("GET", "k"); got != "v" {
		t.Errorf("requests were to pass: %v", got)
	}
	p.Heal()
	c.send("PING")
	c.wantNothing()
	other := dial(t, p.Address())
	other.send("PING")
	other.want("+PONG")
}

func TestCuts(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		faults  func(func(faultproxy.Command) bool) faultproxy.Faults
		applied bool
		first   string // what arrives before the cut
	}{
		{"before the request", func(fits func(faultproxy.Command) bool) faultproxy.Faults {
			return faultproxy.Faults{CutRequest: fits}
		}, false, ""},
		{"at the reply", func(fits func(faultproxy.Command) bool) faultproxy.Faults {
			return faultproxy.Faults{CutReply: fits}
		}, true, ""},
		{"in the reply", func(fits func(faultproxy.Command) bool) faultproxy.Faults {
			return faultproxy.Faults{CutMidReply: fits}
		}, true, "+O"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s, p := rig(t)
			p.Set(c.faults(faultproxy.Once(func(c faultproxy.Command) bool { return c.Name == "set" && c.Args[0] == "k" })))
			conn := dial(t, p.Address())
			conn.send("SET", "other", "v")
			conn.want("+OK")
			conn.send("SET", "k", "v")
			if got, err := conn.line(5 * time.Second); got != c.first || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("got %q, %v; want %q and then a cut", got, err, c.first)
			}
			if got := s.Do("EXISTS", "k"); got != map[bool]int64{true: 1}[c.applied] {
				t.Errorf("stored: %v, want %v", got, c.applied)
			}
			again := dial(t, p.Address())
			again.send("SET", "k", "v")
			again.want("+OK")
		})
	}
}

func TestOnlyMessagesAreDropped(t *testing.T) {
	t.Parallel()
	s, p := rig(t)
	c := subscribe(t, p.Address())
	s.Do("PUBLISH", "news", "first")
	for _, line := range []string{"*3", "$7", "message", "$4", "news", "$5", "first"} {
		c.want(line)
	}
	p.Set(faultproxy.Faults{DropMessages: true})
	s.Do("PUBLISH", "news", "second")
	c.send("PING")
	for _, line := range []string{"*2", "$4", "pong", "$0", ""} {
		c.want(line)
	}
	command := dial(t, p.Address())
	command.send("PING")
	command.want("+PONG")
}

func TestOnlySubscribedConnectionsDie(t *testing.T) {
	t.Parallel()
	s, p := rig(t)
	c := subscribe(t, p.Address())
	command := dial(t, p.Address())
	dead := faultproxy.Path{Swallow: true}
	p.Set(faultproxy.Faults{On: faultproxy.SubscribedConnections, Requests: dead, Replies: dead})
	if got := s.Do("PUBLISH", "news", "lost"); got != int64(1) {
		t.Errorf("%v subscribers", got)
	}
	c.wantNothing()
	command.send("PING")
	command.want("+PONG")
	// A new subscription is as dead, though its connection begins well.
	other := dial(t, p.Address())
	other.send("PING")
	other.want("+PONG")
	other.send("SUBSCRIBE", "news")
	other.wantNothing()
}

func subscribe(t *testing.T, address string) *client {
	t.Helper()
	c := dial(t, address)
	c.send("SUBSCRIBE", "news")
	for _, line := range []string{"*3", "$9", "subscribe", "$4", "news", ":1"} {
		c.want(line)
	}
	return c
}

func TestOtherProtocolsPass(t *testing.T) {
	t.Parallel()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		fmt.Fprintf(w, "%d", len(body))
	}))
	defer web.Close()
	p := faultproxy.New(t, strings.TrimPrefix(web.URL, "http://"))
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	c := http.Client{Transport: transport}
	post := func() (string, error) {
		resp, err := c.Post("http://"+p.Address(), "text/plain", strings.NewReader(strings.Repeat("x", 1<<20)))
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return string(body), err
	}
	for range 3 {
		if got, err := post(); got != "1048576" || err != nil {
			t.Errorf("the server got %s bytes, %v", got, err)
		}
	}
	p.Set(faultproxy.Faults{CutReply: func(faultproxy.Command) bool { return true }})
	if got, err := post(); err == nil {
		t.Errorf("a cut answer came: %s", got)
	}
}

func TestServerThatIsNotThereResets(t *testing.T) {
	t.Parallel()
	s, p := rig(t)
	s.Kill()
	conn, err := net.Dial("tcp", p.Address())
	if err == nil { // it may be reset as early as that
		defer conn.Close()
		_, err = conn.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("got %v, want a reset connection", err)
	}
	s.Restart()
	c := dial(t, p.Address())
	c.send("PING")
	c.want("+PONG")
}

func TestClosedProxyLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	_, p := rig(t)
	p.Set(faultproxy.Faults{Replies: faultproxy.Path{Hold: true}, Requests: faultproxy.Path{Delay: time.Hour}})
	for range 10 {
		dial(t, p.Address()).send("PING")
	}
	p.Close()
	p.Close()
	if open, _ := p.Connections(); open != 0 {
		t.Errorf("%d connections are open", open)
	}
}
