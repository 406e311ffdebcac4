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
	// ProfileConfig without what Vantage decides: the provider, the endpoints,
	// how the client authenticates and what a refusal means. GrantType may be
	// empty for broker.ClientCredentials. RedirectURL is the whole URL, because
	// Vantage admits whatever begins with what was registered. ConsentLifetime
	// is counted from the sign-in and never extended; zero means 30 days.
	oauth.ProfileConfig
	// Region of the public cloud: eu, us or au. Required unless BaseURL is set.
	Region string
	// BaseURL of a private cloud, with the path prefix that it may have:
	// what comes before /auth2. Excludes Region.
	BaseURL string
	// TenantID makes the tenant's own token endpoint be used. Optional.
	TenantID string
	// ProductID is the product that a person signs in to; empty means Vantage.
	ProductID string
}

// NewProfile returns the profile that config describes. It makes no
// connection. The error tells every mistake, and what to do about it.
func NewProfile(config Config) (*broker.Profile, error) {
	base, server, err := config.server()
	wire := config.ProfileConfig
	wire.Provider = "vantage"
	wire.TokenURL = server + "/connect/token"
	wire.AuthorizationURL = server + "/connect/authorize"
	wire.RevocationURL = server + "/connect/revocation"
	wire.ExpectedIssuers = []string{base + "/auth2", server}
	wire.ClientAuth = oauth.ClientSecretPost
	wire.GrantType = cmp.Or(config.GrantType, broker.ClientCredentials)
	wire.SignInParameters = url.Values{"productId": {cmp.Or(config.ProductID, productID)}}
	wire.ScopeWithCode = true
	wire.Explain = explain
	wire.ConsentLifetime = 0 // a password brings the next one by itself
	if wire.GrantType == broker.AuthorizationCode {
		wire.ConsentLifetime = cmp.Or(config.ConsentLifetime, consentLifetime)
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
	config.ProfileConfig = wire
	profile.Issuer = newIssuer(profile.Issuer, newAdministration(config, base, client))
	return profile, nil
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
