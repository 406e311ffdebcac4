// Package secureauth knows SecureAuth, formerly Cloudentity: where its
// workspaces are, how its clients authenticate, and what its refusals mean.
//
// The wire is package oauth's. What is SecureAuth's own: the endpoints come from
// the workspace's metadata, because there are too many shapes of its hosts to
// guess them; a request without scopes brings all that the client may have, so
// there is none; and a few failed authentications block the client, so that every
// 401 rests until somebody has looked at it.
package secureauth

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// Config describes a profile that obtains its tokens from SecureAuth.
type Config struct {
	// Name of the profile. Required.
	Name string
	// Issuer is the workspace's. Required unless TenantID and WorkspaceID are
	// set.
	Issuer string
	// TenantID, Region and WorkspaceID make the issuer of a workspace at
	// authz.cloudentity.io. Region is empty for older tenants.
	TenantID, Region, WorkspaceID string
	// AllowInsecureHTTP admits http:// URLs of hosts other than loopback ones.
	AllowInsecureHTTP bool
	// ClientID as registered. Required.
	ClientID string
	// ClientAuth is what the client is registered with; empty means
	// client_secret_post.
	ClientAuth oauth.ClientAuth
	// ClientSecrets, newest first, for the methods with a secret.
	ClientSecrets []broker.Secret
	// PrivateKey, Certificate, KeyID and AssertionAudience are those of
	// oauth.ProfileConfig.
	PrivateKey               broker.Secret
	Certificate              []byte
	KeyID, AssertionAudience string
	// Audience to ask for. Optional.
	Audience string
	// GrantType is broker.ClientCredentials, also for empty, broker.Password
	// or broker.AuthorizationCode.
	GrantType broker.GrantType
	// Username and Password of whom the client acts for. Required with the
	// grant password.
	Username, Password broker.Secret
	// RedirectURL is where the browser comes back to. Required with the grant
	// authorization_code.
	RedirectURL string
	// Scopes that a caller gets when it names none. Required.
	Scopes []string
	// The rest is oauth.ProfileConfig's.
	Timeout         time.Duration
	Grace           time.Duration
	Reusable        bool
	ConsentLifetime time.Duration
	DefaultLifetime time.Duration
	MaxTokenAge     time.Duration
	RejectedRetry   time.Duration
	ConsoleURL      string
	FingerprintKey  []byte
	UserAgent       string
	Transport       *oauth.Transport
}

// NewProfile returns the profile that config describes. It makes no
// connection. The error tells every mistake, and what to do about it.
func NewProfile(config Config) (*broker.Profile, error) {
	issuer, err := config.issuer()
	if len(config.Scopes) == 0 {
		err = errors.Join(err, errors.New("scopes is empty: name them, because without any SecureAuth grants all that the client may have"))
	}
	profile, profileErr := oauth.NewProfile(oauth.ProfileConfig{
		Name:              config.Name,
		Provider:          "secureauth",
		Issuer:            issuer,
		AllowInsecureHTTP: config.AllowInsecureHTTP,
		ClientID:          config.ClientID,
		ClientAuth:        cmp.Or(config.ClientAuth, oauth.ClientSecretPost),
		ClientSecrets:     config.ClientSecrets,
		PrivateKey:        config.PrivateKey,
		Certificate:       config.Certificate,
		KeyID:             config.KeyID,
		AssertionAudience: config.AssertionAudience,
		GrantType:         cmp.Or(config.GrantType, broker.ClientCredentials),
		Username:          config.Username,
		Password:          config.Password,
		RedirectURL:       config.RedirectURL,
		Scopes:            config.Scopes,
		Audience:          config.Audience,
		ScopeWithRefresh:  true,
		// SecureAuth declares 401 for clients that it refuses, also with a
		// body of its own that has no OAuth code. To take such an answer for a
		// gateway's would repeat the attempt until the client is blocked.
		UnauthorizedRefuses: true,
		Explain:             explain,
		Timeout:             config.Timeout,
		Grace:               config.Grace,
		Reusable:            config.Reusable,
		ConsentLifetime:     config.ConsentLifetime,
		DefaultLifetime:     config.DefaultLifetime,
		MaxTokenAge:         config.MaxTokenAge,
		RejectedRetry:       config.RejectedRetry,
		ConsoleURL:          config.ConsoleURL,
		FingerprintKey:      config.FingerprintKey,
		UserAgent:           config.UserAgent,
		Transport:           config.Transport,
	})
	if err = errors.Join(err, profileErr); err != nil {
		return nil, err
	}
	return profile, nil
}

// label is what can stand in a host name, segment what stays one in a path.
var (
	label   = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$`)
	segment = regexp.MustCompile(`^[A-Za-z0-9_~-][A-Za-z0-9._~-]*$`)
)

// issuer is the workspace's. It is one that can be parsed even when there are
// mistakes.
func (c Config) issuer() (string, error) {
	const placeholder = "https://secureauth.invalid"
	region := ""
	if c.Region != "" {
		region = "." + c.Region
	}
	switch {
	case c.Issuer != "" && c.TenantID+c.Region+c.WorkspaceID != "":
		return placeholder, errors.New("issuer excludes tenant_id, region and workspace_id: keep the issuer, or those")
	case c.Issuer != "":
		return c.Issuer, nil
	case c.TenantID == "" || c.WorkspaceID == "":
		return placeholder, errors.New("issuer is missing: set it, or tenant_id and workspace_id (and region where the tenant's address has one)")
	case !label.MatchString(c.TenantID):
		return placeholder, errors.New("tenant_id cannot stand in a host name: copy it from the tenant's address")
	case region != "" && !label.MatchString(c.Region):
		return placeholder, errors.New("region cannot stand in a host name: use us, eu or au")
	case !segment.MatchString(c.WorkspaceID):
		return placeholder, errors.New("workspace_id has slashes or blanks: copy it from the workspace's address")
	}
	return fmt.Sprintf("https://%s%s.authz.cloudentity.io/%s/%s", c.TenantID, region, c.TenantID, c.WorkspaceID), nil
}

// explain says what a refusal means at SecureAuth.
func explain(e *broker.IssueError) string {
	switch e.Kind {
	case broker.ClientRejected:
		return "; SecureAuth says so of an unknown client, a wrong or rotated secret, a key or certificate that is not the client's, " +
			"an authentication method other than the registered one, and of a client that is blocked for some minutes after a few failures: " +
			"compare client_id, client_auth and the credentials with the client's settings in the workspace before the next attempt"
	case broker.RequestRejected:
		return "; in SecureAuth check the client's grant types, the scopes that it has subscribed to, and the policies of those scopes; " +
			"scopes that the profile has got since a person signed in take another sign-in"
	}
	return ""
}
