package sandbox_test

import (
	"net/http"
	"net/url"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// reviewing is a world whose client review is changed.
func reviewing(change func(*sandbox.Client)) sandbox.Options {
	c := sandbox.Client{
		ID: "review", GrantTypes: []string{"authorization_code"}, AllowOfflineAccess: true,
		RedirectURIs: []string{callback},
	}
	change(&c)
	return sandbox.Options{Clients: []sandbox.Client{c}}
}

func TestRotationAndReuse(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	first := r.consent()
	rt1 := first.field(t, "refresh_token")
	second := r.refresh("review", rt1)
	r.want(second, http.StatusOK, "")
	rt2 := second.field(t, "refresh_token")
	if rt2 == rt1 || rt2 == "" {
		t.Fatal("the refresh token was not rotated")
	}
	if second.field(t, "scope") != offline+" legacy.client" || second.field(t, "id_token") == "" {
		t.Error("the refreshed answer lacks scopes or the ID token")
	}
	r.want(r.refresh("review", rt1), http.StatusBadRequest, "invalid_grant")
	r.want(r.refresh("review", rt2), http.StatusBadRequest, "invalid_grant") // the family is dead
	r.wantLive(first.field(t, "access_token"), false)
	r.wantLive(second.field(t, "access_token"), false)

	calls := r.Calls()
	if calls.RefreshTokens[id(rt1)] != 2 || calls.RefreshTokens[id(rt2)] != 1 {
		t.Errorf("presentations %v", calls.RefreshTokens)
	}
	if got := calls.ByGrant["refresh_token"]; got["success"] != 1 || got["invalid_grant"] != 2 {
		t.Errorf("counts %v", got)
	}
}

func TestReuseInsideTheGrace(t *testing.T) {
	r := newRig(t, reviewing(func(c *sandbox.Client) { c.ReuseGrace = 30 * time.Second }))
	rt := r.consent().field(t, "refresh_token")
	one := r.refresh("review", rt).field(t, "refresh_token")
	r.clock.pass(30*time.Second - time.Millisecond)
	a := r.refresh("review", rt)
	r.want(a, http.StatusOK, "")
	r.want(r.refresh("review", one), http.StatusOK, "")
	r.clock.pass(time.Millisecond) // the second use did not prolong it
	r.want(r.refresh("review", rt), http.StatusBadRequest, "invalid_grant")
	r.want(r.refresh("review", a.field(t, "refresh_token")), http.StatusBadRequest, "invalid_grant")
}

func TestToleratedReuse(t *testing.T) {
	r := newRig(t, reviewing(func(c *sandbox.Client) { c.TolerateReuse = true }))
	rt := r.consent().field(t, "refresh_token")
	next := r.refresh("review", rt).field(t, "refresh_token")
	r.want(r.refresh("review", rt), http.StatusBadRequest, "invalid_grant")
	r.want(r.refresh("review", next), http.StatusOK, "")
}

func TestReusableRefreshToken(t *testing.T) {
	r := newRig(t, reviewing(func(c *sandbox.Client) { c.ReusableRefreshTokens = true }))
	rt := r.consent().field(t, "refresh_token")
	for range 3 {
		a := r.refresh("review", rt)
		r.want(a, http.StatusOK, "")
		if a.field(t, "refresh_token") != rt {
			t.Error("a reusable refresh token was rotated")
		}
	}
}

// TestAbsoluteLifetime refreshes every ten days: the thirtieth is the last all
// the same.
func TestAbsoluteLifetime(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	rt := r.consent().field(t, "refresh_token")
	for range 2 {
		r.clock.pass(10 * 24 * time.Hour)
		a := r.refresh("review", rt)
		r.want(a, http.StatusOK, "")
		rt = a.field(t, "refresh_token")
	}
	r.clock.pass(10 * 24 * time.Hour)
	r.want(r.refresh("review", rt), http.StatusBadRequest, "invalid_grant")
}

func TestForeignRefreshToken(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	rt := r.consent().field(t, "refresh_token")
	r.want(r.refresh("operator", rt), http.StatusBadRequest, "invalid_grant")
	r.want(r.refresh("review", rt), http.StatusOK, "") // no harm done
	r.want(r.refresh("invoices", rt), http.StatusBadRequest, "unauthorized_client")
}

func TestRefreshNarrowsScopes(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	rt := r.consent().field(t, "refresh_token")
	a := r.token("client_id", "review", "grant_type", "refresh_token", "refresh_token", rt, "scope", "publicapi.all")
	r.want(a, http.StatusBadRequest, "invalid_scope") // and the token was not used up
	a = r.token("client_id", "review", "grant_type", "refresh_token", "refresh_token", rt, "scope", "permissions")
	r.want(a, http.StatusOK, "")
	if got := a.field(t, "scope"); got != "permissions" {
		t.Errorf("scope %q", got)
	}
	a = r.refresh("review", a.field(t, "refresh_token"))
	if got := a.field(t, "scope"); got != offline+" legacy.client" {
		t.Errorf("scope %q, want all of the grant", got)
	}
}

func TestOfflineAccessNeedsPermission(t *testing.T) {
	r := newRig(t, reviewing(func(c *sandbox.Client) { c.GrantTypes = []string{"client_credentials"} }))
	a := r.token("client_id", "review", "grant_type", "client_credentials", "scope", offline)
	r.want(a, http.StatusBadRequest, "invalid_scope")
}

func TestRevocation(t *testing.T) {
	const path = "/auth2/connect/revocation"
	r := newRig(t, sandbox.Options{})
	revoke := func(pairs ...string) answer {
		t.Helper()
		return r.do(r.postForm(path, r.form(pairs...)))
	}
	a := r.consent()
	access, rt := a.field(t, "access_token"), a.field(t, "refresh_token")

	r.want(r.do(r.request(http.MethodGet, path, "", "")), http.StatusMethodNotAllowed, "")
	r.want(r.do(r.request(http.MethodPost, path, "application/json", "{}")), http.StatusUnsupportedMediaType, "")
	r.want(revoke("client_id", "review", "client_secret", "wrong", "token", rt), http.StatusBadRequest, "invalid_client")
	r.want(revoke("client_id", "review"), http.StatusBadRequest, "invalid_request")
	r.want(revoke("client_id", "review", "token", rt, "token_type_hint", "x"), http.StatusBadRequest, "unsupported_token_type")
	r.want(revoke("client_id", "review", "token", "unknown"), http.StatusOK, "")
	r.want(revoke("client_id", "invoices", "token", rt), http.StatusOK, "") // foreign: nothing happens
	r.wantLive(access, true)

	next := r.refresh("review", rt)
	done := revoke("client_id", "review", "token", access, "token_type_hint", "refresh_token") // a wrong hint is no harm
	if done.status != http.StatusOK || done.body != "" {
		t.Errorf("answer %d with %d bytes", done.status, len(done.body))
	}
	r.wantLive(access, false)
	r.wantLive(next.field(t, "access_token"), true) // an access token goes alone
	r.want(revoke("client_id", "review", "token", next.field(t, "refresh_token")), http.StatusOK, "")
	r.wantLive(next.field(t, "access_token"), false) // a refresh token takes the family
	r.want(r.refresh("review", next.field(t, "refresh_token")), http.StatusBadRequest, "invalid_grant")

	want := map[string]int{"invalid_client": 1, "invalid_request": 1, "unsupported_token_type": 1, "unchanged": 2, "revoked": 2}
	got := r.Calls().Revocations
	for outcome, n := range want {
		if got[outcome] != n {
			t.Errorf("%d revocations %s, want %d", got[outcome], outcome, n)
		}
	}
}

func TestRevocationAtTheTenantWithBasic(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	token := r.token(r.invoices()...).field(t, "access_token")
	request := r.postForm("/auth2/"+sandbox.DemoTenant+"/connect/revocation", url.Values{"token": {token}})
	request.SetBasicAuth("invoices", r.ClientSecret("invoices"))
	r.want(r.do(request), http.StatusOK, "")
	r.wantLive(token, false)
}
