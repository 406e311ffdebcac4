package access

import (
	"crypto/x509"
	"errors"
	"time"
)

// ErrNoAuthority is for a certificate that none of the authorities vouches for
// any more.
var ErrNoAuthority = errors.New("no authority that is believed by now vouches for the certificate")

// Standing judges what a handshake has verified, one chain at least, by what is
// believed now: by these authorities, nil being those of the handshake, and these
// lists. It returns when the last of the chains that are believed still ends,
// which may have been, or why none is: [ErrNoAuthority], or that it is revoked.
func Standing(chains [][]*x509.Certificate, authorities *x509.CertPool, revocations *Revocations) (time.Time, error) {
	if authorities != nil {
		if chains = under(authorities, chains); len(chains) == 0 {
			return time.Time{}, ErrNoAuthority
		}
	}
	var believed [][]*x509.Certificate
	var reason error
	for _, chain := range chains {
		if revoked := revocations.Check(chain); revoked != nil {
			reason = revoked
			continue
		}
		believed = append(believed, chain)
	}
	if len(believed) == 0 {
		return time.Time{}, reason
	}
	return End(believed), nil
}

// under verifies chains again, as a handshake of this moment would.
func under(authorities *x509.CertPool, chains [][]*x509.Certificate) [][]*x509.Certificate {
	above := x509.NewCertPool()
	for _, chain := range chains {
		for _, certificate := range chain[1:] {
			above.AddCert(certificate)
		}
	}
	found, err := chains[0][0].Verify(x509.VerifyOptions{
		Roots: authorities, Intermediates: above, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return nil
	}
	return found
}
