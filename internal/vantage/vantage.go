// Package vantage knows ABBYY Vantage: where its regions and tenants have their
// token endpoints, how its clients authenticate, and what its refusals mean.
//
// The wire is package oauth's. What is Vantage's own: the client's credentials
// go into the form, every refusal has status 400, and a secret that has expired
// (after six months unless said otherwise) is refused like a wrong one. That is
// why a profile may have several secrets: while one is being replaced the other
// still works. Likewise a locked account is refused like a wrong password.
package vantage

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// offlineAccess is the scope that brings refresh tokens, if the client may have
// them.
const offlineAccess = "offline_access"

// regions are the public clouds. A tenant lives in one of them.
var regions = []string{"eu", "us", "au"}

// Config describes a profile that obtains its tokens from Vantage.
type Config struct {
	// Name of the profile. Required.
	Name string
	// Region of the public cloud: eu, us or au. Required unless BaseURL is set.
	Region string
	// BaseURL of a private cloud, with the path prefix that it may have:
	// what comes before /auth2. Excludes Region.
	BaseURL string
	// TenantID makes the tenant's own token endpoint be used. Optional.
	TenantID string
	// ClientID as Vantage shows it. Required.
	ClientID string
	// ClientSecrets, newest first: one at least. The next one is tried only
	// when Vantage refuses the client.
	ClientSecrets []broker.Secret
	// GrantType is broker.ClientCredentials, also for empty, or
	// broker.Password.
	GrantType broker.GrantType
	// Username and Password of whom the client acts for. Required with the
	// grant password.
	Username, Password broker.Secret
	// Scopes that a caller gets when it names none. With offline_access among
	// them the grant password brings refresh tokens.
	Scopes []string
	// Timeout bounds one token request; zero means 10 seconds.
	Timeout time.Duration
	// Grace and Reusable are the profile's.
	Grace    time.Duration
	Reusable bool
	// DefaultLifetime, MaxTokenAge and RejectedRetry are the profile's, with
	// its defaults for zero.
	DefaultLifetime time.Duration
	MaxTokenAge     time.Duration
	RejectedRetry   time.Duration
	// AllowInsecureHTTP admits an http:// BaseURL on a host other than a
	// loopback one.
	AllowInsecureHTTP bool
	// FingerprintKey is the process's key for broker.Fingerprint. Required.
	FingerprintKey []byte
	// UserAgent is sent with token requests; empty means oauth's.
	UserAgent string
	// Transport is shared among profiles; nil means one of the profile's own.
	Transport *oauth.Transport
}

// NewProfile returns the profile that config describes. It makes no
// connection. The error tells every mistake, and what to do about it.
func NewProfile(config Config) (*broker.Profile, error) {
	config.GrantType = cmp.Or(config.GrantType, broker.ClientCredentials)
	server, serverErr := config.server()
	err := errors.Join(config.checkIdentity(), serverErr, config.checkSecrets(), config.checkUser(), checkScopes(config.Scopes))
	client, clientErr := oauth.NewClient(oauth.Config{
		TokenURL:          server + "/connect/token",
		RevocationURL:     server + "/connect/revocation",
		ClientID:          config.ClientID,
		ClientAuth:        oauth.ClientSecretPost,
		Timeout:           config.Timeout,
		UserAgent:         config.UserAgent,
		AllowInsecureHTTP: config.AllowInsecureHTTP,
		Transport:         config.Transport,
	})
	if err = errors.Join(err, clientErr); err != nil {
		return nil, err
	}
	secrets := distinct(config.ClientSecrets)
	return &broker.Profile{
		Name:            config.Name,
		Provider:        "vantage",
		GrantType:       config.GrantType,
		Scopes:          slices.Clone(config.Scopes),
		Identity:        config.identity(client.Endpoint()),
		Credential:      config.credential(secrets),
		Issuer:          newIssuer(config, client, secrets),
		RefreshTokens:   config.GrantType == broker.Password && slices.Contains(config.Scopes, offlineAccess),
		Reusable:        config.Reusable,
		Grace:           config.Grace,
		Timeout:         client.Timeout(),
		DefaultLifetime: config.DefaultLifetime,
		MaxTokenAge:     config.MaxTokenAge,
		RejectedRetry:   config.RejectedRetry,
		Endpoint:        client.Endpoint(),
	}, nil
}

// identity names what would be issued. A user's name can be guessed, so it is in
// there by its fingerprint.
func (c Config) identity(endpoint string) string {
	parts := []string{endpoint, c.TenantID, c.ClientID, string(c.GrantType)}
	if c.GrantType == broker.Password {
		parts = append(parts, broker.Fingerprint(c.FingerprintKey, c.Username))
	}
	return broker.Identity(parts...)
}

// credential names what is presented.
func (c Config) credential(secrets []broker.Secret) string {
	if c.GrantType == broker.Password {
		secrets = append(slices.Clone(secrets), c.Username, c.Password)
	}
	return broker.Fingerprint(c.FingerprintKey, secrets...)
}

// server is what the endpoints' URLs begin with, the tenant's own where there is
// a tenant. It is one that can be parsed even when there are mistakes.
func (c Config) server() (string, error) {
	base, err := c.base()
	if err = errors.Join(err, checkTenant(c.TenantID)); err != nil {
		return "https://vantage.invalid", err
	}
	if c.TenantID != "" {
		return base + "/auth2/" + url.PathEscape(c.TenantID), nil
	}
	return base + "/auth2", nil
}

// base is what comes before /auth2, without a slash at its end.
func (c Config) base() (string, error) {
	switch {
	case c.Region != "" && c.BaseURL != "":
		return "", errors.New("region and base_url exclude each other: keep the region for ABBYY's public cloud, base_url for a private one")
	case c.Region != "" && !slices.Contains(regions, c.Region):
		return "", fmt.Errorf("region %q is not one of %s: for a private cloud set base_url instead", c.Region, strings.Join(regions, ", "))
	case c.Region != "":
		return "https://vantage-" + c.Region + ".abbyy.com", nil
	case c.BaseURL != "":
		return checkBaseURL(c.BaseURL, c.AllowInsecureHTTP)
	}
	return "", fmt.Errorf("neither region nor base_url is set: set region to %s, or base_url for a private cloud", strings.Join(regions, ", "))
}

// checkBaseURL does not repeat the URL where that could show a password.
func checkBaseURL(raw string, allowInsecureHTTP bool) (string, error) {
	u, err := url.Parse(raw)
	switch {
	case err != nil || u.Hostname() == "" || u.Opaque != "":
		return "", errors.New("base_url is not an absolute URL such as https://vantage.example.com")
	case u.User != nil:
		return "", errors.New("base_url holds a user name: remove it, client_id and client_secret are all that is needed")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return "", errors.New("base_url has a query or a fragment: remove it")
	case u.Scheme == "http" && !allowInsecureHTTP && !oauth.IsLoopback(u.Hostname()):
		return "", errors.New("base_url would send secrets in clear: use https://, or set allow_insecure_http if that is meant")
	case u.Scheme != "http" && u.Scheme != "https":
		return "", errors.New("base_url starts with neither https:// nor http://")
	}
	path := strings.TrimRight(u.EscapedPath(), "/")
	if slices.Contains(strings.Split(path, "/"), "auth2") {
		return "", errors.New("base_url reaches into /auth2: end it before that, the rest is added")
	}
	return u.Scheme + "://" + u.Host + path, nil
}

// checkTenant admits what stays one segment of a path.
func checkTenant(id string) error {
	if strings.ContainsAny(id, `/\.`) || strings.ContainsFunc(id, isBlankOrControl) {
		return errors.New("tenant_id has slashes, dots or blanks: copy it from Vantage, Configuration, General")
	}
	return nil
}

func (c Config) checkIdentity() error {
	var nameErr, keyErr error
	if c.Name == "" {
		nameErr = errors.New("the profile has no name")
	}
	if len(c.FingerprintKey) == 0 {
		keyErr = errors.New("there is no fingerprint key")
	}
	return errors.Join(nameErr, keyErr)
}

func (c Config) checkSecrets() error {
	if len(c.ClientSecrets) == 0 {
		return errors.New("there is no client secret: set client_secret or client_secrets")
	}
	for i, s := range c.ClientSecrets {
		switch {
		case s.IsEmpty():
			return fmt.Errorf("client secret %d is empty: check the file or variable that it comes from", i+1)
		case strings.TrimSpace(s.Reveal()) != s.Reveal():
			return fmt.Errorf("client secret %d has blanks or line ends around it: remove them where it comes from", i+1)
		}
	}
	return nil
}

func (c Config) checkUser() error {
	switch {
	case c.GrantType == broker.ClientCredentials:
		return nil
	case c.GrantType != broker.Password:
		return fmt.Errorf("the grant %s is not one of %s, %s", c.GrantType, broker.ClientCredentials, broker.Password)
	}
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

func checkScopes(scopes []string) error {
	for _, s := range scopes {
		if s == "" || strings.ContainsFunc(s, func(c rune) bool { return c <= ' ' || c > '~' || c == '"' || c == '\\' }) {
			return fmt.Errorf("scope %q is not one scope (RFC 6749 section 3.3): write each on its own", s)
		}
	}
	return nil
}

// distinct drops repetitions, so that no refused secret is sent twice.
func distinct(secrets []broker.Secret) []broker.Secret {
	var d []broker.Secret
	for _, s := range secrets {
		if !slices.ContainsFunc(d, s.Equal) {
			d = append(d, s)
		}
	}
	return d
}

func isBlankOrControl(c rune) bool { return unicode.IsSpace(c) || unicode.IsControl(c) }
