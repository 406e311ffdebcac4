package config

import (
	"fmt"
	"slices"
	"time"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

func grantOf(p provider) broker.GrantType {
	switch {
	case p.GetPassword() != nil:
		return broker.Password
	case p.GetAuthorizationCode() != nil:
		return broker.AuthorizationCode
	}
	return broker.ClientCredentials
}

// checkGrant warns of what has no effect with the profile's grant and how its
// client proves itself, and of what the grant lacks. The provider is at its path.
func (l *load) checkGrant(path, at string, message *configv1.Profile, p provider) {
	grant := grantOf(p)
	switch at := child(path, "allow_password_grant"); {
	case !message.GetAllowPasswordGrant():
	case message.GetVantage() != nil:
		l.warning(at, "has no effect, because vantage needs no permission for the grant password: remove it")
	case grant != broker.Password:
		l.warning(at, fmt.Sprintf("has no effect, because the grant is %s: remove it", grant))
	}
	idle := func(field, value, owner string, used bool) {
		if value != "" && !used {
			l.warning(child(at, field), fmt.Sprintf("has no effect, because it belongs to %s: remove it", owner))
		}
	}
	v, s, o := message.GetVantage(), message.GetSecureauth(), message.GetOauth2() // one of which is there
	code, key := grant == broker.AuthorizationCode, s.GetClientAuth()+o.GetClientAuth() == string(oauth.PrivateKeyJWT)
	idle("product_id", v.GetProductId(), "authorization_code", code)
	idle("authorization_url", o.GetAuthorizationUrl(), "authorization_code", code)
	idle("key_id", s.GetKeyId()+o.GetKeyId(), "private_key_jwt", key)
	idle("assertion_audience", s.GetAssertionAudience()+o.GetAssertionAudience(), "private_key_jwt", key)
	// Any other server may have its own way to be asked.
	if code && o == nil && len(message.GetScopes()) > 0 && !slices.Contains(message.GetScopes(), offlineAccess) {
		l.warning(child(path, "scopes"), "without offline_access no refresh token will come, so a person must sign in again whenever the access token ends: add offline_access")
	}
}

// consentLifetime is how long a sign-in lasts, as far as the file says it.
func consentLifetime(message *configv1.Profile, p provider) time.Duration {
	if p.GetAuthorizationCode() == nil {
		return 0
	}
	return message.GetRotation().GetLifetime().AsDuration()
}

// reusable reports whether refresh tokens are said to work more than once; not to
// say it is the careful assumption.
func reusable(rotation *configv1.Rotation) bool {
	return rotation != nil && rotation.OneTime != nil && !rotation.GetOneTime()
}

// checkRotation warns of what has no effect.
func (l *load) checkRotation(at string, rotation *configv1.Rotation, profile *broker.Profile) {
	switch {
	case rotation == nil:
		return
	case profile.GrantType == broker.ClientCredentials:
		l.warning(at, fmt.Sprintf("has no effect, because the grant %s brings no refresh tokens: remove rotation", profile.GrantType))
		return
	case !profile.RefreshTokens:
		l.warning(at, "has no effect, because without offline_access no refresh tokens come: add offline_access to the scopes, or remove rotation")
		return
	}
	if reusable(rotation) && rotation.GetGrace().AsDuration() > 0 {
		l.warning(child(at, "grace"), "has no effect beside one_time: false: remove one of the two")
	}
	if rotation.GetLifetime() != nil && profile.GrantType == broker.Password {
		l.warning(child(at, "lifetime"), "has no effect, because with the grant password no person signs in: remove it")
	}
}
