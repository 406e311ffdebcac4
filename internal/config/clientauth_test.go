package config_test

import (
	"context"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// asked is a token request as the server has seen it.
type asked struct {
	basic bool
	form  map[string]string
}

// authorizationServer grants everything, and tells what it was asked.
func authorizationServer(t *testing.T) (address string, requests <-chan asked) {
	t.Helper()
	seen := make(chan asked, 10)
	var server *httptest.Server
	server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch r.URL.Path {
		case "/.well-known/openid-configuration":
			fmt.Fprintf(w, `{"issuer": %q, "token_endpoint": %q, "authorization_endpoint": %q}`, server.URL, server.URL+"/token", server.URL+"/authorize")
		case "/token":
			_ = r.ParseForm()
			a := asked{form: map[string]string{}}
			_, _, a.basic = r.BasicAuth()
			for name := range r.PostForm {
				a.form[name] = r.PostForm.Get(name)
			}
			seen <- a
			fmt.Fprint(w, `{"access_token": "t", "token_type": "Bearer", "expires_in": 3600}`)
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(server.Close)
	return server.URL, seen
}

// part is one of a JWT's, decoded.
func part(t *testing.T, jwt string, i int) map[string]any {
	t.Helper()
	parts := strings.Split(jwt, ".")
	if len(parts) != 3 {
		t.Fatalf("%q is no JWT", jwt)
	}
	text, err := base64.RawURLEncoding.DecodeString(parts[i])
	if err != nil {
		t.Fatal(err)
	}
	var decoded map[string]any
	if err := json.Unmarshal(text, &decoded); err != nil {
		t.Fatal(err)
	}
	return decoded
}

// How the client proves itself is what the file says, or the provider's default.
func TestClientAuth(t *testing.T) {
	directory := t.TempDir()
	writeServerFiles(t, directory)
	address, requests := authorizationServer(t)
	const secret, key = "client_secret: {env: SECRET}", "client_auth: private_key_jwt, private_key: {file: $DIR/tls.key}"
	for _, test := range []struct {
		provider, client string
		basic            bool
		kid, aud         any
	}{
		{provider: "oauth2", client: secret, basic: true},
		{provider: "secureauth", client: secret},
		{provider: "oauth2", client: secret + ", client_auth: client_secret_post"},
		{provider: "secureauth", client: secret + ", client_auth: client_secret_basic", basic: true},
		{provider: "oauth2", client: key, aud: address},
		{provider: "secureauth", client: key + ", key_id: k", kid: "k", aud: address},
		{provider: "oauth2", client: key + ", assertion_audience: 'urn:a'", aud: "urn:a"},
		{provider: "secureauth", client: key + ", assertion_audience: 'urn:a', key_id: k", kid: "k", aud: "urn:a"},
	} {
		t.Run(test.provider+" "+test.client, func(t *testing.T) {
			text := fmt.Sprintf("profiles: [{name: p, scopes: [a], %s: {issuer: '%s', client_id: c, %s, client_credentials: {}}}]\n", test.provider, address, test.client)
			c := mustParse(t, strings.ReplaceAll(text, "$DIR", directory))
			if _, err := c.Profiles[0].Issuer.Issue(context.Background(), broker.Request{Scopes: []string{"a"}}); err != nil {
				t.Fatal(err)
			}
			got := <-requests
			if got.basic != test.basic || got.form["scope"] != "a" {
				t.Errorf("got %+v", got)
			}
			if test.aud == nil {
				if !test.basic && got.form["client_secret"] != variables["SECRET"] {
					t.Error("another secret was sent")
				}
				return
			}
			assertion := got.form["client_assertion"]
			if header, claims := part(t, assertion, 0), part(t, assertion, 1); header["kid"] != test.kid || claims["aud"] != test.aud || claims["sub"] != "c" {
				t.Errorf("got %v, %v", header, claims)
			}
		})
	}
}

func TestKeyMistakes(t *testing.T) {
	directory := t.TempDir()
	writeServerFiles(t, directory)
	write(t, filepath.Join(directory, "other.key"), keyPEM(t, newAuthority(t).key))
	write(t, filepath.Join(directory, "no.key"), canary)
	const of = "profiles[0].oauth2."
	profile := func(auth, key, certificate string) string {
		text := fmt.Sprintf("profiles:\n  - name: p\n    oauth2:\n      issuer: https://id.example.com\n      client_id: c\n      client_auth: %s\n      private_key: {file: %s/%s}\n", auth, directory, key)
		if certificate != "" {
			text += "      certificate: " + directory + "/" + certificate + "\n"
		}
		return text + "      client_credentials: {}\n"
	}
	for text, want := range map[string]string{
		profile("tls_client_auth", "tls.key", "tls.crt"):   "",
		profile("tls_client_auth", "other.key", "tls.crt"): "8:20: " + of + "certificate: does not belong to private_key: use the two that were made together, the client's own certificate first",
		profile("tls_client_auth", "no.key", "tls.crt"):    "7:20: " + of + "private_key: holds no private key in PEM (-----BEGIN PRIVATE KEY-----)",
		profile("tls_client_auth", "tls.key", "no.crt"):    "8:20: " + of + "certificate: reading the certificate from $DIR/no.crt: no such file or directory",
		profile("tls_client_auth", "tls.key", "no.key"):    "8:20: " + of + "certificate: $DIR/no.key: there is no certificate in it: it must be PEM, with BEGIN CERTIFICATE",
		profile("private_key_jwt", "tls.key", ""):          "",
		profile("private_key_jwt", "no.key", ""):           "7:20: " + of + "private_key: holds no private key in PEM (-----BEGIN PRIVATE KEY-----)",
	} {
		var all []string
		if want != "" {
			all = []string{strings.ReplaceAll(want, "$DIR", directory)}
		}
		equal(t, problems(t, text), all)
	}
}

// The end of one client's certificate keeps no other profile from being loaded.
func TestEndedClientCertificatesAreWarnedOf(t *testing.T) {
	directory := t.TempDir()
	end := time.Now().Add(-time.Hour)
	leaf, key := newAuthority(t).sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: "client"}, NotAfter: end})
	write(t, filepath.Join(directory, "tls.crt"), certificatePEM(leaf))
	write(t, filepath.Join(directory, "tls.key"), keyPEM(t, key))
	c := mustParse(t, minimal+fmt.Sprintf("  - {name: q, oauth2: {issuer: 'https://id.example.com', client_id: c, client_auth: tls_client_auth, certificate: %[1]s/tls.crt, "+
		"private_key: {file: %[1]s/tls.key}, client_credentials: {}}}\n", directory))
	equal(t, warnings(t, c), []string{
		"8:115: profiles[1].oauth2.certificate: " + directory + "/tls.crt has a certificate that ended at " + end.UTC().Format(time.RFC3339) + ": renew it"})
}

// A certificate that is replaced is another one for the profile, and is noticed.
func TestTheClientCertificateIsReadAgain(t *testing.T) {
	directory := t.TempDir()
	writeServerFiles(t, directory)
	text := fmt.Sprintf("profiles: [{name: p, oauth2: {issuer: 'https://id.example.com', client_id: c, client_auth: tls_client_auth, "+
		"private_key: {file: %[1]s/tls.key}, certificate: %[1]s/tls.crt, client_credentials: {}}}]\n", directory)
	r := startRig(t, write(t, filepath.Join(directory, "broker.yaml"), text), never)
	before := *r.credential.Load()
	again(t, directory)
	rename(t, filepath.Join(directory, "again.crt"), filepath.Join(directory, "tls.crt"))
	if err := <-r.changes; err != nil {
		t.Fatal(err)
	}
	if *r.credential.Load() == before {
		t.Error("the new certificate is not in use")
	}
}
