package access_test

import (
	"crypto/x509"
	"errors"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/testca"
)

// A chain that lasts must not make up for another's revocation.
func TestStanding(t *testing.T) {
	root, other := testca.New(t), testca.New(t)
	between := root.Intermediate("between")
	leaf, direct := worker(between), worker(root)
	long := []*x509.Certificate{leaf, between.Certificate(), root.Certificate()}
	ended := *between.Certificate() // as another authority has signed it
	ended.NotAfter = time.Now().Add(-time.Minute)
	short := []*x509.Certificate{leaf, &ended, other.Certificate()}
	none := revocations(t, []*testca.Authority{root, other})
	some := revocations(t, []*testca.Authority{root, other}, root.RevocationList(nil, between.Certificate()))
	one := []*x509.Certificate{direct, root.Certificate()}
	for name, c := range map[string]struct {
		chains      [][]*x509.Certificate
		authorities *x509.CertPool
		revocations *access.Revocations
		ends        time.Time
		stranger    bool // no authority
	}{
		"all as it was":                      {[][]*x509.Certificate{long, short}, nil, none, leaf.NotAfter, false},
		"no lists":                           {[][]*x509.Certificate{long}, nil, nil, leaf.NotAfter, false},
		"the chain that lasts is revoked":    {[][]*x509.Certificate{long, short}, nil, some, ended.NotAfter, false},
		"the same, the other way round":      {[][]*x509.Certificate{short, long}, nil, some, ended.NotAfter, false},
		"all are revoked":                    {[][]*x509.Certificate{long}, nil, some, time.Time{}, false},
		"the same authorities":               {[][]*x509.Certificate{long}, root.Pool(), none, leaf.NotAfter, false},
		"the intermediate alone":             {[][]*x509.Certificate{long}, between.Pool(), none, leaf.NotAfter, false},
		"another authority of the same name": {[][]*x509.Certificate{one}, other.Pool(), none, time.Time{}, true},
		"none at all":                        {[][]*x509.Certificate{one}, x509.NewCertPool(), none, time.Time{}, true},
		"the authority, and it is revoked":   {[][]*x509.Certificate{long}, root.Pool(), some, time.Time{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			ends, err := access.Standing(c.chains, c.authorities, c.revocations)
			if !ends.Equal(c.ends) || (err != nil) != c.ends.IsZero() || errors.Is(err, access.ErrNoAuthority) != c.stranger {
				t.Errorf("%v, %v", ends, err)
			}
		})
	}
}
