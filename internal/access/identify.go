package access

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bounds of names. They are the SPIFFE specification's (SPIFFE-ID section 2.3),
// and those of DNS (RFC 1035 section 2.3.4).
const (
	longestURI         = 2048
	longestTrustDomain = 255
	longestDNS         = 253
	longestLabel       = 63
)

// Identify names a caller by its verified certificate: the URI SAN, which is a
// SPIFFE ID in a mesh, else the DNS SAN. The common name proves nothing. More
// than one URI, or more than one DNS name without a URI, or a wildcard, is
// ambiguous, and who is ambiguous is nobody: nil. Nobody, too, is a URI that is
// spelled like another kind of caller, or in more than one way.
func Identify(leaf *x509.Certificate) *Caller {
	c, _ := identify(leaf)
	return c
}

// IdentifyVerified does what Identify does for what a handshake has verified,
// one chain at least, each with the leaf first. The caller expires with the
// chain that lasts longest. The error says why the certificate names nobody; it
// repeats nothing of it.
func IdentifyVerified(chains [][]*x509.Certificate) (*Caller, error) {
	c, err := identify(chains[0][0])
	if err != nil {
		return nil, err
	}
	c.Expires = End(chains)
	return c, nil
}

// End is when the last of the chains, none of them empty, ends; a chain does
// with the first of its certificates that ends.
func End(chains [][]*x509.Certificate) time.Time {
	var last time.Time
	for _, chain := range chains {
		end := chain[0].NotAfter
		for _, above := range chain[1:] {
			if above.NotAfter.Before(end) {
				end = above.NotAfter
			}
		}
		if end.After(last) {
			last = end
		}
	}
	return last
}

func identify(leaf *x509.Certificate) (*Caller, error) {
	uris, err := spelled(leaf)
	if err != nil {
		return nil, err
	}
	name, proof, err := nameOf(uris, leaf.DNSNames)
	if err != nil {
		return nil, err
	}
	return &Caller{Name: name, Proof: proof, Expires: leaf.NotAfter}, nil
}

var oidNames = asn1.ObjectIdentifier{2, 5, 29, 17} // RFC 5280 section 4.2.1.6

// spelled are the URI SANs as the certificate spells them: net/url makes the same
// of several spellings ("SPIFFE://a/b", "spiffe://a/b#").
func spelled(leaf *x509.Certificate) (uris []string, err error) {
	at := slices.IndexFunc(leaf.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(oidNames) })
	if at < 0 { // it was not read from anywhere
		for _, u := range leaf.URIs {
			uris = append(uris, u.String())
		}
		return uris, nil
	}
	var names asn1.RawValue
	if _, err := asn1.Unmarshal(leaf.Extensions[at].Value, &names); err != nil {
		return nil, errNames
	}
	for rest := names.Bytes; len(rest) > 0; {
		var name asn1.RawValue
		if rest, err = asn1.Unmarshal(rest, &name); err != nil {
			return nil, errNames
		}
		if name.Class == asn1.ClassContextSpecific && name.Tag == 6 {
			uris = append(uris, string(name.Bytes))
		}
	}
	return uris, nil
}

var (
	errNames     = errors.New("its subject alternative names cannot be read")
	errManyURIs  = errors.New("there is more than one URI SAN")
	errManyNames = errors.New("there is no URI SAN and more than one DNS SAN")
	errNoName    = errors.New("there is no URI SAN and no DNS SAN")
)

// nameOf is what callers with these subject alternative names are called.
func nameOf(uris, dns []string) (string, Proof, error) {
	switch {
	case len(uris) > 1:
		return "", 0, errManyURIs
	case len(uris) == 1:
		return uris[0], URISAN, checkURI(uris[0])
	case len(dns) > 1:
		return "", 0, errManyNames
	case len(dns) == 1:
		return dnsPrefix + strings.ToLower(dns[0]), DNSSAN, checkDNS(dns[0])
	}
	return "", 0, errNoName
}

const (
	spiffePrefix = "spiffe://"
	dnsPrefix    = "dns:"
)

// checkURI returns why a URI is nobody's name. A SPIFFE ID is held to its
// specification, which has one spelling for each; a path is part of it, because
// without one it is the trust domain itself. Other URIs are held to the same
// rules, but for the path.
func checkURI(uri string) error {
	if len(uri) > longestURI {
		return fmt.Errorf("the URI SAN is longer than %d characters", longestURI)
	}
	scheme, rest, ok := strings.Cut(uri, "://")
	if !ok || !isScheme(scheme) {
		return errors.New("the URI SAN is no scheme:// with a name after it")
	}
	switch scheme {
	case "dns", "unix", "k8s", Anonymous:
		return errors.New("the URI SAN is spelled like another kind of caller")
	}
	id, err := spiffeid.FromString(spiffePrefix + rest)
	switch {
	case err != nil:
		return fmt.Errorf("the URI SAN is no acceptable SPIFFE ID: %w", err)
	case len(id.TrustDomain().Name()) > longestTrustDomain:
		return fmt.Errorf("the trust domain in the URI SAN is longer than %d characters", longestTrustDomain)
	case id.Path() == "" && scheme == "spiffe":
		return errors.New("the SPIFFE ID in the URI SAN has no path, and so is nobody's")
	}
	return nil
}

// isScheme reports whether s is a scheme of RFC 3986 section 3.1, in lower case.
func isScheme(s string) bool {
	for i, c := range []byte(s) {
		letter := 'a' <= c && c <= 'z'
		if !letter && (i == 0 || !('0' <= c && c <= '9') && c != '+' && c != '-' && c != '.') {
			return false
		}
	}
	return s != ""
}

var errNotDNS = errors.New("the DNS SAN is no host name in full: letters, digits, - and _ between dots, and no *")

// checkDNS returns why a DNS name is nobody's: it must be a host name (RFC 1123
// section 2.1), in which underscores are tolerated as crypto/x509 does, and not
// look like an address.
func checkDNS(name string) error {
	if len(name) == 0 || len(name) > longestDNS {
		return errNotDNS
	}
	label := ""
	for label = range strings.SplitSeq(name, ".") {
		if !isLabel(label) {
			return errNotDNS
		}
	}
	if strings.Trim(label, "0123456789") == "" {
		return errNotDNS
	}
	return nil
}

func isLabel(s string) bool {
	if s == "" || len(s) > longestLabel || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for _, c := range []byte(s) {
		if !('a' <= c|0x20 && c|0x20 <= 'z' || '0' <= c && c <= '9' || c == '-' || c == '_') {
			return false
		}
	}
	return true
}
