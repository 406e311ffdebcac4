package main

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/testredis"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// newAdministered is a stage whose stand-in has a client "rotated", whose tokens
// are short, beside the administrator's.
func newAdministered(t *testing.T) *stage {
	t.Helper()
	s := newStage(t)
	scopes := []string{"openid", "permissions", "global.wildcard"}
	v, err := sandbox.New(sandbox.Options{Clients: []sandbox.Client{
		{ID: "invoices", GrantTypes: []string{"client_credentials"}},
		{ID: "rotated", GrantTypes: []string{"client_credentials"}, AccessTokenLifetime: 12 * time.Second},
		{ID: "admin", GrantTypes: []string{"client_credentials"}, Scopes: append(scopes, "publicapi.all"), TenantAdministrator: true},
	}})
	if err != nil {
		t.Fatal(err)
	}
	web := httptest.NewServer(v)
	t.Cleanup(func() {
		v.Close()
		web.Close()
	})
	s.vantage, s.url = v, web.URL
	for file, client := range map[string]string{"secret": "invoices", "rotated": "rotated", "admin": "admin"} {
		s.write(file, v.ClientSecret(client))
	}
	return s
}

// administered is a config with the profiles rotated and tenant-admin.
func (s *stage) administered(rotation string, more ...string) string {
	lines := []string{
		"  - name: tenant-admin",
		"    vantage: {base_url: \"" + s.url + "\", tenant_id: " + sandbox.DemoTenant + ", client_id: admin, client_secret: {file: admin}, client_credentials: {}}",
		"  - name: rotated",
	}
	if rotation != "" {
		lines = append(lines, "    secret_rotation: "+rotation)
	}
	lines = append(lines, "    vantage: {base_url: \""+s.url+"\", tenant_id: "+sandbox.DemoTenant+", client_id: rotated, client_secret: {file: rotated}, client_credentials: {}}")
	return s.config(append(lines, more...)...)
}

// TestRotationUnderLoadSurvivesKill9 kills the replica that rotates, in the
// middle. Calls to the others never fail, and they see it through.
func TestRotationUnderLoadSurvivesKill9(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]sandbox.Fault{
		// The secret exists then, and nobody knows it.
		"creating": {Path: "/api/adminapi2", Process: true, Cut: sandbox.CutBefore},
		"proving":  {Path: "/auth2/" + sandbox.DemoTenant, Client: "rotated", Delay: 200 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newAdministered(t)
			redis := testredis.Start(t, testredis.Options{})
			s.shared(redis.Address()) // for its keyset
			config := s.administered("{before_expiry: 30d, admin_profile: tenant-admin}",
				"store:", "  redis: {addresses: ["+redis.Address()+"]}", "  encryption_keyset: {file: keyset.json}")
			holder, others := start(t, config), []*process{start(t, config), start(t, config)}

			ctx, stop := context.WithCancel(t.Context())
			var load sync.WaitGroup
			defer load.Wait()
			defer stop()
			var calls atomic.Int64
			for _, p := range others {
				tokens := pb.NewTokenBrokerClient(p.dial())
				for _, scopes := range [][]string{nil, {"openid"}, {"permissions"}} {
					load.Go(func() {
						for ctx.Err() == nil {
							if _, err := tokens.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "rotated", Scopes: scopes}); err != nil && ctx.Err() == nil {
								t.Errorf("a call failed: %v", err)
							}
							calls.Add(1)
						}
					})
				}
			}
			others[0].await("tokens are issued", func() bool { return calls.Load() > 1000 })

			fault.Hook = func() { _ = holder.cmd.Process.Kill() }
			if err := s.vantage.Fault(fault); err != nil {
				t.Fatal(err)
			}
			if got := command(t, "secret", "rotate", "rotated", "--address", holder.address); got.status == 0 {
				t.Errorf("the replica was killed, and has rotated: %+v", got)
			}
			<-holder.exited
			if out := others[0].run("secret", "rotate", "rotated", "--expires", "90d"); !strings.Contains(out, "new client secret in the store") {
				t.Errorf("rotate says %q", out)
			}
			// From now on only the new secret works, on all replicas, also on one
			// that starts with that of the configuration.
			s.vantage.ClearFaults()
			s.endSecret(t, "rotated")
			others = append(others, start(t, config))
			for i, p := range others {
				for _, scope := range []string{"global.wildcard", "openid,global.wildcard", "permissions,global.wildcard"}[i:] {
					p.run("token", "rotated", "--scope", scope)
				}
			}
			before := s.vantage.Calls().ByClient["rotated"]["success"]
			others[0].await("tokens are renewed with the new secret", func() bool { return s.vantage.Calls().ByClient["rotated"]["success"] > before+3 })
			stop()
			load.Wait()
			if refused := s.vantage.Calls().ByClient["rotated"]["invalid_client"]; refused > 0 {
				t.Errorf("the client was refused %d times", refused)
			}
			if name == "creating" && others[0].logs("a client secret may exist that nobody knows", "token-broker rotated") == 0 {
				t.Errorf("nothing tells of the secret that nobody knows\n%s", others[0].log)
			}
		})
	}
}

// administer speaks to the stand-in's administration as its administrator.
func (s *stage) administer(t *testing.T, method, path string, to any) {
	t.Helper()
	response, err := http.PostForm(s.url+"/auth2/"+sandbox.DemoTenant+"/connect/token", url.Values{
		"grant_type": {"client_credentials"}, "client_id": {"admin"}, "client_secret": {s.vantage.ClientSecret("admin")},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	var token struct {
		Value string `json:"access_token"`
	}
	if err := json.NewDecoder(response.Body).Decode(&token); err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(t.Context(), method, s.url+"/api/adminapi2/v2/tenants/"+sandbox.DemoTenant+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token.Value)
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if answer.StatusCode >= 300 {
		t.Fatalf("the stand-in answered %s to %s %s", answer.Status, method, path)
	}
	if to != nil {
		if err := json.NewDecoder(answer.Body).Decode(to); err != nil {
			t.Fatal(err)
		}
	}
}

type shownSecret struct{ ID, Description string }

// secretsOf a client, newest first.
func (s *stage) secretsOf(t *testing.T, client string) (shown []shownSecret) {
	t.Helper()
	s.administer(t, http.MethodGet, "/clients/"+client+"/secrets/", &shown)
	return shown
}

// endSecret removes a client's oldest secret from the stand-in.
func (s *stage) endSecret(t *testing.T, client string) {
	t.Helper()
	all := s.secretsOf(t, client)
	s.administer(t, http.MethodDelete, "/clients/"+client+"/secrets/"+all[len(all)-1].ID, nil)
}

func TestSecretIsRotatedInItsFile(t *testing.T) {
	t.Parallel()
	s := newAdministered(t)
	p := start(t, s.administered(""))
	old, err := os.ReadFile(s.path("rotated"))
	if err != nil {
		t.Fatal(err)
	}
	out := p.run("secret", "rotate", "rotated", "--admin-profile", "tenant-admin")
	content, err := os.ReadFile(s.path("rotated"))
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(s.path("rotated"))
	if err != nil {
		t.Fatal(err)
	}
	if string(content) == string(old) || info.Mode().Perm() != 0o600 {
		t.Errorf("the file has mode %v, and the old secret: %v", info.Mode(), string(content) == string(old))
	}
	if strings.Contains(out+p.log.String(), string(content)) || !strings.Contains(out, "the file of profile rotated") {
		t.Errorf("rotate says %q, or somebody the secret", out)
	}
	if left, _ := filepath.Glob(s.path(".client-secret-*")); len(left) > 0 {
		t.Errorf("%v was left behind", left)
	}
	p.logged("config reloaded")
	s.endSecret(t, "rotated")
	p.run("token", "rotated")

	// A mounted Secret is a link, which must stay one, and is refused before
	// anything is created.
	secrets := len(s.secretsOf(t, "rotated"))
	s.write("real", string(content))
	if err := os.Remove(s.path("rotated")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("real", s.path("rotated")); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"secret", "rotate", "rotated", "--admin-profile", "tenant-admin"},
		{"secret", "create", "tenant-admin", "--client-id", "rotated", "--deliver-to", "rotated"},
	} {
		got := command(t, append(args, "--address", p.address)...)
		if got.status == 0 || !strings.Contains(got.stderr, "set secret_rotation") {
			t.Errorf("%v behind a link: %+v", args, got)
		}
	}
	if n := len(s.secretsOf(t, "rotated")); n != secrets {
		t.Errorf("%d secrets were created in vain", n-secrets)
	}
}

func TestClientCommands(t *testing.T) {
	t.Parallel()
	s := newAdministered(t)
	p := start(t, s.administered(""))
	out := p.run("client", "create", "tenant-admin", "--client-id", "fresh", "--grant", "client_credentials,password", "--access-token-lifetime", "30d")
	if !strings.Contains(out, "client fresh of tenant "+sandbox.DemoTenant+" was created") {
		t.Errorf("create says %q", out)
	}
	got := command(t, "secret", "create", "tenant-admin", "--client-id", "rotated", "--expires", "1d", "--address", p.address)
	value, rest, _ := strings.Cut(got.stdout, "\n")
	if got.status != 0 || len(value) < 20 || rest != "" || strings.Contains(got.stderr, value) {
		t.Fatalf("create: %d, %q beside the value, %q", got.status, rest, got.stderr)
	}
	s.write("rotated", value)
	p.logged("config reloaded")
	s.endSecret(t, "rotated")
	p.run("token", "rotated")
	p.run("secret", "create", "tenant-admin", "--client-id", "rotated", "--deliver-to", "rotated", "--description", "by hand")
	if content, err := os.ReadFile(s.path("rotated")); err != nil || string(content) == value {
		t.Errorf("the secret was not delivered: %v", err)
	}
	for _, args := range [][]string{
		{"client", "create", "tenant-admin"},
		{"secret", "create", "tenant-admin", "--client-id", "rotated", "--expires", "23h"},
		{"secret", "create", "tenant-admin", "--client-id", "rotated", "--expires", "x"},
		{"secret", "rotate", "invoices"},
		{"secret", "rotate"},
	} {
		if got := command(t, append(args, "--address", p.address)...); got.status == 0 || got.stdout != "" || got.stderr == "" {
			t.Errorf("%v: %+v", args, got)
		}
	}
}
