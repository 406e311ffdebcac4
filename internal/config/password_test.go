package config_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/config"
)

// advice is what a profile with the grant password is always warned of.
const advice = "profiles[0].vantage.password: the grant password hands the user's password to this process (RFC 9700 section 2.4): use another grant where you can"

// withPassword is minimal with the grant password and further lines in the
// profile.
func withPassword(t testing.TB, username, password string, lines ...string) string {
	t.Helper()
	text := with(t, minimal, "client_credentials: {}", fmt.Sprintf("password: {username: %s, password: %s}", username, password))
	return with(t, text, "name: p\n", "name: p\n"+strings.Join(append(lines, ""), "\n"))
}

func TestThePasswordProfile(t *testing.T) {
	directory := t.TempDir()
	user := write(t, filepath.Join(directory, "user"), canary+"-user\n")
	password := write(t, filepath.Join(directory, "password"), " "+canary+" \n") // blanks are a password's right
	c := mustParse(t, withPassword(t, "{file: "+user+"}", "{file: "+password+"}",
		"    scopes: [openid, offline_access]", "    timeout: 7s", "    rotation: {grace: 30s}"))
	p := c.Profiles[0]
	if p.GrantType != broker.Password || !p.RefreshTokens || p.Reusable || p.Grace != 30*time.Second || p.Timeout != 7*time.Second {
		t.Errorf("profile is %+v", p)
	}
	want := presented(options.FingerprintKey, broker.NewSecret(canary+"-env"), broker.NewSecret(canary+"-user"), broker.NewSecret(" "+canary+" "))
	if p.Credential != want {
		t.Error("another credential")
	}
	equal(t, warnings(t, c), []string{"10:17: " + advice})
	noCanary(t, fmt.Sprintf("%v %+v %#v", c, c, p))

	if p := mustParse(t, withPassword(t, "{env: SECRET}", "{env: SECRET}")).Profiles[0]; p.RefreshTokens || len(p.Scopes) != 3 {
		t.Errorf("profile is %+v", p)
	}
}

func TestRotation(t *testing.T) {
	const offline = "    scopes: [openid, offline_access]"
	for name, tc := range map[string]struct {
		text     string
		reusable bool
		grace    time.Duration
		warning  string
	}{
		"nothing said": {text: withPassword(t, "{env: SECRET}", "{env: SECRET}", offline)},
		"empty":        {text: withPassword(t, "{env: SECRET}", "{env: SECRET}", offline, "    rotation: {}")},
		"one time":     {text: withPassword(t, "{env: SECRET}", "{env: SECRET}", offline, "    rotation: {one_time: true, grace: 5s}"), grace: 5 * time.Second},
		"reusable":     {text: withPassword(t, "{env: SECRET}", "{env: SECRET}", offline, "    rotation: {one_time: false}"), reusable: true},
		"both": {
			withPassword(t, "{env: SECRET}", "{env: SECRET}", offline, "    rotation: {one_time: false, grace: 5s}"), true, 5 * time.Second,
			"4:40: profiles[0].rotation.grace: has no effect beside one_time: false: remove one of the two",
		},
		"no refresh tokens": {
			withPassword(t, "{env: SECRET}", "{env: SECRET}", "    rotation: {grace: 5s}"), false, 5 * time.Second,
			"3:15: profiles[0].rotation: has no effect, because without offline_access no refresh tokens come: add offline_access to the scopes, or remove rotation",
		},
		"another grant": {
			with(t, minimal, "name: p", "name: p\n    rotation: {grace: 5s}"), false, 5 * time.Second,
			"3:15: profiles[0].rotation: has no effect, because the grant client_credentials brings no refresh tokens: remove rotation",
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := mustParse(t, tc.text)
			if p := c.Profiles[0]; p.Reusable != tc.reusable || p.Grace != tc.grace {
				t.Errorf("profile is %+v", p)
			}
			var got []string
			for _, w := range warnings(t, c) {
				if !strings.Contains(w, advice) {
					got = append(got, w)
				}
			}
			var want []string
			if tc.warning != "" {
				want = []string{tc.warning}
			}
			equal(t, got, want)
		})
	}
}

func TestPasswordMistakes(t *testing.T) {
	directory := t.TempDir()
	write(t, filepath.Join(directory, "empty"), "\n")
	write(t, filepath.Join(directory, "newlines"), canary+"\n\n")
	for text, want := range map[string][]string{
		withPassword(t, "{env: SECRET}", "{file: "+directory+"/empty}"): {
			"7:60: profiles[0].vantage.password.password.file: the secret's file is empty: write the secret into " + directory + "/empty"},
		withPassword(t, "{file: "+directory+"/newlines}", "{env: SECRET}"): {
			"7:28: profiles[0].vantage.password.username: has blanks or line ends around it: remove them where it comes from"},
		withPassword(t, "{env: NOT_SET}", "{env: EMPTY}"): {
			"7:34: profiles[0].vantage.password.username.env: the environment variable NOT_SET is not set: set it where the broker is started",
			"7:60: profiles[0].vantage.password.password.env: the environment variable that is named here is empty: set it where the broker is started"},
		withPassword(t, canary, "["+canary+"]"): {
			"7:28: profiles[0].vantage.password.username: a secret is a reference: write {file: /path/of/file} or {env: NAME_OF_VARIABLE}",
			"7:52: profiles[0].vantage.password.password: a secret is a reference: write {file: /path/of/file} or {env: NAME_OF_VARIABLE}"},
	} {
		equal(t, problems(t, text), want)
	}
}

// User name and password are read again when their files change, as client
// secrets are.
func TestThePasswordIsReadAgain(t *testing.T) {
	directory := t.TempDir()
	user := write(t, filepath.Join(directory, "user"), "u1")
	password := write(t, filepath.Join(directory, "password"), "p1")
	text := withPassword(t, "{file: "+user+"}", "{file: "+password+"}")
	r := startRig(t, write(t, filepath.Join(directory, "broker.yaml"), text), never)
	client := broker.NewSecret(variables["SECRET"])
	for _, step := range []struct{ user, password string }{{"u1", "p2"}, {"u2", "p2"}} {
		for path, content := range map[string]string{user: step.user, password: step.password} {
			rename(t, write(t, path+".new", content), path)
		}
		want := presented(options.FingerprintKey, client, broker.NewSecret(step.user), broker.NewSecret(step.password))
		deadline := time.After(20 * time.Second)
		for *r.credential.Load() != want {
			select {
			case <-r.changes:
			case <-deadline:
				t.Fatalf("%v is not in use", step)
			}
		}
	}
}

// A user's name is in a profile's identity, and cannot be guessed from it.
func TestTheUsersNameIsKeyed(t *testing.T) {
	text := withPassword(t, "{env: SECRET}", "{env: SECRET}")
	other := options
	other.FingerprintKey = []byte("another key")
	c, err := config.Parse("broker.yaml", []byte(text), other)
	if err != nil {
		t.Fatal(err)
	}
	if c.Profiles[0].Identity == mustParse(t, text).Profiles[0].Identity {
		t.Error("without the key the identity is the same")
	}
}
