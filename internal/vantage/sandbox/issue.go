package sandbox

import (
	"crypto/sha256"
	"encoding/base64"
	"slices"
	"strings"
	"time"
)

// A grant is what a client was allowed, by itself or by a user, and the root of
// a family of tokens: all of them live no longer than the grant.
type grant struct {
	client *client
	user   *user // nil for client credentials
	scopes []string

	authTime time.Time // when the user signed in
	method   string    // how: the amr claim
	nonce    string    // of the authorization request
	openID   bool      // answers carry an ID token
	session  string    // the sid claim; empty for client credentials
	end      time.Time // of its refresh tokens: absolute, never extended

	revoked bool // guarded by Server.mu
}

// An order says what to issue: an access token for some of the grant's scopes,
// perhaps a refresh token beside it.
type order struct {
	grant        *grant
	scopes       []string
	refreshToken string
}

// A refreshToken is known by the digest of its value.
type refreshToken struct {
	grant *grant
	used  time.Time // when it was used up; zero while it was not
}

// An accessToken is known by the digest of its value: being signed is not
// enough to be live.
type accessToken struct {
	grant *grant
	end   time.Time
}

// begin makes the order for a grant that a user has just given, with a refresh
// token where the scopes ask for one.
func (s *Server) begin(g *grant) *order {
	g.session = strings.ToUpper(randomToken()[:32])
	o := &order{grant: g, scopes: g.scopes}
	if slices.Contains(g.scopes, offlineAccess) {
		g.end = s.options.Now().Add(g.client.RefreshTokenLifetime)
		o.refreshToken = strings.ToUpper(randomToken())
		s.mu.Lock()
		defer s.mu.Unlock()
		s.world.refreshTokens.put(sum(o.refreshToken), &refreshToken{grant: g})
	}
	return o
}

// issue makes the access token, and the ID token of a sign-in.
func (s *Server) issue(c *call, o *order) tokenResponse {
	now := s.options.Now()
	g := o.grant
	lifetime := g.client.AccessTokenLifetime
	response := tokenResponse{
		AccessToken:  sign(s.keys.accessToken, accessClaims(c.issuer, o, now, now.Add(lifetime))),
		ExpiresIn:    int64(lifetime / time.Second),
		TokenType:    "Bearer",
		RefreshToken: o.refreshToken,
		Scope:        strings.Join(o.scopes, " "),
	}
	if g.openID {
		response.IDToken = sign(s.keys.idToken, idClaims(c.issuer, g, response.AccessToken, now))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.world.accessTokens.put(sum(response.AccessToken), &accessToken{grant: g, end: now.Add(lifetime)})
	return response
}

// claims are those of IdentityServer's tokens, access and ID.
type claims struct {
	Issuer     string   `json:"iss"`
	NotBefore  int64    `json:"nbf"`
	IssuedAt   int64    `json:"iat"`
	Expiry     int64    `json:"exp"`
	Audience   string   `json:"aud"`
	Scope      []string `json:"scope,omitempty"`
	Methods    []string `json:"amr,omitempty"`
	ClientID   string   `json:"client_id,omitempty"`
	Subject    string   `json:"sub,omitempty"`
	AuthTime   int64    `json:"auth_time,omitempty"`
	Provider   string   `json:"idp,omitempty"`
	Email      string   `json:"email,omitempty"`
	TenantID   string   `json:"tenant_id,omitempty"`
	SessionID  string   `json:"sid,omitempty"`
	Nonce      string   `json:"nonce,omitempty"`
	AccessHash string   `json:"at_hash,omitempty"`
	JWTID      string   `json:"jti,omitempty"`
}

func accessClaims(issuer string, o *order, now, end time.Time) claims {
	c := userClaims(issuer, o.grant, now, end)
	c.Audience = "publicapi"
	c.ClientID = o.grant.client.ID
	c.Scope = o.scopes
	c.JWTID = strings.ToUpper(randomToken()[:32])
	return c
}

func idClaims(issuer string, g *grant, accessToken string, now time.Time) claims {
	const lifetime = 5 * time.Minute // IdentityServer's default
	c := userClaims(issuer, g, now, now.Add(lifetime))
	c.Audience = g.client.ID
	c.Nonce = g.nonce
	c.Email = g.user.Name
	hash := sha256.Sum256([]byte(accessToken))
	c.AccessHash = base64.RawURLEncoding.EncodeToString(hash[:len(hash)/2])
	return c
}

// userClaims are what both kinds of token say.
func userClaims(issuer string, g *grant, now, end time.Time) claims {
	c := claims{
		Issuer:    issuer,
		NotBefore: now.Unix(),
		IssuedAt:  now.Unix(),
		Expiry:    end.Unix(),
		TenantID:  g.client.Tenant,
	}
	if g.user != nil {
		c.Subject = g.user.subject
		c.TenantID = g.user.Tenant
		c.AuthTime = g.authTime.Unix()
		c.Provider = "local"
		c.Methods = []string{g.method}
		c.SessionID = g.session
	}
	return c
}

// liveToken returns the grant behind an access token, or nil when the token is
// unknown, expired, revoked, or its user was disabled.
func (s *Server) liveToken(token string) *grant {
	now := s.options.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	t, ok := s.world.accessTokens.get(sum(token))
	if !ok || !now.Before(t.end) || !t.grant.live() {
		return nil
	}
	return t.grant
}

// live must be called with Server.mu held.
func (g *grant) live() bool { return !g.revoked && (g.user == nil || !g.user.Disabled) }

func sum(token string) digest { return sha256.Sum256([]byte(token)) }
