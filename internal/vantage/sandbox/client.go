package sandbox

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"net/url"
	"strings"
)

// authenticate finds the client that a request proves to come from. Every
// reason to refuse looks the same, an expired secret too.
func (s *Server) authenticate(c *call) (*client, *tokenError) {
	id, value := credentials(c)
	if id == "" || len(id) > maxCredential || len(value) > maxCredential {
		return nil, errInvalidClient
	}
	sum := sha256.Sum256([]byte(value))
	now := s.options.Now()

	s.mu.Lock()
	defer s.mu.Unlock()
	cl := s.world.clients[id]
	if cl == nil {
		return nil, errInvalidClient
	}
	if cl.Tenant != "" && c.tenant != nil && cl.Tenant != c.tenant.ID {
		return nil, errInvalidClient
	}
	if cl.Public && value == "" {
		return cl, nil
	}
	proven := 0
	for _, kept := range cl.secrets { // all of them, for a constant time
		match := subtle.ConstantTimeCompare(kept.sum[:], sum[:])
		if kept.live(now) {
			proven |= match
		}
	}
	if proven == 0 {
		return nil, errInvalidClient
	}
	return cl, nil
}

// credentials reads the client's identifier and secret, from HTTP Basic before
// the body. Both halves of Basic are form-encoded, as RFC 6749 section 2.3.1
// has it; one that is not is no credential at all.
func credentials(c *call) (id, value string) {
	header, ok := basic(c.Header.Get("Authorization"))
	if !ok {
		return c.form.Get("client_id"), c.form.Get("client_secret")
	}
	id, value, _ = strings.Cut(header, ":")
	id, err := url.QueryUnescape(id)
	if err != nil {
		return "", ""
	}
	if value, err = url.QueryUnescape(value); err != nil {
		return "", ""
	}
	return id, value
}

// basic decodes an Authorization header of the Basic scheme.
func basic(header string) (string, bool) {
	scheme, encoded, ok := strings.Cut(header, " ")
	if !ok || !strings.EqualFold(scheme, "Basic") {
		return "", false
	}
	decoded, err := base64.StdEncoding.DecodeString(strings.TrimSpace(encoded))
	return string(decoded), err == nil
}
