package config

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// secretLifetime is that of a new client secret about which the file says
// nothing.
const secretLifetime = 180 * 24 * time.Hour

// secretRotation has all but With; nil for nil.
func secretRotation(message *configv1.SecretRotation) *broker.SecretRotation {
	if message == nil {
		return nil
	}
	return &broker.SecretRotation{
		Before:       message.GetBeforeExpiry().AsDuration(),
		Lifetime:     cmp.Or(message.GetLifetime().AsDuration(), secretLifetime),
		AdminProfile: message.GetAdminProfile(),
	}
}

// checkSecretRotation notes what would make every renewal fail, or lose what it
// brings. The profile at path is one of the vantages, which are there by name;
// shared says that there is a store.
func (l *load) checkSecretRotation(path string, message *configv1.Profile, vantages map[string]*configv1.Vantage, shared bool) {
	at, own := child(path, "secret_rotation"), message.GetVantage()
	rotation := secretRotation(message.GetSecretRotation())
	if rotation.Before >= rotation.Lifetime {
		l.problem(child(at, "before_expiry"), fmt.Sprintf("must be shorter than the life of a new secret, which is %s: shorten it, or set a longer lifetime beside it",
			span(durationpb.New(rotation.Lifetime))))
	}
	if own.GetTenantId() == "" {
		l.problem(child(path, "vantage.tenant_id"), "is missing, and secret_rotation needs it: add the tenant whose client this is")
	}
	if name := rotation.AdminProfile; name != "" {
		l.checkAdminProfile(child(at, "admin_profile"), name, own, vantages)
	}
	if !shared {
		l.problem(at, "needs a store, because a new secret would be in memory only and lost with the process: "+
			"add store, or remove secret_rotation and renew the secret with broker secret rotate")
	}
}

func (l *load) checkAdminProfile(at, name string, own *configv1.Vantage, vantages map[string]*configv1.Vantage) {
	admin, found := vantages[name]
	switch {
	case !found:
		message := "no vantage profile has this name: correct it, or remove it"
		if like := closest(name, slices.Sorted(maps.Keys(vantages))); like != "" {
			message += "; did you mean " + like + "?"
		}
		l.problem(at, message)
	case admin.GetRegion() != own.GetRegion() || admin.GetBaseUrl() != own.GetBaseUrl():
		l.problem(at, "that profile has another region or base_url, so its tokens are worth nothing here: name one with the same")
	}
}
