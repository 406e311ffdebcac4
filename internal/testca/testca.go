// Package testca makes the certificates of tests: an authority of their own, and
// leaves with whatever a test wants in them.
package testca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"testing"
	"time"
)

// Authority is a certificate authority that one test trusts.
type Authority struct {
	t     testing.TB
	cert  *x509.Certificate
	key   *ecdsa.PrivateKey
	chain [][]byte // what leaves show of those above them: nothing for a root
}

// New returns an authority that nobody knew before.
func New(t testing.TB) *Authority {
	t.Helper()
	a := &Authority{t: t}
	a.cert, a.key = a.sign(authority("test CA"), nil)
	return a
}

func authority(name string) *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
}

// Intermediate returns an authority that this one has signed. Its leaves come
// with its certificate.
func (a *Authority) Intermediate(name string) *Authority {
	a.t.Helper()
	below := &Authority{t: a.t}
	below.cert, below.key = a.sign(authority(name), a.cert)
	below.chain = append([][]byte{below.cert.Raw}, a.chain...)
	return below
}

// sign makes a certificate with a key of its own; see signFor.
func (a *Authority) sign(template, parent *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	return a.signFor(key, template, parent), key
}

// signFor makes a certificate, by the authority, or by itself when parent is nil.
// Unless the template says otherwise it is valid for an hour before and after
// now, and has a serial number of its own.
func (a *Authority) signFor(key crypto.Signer, template, parent *x509.Certificate) *x509.Certificate {
	a.t.Helper()
	if template.SerialNumber == nil {
		template.SerialNumber = big.NewInt(time.Now().UnixNano())
	}
	if template.NotBefore.IsZero() {
		template.NotBefore = time.Now().Add(-time.Hour)
	}
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(time.Hour)
	}
	var signer crypto.Signer = a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert
}

// Leaf returns a certificate for clients and servers, as change completes it.
func (a *Authority) Leaf(change func(*x509.Certificate)) tls.Certificate {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	return a.LeafFor(key, change)
}

// LeafFor returns a certificate for a key that is there already.
func (a *Authority) LeafFor(key crypto.Signer, change func(*x509.Certificate)) tls.Certificate {
	a.t.Helper()
	template := &x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	change(template)
	cert := a.signFor(key, template, a.cert)
	return tls.Certificate{Certificate: append([][]byte{cert.Raw}, a.chain...), PrivateKey: key, Leaf: cert}
}

// RevocationList returns the authority's list of revoked certificates, DER, as
// change, which may be nil, completes it.
func (a *Authority) RevocationList(change func(*x509.RevocationList), revoked ...*x509.Certificate) []byte {
	a.t.Helper()
	template := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(time.Hour)}
	for _, c := range revoked {
		template.RevokedCertificateEntries = append(template.RevokedCertificateEntries, x509.RevocationListEntry{
			SerialNumber: c.SerialNumber, RevocationTime: time.Now().Add(-time.Minute),
		})
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateRevocationList(rand.Reader, template, a.cert, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return der
}

// Certificate is the authority's own.
func (a *Authority) Certificate() *x509.Certificate { return a.cert }

// Loopback is a change that makes a leaf a server's at 127.0.0.1.
func Loopback(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)} }

// Named is a change that gives a leaf these DNS names.
func Named(names ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.DNSNames = names }
}

// Pool trusts the authority alone.
func (a *Authority) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

// PEM is the authority's certificate.
func (a *Authority) PEM() []byte { return encode("CERTIFICATE", a.cert.Raw) }

// ListPEM is a revocation list in PEM.
func ListPEM(der []byte) []byte { return encode("X509 CRL", der) }

// PEM is a leaf's certificate, with those that it comes with, and its private
// key.
func PEM(t testing.TB, leaf tls.Certificate) (certificate, privateKey []byte) {
	t.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(leaf.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	for _, der := range leaf.Certificate {
		certificate = append(certificate, encode("CERTIFICATE", der)...)
	}
	return certificate, encode("PRIVATE KEY", key)
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}
