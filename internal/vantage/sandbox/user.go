package sandbox

import (
	"time"
)

// password is RFC 6749 section 4.3. It fails in a tenant whose users sign in
// somewhere else, and for a name with accounts in several tenants unless the
// request came to the endpoint of one.
func (s *Server) password(c *call, cl *client) (*order, *tokenError) {
	scopes, err := cl.scopesOf(c.form.Get("scope"), true)
	if err != nil {
		return nil, err
	}
	name, password := c.form.Get("username"), c.form.Get("password")
	if name == "" || len(name) > maxCredential || len(password) > maxCredential {
		return nil, errInvalidGrant
	}
	u := s.account(c.tenant, cl, name)
	if u == nil || s.world.tenant(u.Tenant).ExternalIdentityProvider || !s.signIn(u, password) {
		return nil, errInvalidPassword
	}
	g := &grant{client: cl, user: u, scopes: scopes, method: "pwd", authTime: s.options.Now()}
	return s.begin(g), nil
}

// account finds the one account that name means to this client at this
// endpoint, or nil.
func (s *Server) account(tenant *Tenant, cl *client, name string) *user {
	s.mu.Lock()
	defer s.mu.Unlock()
	accounts := s.world.accounts(tenant, name)
	if len(accounts) != 1 || cl.Tenant != "" && cl.Tenant != accounts[0].Tenant {
		return nil
	}
	return accounts[0]
}

// signIn checks a password, and locks the account after too many wrong ones. A
// locked account refuses the right one too, without a sign of it, and counts
// nothing.
func (s *Server) signIn(u *user, password string) bool {
	now := s.options.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	right := same(u.Password, password)
	switch {
	case u.Disabled || now.Before(u.lockedUntil):
		return false
	case right:
		u.failures = 0
		return true
	}
	u.failures++
	if u.failures >= s.options.LockoutFailures {
		u.failures, u.lockedUntil = 0, now.Add(s.options.LockoutDuration)
	}
	return false
}

// Unlock ends the lock of every account of that name.
func (s *Server) Unlock(name string) error {
	return s.changeUser(name, func(u *user) { u.failures, u.lockedUntil = 0, time.Time{} })
}
