package service

import (
	"crypto/x509"
	"log/slog"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

func newDoor(t *testing.T) *Service {
	t.Helper()
	b := broker.New(store.NewMemory(), broker.Options{})
	t.Cleanup(b.Close)
	s, err := New(Options{Broker: b, Logger: slog.New(slog.DiscardHandler), Authorizer: access.NewAuthorizer()})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// A certificate counts up to its last moment, of which it is the chain's that
// matters, and proxies are no longer believed either.
func TestCertificateCountsToItsLastMoment(t *testing.T) {
	s := newDoor(t)
	synctest.Test(t, func(t *testing.T) {
		leaf := &x509.Certificate{DNSNames: []string{"worker.example.com"}, NotAfter: time.Now().Add(2 * time.Hour)}
		authority := &x509.Certificate{NotAfter: time.Now().Add(time.Hour)}
		chains := [][]*x509.Certificate{{leaf, authority}}
		caller, err := access.IdentifyVerified(chains)
		if err != nil {
			t.Fatal(err)
		}
		shown := &certified{chains: chains, ends: access.End(chains)}
		ask := func() error { return s.identify(&call{peer: caller, certified: shown}) }
		time.Sleep(time.Hour)
		if err := ask(); err != nil {
			t.Errorf("in the last moment: %v", err)
		}
		time.Sleep(time.Nanosecond)
		if err := ask(); err == nil {
			t.Error("after the end: accepted")
		}
		authority.NotAfter = time.Now().Add(time.Hour)
		shown = &certified{chains: chains, ends: access.End(chains)}
		if err := ask(); err != nil {
			t.Error(err)
		}
	})
}

// A certificate is judged once for each Trust, and not for each call.
func TestCertificatesAreJudgedOncePerTrust(t *testing.T) {
	s := newDoor(t)
	c := &certified{chains: [][]*x509.Certificate{{{NotAfter: time.Now().Add(time.Hour)}}}, ends: time.Now().Add(time.Hour)}
	peer := &access.Caller{Name: "dns:worker.example.com", Proof: access.DNSSAN}
	var seen []*judgement
	for _, change := range []bool{false, false, true, false} {
		if change {
			s.SetTrust(Trust{})
		}
		if err := s.identify(&call{peer: peer, certified: c}); err != nil {
			t.Fatal(err)
		}
		seen = append(seen, c.judged.Load())
	}
	if seen[0] == nil || seen[0] != seen[1] || seen[1] == seen[2] || seen[2] != seen[3] {
		t.Errorf("judgements %v; want one for each Trust", seen)
	}
	k := &call{peer: peer, certified: c}
	if n := testing.AllocsPerRun(100, func() { _ = s.identify(k) }); n != 0 {
		t.Errorf("%v allocations a call", n)
	}
}

// The header's form is RFC 6750's.
func FuzzBearer(f *testing.F) {
	for _, s := range []string{"Bearer a", "bearer a.b.c", "Bearer", "Bearer  a", "Basic a", "Bearer a=", "Bearer =", "Bearer a b", "Bearer a,b", "\tBearer a", "Bearer \x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, value string) {
		token, why := bearer([]string{value})
		if why != "" {
			return
		}
		if token == "" {
			t.Fatalf("neither a token nor a reason for %q", value)
		}
		odd := slices.ContainsFunc([]byte(token), func(c byte) bool { return c <= ' ' || c > '~' || c == ',' || c == '"' || c == ';' })
		if odd || len(value) != len("Bearer ")+len(token) || len(value) > longestToken {
			t.Errorf("the token of %q is %q", value, token)
		}
	})
}
