package config

import (
	"cmp"
	"fmt"
	"net/url"
	"slices"
	"strings"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
	"github.com/tokenbroker/tokenbroker/internal/secureauth"
	"github.com/tokenbroker/tokenbroker/internal/vantage"
)

// offlineAccess is the scope that brings refresh tokens.
const offlineAccess = "offline_access"

// checkNames notes profiles that have the name of an earlier one.
func (l *load) checkNames(profiles []*configv1.Profile) {
	first := map[string]int{}
	for i, profile := range profiles {
		path := child(item("profiles", i), "name")
		if profile.GetName() == "" || l.tainted[path] {
			continue
		}
		if j, taken := first[profile.GetName()]; taken {
			l.problem(path, fmt.Sprintf("profiles[%d] has the name %s already: names must be unique", j, profile.GetName()))
			continue
		}
		first[profile.GetName()] = i
	}
}

// profiles builds those in which no problem was found.
func (l *load) profiles(message *configv1.Config, admin Admin) []*broker.Profile {
	profiles := make([]*broker.Profile, 0, len(message.GetProfiles()))
	vantages := map[string]*configv1.Vantage{}
	for _, m := range message.GetProfiles() {
		if m.GetVantage() != nil {
			vantages[m.GetName()] = m.GetVantage()
		}
	}
	seen := callbacks{}
	for i, m := range message.GetProfiles() {
		path := item("profiles", i)
		if l.tainted[path] {
			continue
		}
		name, p := providerOf(m)
		at := child(path, name)
		l.checkGrant(path, at, m, p)
		l.checkRedirect(at, p)
		if m.GetSecretRotation() != nil {
			l.checkSecretRotation(path, m, vantages, message.GetStore() != nil)
		}
		profile, err := l.maker(at, m, p, admin)(l.clientSecrets(p))
		if err != nil {
			l.problemsOf(at, err)
			continue
		}
		l.checkSharing(at, m, profile, seen)
		l.checkRotation(child(path, "rotation"), m.GetRotation(), profile)
		profiles = append(profiles, profile)
	}
	return profiles
}

// provider is what the messages of all providers have.
type provider interface {
	GetAllowInsecureHttp() bool
	GetClientId() string
	GetClientSecret() *configv1.Secret
	GetClientSecrets() []*configv1.Secret
	GetPassword() *configv1.Password
	GetAuthorizationCode() *configv1.AuthorizationCode
}

// providerOf returns the field of the message that names the server.
func providerOf(message *configv1.Profile) (field string, p provider) {
	switch one := message.GetProvider().(type) {
	case *configv1.Profile_Secureauth:
		return "secureauth", one.Secureauth
	case *configv1.Profile_Oauth2:
		return "oauth2", one.Oauth2
	}
	return "vantage", message.GetVantage()
}

// maker makes a profile with these client secrets, newest first. It may be used
// when the load is over, by several goroutines.
type maker func(secrets []broker.Secret) (*broker.Profile, error)

// maker returns that of the profile whose provider is at a path.
func (l *load) maker(at string, message *configv1.Profile, p provider, admin Admin) maker {
	var bare maker
	switch {
	case message.GetSecureauth() != nil:
		bare = l.secureauth(at, message)
	case message.GetOauth2() != nil:
		bare = l.oauth2(at, message)
	default:
		bare = l.vantage(message)
	}
	coordinated, file := message.GetCoordinated(), l.secretPath(p)
	console := consoleURL(admin, p.GetAuthorizationCode().GetRedirectUrl(), message.GetName())
	rotation, dedicated := secretRotation(message.GetSecretRotation()), int(message.GetMaxDedicatedTokens())
	whole := func(secrets []broker.Secret) (*broker.Profile, error) {
		profile, err := bare(secrets)
		if err != nil {
			return nil, err
		}
		profile.Coordinated, profile.SecretFile, profile.ConsoleURL, profile.Rotation = coordinated, file, console, rotation
		profile.MaxDedicated = dedicated
		return profile, nil
	}
	if rotation != nil {
		own := l.clientSecrets(p)
		rotation.With = func(newer []broker.Secret) (*broker.Profile, error) { return whole(slices.Concat(newer, own)) }
	}
	return whole
}

func (l *load) vantage(message *configv1.Profile) maker {
	v := message.GetVantage()
	c := vantage.Config{
		ProfileConfig: l.common(message, v),
		Region:        v.GetRegion(),
		BaseURL:       v.GetBaseUrl(),
		TenantID:      v.GetTenantId(),
		ProductID:     v.GetProductId(),
	}
	c.Scopes = vantageScopes(message)
	return func(secrets []broker.Secret) (*broker.Profile, error) {
		c := c
		c.ClientSecrets = secrets
		return vantage.NewProfile(c)
	}
}

func (l *load) secureauth(at string, message *configv1.Profile) maker {
	s := message.GetSecureauth()
	c := secureauth.Config{
		ProfileConfig: l.common(message, s),
		TenantID:      s.GetTenantId(),
		Region:        s.GetRegion(),
		WorkspaceID:   s.GetWorkspaceId(),
	}
	c.Issuer = s.GetIssuer()
	l.clientAuth(&c.ProfileConfig, at, s)
	return func(secrets []broker.Secret) (*broker.Profile, error) {
		c := c
		c.ClientSecrets = secrets
		return secureauth.NewProfile(c)
	}
}

func (l *load) oauth2(at string, message *configv1.Profile) maker {
	o := message.GetOauth2()
	c := l.common(message, o)
	c.Provider = "oauth2"
	c.Issuer = o.GetIssuer()
	c.TokenURL, c.AuthorizationURL, c.RevocationURL = o.GetTokenUrl(), o.GetAuthorizationUrl(), o.GetRevocationUrl()
	l.clientAuth(&c, at, o)
	c.ClientAuth = cmp.Or(c.ClientAuth, oauth.ClientSecretBasic)
	c.Resource, c.Extra = o.GetResource(), o.GetExtraParameters()
	c.SignInParameters = consentParameters(message.GetScopes())
	return func(secrets []broker.Secret) (*broker.Profile, error) {
		c := c
		c.ClientSecrets = secrets
		return oauth.NewProfile(c)
	}
}

// common is what profiles of all providers have.
func (l *load) common(message *configv1.Profile, p provider) oauth.ProfileConfig {
	return oauth.ProfileConfig{
		Name:              message.GetName(),
		AllowInsecureHTTP: p.GetAllowInsecureHttp(),
		ClientID:          p.GetClientId(),
		GrantType:         grantOf(p),
		Username:          l.secrets[p.GetPassword().GetUsername()],
		Password:          l.secrets[p.GetPassword().GetPassword()],
		RedirectURL:       p.GetAuthorizationCode().GetRedirectUrl(),
		Scopes:            message.GetScopes(),
		Timeout:           message.GetTimeout().AsDuration(),
		Grace:             message.GetRotation().GetGrace().AsDuration(),
		Reusable:          reusable(message.GetRotation()),
		ConsentLifetime:   consentLifetime(message, p),
		DefaultLifetime:   message.GetDefaultLifetime().AsDuration(),
		MaxTokenAge:       message.GetMaxTokenAge().AsDuration(),
		RejectedRetry:     message.GetRejectedRetry().AsDuration(),
		FingerprintKey:    l.options.FingerprintKey,
		UserAgent:         l.options.UserAgent,
		Transport:         l.options.Transport,
	}
}

// authenticating is what the messages of providers have whose clients prove
// themselves in several ways.
type authenticating interface {
	GetClientAuth() string
	GetPrivateKey() *configv1.Secret
	GetCertificate() string
	GetKeyId() string
	GetAssertionAudience() string
	GetAudience() string
}

// clientAuth fills in how the client proves itself, and to whom its tokens go.
func (l *load) clientAuth(c *oauth.ProfileConfig, at string, p authenticating) {
	c.ClientAuth = oauth.ClientAuth(p.GetClientAuth())
	c.PrivateKey = l.secrets[p.GetPrivateKey()]
	c.Certificate = l.chain(child(at, "certificate"), p.GetCertificate())
	c.KeyID = p.GetKeyId()
	c.AssertionAudience = p.GetAssertionAudience()
	c.Audience = p.GetAudience()
}

// consentParameters ask for the person's consent where an OpenID provider ignores
// offline_access without (OpenID Connect Core section 11).
func consentParameters(scopes []string) url.Values {
	if slices.Contains(scopes, "openid") && slices.Contains(scopes, offlineAccess) {
		return url.Values{"prompt": {"consent"}}
	}
	return nil
}

func vantageScopes(message *configv1.Profile) []string {
	if len(message.GetScopes()) > 0 {
		return message.GetScopes()
	}
	scopes := []string{"openid", "permissions", "global.wildcard"}
	if message.GetVantage().GetAuthorizationCode() != nil {
		scopes = append(scopes, offlineAccess)
	}
	return scopes
}

// clientSecrets are one or several, newest first; the schema sees to it that
// only one of the fields is set.
func (l *load) clientSecrets(p provider) []broker.Secret {
	var secrets []broker.Secret
	for _, reference := range references(p) {
		secrets = append(secrets, l.secrets[reference])
	}
	return secrets
}

// secretPath is the file of the newest client secret; empty if it is none.
func (l *load) secretPath(p provider) string {
	if all := references(p); len(all) > 0 && all[0].GetFile() != "" {
		return l.absolute(all[0].GetFile())
	}
	return ""
}

func references(p provider) []*configv1.Secret {
	if p.GetClientSecret() != nil {
		return []*configv1.Secret{p.GetClientSecret()}
	}
	return p.GetClientSecrets()
}

// problemsOf notes each of the errors that were joined. A provider's messages
// name their field at the beginning. What was told of the field already is
// enough.
func (l *load) problemsOf(path string, err error) {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			l.problemsOf(path, e)
		}
		return
	}
	message := err.Error()
	field, rest, _ := strings.Cut(message, " ")
	if l.tainted[child(path, field)] {
		return
	}
	if l.places[child(path, field)] != (position{}) {
		path, message = child(path, field), rest
	}
	l.problem(path, message)
}
