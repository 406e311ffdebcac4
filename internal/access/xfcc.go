package access

import (
	"errors"
	"slices"
	"strings"
)

// longestXFCC has room for a certificate and its chain.
const longestXFCC = 16 << 10

// What x-forwarded-client-cert may consist of, in the order in which Envoy
// writes it. A value of one that comes later may come out of a client's
// certificate, and must not be able to add one that comes earlier.
var xfccKeys = []string{"By", "Hash", "Cert", "Chain", "Subject", "URI", "DNS"}

// Those that a certificate can have several of.
var xfccSeveral = []string{"By", "URI", "DNS"}

var (
	errXFCCLong    = errors.New("the header is longer than 16 KiB")
	errXFCCHops    = errors.New("the header has more than one element: the proxy in front of this one must not be able to add its own; set forward_client_cert_details to SANITIZE_SET")
	errXFCCForm    = errors.New("the header is malformed: it must be pairs of a key and a value with = between them, separated by ;")
	errXFCCKey     = errors.New("the header has a key other than By, Hash, Cert, Chain, Subject, URI and DNS, or one of them twice or out of order")
	errXFCCQuote   = errors.New("the header has a quoted value that can be read in two ways")
	errXFCCContent = errors.New("the header has characters other than printable ASCII")
	errXFCCEmpty   = errors.New("the header has an empty DNS value")
)

// parseXFCC reads a value of Envoy's x-forwarded-client-cert: elements that are
// separated by commas, of which there must be one, with pairs of key=value that
// are separated by semicolons. A value may be in double quotes, and a double
// quote in it is written as \". It returns the URIs and DNS names of the client's
// certificate, the empty "URI=" left out with which Envoy says that there is none.
//
// It is stricter than Envoy is in writing: certificates are made by others, and
// Envoy copies what is in them.
func parseXFCC(value string) (uris, dns []string, err error) {
	if len(value) > longestXFCC {
		return nil, nil, errXFCCLong
	}
	if strings.ContainsFunc(value, func(c rune) bool { return c < ' ' || c > '~' }) {
		return nil, nil, errXFCCContent
	}
	noURI := false
	for last, rest := 0, value; ; {
		key, after, ok := strings.Cut(rest, "=")
		if !ok {
			return nil, nil, errXFCCForm
		}
		at := slices.Index(xfccKeys, key)
		if at < last || at == last && rest != value && !slices.Contains(xfccSeveral, key) {
			return nil, nil, errXFCCKey
		}
		last = at
		text, after, err := xfccValue(after)
		if err != nil {
			return nil, nil, err
		}
		switch {
		case key == "URI" && (noURI || text == "" && len(uris) > 0):
			return nil, nil, errManyURIs
		case key == "URI" && text == "":
			noURI = true
		case key == "URI":
			uris = append(uris, text)
		case key == "DNS" && text == "":
			return nil, nil, errXFCCEmpty
		case key == "DNS":
			dns = append(dns, text)
		}
		if after == "" {
			return uris, dns, nil
		}
		if after[0] == ',' {
			return nil, nil, errXFCCHops
		}
		rest = after[1:]
	}
}

// xfccValue cuts off the value that s begins with. What is left is empty, or
// begins with the separator.
func xfccValue(s string) (value, after string, err error) {
	if !strings.HasPrefix(s, `"`) {
		end := strings.IndexAny(s, `;,"`)
		switch {
		case end < 0:
			return s, "", nil
		case s[end] == '"':
			return "", "", errXFCCForm
		}
		return s[:end], s[end:], nil
	}
	backslashes := 0
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '\\':
			backslashes++
			continue
		case s[i] != '"' || backslashes%2 == 1:
		case backslashes > 0:
			// Does the last one belong to the quote, or to the one before it? Envoy
			// and what it copies a subject from do not say the same.
			return "", "", errXFCCQuote
		case i+1 < len(s) && s[i+1] != ';' && s[i+1] != ',':
			return "", "", errXFCCForm
		default:
			return s[1:i], s[i+1:], nil
		}
		backslashes = 0
	}
	return "", "", errXFCCForm
}
