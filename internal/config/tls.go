package config

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
)

// serverTLS returns what the server needs, or nil when there are problems.
func (l *load) serverTLS(message *configv1.ServerTls) *tls.Config {
	const at = "server.tls"
	certificate := l.certificate(at, message)
	authorities := l.authorities(child(at, "client_ca"), message.GetClientCa())
	if certificate == nil || authorities == nil {
		return nil
	}
	version := uint16(tls.VersionTLS13)
	if message.GetMinVersion() == "1.2" {
		version = tls.VersionTLS12
	}
	return &tls.Config{
		Certificates: []tls.Certificate{*certificate},
		ClientCAs:    authorities,
		ClientAuth:   tls.RequireAndVerifyClientCert,
		MinVersion:   version,
		// A resumed session would skip what has changed about callers since.
		SessionTicketsDisabled: true,
	}
}

// adminTLS returns what the admin address needs. What could not be read is
// missing in it, and a problem.
func (l *load) adminTLS(message *configv1.AdminTls) *tls.Config {
	const at = "admin.tls"
	c := &tls.Config{MinVersion: tls.VersionTLS12, SessionTicketsDisabled: true} // as for the server
	if certificate := l.certificate(at, message); certificate != nil {
		c.Certificates = []tls.Certificate{*certificate}
	}
	if message.GetClientCa() != "" {
		c.ClientAuth, c.ClientCAs = tls.VerifyClientCertIfGiven, l.authorities(child(at, "client_ca"), message.GetClientCa())
	}
	return c
}

// redisTLS returns what a client of Redis needs. What could not be read is
// missing in it, and a problem.
func (l *load) redisTLS(message *configv1.RedisTls) *tls.Config {
	const at = "store.redis.tls"
	c := &tls.Config{ServerName: message.GetServerName(), MinVersion: tls.VersionTLS12}
	if message.GetCa() != "" {
		c.RootCAs = l.authorities(child(at, "ca"), message.GetCa())
	}
	if message.GetCertificate() != "" {
		if certificate := l.certificate(at, message); certificate != nil {
			c.Certificates = []tls.Certificate{*certificate}
		}
	}
	return c
}

// keyPair is what every message about TLS names.
type keyPair interface {
	GetCertificate() string
	GetPrivateKey() string
}

func (l *load) certificate(at string, message keyPair) *tls.Certificate {
	keyAt := child(at, "private_key")
	chain := l.chain(child(at, "certificate"), message.GetCertificate())
	key := l.pemFile(keyAt, message.GetPrivateKey(), "private key")
	if chain == nil || key == nil {
		return nil
	}
	l.warnIfOpen(message.GetPrivateKey(), keyAt)
	// The certificate is right, so every error is the key's.
	pair, err := tls.X509KeyPair(chain, key)
	switch {
	case err == nil:
		return &pair
	case strings.Contains(err.Error(), "does not match"):
		l.problem(keyAt, fmt.Sprintf("%s does not belong to the certificate in %s: use the two that were made together",
			l.shown(message.GetPrivateKey()), l.shown(message.GetCertificate())))
	default:
		l.problem(keyAt, fmt.Sprintf("%s has no private key that can be used: it must be PEM and not encrypted", l.shown(message.GetPrivateKey())))
	}
	return nil
}

// chain returns the content of a certificate's file, PEM, or nil when there are
// problems.
func (l *load) chain(at, name string) []byte {
	data := l.pemFile(at, name, "certificate")
	if data == nil || !l.checkChain(at, name, data) {
		return nil
	}
	return data
}

func (l *load) pemFile(at, name, what string) []byte {
	if l.tainted[at] || name == "" {
		return nil
	}
	data, err := l.files.read(l.absolute(name), maxFile)
	if err != nil {
		l.problem(at, fmt.Sprintf("reading the %s from %s: %v", what, l.shown(name), err))
		return nil
	}
	return data
}

func (l *load) checkChain(at, name string, data []byte) bool {
	chain, err := certificates(data)
	if err != nil {
		l.problem(at, fmt.Sprintf("%s: %v", l.shown(name), err))
		return false
	}
	l.warnOfEnd(at, name, chain[:1])
	return true
}

// authorities are who may sign the other side's certificates. A certificate
// that is none would, as a root, vouch for whoever holds its key.
func (l *load) authorities(at, name string) *x509.CertPool {
	data := l.pemFile(at, name, "authorities' certificates")
	if data == nil {
		return nil
	}
	found, err := certificates(data)
	if err != nil {
		l.problem(at, fmt.Sprintf("%s: %v", l.shown(name), err))
		return nil
	}
	pool := x509.NewCertPool()
	for i, certificate := range found {
		if !certificate.BasicConstraintsValid || !certificate.IsCA {
			l.problem(at, fmt.Sprintf("%s: certificate %d is not that of an authority (CA): remove it", l.shown(name), i+1))
			return nil
		}
		pool.AddCert(certificate)
	}
	l.warnOfEnd(at, name, found)
	return pool
}

// certificates reads all there are in PEM, one at least.
func certificates(data []byte) ([]*x509.Certificate, error) {
	var found []*x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d cannot be read: %w", len(found)+1, err)
		}
		found = append(found, certificate)
	}
	if len(found) == 0 {
		return nil, errors.New("there is no certificate in it: it must be PEM, with BEGIN CERTIFICATE")
	}
	return found, nil
}

// warnOfEnd warns of certificates that are out of their time. It may be the
// clock that is wrong, so the server is not kept from starting.
func (l *load) warnOfEnd(at, name string, chain []*x509.Certificate) {
	now := time.Now()
	for _, certificate := range chain {
		switch {
		case now.After(certificate.NotAfter):
			l.warning(at, fmt.Sprintf("%s has a certificate that ended at %s: renew it", l.shown(name), certificate.NotAfter.UTC().Format(time.RFC3339)))
		case now.Before(certificate.NotBefore):
			l.warning(at, fmt.Sprintf("%s has a certificate that begins at %s: check the clock", l.shown(name), certificate.NotBefore.UTC().Format(time.RFC3339)))
		}
	}
}
