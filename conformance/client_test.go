//go:build conformance

package conformance_test

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	tokenbrokerv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
	"github.com/tokenbroker/tokenbroker/internal/testca"
)

// key spells a new private key: PEM for the broker, and the public half for the
// server.
func key(t testing.TB, private any, err error) (text string, public jose.JSONWebKeySet) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	half := (&jose.JSONWebKey{Key: private, KeyID: "of " + t.Name(), Use: "sig"}).Public()
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), jose.JSONWebKeySet{Keys: []jose.JSONWebKey{half}}
}

func ecKey(t testing.TB) (string, jose.JSONWebKeySet) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	return key(t, private, err)
}

func rsaKey(t testing.TB) (string, jose.JSONWebKeySet) {
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	return key(t, private, err)
}

func edKey(t testing.TB) (string, jose.JSONWebKeySet) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	return key(t, private, err)
}

// Each way for a client to prove itself: one request brings a token that the
// server holds to be the client's, however many callers ask; it can be revoked;
// and the next one costs one more.
func TestClientAuthentication(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, method, issuer string
		// register completes the client's metadata, and returns the lines that
		// the profile has for it.
		register func(*testing.T, *testca.Authority, client) (lines string)
	}{
		{"basic", "client_secret_basic", "<http>", withSecret},
		{"basic over TLS", "client_secret_basic", "<https>", withSecret},
		{"post", "client_secret_post", "<http>", withSecret},
		{"EC key", "private_key_jwt", "<http>", withKey(ecKey)},
		{"RSA key", "private_key_jwt", "<https>", withKey(rsaKey)},
		{"Ed25519 key", "private_key_jwt", "<http>", withKey(edKey)},
		{"certificate", "tls_client_auth", "<https>", withCertificate("machine.example")},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m, ca := machine("machine", client{"token_endpoint_auth_method": c.method}), testca.New(t)
			lines := c.register(t, ca, m)
			s := startServerWith(t, ca, time.Hour, m)
			b := s.startBroker(fmt.Sprintf(`
profiles:
  - name: machine
    scopes: [read, write]
    oauth2:
      issuer: %s
      client_id: machine
      client_auth: %s
      client_credentials: {}
%s`, c.issuer, c.method, lines))

			var wg sync.WaitGroup
			for range 20 {
				wg.Go(func() {
					if _, err := b.ask("machine"); err != nil {
						t.Errorf("issuing a token: %v", err)
					}
				})
			}
			wg.Wait()
			token := b.issue("machine")
			got := s.want("machine", 1)[0]
			if got.Authentication != c.method || got.Grant != "client_credentials" || got.Scope != "read write" || got.Access != token.GetId() {
				t.Errorf("token %s came of %v", token.GetId(), got)
			}
			address := strings.NewReplacer("<http>", s.http, "<https>", s.https).Replace(c.issuer)
			if c.method == "tls_client_auth" {
				address = s.mutual
			}
			if !strings.HasSuffix(address, "//"+got.Host) {
				t.Errorf("the request went to %s, want %s", got.Host, address)
			}
			if i := s.introspect(token.GetAccessToken()); !i.Active || i.ClientID != "machine" || i.Scope != "read write" {
				t.Errorf("the server says of the token: %+v", i)
			}

			revoked, err := b.RevokeToken(b.within(), &tokenbrokerv1.RevokeTokenRequest{Profile: "machine"})
			if err != nil || revoked.GetOutcome() != tokenbrokerv1.RevocationOutcome_REVOCATION_OUTCOME_CONFIRMED {
				t.Fatalf("revoking: %v, %v\n%s", revoked, err, b.process.Log())
			}
			if got := s.want("machine", 2)[1]; got.Endpoint != "revocation" || got.Presented != token.GetId() || got.Authentication != c.method {
				t.Errorf("the revocation came as %v", got)
			}
			if s.introspect(token.GetAccessToken()).Active {
				t.Error("the revoked token is active")
			}
			if next := b.issue("machine"); next.GetId() == token.GetId() || !s.introspect(next.GetAccessToken()).Active {
				t.Errorf("after %s was revoked the broker hands out %s", token.GetId(), next.GetId())
			}
			s.want("machine", 3)
		})
	}
}

func withSecret(*testing.T, *testca.Authority, client) string {
	return fmt.Sprintf("      client_secret: {value: %q}", secret)
}

func withKey(make func(testing.TB) (string, jose.JSONWebKeySet)) func(*testing.T, *testca.Authority, client) string {
	return func(t *testing.T, _ *testca.Authority, c client) string {
		private, public := make(t)
		delete(c, "client_secret")
		c["jwks"] = public
		return fmt.Sprintf("      private_key: {file: %q}\n      key_id: %q", write(t, "key.pem", private), public.Keys[0].KeyID)
	}
}

func withCertificate(name string) func(*testing.T, *testca.Authority, client) string {
	return func(t *testing.T, ca *testca.Authority, c client) string {
		delete(c, "client_secret")
		c["tls_client_auth_san_dns"] = name
		return certified(t, ca, name)
	}
}

// certified makes a client certificate with this name, and returns the lines
// that a profile has for it.
func certified(t testing.TB, ca *testca.Authority, name string) string {
	t.Helper()
	certificate, private := testca.PEM(t, ca.Leaf(testca.Named(name)))
	return fmt.Sprintf("      certificate: %q\n      private_key: {file: %q}", write(t, "client.pem", string(certificate)), write(t, "client.key", string(private)))
}

// Secrets and client ids are encoded twice for Basic and once for a body, or
// the server does not know them.
func TestSecretsWithReservedCharacters(t *testing.T) {
	t.Parallel()
	var clients []client
	profiles, names := "", []string{}
	for i, secret := range []string{"plus+plus", "amper&sand", "per%cent", "per%2Bcent", "equals=", "co:lon", "with space", "+ & % = : \" ' \\ / ? # ~ $"} {
		for _, method := range []string{"client_secret_basic", "client_secret_post"} {
			id, name := fmt.Sprintf("id %d%%:+& of %s", i, method), fmt.Sprintf("p%d-%s", i, method[len("client_secret_"):])
			clients = append(clients, machine(id, client{"client_secret": secret, "token_endpoint_auth_method": method}))
			names = append(names, name)
			profiles += fmt.Sprintf(`
  - name: %s
    oauth2: {issuer: "<http>", client_id: %q, client_secret: {value: %q}, client_auth: %s, client_credentials: {}}`, name, id, secret, method)
		}
	}
	s := startServer(t, time.Hour, clients...)
	b := s.startBroker("profiles:" + profiles)
	for i, name := range names {
		token := b.issue(name)
		if got := s.want(clients[i]["client_id"].(string), 1)[0]; got.Access != token.GetId() || got.Authentication != clients[i]["token_endpoint_auth_method"] {
			t.Errorf("%s came of %v", name, got)
		}
	}
}

// What is asked for reaches the server, and what it grants reaches the caller:
// scopes, fewer scopes, the resource, parameters of its own.
func TestWhatIsAskedFor(t *testing.T) {
	t.Parallel()
	s := startServer(t, time.Hour, machine("machine", nil))
	const common = `issuer: <http>, client_id: machine, client_secret: {value: "` + secret + `"}, client_credentials: {}`
	b := s.startBroker(`
profiles:
  - {name: plain, scopes: [read, write], oauth2: {` + common + `}}
  - {name: one, scopes: [read, write], oauth2: {` + common + `, resource: ["https://api.one.example/"]}}
  - {name: two, scopes: [read, write], oauth2: {` + common + `, resource: ["https://api.two.example/v1?x=1&y=2"]}}
  - {name: more, oauth2: {` + common + `, audience: "https://more.example", extra_parameters: {colour: "deep blue & green"}}}
`)
	for i, c := range []struct {
		profile                       string
		narrowed                      []string
		scope, audience, parameter, v string
	}{
		{"plain", nil, "read write", "", "", ""},
		{"plain", []string{"read"}, "read", "", "", ""},
		{"one", nil, "read write", "https://api.one.example/", "", ""},
		{"one", []string{"write"}, "write", "https://api.one.example/", "", ""},
		{"two", nil, "read write", "https://api.two.example/v1?x=1&y=2", "", ""},
		{"more", nil, "", "", "colour", "deep blue & green"},
	} {
		token := b.issue(c.profile, c.narrowed...)
		got := s.want("machine", i+1)[i]
		if got.Scope != c.scope || strings.Join(got.Resource, " ") != c.audience || got.Extra[c.parameter] != c.v {
			t.Errorf("%+v is asked for with %v", c, got)
		}
		if introspected := s.introspect(token.GetAccessToken()); !introspected.Active || introspected.Scope != c.scope || introspected.Audience != c.audience {
			t.Errorf("for %+v the server issues %+v", c, introspected)
		}
		if scopes := strings.Join(token.GetScopes(), " "); scopes != c.scope {
			t.Errorf("for %+v the caller is told of the scopes %q", c, scopes)
		}
	}
	if got := s.calls("machine"); got[len(got)-1].Extra["audience"] != "https://more.example" {
		t.Errorf("the audience is asked for with %v", got[len(got)-1])
	}
}

// What the server refuses is asked for once, by however many callers; and again
// when what was wrong has changed.
func TestRefusedClients(t *testing.T) {
	t.Parallel()
	ca := testca.New(t)
	_, public := ecKey(t)
	other, _ := ecKey(t)
	wrong := write(t, "secret", "not the secret")
	s := startServerWith(t, ca, time.Hour,
		machine("secret", nil),
		machine("method", client{"token_endpoint_auth_method": "private_key_jwt", "client_secret": nil, "jwks": public}),
		machine("scope", client{"scope": "read"}),
		machine("resources", nil),
		machine("grant", client{"grant_types": []string{"authorization_code"}, "response_types": []string{"code"}, "redirect_uris": []string{redirectURL}}),
		machine("key", client{"token_endpoint_auth_method": "private_key_jwt", "client_secret": nil, "jwks": public}),
		machine("certificate", client{"token_endpoint_auth_method": "tls_client_auth", "client_secret": nil, "tls_client_auth_san_dns": "machine.example"}),
	)
	const right = `client_secret: {value: "` + secret + `"}`
	b := s.startBroker(fmt.Sprintf(`
profiles:
  - {name: secret, oauth2: {issuer: <http>, client_id: secret, client_secret: {file: %q}, client_credentials: {}}}
  - {name: unknown, oauth2: {issuer: <http>, client_id: unknown, %s, client_credentials: {}}}
  - {name: method, oauth2: {issuer: <http>, client_id: method, %s, client_credentials: {}}}
  - {name: scope, scopes: [read, write], oauth2: {issuer: <http>, client_id: scope, %s, client_credentials: {}}}
  - {name: resources, oauth2: {issuer: <http>, client_id: resources, %s, resource: ["https://api.a", "https://api.b"], client_credentials: {}}}
  - {name: grant, oauth2: {issuer: <http>, client_id: grant, %s, client_credentials: {}}}
  - {name: key, oauth2: {issuer: <http>, client_id: key, client_auth: private_key_jwt, private_key: {file: %q}, client_credentials: {}}}
  - name: certificate
    oauth2:
      issuer: <https>
      client_id: certificate
      client_auth: tls_client_auth
      client_credentials: {}
%s
`, wrong, right, right, right, right, right, write(t, "key.pem", other), certified(t, ca, "other.example")))
	refusals := map[string]string{
		"secret": "invalid_client", "unknown": "invalid_client", "method": "invalid_client", "scope": "invalid_scope",
		"resources": "invalid_target", "grant": "invalid_request", "key": "invalid_client", "certificate": "invalid_client",
	}
	var wg sync.WaitGroup
	for profile := range refusals {
		for range 10 {
			wg.Go(func() {
				_, err := b.ask(profile)
				if got := reason(err); got != "CREDENTIALS_REJECTED" {
					t.Errorf("%s is refused with %v, want CREDENTIALS_REJECTED", profile, err)
				}
			})
		}
	}
	wg.Wait()
	calls := map[string][]call{}
	for _, c := range s.calls("") {
		if c.Client == "" { // the server does not know it
			c.Client = "unknown"
		}
		calls[c.Client] = append(calls[c.Client], c)
	}
	for profile, want := range refusals {
		if got := calls[profile]; len(got) != 1 || got[0].Error != want {
			t.Errorf("%s cost %v; want one request, answered with %s", profile, got, want)
		}
	}
	if t.Failed() {
		t.Log(b.process.Log())
		return
	}
	if err := os.WriteFile(wrong, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	b.process.Await("the right secret is used", 30*time.Second, func() bool {
		_, err := b.ask("secret")
		return err == nil
	})
	s.want("secret", 2)
}

// A token that a resource server refuses is replaced, once for all who report
// it.
func TestReportedToken(t *testing.T) {
	t.Parallel()
	s := startServer(t, time.Hour, machine("machine", nil))
	b := s.startBroker(`
profiles:
  - {name: machine, oauth2: {issuer: <http>, client_id: machine, client_secret: {value: "` + secret + `"}, client_credentials: {}}}
`)
	token := b.issue("machine")
	report := func() (*tokenbrokerv1.Token, error) {
		response, err := b.RefreshToken(b.within(), &tokenbrokerv1.RefreshTokenRequest{Profile: "machine", RejectedTokenId: token.GetId()})
		return response.GetToken(), err
	}
	_, err := report()
	b.wantReason(err, "REFRESH_TOO_SOON")
	s.want("machine", 1)
	var next *tokenbrokerv1.Token
	b.process.Await("a report counts", 30*time.Second, func() bool {
		next, err = report()
		return err == nil
	})
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if got, err := report(); err != nil || got.GetId() != next.GetId() {
				t.Errorf("a later report of %s is answered with %s, %v; want %s", token.GetId(), got.GetId(), err, next.GetId())
			}
		})
	}
	wg.Wait()
	if got := s.want("machine", 2)[1]; got.Access != next.GetId() || next.GetId() == token.GetId() {
		t.Errorf("%s was replaced with %s: %v", token.GetId(), next.GetId(), got)
	}
}

// What discovery brings must be about the issuer that was asked for.
func TestDiscovery(t *testing.T) {
	t.Parallel()
	s := startServer(t, time.Hour, machine("machine", nil))
	const rest = `client_id: machine, client_secret: {value: "` + secret + `"}, client_credentials: {}`
	b := s.startBroker(strings.ReplaceAll(`
profiles:
  - {name: discovered, oauth2: {issuer: "<http>", `+rest+`}}
  - {name: given, oauth2: {token_url: "<http>/token", revocation_url: "<http>/token/revocation", `+rest+`}}
  - {name: mistaken, oauth2: {issuer: "<localhost>", `+rest+`}}
`, "<localhost>", strings.Replace(s.http, "127.0.0.1", "localhost", 1)))
	for i, profile := range []string{"discovered", "given"} {
		if token := b.issue(profile); s.want("machine", i+1)[i].Access != token.GetId() {
			t.Errorf("%s has a token that the server did not issue", profile)
		}
	}
	b.refused("mistaken", "ENDPOINT_UNAVAILABLE")
	s.want("machine", 2)
	for _, profile := range []string{"discovered", "given"} {
		revoked, err := b.RevokeToken(b.within(), &tokenbrokerv1.RevokeTokenRequest{Profile: profile})
		if err != nil || revoked.GetOutcome() != tokenbrokerv1.RevocationOutcome_REVOCATION_OUTCOME_CONFIRMED {
			t.Errorf("revoking the token of %s: %v, %v", profile, revoked, err)
		}
	}
	s.want("machine", 4)
}
