package config_test

import (
	"crypto/tls"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/config"
)

func TestForwarders(t *testing.T) {
	c := mustParse(t, minimal+`server:
  address: unix:/run/broker.sock
  forwarders:
    - {peers: ["unix:uid:1337"], header: x-forwarded-client-cert, callers: ["spiffe://prod/ns/*/sa/*"]}
    - {peers: ["unix:uid:2102", "unix:uid:0"], header: l5d-client-id}
policy: [{callers: ["spiffe://prod/ns/batch/sa/*"], profiles: [p], allow: [issue]}]
`)
	equal(t, warnings(t, c), nil)
	envoy := &access.Caller{Name: "unix:uid:1337", Proof: access.UnixPeer}
	if got, err := c.Server.Forwarders.Caller(envoy, access.EnvoyHeader, "URI=spiffe://prod/ns/a/sa/b"); err != nil || got.Name != "spiffe://prod/ns/a/sa/b" {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := c.Server.Forwarders.Caller(envoy, access.EnvoyHeader, "URI=spiffe://other/ns/a/sa/b"); err == nil {
		t.Errorf("for somebody else's: %v", got)
	}
	if !c.Server.Forwarders.Believes(&access.Caller{Name: "unix:uid:2102", Proof: access.UnixPeer}, access.LinkerdHeader) {
		t.Error("the second rule is missing")
	}
	if c := mustParse(t, minimal); c.Server.Forwarders != nil {
		t.Errorf("without any: %v", c.Server.Forwarders.Rules())
	}
}

func TestForwardersThatCannotBe(t *testing.T) {
	const (
		noPeer = "is no proxy's name: write spiffe:// or dns: and the name in its certificate, or unix:uid: and the number of its user"
		noOne  = "is no name that a certificate can have: it begins with spiffe:// or dns: and goes on with a whole name"
	)
	equal(t, problems(t, minimal+`server:
  forwarders:
    - {peers: [anonymous, "k8s://c/n/a", "dns:ok", "unix:gid:1"], header: x-forwarded-client-cert}
    - {peers: ["dns:ok", "a b"], header: x-forwarded-for, callers: ["unix:uid:1", "spiffe://prod/*", "*"]}
    - {peers: [], header: l5d-client-id}
    - {peers: ["dns:ok"]}
`), []string{
		"10:16: server.forwarders[0].peers[0]: " + noPeer,
		"10:27: server.forwarders[0].peers[1]: " + noPeer,
		"10:52: server.forwarders[0].peers[3]: " + noPeer,
		"11:26: server.forwarders[1].peers[1]: must be printable ASCII without blanks, for example spiffe://prod/ns/mesh/sa/gateway, dns:envoy.example.com or unix:uid:1337",
		"11:42: server.forwarders[1].header: must be one of x-forwarded-client-cert, l5d-client-id",
		"11:69: server.forwarders[1].callers[0]: " + noOne,
		"11:102: server.forwarders[1].callers[2]: " + noOne,
		"12:15: server.forwarders[2].peers: must have at least 1 item",
		"13:7: server.forwarders[3].header: is missing: add it",
	})
}

// A proxy that can never prove who it is is a mistake.
func TestForwardersThatCannotProveThemselves(t *testing.T) {
	const list = "forwarders: [{peers: ['unix:uid:7', 'dns:envoy'], header: l5d-client-id}]"
	c := mustParse(t, minimal+"server: {"+list+"}\n")
	equal(t, warnings(t, c), []string{
		"8:32: server.forwarders[0].peers[0]: nobody can prove to be this user here: that takes a server.address on a unix socket, without tls",
		"8:46: server.forwarders[0].peers[1]: nobody can prove to have this name here: that takes a client certificate, and so server.tls",
	})
	c = mustParse(t, minimal+"server: {address: 'unix:/s', "+list+"}\n")
	equal(t, warnings(t, c)[:1], []string{
		"1:1: policy: there is no rule, so nobody may do anything: add one that says which callers may use which profiles",
	})
	if len(c.Warnings) != 2 || c.Warnings[1].Path != "server.forwarders[0].peers[1]" {
		t.Errorf("on a socket: %v", c.Warnings)
	}
}

// Where tokens can prove who a caller is, a certificate may be missing; there
// only.
func TestCertificatesAreOptionalBesideTokens(t *testing.T) {
	directory := t.TempDir()
	writeServerFiles(t, directory)
	write(t, filepath.Join(directory, "jwks.json"), aKeySet)
	const accounts = ", service_accounts: [{cluster: prod, issuer: 'https://kubernetes.default.svc', audience: token-broker, jwks_file: $DIR/jwks.json}]"
	for text, want := range map[string]tls.ClientAuthType{"": tls.RequireAndVerifyClientCert, accounts: tls.VerifyClientCertIfGiven} {
		server := strings.Replace(tlsPart, "ca.crt}}", "ca.crt}"+text+"}", 1)
		c, err := config.Parse("broker.yaml", []byte(strings.ReplaceAll(minimal+server, "$DIR", directory)), options)
		if err != nil {
			t.Fatal(err)
		}
		if c.Server.TLS.ClientAuth != want {
			t.Errorf("%q: %v, want %v", text, c.Server.TLS.ClientAuth, want)
		}
	}
}

// aKeySet is the public key of RFC 7517 appendix A.1.
const aKeySet = `{"keys": [{"kty": "EC", "crv": "P-256", "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4", "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM", "use": "sig", "alg": "ES256", "kid": "1"}]}`

func TestSilenceOfPolicies(t *testing.T) {
	const (
		rule    = "policy: [{callers: ['unix:uid:1000'], profiles: [p], allow: [issue]}]\n"
		noRule  = "policy: there is no rule, so nobody may do anything: add one that says which callers may use which profiles"
		nobody  = "policy: callers are anonymous without tls, and no rule names them, so nobody may do anything: add tls, or a rule for anonymous"
		socket  = "server: {address: 'unix:/run/b.sock'}\n"
		account = "server: {service_accounts: [{cluster: prod, issuer: i, audience: a, jwks_file: $DIR/jwks.json}]}\n"
	)
	directory := t.TempDir()
	write(t, filepath.Join(directory, "jwks.json"), aKeySet)
	for text, want := range map[string]string{
		"": "", rule: nobody, socket: noRule, socket + rule: "", account + rule: "", account: "",
	} {
		c := mustParse(t, strings.ReplaceAll(minimal+text, "$DIR", directory))
		var got []string
		for _, w := range c.Warnings {
			if w.Path == "policy" {
				got = append(got, w.Path+": "+w.Message)
			}
		}
		if strings.Join(got, "\n") != want {
			t.Errorf("%s\ngot %q, want %q", text, got, want)
		}
	}
}
