package oauth

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"
)

const (
	defaultConnectTimeout   = 3 * time.Second
	defaultHandshakeTimeout = 3 * time.Second

	// Shorter than servers and load balancers keep a silent connection (60 s
	// and more), so that it is we who close it and no request meets a dead one.
	idleTimeout = 30 * time.Second
	// A token endpoint's headers fit many times over.
	maxHeaderBytes = 64 << 10

	// An HTTP/2 connection that went silent is asked whether it still lives,
	// so that one lost connection does not cost every request its timeout.
	pingAfter   = 5 * time.Second
	pingTimeout = 3 * time.Second
)

// TransportConfig says how connections are made. The zero value is right in
// production: the system's trusted authorities and the times stated.
type TransportConfig struct {
	// TLS adds trusted authorities or client certificates. TLS 1.2 and
	// verification stay the least whatever it says. It is copied.
	TLS *tls.Config
	// ConnectTimeout bounds looking up a host and connecting to it, or to its
	// proxy. Zero means 3 seconds.
	ConnectTimeout time.Duration
	// HandshakeTimeout bounds the TLS handshake. Zero means 3 seconds.
	HandshakeTimeout time.Duration
	// MetadataAge is when a server's metadata are asked for again. Zero means
	// one hour.
	MetadataAge time.Duration
}

// Transport holds connections to token endpoints and reuses them, HTTP/2 and
// HTTP/1.1 alike. Proxies come from the environment (HTTPS_PROXY, HTTP_PROXY,
// NO_PROXY), read once by the process. It may be shared by any number of
// Clients and used from several goroutines.
type Transport struct {
	http *http.Transport
	// What makes another one.
	dialer                           *net.Dialer
	tls                              *tls.Config
	connectTimeout, handshakeTimeout time.Duration

	metadataAge time.Duration
	servers     sync.Map // of *discovery
}

// NewTransport returns a Transport without connections.
func NewTransport(config TransportConfig) *Transport {
	t := &Transport{
		tls:              verifying(config.TLS),
		connectTimeout:   orDefault(config.ConnectTimeout, defaultConnectTimeout),
		handshakeTimeout: orDefault(config.HandshakeTimeout, defaultHandshakeTimeout),
		metadataAge:      orDefault(config.MetadataAge, defaultMetadataAge),
	}
	t.dialer = &net.Dialer{Timeout: t.connectTimeout, KeepAlive: idleTimeout}
	t.http = t.connections(t.dialer.DialContext)
	t.http.ForceAttemptHTTP2 = true
	t.http.HTTP2 = &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout}
	t.http.MaxIdleConns = 64
	t.http.MaxIdleConnsPerHost = 4
	t.http.IdleConnTimeout = idleTimeout
	return t
}

// presenting is a Transport like t that presents a certificate to whoever asks
// for one.
func (t *Transport) presenting(certificate *tls.Certificate) *Transport {
	config := t.tls.Clone()
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate, nil }
	return NewTransport(TransportConfig{TLS: config, ConnectTimeout: t.connectTimeout, HandshakeTimeout: t.handshakeTimeout})
}

// connections are made by dial, through the same proxies and as safely whatever
// they are for.
func (t *Transport) connections(dial func(ctx context.Context, network, address string) (net.Conn, error)) *http.Transport {
	return &http.Transport{
		Proxy:                  proxyFromEnvironment,
		OnProxyConnectResponse: checkProxy,
		DialContext:            dial,
		TLSClientConfig:        t.tls.Clone(), // net/http adds to it
		TLSHandshakeTimeout:    t.handshakeTimeout,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeaderBytes,
	}
}

// single is for one request over one connection, which nothing else ever uses. A
// request that fits into one TLS record leaves at once, not in parts.
func (t *Transport) single(dial func(ctx context.Context, network, address string) (net.Conn, error)) *http.Transport {
	single := t.connections(dial)
	single.DisableKeepAlives = true
	single.WriteBufferSize = 16 << 10
	single.Protocols = new(http.Protocols)
	single.Protocols.SetHTTP1(true)
	single.TLSClientConfig.NextProtos = []string{"http/1.1"}
	return single
}

// CloseIdleConnections closes the connections that no request uses, for a
// Transport that is being replaced. Requests under way finish.
func (t *Transport) CloseIdleConnections() { t.http.CloseIdleConnections() }

func verifying(config *tls.Config) *tls.Config {
	if config == nil {
		config = &tls.Config{}
	}
	config = config.Clone()
	config.MinVersion = max(config.MinVersion, tls.VersionTLS12)
	config.InsecureSkipVerify = false
	return config
}

var errProxyURL = errors.New("the environment's HTTPS_PROXY or HTTP_PROXY is not a URL")

// proxyFromEnvironment hides the standard one's error, which repeats the
// proxy's URL and with it the password that may be there.
func proxyFromEnvironment(r *http.Request) (*url.URL, error) {
	proxy, err := http.ProxyFromEnvironment(r)
	if err != nil {
		return nil, errProxyURL
	}
	return proxy, nil
}

// proxyRefusal is a proxy's answer to CONNECT, other than 200.
type proxyRefusal int

func (status proxyRefusal) Error() string {
	if status == http.StatusProxyAuthRequired {
		return "the proxy wants a user name and password (407): put them into HTTPS_PROXY"
	}
	return fmt.Sprintf("the proxy refused the connection with %d: check that it allows this host", int(status))
}

func checkProxy(_ context.Context, _ *url.URL, _ *http.Request, response *http.Response) error {
	if response.StatusCode != http.StatusOK {
		return proxyRefusal(response.StatusCode)
	}
	return nil
}

func orDefault(d, standard time.Duration) time.Duration {
	if d > 0 {
		return d
	}
	return standard
}
