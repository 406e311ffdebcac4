package oauth

import (
	"errors"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// ProfileConfig describes a profile at any OAuth 2.0 server.
type ProfileConfig struct {
	// Name of the profile, and Provider as broker.Profile has it. Required.
	Name, Provider string
	// Issuer says where the server publishes its metadata (RFC 8414, OpenID
	// Connect Discovery), from which the endpoints come. Required unless
	// TokenURL is set.
	Issuer string
	// TokenURL, AuthorizationURL and RevocationURL are the endpoints where
	// nothing is to be discovered; a query that they have is kept. Exclude
	// Issuer.
	TokenURL, AuthorizationURL, RevocationURL string
	// ExpectedIssuers are what the server may call itself beside a code (RFC
	// 9207) where Issuer does not say it.
	ExpectedIssuers []string
	// AllowInsecureHTTP admits http:// URLs of hosts other than loopback ones;
	// secrets and tokens then travel in clear.
	AllowInsecureHTTP bool

	// ClientID as registered. Required.
	ClientID string
	// ClientAuth is never guessed. Required.
	ClientAuth ClientAuth
	// ClientSecrets, newest first, for client_secret_post and
	// client_secret_basic. The next one is tried only after invalid_client.
	ClientSecrets []broker.Secret
	// PrivateKey, PEM, for private_key_jwt and tls_client_auth.
	PrivateKey broker.Secret
	// Certificate and the chain above it, PEM, for tls_client_auth.
	Certificate []byte
	// KeyID is sent as kid with private_key_jwt; empty sends none.
	KeyID string
	// AssertionAudience is whom the assertion of private_key_jwt is meant for;
	// empty means the issuer, or the token endpoint where there is no issuer.
	AssertionAudience string

	// GrantType is broker.ClientCredentials, broker.Password or
	// broker.AuthorizationCode. Required.
	GrantType broker.GrantType
	// Username and Password of the resource owner, for broker.Password.
	Username, Password broker.Secret
	// RedirectURL is where the browser comes back to, for
	// broker.AuthorizationCode.
	RedirectURL string
	// Scopes that a caller gets when it names none.
	Scopes []string
	// Audience and Resource (RFC 8707) are asked for with each grant, Extra is
	// sent with each token request. All are part of the identity.
	Audience string
	Resource []string
	Extra    map[string]string
	// SignInParameters are added to the authorization request.
	SignInParameters url.Values
	// ScopeWithCode sends the scopes with the code too, for servers that want
	// that; RFC 6749 section 4.1.3 knows no scope there.
	ScopeWithCode bool
	// ScopeWithRefresh sends the scopes with each refresh token too. Without any
	// they stay as granted (RFC 6749 section 6), also when the profile wants less
	// by now.
	ScopeWithRefresh bool
	// UnauthorizedRefuses takes a 401 without an OAuth error code, unless it is
	// a page, for a refusal of the client. It is for servers that answer so; in
	// front of others there may be a gateway that does.
	UnauthorizedRefuses bool
	// Explain, if not nil, says what a refusal means at this server and what to
	// do. What it returns is added to the error's text.
	Explain func(*broker.IssueError) string

	// Timeout bounds a whole attempt, from looking up the host to the last byte
	// of the answer, with the server's metadata and with each further client
	// secret. Zero means 10 seconds.
	Timeout time.Duration
	// These are the broker.Profile's.
	Grace           time.Duration
	Reusable        bool
	ConsentLifetime time.Duration
	DefaultLifetime time.Duration
	MaxTokenAge     time.Duration
	RejectedRetry   time.Duration
	ConsoleURL      string

	// FingerprintKey is the process's key for broker.Fingerprint. Required.
	FingerprintKey []byte
	// UserAgent is sent with every request; empty means "tokenbroker".
	UserAgent string
	// Transport is shared among profiles; nil means one of the profile's own.
	Transport *Transport
}

// NewProfile returns the profile that config describes. It makes no connection.
// Its Issuer is a broker.Revoker where there is or may be a revocation endpoint,
// and a broker.Authorizer with broker.AuthorizationCode. The error tells every
// mistake, each beginning with the name of its field in the configuration file.
func NewProfile(config ProfileConfig) (*broker.Profile, error) {
	client, err := NewClient(config)
	err = errors.Join(config.checkIdentity(), err, config.checkSecrets(), config.checkGrant(), checkScopes(config.Scopes))
	if err != nil {
		return nil, err
	}
	i, server := newIssuer(config, client), config.server(client)
	canRevoke := config.Issuer != "" || config.RevocationURL != ""
	return &broker.Profile{
		Name:            config.Name,
		Provider:        config.Provider,
		GrantType:       config.GrantType,
		Scopes:          slices.Clone(config.Scopes),
		Identity:        config.identity(server),
		ConsentIdentity: config.consentIdentity(server),
		Credential:      config.credential(i.secrets),
		UserCredential:  config.userCredential(),
		Issuer:          i.capable(canRevoke, newAuthorizer(config, i)),
		RefreshTokens:   config.refreshTokens(),
		Reusable:        config.Reusable,
		Grace:           config.Grace,
		ConsentLifetime: config.ConsentLifetime,
		ConsoleURL:      config.ConsoleURL,
		Timeout:         client.Timeout(),
		DefaultLifetime: config.DefaultLifetime,
		MaxTokenAge:     config.MaxTokenAge,
		RejectedRetry:   config.RejectedRetry,
		Endpoint:        client.Endpoint(),
	}, nil
}

// refreshTokens reports whether refresh tokens come: a server gives none with
// client_credentials (RFC 6749 section 4.4.3), and with a password only to those
// who ask.
func (c ProfileConfig) refreshTokens() bool {
	return c.GrantType == broker.AuthorizationCode ||
		c.GrantType == broker.Password && slices.Contains(c.Scopes, offlineAccess)
}

// server names whom the client asks. Its URL's query may say which tenant, and may
// be secret.
func (c ProfileConfig) server(client *Client) string {
	if client.fixed == nil || client.fixed.token.url.RawQuery == "" {
		return client.Endpoint()
	}
	return client.Endpoint() + "?" + broker.Fingerprint(c.FingerprintKey, broker.NewSecret(client.fixed.token.url.RawQuery))
}

// identity names what would be issued. A user's name can be guessed, so it is in
// there by its fingerprint. How the client authenticates is not, unless tokens
// may be bound to that (RFC 8705 section 3), nor what only shapes a sign-in.
func (c ProfileConfig) identity(server string) string {
	parts := []string{server, c.ClientID, string(c.GrantType), c.Audience, strings.Join(c.Resource, " ")}
	if c.GrantType == broker.Password {
		parts = append(parts, "user", broker.Fingerprint(c.FingerprintKey, c.Username))
	}
	if c.ClientAuth == TLSClientAuth {
		parts = append(parts, "bound", string(c.Certificate))
	}
	for _, name := range slices.Sorted(maps.Keys(c.Extra)) {
		parts = append(parts, "extra", name, c.Extra[name])
	}
	return broker.Identity(parts...)
}

// consentIdentity names whose consent a refresh token is.
func (c ProfileConfig) consentIdentity(server string) string {
	parts := []string{server, c.ClientID, string(c.GrantType)}
	if c.GrantType == broker.Password {
		parts = append(parts, broker.Fingerprint(c.FingerprintKey, c.Username))
	}
	return broker.Identity(parts...)
}

// credential names what is presented, and how: a server refuses a client that
// proves itself in another way than the registered one like one with a wrong
// secret, and the refusal has to end with that mistake too.
func (c ProfileConfig) credential(secrets []broker.Secret) string {
	var presented []broker.Secret
	for _, how := range []string{string(c.ClientAuth), c.KeyID, c.AssertionAudience} {
		presented = append(presented, broker.NewSecret(how))
	}
	presented = append(presented, secrets...)
	if c.GrantType == broker.Password {
		presented = append(presented, c.Username, c.Password)
	}
	if c.ClientAuth.hasKey() {
		presented = append(presented, c.PrivateKey, broker.NewSecret(string(c.Certificate)))
	}
	return broker.Fingerprint(c.FingerprintKey, presented...)
}

// userCredential names what the resource owner is known by.
func (c ProfileConfig) userCredential() string {
	if c.GrantType != broker.Password {
		return ""
	}
	return broker.Fingerprint(c.FingerprintKey, c.Username, c.Password)
}

func (c ProfileConfig) checkIdentity() error {
	var nameErr, keyErr error
	if c.Name == "" {
		nameErr = errors.New("name is missing")
	}
	if len(c.FingerprintKey) == 0 {
		keyErr = errors.New("there is no fingerprint key")
	}
	return errors.Join(nameErr, keyErr)
}

func (c ProfileConfig) checkSecrets() error {
	switch {
	case c.ClientAuth.hasKey() && len(c.ClientSecrets) > 0:
		return fmt.Errorf("client_secret is of no use with client_auth %s: remove it", c.ClientAuth)
	case c.ClientAuth.hasKey():
		return nil
	case len(c.ClientSecrets) == 0:
		return errors.New("client_secret is missing: set client_secret or client_secrets")
	}
	for i, s := range c.ClientSecrets {
		field := "client_secret"
		if len(c.ClientSecrets) > 1 {
			field = fmt.Sprintf("client_secrets[%d]", i)
		}
		switch {
		case s.IsEmpty():
			return errors.New(field + " is empty: check the file or variable that it comes from")
		case strings.TrimSpace(s.Reveal()) != s.Reveal():
			return errors.New(field + " has blanks or line ends around it: remove them where it comes from")
		}
	}
	return nil
}

func (c ProfileConfig) checkGrant() error {
	switch c.GrantType {
	case broker.ClientCredentials:
		return nil
	case broker.Password:
		return c.checkUser()
	case broker.AuthorizationCode:
		return c.checkSignIn()
	}
	return fmt.Errorf("the grant %q is not one of %s, %s, %s", c.GrantType, broker.ClientCredentials, broker.Password, broker.AuthorizationCode)
}

func (c ProfileConfig) checkUser() error {
	var userErr, passwordErr error
	switch name := c.Username.Reveal(); {
	case name == "":
		userErr = errors.New("password.username is empty: check the file or variable that it comes from")
	case strings.TrimSpace(name) != name:
		userErr = errors.New("password.username has blanks or line ends around it: remove them where it comes from")
	}
	if c.Password.IsEmpty() {
		passwordErr = errors.New("password.password is empty: check the file or variable that it comes from")
	}
	return errors.Join(userErr, passwordErr)
}

func (c ProfileConfig) checkSignIn() error {
	var redirectErr, endpointErr error
	u, err := url.Parse(c.RedirectURL)
	switch {
	case c.RedirectURL == "":
		redirectErr = errors.New("authorization_code.redirect_url is missing: set it to the address of /oauth/callback as browsers see it")
	case err != nil || u.Host == "" || u.Fragment != "" || u.User != nil || u.Scheme != "http" && u.Scheme != "https":
		redirectErr = errors.New("authorization_code.redirect_url is not an absolute URL without fragment, such as https://broker.example.com/oauth/callback")
	}
	if c.Issuer == "" && c.AuthorizationURL == "" {
		endpointErr = errors.New("authorization_url is missing: the grant authorization_code needs it beside token_url")
	}
	return errors.Join(redirectErr, endpointErr)
}

func checkScopes(scopes []string) error {
	for _, s := range scopes {
		if s == "" || strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c > '~' || c == '"' || c == '\\' }) {
			return fmt.Errorf("scopes has %q, which is not one scope (RFC 6749 section 3.3): write each on its own", s)
		}
	}
	return nil
}
