package client_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/oauth2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/credentials/local"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"

	"github.com/tokenbroker/tokenbroker/client"
	"github.com/tokenbroker/tokenbroker/internal/testca"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// resource is a server that takes some tokens.
type resource struct {
	mu    sync.Mutex
	takes map[string]bool
	seen  []string      // "METHOD token body" of each request
	hold  chan struct{} // if not nil, answers wait until it is closed
}

func (r *resource) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	body, _ := io.ReadAll(q.Body)
	token := strings.TrimPrefix(q.Header.Get("Authorization"), "Bearer ")
	r.mu.Lock()
	ok, hold := r.takes[token], r.hold
	r.seen = append(r.seen, strings.TrimSpace(q.Method+" "+token+" "+string(body)))
	r.mu.Unlock()
	if hold != nil {
		<-hold
	}
	if !ok {
		w.WriteHeader(http.StatusUnauthorized)
		_, _ = io.WriteString(w, "no")
		return
	}
	_, _ = io.WriteString(w, "yes")
}

func (r *resource) requests() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.seen...)
}

func (r *resource) take(tokens ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.takes = map[string]bool{}
	for _, t := range tokens {
		r.takes[t] = true
	}
}

// minuteOld is a token that is worth reporting.
func minuteOld(value string) *pb.Token { return token(value, time.Now().Add(-time.Minute), time.Hour) }

func get(t testing.TB, web *http.Client, url string) (int, string) {
	t.Helper()
	r, err := web.Get(url)
	if err != nil {
		t.Error(err)
		return 0, ""
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		t.Error(err)
	}
	return r.StatusCode, string(body)
}

// TestRejectedTokenIsReportedOnce: 100 requests at a time see the 401.
func TestRejectedTokenIsReportedOnce(t *testing.T) {
	const at = 100
	for name, c := range map[string]struct {
		takes    []string // from the moment of the trouble
		refusal  error
		status   int
		requests int
	}{
		"the successor is taken":           {[]string{"two"}, nil, 200, 2 * at},
		"the successor is refused as well": {nil, nil, 401, 2 * at},
		"there is no successor":            {nil, refusal(codes.ResourceExhausted, client.ReasonRefreshTooSoon, time.Minute), 401, at},
		"no right to report":               {nil, refusal(codes.PermissionDenied, client.ReasonCallerDenied, 0), 401, at},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.watch = always(minuteOld("one"))
			gate := make(chan struct{})
			f.renew = func(r *pb.RefreshTokenRequest) (*pb.Token, error) {
				if r.GetRejectedTokenId() != idOf("one") || r.GetProfile() != "invoices" || r.GetJob().GetId() != "j" {
					t.Errorf("asked for %s of %s", r.GetRejectedTokenId(), r.GetProfile())
				}
				<-gate // until all have seen their 401
				if c.refusal != nil {
					return nil, c.refusal
				}
				return token("two", time.Now(), time.Hour), nil
			}
			server := &resource{}
			server.take("one")
			site := httptest.NewServer(server)
			defer site.Close()
			s := f.client().TokenSource("invoices", client.WithJob("j"))
			web := &http.Client{Transport: s.Transport(&http.Transport{MaxIdleConnsPerHost: at})}
			defer web.CloseIdleConnections()
			if code, body := get(t, web, site.URL); code != 200 || body != "yes" {
				t.Fatal(code, body)
			}
			server.take(c.takes...)
			var wg sync.WaitGroup
			for range at {
				wg.Go(func() {
					want := "no"
					if c.status == 200 {
						want = "yes"
					}
					if code, body := get(t, web, site.URL); code != c.status || body != want {
						t.Errorf("got %d %q, want %d %q", code, body, c.status, want)
					}
				})
			}
			await(t, "all have asked", func() bool { return len(server.requests()) >= 1+at })
			close(gate)
			wg.Wait()
			if n := len(server.requests()) - 1; n != c.requests {
				t.Errorf("the resource server had %d requests, want %d", n, c.requests)
			}
			if n := len(f.calls("RefreshToken")); n != 1 {
				t.Errorf("the broker had %d reports, want 1", n)
			}
		})
	}
}

// await polls until a condition holds.
func await(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(60 * time.Second); !condition(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waiting until %s: not within a minute", what)
		}
	}
}

// A token that is refused for good is not reported for each request.
func TestReportsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		began := time.Now()
		f.watch = always(token("one", began, 24*time.Hour))
		answer := refusal(codes.ResourceExhausted, client.ReasonRefreshTooSoon, 30*time.Second)
		f.renew = func(*pb.RefreshTokenRequest) (*pb.Token, error) { return nil, answer }
		s := f.client().TokenSource("invoices")
		current, err := s.Token()
		if err != nil {
			t.Fatal(err)
		}
		report := func(period time.Duration) {
			for until := time.Now().Add(period); time.Now().Before(until); time.Sleep(time.Second) {
				if _, err := s.Rejected(t.Context(), current); err == nil {
					t.Fatal("a successor from nowhere")
				}
			}
		}
		report(10 * time.Second)
		if n := len(f.calls("RefreshToken")); n != 0 {
			t.Errorf("%d reports of a token that is young", n)
		}
		report(time.Minute)
		calls := f.calls("RefreshToken")
		if len(calls) != 2 || calls[0].Sub(began) != 10*time.Second || calls[1].Sub(calls[0]) != 30*time.Second {
			t.Errorf("reports at %v", calls)
		}
		answer = refusal(codes.PermissionDenied, client.ReasonCallerDenied, 0)
		time.Sleep(time.Minute)
		report(10 * time.Minute)
		if n := len(f.calls("RefreshToken")) - len(calls); n < 55 || n > 61 { // one each 10 s
			t.Errorf("%d reports in 10 minutes", n)
		}
		// Who has an older one gets the one at hand, without a call.
		n := f.all()
		if got, err := s.Rejected(t.Context(), &oauth2.Token{AccessToken: "zero"}); err != nil || got != current || f.all() != n {
			t.Errorf("got %v, %v", got, err)
		}
	})
}

// What was reported does not come back, though a replica may send it once more.
func TestRejectedTokenDoesNotComeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		more := make(chan *pb.Token)
		f.watch = func(_ *pb.WatchTokenRequest, tokens chan<- *pb.Token, ctx context.Context) error {
			tokens <- minuteOld("one")
			for {
				select {
				case t := <-more:
					tokens <- t
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}
		f.renew = func(*pb.RefreshTokenRequest) (*pb.Token, error) { return token("two", time.Now(), time.Hour), nil }
		s := f.client().TokenSource("invoices")
		one, err := s.Token()
		if err != nil {
			t.Fatal(err)
		}
		if two, err := s.Rejected(t.Context(), one); err != nil || two.AccessToken != "two" {
			t.Fatal(two, err)
		}
		for _, sent := range []string{"one", "two", "three"} {
			more <- minuteOld(sent)
			synctest.Wait()
			want(t, s, map[string]string{"one": "two", "two": "two", "three": "three"}[sent])
		}
	})
}

// The answer to a report is late: what the stream has brought since then stays.
func TestLateAnswerToAReport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFake(t)
		more, asked, answer := make(chan *pb.Token), make(chan struct{}), make(chan struct{})
		f.watch = func(_ *pb.WatchTokenRequest, tokens chan<- *pb.Token, ctx context.Context) error {
			tokens <- minuteOld("one")
			select {
			case t := <-more:
				return always(t)(nil, tokens, ctx)
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		f.renew = func(*pb.RefreshTokenRequest) (*pb.Token, error) {
			close(asked)
			<-answer
			return minuteOld("two"), nil
		}
		s := f.client().TokenSource("invoices")
		one, err := s.Token()
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			<-asked
			more <- token("three", time.Now(), time.Hour) // two was revoked
			synctest.Wait()
			close(answer)
		}()
		if got, err := s.Rejected(t.Context(), one); err != nil || got.AccessToken != "three" {
			t.Error(got, err)
		}
		want(t, s, "three")
	})
}

// opened counts the answers whose bodies are open.
type opened struct{ n atomic.Int64 }

func (o *opened) RoundTrip(r *http.Request) (*http.Response, error) {
	answer, err := http.DefaultTransport.RoundTrip(r)
	if err == nil {
		o.n.Add(1)
		answer.Body = &counted{ReadCloser: answer.Body, n: &o.n}
	}
	return answer, err
}

type counted struct {
	io.ReadCloser
	n    *atomic.Int64
	once sync.Once
}

func (c *counted) Close() error {
	c.once.Do(func() { c.n.Add(-1) })
	return c.ReadCloser.Close()
}

// A body that can be sent again is; otherwise the 401 is the answer, and the next
// request has the successor.
func TestBodies(t *testing.T) {
	for name, c := range map[string]struct {
		body io.Reader
		want []string
		code int
	}{
		"none":              {nil, []string{"POST one", "POST two"}, 200},
		"of a kind to copy": {strings.NewReader("text"), []string{"POST one text", "POST two text"}, 200},
		"a stream":          {io.LimitReader(strings.NewReader("text"), 4), []string{"POST one text"}, 401},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.watch = always(minuteOld("one"))
			f.renew = func(*pb.RefreshTokenRequest) (*pb.Token, error) { return token("two", time.Now(), time.Hour), nil }
			server := &resource{}
			server.take("two")
			site := httptest.NewServer(server)
			defer site.Close()
			base := &opened{}
			web := &http.Client{Transport: f.client().TokenSource("invoices").Transport(base)}
			r, err := http.NewRequest(http.MethodPost, site.URL, c.body)
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Authorization", "Basic of-the-program")
			answer, err := web.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(answer.Body)
			if err != nil || answer.Body.Close() != nil || answer.StatusCode != c.code || c.code == 401 && string(text) != "no" {
				t.Errorf("got %d %q, %v", answer.StatusCode, text, err)
			}
			if got := server.requests(); fmt.Sprint(got) != fmt.Sprint(c.want) {
				t.Errorf("the server saw %q, want %q", got, c.want)
			}
			if r.Header.Get("Authorization") != "Basic of-the-program" {
				t.Error("the program's request was changed")
			}
			if code, _ := get(t, web, site.URL); code != 200 {
				t.Errorf("the next request: %d", code)
			}
			if n := base.n.Load(); n != 0 {
				t.Errorf("%d answers are left open", n)
			}
		})
	}
}

// TestTokenStaysWithItsHost follows redirects.
func TestTokenStaysWithItsHost(t *testing.T) {
	f := newFake(t)
	f.watch = always(minuteOld("one"))
	s := f.client().TokenSource("invoices")
	ours, others := &resource{}, &resource{}
	ours.take("one")
	var to string
	mux := http.NewServeMux()
	mux.Handle("/", ours)
	mux.HandleFunc("/away", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, to, http.StatusFound) })
	mux.HandleFunc("/within", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/x", http.StatusFound) })
	site := httptest.NewServer(mux)
	defer site.Close()
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/back" { // what comes from elsewhere is not trusted, wherever it leads
			http.Redirect(w, r, site.URL+"/x", http.StatusFound)
			return
		}
		others.ServeHTTP(w, r)
	}))
	defer elsewhere.Close()
	last := func(r *resource) string { seen := r.requests(); return seen[len(seen)-1] }

	web := &http.Client{Transport: s.Transport(nil)}
	if code, _ := get(t, web, site.URL+"/within"); code != 200 {
		t.Errorf("to the same host: %d", code)
	}
	to = elsewhere.URL + "/stolen"
	if code, _ := get(t, web, site.URL+"/away"); code != 401 || last(others) != "GET" {
		t.Errorf("to another host: %d, which saw %q", code, last(others))
	}
	to = elsewhere.URL + "/back"
	if code, _ := get(t, web, site.URL+"/away"); code != 401 || last(ours) != "GET" {
		t.Errorf("and back: %d, %q", code, last(ours))
	}
	if n := len(f.calls("RefreshToken")); n != 0 {
		t.Errorf("%d reports for requests that had no token", n)
	}
	others.take("one")
	for hosts, code := range map[string]int{strings.TrimPrefix(elsewhere.URL, "http://"): 200, "127.0.0.1": 200, "api.example.com": 401, strings.TrimPrefix(site.URL, "http://"): 401} {
		listed := &http.Client{Transport: s.Transport(nil, "other.example.com", hosts)}
		if got, _ := get(t, listed, elsewhere.URL); got != code {
			t.Errorf("with the host %s: %d, want %d", hosts, got, code)
		}
	}
}

// TestTokenStaysEncrypted: a listed host is trusted at any port, but not in clear
// when the program asked for https.
func TestTokenStaysEncrypted(t *testing.T) {
	f := newFake(t)
	f.watch = always(minuteOld("one"))
	s := f.client().TokenSource("invoices")
	ours := &resource{}
	ours.take("one", "")
	clear, encrypted := httptest.NewServer(ours), httptest.NewTLSServer(ours)
	defer clear.Close()
	defer encrypted.Close()
	for to, want := range map[string]string{clear.URL: "GET", encrypted.URL: "GET one"} {
		site := httptest.NewTLSServer(http.RedirectHandler(to, http.StatusFound))
		defer site.Close()
		web := &http.Client{Transport: s.Transport(site.Client().Transport, "127.0.0.1")}
		if code, _ := get(t, web, site.URL); code != 200 {
			t.Errorf("to %s: %d", to, code)
		}
		if seen := ours.requests(); seen[len(seen)-1] != want {
			t.Errorf("%s saw %q, want %q", to, seen[len(seen)-1], want)
		}
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// TestRedirectFromWhoKnowsWhere: a base that does not say which request its answer is
// to has not shown that a redirect stays.
func TestRedirectFromWhoKnowsWhere(t *testing.T) {
	f := newFake(t)
	f.watch = always(minuteOld("one"))
	seen := map[string]string{}
	base := roundTrip(func(r *http.Request) (*http.Response, error) {
		seen[r.URL.Host] = r.Header.Get("Authorization")
		if r.URL.Host == "elsewhere.example.com" {
			return &http.Response{StatusCode: http.StatusOK, Body: http.NoBody}, nil
		}
		return &http.Response{StatusCode: http.StatusFound, Header: http.Header{"Location": {"https://elsewhere.example.com/"}}, Body: http.NoBody}, nil
	})
	web := &http.Client{Transport: f.client().TokenSource("invoices").Transport(base)}
	if code, _ := get(t, web, "https://api.example.com/"); code != 200 || seen["api.example.com"] != "Bearer one" || seen["elsewhere.example.com"] != "" {
		t.Errorf("%d, and they saw %q", code, seen)
	}
}

// closing notes that a body was closed.
type closing struct {
	io.Reader
	closed atomic.Bool
}

func (c *closing) Close() error { c.closed.Store(true); return nil }

// Without a token nothing is sent.
func TestRequestWithoutToken(t *testing.T) {
	f := newFake(t)
	f.watch = func(*pb.WatchTokenRequest, chan<- *pb.Token, context.Context) error {
		return refusal(codes.PermissionDenied, client.ReasonCallerDenied, 0)
	}
	web := &http.Client{Transport: f.client().TokenSource("invoices").Transport(nil)}
	body := &closing{Reader: strings.NewReader("x")}
	_, err := web.Post("http://127.0.0.1:1", "text/plain", body)
	wantReason(t, err, codes.PermissionDenied, client.ReasonCallerDenied)
	if !body.closed.Load() {
		t.Error("the body is left open")
	}
}

// callers is a gRPC server that notes who calls.
type callers struct {
	mu   sync.Mutex
	seen []string
}

func (c *callers) note(ctx context.Context, r any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	c.mu.Lock()
	c.seen = append(c.seen, strings.Join(md["authorization"], " and "))
	c.mu.Unlock()
	return h(ctx, r)
}

// TestPerRPCCredentials calls gRPC servers with the token, never in clear.
func TestPerRPCCredentials(t *testing.T) {
	f := newFake(t)
	f.watch = always(minuteOld("one"))
	s := f.client().TokenSource("invoices")
	ca := testca.New(t)
	over := func(network, address string, server, mine credentials.TransportCredentials) (*callers, error) {
		ln, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		c := &callers{}
		g := grpc.NewServer(grpc.Creds(server), grpc.UnaryInterceptor(c.note))
		healthpb.RegisterHealthServer(g, health.NewServer())
		go func() { _ = g.Serve(ln) }() // until Stop
		t.Cleanup(g.Stop)
		target := "passthrough:///" + ln.Addr().String()
		if network == "unix" {
			target = "unix:" + address
		}
		conn, err := grpc.NewClient(target, grpc.WithTransportCredentials(mine), grpc.WithPerRPCCredentials(s.PerRPCCredentials()))
		if err != nil {
			return c, err
		}
		t.Cleanup(func() { conn.Close() })
		_, err = healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
		return c, err
	}
	leaf := ca.Leaf(testca.Loopback)
	c, err := over("tcp", "127.0.0.1:0", credentials.NewServerTLSFromCert(&leaf), credentials.NewTLS(&tls.Config{RootCAs: ca.Pool()}))
	if err != nil || fmt.Sprint(c.seen) != "[Bearer one]" {
		t.Errorf("over TLS: %v, %v", c.seen, err)
	}
	c, err = over("unix", filepath.Join(t.TempDir(), "s"), local.NewCredentials(), local.NewCredentials())
	if err != nil || fmt.Sprint(c.seen) != "[Bearer one]" {
		t.Errorf("over a unix socket: %v, %v", c.seen, err)
	}
	for name, creds := range map[string]credentials.TransportCredentials{"insecure": insecure.NewCredentials(), "local": local.NewCredentials()} {
		if c, err = over("tcp", "127.0.0.1:0", insecure.NewCredentials(), creds); err == nil || len(c.seen) > 0 {
			t.Errorf("in clear, with %s credentials: %v, %v", name, c.seen, err)
		}
	}
}
