package serviceaccount

import (
	"encoding/base64"
	"errors"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json" // see keys.go
	"github.com/go-jose/go-jose/v4/jwt"
)

// maxToken is far beyond any token of Kubernetes, which have some 1,000
// characters.
const maxToken = 16 << 10

// Why a token proves nothing. The words are for logs: no part of the token is
// in them.
var (
	errTooLong     = errors.New("the token is longer than 16 KiB")
	errMalformed   = errors.New("the token is no JWT with one signature in compact serialisation")
	errHeader      = errors.New("the token's header is not one of Kubernetes: it must have alg and kid, and nothing else but typ")
	errClaims      = errors.New("the token's claims are not those of Kubernetes: iss, sub, aud, exp, nbf and iat must be there, times as whole seconds")
	errIssuer      = errors.New("the token is of an issuer that is not configured: compare its iss with issuer, each character counts")
	errAudience    = errors.New("the token is for another audience than the one that is configured: have the pod request it for that one")
	errExpired     = errors.New("the token has expired")
	errEarly       = errors.New("the token is not valid yet: compare this machine's clock with the cluster's")
	errTimes       = errors.New("the token's times contradict each other")
	errLifetime    = errors.New("the token was made for longer than max_lifetime: have the pod request a shorter one (expirationSeconds)")
	errSubject     = errors.New("the token is not that of a service account")
	errContradicts = errors.New("the token's claim kubernetes.io contradicts its subject")
	errAlgorithm   = errors.New("the token is signed by an algorithm that is not accepted: if it is the cluster's, add it to algorithms")
	errUnknownKey  = errors.New("the token is signed by a key that is not the cluster's")
	errKeyMismatch = errors.New("the token is signed by another algorithm than the key is for")
	errSignature   = errors.New("the token's signature is not valid")
)

// Unavailable is the error of a token that could not be checked now, and may be
// worth another try.
type Unavailable struct{ why string }

func (u *Unavailable) Error() string { return u.why }

// Temporary is true: another try may succeed.
func (u *Unavailable) Temporary() bool { return true }

// token is one that was taken apart, of which nothing is verified.
type token struct {
	raw              string
	algorithm, keyID string
	claims           claims
}

// claims are what a token says. What must be there is a pointer.
type claims struct {
	Issuer    string       `json:"iss"`
	Subject   string       `json:"sub"`
	Audience  jwt.Audience `json:"aud"`
	Expires   *int64       `json:"exp"` // seconds since 1970
	NotBefore *int64       `json:"nbf"`
	IssuedAt  *int64       `json:"iat"`
	// Kubernetes repeats the subject here, beside what the token is bound to.
	Kubernetes json.RawMessage `json:"kubernetes.io"`
}

type bound struct {
	Namespace      string `json:"namespace"`
	ServiceAccount struct {
		Name string `json:"name"`
	} `json:"serviceaccount"`
}

// parse takes a token apart. It is stricter than the standards, as Kubernetes
// has one way to write tokens: there is nothing in the header that could name
// another key, a second meaning of the payload, or a token inside.
func parse(raw string) (*token, error) {
	parts := strings.Split(raw, ".")
	if len(parts) != 3 || strings.ContainsAny(raw, "\r\n") { // which the decoder would skip
		return nil, errMalformed
	}
	var decoded [3][]byte
	for i, part := range parts {
		var err error
		if decoded[i], err = base64.RawURLEncoding.Strict().DecodeString(part); err != nil || part == "" {
			return nil, errMalformed
		}
	}
	t := &token{raw: raw}
	if !t.readHeader(decoded[0]) {
		return nil, errHeader
	}
	if json.Unmarshal(decoded[1], &t.claims) != nil || !t.claims.complete() {
		return nil, errClaims
	}
	return t, nil
}

// readHeader reports whether the header is one of Kubernetes.
func (t *token) readHeader(data []byte) bool {
	var members map[string]json.RawMessage
	var said struct {
		Algorithm string `json:"alg"`
		KeyID     string `json:"kid"`
		Type      string `json:"typ"`
	}
	if json.Unmarshal(data, &members) != nil || json.Unmarshal(data, &said) != nil {
		return false
	}
	for name := range members {
		if name != "alg" && name != "kid" && name != "typ" {
			return false
		}
	}
	t.algorithm, t.keyID = said.Algorithm, said.KeyID
	return said.Algorithm != "" && said.KeyID != "" && (said.Type == "" || strings.EqualFold(said.Type, "JWT"))
}

// lastSecond is beyond all times that a token can have: the year 9999.
const lastSecond = 253402300799

func (c *claims) complete() bool {
	for _, at := range []*int64{c.Expires, c.NotBefore, c.IssuedAt} {
		if at == nil || *at < 0 || *at > lastSecond {
			return false
		}
	}
	return c.Issuer != "" && c.Subject != "" && len(c.Audience) > 0
}

// check holds the claims to what the cluster accepts, and returns whose the
// token claims to be.
func (c *cluster) check(t *token, now time.Time) (subject, error) {
	if !slices.Contains(c.algorithms, jose.SignatureAlgorithm(t.algorithm)) {
		return subject{}, errAlgorithm
	}
	if !slices.Contains(t.claims.Audience, c.audience) {
		return subject{}, errAudience
	}
	if err := t.claims.checkTimes(now, c.longest); err != nil {
		return subject{}, err
	}
	return t.claims.subject()
}

func (c *claims) checkTimes(now time.Time, longest time.Duration) error {
	expires, notBefore, issued := time.Unix(*c.Expires, 0), time.Unix(*c.NotBefore, 0), time.Unix(*c.IssuedAt, 0)
	switch {
	case !expires.After(issued) || !expires.After(notBefore):
		return errTimes
	case !now.Before(expires.Add(leeway)):
		return errExpired
	case now.Add(leeway).Before(notBefore) || now.Add(leeway).Before(issued):
		return errEarly
	case expires.Sub(earlier(issued, notBefore)) > longest+grain:
		return errLifetime
	}
	return nil
}

// subject is whose a token is.
type subject struct{ namespace, account string }

var (
	// label and subdomain are what names of namespaces, and of accounts, are
	// made of (RFC 1123 section 2.1).
	label     = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	subdomain = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`)
)

const maxSubdomain = 253

func (c *claims) subject() (subject, error) {
	both, ok := strings.CutPrefix(c.Subject, "system:serviceaccount:")
	namespace, account, two := strings.Cut(both, ":")
	if !ok || !two || !label.MatchString(namespace) || len(account) > maxSubdomain || !subdomain.MatchString(account) {
		return subject{}, errSubject
	}
	if c.Kubernetes != nil {
		var b bound
		if json.Unmarshal(c.Kubernetes, &b) != nil || b.Namespace != namespace || b.ServiceAccount.Name != account {
			return subject{}, errContradicts
		}
	}
	return subject{namespace, account}, nil
}

// verify checks the signature.
func (t *token) verify(k key, accepted []jose.SignatureAlgorithm) error {
	signed, err := jwt.ParseSigned(t.raw, accepted)
	if err != nil || len(signed.Headers) != 1 {
		return errSignature // not err, which may repeat parts of the header
	}
	if signed.Claims(k.public) != nil {
		return errSignature
	}
	return nil
}
