package config

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
	"github.com/tokenbroker/tokenbroker/internal/access"
)

// serverTLS fills in what the server needs. TLS is nil when there are problems.
func (l *load) serverTLS(s *Server, message *configv1.ServerTls) {
	const at = "server.tls"
	c := newTLS(message.GetMinVersion())
	c.ClientAuth = tls.RequireAndVerifyClientCert
	if message.GetWorkloadApi() != nil {
		if len(message.GetClientCrl()) > 0 {
			l.problem(child(at, "client_crl"), "lists are checked with client_ca, which workload_api replaces: remove them, and let SPIFFE's certificates end soon")
		}
		s.TLS, s.WorkloadAPI = c, l.workloadAPI(child(at, "workload_api"), message.GetWorkloadApi())
		return
	}
	certificate := l.certificate(at, message)
	authorities := l.authorities(child(at, "client_ca"), message.GetClientCa())
	s.Revocations = l.revocations(child(at, "client_crl"), message.GetClientCrl(), authorities)
	if certificate == nil || authorities == nil {
		return
	}
	c.Certificates, c.ClientCAs, c.VerifyConnection = []tls.Certificate{*certificate}, poolOf(authorities), notRevoked(s.Revocations)
	s.TLS = c
}

// adminTLS fills in what the admin address needs. What could not be read is
// missing in it, and a problem.
func (l *load) adminTLS(a *Admin, message *configv1.AdminTls) {
	const at = "admin.tls"
	c := newTLS(message.GetMinVersion())
	if certificate := l.certificate(at, message); certificate != nil {
		c.Certificates = []tls.Certificate{*certificate}
	}
	if message.GetClientCa() != "" {
		authorities := l.authorities(child(at, "client_ca"), message.GetClientCa())
		a.Revocations = l.revocations(child(at, "client_crl"), message.GetClientCrl(), authorities)
		c.ClientAuth, c.ClientCAs, c.VerifyConnection = tls.VerifyClientCertIfGiven, poolOf(authorities), notRevoked(a.Revocations)
	} else if len(message.GetClientCrl()) > 0 {
		l.problem(child(at, "client_crl"), "has no effect without client_ca: add it, or remove the lists")
	}
	a.TLS = c
}

// newTLS returns what all listeners have in common.
func newTLS(minVersion string) *tls.Config {
	c := &tls.Config{
		MinVersion: tls.VersionTLS13,
		// A resumed session would skip what has changed about callers since.
		SessionTicketsDisabled: true,
	}
	if minVersion == "1.2" {
		c.MinVersion = tls.VersionTLS12
		// What TLS 1.3 would have: forward secrecy, and no more than one way to
		// get the encryption wrong.
		c.CipherSuites = []uint16{
			tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
			tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
			tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
		}
	}
	return c
}

// notRevoked is the last check of a handshake; nil when there is nothing to ask.
func notRevoked(r *access.Revocations) func(tls.ConnectionState) error {
	if r == nil {
		return nil
	}
	return func(state tls.ConnectionState) error { return r.CheckChains(state.VerifiedChains) }
}

// workloadAPI returns where the server's identity comes from.
func (l *load) workloadAPI(at string, message *configv1.WorkloadApi) *WorkloadAPI {
	const variable = "SPIFFE_ENDPOINT_SOCKET"
	w := &WorkloadAPI{Address: message.GetAddress(), TrustDomains: message.GetTrustDomains()}
	if w.Address != "" || l.tainted[child(at, "address")] {
		return w
	}
	switch w.Address, _ = l.lookupEnv(variable); {
	case w.Address == "":
		l.problem(child(at, "address"), "is missing: add it, or set "+variable)
	case !strings.HasPrefix(w.Address, "unix:/") && !strings.HasPrefix(w.Address, "tcp://"):
		l.problem(child(at, "address"), variable+" is not the address of a Workload API, such as unix:/run/spire/agent/public/api.sock")
	}
	return w
}

// revocations returns what lists of the authorities say; nil when none are named,
// or there are problems.
func (l *load) revocations(at string, names []string, authorities []*x509.Certificate) *access.Revocations {
	if len(names) == 0 {
		return nil
	}
	r := access.NewRevocations(authorities)
	usable := authorities != nil // or else that is the problem to tell
	for i, name := range names {
		usable = l.revocationLists(r, item(at, i), name, usable) && usable
	}
	if !usable {
		return nil
	}
	if names := r.Uncovered(); len(names) > 0 {
		l.warning(at, fmt.Sprintf("no list is of %s: certificates that it signs cannot be revoked", strings.Join(names, ", or of ")))
	}
	return r
}

// revocationLists adds the lists in one file, and reports whether that worked.
// The file is read in any case, so that it is watched.
func (l *load) revocationLists(r *access.Revocations, at, name string, usable bool) bool {
	data := l.fileOf(at, name, "revocation lists", maxList)
	if data == nil || !usable {
		return false
	}
	lists, err := access.ParseLists(data)
	if err != nil {
		l.passing(at, fmt.Sprintf("%s: %v", l.shown(name), err))
		return false
	}
	for i, list := range lists {
		if err := r.Add(list); err != nil {
			l.passing(at, fmt.Sprintf("%s: revocation list %d cannot be used: %v", l.shown(name), i+1, err))
			return false
		}
		if due := list.NextUpdate; !due.IsZero() && time.Now().After(due) {
			l.warning(at, fmt.Sprintf("%s has a list of %s that was to be replaced by %s: it is still used; get the newer one here",
				l.shown(name), list.Issuer, due.UTC().Format(time.RFC3339)))
		}
	}
	return true
}

// redisTLS returns what a client of Redis needs. What could not be read is
// missing in it, and a problem.
func (l *load) redisTLS(message *configv1.RedisTls) *tls.Config {
	const at = "store.redis.tls"
	c := &tls.Config{ServerName: message.GetServerName(), MinVersion: tls.VersionTLS12}
	if message.GetCa() != "" {
		c.RootCAs = poolOf(l.authorities(child(at, "ca"), message.GetCa()))
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
		l.passing(keyAt, fmt.Sprintf("%s does not belong to the certificate in %s: use the two that were made together",
			l.shown(message.GetPrivateKey()), l.shown(message.GetCertificate())))
	default:
		l.passing(keyAt, fmt.Sprintf("%s has no private key that can be used: it must be PEM and not encrypted", l.shown(message.GetPrivateKey())))
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

func (l *load) pemFile(at, name, what string) []byte { return l.fileOf(at, name, what, maxFile) }

// fileOf returns the content of a file, or nil when there are problems.
func (l *load) fileOf(at, name, what string, limit int) []byte {
	if l.tainted[at] || name == "" {
		return nil
	}
	data, err := l.files.read(l.absolute(name), limit)
	if err != nil {
		l.passing(at, fmt.Sprintf("reading the %s from %s: %v", what, l.shown(name), err))
		return nil
	}
	return data
}

func (l *load) checkChain(at, name string, data []byte) bool {
	chain, err := parseCertificates(data)
	if err != nil {
		l.passing(at, fmt.Sprintf("%s: %v", l.shown(name), err))
		return false
	}
	l.warnOfEnd(at, name, chain[:1])
	l.noteEnd(at, chain)
	return true
}

// authorities are who may sign the other side's certificates. A certificate
// that is none would, as a root, vouch for whoever holds its key.
func (l *load) authorities(at, name string) []*x509.Certificate {
	data := l.pemFile(at, name, "authorities' certificates")
	if data == nil {
		return nil
	}
	found, err := parseCertificates(data)
	if err != nil {
		l.passing(at, fmt.Sprintf("%s: %v", l.shown(name), err))
		return nil
	}
	for i, certificate := range found {
		if !certificate.BasicConstraintsValid || !certificate.IsCA {
			l.passing(at, fmt.Sprintf("%s: certificate %d is not that of an authority (CA): remove it", l.shown(name), i+1))
			return nil
		}
	}
	l.warnOfEnd(at, name, found)
	l.noteEnd(at, found)
	return found
}

// poolOf believes the authorities, and nobody else, even where there is none.
func poolOf(authorities []*x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, certificate := range authorities {
		pool.AddCert(certificate)
	}
	return pool
}

// noteEnd remembers when the first certificate of a field ends.
func (l *load) noteEnd(at string, found []*x509.Certificate) {
	end := found[0].NotAfter
	for _, certificate := range found {
		if certificate.NotAfter.Before(end) {
			end = certificate.NotAfter
		}
	}
	l.ends[at] = end
}

// certificates are those that were read, by names for people.
func (l *load) certificates(profiles []*configv1.Profile) []Certificate {
	names := map[string]string{
		"server.tls.certificate": "server", "server.tls.client_ca": "client_ca",
		"admin.tls.certificate": "admin", "admin.tls.client_ca": "admin_client_ca",
		"store.redis.tls.certificate": "redis", "store.redis.tls.ca": "redis_ca",
	}
	var all []Certificate
	for at, end := range l.ends {
		name, known := names[at]
		if !known {
			name = at
			var i int
			if _, err := fmt.Sscanf(at, "profiles[%d]", &i); err == nil && i < len(profiles) {
				name = "profile:" + profiles[i].GetName()
			}
		}
		all = append(all, Certificate{Name: name, End: end})
	}
	slices.SortFunc(all, func(a, b Certificate) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// parseCertificates reads all there are in PEM, one at least.
func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	var found []*x509.Certificate
	block, rest := pem.Decode(data)
	for ; block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		certificate, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d cannot be read: %w", len(found)+1, err)
		}
		found = append(found, certificate)
	}
	if bytes.Contains(rest, []byte("-----BEGIN ")) { // perhaps it is being written
		return nil, fmt.Errorf("what comes after %d certificates is cut off", len(found))
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
