package store

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/faultproxy"
	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/testproc"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
)

// slack for what a busy machine adds to a time that is promised.
const slack = 300 * time.Millisecond

var (
	// counting counts its runs in the hash.
	counting = newScript("counting", `return {1, redis.call('TIME')[1] * 1000, redis.call('HINCRBY', KEYS[1], 'n', 1)}`)
	// telling replies with the time that it is told.
	telling = newScript("telling", `return {1, tonumber(ARGV[1])}`)
)

// listener is what a link tells its owner.
type listener struct {
	mu           sync.Mutex
	messages     []string
	resyncs      int
	incarnations int
	hold         chan struct{} // while not nil, heard waits for it
	log          bytes.Buffer
}

func (h *listener) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.log.Write(p)
}

func (h *listener) heard(m string) {
	if h.hold != nil {
		<-h.hold
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.messages = append(h.messages, m)
}

func (h *listener) told() (messages []string, resyncs, incarnations int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.messages), h.resyncs, h.incarnations
}

func (h *listener) logged() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.log.String()
}

func open(t *testing.T, o linkOptions, a Access) (*link, *listener) {
	t.Helper()
	h := &listener{}
	l := openFor(h, o, a)
	t.Cleanup(l.close)
	return l, h
}

func openFor(h *listener, o linkOptions, a Access) *link {
	count := func(n *int) func() {
		return func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			*n++
		}
	}
	o.log = slog.New(slog.NewTextHandler(h, &slog.HandlerOptions{Level: slog.LevelDebug}))
	o.heard, o.resync, o.incarnation = h.heard, count(&h.resyncs), count(&h.incarnations)
	return newLink(o, a)
}

func at(addresses ...string) linkOptions { return linkOptions{addresses: addresses} }

func eventually(t *testing.T, what string, within time.Duration, condition func() bool) {
	t.Helper()
	begun := time.Now()
	for !condition() {
		if time.Since(begun) > within {
			t.Fatalf("not within %v: %s", within, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// awaitSubscription returns when the link hears what is published.
func awaitSubscription(t *testing.T, l *link) {
	t.Helper()
	eventually(t, "subscribed", 10*time.Second, func() bool { return l.stats().subscribed })
}

// runs returns how often counting has run.
func runs(t *testing.T, s *testredis.Server, key string) any {
	t.Helper()
	return s.Do("HGET", key, "n")
}

func outcomeIs(err error, want outcome) bool {
	var e *linkError
	return errors.As(err, &e) && e.outcome == want
}

func TestLinkRunsScripts(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{})
	l, h := open(t, at(s.Address()), Access{})
	for want := range int64(3) {
		reply, err := l.run(t.Context(), counting, "tb1:{f}", "some", 1, []byte("arguments"))
		if err != nil || len(reply) != 3 || reply[2] != want+1 {
			t.Fatalf("%v, %v; want %d", reply, err, want+1)
		}
	}
	awaitSubscription(t, l)
	stats := l.stats()
	if !stats.reachable || !stats.unreachableSince.IsZero() || stats.calls[callKind{"counting", done}] != 3 {
		t.Errorf("%+v", stats)
	}
	if stats.clockOffset.Abs() > 2*time.Second {
		t.Errorf("the clock of the same machine is %v ahead", stats.clockOffset)
	}
	if _, _, incarnations := h.told(); incarnations != 0 {
		t.Errorf("the first contact counts as an incarnation")
	}
}

func TestLinkSaysAtOnceThatNobodyListens(t *testing.T) {
	t.Parallel()
	l, _ := open(t, at(testproc.FreeAddress(t)), Access{})
	for range 5 {
		begun := time.Now()
		_, err := l.run(t.Context(), counting, "tb1:{f}")
		if took := time.Since(begun); !errors.Is(err, broker.ErrStoreRefused) || took > 50*time.Millisecond+slack {
			t.Errorf("after %v: %v", took, err)
		}
	}
	if s := l.stats(); s.reachable || s.unreachableSince.IsZero() || s.lastFailure != refused || s.breakerOpens != 1 {
		t.Errorf("%+v", s)
	}
}

func TestLinkWaitsForNoFrozenRedis(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{})
	l, _ := open(t, at(s.Address()), Access{})
	awaitSubscription(t, l)
	crowd := func() {
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() {
				begun := time.Now()
				_, err := l.run(t.Context(), counting, "tb1:{f}")
				if took := time.Since(begun); err == nil || took > callTimeout+slack {
					t.Errorf("after %v: %v", took, err)
				}
			})
		}
		wg.Wait()
	}
	s.Pause()
	crowd()
	eventually(t, "the breaker is open", time.Second, func() bool {
		_, err := l.run(t.Context(), counting, "tb1:{f}")
		return strings.Contains(err.Error(), "not tried")
	})
	begun := time.Now()
	const calls = 1000
	for range calls {
		if _, err := l.run(t.Context(), counting, "tb1:{f}"); !outcomeIs(err, timeout) {
			t.Fatalf("the error is not that of the calls before: %v", err)
		}
	}
	if took := time.Since(begun); took > calls*100*time.Microsecond+slack {
		t.Errorf("%d calls of an open breaker took %v", calls, took)
	}
	if st := l.stats(); st.reachable || st.breakerOpens != 1 {
		t.Errorf("%+v", st)
	}
	s.Continue()
	eventually(t, "calls work again", probeInterval+callTimeout+time.Second, func() bool {
		_, err := l.run(t.Context(), counting, "tb1:{f}")
		return err == nil
	})
}

func TestLinkServesACrowd(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{})
	l, _ := open(t, at(s.Address()), Access{})
	var wg sync.WaitGroup
	for range 500 {
		wg.Go(func() {
			if _, err := l.run(t.Context(), counting, "tb1:{f}"); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := runs(t, s, "tb1:{f}"); n != "500" {
		t.Errorf("%v runs", n)
	}
	clients := strings.Count(s.Do("CLIENT", "LIST", "TYPE", "NORMAL").(string), "\n")
	if clients > poolSize+2 { // and the one that asks, and the one that is about to subscribe
		t.Errorf("%d connections", clients)
	}
}

func TestLinkRepeatsALostCallOnce(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{})
	proxy := faultproxy.New(t, s.Address())
	l, _ := open(t, at(proxy.Address()), Access{})
	evaluations := faultproxy.Named("eval", "evalsha")
	if _, err := l.run(t.Context(), counting, "tb1:{warm}"); err != nil {
		t.Fatal(err)
	}

	proxy.Set(faultproxy.Faults{CutReply: faultproxy.Once(evaluations)})
	if reply, err := l.run(t.Context(), counting, "tb1:{once}"); err != nil || reply[2] != int64(2) {
		t.Errorf("one reply cut: %v, %v", reply, err)
	}
	if n := l.stats().retries; n != 1 {
		t.Errorf("one reply cut: %d retries are counted", n)
	}

	proxy.Set(faultproxy.Faults{CutReply: evaluations})
	if _, err := l.run(t.Context(), counting, "tb1:{all}"); !outcomeIs(err, broken) {
		t.Errorf("all replies cut: %v", err)
	}
	if n := runs(t, s, "tb1:{all}"); n != "2" {
		t.Errorf("all replies cut: %v runs", n)
	}

	proxy.Heal()
	eventually(t, "it works again", 2*time.Second, func() bool {
		_, err := l.run(t.Context(), counting, "tb1:{healed}")
		return err == nil
	})
}

func TestLinkDoesNotCallALostCallRefused(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{})
	proxy := faultproxy.New(t, s.Address())
	l, _ := open(t, at(proxy.Address()), Access{})
	if _, err := l.run(t.Context(), counting, "tb1:{f}"); err != nil {
		t.Fatal(err)
	}
	proxy.Set(faultproxy.Faults{CutReply: func(c faultproxy.Command) bool {
		if c.Name == "evalsha" {
			go proxy.Set(faultproxy.Faults{Refuse: true}) // not from within
			return true
		}
		return false
	}})
	_, err := l.run(t.Context(), counting, "tb1:{f}")
	if err == nil || runs(t, s, "tb1:{f}") == "1" {
		t.Fatalf("this test shows nothing: %v", err)
	}
	if errors.Is(err, broker.ErrStoreRefused) {
		t.Errorf("it was executed, and the error says that it cannot have been: %v", err)
	}
}

func TestLinkForgetsDeadConnections(t *testing.T) {
	t.Parallel()
	authority := testca.New(t)
	for name, c := range map[string]struct {
		redis  testredis.Options
		access Access
	}{
		"plain": {},
		"tls":   {testredis.Options{TLS: authority}, Access{TLS: &tls.Config{RootCAs: authority.Pool()}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := testredis.Start(t, c.redis)
			l, h := open(t, at(s.Address()), c.access)
			var wg sync.WaitGroup
			for range 50 { // so that there are several
				wg.Go(func() { _, _ = l.run(t.Context(), counting, "tb1:{f}") })
			}
			wg.Wait()
			for range 20 {
				_, _ = l.run(t.Context(), counting, "tb1:{f}")
			}
			if n := l.stats().connections; n > poolSize+1 {
				t.Errorf("%d connections were made: good ones are forgotten", n)
			}
			s.Restart()
			if _, err := l.run(t.Context(), counting, "tb1:{f}"); err != nil {
				t.Error(err)
			}
			if n := l.stats().retries; n != 0 {
				t.Errorf("%d calls were sent to connections that were closed", n)
			}
			if _, _, incarnations := h.told(); incarnations != 1 {
				t.Errorf("%d incarnations were noticed, want 1", incarnations)
			}
		})
	}
}

func TestLinkSurvivesScriptFlush(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{})
	l, _ := open(t, at(s.Address()), Access{})
	stop, flushed := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(flushed)
		for {
			select {
			case <-stop:
				return
			default:
				s.Do("SCRIPT", "FLUSH")
			}
		}
	}()
	for range 300 {
		if _, err := l.run(t.Context(), counting, "tb1:{f}"); err != nil {
			t.Error(err)
		}
	}
	close(stop)
	<-flushed
	if n := runs(t, s, "tb1:{f}"); n != "300" {
		t.Errorf("%v runs", n)
	}
}

func TestLinkTellsWhatIsWrong(t *testing.T) {
	t.Parallel()
	master := testredis.Start(t, testredis.Options{})
	for _, c := range []struct {
		name    string
		options testredis.Options
		access  Access
		user    string
		prepare func(*testredis.Server)
		want    outcome
		advice  string
	}{
		{name: "full", want: outOfMemory, advice: "maxmemory", prepare: func(s *testredis.Server) { s.Do("CONFIG", "SET", "maxmemory", "1") }},
		{name: "replica", want: readOnly, advice: "failover", prepare: func(s *testredis.Server) { s.Do("REPLICAOF", "127.0.0.1", strings.Split(master.Address(), ":")[1]) }},
		{name: "unreplicated", want: noReplicas, advice: "min-replicas-to-write", prepare: func(s *testredis.Server) { s.Do("CONFIG", "SET", "min-replicas-to-write", "1") }},
		{name: "protected", want: unauthenticated, advice: "store.redis.password", options: testredis.Options{Password: "hunter2"}},
		{name: "wrong password", want: unauthenticated, advice: "store.redis.password", options: testredis.Options{Password: "hunter2"}, access: Access{Password: broker.NewSecret("s3cr3t")}},
		{name: "no TLS there", want: timeout, advice: "TLS", access: Access{TLS: &tls.Config{}}},
		{name: "no TLS here", want: broken, advice: "TLS", options: testredis.Options{TLS: testca.New(t)}},
		{name: "another authority", want: broken, advice: "TLS", options: testredis.Options{TLS: testca.New(t)}, access: Access{TLS: &tls.Config{RootCAs: testca.New(t).Pool()}}},
		{name: "forbidden", want: forbidden, advice: "ACL", user: "broker", access: Access{Password: broker.NewSecret("s3cr3t")}, options: testredis.Options{Users: []string{"broker on >s3cr3t ~tb1:* &tb1:* +@all -eval -evalsha"}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := testredis.Start(t, c.options)
			if c.prepare != nil {
				c.prepare(s)
			}
			o := at(s.Address())
			o.username = c.user
			l, h := open(t, o, c.access)
			for range breakerThreshold + 1 {
				_, err := l.run(t.Context(), counting, "tb1:{f}")
				if !outcomeIs(err, c.want) || !strings.Contains(err.Error(), c.advice) || !strings.Contains(err.Error(), s.Address()) {
					t.Errorf("%v", err)
				}
				if found, err := l.headers(t.Context(), []string{"tb1:{f}"}, "n"); c.want.means() == nodeFails && c.want != readOnly && (err == nil || found[0] != nil) { // a replica can be read
					t.Errorf("headers: %v, %v", found, err)
				}
				if text := fmt.Sprint(err) + h.logged(); strings.Contains(text, "s3cr3t") || strings.Contains(text, "hunter2") {
					t.Errorf("it tells a secret: %s", text)
				}
			}
			if open := l.stats().breakerOpens > 0; open != (c.want.means() == nodeFails) {
				t.Errorf("the breaker opened: %v", open)
			}
		})
	}
}

// answer is an error reply.
type answer string

func (a answer) Error() string { return string(a) }
func (a answer) RedisError()   {}

func TestLinkClassifiesFailures(t *testing.T) {
	for _, c := range []struct {
		err   error
		want  outcome
		means meaning
	}{
		{answer("LOADING Redis is loading the dataset in memory"), loading, nodeFails},
		{answer("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'."), masterDown, nodeFails},
		{answer("CLUSTERDOWN The cluster is down"), clusterDown, nodeFails},
		{answer("NOAUTH Authentication required."), unauthenticated, nodeFails},
		{answer("MOVED 1 127.0.0.1:6379"), redirected, nodeAnswers},
		{answer("TBFOREIGN the hash is not a record"), other, nodeAnswers},
		{redis.ErrPoolTimeout, crowded, nothing},
		{redis.ErrClosed, broken, nodeFails},
		{io.EOF, broken, nodeFails},
		{&net.DNSError{Err: "no such host", Name: "redis"}, broken, nodeFails},
		{fmt.Errorf("dialing: %w", syscall.ECONNREFUSED), refused, nodeFails},
		{fmt.Errorf("reading: %w", os.ErrDeadlineExceeded), timeout, nodeFails},
	} {
		if got := outcomeOf(c.err); got != c.want || got.means() != c.means {
			t.Errorf("%v: %s, which means %d", c.err, got, got.means())
		}
	}
}

func TestLinkReadsRedirections(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{})
	l, _ := open(t, at(s.Address()), Access{})
	failing := newScript("failing", `return redis.error_reply(ARGV[1])`)
	for text, want := range map[string]string{
		"MOVED 1 127.0.0.1:6379":     "127.0.0.1:6379",
		"MOVED 1 redis.example:6379": "redis.example:6379",
		"MOVED 1 2001:db8::1:6379":   "[2001:db8::1]:6379",
		"ASK 1 127.0.0.1:6379":       "127.0.0.1:6379",
		"ERR moved":                  "",
	} {
		_, err := l.run(t.Context(), failing, "tb1:{f}", text)
		var e *linkError
		if !errors.As(err, &e) {
			t.Fatal(err)
		}
		if got, asking := redirection(e.err); got != want || asking != strings.HasPrefix(text, "ASK") {
			t.Errorf("%v: %q, asking %v", err, got, asking)
		}
	}
}

func TestLinkCutsOffWhatRedisRepeats(t *testing.T) {
	l := &link{o: at("127.0.0.1:1")}
	err := l.failure("acquire", "", errors.New("ERR unknown command 'AUTH', with args beginning with: 'broker' 's3cr3t' "))
	if strings.Contains(err.Error(), "s3cr3t") {
		t.Error(err)
	}
}

func TestLinkLearnsNothingFromHastyCallers(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{})
	l, _ := open(t, at(s.Address()), Access{})
	awaitSubscription(t, l)
	gone, leave := context.WithCancel(t.Context())
	leave()
	for range 10 {
		if _, err := l.run(gone, counting, "tb1:{f}"); !outcomeIs(err, canceled) {
			t.Errorf("canceled: %v", err)
		}
		late, cancel := context.WithDeadline(t.Context(), time.Now())
		if _, err := l.run(late, counting, "tb1:{f}"); !outcomeIs(err, timeout) {
			t.Errorf("late: %v", err)
		}
		cancel()
	}
	if stats := l.stats(); stats.breakerOpens != 0 {
		t.Errorf("%+v", stats)
	}
}

func TestLinkUsesANewPassword(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{Users: []string{"broker on >old ~tb1:* &tb1:* +@all"}})
	o := at(s.Address())
	o.username = "broker"
	l, _ := open(t, o, Access{Password: broker.NewSecret("old")})
	if _, err := l.run(t.Context(), counting, "tb1:{f}"); err != nil {
		t.Fatal(err)
	}
	awaitSubscription(t, l)
	idle := clientIDs(s, "normal")
	s.Do("ACL", "SETUSER", "broker", ">new")
	l.use(Access{Password: broker.NewSecret("new")})
	eventually(t, "the idle connections are closed", time.Second, func() bool {
		return !slices.ContainsFunc(clientIDs(s, "normal"), func(id string) bool { return slices.Contains(idle, id) })
	})
	s.Do("ACL", "SETUSER", "broker", "<old")
	if _, err := l.run(t.Context(), counting, "tb1:{f}"); err != nil {
		t.Error(err)
	}
	if stats := l.stats(); !stats.subscribed || stats.subscriptions != 1 {
		t.Errorf("the subscription: %+v", stats)
	}
}

// clientIDs are those of the user "broker".
func clientIDs(s *testredis.Server, kind string) (ids []string) {
	for line := range strings.Lines(s.Do("CLIENT", "LIST", "TYPE", kind).(string)) {
		if strings.Contains(line, "user=broker") {
			id, _, _ := strings.Cut(line, " ")
			ids = append(ids, id)
		}
	}
	return ids
}

func TestLinkOfAUserWithFewRights(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{Users: []string{"broker on >secret ~tb1:* resetchannels +eval +evalsha +time +hincrby +hmget"}})
	o := at(s.Address())
	o.username = "broker"
	l, h := open(t, o, Access{Password: broker.NewSecret("secret")})
	if reply, err := l.run(t.Context(), counting, "tb1:{f}"); err != nil || reply[2] != int64(1) {
		t.Errorf("%v, %v", reply, err)
	}
	if _, confirmed, err := l.runDurably(t.Context(), counting, "tb1:{f}"); err != nil || !confirmed {
		t.Errorf("durably: confirmed %v, %v", confirmed, err)
	}
	if found, err := l.headers(t.Context(), []string{"tb1:{f}"}, "n"); err != nil || found[0][0] != "2" {
		t.Errorf("headers: %v, %v", found, err)
	}
	if err := l.publish(t.Context(), "m"); !outcomeIs(err, forbidden) {
		t.Errorf("publish: %v", err)
	}
	eventually(t, "it knows that it may not subscribe", 2*time.Second, func() bool { return l.stats().subscriptionForbidden })
	if stats := l.stats(); !stats.reachable || stats.breakerOpens != 0 {
		t.Errorf("%+v", stats)
	}
	for _, right := range []string{"INFO", "WAIT", "SUBSCRIBE"} {
		eventually(t, "the log names "+right, time.Second, func() bool { return strings.Contains(h.logged(), right) })
	}
}

func TestLinkReadsHeadersOfManyHashes(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{})
	l, _ := open(t, at(s.Address()), Access{})
	var keys []string
	for i := range 2*maxPipelined + 1 {
		keys = append(keys, fmt.Sprintf("tb1:{%d}", i))
		s.Do("HSET", keys[i], "g", i, "sealed", "value")
	}
	keys = append(keys, "tb1:{none}", "tb1:{string}")
	s.Do("SET", "tb1:{string}", "v")
	found, err := l.headers(t.Context(), keys, "g", "d")
	if err != nil || len(found) != len(keys) {
		t.Fatalf("%d, %v", len(found), err)
	}
	for i, values := range found[:2*maxPipelined+1] {
		if !slices.Equal(values, []any{fmt.Sprint(i), nil}) {
			t.Fatalf("%s: %v", keys[i], values)
		}
	}
	if rest := found[2*maxPipelined+1:]; !slices.Equal(rest[0], []any{nil, nil}) || rest[1] != nil {
		t.Errorf("nothing and a string: %v", rest)
	}
	if found, err := l.headers(t.Context(), nil, "g"); err != nil || len(found) != 0 {
		t.Errorf("of no key: %v, %v", found, err)
	}
}

func TestLinkTellsWhetherAReplicaHasAWrite(t *testing.T) {
	t.Parallel()
	master := testredis.Start(t, testredis.Options{})
	l, _ := open(t, at(master.Address()), Access{})
	durably := func() (bool, time.Duration) {
		t.Helper()
		begun := time.Now()
		reply, confirmed, err := l.runDurably(t.Context(), counting, "tb1:{f}")
		if err != nil || len(reply) != 3 {
			t.Fatalf("%v, %v", reply, err)
		}
		return confirmed, time.Since(begun)
	}
	if confirmed, took := durably(); !confirmed || took > acknowledgeTimeout {
		t.Errorf("without a replica: %v after %v", confirmed, took)
	}
	replica := testredis.Start(t, testredis.Options{Config: []string{"replicaof " + strings.ReplaceAll(master.Address(), ":", " ")}})
	eventually(t, "the replica is in step", 10*time.Second, func() bool { return strings.Contains(master.Info("replication")["slave0"], "state=online") })
	// It may still be reading what it was sent at first.
	eventually(t, "a replica has it", 5*time.Second, func() bool { confirmed, _ := durably(); return confirmed })
	replica.Pause()
	if confirmed, took := durably(); confirmed || took > acknowledgeTimeout+slack {
		t.Errorf("no replica has it: %v after %v", confirmed, took)
	}
	replica.Continue()
	eventually(t, "it is confirmed again", 2*time.Second, func() bool { confirmed, _ := durably(); return confirmed })
}

func TestLinkHearsInOrder(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{})
	l, h := open(t, at(s.Address()), Access{})
	awaitSubscription(t, l)
	var want []string
	for i := range 200 {
		want = append(want, fmt.Sprint(i))
		if err := l.publish(t.Context(), want[i]); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all is heard", 2*time.Second, func() bool { m, _, _ := h.told(); return len(m) == len(want) })
	if m, resyncs, _ := h.told(); !slices.Equal(m, want) || resyncs != 1 {
		t.Errorf("%v and %d resyncs", m, resyncs)
	}
}

func TestLinkResyncsAfterAFlood(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{})
	h := &listener{hold: make(chan struct{})}
	l := openFor(h, at(s.Address()), Access{})
	t.Cleanup(l.close)
	eventually(t, "it resyncs", 10*time.Second, func() bool { _, resyncs, _ := h.told(); return resyncs == 1 })
	const flood = 2 * inboxSize
	s.Do("EVAL", fmt.Sprintf(`for i = 1, %d do redis.call('PUBLISH', 'tb1:events', i) end`, flood), 0)
	eventually(t, "messages are dropped", 5*time.Second, func() bool { return len(l.missed) == 1 })
	close(h.hold)
	eventually(t, "it resyncs", 2*time.Second, func() bool { _, resyncs, _ := h.told(); return resyncs >= 2 })
	if stats := l.stats(); !stats.subscribed || stats.subscriptions != 1 {
		t.Errorf("%+v", stats)
	}
}

func TestLinkSubscribesAgain(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		within time.Duration
		hurt   func(s *testredis.Server, p *faultproxy.Proxy)
	}{
		{"after it was killed", time.Second, func(s *testredis.Server, _ *faultproxy.Proxy) { s.Do("CLIENT", "KILL", "TYPE", "pubsub") }},
		{"after a reset", time.Second, func(_ *testredis.Server, p *faultproxy.Proxy) { p.Reset() }},
		{"after nothing comes over it", 6 * time.Second, func(_ *testredis.Server, p *faultproxy.Proxy) {
			p.Set(faultproxy.Faults{On: faultproxy.SubscribedConnections, Replies: faultproxy.Path{Swallow: true}})
		}},
		{"after nothing leaves over it", 6 * time.Second, func(_ *testredis.Server, p *faultproxy.Proxy) {
			p.Set(faultproxy.Faults{On: faultproxy.SubscribedConnections, Replies: faultproxy.Path{Swallow: true}, Requests: faultproxy.Path{Swallow: true}})
		}},
		{"after messages do not arrive", 7 * time.Second, func(_ *testredis.Server, p *faultproxy.Proxy) { p.Set(faultproxy.Faults{DropMessages: true}) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := testredis.Start(t, testredis.Options{})
			proxy := faultproxy.New(t, s.Address())
			l, h := open(t, at(proxy.Address()), Access{})
			awaitSubscription(t, l)
			c.hurt(s, proxy)
			begun := time.Now()
			eventually(t, "the link notices", c.within, func() bool { return !l.stats().subscribed })
			proxy.Heal()
			awaitSubscription(t, l)
			if took := time.Since(begun); took > c.within+lastBackoff+slack {
				t.Errorf("it took %v", took)
			}
			eventually(t, "it resyncs", time.Second, func() bool { _, resyncs, _ := h.told(); return resyncs == 2 })
			if err := l.publish(t.Context(), "m"); err != nil {
				t.Fatal(err)
			}
			eventually(t, "messages are heard", time.Second, func() bool { m, _, _ := h.told(); return len(m) == 1 })
		})
	}
}

func TestLinkNoticesIncarnations(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{})
	proxy := faultproxy.New(t, s.Address())
	proxy.Set(faultproxy.Faults{Refuse: true})
	l, h := open(t, at(proxy.Address()), Access{})
	time.Sleep(startup) // the passing of which is the matter
	proxy.Heal()
	for i, happens := range []func(){
		func() {}, // the first contact, late
		s.Restart,
		func() { // a promotion, after which nothing else shows it
			s.Do("REPLICAOF", "127.0.0.1", "1")
			s.Do("REPLICAOF", "NO", "ONE")
			s.Do("CLIENT", "KILL", "TYPE", "normal")
		},
	} {
		happens()
		eventually(t, "a script runs", 3*time.Second, func() bool {
			_, err := l.run(t.Context(), counting, "tb1:{f}")
			return err == nil
		})
		if _, _, incarnations := h.told(); incarnations != i+1 {
			t.Errorf("%d incarnations, want %d", incarnations, i+1)
		}
	}
	if n := l.stats().incarnations; n != 3 {
		t.Errorf("%d are counted", n)
	}
}

func TestLinkNoticesThatTheClockJumps(t *testing.T) {
	t.Parallel()
	s := testredis.Start(t, testredis.Options{})
	l, h := open(t, at(s.Address()), Access{})
	base := time.Now().Add(time.Hour)
	for _, c := range []struct {
		ahead time.Duration
		jumps int
	}{{0, 0}, {time.Second, 0}, {2 * time.Second, 0}, {time.Minute, 1}, {time.Minute, 1}, {-time.Minute, 2}} {
		if _, err := l.run(t.Context(), telling, "tb1:{f}", base.Add(c.ahead+time.Since(base.Add(-time.Hour))).UnixMilli()); err != nil {
			t.Fatal(err)
		}
		if _, _, incarnations := h.told(); incarnations != c.jumps {
			t.Errorf("ahead by %v: %d incarnations, want %d", c.ahead, incarnations, c.jumps)
		}
	}
	stats := l.stats()
	if off := stats.clockOffset - 59*time.Minute; stats.clockJumps != 2 || off.Abs() > time.Second {
		t.Errorf("%+v", stats)
	}
}

// Not parallel: it counts the goroutines of the whole process.
func TestLinkCloseLeavesNothing(t *testing.T) {
	dead := testproc.FreeAddress(t)
	alive := testredis.Start(t, testredis.Options{})
	frozen := testredis.Start(t, testredis.Options{})
	frozen.Pause()
	for name, o := range map[string]linkOptions{
		"alive":                at(alive.Address()),
		"dead":                 at(dead),
		"frozen":               at(frozen.Address()),
		"all sentinels dead":   {addresses: []string{dead}, masterName: "main"},
		"all sentinels frozen": {addresses: []string{frozen.Address()}, masterName: "main"},
		"cluster dead":         {addresses: []string{dead}, cluster: true},
		"cluster frozen":       {addresses: []string{frozen.Address()}, cluster: true},
	} {
		t.Run(name, func(t *testing.T) {
			before := goleak.IgnoreCurrent()
			l, _ := open(t, o, Access{})
			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() { _, _ = l.run(t.Context(), counting, "tb1:{f}") })
			}
			l.use(Access{})
			wg.Wait()
			begun := time.Now()
			l.close()
			l.close()
			if took := time.Since(begun); took > callTimeout+slack {
				t.Errorf("it took %v", took)
			}
			goleak.VerifyNone(t, before)
			if _, err := l.run(t.Context(), counting, "tb1:{f}"); !outcomeIs(err, closed) {
				t.Errorf("a call after close: %v", err)
			}
		})
	}
}

func BenchmarkLinkRun(b *testing.B) {
	s := testredis.Start(b, testredis.Options{})
	o := at(s.Address())
	o.log = slog.New(slog.DiscardHandler)
	o.heard, o.resync, o.incarnation = func(string) {}, func() {}, func() {}
	l := newLink(o, Access{})
	defer l.close()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := l.run(b.Context(), counting, "tb1:{f}"); err != nil {
			b.Fatal(err)
		}
	}
}
