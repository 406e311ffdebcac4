package access_test

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/testca"
)

func parseList(t testing.TB, der []byte) *x509.RevocationList {
	t.Helper()
	all, err := access.ParseLists(der)
	if err != nil || len(all) != 1 {
		t.Fatalf("%d lists, %v", len(all), err)
	}
	return all[0]
}

func revocations(t testing.TB, authorities []*testca.Authority, lists ...[]byte) *access.Revocations {
	t.Helper()
	r := access.NewRevocations(certificatesOf(authorities...))
	for _, l := range lists {
		if err := r.Add(parseList(t, l)); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func certificatesOf(authorities ...*testca.Authority) (all []*x509.Certificate) {
	for _, a := range authorities {
		all = append(all, a.Certificate())
	}
	return all
}

func worker(a *testca.Authority) *x509.Certificate { return a.Leaf(testca.Named("worker")).Leaf }

// TestRevocationsOfChains has an authority above an intermediate, and another of
// the same name beside it.
func TestRevocationsOfChains(t *testing.T) {
	root, stranger := testca.New(t), testca.New(t) // one name, two keys
	between := root.Intermediate("between")
	below := between.Intermediate("below")
	leaf, direct, lowest := worker(between), worker(root), worker(below)
	same := stranger.Leaf(func(c *x509.Certificate) { c.SerialNumber = direct.SerialNumber }).Leaf
	roots := []*testca.Authority{root, stranger}
	all := append(roots, between)
	long := []*x509.Certificate{leaf, between.Certificate(), root.Certificate()}
	short := []*x509.Certificate{leaf, between.Certificate()} // between is believed by itself
	higher := func(l *x509.RevocationList) { l.Number = big.NewInt(1000) }
	late := func(l *x509.RevocationList) { l.NextUpdate = time.Now().Add(-time.Minute) }
	for name, c := range map[string]struct {
		r       *access.Revocations
		chain   []*x509.Certificate
		revoked bool
	}{
		"nothing is configured":                         {nil, long, false},
		"no chain":                                      {revocations(t, roots, root.RevocationList(nil)), nil, false},
		"no list":                                       {revocations(t, roots), long, false},
		"an empty list":                                 {revocations(t, roots, root.RevocationList(nil)), long, false},
		"the leaf":                                      {revocations(t, roots, root.RevocationList(nil, direct)), []*x509.Certificate{direct, root.Certificate()}, true},
		"another leaf":                                  {revocations(t, roots, root.RevocationList(nil, worker(root))), []*x509.Certificate{direct, root.Certificate()}, false},
		"the intermediate":                              {revocations(t, roots, root.RevocationList(nil, between.Certificate())), long, true},
		"the leaf, by the intermediate":                 {revocations(t, all, between.RevocationList(nil, leaf)), long, true},
		"the leaf's number, by the root":                {revocations(t, roots, root.RevocationList(nil, leaf)), long, false},
		"the leaf, the intermediate is believed":        {revocations(t, all, between.RevocationList(nil, leaf)), short, true},
		"the intermediate, though it is believed":       {revocations(t, all, root.RevocationList(nil, between.Certificate())), short, true},
		"a namesake's leaf of the same number":          {revocations(t, roots, root.RevocationList(nil, direct)), []*x509.Certificate{same, stranger.Certificate()}, false},
		"an authority two steps above the believed one": {revocations(t, append(all, below), root.RevocationList(nil, between.Certificate())), []*x509.Certificate{lowest, below.Certificate()}, true},
		"a namesake above the believed one":             {revocations(t, all, stranger.RevocationList(nil, between.Certificate())), short, false},
		"a list that is late":                           {revocations(t, roots, root.RevocationList(late, direct)), []*x509.Certificate{direct, root.Certificate()}, true},
		"the newer list has it":                         {revocations(t, roots, root.RevocationList(nil), root.RevocationList(higher, direct)), []*x509.Certificate{direct, root.Certificate()}, true},
		"the newer list came first":                     {revocations(t, roots, root.RevocationList(higher, direct), root.RevocationList(nil)), []*x509.Certificate{direct, root.Certificate()}, true},
		"the newer list has it no more":                 {revocations(t, roots, root.RevocationList(nil, direct), root.RevocationList(higher)), []*x509.Certificate{direct, root.Certificate()}, false},
	} {
		t.Run(name, func(t *testing.T) {
			err := c.r.Check(c.chain)
			if (err != nil) != c.revoked {
				t.Errorf("got %v, want revoked: %t", err, c.revoked)
			}
			if err != nil && !strings.Contains(err.Error(), "has been revoked by CN=") {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestOneGoodChainIsEnough(t *testing.T) {
	root, other := testca.New(t), testca.New(t)
	between := root.Intermediate("between")
	leaf := worker(between)
	long, short := []*x509.Certificate{leaf, between.Certificate(), root.Certificate()}, []*x509.Certificate{leaf, between.Certificate(), other.Certificate()}
	r := revocations(t, []*testca.Authority{root, other}, root.RevocationList(nil, between.Certificate()))
	for name, c := range map[string]struct {
		chains [][]*x509.Certificate
		good   bool
	}{
		"none":                {nil, true},
		"a revoked one":       {[][]*x509.Certificate{long}, false},
		"two revoked ones":    {[][]*x509.Certificate{long, long}, false},
		"and then a good":     {[][]*x509.Certificate{long, short}, true},
		"a good one at first": {[][]*x509.Certificate{short, long}, true},
	} {
		if err := r.CheckChains(c.chains); (err == nil) != c.good {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := (*access.Revocations)(nil).CheckChains([][]*x509.Certificate{long}); err != nil {
		t.Error(err)
	}
}

// extension changes a list by one that says what it likes.
func extension(critical bool, id asn1.ObjectIdentifier, value []byte) func(*x509.RevocationList) {
	return func(l *x509.RevocationList) {
		l.ExtraExtensions = append(l.ExtraExtensions, pkix.Extension{Id: id, Critical: critical, Value: value})
	}
}

var scopeID = asn1.ObjectIdentifier{2, 5, 29, 28}

// scope is an issuing distribution point with these fields.
func scope(fields ...[]byte) []byte {
	content := bytes.Join(fields, nil)
	return append([]byte{0x30, byte(len(content))}, content...)
}

// point is a distribution point's full name.
func point(uri string) []byte {
	name := append([]byte{0x86, byte(len(uri))}, uri...)
	full := append([]byte{0xa0, byte(len(name))}, name...)
	return append([]byte{0xa0, byte(len(full))}, full...)
}

func TestListsThatAreRefused(t *testing.T) {
	a, namesake := testca.New(t), testca.New(t)
	below := a.Intermediate("below")
	leaf := worker(a)
	flag := func(tag byte) []byte { return []byte{0x80 | tag, 1, 0xff} }
	entry := func(critical bool, id ...int) func(*x509.RevocationList) {
		return func(l *x509.RevocationList) {
			l.RevokedCertificateEntries[0].ExtraExtensions = []pkix.Extension{{Id: id, Critical: critical, Value: []byte{5, 0}}}
		}
	}
	for name, c := range map[string]struct {
		der  []byte
		want string // part of the error; empty for none
	}{
		"good":                               {a.RevocationList(nil, leaf), ""},
		"an unknown extension":               {a.RevocationList(extension(false, asn1.ObjectIdentifier{1, 2, 3}, []byte{5, 0}), leaf), ""},
		"a critical extension":               {a.RevocationList(extension(true, asn1.ObjectIdentifier{1, 2, 3}, []byte{5, 0}), leaf), "critical extension 1.2.3"},
		"an entry's extension":               {a.RevocationList(entry(false, 2, 5, 29, 29), leaf), ""},
		"an entry's critical extension":      {a.RevocationList(entry(true, 2, 5, 29, 29), leaf), "critical extension 2.5.29.29"},
		"a delta":                            {a.RevocationList(extension(true, asn1.ObjectIdentifier{2, 5, 29, 27}, []byte{2, 1, 1}), leaf), "delta"},
		"a named distribution point":         {a.RevocationList(extension(true, scopeID, scope(point("http://ca/1.crl"))), leaf), ""},
		"users' certificates only":           {a.RevocationList(extension(true, scopeID, scope(flag(1))), leaf), "only some of its issuer's certificates"},
		"authorities' certificates only":     {a.RevocationList(extension(true, scopeID, scope(point("http://ca/1.crl"), flag(2))), leaf), "only some of its issuer's certificates"},
		"some reasons only":                  {a.RevocationList(extension(true, scopeID, scope([]byte{0x83, 2, 1, 0x40})), leaf), "only some of its issuer's certificates"},
		"an indirect list":                   {a.RevocationList(extension(true, scopeID, scope(flag(4))), leaf), "indirect"},
		"a broken distribution point":        {a.RevocationList(extension(true, scopeID, []byte{0x30, 9, 0x80}), leaf), "cannot be read"},
		"another kind of distribution point": {a.RevocationList(extension(true, scopeID, []byte{4, 0}), leaf), "cannot be read"},
		"of a namesake":                      {namesake.RevocationList(nil, leaf), "no authority called \"CN=test CA\" has signed it"},
		"of an authority that is not known":  {below.RevocationList(nil, leaf), "\"CN=below\" is not among the authorities of client_ca"},
	} {
		t.Run(name, func(t *testing.T) {
			err := access.NewRevocations(certificatesOf(a)).Add(parseList(t, c.der))
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}

	// Shards of one authority's certificates: each has a distribution point.
	r := revocations(t, []*testca.Authority{a}, a.RevocationList(extension(true, scopeID, scope(point("http://ca/1.crl")))))
	if err := r.Add(parseList(t, a.RevocationList(extension(true, scopeID, scope(point("http://ca/2.crl")))))); err == nil || !strings.Contains(err.Error(), "one list must have them all") {
		t.Errorf("two shards: %v", err)
	}
}

func TestParseLists(t *testing.T) {
	a, b := testca.New(t), testca.New(t)
	one, two := a.RevocationList(nil), b.RevocationList(nil)
	for name, c := range map[string]struct {
		data  []byte
		lists int
	}{
		"DER":                   {one, 1},
		"PEM":                   {testca.ListPEM(one), 1},
		"two, and what else":    {bytes.Join([][]byte{[]byte("of today\n"), testca.ListPEM(one), a.PEM(), testca.ListPEM(two)}, nil), 2},
		"nothing":               {nil, 0},
		"certificates only":     {a.PEM(), 0},
		"cut off":               {one[:len(one)-1], 0},
		"the second is cut off": {append(testca.ListPEM(one), testca.ListPEM(two)[:100]...), 0},
		"a broken one in PEM":   {append(testca.ListPEM(one), testca.ListPEM(two[:20])...), 0},
	} {
		if all, err := access.ParseLists(c.data); len(all) != c.lists || (err != nil) != (c.lists == 0) {
			t.Errorf("%s: %d lists, %v", name, len(all), err)
		}
	}
}

func TestListsInUse(t *testing.T) {
	a, b := testca.New(t), testca.New(t).Intermediate("below")
	due := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	r := revocations(t, []*testca.Authority{a, b, b}, b.RevocationList(func(l *x509.RevocationList) { l.NextUpdate = due }, worker(b), worker(b)))
	if got := r.Lists(); len(got) != 1 || got[0] != (access.List{Issuer: "CN=below", NextUpdate: due, Revoked: 2}) {
		t.Errorf("got %+v", got)
	}
	if got := r.Uncovered(); len(got) != 1 || got[0] != "CN=test CA" {
		t.Errorf("without a list: %v", got)
	}
	if (*access.Revocations)(nil).Lists() != nil {
		t.Error("nothing has lists")
	}
}

// large is a list of 100,000 certificates.
func large(t testing.TB, a *testca.Authority) []byte {
	return a.RevocationList(func(l *x509.RevocationList) {
		for i := range 100_000 {
			serial := new(big.Int).Add(new(big.Int).Lsh(big.NewInt(1), 120), big.NewInt(int64(i)))
			l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: serial, RevocationTime: time.Now()})
		}
	})
}

func BenchmarkLoad100000(b *testing.B) {
	a := testca.New(b)
	pem := testca.ListPEM(large(b, a))
	b.SetBytes(int64(len(pem)))
	var before, after runtime.MemStats
	var r *access.Revocations
	for b.Loop() {
		all, err := access.ParseLists(pem)
		if err != nil {
			b.Fatal(err)
		}
		r = access.NewRevocations(certificatesOf(a))
		if err := r.Add(all[0]); err != nil {
			b.Fatal(err)
		}
	}
	runtime.GC()
	runtime.ReadMemStats(&before)
	runtime.KeepAlive(r)
	r = nil
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric((float64(before.HeapAlloc)-float64(after.HeapAlloc))/(1<<20), "MiB-kept")
}

func BenchmarkCheck(b *testing.B) {
	a := testca.New(b)
	between := a.Intermediate("between")
	leaf := worker(between)
	r := revocations(b, []*testca.Authority{a, between}, large(b, a), large(b, between))
	chain := []*x509.Certificate{leaf, between.Certificate(), a.Certificate()}
	b.ReportAllocs()
	for b.Loop() {
		if err := r.Check(chain); err != nil {
			b.Fatal(err)
		}
	}
}
