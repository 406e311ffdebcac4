package sandbox_test

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

const clientsPath = "/api/adminapi2/v2/tenants/" + sandbox.DemoTenant + "/clients/"

func (r *rig) adminToken() string {
	r.t.Helper()
	return r.token("client_id", "admin", "grant_type", "client_credentials").field(r.t, "access_token")
}

// admin calls the administration API, and decodes the answer into v unless
// that is nil.
func (r *rig) admin(token, method, path, body string, v any) answer {
	r.t.Helper()
	request := r.request(method, path, "", body)
	if body != "" {
		request.Header.Set("Content-Type", "application/json")
	}
	if token != "" {
		request.Header.Set("Authorization", "Bearer "+token)
	}
	a := r.do(request)
	if v != nil {
		if err := json.Unmarshal([]byte(a.body), v); err != nil {
			r.t.Fatalf("answer %d is not what was expected: %v", a.status, err)
		}
	}
	return a
}

const newClient = `{
	"clientId": "made", "clientName": "Made",
	"allowedGrantTypes": ["client_credentials"],
	"allowedScopes": ["openid", "permissions", "publicapi.all"]
}`

func TestAdminCreatesAClientAndSecrets(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	admin := r.adminToken()
	var made map[string]any
	r.want(r.admin(admin, http.MethodPost, clientsPath, newClient, &made), http.StatusCreated, "")
	for name, want := range map[string]any{
		"clientId": "made", "allowOfflineAccess": false, "allowRememberConsent": true,
		"backChannelLogoutSessionRequired": true, "requireClientSecret": true, "requireConsent": false,
		"allowNoPkce": false, "accessTokenLifetime": 86400.0, "refreshTokenLifetime": 2592000.0,
	} {
		if made[name] != want {
			t.Errorf("%s: %v, want %v", name, made[name], want)
		}
	}
	r.want(r.admin(admin, http.MethodPost, clientsPath, newClient, nil), http.StatusConflict, "")

	type view struct {
		ID, Description, Value, ValueDisplay string
		StartTime, Expiration                time.Time
	}
	secretsPath := clientsPath + "made/secrets/"
	var first, second view
	a := r.admin(admin, http.MethodPost, secretsPath, `{"description": "one"}`, &first)
	r.want(a, http.StatusCreated, "")
	if !strings.Contains(a.header.Get("Cache-Control"), "no-store") {
		t.Error("a secret may be kept by caches")
	}
	if now := r.clock.Now(); !first.StartTime.Equal(now) || !first.Expiration.Equal(now.AddDate(0, 6, 0)) {
		t.Errorf("valid from %v to %v, want six months from now", first.StartTime, first.Expiration)
	}
	expiration := r.clock.Now().AddDate(0, 0, 1).Format(time.RFC3339Nano)
	r.want(r.admin(admin, http.MethodPost, secretsPath, `{"expiration": "`+expiration+`"}`, &second), http.StatusCreated, "")

	try := func(value string, status int) {
		t.Helper()
		a := r.token("client_id", "made", "client_secret", value, "grant_type", "client_credentials", "scope", scopes)
		r.want(a, status, "")
	}
	try(first.Value, http.StatusOK)
	try(second.Value, http.StatusOK)
	r.clock.pass(24 * time.Hour)
	try(first.Value, http.StatusOK)
	try(second.Value, http.StatusBadRequest)

	admin = r.adminToken() // the first one ended
	var list []view
	r.admin(admin, http.MethodGet, secretsPath, "", &list)
	if len(list) != 2 || list[1].Value != "" || list[1].ValueDisplay != first.Value[:3] || list[1].Description != "one" {
		t.Errorf("%d secrets are listed, or not as they should be", len(list))
	}
	r.want(r.admin(admin, http.MethodDelete, secretsPath+first.ID, "", nil), http.StatusNoContent, "")
	r.want(r.admin(admin, http.MethodDelete, secretsPath+first.ID, "", nil), http.StatusNotFound, "")
	try(first.Value, http.StatusBadRequest)

	var clients []map[string]any
	r.admin(admin, http.MethodGet, strings.TrimSuffix(clientsPath, "/"), "", &clients)
	if len(clients) != 5 || clients[4]["clientId"] != "made" {
		t.Errorf("%d clients are listed", len(clients))
	}
	var one map[string]any
	r.want(r.admin(admin, http.MethodGet, clientsPath+"made", "", &one), http.StatusOK, "")
	if one["clientName"] != "Made" {
		t.Errorf("client %v", one)
	}
	if r.ClientSecret("made") != "" {
		t.Error("a secret made through the API was kept")
	}
}

func TestAdminNeedsTheRole(t *testing.T) {
	r := newRig(t, sandbox.Options{
		Tenants: []sandbox.Tenant{{ID: sandbox.DemoTenant}, {ID: "other"}},
		Users: []sandbox.User{
			{Name: "plain@example.com", Password: "p"},
			{Name: "admin@example.com", Password: "p", TenantAdministrator: true},
			{Name: "foreign@example.com", Password: "p", Tenant: "other", TenantAdministrator: true},
		},
		Clients: []sandbox.Client{
			{ID: "plain", GrantTypes: []string{"client_credentials", "password"}},
			{ID: "admin", GrantTypes: []string{"client_credentials", "password"}, TenantAdministrator: true},
			{ID: "foreign", Tenant: "other", GrantTypes: []string{"client_credentials"}, TenantAdministrator: true},
		},
	})
	of := func(client string) string {
		return r.token("client_id", client, "grant_type", "client_credentials").field(t, "access_token")
	}
	by := func(client, user string) string {
		return r.token("client_id", client, "grant_type", "password", "username", user, "password", "p").field(t, "access_token")
	}
	for _, test := range []struct {
		name, token string
		status      int
	}{
		{"nobody", "", http.StatusUnauthorized},
		{"no token of ours", "x", http.StatusUnauthorized},
		{"client", of("plain"), http.StatusForbidden},
		{"client with the role", of("admin"), http.StatusOK},
		{"client with the role elsewhere", of("foreign"), http.StatusForbidden},
		{"user", by("admin", "plain@example.com"), http.StatusForbidden},
		{"user with the role", by("plain", "admin@example.com"), http.StatusOK},
		{"user with the role elsewhere", by("plain", "foreign@example.com"), http.StatusForbidden},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, path := range []string{"", "plain", "plain/secrets/"} {
				r.want(r.admin(test.token, http.MethodGet, clientsPath+path, "", nil), test.status, "")
			}
		})
	}
	admin := of("admin")
	r.want(r.admin(admin, http.MethodGet, clientsPath+"foreign/secrets/", "", nil), http.StatusNotFound, "")
	r.want(r.admin(admin, http.MethodGet, strings.Replace(clientsPath, sandbox.DemoTenant, "nowhere", 1), "", nil), http.StatusNotFound, "")
}

func TestAdminValidates(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	admin := r.adminToken()
	now := r.clock.Now()
	at := func(t time.Time) string { return `"` + t.Format(time.RFC3339Nano) + `"` }
	with := func(member string) string { return strings.Replace(newClient, "{", "{"+member+",", 1) }
	without := func(part string) string { return strings.Replace(newClient, part, "", 1) }
	const secrets = clientsPath + "invoices/secrets/"
	for _, test := range []struct{ name, path, body, field string }{
		{"no identifier", clientsPath, without(`"clientId": "made", `), "clientId"},
		{"no name", clientsPath, without(`"clientName": "Made",`), "clientName"},
		{"no grant types", clientsPath, without(`"allowedGrantTypes": ["client_credentials"],`), "allowedGrantTypes"},
		{"unknown grant type", clientsPath, strings.Replace(newClient, `"client_credentials"`, `"refresh_token"`, 1), "allowedGrantTypes"},
		{"grant type twice", clientsPath, strings.Replace(newClient, `"client_credentials"`, `"password", "password"`, 1), "allowedGrantTypes"},
		{"grant types that exclude each other", clientsPath, strings.Replace(newClient, `"client_credentials"`, `"implicit", "authorization_code"`, 1), "allowedGrantTypes"},
		{"fewer scopes", clientsPath, without(`, "publicapi.all"`), "allowedScopes"},
		{"other scopes", clientsPath, strings.Replace(newClient, "publicapi.all", "global.wildcard", 1), "allowedScopes"},
		{"lifetime", clientsPath, with(`"accessTokenLifetime": 0`), "accessTokenLifetime"},
		{"refresh lifetime", clientsPath, with(`"refreshTokenLifetime": -1`), "refreshTokenLifetime"},
		{"origins", clientsPath, with(`"allowedCorsOrigins": 7`), "allowedCorsOrigins"},
		{"empty redirect URI", clientsPath, with(`"redirectUris": [""]`), "redirectUris"},
		{"less than a day", secrets, `{"expiration": ` + at(now.Add(23*time.Hour)) + `}`, "expiration"},
		{"more than three years", secrets, `{"expiration": ` + at(now.AddDate(3, 0, 1)) + `}`, "expiration"},
		{"before its start", secrets, `{"startTime": ` + at(now.AddDate(1, 0, 0)) + `}`, "expiration"},
		{"long description", secrets, `{"description": "` + strings.Repeat("x", 1001) + `"}`, "description"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var problem struct {
				Title, Type string
				Status      int
				Errors      map[string][]string
			}
			a := r.admin(admin, http.MethodPost, test.path, test.body, &problem)
			r.want(a, http.StatusBadRequest, "")
			if problem.Status != http.StatusBadRequest || problem.Title == "" || len(problem.Errors[test.field]) == 0 {
				t.Errorf("problem %+v, want one about %s", problem, test.field)
			}
			if got := a.header.Get("Content-Type"); !strings.HasPrefix(got, "application/json") {
				t.Errorf("Content-Type %q", got)
			}
		})
	}
	for name, body := range map[string]string{
		"not JSON": "x", "misspelt": with(`"clientID2": "x"`), "two": newClient + newClient,
	} {
		if a := r.admin(admin, http.MethodPost, clientsPath, body, nil); a.status != http.StatusBadRequest {
			t.Errorf("%s: status %d", name, a.status)
		}
	}
	r.want(r.admin(admin, http.MethodPatch, clientsPath, "", nil), http.StatusMethodNotAllowed, "")
	r.want(r.admin(admin, http.MethodGet, clientsPath+"nobody/secrets/", "", nil), http.StatusNotFound, "")
	request := r.request(http.MethodPost, clientsPath, "text/plain", newClient)
	request.Header.Set("Authorization", "Bearer "+admin)
	r.want(r.do(request), http.StatusUnsupportedMediaType, "")
}

func TestAdminLimitsSecrets(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	admin := r.adminToken()
	const path = clientsPath + "invoices/secrets/"
	for range 99 { // and the one it was born with
		r.want(r.admin(admin, http.MethodPost, path, "{}", nil), http.StatusCreated, "")
	}
	r.want(r.admin(admin, http.MethodPost, path, "{}", nil), http.StatusConflict, "")
}

// TestAdminMadeClientSignsIn uses a client of the API for the code flow.
func TestAdminMadeClientSignsIn(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	admin := r.adminToken()
	body := strings.NewReplacer(
		`"client_credentials"`, `"authorization_code"`,
		`"made", `, `"made", "requireClientSecret": false, "allowOfflineAccess": true,
			"allowedCorsOrigins": ["https://app.example"], "accessTokenLifetime": 60,
			"redirectUris": ["http://127.0.0.1:9999/"],`,
	).Replace(newClient)
	r.want(r.admin(admin, http.MethodPost, clientsPath, body, nil), http.StatusCreated, "")
	code := r.signIn(authorizeURL("client_id", "made")).Get("code")
	a := r.exchange(code, "client_id", "made", "client_secret", "")
	r.want(a, http.StatusOK, "")
	if !strings.Contains(a.body, `"expires_in":60,`) || a.field(t, "refresh_token") == "" {
		t.Error("the client's settings do not count")
	}
}
