package sandbox

import "net/http"

// revocation is RFC 7009. A refresh token takes its whole family with it, an
// access token goes alone; a token that is unknown, or another client's, is no
// error.
func (s *Server) revocation(c *call) reply {
	switch {
	case c.Method != http.MethodPost:
		return methodNotAllowed("POST")
	case !isForm(c.Request):
		return reply{status: http.StatusUnsupportedMediaType}
	case c.form == nil:
		return s.revocationError(errInvalidRequest)
	}
	cl, err := s.authenticate(c)
	if err != nil {
		return s.revocationError(err)
	}
	value := c.form.Get("token")
	if value == "" {
		return s.revocationError(errInvalidRequest)
	}
	switch c.form.Get("token_type_hint") {
	case "", "access_token", "refresh_token": // a hint, and not needed
	default:
		return s.revocationError(&tokenError{Code: "unsupported_token_type"})
	}
	outcome := "unchanged"
	if s.revoke(cl, value) {
		outcome = "revoked"
	}
	s.tally.revocation(outcome)
	return reply{status: http.StatusOK}.noStore()
}

func (s *Server) revocationError(err *tokenError) reply {
	s.tally.revocation(err.Code)
	return err.reply()
}

// revoke reports whether there was something to revoke.
func (s *Server) revoke(cl *client, value string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := sum(value)
	if t, ok := s.world.refreshTokens.get(key); ok && t.grant.client == cl {
		was := t.grant.live()
		t.grant.revoked = true
		return was
	}
	if t, ok := s.world.accessTokens.get(key); ok && t.grant.client == cl {
		s.world.accessTokens.delete(key)
		return t.grant.live()
	}
	return false
}
