package access_test

import (
	"bytes"
	"crypto/x509"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/testca"
)

func certificate(t testing.TB, uris, dns []string) *x509.Certificate {
	t.Helper()
	c := &x509.Certificate{DNSNames: dns, NotAfter: time.Unix(1_900_000_000, 0)}
	c.Subject.CommonName = "cn.example.com"
	for _, s := range uris {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		c.URIs = append(c.URIs, u)
	}
	return c
}

func TestNamesInCertificates(t *testing.T) {
	label := strings.Repeat("l", 63)
	longDNS := strings.Join([]string{label, label, label, strings.Repeat("l", 61)}, ".")
	longURI := "spiffe://prod/" + strings.Repeat("p", 2048-len("spiffe://prod/"))
	for name, c := range map[string]struct {
		uris, dns []string
		want      string // empty: nobody
	}{
		"a SPIFFE ID":                   {[]string{"spiffe://prod/ns/batch/sa/worker"}, nil, "spiffe://prod/ns/batch/sa/worker"},
		"a SPIFFE ID and DNS names":     {[]string{"spiffe://prod/x"}, []string{"a.example.com", "b.example.com"}, "spiffe://prod/x"},
		"a SPIFFE ID in capitals":       {[]string{"spiffe://prod/ns/Batch"}, nil, "spiffe://prod/ns/Batch"},
		"the longest URI":               {[]string{longURI}, nil, longURI},
		"a longer URI":                  {[]string{longURI + "p"}, nil, ""},
		"the longest trust domain":      {[]string{"spiffe://" + strings.Repeat("d", 255) + "/x"}, nil, "spiffe://" + strings.Repeat("d", 255) + "/x"},
		"a longer trust domain":         {[]string{"spiffe://" + strings.Repeat("d", 256) + "/x"}, nil, ""},
		"no trust domain":               {[]string{"spiffe:///x"}, nil, ""},
		"no path":                       {[]string{"spiffe://prod"}, nil, ""},
		"the root's path":               {[]string{"spiffe://prod/"}, nil, ""},
		"a slash at the end":            {[]string{"spiffe://prod/x/"}, nil, ""},
		"an empty segment":              {[]string{"spiffe://prod/x//y"}, nil, ""},
		"a segment of one dot":          {[]string{"spiffe://prod/x/./y"}, nil, ""},
		"a segment of two dots":         {[]string{"spiffe://prod/x/../y"}, nil, ""},
		"two dots, escaped":             {[]string{"spiffe://prod/x/%2e%2e/y"}, nil, ""},
		"an escaped letter":             {[]string{"spiffe://prod/%61"}, nil, ""},
		"an escaped slash":              {[]string{"spiffe://prod/x%2fy"}, nil, ""},
		"a query":                       {[]string{"spiffe://prod/x?y"}, nil, ""},
		"an empty query":                {[]string{"spiffe://prod/x?"}, nil, ""},
		"a fragment":                    {[]string{"spiffe://prod/x#y"}, nil, ""},
		"a user":                        {[]string{"spiffe://user@prod/x"}, nil, ""},
		"a port":                        {[]string{"spiffe://prod:443/x"}, nil, ""},
		"a trust domain in capitals":    {[]string{"spiffe://Prod/x"}, nil, ""},
		"a wildcard as path":            {[]string{"spiffe://prod/*"}, nil, ""},
		"a blank":                       {[]string{"spiffe://prod/a%20b"}, nil, ""},
		"a line break":                  {[]string{"spiffe://prod/a%0ab"}, nil, ""},
		"letters of others":             {[]string{"spiffe://prod/пример"}, nil, ""},
		"no authority":                  {[]string{"spiffe:prod/x"}, nil, ""},
		"a bad URI beside a good name":  {[]string{"spiffe://prod"}, []string{"worker.example.com"}, ""},
		"two URIs":                      {[]string{"spiffe://prod/a", "spiffe://prod/b"}, nil, ""},
		"the same URI twice":            {[]string{"spiffe://prod/a", "spiffe://prod/a"}, nil, ""},
		"another scheme":                {[]string{"https://worker.example.com/x"}, nil, "https://worker.example.com/x"},
		"another scheme without a path": {[]string{"https://worker.example.com"}, nil, "https://worker.example.com"},
		"another scheme with a port":    {[]string{"https://worker.example.com:443/x"}, nil, ""},
		"a URN":                         {[]string{"urn:uuid:f81d4fae-7dec-11d0-a765-00a0c91e6bf6"}, nil, ""},
		"a DNS name as URI":             {[]string{"dns:worker.example.com"}, nil, ""},
		"a DNS URI":                     {[]string{"dns://worker.example.com"}, nil, ""},
		"a user as URI":                 {[]string{"unix:uid:0"}, nil, ""},
		"a user as URI with host":       {[]string{"unix://uid:0"}, nil, ""},
		"a unix URI":                    {[]string{"unix://uid/0"}, nil, ""},
		"a service account as URI":      {[]string{"k8s://prod/ns/sa"}, nil, ""},
		"the same in capitals":          {[]string{"K8S://prod/ns/sa"}, nil, ""},
		"anonymous as URI":              {[]string{"anonymous"}, nil, ""},
		"anonymous as scheme":           {[]string{"anonymous://x"}, nil, ""},
		"a DNS name":                    {nil, []string{"worker.example.com"}, "dns:worker.example.com"},
		"a DNS name in capitals":        {nil, []string{"Worker.EXAMPLE.com"}, "dns:worker.example.com"},
		"a DNS name with _":             {nil, []string{"my_worker.example.com"}, "dns:my_worker.example.com"},
		"one label":                     {nil, []string{"worker"}, "dns:worker"},
		"the longest DNS name":          {nil, []string{longDNS}, "dns:" + longDNS},
		"a longer DNS name":             {nil, []string{longDNS + "l"}, ""},
		"a longer label":                {nil, []string{label + "l.example.com"}, ""},
		"two DNS names":                 {nil, []string{"a.example.com", "b.example.com"}, ""},
		"a DNS wildcard":                {nil, []string{"*.example.com"}, ""},
		"a dot at the end":              {nil, []string{"worker.example.com."}, ""},
		"an empty label":                {nil, []string{"worker..example.com"}, ""},
		"a label that begins with -":    {nil, []string{"-worker.example.com"}, ""},
		"a DNS name with a line break":  {nil, []string{"worker\n.example.com"}, ""},
		"a DNS name with a blank":       {nil, []string{"a b"}, ""},
		"a DNS name with a colon":       {nil, []string{"uid:0"}, ""},
		"an address as DNS name":        {nil, []string{"10.0.0.1"}, ""},
		"an empty DNS name":             {nil, []string{""}, ""},
		"the common name only":          {nil, nil, ""},
	} {
		got := access.Identify(certificate(t, c.uris, c.dns))
		switch {
		case got == nil && c.want != "":
			t.Errorf("%s: nobody, want %s", name, c.want)
		case got != nil && got.Name != c.want:
			t.Errorf("%s: got %q, want %q", name, got.Name, c.want)
		case got != nil && (got.Expires != time.Unix(1_900_000_000, 0) || (got.Proof == access.URISAN) != (len(c.uris) == 1) || len(got.Groups) > 0):
			t.Errorf("%s: got %v proven by %v until %v", name, got.Name, got.Proof, got.Expires)
		}
	}
}

// A chain ends with the first of its certificates, and the caller with the last
// of the chains.
func TestChainsEnd(t *testing.T) {
	ends := func(seconds ...int64) (chain []*x509.Certificate) {
		for _, s := range seconds {
			c := certificate(t, nil, []string{"a.example.com"})
			c.NotAfter = time.Unix(s, 0)
			chain = append(chain, c)
		}
		return chain
	}
	for name, c := range map[string]struct {
		chains [][]*x509.Certificate
		want   int64
	}{
		"the leaf first":         {[][]*x509.Certificate{ends(10, 20, 30)}, 10},
		"what signed it first":   {[][]*x509.Certificate{ends(30, 10, 20)}, 10},
		"the other chain longer": {[][]*x509.Certificate{ends(30, 10), ends(30, 20)}, 20},
	} {
		got, err := access.IdentifyVerified(c.chains)
		if err != nil || got.Name != "dns:a.example.com" || !got.Expires.Equal(time.Unix(c.want, 0)) {
			t.Errorf("%s: %+v, %v; want the end at %d", name, got, err, c.want)
		}
	}
	if got, err := access.IdentifyVerified([][]*x509.Certificate{{certificate(t, nil, nil)}}); got != nil || err == nil {
		t.Errorf("without names: %v, %v", got, err)
	}
}

// Whatever a certificate says, a name fits on a line, has one spelling and is of
// the kind that its proof says.
func FuzzIdentify(f *testing.F) {
	for _, s := range []string{"spiffe://prod/x", "spiffe://prod/../x", "dns:x", "k8s://a/b/c", "https://h/p", "unix:uid:0", "spiffe://prod/%2e", "", "a\nb"} {
		f.Add(s, "", byte(0))
		f.Add("", s, byte(1))
		f.Add(s, s, byte(2))
	}
	f.Fuzz(func(t *testing.T, uri, dns string, which byte) {
		leaf := &x509.Certificate{}
		if which%3 != 1 {
			u, err := url.Parse(uri)
			if err != nil {
				return
			}
			leaf.URIs = []*url.URL{u}
		}
		if which%3 != 0 {
			leaf.DNSNames = []string{dns}
		}
		if c := access.Identify(leaf); c != nil {
			wellNamed(t, c)
		}
	})
}

// wellNamed checks what holds for any caller that a certificate names.
func wellNamed(t *testing.T, c *access.Caller) {
	t.Helper()
	scheme, rest, isURI := strings.Cut(c.Name, "://")
	isDNS := strings.HasPrefix(c.Name, "dns:")
	switch {
	case len(c.Name) > 2048 || strings.ContainsFunc(c.Name, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`"\*%?#@`, r) }):
	case isDNS == isURI || len(c.Groups) > 0:
	case isURI && (scheme == "dns" || scheme == "unix" || scheme == "k8s" || scheme != strings.ToLower(scheme) || rest == "" || strings.Contains(rest, "//") || strings.HasSuffix(rest, "/")):
	case isURI && (strings.Contains(rest+"/", "/../") || strings.Contains(rest+"/", "/./")):
	case isDNS && c.Name != strings.ToLower(c.Name):
	default:
		return
	}
	t.Errorf("caller %q, proven by %v", c.Name, c.Proof)
}

// What a certificate spells is the name, not what net/url makes of it.
func TestURIsAreTakenAsTheyAreSpelled(t *testing.T) {
	a := testca.New(t)
	for spelling, want := range map[string]string{
		"spiffe://prod/worker":   "spiffe://prod/worker",
		"SPIFFE://prod/worker":   "",
		"spiffe://prod/worker#":  "",
		"spiffe://prod/worker?":  "",
		"spiffe://prod/w%6frker": "",
		"spiffe://@prod/worker":  "",
		"spiffe://prod:/worker":  "",
		"DNS://worker":           "",
	} {
		scheme, rest, _ := strings.Cut(spelling, ":")
		leaf := a.Leaf(func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: scheme, Opaque: rest}} }).Leaf
		if !bytes.Contains(leaf.Raw, []byte(spelling)) {
			t.Fatalf("the certificate does not spell %s", spelling)
		}
		got := ""
		if c := access.Identify(leaf); c != nil {
			got = c.Name
		}
		if got != want {
			t.Errorf("%s: %q, want %q", spelling, got, want)
		}
	}
}
