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

const (
	// productID is that of Vantage itself.
	productID = "a8548c9b-cb90-4c66-8567-d7372bb9b963"
	// consentLifetime is how long refresh tokens live unless the client was
	// created with another time.
	consentLifetime = 30 * 24 * time.Hour
)

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
	// GrantType is broker.ClientCredentials, also for empty, broker.Password
	// or broker.AuthorizationCode.
	GrantType broker.GrantType
	// Username and Password of whom the client acts for. Required with the
	// grant password.
	Username, Password broker.Secret
	// RedirectURL is where the browser comes back to: the whole URL, as it was
	// registered. Vantage admits whatever begins with what was registered.
	// Required with the grant authorization_code.
	RedirectURL string
	// ProductID is the product that a person signs in to; empty means Vantage.
	ProductID string
	// Scopes that a caller gets when it names none. With offline_access among
	// them a person's grant brings refresh tokens.
	Scopes []string
	// Timeout bounds one token request; zero means 10 seconds.
	Timeout time.Duration
	// Grace, Reusable and ConsoleURL are the profile's.
	Grace      time.Duration
	Reusable   bool
	ConsoleURL string
	// ConsentLifetime is how long refresh tokens live, which Vantage counts
	// from the sign-in and never extends; zero means 30 days.
	ConsentLifetime time.Duration
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
	base, server, err := config.server()
	wire := oauth.ProfileConfig{
		Name:              config.Name,
		Provider:          "vantage",
		TokenURL:          server + "/connect/token",
		AuthorizationURL:  server + "/connect/authorize",
		RevocationURL:     server + "/connect/revocation",
		ExpectedIssuers:   []string{base + "/auth2", server},
		AllowInsecureHTTP: config.AllowInsecureHTTP,
		ClientID:          config.ClientID,
		ClientAuth:        oauth.ClientSecretPost,
		ClientSecrets:     config.ClientSecrets,
		GrantType:         config.GrantType,
		Username:          config.Username,
		Password:          config.Password,
		RedirectURL:       config.RedirectURL,
		Scopes:            config.Scopes,
		SignInParameters:  url.Values{"productId": {cmp.Or(config.ProductID, productID)}},
		ScopeWithCode:     true,
		Explain:           explain,
		Timeout:           config.Timeout,
		Grace:             config.Grace,
		Reusable:          config.Reusable,
		ConsentLifetime:   config.consentLifetime(),
		DefaultLifetime:   config.DefaultLifetime,
		MaxTokenAge:       config.MaxTokenAge,
		RejectedRetry:     config.RejectedRetry,
		ConsoleURL:        config.ConsoleURL,
		FingerprintKey:    config.FingerprintKey,
		UserAgent:         config.UserAgent,
		Transport:         config.Transport,
	}
	if wire.Transport == nil {
		wire.Transport = oauth.NewTransport(oauth.TransportConfig{})
	}
	profile, profileErr := oauth.NewProfile(wire)
	if err = errors.Join(err, profileErr); err != nil {
		return nil, err
	}
	client, err := oauth.NewClient(wire)
	if err != nil {
		return nil, err
	}
	profile.Identity = config.identity(profile.Endpoint)
	profile.Issuer = newIssuer(profile.Issuer, newAdministration(config, base, client))
	return profile, nil
}

// consentLifetime is that of a person's consent. A password brings the next one
// by itself.
func (c Config) consentLifetime() time.Duration {
	if c.GrantType != broker.AuthorizationCode {
		return 0
	}
	return cmp.Or(c.ConsentLifetime, consentLifetime)
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

// server is what the endpoints' URLs begin with, the tenant's own where there is
// a tenant, and base what comes before /auth2. Both can be parsed even when there
// are mistakes.
func (c Config) server() (base, server string, err error) {
	base, err = c.base()
	if err = errors.Join(err, checkTenant(c.TenantID)); err != nil {
		return "https://vantage.invalid", "https://vantage.invalid", err
	}
	if c.TenantID != "" {
		return base, base + "/auth2/" + url.PathEscape(c.TenantID), nil
	}
	return base, base + "/auth2", nil
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
	return u.Scheme + "://" + strings.ToLower(u.Host) + path, nil
}

// checkTenant admits what stays one segment of a path.
func checkTenant(id string) error {
	if strings.ContainsAny(id, `/\.`) || strings.ContainsFunc(id, isBlankOrControl) {
		return errors.New("tenant_id has slashes, dots or blanks: copy it from Vantage, Configuration, General")
	}
	return nil
}

func isBlankOrControl(c rune) bool { return unicode.IsSpace(c) || unicode.IsControl(c) }
