package sandbox

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"slices"
	"time"
)

// Lengths of a code verifier, and of a challenge: RFC 7636.
const (
	minVerifier = 43
	maxVerifier = 128
)

// A code is an authorization code, known by the digest of its value.
type code struct {
	client      *client
	user        *user
	scopes      []string
	redirectURI string
	challenge   string // S256; empty when the request had none
	nonce       string
	issued      time.Time
}

// authorizationCode is RFC 6749 section 4.1.3. The scopes are those of the
// authorization request: a scope parameter here changes nothing.
func (s *Server) authorizationCode(c *call, cl *client) (*order, *tokenError) {
	value := c.form.Get("code")
	if value == "" || len(value) > maxCredential {
		return nil, errInvalidGrant
	}
	ac := s.burn(value)
	if ac == nil || ac.client != cl || s.options.Now().Sub(ac.issued) > s.options.CodeLifetime {
		return nil, errInvalidGrant
	}
	if c.tenant != nil && c.tenant.ID != ac.user.Tenant {
		return nil, errInvalidGrant
	}
	switch c.form.Get("redirect_uri") {
	case ac.redirectURI:
	case "":
		return nil, errUnauthorizedClient // IdentityServer's choice of words
	default:
		return nil, errInvalidGrant
	}
	if !verifies(ac.challenge, c.form.Get("code_verifier")) {
		return nil, errInvalidGrant
	}
	if !s.enabled(ac.user) {
		return nil, errInvalidGrant
	}
	g := &grant{
		client:   cl,
		user:     ac.user,
		scopes:   append(slices.Clone(ac.scopes), "legacy.client"), // as Vantage adds it
		authTime: ac.issued,
		method:   "pwd",
		nonce:    ac.nonce,
		openID:   slices.Contains(ac.scopes, "openid"),
	}
	return s.begin(g), nil
}

// burn takes a code out of the world: whatever comes of the exchange, there is
// no second one.
func (s *Server) burn(value string) *code {
	s.mu.Lock()
	defer s.mu.Unlock()
	ac, _ := s.world.codes.get(sum(value))
	s.world.codes.delete(sum(value))
	return ac
}

func (s *Server) enabled(u *user) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !u.Disabled
}

// verifies checks a code verifier against the S256 challenge. A verifier
// without a challenge is as wrong as a challenge without a verifier.
func verifies(challenge, verifier string) bool {
	if challenge == "" {
		return verifier == ""
	}
	if len(verifier) < minVerifier || len(verifier) > maxVerifier {
		return false
	}
	hash := sha256.Sum256([]byte(verifier))
	computed := base64.RawURLEncoding.EncodeToString(hash[:])
	return subtle.ConstantTimeCompare([]byte(computed), []byte(challenge)) == 1
}
