package oauth_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// proxy is what the environment names as HTTP_PROXY and HTTPS_PROXY while the
// tests run. It must be named before the process reads it, which it does once.
var proxy = newForwardProxy()

func TestMain(m *testing.M) {
	if address := os.Getenv(childAddress); address != "" {
		beChild(address)
		return
	}
	for _, name := range []string{"http_proxy", "https_proxy", "no_proxy", "ALL_PROXY", "all_proxy", "REQUEST_METHOD"} {
		os.Unsetenv(name)
	}
	server := httptest.NewServer(proxy)
	os.Setenv("HTTP_PROXY", server.URL)
	os.Setenv("HTTPS_PROXY", server.URL)
	os.Setenv("NO_PROXY", ".invalid")
	code := m.Run()
	server.Close()
	os.Exit(code)
}

// canary marks what must never be shown. It holds every character that some
// encoding changes.
const canary = `c@nary+&%=: é"/\secret-value`

func clientFor(t testing.TB, tokenURL string, change ...func(*oauth.ProfileConfig)) *oauth.Client {
	t.Helper()
	config := oauth.ProfileConfig{TokenURL: tokenURL, ClientID: "tester", ClientAuth: oauth.ClientSecretPost, Timeout: 5 * time.Second}
	for _, c := range change {
		c(&config)
	}
	if config.Transport == nil {
		config.Transport = oauth.NewTransport(oauth.TransportConfig{})
	}
	client, err := oauth.NewClient(config)
	if err != nil {
		t.Fatalf("NewClient: %v", err)
	}
	t.Cleanup(config.Transport.CloseIdleConnections)
	return client
}

func timeout(d time.Duration) func(*oauth.ProfileConfig) {
	return func(c *oauth.ProfileConfig) { c.Timeout = d }
}

func over(config oauth.TransportConfig) func(*oauth.ProfileConfig) {
	return func(c *oauth.ProfileConfig) { c.Transport = oauth.NewTransport(config) }
}

func ask(grantType broker.GrantType) oauth.TokenRequest {
	return oauth.TokenRequest{GrantType: grantType, ClientSecret: broker.NewSecret(canary)}
}

// spend is a one-time request.
func spend(clear func() error) oauth.TokenRequest {
	return oauth.TokenRequest{
		GrantType:    oauth.RefreshToken,
		ClientSecret: broker.NewSecret(canary),
		Secrets:      map[string]broker.Secret{"refresh_token": broker.NewSecret("refresh-" + canary)},
		OneTime:      true,
		Clear:        clear,
	}
}

// bothWays runs a test with a request that can be repeated and with one that
// cannot.
func bothWays(t *testing.T, test func(t *testing.T, asked oauth.TokenRequest)) {
	t.Helper()
	t.Run("repeatable", func(t *testing.T) { test(t, ask(broker.ClientCredentials)) })
	t.Run("one-time", func(t *testing.T) { test(t, spend(nil)) })
}

// request asks client for a client's own token.
func request(t testing.TB, client *oauth.Client) (*broker.Grant, error) {
	return client.RequestToken(t.Context(), ask(broker.ClientCredentials))
}

// failure is err as what it has to be, with the promises that hold for all.
func failure(t testing.TB, grant *broker.Grant, err error) *broker.IssueError {
	t.Helper()
	var e *broker.IssueError
	if !errors.As(err, &e) {
		t.Fatalf("got grant %+v, error %v; want an *broker.IssueError", grant, err)
	}
	if grant != nil {
		t.Errorf("a grant came with the error %q", e.Text)
	}
	noSecret(t, e)
	return e
}

func noSecret(t testing.TB, e *broker.IssueError) {
	t.Helper()
	for _, text := range []string{e.Text, e.Code, e.Trace, fmt.Sprintf("%+v", e), fmt.Sprint(e.Err)} {
		if strings.Contains(text, canary) || strings.Contains(text, "secret-value") {
			t.Errorf("a secret is shown: %q", text)
		}
	}
}

func wantOutcome(t testing.TB, e *broker.IssueError, want broker.Outcome) {
	t.Helper()
	if e.Outcome != want {
		t.Errorf("outcome is %s, want %s (%s)", outcomeName(e.Outcome), outcomeName(want), e.Text)
	}
}

func outcomeName(o broker.Outcome) string {
	return map[broker.Outcome]string{broker.OutcomeUnknown: "unknown", broker.Unsent: "unsent", broker.Answered: "answered"}[o]
}

func wantKind(t testing.TB, e *broker.IssueError, kind broker.IssueErrorKind, words ...string) {
	t.Helper()
	if e.Kind != kind {
		t.Errorf("kind is %v, want %v (%s)", e.Kind, kind, e.Text)
	}
	for _, w := range words {
		if !strings.Contains(e.Text, w) {
			t.Errorf("text %q lacks %q", e.Text, w)
		}
	}
}

// reply is a canned answer.
type reply struct {
	status int
	header map[string]string
	body   string
}

func (r reply) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	for name, value := range r.header {
		w.Header().Set(name, value)
	}
	if _, ok := r.header["Content-Type"]; !ok {
		w.Header().Set("Content-Type", "application/json")
	}
	if r.status != 0 {
		w.WriteHeader(r.status)
	}
	io.WriteString(w, r.body)
}

const bearer = `{"access_token":"abc.DEF-123","token_type":"Bearer","expires_in":3600}`

func serve(t testing.TB, h http.Handler) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL + "/token"
}

// serveConn serves every connection with raw, after a whole request has been
// read from it.
func serveConn(t testing.TB, raw func(net.Conn, *http.Request)) string {
	t.Helper()
	return serveTCP(t, func(c net.Conn) {
		r, err := http.ReadRequest(bufio.NewReader(c))
		if err != nil {
			return
		}
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		raw(c, r)
	})
}

func serveTCP(t testing.TB, raw func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			stop := context.AfterFunc(ctx, func() { c.Close() })
			serving.Go(func() {
				defer stop()
				defer c.Close()
				raw(c)
			})
		}
	})
	t.Cleanup(func() {
		cancel()
		l.Close()
		serving.Wait()
	})
	return "http://" + l.Addr().String() + "/token"
}

// hold keeps a connection open until the other side is done with it.
func hold(c net.Conn) { io.Copy(io.Discard, c) }
