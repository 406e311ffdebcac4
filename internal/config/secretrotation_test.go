package config_test

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/config"
)

// rotating is a configuration whose first profile renews its client secret, with
// an administrator beside it.
func rotating(t testing.TB, rotation string) string {
	_, store, _ := strings.Cut(storeText(t, t.TempDir(), "addresses: ['localhost:6379']"), "store:")
	return fmt.Sprintf(`profiles:
  - name: p
    coordinated: true
    secret_rotation: {%s}
    vantage: {region: eu, tenant_id: t, client_id: c, client_secret: {env: SECRET}, client_credentials: {}}
  - name: administrator
    vantage: {region: eu, client_id: a, client_secret: {env: SECRET}, client_credentials: {}}
  - name: abroad
    vantage: {region: us, client_id: a, client_secret: {env: SECRET}, client_credentials: {}}
  - name: elsewhere
    oauth2: {issuer: 'https://id.example.com', client_id: c, client_secret: {env: SECRET}, client_credentials: {}}
store:%s`, rotation, store)
}

func TestSecretRotation(t *testing.T) {
	c := mustParse(t, rotating(t, "before_expiry: 30d, lifetime: 90d, admin_profile: administrator"))
	equal(t, warnings(t, c), nil)
	p := c.Profiles[0]
	if r := p.Rotation; r == nil || r.Before != 30*24*time.Hour || r.Lifetime != 90*24*time.Hour || r.AdminProfile != "administrator" {
		t.Fatalf("got %+v", r)
	}
	if c.Profiles[1].Rotation != nil {
		t.Error("a profile without secret_rotation has one")
	}
	if r := mustParse(t, rotating(t, "before_expiry: 30d")).Profiles[0].Rotation; r.Lifetime != 180*24*time.Hour || r.AdminProfile != "" {
		t.Errorf("got %+v", r)
	}

	// With newer secrets the profile is the same but for what it presents.
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			newer := broker.NewSecret(fmt.Sprint(canary, "-new", i))
			next, err := p.Rotation.With([]broker.Secret{newer})
			if err != nil {
				t.Error(err)
				return
			}
			if next.Credential != presented(c.Store.Access.Keyset.FingerprintKey(), newer, broker.NewSecret(variables["SECRET"])) {
				t.Error("it presents something else")
			}
			if next.Name != p.Name || next.Identity != p.Identity || !next.Coordinated || next.ConsoleURL != p.ConsoleURL || next.Rotation != p.Rotation {
				t.Errorf("got %+v, want %+v", next, p)
			}
		})
	}
	all.Wait()
	if same, err := p.Rotation.With(nil); err != nil || same.Credential != p.Credential {
		t.Errorf("without newer secrets it is another, %v", err)
	}
	if _, err := p.Rotation.With([]broker.Secret{broker.NewSecret(" " + canary)}); err == nil {
		t.Error("a secret that cannot be is accepted")
	} else {
		noCanary(t, err.Error())
	}
}

func TestSecretRotationMistakes(t *testing.T) {
	const at = "profiles[0].secret_rotation"
	const unknown = at + ".admin_profile: no vantage profile has this name: correct it, or remove it"
	for rotation, want := range map[string]string{
		"":                                    at + ".before_expiry: is missing: add it",
		"before_expiry: 180d":                 at + ".before_expiry: must be shorter than the life of a new secret, which is 180d: shorten it, or set a longer lifetime beside it",
		"before_expiry: 30d, lifetime: 30d":   at + ".before_expiry: must be shorter than the life of a new secret, which is 30d: shorten it, or set a longer lifetime beside it",
		"before_expiry: 200d, lifetime: 366d": "",
		"before_expiry: 30d, lifetime: 1h":    at + ".lifetime: must be 24h to 1096d",
		"before_expiry: 30d, admin_profile: administrater": unknown + "; did you mean administrator?",
		"before_expiry: 30d, admin_profile: elsewhere":     unknown,
		"before_expiry: 30d, admin_profile: abroad":        at + ".admin_profile: that profile has another region or base_url, so its tokens are worth nothing here: name one with the same",
		"before_expiry: 30d, admin_profile: p":             "",
	} {
		got := problems(t, rotating(t, rotation))
		for i := range got {
			_, got[i], _ = strings.Cut(got[i], ": ")
		}
		if want == "" && got != nil || want != "" && !slices.Equal(got, []string{want}) {
			t.Errorf("%s: got %q", rotation, got)
		}
	}
	equal(t, problems(t, with(t, rotating(t, "before_expiry: 30d"), "tenant_id: t, ", "")), []string{
		"5:14: profiles[0].vantage.tenant_id: is missing, and secret_rotation needs it: add the tenant whose client this is"})
	elsewhere := with(t, rotating(t, "before_expiry: 30d"), "  - name: elsewhere\n", "  - name: elsewhere\n    secret_rotation: {before_expiry: 30d}\n")
	equal(t, problems(t, elsewhere), []string{"11:22: profiles[3].secret_rotation: secret_rotation works with vantage only: remove it"})
}

// What is renewed must not be lost with the process.
func TestSecretRotationNeedsAStore(t *testing.T) {
	text, _, _ := strings.Cut(rotating(t, "before_expiry: 30d"), "store:")
	equal(t, problems(t, text), []string{"4:22: profiles[0].secret_rotation: needs a store, because a new secret would be in memory only and lost with the process: " +
		"add store, or remove secret_rotation and renew the secret with broker secret rotate"})
}

// Where the newest client secret is known to be, it can be replaced.
func TestSecretFile(t *testing.T) {
	directory := t.TempDir()
	path := write(t, filepath.Join(directory, "secret"), canary)
	write(t, filepath.Join(directory, "old"), canary+"-old")
	for secrets, want := range map[string]string{
		"client_secret: {env: SECRET}":                                          "",
		"client_secret: {value: " + canary + "}":                                "",
		"client_secret: {file: " + path + "}":                                   path,
		"client_secrets: [{file: " + path + "}, {env: SECRET}]":                 path,
		"client_secrets: [{file: " + path + "}, {file: " + directory + "/old}]": path,
		"client_secrets: [{env: SECRET}, {file: " + directory + "/old}]":        "",
	} {
		if got := mustParse(t, with(t, minimal, "client_secret: {env: SECRET}", secrets)).Profiles[0].SecretFile; got != want {
			t.Errorf("%s: got %q, want %q", secrets, got, want)
		}
	}
	relative := write(t, filepath.Join(directory, "broker.yaml"), with(t, minimal, "{env: SECRET}", "{file: secret}"))
	c, err := config.Load(relative, options)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.Profiles[0].SecretFile; got != path {
		t.Errorf("got %q, want %q", got, path)
	}
}
