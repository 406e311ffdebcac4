package sandbox

import (
	"slices"
	"strings"
)

// refresh is RFC 6749 section 6. Scopes may be narrowed for the one access
// token; the refresh token keeps all of them.
func (s *Server) refresh(c *call, cl *client) (*order, *tokenError) {
	value := c.form.Get("refresh_token")
	if value == "" {
		return nil, errInvalidRequest
	}
	narrowed := strings.Fields(c.form.Get("scope"))
	if len(c.form.Get("scope")) > maxScope {
		return nil, errInvalidScope
	}
	now := s.options.Now()

	s.mu.Lock()
	defer s.mu.Unlock()
	token, ok := s.world.refreshTokens.get(sum(value))
	if !ok || len(value) > maxCredential || token.grant.client != cl {
		return nil, errInvalidGrant
	}
	g := token.grant
	if !g.live() || !now.Before(g.end) || c.tenant != nil && c.tenant.ID != g.user.Tenant {
		return nil, errInvalidGrant
	}
	reused := !token.used.IsZero() && now.Sub(token.used) >= cl.ReuseGrace
	if reused {
		g.revoked = !cl.TolerateReuse
		return nil, errInvalidGrant
	}
	for _, scope := range narrowed {
		if !slices.Contains(g.scopes, scope) {
			return nil, errInvalidScope
		}
	}
	o := &order{grant: g, scopes: g.scopes, refreshToken: value}
	if len(narrowed) > 0 {
		o.scopes = narrowed
	}
	if !cl.ReusableRefreshTokens {
		o.refreshToken = strings.ToUpper(randomToken())
		s.world.refreshTokens.put(sum(o.refreshToken), &refreshToken{grant: g})
		if token.used.IsZero() {
			token.used = now // the grace counts from the first use
		}
	}
	return o, nil
}
