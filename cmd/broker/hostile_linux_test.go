package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/testh2"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

const (
	// mostMemory bounds what the process may have taken at its worst moment.
	mostMemory = 512 << 20
	// mostPatience bounds how long one in a hundred calls of the others may take,
	// on a machine that has the attackers on it as well.
	mostPatience = 5 * time.Second
)

// siege is a broker that is attacked, over mutual TLS.
type siege struct {
	*process
	hostile, modest *tls.Config
}

func newSiege(t *testing.T) siege {
	t.Helper()
	s := newStage(t)
	a := testca.New(t)
	s.tlsFiles(a)
	// The log must not become the bottleneck, nor fill the test's memory.
	config := strings.NewReplacer(
		`{address: "127.0.0.1:0"}`+"\nadmin", `{address: "127.0.0.1:0", tls: {certificate: server.pem, private_key: server.key, client_ca: ca.pem}}`+"\nadmin",
		"level: debug", "level: info",
	).Replace(read(t, s.config("policy:", `  - {callers: ["dns:modest.example.com"], profiles: [invoices], allow: [issue]}`)))
	settings := func(name string) *tls.Config {
		return &tls.Config{RootCAs: a.Pool(), ServerName: "127.0.0.1", Certificates: []tls.Certificate{a.Leaf(testca.Named(name))}}
	}
	return siege{start(t, s.write("config.yaml", config)), settings("hostile.example.com"), settings("modest.example.com")}
}

// others are callers that go on as ever. It returns what stops them and checks
// that none of their calls failed or took long.
func (s siege) others(t *testing.T) (stop func() (calls int, p99, longest time.Duration)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	var took []time.Duration
	var calling sync.WaitGroup
	for range 4 {
		conn, err := grpc.NewClient("passthrough:///"+s.address, grpc.WithTransportCredentials(credentials.NewTLS(s.modest)), grpc.WithDisableRetry())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		client := pb.NewTokenBrokerClient(conn)
		call := func() time.Duration {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			began := time.Now()
			if _, err := client.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
				t.Errorf("another caller: %v", err)
			}
			return time.Since(began)
		}
		call() // connects
		calling.Go(func() {
			ticker := time.NewTicker(5 * time.Millisecond) // modest
			defer ticker.Stop()
			for ctx.Err() == nil {
				d := call()
				mu.Lock()
				took = append(took, d)
				mu.Unlock()
				<-ticker.C
			}
		})
	}
	return func() (int, time.Duration, time.Duration) {
		cancel()
		calling.Wait()
		slices.Sort(took)
		return len(took), took[len(took)*99/100], took[len(took)-1]
	}
}

// metric reads a value without labels.
func (s siege) metric(name string) float64 {
	s.t.Helper()
	_, page := s.get("/metrics")
	m := regexp.MustCompile(`(?m)^` + name + ` (\S+)$`).FindStringSubmatch(page)
	if m == nil {
		s.t.Fatalf("there is no metric %s", name)
	}
	v, err := strconv.ParseFloat(m[1], 64)
	if err != nil {
		s.t.Fatal(err)
	}
	return v
}

// memory is what the kernel says of the process's memory, in bytes: VmRSS is what
// it has, VmHWM the most that it has ever had.
func (s siege) memory(what string) int {
	s.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	m := regexp.MustCompile(what + `:\s+(\d+) kB`).FindSubmatch(text)
	if m == nil {
		s.t.Fatalf("no %s in %s", what, text)
	}
	kB, _ := strconv.Atoi(string(m[1]))
	return kB << 10
}

// attack is what a hostile caller does until ctx ends. That the server cuts it
// short is no error.
type attack func(ctx context.Context, s siege) error

// TestHostileCallers attacks a running broker in every way that is known, one
// after the other, while others call it.
func TestHostileCallers(t *testing.T) {
	s := newSiege(t)
	stop := s.others(t)
	goroutines, files := s.metric("go_goroutines"), s.metric("process_open_fds")
	t.Logf("before: %d MiB, %v goroutines, %v files", s.memory("VmRSS")>>20, goroutines, files)
	for _, a := range []struct {
		name string
		n    int // attackers at once
		do   attack
	}{
		{"slow and idle connections", hostileConnections, slow},
		{"floods of CONTINUATION", 4, again(continuations)},
		{"HPACK that grows", 4, again(bomb)},
		{"100,000 headers", 4, again(manyHeaders)},
		{"rapid resets", 4, again(rapidResets)},
		{"pings and settings", 4, again(pings)},
		{"messages of 100 MB", 4, again(hugeMessages)},
		{"half-sent messages", 8, again(halfMessages)},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		var attacking sync.WaitGroup
		for i := range a.n {
			attacking.Go(func() {
				if err := a.do(context.WithValue(ctx, number{}, i), s); err != nil {
					t.Errorf("%s: attacker %d: %v", a.name, i, err)
				}
			})
		}
		<-time.After(hostileTime)
		t.Logf("%-26s %3d MiB, %4v goroutines, %4v connections", a.name, s.memory("VmRSS")>>20, s.metric("go_goroutines"), s.metric("token_broker_connections"))
		cancel()
		attacking.Wait()
		s.await("all is as before "+a.name, func() bool {
			return s.metric("go_goroutines") < goroutines+20 && s.metric("process_open_fds") < files+10 && s.metric("token_broker_connections") <= 4
		})
	}
	calls, p99, longest := stop()
	s.await("no call is under way", func() bool { return s.metric("token_broker_calls_in_flight") == 0 })
	t.Logf("others: %d calls, p99 %s, longest %s; at most %d MiB", calls, p99, longest, s.memory("VmHWM")>>20)
	if p99 > mostPatience {
		t.Errorf("p99 of the others is %s, want at most %s", p99, mostPatience)
	}
	if peak := s.memory("VmHWM"); peak > mostMemory {
		t.Errorf("the process had %d MiB, want at most %d", peak>>20, mostMemory>>20)
	}
	if strings.Contains(s.log.String(), "panic") {
		t.Error("something panicked")
	}
}

type number struct{}

// cut says whether the server, or the end of the attack, has ended a connection.
func cut(err error) bool {
	var op *net.OpError
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.As(err, &op)
}

// closeWith closes a connection when ctx ends.
func closeWith(ctx context.Context, c io.Closer) (stop func() bool) {
	return context.AfterFunc(ctx, func() { c.Close() })
}

// again connects anew whenever the server has had enough.
func again(do func(context.Context, *testh2.Conn) error) attack {
	return func(ctx context.Context, s siege) error {
		for ctx.Err() == nil {
			c, err := testh2.Dial(s.address, s.hostile)
			if err != nil {
				if cut(err) {
					continue
				}
				return err
			}
			stop := closeWith(ctx, c)
			err = do(ctx, c)
			stop()
			c.Close()
			if err != nil && !cut(err) {
				return err
			}
		}
		return nil
	}
}

// slow holds a connection open with as little as possible.
func slow(ctx context.Context, s siege) error {
	raw, err := net.Dial("tcp", s.address)
	if err != nil {
		return err
	}
	defer raw.Close()
	defer closeWith(ctx, raw)()
	// drip writes a byte a second.
	drip := func(w io.Writer, text []byte) error {
		ticker := time.NewTicker(time.Second)
		defer ticker.Stop()
		for _, b := range text {
			if _, err := w.Write([]byte{b}); err != nil {
				return err
			}
			select {
			case <-ticker.C:
			case <-ctx.Done():
				return nil
			}
		}
		return nil
	}
	hello := append([]byte{22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3}, bytes.Repeat([]byte{7}, 100)...)
	settings := s.hostile.Clone()
	settings.NextProtos = []string{"h2"}
	secure := tls.Client(raw, settings)
	kind := ctx.Value(number{}).(int) % 7
	if kind >= 3 {
		if err := secure.HandshakeContext(ctx); err != nil {
			return harmless(err)
		}
	}
	c := testh2.New(secure)
	greet := func() error {
		_, err := io.WriteString(c, http2.ClientPreface)
		return errors.Join(err, c.Framer.WriteSettings())
	}
	switch kind {
	case 0: // nothing but TCP
	case 1: // half a handshake
		_, err = raw.Write(hello)
	case 2:
		err = drip(raw, hello)
	case 3: // nothing but TLS
	case 4: // nothing but HTTP/2
		err = greet()
	case 5: // calls without messages
		err = greet()
		for range 100 {
			if err == nil {
				_, err = c.Begin(pb.TokenBroker_IssueToken_FullMethodName)
			}
		}
	case 6: // a message, byte by byte
		if err = greet(); err != nil {
			break
		}
		var stream uint32
		if stream, err = c.Begin(pb.TokenBroker_IssueToken_FullMethodName); err == nil {
			err = drip(writer(func(b []byte) error { return c.Framer.WriteData(stream, false, b) }), testh2.Prefixed(100, bytes.Repeat([]byte("a"), 100)))
		}
	}
	if err != nil {
		return harmless(err)
	}
	<-ctx.Done()
	return nil
}

func harmless(err error) error {
	if cut(err) {
		return nil
	}
	return err
}

type writer func([]byte) error

func (w writer) Write(b []byte) (int, error) { return len(b), w(b) }

// continuations sends a header that never ends.
func continuations(ctx context.Context, c *testh2.Conn) error {
	go c.Drain()
	block := c.Block(pb.TokenBroker_IssueToken_FullMethodName)
	if err := c.Framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block}); err != nil {
		return err
	}
	filler := c.Block("/x", hpack.HeaderField{Name: "x-filler", Value: strings.Repeat("x", 8000), Sensitive: true})
	for ctx.Err() == nil {
		if err := c.Framer.WriteContinuation(1, false, filler); err != nil {
			return err
		}
	}
	return nil
}

// bomb sends headers that are small on the wire and large when decoded.
func bomb(ctx context.Context, c *testh2.Conn) error {
	go c.Drain()
	large := hpack.HeaderField{Name: "x-large", Value: strings.Repeat("x", 3900)}
	fields := slices.Repeat([]hpack.HeaderField{large}, 15_000) // some 60 MB, a byte each
	for ctx.Err() == nil {
		if _, err := c.Begin(pb.TokenBroker_IssueToken_FullMethodName, fields...); err != nil {
			return err
		}
	}
	return nil
}

// manyHeaders sends 100,000 of them, in frames that are allowed.
func manyHeaders(ctx context.Context, c *testh2.Conn) error {
	go c.Drain()
	fields := make([]hpack.HeaderField, 100_000)
	for i := range fields {
		fields[i] = hpack.HeaderField{Name: fmt.Sprint("x-", i), Value: "1", Sensitive: true}
	}
	for stream := uint32(1); ctx.Err() == nil; stream += 2 {
		block := c.Block(pb.TokenBroker_IssueToken_FullMethodName, fields...)
		first, rest := block[:16_000], block[16_000:]
		if err := c.Framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: first}); err != nil {
			return err
		}
		for len(rest) > 0 {
			n := min(16_000, len(rest))
			if err := c.Framer.WriteContinuation(stream, n == len(rest), rest[:n]); err != nil {
				return err
			}
			rest = rest[n:]
		}
	}
	return nil
}

// rapidResets is CVE-2023-44487.
func rapidResets(ctx context.Context, c *testh2.Conn) error {
	go c.Drain()
	for ctx.Err() == nil {
		// Whole calls as well, whose handlers begin.
		stream, err := c.Begin(pb.TokenBroker_IssueToken_FullMethodName)
		if err == nil && stream%4 == 1 {
			err = c.Send(stream, []byte("\n\binvoices"))
		}
		if err == nil {
			err = c.Framer.WriteRSTStream(stream, http2.ErrCodeCancel)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// pings wants answers, and reads none.
func pings(ctx context.Context, c *testh2.Conn) error {
	for ctx.Err() == nil {
		for range 100 {
			if err := errors.Join(c.Framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20}), c.Framer.WritePing(false, [8]byte{1})); err != nil {
				return err
			}
		}
	}
	return nil
}

// hugeMessages claims, and sends, far more than is read.
func hugeMessages(ctx context.Context, c *testh2.Conn) error {
	chunk := make([]byte, 16<<10)
	credit, err := 65_535, error(nil)
	for ctx.Err() == nil {
		stream, err := c.Begin(pb.TokenBroker_IssueToken_FullMethodName)
		if err != nil {
			return err
		}
		for i := range 4 { // what the stream's window takes
			part := chunk[:15<<10]
			if i == 0 {
				part = testh2.Prefixed(100<<20, part[5:])
			}
			if credit, err = send(c, stream, part, credit); err != nil {
				return err
			}
		}
	}
	return err
}

// halfMessages sends as many halves as the server takes, and waits.
func halfMessages(ctx context.Context, c *testh2.Conn) error {
	credit, err := 65_535, error(nil)
	for range 250 {
		stream, err := c.Begin(pb.TokenBroker_IssueToken_FullMethodName)
		if err != nil {
			return err
		}
		for i := range 4 {
			part := make([]byte, 15<<10)
			if i == 0 {
				part = testh2.Prefixed(64<<10, part[5:])
			}
			if credit, err = send(c, stream, part, credit); err != nil {
				return err
			}
		}
	}
	<-ctx.Done()
	return err
}

// send sends within the connection's window, which it returns.
func send(c *testh2.Conn, stream uint32, part []byte, credit int) (int, error) {
	for credit < len(part) {
		frame, err := c.Framer.ReadFrame()
		if err != nil {
			return 0, err
		}
		switch f := frame.(type) {
		case *http2.WindowUpdateFrame:
			if f.StreamID == 0 {
				credit += int(f.Increment)
			}
		case *http2.PingFrame:
			err = c.Framer.WritePing(true, f.Data)
		case *http2.SettingsFrame:
			if !f.IsAck() {
				err = c.Framer.WriteSettingsAck()
			}
		case *http2.GoAwayFrame:
			return 0, io.EOF
		}
		if err != nil {
			return 0, err
		}
	}
	return credit - len(part), c.Framer.WriteData(stream, false, part)
}

// A message of 100 MB from a client that means well.
func TestMessageOf100MB(t *testing.T) {
	t.Parallel()
	s := newSiege(t)
	conn, err := grpc.NewClient("passthrough:///"+s.address, grpc.WithTransportCredentials(credentials.NewTLS(s.modest)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := pb.NewTokenBrokerClient(conn)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := client.IssueToken(ctx, &pb.IssueTokenRequest{Profile: strings.Repeat("a", 100<<20)}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("got %.200v", err)
	}
	if _, err := client.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Errorf("a call after it: %v", err)
	}
	if peak := s.memory("VmHWM"); peak > 200<<20 {
		t.Errorf("the process had %d MiB", peak>>20)
	}
}

// What comes over the limit, hangs or drips at the admin address keeps nobody
// from health and metrics.
func TestHostileVisitors(t *testing.T) {
	s := newSiege(t)
	goroutines, files := s.metric("go_goroutines"), s.metric("process_open_fds")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var attacking sync.WaitGroup
	begins := []string{
		"",                       // nothing but TCP
		"GET /metrics HTTP/1.1",  // half a line
		"GET / HTTP/1.1\r\nX: y", // half a header
		"POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\nhalf", // half a body
		"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",                              // idle after an answer
	}
	for i := range adminConnections + 200 {
		raw, err := net.Dial("tcp", s.admin)
		if err != nil {
			t.Fatal(err)
		}
		context.AfterFunc(ctx, func() { raw.Close() })
		if _, err := io.WriteString(raw, begins[i%len(begins)]); err != nil && !cut(err) {
			t.Fatal(err)
		}
		attacking.Go(func() {
			// To the end of the answer, then slowly on.
			ticker := time.NewTicker(time.Second)
			defer ticker.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-ticker.C:
					if _, err := raw.Write([]byte("a")); err != nil {
						return
					}
				}
			}
		})
	}
	fetch := func() {
		t.Helper()
		client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
		for _, path := range []string{"/healthz", "/readyz", "/metrics"} {
			a, err := client.Get("http://" + s.admin + path)
			if err != nil {
				t.Fatal(err)
			}
			a.Body.Close()
			if a.StatusCode != http.StatusOK {
				t.Errorf("%s: %s", path, a.Status)
			}
		}
	}
	for range 20 {
		fetch()
	}
	if n := s.metric("process_open_fds"); n > files+adminConnections+10 {
		t.Errorf("%v files are open", n)
	}
	// Headers without end.
	for range 20 {
		raw, err := net.Dial("tcp", s.admin)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.WriteString(raw, "GET /healthz HTTP/1.1\r\nHost: x\r\n")
		for sent := 0; err == nil && sent < 100<<20; sent += 8000 {
			_, err = io.WriteString(raw, "X-Filler: "+strings.Repeat("x", 7988)+"\r\n")
		}
		if err == nil {
			t.Error("the server has read a header of 100 MB")
		}
		raw.Close()
	}
	fetch()
	cancel()
	attacking.Wait()
	s.await("all is as before", func() bool {
		return s.metric("go_goroutines") < goroutines+20 && s.metric("process_open_fds") < files+10
	})
	peak := s.memory("VmHWM")
	t.Logf("at most %d MiB", peak>>20)
	if peak > mostMemory/2 {
		t.Errorf("the process had %d MiB", peak>>20)
	}
}
