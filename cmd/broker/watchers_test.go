package main

import (
	"cmp"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/testh2"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

const (
	watcherCallers = 5
	// lastWatcher is by when the last watcher has a new token, in the median: the
	// machine does other things, too.
	lastWatcher = 250 * time.Millisecond
	// mostOfAStream is what the server may hold for one watcher, in bytes.
	mostOfAStream = 40 << 10
)

// TestTenThousandWatchers has 10,000 streams follow one token of a real broker,
// over mutual TLS, and prints what that takes: "make scale" runs it. Under the race
// detector there are fewer of them.
func TestTenThousandWatchers(t *testing.T) {
	busy := load()
	s, answered := newTimedStage(t, sandbox.Options{Clients: []sandbox.Client{
		{ID: "invoices", GrantTypes: []string{"client_credentials"}, AccessTokenLifetime: 12 * time.Second},
	}})
	a := testca.New(t)
	s.tlsFiles(a)
	config := strings.NewReplacer(
		`{address: "127.0.0.1:0"}`+"\nadmin", `{address: "127.0.0.1:0", tls: {certificate: server.pem, private_key: server.key, client_ca: ca.pem}}`+"\nadmin",
		"level: debug", "level: info",
	).Replace(read(t, s.config("audit: {file: "+s.path("audit")+"}", "policy:", `  - {callers: ["dns:*.example.com"], profiles: [invoices], allow: [issue, watch, revoke]}`)))
	p := start(t, s.write("config.yaml", config))
	as := func(name string) *tls.Config {
		return &tls.Config{RootCAs: a.Pool(), ServerName: "127.0.0.1", Certificates: []tls.Certificate{a.Leaf(testca.Named(name))}}
	}
	other := pb.NewTokenBrokerClient(p.as(a, a.Leaf(testca.Named("other.example.com"))))
	if _, err := other.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Fatal(err)
	}
	idle := p.usage()
	c := &crowd{t: t}
	var callers []*tls.Config
	for i := range watcherCallers {
		callers = append(callers, as(fmt.Sprintf("caller-%d.example.com", i)))
	}
	for i := range watcherConnections {
		c.connect(p.address, callers[i%watcherCallers], watchers/watcherConnections)
	}
	connected := p.usage()
	began := time.Now()
	c.watch()
	c.await("all have a token", func() bool { return c.served.Load() == watchers })
	t.Logf("%d streams on %d connections were opened, and had their token, in %v", watchers, watcherConnections, time.Since(began).Round(time.Millisecond))
	p.metric(fmt.Sprintf(`token_broker_watch_streams{profile="invoices"} %s`, count(watchers)))
	p.metric(fmt.Sprintf("token_broker_calls_in_flight %s", count(watchers)))

	var renewals, revocations []time.Duration
	for range watcherRounds {
		_, last := c.next(c.newest())
		renewals = append(renewals, last.Sub(answered()))
	}
	for range watcherRounds {
		was := c.newest()
		began := time.Now()
		if _, err := other.RevokeToken(t.Context(), &pb.RevokeTokenRequest{Profile: "invoices"}); err != nil {
			t.Fatal(err)
		}
		_, last := c.next(was)
		revocations = append(revocations, last.Sub(began))
	}
	full := p.usage()
	slices.Sort(renewals)
	slices.Sort(revocations)
	t.Logf("a renewal reached the last stream %v after the endpoint's answer, a revocation's successor %v after the call", rounded(renewals), rounded(revocations))
	switch median := max(renewals[watcherRounds/2], revocations[watcherRounds/2]); {
	case raceEnabled:
		t.Logf("NOT JUDGED: the race detector takes most of these times; without it they are %v at most", lastWatcher)
	case median > lastWatcher:
		t.Errorf("the last stream had its token after %v, want %v at most; when the test began %s processes wanted one of %d cores", median, lastWatcher, busy, runtime.NumCPU())
	}
	stream := (full.resident - connected.resident) / watchers
	t.Logf("a stream takes %d bytes of resident memory, %d with its share of a connection; %d of heap and stacks in use; %.2f goroutines",
		stream, (full.resident-idle.resident)/watchers, (full.inUse-connected.inUse)/watchers, float64(full.goroutines-connected.goroutines)/watchers)
	if stream > mostOfAStream {
		t.Errorf("a stream takes %d bytes, want %d at most", stream, mostOfAStream)
	}
	if full.goroutines-connected.goroutines > watchers+watchers/100 {
		t.Errorf("%d streams have %d goroutines", watchers, full.goroutines-connected.goroutines)
	}

	c.leave()
	p.metric(`token_broker_watch_streams{profile="invoices"} 0`)
	p.metric("token_broker_calls_in_flight 0")
	var left usage
	p.await("nothing of the streams is left", func() bool {
		left = p.usage()
		return left.goroutines <= idle.goroutines+5 && left.live <= idle.live+5<<20
	})
	t.Logf("when all had gone, there were %d goroutines and %d KiB of heap, before them %d and %d", left.goroutines, left.live>>10, idle.goroutines, idle.live>>10)
}

// load is how many processes wanted a core in the last minute, if the system says it.
func load() string {
	content, _ := os.ReadFile("/proc/loadavg")
	first, _, _ := strings.Cut(string(content), " ")
	return cmp.Or(first, "an unknown number of")
}

// count is a number as a regular expression for the metrics.
func count(n int) string {
	return "(" + strconv.Itoa(n) + "|" + regexp.QuoteMeta(strconv.FormatFloat(float64(n), 'g', -1, 64)) + ")"
}

func rounded(all []time.Duration) (r []time.Duration) {
	for _, d := range all {
		r = append(r, d.Round(time.Millisecond))
	}
	return r
}

// newTimedStage is a stage whose endpoint notes when it has answered; answered
// says when it last has.
func newTimedStage(t testing.TB, o sandbox.Options) (s *stage, answered func() time.Time) {
	t.Helper()
	v, err := sandbox.New(o)
	if err != nil {
		t.Fatal(err)
	}
	var last atomic.Pointer[time.Time]
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v.ServeHTTP(w, r)
		if strings.HasSuffix(r.URL.Path, "/token") {
			now := time.Now()
			last.Store(&now)
		}
	}))
	t.Cleanup(func() {
		v.Close()
		web.Close()
	})
	s = &stage{t: t, dir: t.TempDir(), vantage: v, url: web.URL}
	s.write("secret", v.ClientSecret("invoices")+"\n")
	return s, func() time.Time { return *last.Load() }
}

// usage is what a process takes.
type usage struct{ resident, live, inUse, goroutines int }

func (p *process) usage() usage {
	p.t.Helper()
	_, page := p.get("/metrics")
	value := func(name string) int {
		m := regexp.MustCompile(`(?m)^` + name + ` (.*)$`).FindStringSubmatch(page)
		if m == nil {
			p.t.Fatalf("there is no metric %s", name)
		}
		f, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			p.t.Fatal(err)
		}
		return int(f)
	}
	return usage{
		resident: value("process_resident_memory_bytes"), live: value("go_memstats_heap_alloc_bytes"),
		inUse: value("go_memstats_heap_inuse_bytes") + value("go_memstats_stack_inuse_bytes"), goroutines: value("go_goroutines"),
	}
}

// crowd is many streams of WatchToken on some connections, read with as little
// effort as can be: the machine is shared with whom they watch.
type crowd struct {
	t      testing.TB
	served atomic.Int64 // streams that have had a token

	mu          sync.Mutex
	connections []*crowded
	arrivals    map[string]*arrival // by token id
	latest      string
	reading     sync.WaitGroup
}

// arrival of one token.
type arrival struct {
	streams int
	last    time.Time
}

// crowded is one of its connections.
type crowded struct {
	*testh2.Conn
	streams int
	last    []string // token id, by place of the stream
}

func (c *crowd) connect(address string, settings *tls.Config, streams int) {
	c.t.Helper()
	conn, err := testh2.Dial(address, settings)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { conn.Close() })
	if err := conn.Framer.WriteWindowUpdate(0, 1<<30); err != nil { // for all streams of the connection
		c.t.Fatal(err)
	}
	if err := conn.Ping(); err != nil {
		c.t.Fatal(err)
	}
	c.connections = append(c.connections, &crowded{Conn: conn, streams: streams, last: make([]string, streams)})
}

// watch opens the streams.
func (c *crowd) watch() {
	c.t.Helper()
	c.arrivals = map[string]*arrival{}
	request, err := proto.Marshal(&pb.WatchTokenRequest{Profile: "invoices"})
	if err != nil {
		c.t.Fatal(err)
	}
	for _, k := range c.connections {
		first := uint32(0)
		for i := range k.streams {
			stream, err := k.Begin(pb.TokenBroker_WatchToken_FullMethodName)
			if err == nil {
				err = k.Send(stream, request)
			}
			if err != nil {
				c.t.Fatal(err)
			}
			if i == 0 {
				first = stream
			}
		}
		c.reading.Go(func() { c.read(k, first) })
	}
}

// read notes what comes until the connection ends.
func (c *crowd) read(k *crowded, first uint32) {
	k.Framer.SetReuseFrames()
	for {
		frame, err := k.Framer.ReadFrame()
		if err != nil {
			return
		}
		switch f := frame.(type) {
		case *http2.DataFrame:
			c.note(k, int(f.StreamID-first)/2, tokenID(f.Data()))
		case *http2.PingFrame:
			if !f.IsAck() {
				_ = k.Framer.WritePing(true, f.Data) // or the connection has ended
			}
		case *http2.MetaHeadersFrame:
			if f.StreamEnded() {
				c.t.Errorf("stream %d ended: %v", f.StreamID, f.Fields)
			}
		}
	}
}

// tokenID is the id in a message that is a frame's. The messages are small enough.
func tokenID(frame []byte) string {
	token, n := protowire.ConsumeBytes(frame[5+1:]) // the prefix, and the tag of field 1
	for n > 0 && len(token) > 0 {
		number, kind, tag := protowire.ConsumeTag(token)
		if number == 7 {
			id, _ := protowire.ConsumeBytes(token[tag:])
			return string(id)
		}
		token = token[tag:]
		token = token[protowire.ConsumeFieldValue(number, kind, token):]
	}
	return hex.EncodeToString(frame)
}

func (c *crowd) note(k *crowded, stream int, id string) {
	now := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	switch k.last[stream] {
	case id:
		c.t.Errorf("a stream got token %s twice", id)
	case "":
		c.served.Add(1)
	}
	k.last[stream] = id
	a := c.arrivals[id]
	if a == nil {
		a = &arrival{}
		c.arrivals[id], c.latest = a, id
	}
	a.streams++
	a.last = now
}

// newest is the token that came last.
func (c *crowd) newest() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.latest
}

// next waits until all streams have the successor of a token, and returns when the
// last of them had it.
func (c *crowd) next(was string) (id string, last time.Time) {
	c.t.Helper()
	c.await("all have the next token", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		id = c.latest
		if id == was || c.arrivals[id].streams < watchers {
			return false
		}
		last = c.arrivals[id].last
		return true
	})
	return id, last
}

func (c *crowd) await(what string, condition func() bool) {
	c.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !condition(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			c.mu.Lock()
			defer c.mu.Unlock()
			for id, a := range c.arrivals {
				c.t.Logf("%s: %d", id, a.streams)
			}
			c.t.Fatalf("%s: not within 30 s", what)
		}
	}
}

// leave closes the connections: every other one as a client does, and the rest
// without a word, as if the machine at the other end were gone.
func (c *crowd) leave() {
	c.t.Helper()
	for i, k := range c.connections {
		if i%2 == 0 {
			k.Close()
			continue
		}
		raw := k.Conn.Conn.(*tls.Conn).NetConn().(*net.TCPConn)
		if err := raw.SetLinger(0); err != nil {
			c.t.Error(err)
		}
		raw.Close()
	}
	c.reading.Wait()
}

// What any replica finds or does reaches the streams of all.
func TestWatchersOfAllReplicas(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	redis := testredis.Start(t, testredis.Options{})
	config := s.shared(redis.Address())
	replicas := []*process{start(t, config), start(t, config)}
	type arrived struct {
		id string
		at time.Time
	}
	var streams []chan arrived
	for i := range 20 {
		client := pb.NewTokenBrokerClient(replicas[i%2].dial())
		stream, err := client.WatchToken(t.Context(), &pb.WatchTokenRequest{Profile: "invoices"})
		if err != nil {
			t.Fatal(err)
		}
		tokens := make(chan arrived, 100)
		go func() {
			defer close(tokens)
			for {
				m, err := stream.Recv()
				if err != nil {
					if !strings.Contains(fmt.Sprint(status.Convert(err).Details()), "SHUTTING_DOWN") && t.Context().Err() == nil {
						t.Errorf("a stream ended with %v", err)
					}
					return
				}
				tokens <- arrived{m.GetToken().GetId(), time.Now()}
			}
		}()
		streams = append(streams, tokens)
	}
	next := func() (id string, last time.Time) {
		for _, tokens := range streams {
			select {
			case got, open := <-tokens:
				if !open || id != "" && got.id != id {
					t.Fatalf("a stream got %q, another %q", got.id, id)
				}
				id = got.id
				if got.at.After(last) {
					last = got.at
				}
			case <-time.After(20 * time.Second):
				t.Fatal("a stream got nothing for 20 s")
			}
		}
		return id, last
	}
	id, _ := next()
	admin := pb.NewTokenBrokerClient(replicas[0].dial())
	other := pb.NewTokenBrokerClient(replicas[1].dial())
	for _, c := range []struct {
		name   string
		change func() error
		within time.Duration
	}{
		{"revoked at one replica", func() error {
			_, err := admin.RevokeToken(t.Context(), &pb.RevokeTokenRequest{Profile: "invoices"})
			return err
		}, 2 * time.Second},
		{"revoked at the other", func() error {
			_, err := other.RevokeToken(t.Context(), &pb.RevokeTokenRequest{Profile: "invoices"})
			return err
		}, 2 * time.Second},
		{"reported at the other", func() error {
			for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) { // until the report counts
				_, err := other.RefreshToken(t.Context(), &pb.RefreshTokenRequest{Profile: "invoices", RejectedTokenId: id})
				if status.Code(err) != codes.ResourceExhausted || time.Now().After(deadline) {
					return err
				}
			}
		}, 0},
	} {
		began := time.Now()
		if err := c.change(); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		was := id
		var last time.Time
		if id, last = next(); id == was {
			t.Errorf("%s: the streams got token %s again", c.name, id)
		}
		if c.within == 0 { // the answer to the report is the token
			began, c.within = time.Now(), 2*time.Second
		}
		t.Logf("%s: the last stream had the next token after %v", c.name, max(0, last.Sub(began)).Round(time.Millisecond))
		if took := last.Sub(began); took > c.within {
			t.Errorf("%s: the last stream had the next token after %v", c.name, took)
		}
	}
	if calls := s.vantage.Calls().Total; calls != 4 {
		t.Errorf("%d token requests, want 4", calls)
	}
	// One replica stops: its watchers are sent elsewhere, and the others stay.
	if code := replicas[0].stop(); code != 0 {
		t.Errorf("exit status %d", code)
	}
	for i, tokens := range streams {
		if i%2 == 1 {
			continue
		}
		if got, open := <-tokens; open {
			t.Errorf("a stream of the replica that stopped got %s", got.id)
		}
	}
	if _, err := other.RevokeToken(t.Context(), &pb.RevokeTokenRequest{Profile: "invoices"}); err != nil {
		t.Fatal(err)
	}
	for i, tokens := range streams {
		if i%2 == 0 {
			continue
		}
		select {
		case got := <-tokens:
			if got.id == "" || got.id == id {
				t.Errorf("a stream of the replica that stays got %q", got.id)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("a stream of the replica that stays got nothing")
		}
	}
}

// Who watches while a replica stops is sent to another one, with or without a
// token, and never told that the endpoint is at fault.
func TestStopSendsWatchersElsewhere(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	p := start(t, s.config())
	client := pb.NewTokenBrokerClient(p.dial())
	watch := func() grpc.ServerStreamingClient[pb.WatchTokenResponse] {
		stream, err := client.WatchToken(t.Context(), &pb.WatchTokenRequest{Profile: "invoices"})
		if err != nil {
			t.Fatal(err)
		}
		return stream
	}
	served := watch()
	if _, err := served.Recv(); err != nil {
		t.Fatal(err)
	}
	if err := s.vantage.Fault(sandbox.Fault{Hang: true, Times: -1}); err != nil {
		t.Fatal(err)
	}
	if _, err := client.RevokeToken(t.Context(), &pb.RevokeTokenRequest{Profile: "invoices"}); err != nil {
		t.Fatal(err)
	}
	waiting := watch()
	p.metric("token_broker_calls_in_flight 2")
	began := time.Now()
	if code := p.stop(); code != 0 {
		t.Errorf("exit status %d", code)
	}
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("it took %v to stop", took)
	}
	for name, stream := range map[string]grpc.ServerStreamingClient[pb.WatchTokenResponse]{"with a token": served, "without": waiting} {
		_, err := stream.Recv()
		st := status.Convert(err)
		if details := fmt.Sprint(st.Details()); st.Code() != codes.Unavailable || !strings.Contains(details, `"SHUTTING_DOWN"`) || !strings.Contains(details, "retry_delay") {
			t.Errorf("%s: %v %v", name, err, st.Details())
		}
	}
}
