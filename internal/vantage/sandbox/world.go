package sandbox

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// The demo world: what a server made from zero Options knows. The secrets of
// its clients are made at random for each server; see [Server.ClientSecret].
//
//	client     grant                scopes                                     tokens live
//	invoices   client_credentials   openid permissions global.wildcard         30 days
//	operator   password             the same, offline_access                   30 days
//	review     authorization_code   the same, offline_access; loopback URIs    24 hours
//	admin      client_credentials   the same, publicapi.all; administrator     24 hours
//
// Its users, all with [DemoPassword], are operator@example.com,
// reviewer@example.com and admin@example.com, who is a tenant administrator.
const (
	DemoTenant   = "7c1f5a52-0f3e-4c59-9d1c-2b0a6e4d8f10"
	DemoPassword = "sandbox-demo"
)

// Options describe a world and its rules. A nil list stands for the demo's,
// every other zero value for the default named beside it.
type Options struct {
	// Issuer is the URL up to and including /auth2 by which clients know the
	// server; a tenant's issuer appends its identifier. By default it is
	// derived from each request, as IdentityServer does.
	Issuer string

	Tenants []Tenant
	Users   []User
	Clients []Client

	AccessTokenLifetime  time.Duration // 24 hours
	RefreshTokenLifetime time.Duration // 30 days from the first issue, never extended
	CodeLifetime         time.Duration // 1 minute

	LockoutFailures int           // wrong passwords that lock an account: 5
	LockoutDuration time.Duration // 5 minutes

	// Now is the clock for every lifetime: time.Now. Delays in faults are
	// real time all the same.
	Now func() time.Time
}

// A Tenant is a customer of Vantage.
type Tenant struct {
	// ID is a GUID. In paths it is accepted without hyphens and in any case.
	ID   string
	Name string // shown on the sign-in page; the ID when empty
	// ExternalIdentityProvider says that users sign in somewhere else, so that
	// the password grant fails whatever the password is.
	ExternalIdentityProvider bool
}

// A User is a person's account in one tenant. One name may have accounts in
// several; then the password grant works at the tenants' own endpoints only.
type User struct {
	Name                string // an e-mail address; compared in any case
	Password            string
	Tenant              string // the first tenant when empty
	TenantAdministrator bool   // may use the client administration API
	Disabled            bool   // may not sign in, and loses existing grants
}

// A Client is an application.
type Client struct {
	ID     string // at most 100 characters
	Name   string // ID when empty
	Tenant string // the only tenant where it works; every one when empty

	// Secrets may be used side by side. Empty: one is made at random.
	Secrets []Secret
	Public  bool // needs no secret, and has none

	// GrantTypes are RFC 6749's values, without refresh_token, which
	// AllowOfflineAccess stands for.
	GrantTypes         []string
	Scopes             []string // openid permissions global.wildcard when empty
	AllowOfflineAccess bool     // offline_access may be requested
	AllowNoPKCE        bool     // PKCE is optional
	RedirectURIs       []string // prefixes, as Vantage matches them

	AccessTokenLifetime  time.Duration // Options' when zero
	RefreshTokenLifetime time.Duration // Options' when zero

	// A refresh token is used up by each refresh, and one that comes back
	// after that ends the family: every token that descends from the same
	// sign-in. These change it.
	ReusableRefreshTokens bool          // never used up
	ReuseGrace            time.Duration // a used one still works for so long
	TolerateReuse         bool          // a used one is refused, the family lives

	TenantAdministrator bool // may use the client administration API
}

// A Secret is one of a client's secrets.
type Secret struct {
	Value       string // at most 100 characters
	Description string
	StartTime   time.Time // not valid before; always when zero
	Expiration  time.Time // not valid from then on; never when zero
}

var documentedScopes = []string{"openid", "permissions", "global.wildcard"}

func (o Options) withDefaults() Options {
	if o.Tenants == nil {
		o.Tenants = []Tenant{{ID: DemoTenant, Name: "Sandbox"}}
	}
	if o.Users == nil {
		o.Users = []User{
			{Name: "operator@example.com", Password: DemoPassword},
			{Name: "reviewer@example.com", Password: DemoPassword},
			{Name: "admin@example.com", Password: DemoPassword, TenantAdministrator: true},
		}
	}
	if o.Clients == nil {
		o.Clients = demoClients()
	}
	setDefault(&o.AccessTokenLifetime, 24*time.Hour)
	setDefault(&o.RefreshTokenLifetime, 30*24*time.Hour)
	setDefault(&o.CodeLifetime, time.Minute)
	setDefault(&o.LockoutFailures, 5)
	setDefault(&o.LockoutDuration, 5*time.Minute)
	if o.Now == nil {
		o.Now = time.Now
	}
	return o
}

func setDefault[T comparable](field *T, value T) {
	var zero T
	if *field == zero {
		*field = value
	}
}

func demoClients() []Client {
	const month = 30 * 24 * time.Hour // expires_in in the documentation's samples
	return []Client{{
		ID:                  "invoices",
		GrantTypes:          []string{"client_credentials"},
		AccessTokenLifetime: month,
	}, {
		ID:                  "operator",
		GrantTypes:          []string{"password"},
		AllowOfflineAccess:  true,
		AccessTokenLifetime: month,
	}, {
		ID:                 "review",
		GrantTypes:         []string{"authorization_code"},
		AllowOfflineAccess: true,
		RedirectURIs:       []string{"http://127.0.0.1:", "http://localhost:", "http://[::1]:"},
	}, {
		ID:                  "admin",
		GrantTypes:          []string{"client_credentials"},
		Scopes:              append(slices.Clone(documentedScopes), "publicapi.all"),
		TenantAdministrator: true,
	}}
}

// Limits of what the world remembers.
const (
	maxClients       = 10_000
	maxSecrets       = 100 // of one client
	maxCodes         = 100_000
	maxRefreshTokens = 200_000
	maxAccessTokens  = 1_000_000
)

// digest is how the world remembers anything that must not be read back.
type digest = [sha256.Size]byte

// world is everything the server knows. Tenants never change; the rest is
// guarded by Server.mu.
type world struct {
	tenants []*Tenant
	users   []*user
	clients map[string]*client
	ids     []string // the keys of clients, oldest first

	codes         *bounded[digest, *code]
	refreshTokens *bounded[digest, *refreshToken]
	accessTokens  *bounded[digest, *accessToken]
}

// user is an account and its standing.
type user struct {
	User
	subject     string
	failures    int       // wrong passwords since the last right one or lock
	lockedUntil time.Time // zero when never locked
}

// client is a client and its secrets. Of its fields only secrets ever change.
type client struct {
	Client
	settings clientSettings // as the administration API shows it
	secrets  []*secret      // newest first
}

// secret is what is kept of a Secret.
type secret struct {
	id          string
	description string
	sum         digest
	display     string // the first three characters
	value       string // empty for those that the administration API made
	start, end  time.Time
}

func newWorld(o Options) (world, error) {
	w := world{
		clients:       map[string]*client{},
		codes:         newBounded[digest, *code](maxCodes),
		refreshTokens: newBounded[digest, *refreshToken](maxRefreshTokens),
		accessTokens:  newBounded[digest, *accessToken](maxAccessTokens),
	}
	if len(o.Tenants) == 0 {
		return w, errors.New("reading the tenants: there must be at least one")
	}
	for _, t := range o.Tenants {
		if err := w.addTenant(t); err != nil {
			return w, fmt.Errorf("reading the tenants: %w", err)
		}
	}
	for _, u := range o.Users {
		if err := w.addUser(u); err != nil {
			return w, fmt.Errorf("reading the users: %w", err)
		}
	}
	for _, c := range o.Clients {
		if err := w.addClient(c.withDefaults(o)); err != nil {
			return w, fmt.Errorf("reading the clients: %w", err)
		}
	}
	return w, nil
}

func (w *world) addTenant(t Tenant) error {
	if t.ID == "" || w.tenant(t.ID) != nil {
		return fmt.Errorf("tenant %q: the identifier is empty or used twice", t.ID)
	}
	setDefault(&t.Name, t.ID)
	w.tenants = append(w.tenants, &t)
	return nil
}

func (w *world) addUser(u User) error {
	setDefault(&u.Tenant, w.tenants[0].ID)
	t := w.tenant(u.Tenant)
	if t == nil {
		return fmt.Errorf("user %q: there is no tenant %q", u.Name, u.Tenant)
	}
	u.Tenant = t.ID
	if u.Name == "" || len(w.accounts(t, u.Name)) > 0 {
		return fmt.Errorf("user %q: the name is empty or used twice in one tenant", u.Name)
	}
	sum := sha256.Sum256([]byte(u.Tenant + "\n" + strings.ToLower(u.Name)))
	w.users = append(w.users, &user{User: u, subject: hex.EncodeToString(sum[:16])})
	return nil
}

func (c Client) withDefaults(o Options) Client {
	setDefault(&c.Name, c.ID)
	if len(c.Scopes) == 0 {
		c.Scopes = documentedScopes
	}
	if len(c.Secrets) == 0 && !c.Public {
		c.Secrets = []Secret{{Value: randomToken()}}
	}
	setDefault(&c.AccessTokenLifetime, o.AccessTokenLifetime)
	setDefault(&c.RefreshTokenLifetime, o.RefreshTokenLifetime)
	return c
}

func (w *world) addClient(c Client) error {
	switch {
	case c.ID == "" || len(c.ID) > maxCredential:
		return fmt.Errorf("client %q: the identifier must have 1 to %d characters", c.ID, maxCredential)
	case w.clients[c.ID] != nil:
		return fmt.Errorf("client %q: there is one already", c.ID)
	case len(w.clients) >= maxClients:
		return fmt.Errorf("client %q: there are %d already", c.ID, maxClients)
	case slices.Contains(c.RedirectURIs, ""):
		return fmt.Errorf("client %q: an empty redirect URI would match every other", c.ID)
	}
	if c.Tenant != "" {
		t := w.tenant(c.Tenant)
		if t == nil {
			return fmt.Errorf("client %q: there is no tenant %q", c.ID, c.Tenant)
		}
		c.Tenant = t.ID
	}
	record := &client{settings: settingsOf(c)}
	for _, s := range c.Secrets {
		kept, err := newSecret(s)
		if err != nil {
			return fmt.Errorf("client %q: %w", c.ID, err)
		}
		kept.value = s.Value
		record.secrets = append(record.secrets, kept)
	}
	c.Secrets = nil // only the digests count from here on
	record.Client = c
	w.clients[c.ID] = record
	w.ids = append(w.ids, c.ID)
	return nil
}

func newSecret(s Secret) (*secret, error) {
	if s.Value == "" || len(s.Value) > maxCredential {
		return nil, fmt.Errorf("a secret must have 1 to %d bytes", maxCredential)
	}
	return &secret{
		id:          randomToken()[:16],
		description: s.Description,
		sum:         sha256.Sum256([]byte(s.Value)),
		display:     string([]rune(s.Value)[:min(3, len([]rune(s.Value)))]),
		start:       s.StartTime,
		end:         s.Expiration,
	}, nil
}

// live reports whether the secret may be used at t.
func (s *secret) live(t time.Time) bool {
	return !t.Before(s.start) && (s.end.IsZero() || t.Before(s.end))
}

// tenant finds a tenant by its identifier, hyphens and case aside.
func (w *world) tenant(id string) *Tenant {
	plain := func(s string) string { return strings.ToLower(strings.ReplaceAll(s, "-", "")) }
	for _, t := range w.tenants {
		if plain(t.ID) == plain(id) {
			return t
		}
	}
	return nil
}

// accounts lists the accounts of name, in one tenant or, when that is nil, in
// all.
func (w *world) accounts(tenant *Tenant, name string) []*user {
	var found []*user
	for _, u := range w.users {
		if strings.EqualFold(u.Name, name) && (tenant == nil || tenant.ID == u.Tenant) {
			found = append(found, u)
		}
	}
	return found
}

// ClientSecret returns the newest secret of a client that Options or
// SetClientSecret gave it, or "" when there is none such. Secrets made through
// the administration API are shown there, once, and not here.
func (s *Server) ClientSecret(clientID string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.world.clients[clientID]; c != nil {
		for _, kept := range c.secrets {
			if kept.value != "" {
				return kept.value
			}
		}
	}
	return ""
}

// SetClientSecret replaces all secrets of a client, newest first. Without any
// the client cannot authenticate.
func (s *Server) SetClientSecret(clientID string, values ...string) error {
	var secrets []*secret
	for _, value := range values {
		kept, err := newSecret(Secret{Value: value})
		if err != nil {
			return fmt.Errorf("setting the secret of client %q: %w", clientID, err)
		}
		kept.value = value
		secrets = append(secrets, kept)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.world.clients[clientID]
	if c == nil {
		return fmt.Errorf("setting the secret of client %q: there is no such client", clientID)
	}
	c.secrets = secrets
	return nil
}

// SetPassword gives every account of that name a new password and unlocks it.
func (s *Server) SetPassword(name, password string) error {
	return s.changeUser(name, func(u *user) {
		u.Password = password
		u.failures, u.lockedUntil = 0, time.Time{}
	})
}

// SetDisabled disables or enables every account of that name.
func (s *Server) SetDisabled(name string, disabled bool) error {
	return s.changeUser(name, func(u *user) { u.Disabled = disabled })
}

func (s *Server) changeUser(name string, change func(*user)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	accounts := s.world.accounts(nil, name)
	if len(accounts) == 0 {
		return fmt.Errorf("changing user %q: there is no such user", name)
	}
	for _, u := range accounts {
		change(u)
	}
	return nil
}

// RevokeAll ends every code, access token and refresh token issued so far.
func (s *Server) RevokeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.world.codes.clear()
	s.world.refreshTokens.clear()
	s.world.accessTokens.clear()
}

// randomToken is 256 random bits in hexadecimal.
func randomToken() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// same compares secrets in a time that depends on neither.
func same(a, b string) bool {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:]) == 1
}
