package oauth

import (
	"errors"
	"net/url"
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
	// nothing is to be discovered. Exclude Issuer.
	TokenURL, AuthorizationURL, RevocationURL string
	// AllowInsecureHTTP admits http:// URLs of hosts other than loopback ones.
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

	// The rest is the broker.Profile's.
	Timeout         time.Duration
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
// The error tells every mistake, each beginning with the name of its field in
// the configuration file.
func NewProfile(config ProfileConfig) (*broker.Profile, error) {
	return nil, errors.New("not built yet")
}
