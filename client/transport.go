package client

import (
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// Transport returns an http.RoundTripper that adds the token to requests and gives
// them to base; nil is http.DefaultTransport.
//
// A request that gets 401 has its token reported to the broker, once for all requests
// that used it, and is sent again with the successor, if its body can be sent again:
// there is none, or Request.GetBody is set, as http.NewRequest does for the usual
// kinds. Then the answer goes to the user, whatever it is; so does the 401 when there
// is no successor.
//
// The token goes only to the given hosts, "api.example.com" (at any port) or
// "api.example.com:8443", and not where a redirect leads from https to http. Without
// any host it goes where the program sends its requests, and not where a redirect
// leads: when http.Client follows one to another host, port or scheme, the request
// goes there as it is.
func (s *TokenSource) Transport(base http.RoundTripper, hosts ...string) http.RoundTripper {
	if base == nil {
		base = http.DefaultTransport
	}
	return &transport{source: s, base: base, hosts: hosts}
}

type transport struct {
	source *TokenSource
	base   http.RoundTripper
	hosts  []string
}

// RoundTrip implements http.RoundTripper.
func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	if !t.trusted(r) {
		return t.base.RoundTrip(r)
	}
	token, err := t.source.TokenContext(r.Context())
	if err != nil {
		closeBody(r)
		return nil, err
	}
	first := r.Clone(r.Context())
	token.SetAuthHeader(first)
	answer, err := t.base.RoundTrip(first)
	if err != nil || answer.StatusCode != http.StatusUnauthorized {
		return answer, err
	}
	successor, err := t.source.Rejected(r.Context(), token)
	if err != nil {
		return answer, nil // the 401 says what there is to say
	}
	again := r.Clone(r.Context())
	if r.Body != nil && r.Body != http.NoBody {
		if r.GetBody == nil {
			return answer, nil
		}
		if again.Body, err = r.GetBody(); err != nil {
			return answer, nil
		}
	}
	successor.SetAuthHeader(again)
	// What is left of the answer is read, if it is not much, so that its connection
	// can be used again.
	_, _ = io.CopyN(io.Discard, answer.Body, 64<<10)
	_ = answer.Body.Close()
	return t.base.RoundTrip(again)
}

// CloseIdleConnections has http.Client's reach the base.
func (t *transport) CloseIdleConnections() {
	if base, ok := t.base.(interface{ CloseIdleConnections() }); ok {
		base.CloseIdleConnections()
	}
}

// trusted reports whether a request may carry the token.
func (t *transport) trusted(r *http.Request) bool {
	if len(t.hosts) > 0 && !slices.ContainsFunc(t.hosts, func(host string) bool {
		return strings.EqualFold(host, r.URL.Host) || strings.EqualFold(host, r.URL.Hostname())
	}) {
		return false
	}
	// http.Client says which answer has led to a request.
	for next := r; next.Response != nil; {
		next = next.Response.Request
		switch {
		case next == nil: // base does not say what it has sent
			return false
		case len(t.hosts) == 0 && !sameOrigin(next.URL, r.URL):
			return false
		case strings.EqualFold(next.URL.Scheme, "https") && !strings.EqualFold(r.URL.Scheme, "https"):
			return false
		}
	}
	return true
}

func sameOrigin(a, b *url.URL) bool {
	return strings.EqualFold(a.Scheme, b.Scheme) && strings.EqualFold(a.Hostname(), b.Hostname()) && port(a) == port(b)
}

func port(u *url.URL) string {
	switch {
	case u.Port() != "":
		return u.Port()
	case strings.EqualFold(u.Scheme, "https"):
		return "443"
	}
	return "80"
}

func closeBody(r *http.Request) {
	if r.Body != nil {
		_ = r.Body.Close() // RoundTrip does that, also when it fails
	}
}
