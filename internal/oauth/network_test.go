package oauth_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// serveTLS returns the address of a TLS server and the certificates to trust.
func serveTLS(t *testing.T, h http.Handler, prepare func(*httptest.Server)) (string, *tls.Config) {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	if prepare != nil {
		prepare(s)
	}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL + "/token", trusting(s)
}

func TestHTTP2ConnectionsAreShared(t *testing.T) {
	var connections, requests atomic.Int32
	address, trust := serveTLS(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		if r.ProtoMajor != 2 || r.TLS.Version < tls.VersionTLS12 {
			t.Errorf("the server saw %s, TLS %x", r.Proto, r.TLS.Version)
		}
		io.WriteString(w, bearer)
	}), func(s *httptest.Server) {
		s.EnableHTTP2 = true
		s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
			if state == http.StateNew {
				connections.Add(1)
			}
		}
	})
	transport := oauth.NewTransport(oauth.TransportConfig{TLS: trust})
	for _, id := range []string{"one", "two", "three"} {
		client := clientFor(t, address, func(c *oauth.ProfileConfig) { c.ClientID, c.Transport = id, transport })
		if _, err := request(t, client); err != nil {
			t.Fatal(err)
		}
	}
	if connections.Load() != 1 || requests.Load() != 3 {
		t.Errorf("%d requests took %d connections", requests.Load(), connections.Load())
	}
	transport.CloseIdleConnections()
	if _, err := request(t, clientFor(t, address, func(c *oauth.ProfileConfig) { c.Transport = transport })); err != nil {
		t.Fatal(err)
	}
	if connections.Load() != 2 {
		t.Errorf("%d connections after closing the idle one", connections.Load())
	}
}

func TestTLSTroubleLeavesTheRequestUnsent(t *testing.T) {
	never := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the server saw a request") })
	address, trust := serveTLS(t, never, nil)
	old, trustOld := serveTLS(t, never, func(s *httptest.Server) {
		s.TLS = &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}
	})
	expired, trustExpired := serveTLS(t, never, func(s *httptest.Server) {
		s.TLS = &tls.Config{Certificates: []tls.Certificate{selfSigned(t, time.Now().Add(-time.Hour))}}
	})
	blind := trust.Clone()
	blind.RootCAs, blind.InsecureSkipVerify = nil, true
	lax := trustOld.Clone()
	lax.MinVersion = tls.VersionTLS10
	silent := serveTCP(t, hold)
	for name, tc := range map[string]struct {
		address string
		trust   *tls.Config
		words   string
	}{
		"unknown authority":      {address, nil, "an authority that is not trusted here: add"},
		"no way around it":       {address, blind, "an authority that is not trusted here: add"},
		"another host":           {strings.Replace(address, "127.0.0.1", "localhost", 1), trust, "its certificate is not for localhost"},
		"expired":                {expired, trustExpired, "has expired or is not valid yet"},
		"TLS 1.1":                {old, lax, "must be TLS 1.2 or newer"},
		"plain HTTP":             {strings.Replace(serve(t, never), "http:", "https:", 1), nil, "it speaks plain HTTP"},
		"something else":         {strings.Replace(serveTCP(t, func(c net.Conn) { io.WriteString(c, "220 mail ready\r\n") }), "http:", "https:", 1), nil, "the TLS handshake failed"},
		"a handshake that hangs": {strings.Replace(silent, "http:", "https:", 1), nil, "the TLS handshake took more than 50ms"},
	} {
		t.Run(name, func(t *testing.T) {
			config := oauth.TransportConfig{TLS: tc.trust}
			if strings.Contains(tc.words, "50ms") {
				config.HandshakeTimeout = 50 * time.Millisecond
			}
			bothWays(t, func(t *testing.T, asked oauth.TokenRequest) {
				grant, err := clientFor(t, tc.address, over(config)).RequestToken(t.Context(), asked)
				e := failure(t, grant, err)
				wantKind(t, e, broker.Unavailable, "was not reached", tc.words)
				wantOutcome(t, e, broker.Unsent)
			})
		})
	}
}

// selfSigned is a certificate for 127.0.0.1 that ends at the time given.
func selfSigned(t *testing.T, end time.Time) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: end.Add(-time.Hour), NotAfter: end, IsCA: true, BasicConstraintsValid: true,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestWhatIsNotReachedIsUnsent(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	for name, tc := range map[string]struct{ address, words string }{
		"refused": {"http://" + closed.Addr().String() + "/token", "nothing listens at " + closed.Addr().String()},
		"no host": {"https://nosuch.invalid/token", "nosuch.invalid"},
	} {
		t.Run(name, func(t *testing.T) {
			bothWays(t, func(t *testing.T, asked oauth.TokenRequest) {
				grant, err := clientFor(t, tc.address, timeout(300*time.Millisecond)).RequestToken(t.Context(), asked)
				e := failure(t, grant, err)
				wantKind(t, e, broker.Unavailable, "token endpoint "+tc.address+" was not reached: ", tc.words)
				wantOutcome(t, e, broker.Unsent)
			})
		})
	}
}

func TestAnEndedContextSendsNothing(t *testing.T) {
	client := clientFor(t, serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the server saw a request") })))
	bothWays(t, func(t *testing.T, asked oauth.TokenRequest) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		grant, err := client.RequestToken(ctx, asked)
		e := failure(t, grant, err)
		wantKind(t, e, broker.Unavailable, "was given up before it was sent")
		wantOutcome(t, e, broker.Unsent)
		if !errors.Is(e, context.Canceled) {
			t.Errorf("the cause is %v", e.Err)
		}
		ctx, cancel = context.WithTimeout(t.Context(), -time.Second)
		defer cancel()
		grant, err = client.RequestToken(ctx, asked)
		e = failure(t, grant, err)
		wantKind(t, e, broker.Unavailable, "no connection within 0s")
		wantOutcome(t, e, broker.Unsent)
	})
}

// TestDoubt holds the answers of which it cannot be known what the server did.
func TestDoubt(t *testing.T) {
	const doubt = "; it may have acted on the request"
	for name, tc := range map[string]struct {
		raw   func(net.Conn, *http.Request)
		words string
	}{
		"silence":              {func(c net.Conn, _ *http.Request) { hold(c) }, "did not answer within 400ms" + doubt},
		"closed":               {func(net.Conn, *http.Request) {}, "broke the connection off before its answer was complete (EOF)" + doubt},
		"reset":                {func(c net.Conn, _ *http.Request) { c.(*net.TCPConn).SetLinger(0) }, "broke the connection off"},
		"headers that end":     {say("HTTP/1.1 200 OK\r\nContent-Le"), "broke the connection off"},
		"headers that hang":    {sayAndHold("HTTP/1.1 200 OK\r\nContent-Le"), "did not answer within 400ms"},
		"only interim answers": {sayAndHold("HTTP/1.1 102 Processing\r\n\r\n"), "did not answer within 400ms"},
		"body that ends":       {say("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + bearer), "began to answer 200 and broke the connection off"},
		"body that hangs":      {sayAndHold("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + bearer), "began to answer 200 and did not finish within 400ms" + doubt},
		"chunks that end":      {say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e\r\n" + bearer[:40]), "began to answer 200 and broke"},
		"no last chunk":        {say(fmt.Sprintf("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n", len(bearer), bearer)), "began to answer 200 and broke"},
		"half a verdict":       {say("HTTP/1.1 400 Bad Request\r\nContent-Length: 100\r\n\r\n{\"error\":\"invalid_client\"}"), "began to answer 400 and broke"},
		"slow body":            {drip("HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", "a"), "began to answer 200 and did not finish within 400ms"},
		"slow headers":         {drip("HTTP/1.1 200 OK\r\nX: ", "a"), "did not answer within 400ms"},
		"flood of headers":     {drip("HTTP/1.1 200 OK\r\n", strings.Repeat("X-Flood: "+strings.Repeat("x", 100)+"\r\n", 100)), "broke the connection off"},
		"flood of interims":    {drip("", strings.Repeat("HTTP/1.1 103 Early Hints\r\nX: "+strings.Repeat("x", 1000)+"\r\n\r\n", 10)), "token endpoint"},
		"not HTTP":             {say("what is this\r\n\r\n"), "broke the connection off"},
	} {
		t.Run(name, func(t *testing.T) {
			bothWays(t, func(t *testing.T, asked oauth.TokenRequest) {
				start := time.Now()
				limit := 5 * time.Second // out of the way, where it is not what ends the wait
				if strings.Contains(tc.words, "within 400ms") {
					limit = 400 * time.Millisecond
				}
				grant, err := clientFor(t, serveConn(t, tc.raw), timeout(limit)).RequestToken(t.Context(), asked)
				e := failure(t, grant, err)
				wantKind(t, e, broker.Ambiguous, tc.words)
				wantOutcome(t, e, broker.OutcomeUnknown)
				if took := time.Since(start); took > 4*time.Second {
					t.Errorf("it took %s", took)
				}
			})
		})
	}
}

func say(s string) func(net.Conn, *http.Request) {
	return func(c net.Conn, _ *http.Request) { io.WriteString(c, s) }
}

func sayAndHold(s string) func(net.Conn, *http.Request) {
	return func(c net.Conn, _ *http.Request) {
		io.WriteString(c, s)
		hold(c)
	}
}

// drip says start, and then again and again a little until nobody listens.
func drip(start, again string) func(net.Conn, *http.Request) {
	return func(c net.Conn, _ *http.Request) {
		io.WriteString(c, start)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for range tick.C {
			if _, err := io.WriteString(c, again); err != nil {
				return
			}
		}
	}
}

func TestACutAnswerStillTellsItsHeaders(t *testing.T) {
	address := serveConn(t, say("HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nX-Trace-ID: t1\r\nContent-Length: 9\r\n\r\n"))
	grant, err := request(t, clientFor(t, address))
	e := failure(t, grant, err)
	wantKind(t, e, broker.Ambiguous)
	if e.RetryAfter != 7*time.Second || e.Trace != "t1" {
		t.Errorf("RetryAfter %s, trace %q", e.RetryAfter, e.Trace)
	}
}

func TestACallerThatGivesUpAfterSending(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	address := serveConn(t, func(c net.Conn, _ *http.Request) {
		cancel()
		hold(c)
	})
	grant, err := clientFor(t, address).RequestToken(ctx, ask(broker.ClientCredentials))
	wantKind(t, failure(t, grant, err), broker.Ambiguous, "was given up before it had answered")
}

func TestTheContextsDeadlineIsTold(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	grant, err := clientFor(t, serveConn(t, func(c net.Conn, _ *http.Request) { hold(c) })).RequestToken(ctx, ask(broker.ClientCredentials))
	wantKind(t, failure(t, grant, err), broker.Ambiguous, "did not answer within")
}

// A connection that the server closes under a request must not make net/http
// send it again.
func TestNothingIsSentTwice(t *testing.T) {
	var requests atomic.Int32
	address := serveConn(t, func(net.Conn, *http.Request) { requests.Add(1) })
	first := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if requests.Add(1) == 1 {
			io.WriteString(w, bearer)
			return
		}
		panic(http.ErrAbortHandler) // after the request was read, on a reused connection
	}))
	fresh, reused := clientFor(t, address), clientFor(t, first)
	grant, err := request(t, fresh)
	wantKind(t, failure(t, grant, err), broker.Ambiguous)
	if n := requests.Swap(0); n != 1 {
		t.Errorf("on a fresh connection the request was sent %d times", n)
	}
	if _, err := request(t, reused); err != nil {
		t.Fatal(err)
	}
	grant, err = request(t, reused)
	wantKind(t, failure(t, grant, err), broker.Ambiguous)
	if n := requests.Load(); n != 2 {
		t.Errorf("on a reused connection two requests were sent %d times", n)
	}
}

// Over HTTP/2 a stream is reset where HTTP/1.1 loses its connection.
func TestHTTP2StreamsThatEndAreInDoubtAndNotRepeated(t *testing.T) {
	var requests atomic.Int32
	address, trust := serveTLS(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		io.Copy(io.Discard, r.Body)
		switch r.URL.Query().Get("do") {
		case "hang":
			<-r.Context().Done()
		case "cut":
			io.WriteString(w, bearer[:9])
			w.(http.Flusher).Flush()
		}
		panic(http.ErrAbortHandler)
	}), func(s *httptest.Server) { s.EnableHTTP2 = true })
	for do, words := range map[string]string{
		"reset": "broke the connection off",
		"cut":   "began to answer 200 and broke the connection off",
		"hang":  "did not answer within 1s",
	} {
		requests.Store(0)
		grant, err := request(t, clientFor(t, address+"?do="+do, over(oauth.TransportConfig{TLS: trust}), timeout(time.Second)))
		wantKind(t, failure(t, grant, err), broker.Ambiguous, words)
		if n := requests.Load(); n != 1 {
			t.Errorf("%s: the request was sent %d times", do, n)
		}
	}
}

func TestSwitchingProtocolsIsNoAnswer(t *testing.T) {
	address := serveConn(t, sayAndHold("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"))
	grant, err := request(t, clientFor(t, address))
	wantKind(t, failure(t, grant, err), broker.Malformed, "answered 101")
}
