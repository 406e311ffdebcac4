package broker

import (
	"cmp"
	"slices"
	"strings"
	"time"
)

// GrantType is how a profile obtains its tokens, in RFC 6749's words.
type GrantType string

// The grant types of RFC 6749 that profiles use.
const (
	ClientCredentials GrantType = "client_credentials"
	Password          GrantType = "password"
	AuthorizationCode GrantType = "authorization_code"
)

// Profile is a named set of credentials for one authorization server. It is
// immutable: a changed configuration brings new ones.
type Profile struct {
	// Name is unique among the profiles.
	Name string
	// Provider is "vantage", "secureauth" or "oauth2".
	Provider string
	// GrantType of the profile.
	GrantType GrantType
	// Scopes that a caller gets when it names none, and may narrow.
	Scopes []string
	// Identity is the digest of everything but the scopes that changes what
	// would be issued (endpoint, tenant, client, grant, user, extra
	// parameters) and of nothing else: two profiles with the same identity
	// share tokens. See Identity.
	Identity string
	// ConsentIdentity is the digest of whose consent a refresh token is (issuer,
	// client, user), which an edit of what is asked for leaves as it is; empty
	// means Identity.
	ConsentIdentity string
	// Credential is the keyed digest of the secrets that Issuer presents; a
	// remembered refusal ends when it changes. See Fingerprint.
	Credential string
	// UserCredential is the same of what the resource owner is known by alone,
	// for the grant password; empty otherwise. A refused password stays refused
	// whatever becomes of the client's secret.
	UserCredential string
	// Issuer obtains the grants.
	Issuer Issuer
	// RefreshTokens says that grants of this profile come with refresh tokens,
	// which are spent instead of what Issuer presents otherwise.
	RefreshTokens bool
	// Reusable says that the server's refresh tokens can be used many times.
	Reusable bool
	// Grace is for how long after its use the server accepts a refresh token
	// once more.
	Grace time.Duration
	// ConsentLifetime is how long refresh tokens live at most, counted from the
	// sign-in and never extended; zero means that nobody knows.
	ConsentLifetime time.Duration
	// ConsoleURL is the page where a person signs in for the profile, for
	// messages to people; empty if there is none.
	ConsoleURL string
	// Rotation renews the client's secret before it ends; nil leaves it alone.
	Rotation *SecretRotation
	// SecretFile is the absolute path of the file that the newest client secret
	// is read from; empty if it is none.
	SecretFile string
	// Timeout of one token request; zero means 10 seconds.
	Timeout time.Duration
	// Coordinated forbids token requests while the store is out of reach, also
	// for a grant that can be repeated.
	Coordinated bool
	// DefaultLifetime is assumed when the server states none; zero means
	// one hour.
	DefaultLifetime time.Duration
	// MaxTokenAge is the age at which a token is renewed however long it
	// still lives; zero means 24 hours.
	MaxTokenAge time.Duration
	// RejectedRetry is how long refused client credentials rest before they
	// are tried once more unchanged; zero means 30 minutes.
	RejectedRetry time.Duration
	// MaxDedicated is how many dedicated tokens of the profile live on a replica at
	// a time; zero means 10,000. With refresh tokens it is 1,000 at the most.
	MaxDedicated int
	// Endpoint is the token endpoint's URL, for messages to people.
	Endpoint string
}

const (
	defaultLifetime      = time.Hour
	defaultMaxTokenAge   = 24 * time.Hour
	defaultRejectedRetry = 30 * time.Minute
	defaultTimeout       = 10 * time.Second
)

func (p *Profile) lifetime(stated time.Duration) time.Duration {
	if stated > 0 {
		return stated
	}
	return orDefault(p.DefaultLifetime, defaultLifetime)
}

func (p *Profile) maxTokenAge() time.Duration {
	return orDefault(p.MaxTokenAge, defaultMaxTokenAge)
}

func (p *Profile) rejectedRetry() time.Duration {
	return orDefault(p.RejectedRetry, defaultRejectedRetry)
}

func orDefault(d, standard time.Duration) time.Duration {
	if d > 0 {
		return d
	}
	return standard
}

func (p *Profile) timeout() time.Duration { return orDefault(p.Timeout, defaultTimeout) }

// family names what must have a single writer, and the place in it of a token
// for these scopes. For a grant that can be repeated that is one identity with
// one set of scopes. A refresh token must have one record only, so all that
// is asked for under it shares one family.
func (p *Profile) family(scopes []string) (family, slot string) {
	if p.RefreshTokens {
		consent := cmp.Or(p.ConsentIdentity, p.Identity)
		return Identity(consent, p.Name, "consent"), Identity(append([]string{p.Identity}, scopes...)...)
	}
	return Identity(append([]string{p.Identity}, scopes...)...), ""
}

// client names the record of what is known of the profile's client under its
// present credential, for all families.
func (p *Profile) client() string {
	return Identity(p.Identity, cmp.Or(p.UserCredential, p.Credential), "client")
}

// credentials are all whose refusal binds the profile, whatever it asks for.
func (p *Profile) credentials() []string {
	if p.UserCredential == "" {
		return []string{p.Credential}
	}
	return []string{p.Credential, p.UserCredential}
}

// request names what is asked for in a slot. That the server refuses it binds
// nobody who asks for something else.
func (p *Profile) request(slot string) string { return Identity(p.Credential, slot, "request") }

// consentUse is what a flight for the profile does with refresh tokens.
func (p *Profile) consentUse() ConsentUse {
	switch {
	case p.GrantType == AuthorizationCode:
		return ConsentRequired
	case p.RefreshTokens:
		return ConsentPreferred
	}
	return NoConsent
}

// repeatable reports whether asking the server once too often harms nothing.
func (p *Profile) repeatable() bool { return p.GrantType == ClientCredentials && !p.RefreshTokens }

// canonical sorts scopes and drops repetitions: their order means nothing
// (RFC 6749 section 3.3).
func canonical(scopes []string) []string {
	c := slices.Clone(scopes)
	slices.Sort(c)
	return slices.Compact(c)
}

// without returns those of some that are not among taken.
func without(some, taken []string) (left []string) {
	for _, s := range some {
		if !slices.Contains(taken, s) {
			left = append(left, s)
		}
	}
	return left
}

func scopeKey(scopes []string) string { return strings.Join(scopes, " ") }
