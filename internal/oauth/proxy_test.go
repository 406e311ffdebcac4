package oauth_test

import (
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// forwardProxy is an HTTP proxy: absolute-form requests and CONNECT. Hosts are
// known to it alone.
type forwardProxy struct {
	mu     sync.Mutex
	routes map[string]string // host:port as asked for, to where it leads
	log    []string
}

func newForwardProxy() *forwardProxy { return &forwardProxy{routes: map[string]string{}} }

// route leads a host to an address until the test ends, and returns the log
// from then on.
func (p *forwardProxy) route(t *testing.T, host, address string) func() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.routes[host] = address
	before := len(p.log)
	return func() []string {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.log[before:]
	}
}

func (p *forwardProxy) to(r *http.Request) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.log = append(p.log, r.Method+" "+r.RequestURI)
	return p.routes[r.Host]
}

func (p *forwardProxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch address := p.to(r); {
	case strings.HasPrefix(r.Host, "denied.test"):
		http.Error(w, "<html>no "+canary, http.StatusForbidden)
	case strings.HasPrefix(r.Host, "login.test"):
		http.Error(w, "who are you", http.StatusProxyAuthRequired)
	case strings.HasPrefix(r.Host, "cut.test"):
		panic(http.ErrAbortHandler)
	case r.Method == http.MethodConnect:
		tunnel(w, address)
	default:
		forward(w, r, address)
	}
}

func tunnel(w http.ResponseWriter, address string) {
	up, err := net.Dial("tcp", address)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer up.Close()
	down, buffered, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer down.Close()
	io.WriteString(down, "HTTP/1.1 200 Connection established\r\n\r\n")
	go func() {
		io.Copy(up, buffered)
		up.Close()
	}()
	io.Copy(down, up)
}

func forward(w http.ResponseWriter, r *http.Request, address string) {
	r = r.Clone(r.Context())
	r.RequestURI, r.URL.Host = "", address
	response, err := http.DefaultTransport.RoundTrip(r)
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	defer response.Body.Close()
	w.WriteHeader(response.StatusCode)
	io.Copy(w, response.Body)
}

func TestPlainRequestsGoThroughTheProxy(t *testing.T) {
	backend := httptest.NewServer(reply{body: bearer})
	defer backend.Close()
	log := proxy.route(t, "plain.test", backend.Listener.Addr().String())

	client := clientFor(t, "http://plain.test/token", func(c *oauth.ProfileConfig) { c.AllowInsecureHTTP = true })
	bothWays(t, func(t *testing.T, asked oauth.TokenRequest) {
		before := len(log())
		if _, err := client.RequestToken(t.Context(), asked); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(log()[before:], "\n"); got != "POST http://plain.test/token" {
			t.Errorf("the proxy saw %q", got)
		}
	})
}

func TestTLSRequestsGoThroughTheProxysTunnel(t *testing.T) {
	backend := httptest.NewTLSServer(reply{body: bearer})
	defer backend.Close()
	log := proxy.route(t, "example.com:443", backend.Listener.Addr().String())

	client := clientFor(t, "https://example.com/token", over(oauth.TransportConfig{TLS: trusting(backend)}))
	bothWays(t, func(t *testing.T, asked oauth.TokenRequest) {
		before := len(log())
		if _, err := client.RequestToken(t.Context(), asked); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(log()[before:], "\n"); got != "CONNECT example.com:443" {
			t.Errorf("the proxy saw %q", got)
		}
	})
}

func TestAProxyThatRefusesLeavesTheRequestUnsent(t *testing.T) {
	for host, words := range map[string]string{
		"denied.test": "the proxy refused the connection with 403",
		"login.test":  "put them into HTTPS_PROXY",
		"cut.test":    "was not reached",
		"lost.test":   "the proxy refused the connection with 502",
	} {
		t.Run(host, func(t *testing.T) {
			bothWays(t, func(t *testing.T, asked oauth.TokenRequest) {
				grant, err := clientFor(t, "https://"+host+"/token").RequestToken(t.Context(), asked)
				e := failure(t, grant, err)
				wantKind(t, e, broker.Unavailable, words)
				wantOutcome(t, e, broker.Unsent)
			})
		})
	}
}

func trusting(s *httptest.Server) *tls.Config {
	return s.Client().Transport.(*http.Transport).TLSClientConfig
}
