//go:build conformance

package conformance_test

import (
	"fmt"
	"net/url"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	tokenbrokerv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
)

// person is a profile that somebody signs in for; its client has its name. More
// lines may follow.
func person(name string) string {
	return fmt.Sprintf(`
  - name: %[1]s
    scopes: [openid, offline_access, read, write]
    oauth2:
      client_id: %[1]s
      client_secret: {value: %[2]q}
      authorization_code: {redirect_url: %[3]s%[1]s}
      `, name, secret, redirectURL)
}

// A person signs in, at a server that insists on PKCE and an exact redirect
// URL. What comes of it is theirs, works, and can be revoked.
func TestSignIn(t *testing.T) {
	t.Parallel()
	s := startServer(t, time.Hour, personal("discovered"), personal("secure"), personal("given"), personal("resource"))
	b := s.startBroker("profiles:" +
		person("discovered") + "issuer: <http>" +
		person("secure") + "issuer: <https>" +
		person("given") + "token_url: <http>/token\n      authorization_url: <http>/auth\n      revocation_url: <http>/token/revocation" +
		person("resource") + "issuer: <http>\n      resource: [\"https://api.one.example/\"]")
	for _, c := range []struct{ profile, audience string }{{"discovered", ""}, {"secure", ""}, {"given", ""}, {"resource", "https://api.one.example/"}} {
		t.Run(c.profile, func(t *testing.T) {
			b.refused(c.profile, "AUTHORIZATION_REQUIRED")
			back := s.signIn(b.start(c.profile).GetAuthorizationUrl(), "alice")
			if c.profile == "given" { // nothing is known to compare it with
				back.Del("iss")
			}
			p, err := b.complete(back)
			if err != nil {
				t.Fatalf("completing a sign-in for %s: %v\n%s", c.profile, err, b.process.Log())
			}
			if p.GetName() != c.profile || p.GetState() != tokenbrokerv1.State_STATE_READY || p.GetConsentAccount() != "alice" || p.GetConsentStartTime() == nil {
				t.Errorf("after the sign-in the profile is %v", p)
			}
			token := b.issue(c.profile)
			got := s.want(c.profile, 1)[0]
			if got.Grant != "authorization_code" || got.Status != 200 || got.Access != token.GetId() || got.Refresh == "" {
				t.Errorf("token %s came of %v", token.GetId(), got)
			}
			if i := s.introspect(token.GetAccessToken()); !i.Active || i.ClientID != c.profile || i.Subject != "alice" || i.Audience != c.audience || !strings.Contains(i.Scope, "read") {
				t.Errorf("the server says of the token: %+v", i)
			}
			revoked, err := b.RevokeToken(b.within(), &tokenbrokerv1.RevokeTokenRequest{Profile: c.profile})
			if err != nil || revoked.GetOutcome() != tokenbrokerv1.RevocationOutcome_REVOCATION_OUTCOME_CONFIRMED || s.introspect(token.GetAccessToken()).Active {
				t.Errorf("revoking: %v, %v", revoked, err)
			}
			next := b.issue(c.profile)
			if i := s.introspect(next.GetAccessToken()); !i.Active || i.Subject != "alice" || i.Audience != c.audience {
				t.Errorf("after a refresh the server says of the token: %+v", i)
			}
			if got := s.want(c.profile, 3); got[2].Presented != got[0].Refresh {
				t.Errorf("the refresh token of the sign-in was not used: %v", got)
			}
		})
	}
}

// subsets of scopes are tokens of their own: each asks for a refresh at once.
var subsets = [][]string{{"openid"}, {"read"}, {"write"}, {"openid", "read"}, {"openid", "write"}, {"read", "write"}}

// Each refresh token is presented once, in the order in which they were issued,
// also when the access token ends by itself.
func TestRefreshTokensRotate(t *testing.T) {
	t.Parallel()
	s := startServer(t, 10*time.Second, personal("person"))
	b := s.startBroker("profiles:" + person("person") + "issuer: <http>")
	b.authorize(s, "person", "alice")
	for _, scopes := range subsets {
		token := b.issue("person", scopes...)
		if i := s.introspect(token.GetAccessToken()); !i.Active || i.Scope != strings.Join(scopes, " ") {
			t.Errorf("for %v the server issues %+v", scopes, i)
		}
	}
	s.want("person", 1+len(subsets))
	token := b.issue("person")
	for range 2 {
		token = b.successor("person", token)
		if !s.introspect(token.GetAccessToken()).Active {
			t.Error("the successor is not active")
		}
	}
	calls := s.calls("person")
	if len(calls) < 1+len(subsets)+2 {
		t.Errorf("%d requests, want the sign-in, %d subsets and two renewals at least", len(calls), len(subsets))
	}
	for i, c := range calls[1:] {
		if c.Grant != "refresh_token" || c.Status != 200 || c.Presented != calls[i].Refresh || c.Revoked {
			t.Errorf("after %v\ncame %v", calls[i], c)
		}
	}
}

// A server whose refresh tokens can be used many times goes on getting the same
// one.
func TestLastingRefreshToken(t *testing.T) {
	t.Parallel()
	c := personal("person")
	c["lasting_refresh_tokens"] = true
	s := startServer(t, time.Hour, c)
	b := s.startBroker("profiles:" + person("person") + "issuer: <http>")
	b.authorize(s, "person", "alice")
	for _, scopes := range subsets {
		b.issue("person", scopes...)
	}
	calls := s.want("person", 1+len(subsets))
	for _, c := range calls[1:] {
		if c.Status != 200 || c.Presented != calls[0].Refresh {
			t.Errorf("a refresh came as %v", c)
		}
	}
}

// A broker is killed while it waits for the answer to a refresh. The server has
// no grace: it takes a refresh token that it sees again for a theft. So the
// other replica serves the access token at hand, and leaves the refresh token
// alone until the last quarter of that one's life, whoever asks for more; then
// it presents it once more, because nobody can know better, and never again.
func TestKilledInMidRefresh(t *testing.T) {
	t.Parallel()
	const lifetime = 20 * time.Second
	for name, acted := range map[string]bool{"the server has not acted": false, "the server has acted": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, redis := startServer(t, lifetime, personal("person")), testredis.Start(t, testredis.Options{})
			keyset, err := exec.Command(binary, "keyset", "new").Output()
			if err != nil {
				t.Fatal(err)
			}
			config := fmt.Sprintf("store:\n  redis: {addresses: [%q]}\n  encryption_keyset: {file: %q}\nprofiles:%sissuer: <http>\n    timeout: 2s\n",
				redis.Address(), write(t, "keyset.json", string(keyset)), person("person"))
			victim, other := s.startBroker(config), s.startBroker(config)
			// Begun at one replica, completed at the other.
			if _, err := other.complete(s.signIn(victim.start("person").GetAuthorizationUrl(), "alice")); err != nil {
				t.Fatalf("completing: %v\n%s", err, other.process.Log())
			}
			token := victim.issue("person")
			s.hold(acted)
			go func() { // it dies with the broker
				_, _ = victim.ask("person", "read")
			}()
			held := func(c call) bool { return c.Held }
			victim.process.Await("the server holds the answer", 30*time.Second, func() bool { return slices.ContainsFunc(s.calls(""), held) })
			victim.process.Kill()

			refreshes := func() (calls []call) {
				for _, c := range s.calls("") {
					if c.Grant == "refresh_token" {
						calls = append(calls, c)
					}
				}
				return calls
			}
			if got := other.issue("person"); got.GetId() != token.GetId() {
				t.Fatalf("%s is served and not the access token at hand, %s", got.GetId(), token.GetId())
			}
			_, err = other.ask("person", "read")
			other.wantReason(err, "ENDPOINT_UNAVAILABLE")
			if calls := refreshes(); len(calls) != 1 {
				t.Fatalf("the refresh token was presented as %v while an access token lives", calls)
			}
			if acted {
				err = other.refusal("person")
			} else {
				other.successor("person", token)
			}
			calls := refreshes()
			if len(calls) != 2 || calls[1].Presented != calls[0].Presented {
				t.Fatalf("the refresh token was presented as %v, want twice", calls)
			}
			if rest := token.GetExpireTime().AsTime().Sub(time.UnixMilli(calls[1].Time)); rest > lifetime/4 {
				t.Errorf("the refresh token was presented again %v before the end of the access token", rest)
			}
			if !acted {
				if calls[1].Status != 200 || calls[1].Revoked {
					t.Errorf("the refresh token was good: %v", calls[1])
				}
				other.issue("person", "read")
				return
			}
			other.wantReason(err, "AUTHORIZATION_REQUIRED")
			if calls[1].Error != "invalid_grant" {
				t.Errorf("the second presentation: %v", calls[1])
			}
			for range 20 {
				other.refused("person", "AUTHORIZATION_REQUIRED")
			}
			if calls := refreshes(); len(calls) != 2 {
				t.Errorf("the refresh token was presented as %v, want twice", calls)
			}
			other.authorize(s, "person", "alice")
			if !s.introspect(other.issue("person").GetAccessToken()).Active {
				t.Error("the token of the new sign-in is not active")
			}
		})
	}
}

// What comes back to the redirect URL is believed once, and only if it is the
// answer to what was asked, from the server that was asked.
func TestRefusedCallbacks(t *testing.T) {
	t.Parallel()
	s := startServer(t, time.Hour, personal("person"), personal("given"))
	b := s.startBroker("profiles:" + person("person") + "issuer: <http>" +
		person("given") + "token_url: <http>/token\n      authorization_url: <http>/auth")
	refused := func(what, reason string, requests int, back url.Values) {
		t.Helper()
		before := len(s.calls(""))
		_, err := b.complete(back)
		b.wantReason(err, reason)
		if n := len(s.calls("")) - before; n != requests {
			t.Errorf("%s cost %d requests, want %d: %v", what, n, requests, s.calls(""))
		}
	}
	come := func(profile string) url.Values {
		t.Helper()
		return s.signIn(b.start(profile).GetAuthorizationUrl(), "alice")
	}
	with := func(back url.Values, name, value string) url.Values {
		changed := url.Values{}
		for n, v := range back {
			changed[n] = v
		}
		changed.Set(name, value)
		return changed
	}

	refused("a state that nobody has started", "INVALID_REQUEST", 0, with(come("person"), "state", strings.Repeat("s", 43)))
	refused("an iss where nothing is known to compare it with", "INVALID_REQUEST", 0, come("given"))
	refused("another server's iss", "INVALID_REQUEST", 0, with(come("person"), "iss", s.https))
	refused("no iss of a server that always sends it", "INVALID_REQUEST", 0, with(come("person"), "iss", ""))
	refused("a code of another server", "INVALID_REQUEST", 0, with(with(come("person"), "code", "stolen"), "iss", s.https))

	good := come("person")
	if _, err := b.complete(good); err != nil {
		t.Fatalf("completing: %v\n%s", err, b.process.Log())
	}
	token := b.issue("person")
	refused("the same once more", "INVALID_REQUEST", 0, good)
	// PKCE: the code is not of this sign-in.
	refused("a used code with another state", "AUTHORIZATION_REQUIRED", 1, with(come("person"), "code", good.Get("code")))
	refused("a fresh code with another state", "AUTHORIZATION_REQUIRED", 1, with(come("person"), "code", come("person").Get("code")))
	refused("a code that nobody was given", "AUTHORIZATION_REQUIRED", 1, with(come("person"), "code", "made-up"))

	if got := b.issue("person"); got.GetId() != token.GetId() || !s.introspect(got.GetAccessToken()).Active {
		t.Errorf("the grant suffered: %s came after %s", got.GetId(), token.GetId())
	}
	b.issue("person", "read")
	for _, c := range s.calls("person") {
		if c.Revoked {
			t.Errorf("the server ended a consent: %v", c)
		}
	}
}

// A sign-in with another account than the one in use is not taken, and what was
// obtained is revoked, unless whoever completes it says so.
func TestAnotherAccount(t *testing.T) {
	t.Parallel()
	s := startServer(t, time.Hour, personal("person"))
	b := s.startBroker("profiles:" + person("person") + "issuer: <http>")
	b.authorize(s, "person", "alice")
	token := b.issue("person")
	_, err := b.complete(s.signIn(b.start("person").GetAuthorizationUrl(), "bob"))
	b.wantReason(err, "INVALID_REQUEST")
	calls := s.calls("person")
	if !slices.ContainsFunc(calls[2:], func(c call) bool { return c.Endpoint == "revocation" && c.Presented == calls[1].Refresh && c.Revoked }) {
		t.Errorf("what bob's sign-in brought was not revoked: %v", calls)
	}
	if got := b.issue("person"); got.GetId() != token.GetId() || s.introspect(got.GetAccessToken()).Subject != "alice" {
		t.Error("the grant in use has changed")
	}
	back := s.signIn(b.start("person").GetAuthorizationUrl(), "bob")
	replaced, err := b.CompleteAuthorization(b.within(), &tokenbrokerv1.CompleteAuthorizationRequest{
		State: back.Get("state"), Code: back.Get("code"), Iss: back.Get("iss"), ReplaceAccount: true,
	})
	if err != nil || replaced.GetProfile().GetConsentAccount() != "bob" {
		t.Fatalf("replacing the account: %v, %v\n%s", replaced, err, b.process.Log())
	}
	if i := s.introspect(b.issue("person").GetAccessToken()); !i.Active || i.Subject != "bob" {
		t.Errorf("the server says of the token: %+v", i)
	}
}
