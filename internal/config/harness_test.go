package config_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/config"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

// canary marks every secret in these tests: it must turn up nowhere.
const canary = "Canary-7f3a9"

// variables are the environment of the tests.
var variables = map[string]string{"SECRET": canary + "-env", "EMPTY": "", "BLANKS": " " + canary + " ", "TOKEN": canary + "-0123456789", "SHORT": canary}

var options = config.Options{
	FingerprintKey: []byte("the key of these tests"),
	LookupEnv: func(name string) (string, bool) {
		value, ok := variables[name]
		return value, ok
	},
}

// minimal is a configuration in which everything has its default.
const minimal = `profiles:
  - name: p
    vantage:
      region: eu
      client_id: c
      client_secret: {env: SECRET}
      client_credentials: {}
`

// with returns text with old, which must be in it once, replaced.
func with(t testing.TB, text, old, replacement string) string {
	t.Helper()
	if strings.Count(text, old) != 1 {
		t.Fatalf("%q is %d times in the text", old, strings.Count(text, old))
	}
	return strings.Replace(text, old, replacement, 1)
}

func parse(text string) (*config.Config, error) {
	return config.Parse("/nowhere/broker.yaml", []byte(text), options)
}

func mustParse(t testing.TB, text string) *config.Config {
	t.Helper()
	c, err := parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// problems are what is wrong with text, without the file's name in front.
func problems(t testing.TB, text string) []string {
	t.Helper()
	_, err := parse(text)
	return shorten(t, err)
}

func shorten(t testing.TB, err error) []string {
	t.Helper()
	if err == nil {
		return nil
	}
	var found config.Problems
	if !errors.As(err, &found) {
		t.Fatalf("the error is %T, want Problems", err)
	}
	noCanary(t, err.Error())
	lines := make([]string, len(found))
	for i, p := range found {
		p.File = ""
		lines[i] = strings.TrimPrefix(p.String(), ":")
	}
	return lines
}

func warnings(t testing.TB, c *config.Config) []string {
	t.Helper()
	if len(c.Warnings) == 0 {
		return nil
	}
	return shorten(t, c.Warnings)
}

func noCanary(t testing.TB, text string) {
	t.Helper()
	if strings.Contains(text, canary) {
		t.Errorf("a secret is shown:\n%s", text)
	}
}

func equal(t testing.TB, got, want []string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("got\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

func write(t testing.TB, path, content string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// newKeyset is the content of a new keyset's file.
func newKeyset(t testing.TB) string {
	t.Helper()
	keyset, err := store.NewKeyset()
	if err != nil {
		t.Fatal(err)
	}
	return keyset.Reveal()
}

// authority is a certificate with its key, which can sign others.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{}
	a.certificate, a.key = a.sign(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "authority " + rand.Text()}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	})
	return a
}

// sign fills the template in; an authority without a certificate signs itself.
func (a *authority) sign(t testing.TB, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore = time.Now().Add(-48 * time.Hour)
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(time.Hour)
	}
	parent, signer := a.certificate, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return certificate, key
}

func certificatePEM(certificate *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate.Raw}))
}

func keyPEM(t testing.TB, key *ecdsa.PrivateKey) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// list is the authority's revocation list, as change completes it.
func (a *authority) list(t testing.TB, change func(*x509.RevocationList)) string {
	t.Helper()
	template := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(time.Hour)}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateRevocationList(rand.Reader, template, a.certificate, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}))
}

// writeServerFiles writes tls.crt, tls.key, ca.crt and ca.crl into directory.
func writeServerFiles(t testing.TB, directory string) {
	t.Helper()
	a := newAuthority(t)
	certificate, key := a.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: "server"}, DNSNames: []string{"localhost"}})
	write(t, filepath.Join(directory, "tls.crt"), certificatePEM(certificate))
	write(t, filepath.Join(directory, "tls.key"), keyPEM(t, key))
	write(t, filepath.Join(directory, "ca.crt"), certificatePEM(a.certificate))
	write(t, filepath.Join(directory, "ca.crl"), a.list(t, nil))
}

// again writes again.crt into directory: another certificate for tls.key.
func again(t testing.TB, directory string) {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(directory, "tls.crt"), filepath.Join(directory, "tls.key"))
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "again"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, pair.Leaf.PublicKey, pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(directory, "again.crt"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
}

// presented is what a Vantage profile's credential is called that presents these.
func presented(key []byte, secrets ...broker.Secret) string {
	how := []broker.Secret{broker.NewSecret("client_secret_post"), {}, {}}
	return broker.Fingerprint(key, append(how, secrets...)...)
}
