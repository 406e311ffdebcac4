package oauth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

const (
	defaultMetadataAge = time.Hour
	// metadataRetry is for how long metadata are left alone that were asked for
	// again in vain.
	metadataRetry = time.Minute
)

// metadata are what a server says of itself (RFC 8414, OpenID Connect Discovery)
// as far as it matters here.
type metadata struct {
	plain endpoints
	mtls  endpoints // for clients that present a certificate (RFC 8705 section 5)
}

// discovery knows one server's metadata, for all clients that share a Transport.
type discovery struct {
	issuer            string // as configured
	name              string // in one spelling, however it was configured
	allowInsecureHTTP bool
	// at are where the metadata may be: OpenID Connect's place, then RFC 8414's.
	at        [2]*url.URL
	transport *Transport

	mu     sync.Mutex // guards the rest; never held during a request
	known  *metadata  // nil until the server has told them
	next   time.Time  // when they are asked for again
	flight *lookup    // under way; nil when none is
}

// lookup is one request for metadata that all share who want them. What came of
// it is there once done is closed.
type lookup struct {
	done    chan struct{}
	found   *metadata
	failure *broker.IssueError
	// abandoned says that whoever made it gave it up, which says nothing about
	// the server.
	abandoned bool
}

// discovery returns what is known of the server that calls itself issuer, of
// which u is the parsed form.
func (t *Transport) discovery(issuer string, u *url.URL, allowInsecureHTTP bool) *discovery {
	type key struct {
		issuer            string
		allowInsecureHTTP bool
	}
	path := strings.TrimRight(u.EscapedPath(), "/")
	d := &discovery{
		issuer:            issuer,
		name:              strings.TrimRight(shown(u), "/"),
		allowInsecureHTTP: allowInsecureHTTP,
		at: [2]*url.URL{
			onHost(u, path+"/.well-known/openid-configuration"),
			onHost(u, "/.well-known/oauth-authorization-server"+path),
		},
		transport: t,
	}
	known, _ := t.servers.LoadOrStore(key{issuer, allowInsecureHTTP}, d)
	return known.(*discovery)
}

// onHost is the URL at u's host that has this escaped path.
func onHost(u *url.URL, path string) *url.URL {
	at := &url.URL{Scheme: u.Scheme, Host: u.Host}
	at.Path, _ = url.PathUnescape(path) // it was parsed before
	at.RawPath = path
	return at
}

// metadata returns the server's. They are asked for once, and again when they
// are old, while the old ones go on being used. A failure is always Unavailable
// and Unsent: no token request was made.
func (d *discovery) metadata(ctx context.Context, c *Client) (*metadata, *broker.IssueError) {
	for {
		known, flight, mine := d.join()
		switch {
		case known != nil && mine:
			// It ends within the client's time-out. Nobody waits for it.
			go d.look(context.WithoutCancel(ctx), c, flight)
			return known, nil
		case known != nil:
			return known, nil
		case mine:
			d.look(ctx, c, flight)
			return flight.found, flight.failure
		}
		select {
		case <-flight.done:
			if !flight.abandoned {
				return flight.found, flight.failure
			}
		case <-ctx.Done():
			return nil, unlocated(endpoint{"metadata", d.at[0]}, "has not answered yet: try again later")
		}
	}
}

// join returns what is known, and the lookup under way. It is the caller's to
// make where mine is true.
func (d *discovery) join() (known *metadata, flight *lookup, mine bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.flight == nil && (d.known == nil || !time.Now().Before(d.next)) {
		d.flight, mine = &lookup{done: make(chan struct{})}, true
	}
	return d.known, d.flight, mine
}

// look makes a lookup, and ends it whatever happens.
func (d *discovery) look(ctx context.Context, c *Client, l *lookup) {
	l.abandoned = true // until something came of it
	defer func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.flight, d.next = nil, time.Now().Add(min(metadataRetry, d.transport.metadataAge))
		if l.found != nil {
			d.known, d.next = l.found, time.Now().Add(d.transport.metadataAge)
		}
		close(l.done)
	}()
	limited, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	l.found, l.failure = d.fetch(limited, c)
	l.abandoned = l.failure != nil && ctx.Err() != nil
}

// fetch asks the server in the one place, and where there is nothing in the
// other.
func (d *discovery) fetch(ctx context.Context, c *Client) (*metadata, *broker.IssueError) {
	e := endpoint{"metadata", d.at[0]}
	answer, failure := d.get(ctx, c, e)
	if failure == nil && answer.status == http.StatusNotFound {
		e.url = d.at[1]
		answer, failure = d.get(ctx, c, e)
	}
	if failure != nil {
		return nil, failure
	}
	if answer.status != http.StatusOK {
		failure := unlocated(e, fmt.Sprintf("answered %d: check issuer, and set token_url instead where the server publishes no metadata", answer.status))
		failure.RetryAfter, _ = retryAfter(answer.header, answer.received)
		return nil, failure
	}
	m, err := readMetadata(answer.body, d.issuer, d.allowInsecureHTTP)
	if err != nil {
		return nil, unlocated(e, "answered with metadata that cannot be used: "+plain(err.Error(), maxExamined))
	}
	return m, nil
}

// get asks for metadata. Nothing that identifies the client goes with it.
func (d *discovery) get(ctx context.Context, c *Client, e endpoint) (*answer, *broker.IssueError) {
	a := newAttempt(ctx, &Client{timeout: c.timeout, userAgent: c.userAgent, transport: d.transport}, TokenRequest{})
	a.endpoint = e
	answer, err := a.exchange((&http.Request{
		Method: http.MethodGet,
		URL:    e.url,
		Host:   e.url.Host,
		Header: http.Header{
			"Accept":          {"application/json"},
			"Accept-Encoding": {"identity"},
			"User-Agent":      {c.userAgent},
		},
	}).WithContext(ctx), d.transport.http)
	switch {
	case err == nil:
		return answer, nil
	case a.stage() < sent:
		return nil, unlocated(e, "was not reached: "+a.unsent(ctx, err))
	}
	return nil, unlocated(e, a.cut(ctx, err, answer))
}

// unlocated is the failure of a request for which there is no endpoint.
func unlocated(e endpoint, why string) *broker.IssueError {
	return &broker.IssueError{Kind: broker.Unavailable, Text: e.String() + " " + why, Outcome: broker.Unsent}
}

// readMetadata reads the metadata of the server that calls itself issuer.
func readMetadata(body []byte, issuer string, allowInsecureHTTP bool) (*metadata, error) {
	if len(body) > maxBodyBytes {
		return nil, flawOversized
	}
	var said, aliases map[string]json.RawMessage // unlike a struct it knows upper case from lower case
	if err := json.Unmarshal(body, &said); err != nil || said == nil {
		return nil, errors.New("it is no JSON object")
	}
	name, err := stringMember(said["issuer"])
	if err != nil || strings.TrimSuffix(name, "/") != strings.TrimSuffix(issuer, "/") {
		return nil, fmt.Errorf("it is that of issuer %q: set issuer to exactly that if it is the right server", name)
	}
	if raw := said["mtls_endpoint_aliases"]; raw != nil && json.Unmarshal(raw, &aliases) != nil {
		return nil, errors.New("mtls_endpoint_aliases is no JSON object")
	}
	m := &metadata{plain: endpoints{issuer: name, namesIssuer: string(said["authorization_response_iss_parameter_supported"]) == "true"}}
	if err := m.plain.read(said, allowInsecureHTTP); err != nil {
		return nil, err
	}
	if m.plain.token.url == nil {
		return nil, errors.New("token_endpoint is missing")
	}
	m.mtls = m.plain
	if err := m.mtls.read(aliases, allowInsecureHTTP); err != nil {
		return nil, fmt.Errorf("of the mtls_endpoint_aliases %w", err)
	}
	m.mtls.authorization = m.plain.authorization // it is a browser's, which has no such certificate
	return m, nil
}

// read takes over the endpoints that said names.
func (e *endpoints) read(said map[string]json.RawMessage, allowInsecureHTTP bool) error {
	for role, to := range map[string]*endpoint{"token": &e.token, "authorization": &e.authorization, "revocation": &e.revocation} {
		name := role + "_endpoint"
		raw, err := stringMember(said[name])
		if err != nil {
			return fmt.Errorf("%s is %w", name, err)
		}
		if raw == "" {
			continue
		}
		if *to, err = parseEndpoint(role, name, raw, allowInsecureHTTP); err != nil {
			return err
		}
	}
	return nil
}
