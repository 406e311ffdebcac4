package config_test

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/config"
)

// tlsText is a configuration with the three files in directory.
func tlsText(directory string) string {
	return minimal + fmt.Sprintf(`server:
  address: 0.0.0.0:7443
  tls:
    certificate: %[1]s/tls.crt
    private_key: %[1]s/tls.key
    client_ca: %[1]s/ca.crt
policy: [{callers: ["dns:x"], profiles: [p], allow: [issue]}]
`, directory)
}

func TestTLS(t *testing.T) {
	directory := t.TempDir()
	writeServerFiles(t, directory)
	c := mustParse(t, tlsText(directory))
	equal(t, warnings(t, c), nil)
	got := c.Server.TLS
	if got == nil || got.ClientAuth != tls.RequireAndVerifyClientCert || got.MinVersion != tls.VersionTLS13 || got.ClientCAs == nil || len(got.Certificates) != 1 {
		t.Fatalf("got %+v", got)
	}
	older := mustParse(t, with(t, tlsText(directory), "  tls:\n", "  tls:\n    min_version: 1.2\n"))
	if older.Server.TLS.MinVersion != tls.VersionTLS12 {
		t.Errorf("got version %x, want 1.2", older.Server.TLS.MinVersion)
	}
}

func TestTLSMistakes(t *testing.T) {
	ca := newAuthority(t)
	leaf, key := ca.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: "server"}})
	_, otherKey := ca.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: "other"}})
	const certificate, privateKey, clientCA = "11:18: server.tls.certificate: ", "12:18: server.tls.private_key: ", "13:16: server.tls.client_ca: "
	for name, test := range map[string]struct{ file, content, want string }{
		"no certificate":  {"tls.crt", keyPEM(t, key), certificate + "$DIR/tls.crt: there is no certificate in it: it must be PEM, with BEGIN CERTIFICATE"},
		"bad certificate": {"tls.crt", strings.Replace(certificatePEM(leaf), "MII", "AAA", 1), certificate + "$DIR/tls.crt: certificate 1 cannot be read: x509: malformed certificate"},
		"empty":           {"tls.crt", "", certificate + "$DIR/tls.crt: there is no certificate in it: it must be PEM, with BEGIN CERTIFICATE"},
		"no key":          {"tls.key", canary, privateKey + "$DIR/tls.key has no private key that can be used: it must be PEM and not encrypted"},
		"encrypted key":   {"tls.key", string(pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte(canary)})), privateKey + "$DIR/tls.key has no private key that can be used: it must be PEM and not encrypted"},
		"another key":     {"tls.key", keyPEM(t, otherKey), privateKey + "$DIR/tls.key does not belong to the certificate in $DIR/tls.crt: use the two that were made together"},
		"no authority":    {"ca.crt", certificatePEM(ca.certificate) + certificatePEM(leaf), clientCA + "$DIR/ca.crt: certificate 2 is not that of an authority (CA): remove it"},
		"half a chain":    {"tls.crt", certificatePEM(leaf) + certificatePEM(ca.certificate)[:100], certificate + "$DIR/tls.crt: what comes after 1 certificates is cut off"},
		"no CA at all":    {"ca.crt", "\n", clientCA + "$DIR/ca.crt: there is no certificate in it: it must be PEM, with BEGIN CERTIFICATE"},
	} {
		t.Run(name, func(t *testing.T) {
			directory := t.TempDir()
			write(t, filepath.Join(directory, "tls.crt"), certificatePEM(leaf))
			write(t, filepath.Join(directory, "tls.key"), keyPEM(t, key))
			write(t, filepath.Join(directory, "ca.crt"), certificatePEM(ca.certificate))
			write(t, filepath.Join(directory, test.file), test.content)
			equal(t, problems(t, tlsText(directory)), []string{strings.ReplaceAll(test.want, "$DIR", directory)})
		})
	}
}

func TestEndedCertificatesAreWarnedOf(t *testing.T) {
	directory := t.TempDir()
	ca := newAuthority(t)
	end := time.Now().Add(-time.Hour)
	leaf, key := ca.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: "server"}, NotAfter: end})
	write(t, filepath.Join(directory, "tls.crt"), certificatePEM(leaf))
	write(t, filepath.Join(directory, "tls.key"), keyPEM(t, key))
	write(t, filepath.Join(directory, "ca.crt"), certificatePEM(ca.certificate))
	equal(t, warnings(t, mustParse(t, tlsText(directory))), []string{
		"11:18: server.tls.certificate: " + directory + "/tls.crt has a certificate that ended at " + end.UTC().Format(time.RFC3339) + ": renew it",
	})
}

func TestNoPolicyWithTLSIsWarnedOf(t *testing.T) {
	directory := t.TempDir()
	writeServerFiles(t, directory)
	text, _, _ := strings.Cut(tlsText(directory), "policy:")
	c, err := config.Parse("broker.yaml", []byte(text), options)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, warnings(t, c), []string{"1:1: policy: there is no rule, so nobody may do anything: add one that says which callers may use which profiles"})
}
