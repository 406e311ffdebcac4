package config

import (
	"fmt"
	"strings"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/vantage"
)

// vantageScopes are what a Vantage profile without scopes asks for.
var vantageScopes = []string{"openid", "permissions", "global.wildcard"}

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
func (l *load) profiles(messages []*configv1.Profile) []*broker.Profile {
	profiles := make([]*broker.Profile, 0, len(messages))
	for i, message := range messages {
		path := item("profiles", i)
		if l.tainted[path] {
			continue
		}
		profile, err := l.vantage(message)
		if err != nil {
			l.problemsOf(child(path, "vantage"), err)
			continue
		}
		profile.Coordinated = message.GetCoordinated()
		l.checkRotation(child(path, "rotation"), message.GetRotation(), profile)
		profiles = append(profiles, profile)
	}
	return profiles
}

func (l *load) vantage(message *configv1.Profile) (*broker.Profile, error) {
	v := message.GetVantage()
	scopes := message.GetScopes()
	if len(scopes) == 0 {
		scopes = vantageScopes
	}
	grantType := broker.ClientCredentials
	if v.GetPassword() != nil {
		grantType = broker.Password
	}
	return vantage.NewProfile(vantage.Config{
		Name:              message.GetName(),
		Region:            v.GetRegion(),
		BaseURL:           v.GetBaseUrl(),
		TenantID:          v.GetTenantId(),
		ClientID:          v.GetClientId(),
		ClientSecrets:     l.clientSecrets(v.GetClientSecret(), v.GetClientSecrets()),
		GrantType:         grantType,
		Username:          l.secrets[v.GetPassword().GetUsername()],
		Password:          l.secrets[v.GetPassword().GetPassword()],
		Scopes:            scopes,
		Timeout:           message.GetTimeout().AsDuration(),
		Grace:             message.GetRotation().GetGrace().AsDuration(),
		Reusable:          reusable(message.GetRotation()),
		DefaultLifetime:   message.GetDefaultLifetime().AsDuration(),
		MaxTokenAge:       message.GetMaxTokenAge().AsDuration(),
		RejectedRetry:     message.GetRejectedRetry().AsDuration(),
		AllowInsecureHTTP: v.GetAllowInsecureHttp(),
		FingerprintKey:    l.options.FingerprintKey,
		UserAgent:         l.options.UserAgent,
		Transport:         l.options.Transport,
	})
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
	case profile.RefreshTokens && reusable(rotation) && rotation.GetGrace().AsDuration() > 0:
		l.warning(child(at, "grace"), "has no effect beside one_time: false: remove one of the two")
	case profile.RefreshTokens:
	case profile.GrantType == broker.Password:
		l.warning(at, "has no effect, because without offline_access no refresh tokens come: add offline_access to the scopes, or remove rotation")
	default:
		l.warning(at, fmt.Sprintf("has no effect, because the grant %s brings no refresh tokens: remove rotation", profile.GrantType))
	}
}

// clientSecrets are one or several, newest first; the schema sees to it that
// only one of the fields is set.
func (l *load) clientSecrets(one *configv1.Secret, several []*configv1.Secret) []broker.Secret {
	if one != nil {
		several = []*configv1.Secret{one}
	}
	var secrets []broker.Secret
	for _, reference := range several {
		secrets = append(secrets, l.secrets[reference])
	}
	return secrets
}

// problemsOf notes each of the errors that were joined. A provider's messages
// name their field at the beginning.
func (l *load) problemsOf(path string, err error) {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			l.problemsOf(path, e)
		}
		return
	}
	message := err.Error()
	if field, rest, _ := strings.Cut(message, " "); l.places[child(path, field)] != (position{}) {
		path, message = child(path, field), rest
	}
	l.problem(path, message)
}
