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

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// Config describes a profile that obtains its tokens from SecureAuth.
type Config struct {
	// ProfileConfig without what SecureAuth decides: the provider, the endpoints
	// and what a refusal means. Issuer is the workspace's, required unless
	// TenantID and WorkspaceID are set. Scopes are required. ClientAuth may be
	// empty for client_secret_post, GrantType for broker.ClientCredentials.
	oauth.ProfileConfig
	// TenantID, Region and WorkspaceID make the issuer of a workspace at
	// authz.cloudentity.io. Region is empty for older tenants.
	TenantID, Region, WorkspaceID string
}

// NewProfile returns the profile that config describes. It makes no
// connection. The error tells every mistake, and what to do about it.
func NewProfile(config Config) (*broker.Profile, error) {
	issuer, err := config.issuer()
	if len(config.Scopes) == 0 {
		err = errors.Join(err, errors.New("scopes is empty: name them, because without any SecureAuth grants all that the client may have"))
	}
	wire := config.ProfileConfig
	wire.Provider = "secureauth"
	wire.Issuer = issuer
	wire.ClientAuth = cmp.Or(config.ClientAuth, oauth.ClientSecretPost)
	wire.GrantType = cmp.Or(config.GrantType, broker.ClientCredentials)
	// SecureAuth declares 401 for clients that it refuses, also with a body of
	// its own that has no OAuth code. To take such an answer for a gateway's
	// would repeat the attempt until the client is blocked.
	wire.UnauthorizedRefuses = true
	wire.Explain = explain
	profile, profileErr := oauth.NewProfile(wire)
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
		return "; in SecureAuth check the client's grant types, the scopes that it has subscribed to, and the policies of those scopes"
	}
	return ""
}
