package access

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// The headers in which proxies say who is behind them.
const (
	// EnvoyHeader is Envoy's, and so Istio's.
	EnvoyHeader = "x-forwarded-client-cert"
	// LinkerdHeader is Linkerd's.
	LinkerdHeader = "l5d-client-id"
)

// Forwarder says which proxies are believed about who is behind them.
type Forwarder struct {
	// Peers are the proxies: "spiffe://…" or "dns:…" with "*" as in policies,
	// but not in a trust domain, or "unix:uid:" and a number. One at least.
	Peers []string
	// Header is the one in which they say it, [EnvoyHeader] or [LinkerdHeader].
	Header string
	// Callers are whom they may speak for: "spiffe://…" or "dns:…" with "*" as
	// in policies. None means anyone whom a certificate could name.
	Callers []string
}

// Forwarders are the proxies that are believed about who is behind them. A nil
// one believes nobody. It is immutable but for what it remembers, and may be
// used from several goroutines.
//
// One hop is believed. A header that could be read in two ways, or that names
// more than one caller, names nobody.
type Forwarders struct {
	rules []Forwarder
	known memory
}

// NewForwarders returns the proxies that the rules name.
func NewForwarders(rules []Forwarder) (*Forwarders, error) {
	for i, r := range rules {
		if r.Header != EnvoyHeader && r.Header != LinkerdHeader {
			return nil, fmt.Errorf("forwarders[%d]: there is no header %q; use %s or %s", i, r.Header, EnvoyHeader, LinkerdHeader)
		}
		for _, p := range r.Peers {
			if err := CheckPeer(p); err != nil {
				return nil, fmt.Errorf("forwarders[%d]: %q %w", i, p, err)
			}
		}
		for _, p := range r.Callers {
			if err := CheckForwarded(p); err != nil {
				return nil, fmt.Errorf("forwarders[%d]: %q %w", i, p, err)
			}
		}
	}
	return &Forwarders{rules: rules}, nil
}

// Rules returns what the proxies were made of. It must not be changed.
func (f *Forwarders) Rules() []Forwarder {
	if f == nil {
		return nil
	}
	return f.rules
}

var (
	errNoPeer = errors.New("is no proxy's name: write spiffe:// or dns: and the name in its certificate, or unix:uid: and the number of its user")
	errNoOne  = errors.New("is no name that a certificate can have: it begins with spiffe:// or dns: and goes on with a whole name")
)

// CheckPeer returns what is wrong with a pattern of peers: a proxy must have
// proven itself, by a certificate or over a unix socket.
func CheckPeer(pattern string) error {
	if uid, ok := strings.CutPrefix(pattern, "unix:uid:"); ok {
		if uid == "" || strings.Trim(uid, "0123456789") != "" || len(uid) > 1 && uid[0] == '0' {
			return errNoPeer
		}
		return nil
	}
	if certifiable(pattern) {
		return nil
	}
	return errNoPeer
}

// CheckForwarded returns what is wrong with a pattern of callers that a proxy
// may speak for.
func CheckForwarded(pattern string) error {
	if certifiable(pattern) {
		return nil
	}
	return errNoOne
}

// certifiable reports whether a pattern can mean a name that a certificate has.
// With something in the place of each "*", which a trust domain has no place
// for, it must be such a name itself.
func certifiable(pattern string) bool {
	if name, ok := strings.CutPrefix(pattern, dnsPrefix); ok {
		return checkDNS(strings.ReplaceAll(name, "*", "x")) == nil
	}
	domain, path, _ := strings.Cut(strings.TrimPrefix(pattern, spiffePrefix), "/")
	return strings.HasPrefix(pattern, spiffePrefix) &&
		checkURI(spiffePrefix+domain+"/"+strings.ReplaceAll(path, "*", "x")) == nil
}

// voice is how some Forwarders believe one peer.
type voice struct {
	of    *Forwarders
	rules []Forwarder
}

// voice returns the rules that list the peer.
func (f *Forwarders) voice(peer *Caller) []Forwarder {
	if f == nil || peer == nil {
		return nil
	}
	v := peer.spoken.Load()
	if v == nil || v.of != f {
		v = &voice{of: f, rules: f.listing(peer)}
		peer.spoken.Store(v)
	}
	return v.rules
}

func (f *Forwarders) listing(peer *Caller) []Forwarder {
	switch peer.Proof {
	case URISAN, DNSSAN, UnixPeer:
	default:
		return nil
	}
	var found []Forwarder
	for _, r := range f.rules {
		if slices.ContainsFunc(r.Peers, func(p string) bool { return means(p, peer.Name) }) {
			found = append(found, r)
		}
	}
	return found
}

// means is Match; DNS names have no case.
func means(pattern, name string) bool {
	if strings.HasPrefix(pattern, dnsPrefix) {
		pattern = strings.ToLower(pattern)
	}
	return Match(pattern, name)
}

// List reports whether the peer is a listed proxy. Such a one must say in each
// call who is behind it: it never acts by its own name.
func (f *Forwarders) List(peer *Caller) bool { return len(f.voice(peer)) > 0 }

// Believes reports whether the peer is believed in that header.
func (f *Forwarders) Believes(peer *Caller, header string) bool {
	return slices.ContainsFunc(f.voice(peer), func(r Forwarder) bool { return r.Header == header })
}

// Headers returns those in which the peer is believed.
func (f *Forwarders) Headers(peer *Caller) []string {
	var all []string
	for _, r := range f.voice(peer) {
		if !slices.Contains(all, r.Header) {
			all = append(all, r.Header)
		}
	}
	return all
}

// errNotCallers is for a name that the proxy may not speak for.
var errNotCallers = errors.New("the proxy may not speak for that caller: see forwarders.callers")

// Caller returns who is behind the peer as it says in the header. That what the
// peer proves is over in time, and that it proves anything at all, has been
// looked at. The error repeats nothing of the header.
//
// What was found is remembered, so that all calls of one caller through one
// proxy are of one Caller, and most cost a look.
func (f *Forwarders) Caller(peer *Caller, header, value string) (*Caller, error) {
	if !f.Believes(peer, header) {
		return nil, errors.New("the peer is not believed in this header")
	}
	k := key{peer.Name, peer.Expires.Unix(), header, value}
	if c := f.known.get(k); c != nil {
		return c, nil
	}
	name, err := forwardedName(header, value)
	if err != nil {
		return nil, err
	}
	if !f.mayName(peer, header, name) {
		return nil, errNotCallers
	}
	name = strings.Clone(name) // it may outlive the header, which may be large
	return f.known.put(k, &Caller{Name: name, Proof: Forwarded, Forwarder: peer.Name, Expires: peer.Expires}), nil
}

func (f *Forwarders) mayName(peer *Caller, header, name string) bool {
	return slices.ContainsFunc(f.voice(peer), func(r Forwarder) bool {
		return r.Header == header && (len(r.Callers) == 0 || slices.ContainsFunc(r.Callers, func(p string) bool { return means(p, name) }))
	})
}

// forwardedName is the name that the header's value says.
func forwardedName(header, value string) (string, error) {
	if header == EnvoyHeader {
		uris, dns, err := parseXFCC(value)
		if err != nil {
			return "", err
		}
		name, _, err := nameOf(uris, dns)
		return name, err
	}
	name, _, err := nameOf(nil, []string{value})
	return name, err
}

// Bounds of what is remembered: of each generation, of which there are two.
const (
	mostKnown     = 4096
	mostKnownText = 4 << 20
)

// memory remembers callers by what was said of them. It has two generations:
// when the younger one is full, the older one is forgotten. Those that are asked
// for stay.
type memory struct {
	mu         sync.RWMutex
	young, old map[key]*Caller
	text       int // length of all values in young
}

// key is all that a forwarded caller is made of, but for the rules.
type key struct {
	peer   string
	ends   int64
	header string
	value  string
}

// get returns what is known of k; nil if nothing is.
func (m *memory) get(k key) *Caller {
	m.mu.RLock()
	c, isYoung := m.young[k]
	if !isYoung {
		c = m.old[k]
	}
	m.mu.RUnlock()
	if c != nil && !isYoung {
		return m.put(k, c)
	}
	return c
}

// put returns what is known of k already, or else c, and remembers it.
func (m *memory) put(k key, c *Caller) *Caller {
	m.mu.Lock()
	defer m.mu.Unlock()
	if known := m.young[k]; known != nil {
		return known
	}
	if known := m.old[k]; known != nil {
		c = known
	}
	size := len(k.value)
	if m.young == nil || len(m.young) >= mostKnown || m.text+size > mostKnownText {
		m.young, m.old, m.text = map[key]*Caller{}, m.young, 0
	}
	m.young[k] = c
	m.text += size
	return c
}
