package access_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
)

func forwarders(t testing.TB, rules ...access.Forwarder) *access.Forwarders {
	t.Helper()
	f, err := access.NewForwarders(rules)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func envoy(callers ...string) access.Forwarder {
	return access.Forwarder{Peers: []string{"dns:envoy.example.com"}, Header: access.EnvoyHeader, Callers: callers}
}

func proxy() *access.Caller {
	return &access.Caller{Name: "dns:envoy.example.com", Proof: access.DNSSAN, Expires: time.Unix(1_900_000_000, 0)}
}

const hash = "Hash=468ed33be74eee6556d90c0149c1309e9ba61d6425303443c0748a02dd8de688"

func TestForwardedClientCertificates(t *testing.T) {
	f, peer := forwarders(t, envoy()), proxy()
	for name, c := range map[string]struct {
		value string
		want  string // the caller's name, or after "!" what the error says
	}{
		"as Envoy writes it":                   {"By=spiffe://prod/broker;" + hash + ";URI=spiffe://prod/x;DNS=a.example.com;DNS=b.example.com", "spiffe://prod/x"},
		"as Istio writes it":                   {"By=spiffe://prod/broker;" + hash + `;Subject="";URI=spiffe://prod/ns/a/sa/b`, "spiffe://prod/ns/a/sa/b"},
		"with all there can be":                {"By=a;By=b;" + hash + `;Cert="-----BEGIN%20CERTIFICATE-----%0A";Chain="-----BEGIN%20CERTIFICATE-----";Subject="CN=x,O=\"y\", z;=";URI=spiffe://prod/x;DNS=c`, "spiffe://prod/x"},
		"the URI alone":                        {"URI=spiffe://prod/x", "spiffe://prod/x"},
		"the URI in quotes":                    {`URI="spiffe://prod/x"`, "spiffe://prod/x"},
		"no URI, as Envoy says it":             {hash + ";URI=;DNS=Worker.example.com", "dns:worker.example.com"},
		"the DNS name alone":                   {"DNS=worker.example.com", "dns:worker.example.com"},
		"a subject with a comma and a URI":     {`Subject="CN=a,URI=spiffe://prod/admin;URI=spiffe://prod/admin";URI=spiffe://prod/x`, "spiffe://prod/x"},
		"a subject with an escaped quote":      {`Subject="CN=a\";URI=spiffe://prod/admin";URI=spiffe://prod/x`, "spiffe://prod/x"},
		"a subject with an escaped comma":      {`Subject="CN=a\, b";URI=spiffe://prod/x`, "spiffe://prod/x"},
		"a subject that ends in a backslash":   {`Subject="CN=a\\";URI=spiffe://prod/x`, "!two ways"},
		"a quote that is escaped twice":        {`Subject="CN=x\\";URI=spiffe://prod/admin;Foo=\\"";URI=spiffe://prod/x`, "!two ways"},
		"nothing":                              {"", "!malformed"},
		"a blank":                              {" ", "!malformed"},
		"the name alone":                       {"spiffe://prod/x", "!malformed"},
		"a subject only":                       {`Subject="CN=spiffe://prod/x"`, "!no URI SAN and no DNS SAN"},
		"a hash only":                          {hash, "!no URI SAN and no DNS SAN"},
		"an empty URI only":                    {"URI=", "!no URI SAN and no DNS SAN"},
		"two URIs":                             {"URI=spiffe://prod/x;URI=spiffe://prod/y", "!more than one URI"},
		"the same URI twice":                   {"URI=spiffe://prod/x;URI=spiffe://prod/x", "!more than one URI"},
		"an empty URI and another":             {"URI=;URI=spiffe://prod/x", "!more than one URI"},
		"a URI and an empty one":               {"URI=spiffe://prod/x;URI=", "!more than one URI"},
		"two empty URIs":                       {"URI=;URI=;DNS=a", "!more than one URI"},
		"two DNS names":                        {"URI=;DNS=a;DNS=b", "!more than one DNS"},
		"an empty DNS name":                    {"DNS=", "!empty DNS"},
		"two elements":                         {"URI=spiffe://prod/x,URI=spiffe://prod/y", "!more than one element"},
		"two elements, the second empty":       {"URI=spiffe://prod/x,", "!more than one element"},
		"two elements, the first empty":        {",URI=spiffe://prod/x", "!out of order"},
		"two elements, the first in quotes":    {`Subject="a",URI=spiffe://prod/x`, "!more than one element"},
		"a URI that a DNS name smuggles in":    {"DNS=a;URI=spiffe://prod/admin", "!out of order"},
		"a hash that a URI smuggles in":        {"URI=spiffe://prod/x;" + hash, "!out of order"},
		"two hashes":                           {hash + ";" + hash + ";URI=spiffe://prod/x", "!twice"},
		"two subjects":                         {`Subject="";Subject="";URI=spiffe://prod/x`, "!twice"},
		"an unknown key":                       {"Foo=x;URI=spiffe://prod/x", "!key other than"},
		"a key in small letters":               {"uri=spiffe://prod/x", "!key other than"},
		"a blank before a key":                 {hash + "; URI=spiffe://prod/x", "!key other than"},
		"an empty key":                         {"=x;URI=spiffe://prod/x", "!key other than"},
		"no pair at the end":                   {"URI=spiffe://prod/x;", "!malformed"},
		"no pair in the middle":                {hash + ";;URI=spiffe://prod/x", "!key other than"},
		"an open quote":                        {`Subject="CN=a;URI=spiffe://prod/x`, "!malformed"},
		"a quote inside":                       {`URI=spiffe://prod/"x"`, "!malformed"},
		"something after a quote":              {`URI="spiffe://prod/x"y`, "!malformed"},
		"a blank after a quote":                {`Subject="" ;URI=spiffe://prod/x`, "!malformed"},
		"a line break":                         {"URI=spiffe://prod/x\n", "!printable ASCII"},
		"letters of others":                    {"URI=spiffe://prod/é", "!printable ASCII"},
		"bytes that are no text":               {"URI=spiffe://prod/\xff", "!printable ASCII"},
		"a blank in the URI":                   {"URI=spiffe://prod/x y", "!SPIFFE ID"},
		"a wildcard":                           {"URI=spiffe://prod/*", "!SPIFFE ID"},
		"the trust domain itself":              {"URI=spiffe://prod", "!no path"},
		"dots":                                 {"URI=spiffe://prod/a/../b", "!SPIFFE ID"},
		"a service account":                    {"URI=k8s://prod/ns/sa", "!another kind"},
		"a user":                               {"URI=unix://uid/0", "!another kind"},
		"a user's name":                        {"URI=unix:uid:0", "!no scheme"},
		"anonymous":                            {"URI=anonymous", "!no scheme"},
		"anonymous by DNS, which is no caller": {"DNS=anonymous", "dns:anonymous"},
		"a DNS name with a colon":              {"DNS=unix:uid:0", "!host name"},
		"the longest":                          {`Cert="` + strings.Repeat("x", 16<<10-len(`Cert="";DNS=a`)) + `";DNS=a`, "dns:a"},
		"a longer one":                         {`Cert="` + strings.Repeat("x", 16<<10-len(`Cert="";DNS=a`)+1) + `";DNS=a`, "!longer than"},
	} {
		got, err := f.Caller(peer, access.EnvoyHeader, c.value)
		if why, refused := strings.CutPrefix(c.want, "!"); refused {
			if err == nil || got != nil || !strings.Contains(err.Error(), why) {
				t.Errorf("%s: got %v, %v; want %q", name, got, err, why)
			}
			continue
		}
		if err != nil || got.Name != c.want || got.Proof != access.Forwarded || got.Forwarder != peer.Name || !got.Expires.Equal(peer.Expires) || got.Groups != nil {
			t.Errorf("%s: got %+v, %v; want %s", name, got, err, c.want)
		}
	}
}

func TestLinkerdClientIDs(t *testing.T) {
	f, peer := forwarders(t, access.Forwarder{Peers: []string{"unix:uid:2102"}, Header: access.LinkerdHeader}), &access.Caller{Name: "unix:uid:2102", Proof: access.UnixPeer}
	const id = "worker.batch.serviceaccount.identity.linkerd.cluster.local"
	for value, want := range map[string]string{
		id: "dns:" + id, strings.ToUpper(id): "dns:" + id,
		"": "", " " + id: "", id + ".": "", "*." + id: "", "spiffe://prod/x": "", id + "," + id: "", "unix:uid:0": "", "anonymous": "dns:anonymous", strings.Repeat("a.", 127): "",
	} {
		got, err := f.Caller(peer, access.LinkerdHeader, value)
		if (err == nil) != (want != "") || want != "" && got.Name != want {
			t.Errorf("%q: got %v, %v; want %q", value, got, err, want)
		}
	}
}

// Only a listed peer, which has proven itself by certificate or socket, is
// believed, and only in its header.
func TestWhoIsBelieved(t *testing.T) {
	f := forwarders(t,
		access.Forwarder{Peers: []string{"dns:envoy.example.com", "spiffe://prod/mesh/*"}, Header: access.EnvoyHeader, Callers: []string{"spiffe://prod/ns/*/sa/*", "dns:*.example.com"}},
		access.Forwarder{Peers: []string{"unix:uid:7"}, Header: access.LinkerdHeader},
		access.Forwarder{Peers: []string{"dns:ENVOY.example.com"}, Header: access.EnvoyHeader, Callers: []string{"spiffe://other/x"}})
	const batch, other, foreign = "URI=spiffe://prod/ns/a/sa/b", "URI=spiffe://other/x", "URI=spiffe://foreign/x"
	for name, c := range map[string]struct {
		peer     *access.Caller
		header   string
		value    string
		listed   bool
		believed bool
	}{
		"listed by DNS name":                    {proxy(), access.EnvoyHeader, batch, true, true},
		"listed by another rule, too":           {proxy(), access.EnvoyHeader, other, true, true},
		"for a caller of a rule by DNS":         {proxy(), access.EnvoyHeader, "DNS=a.example.com", true, true},
		"for a caller of no rule":               {proxy(), access.EnvoyHeader, foreign, true, false},
		"for a deeper one":                      {proxy(), access.EnvoyHeader, batch + "/c", true, false},
		"listed by SPIFFE ID":                   {&access.Caller{Name: "spiffe://prod/mesh/gateway", Proof: access.URISAN}, access.EnvoyHeader, batch, true, true},
		"a rule that does not list it":          {&access.Caller{Name: "spiffe://prod/mesh/gateway", Proof: access.URISAN}, access.EnvoyHeader, other, true, false},
		"a deeper SPIFFE ID":                    {&access.Caller{Name: "spiffe://prod/mesh/a/gateway", Proof: access.URISAN}, access.EnvoyHeader, batch, false, false},
		"listed by user":                        {&access.Caller{Name: "unix:uid:7", Proof: access.UnixPeer}, access.LinkerdHeader, "a.example.com", true, true},
		"in the other header":                   {&access.Caller{Name: "unix:uid:7", Proof: access.UnixPeer}, access.EnvoyHeader, batch, true, false},
		"another user":                          {&access.Caller{Name: "unix:uid:77", Proof: access.UnixPeer}, access.LinkerdHeader, "a.example.com", false, false},
		"a group with the user's number":        {&access.Caller{Name: "unix:uid:8", Groups: []string{"unix:uid:7"}, Proof: access.UnixPeer}, access.LinkerdHeader, "a.example.com", false, false},
		"the name proven by a forwarder itself": {&access.Caller{Name: "dns:envoy.example.com", Proof: access.Forwarded}, access.EnvoyHeader, batch, false, false},
		"the name proven by a token":            {&access.Caller{Name: "dns:envoy.example.com", Proof: access.ServiceAccount}, access.EnvoyHeader, batch, false, false},
		"anonymous":                             {&access.Caller{Name: access.Anonymous, Proof: access.Loopback}, access.EnvoyHeader, batch, false, false},
		"nobody":                                {nil, access.EnvoyHeader, batch, false, false},
	} {
		if got := f.List(c.peer); got != c.listed {
			t.Errorf("%s: listed is %t", name, got)
		}
		if got, err := f.Caller(c.peer, c.header, c.value); (err == nil) != c.believed || (got != nil) != c.believed {
			t.Errorf("%s: %v, %v; want %t", name, got, err, c.believed)
		}
	}
	var none *access.Forwarders
	if got, err := none.Caller(proxy(), access.EnvoyHeader, batch); got != nil || err == nil || none.List(proxy()) || none.Rules() != nil {
		t.Errorf("nobody believes %v, %v", got, err)
	}
}

func TestForwardersThatCannotBe(t *testing.T) {
	peers := func(p ...string) access.Forwarder { return access.Forwarder{Peers: p, Header: access.EnvoyHeader} }
	for name, r := range map[string]access.Forwarder{
		"another header": {Peers: []string{"dns:a"}, Header: "x-forwarded-for"},
		"anonymous":      peers("anonymous"), "a service account": peers("k8s://a/b/c"), "a group": peers("unix:gid:1"), "all users": peers("unix:uid:*"), "no user": peers("unix:uid:"),
		"a user in words": peers("unix:uid:envoy"), "a user with a zero": peers("unix:uid:01"), "anybody": peers("*"), "nothing": peers(""), "all trust domains": peers("spiffe://*/x"),
		"a trust domain": peers("spiffe://prod"), "its root": peers("spiffe://prod/"), "a DNS name without a kind": peers("a.example.com"), "an address": peers("dns:10.0.0.1"),
		"another scheme": peers("https://a/b"), "one of two": peers("dns:a", "anonymous"),
		"for anonymous": envoy("anonymous"), "for users": envoy("unix:uid:1"), "for service accounts": envoy("k8s://a/b/c"), "for anybody": envoy("*"), "for dots": envoy("spiffe://prod/../x"),
	} {
		if _, err := access.NewForwarders([]access.Forwarder{r}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	forwarders(t, peers("dns:*.mesh.example.com", "dns:*", "spiffe://prod/*", "spiffe://prod/ns/mesh-*/sa/x", "unix:uid:0", "unix:uid:4294967295"), envoy("dns:*", "spiffe://prod/ns/*/sa/*"))
}

// All calls of one caller through one proxy are of one Caller, whichever
// connection they came by; a renewed certificate of the proxy makes another.
func TestForwardedCallersAreRemembered(t *testing.T) {
	f := forwarders(t, envoy())
	const value = "URI=spiffe://prod/x"
	first, err := f.Caller(proxy(), access.EnvoyHeader, value)
	if err != nil {
		t.Fatal(err)
	}
	if again, _ := f.Caller(proxy(), access.EnvoyHeader, value); again != first {
		t.Error("another connection: another Caller")
	}
	renewed := proxy()
	renewed.Expires = renewed.Expires.Add(time.Hour)
	if other, _ := f.Caller(renewed, access.EnvoyHeader, value); other == first || !other.Expires.Equal(renewed.Expires) {
		t.Errorf("a renewed certificate: %+v", other)
	}
	peer := proxy()
	if _, err := f.Caller(peer, access.EnvoyHeader, value); err != nil {
		t.Fatal(err)
	}
	if n := testing.AllocsPerRun(1000, func() { f.Caller(peer, access.EnvoyHeader, value) }); n != 0 {
		t.Errorf("%v allocations for what is known", n)
	}

	// A caller that keeps asking is remembered, whatever else passes by, and what
	// passes by is forgotten.
	for i := range 20_000 {
		if _, err := f.Caller(peer, access.EnvoyHeader, fmt.Sprintf("URI=spiffe://prod/other-%d", i)); err != nil {
			t.Fatal(err)
		}
		if i%1000 == 0 {
			if again, _ := f.Caller(peer, access.EnvoyHeader, value); again != first {
				t.Fatalf("forgotten after %d others", i)
			}
		}
	}
	if entries, _ := access.Remembered(f); entries > 2*4096 {
		t.Errorf("%d callers are remembered", entries)
	}
	large := `Cert="` + strings.Repeat("x", 15<<10) + `";URI=spiffe://prod/large-`
	for i := range 1000 {
		if _, err := f.Caller(peer, access.EnvoyHeader, large+fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	if _, text := access.Remembered(f); text > 8<<20 {
		t.Errorf("%d bytes of headers are remembered", text)
	}
	before, _ := access.Remembered(f)
	for i := range 1000 {
		f.Caller(peer, access.EnvoyHeader, fmt.Sprintf("URI=spiffe://prod/%d/", i))
	}
	if after, _ := access.Remembered(f); after > before {
		t.Error("what was refused is remembered")
	}
}

// What one proxy may say in one header is not remembered for another proxy, nor
// for another header.
func TestRememberedCallersAreOfOneProxyAndHeader(t *testing.T) {
	const value, name = "DNS=worker.example.com", "worker.example.com"
	f := forwarders(t,
		access.Forwarder{Peers: []string{"unix:uid:1"}, Header: access.EnvoyHeader},
		access.Forwarder{Peers: []string{"unix:uid:1"}, Header: access.LinkerdHeader},
		access.Forwarder{Peers: []string{"unix:uid:2"}, Header: access.EnvoyHeader, Callers: []string{"dns:other.example.com"}},
		access.Forwarder{Peers: []string{"unix:uid:2"}, Header: access.LinkerdHeader},
	)
	one, other := &access.Caller{Name: "unix:uid:1", Proof: access.UnixPeer}, &access.Caller{Name: "unix:uid:2", Proof: access.UnixPeer}
	for header, value := range map[string]string{access.EnvoyHeader: value, access.LinkerdHeader: name} {
		if c, err := f.Caller(one, header, value); err != nil || c.Name != "dns:"+name || c.Forwarder != one.Name {
			t.Fatalf("%+v, %v", c, err)
		}
	}
	if c, err := f.Caller(other, access.EnvoyHeader, value); err == nil {
		t.Errorf("a proxy that may not speak for it in this header: %+v", c)
	}
	for header, value := range map[string]string{access.LinkerdHeader: value, access.EnvoyHeader: name} {
		if c, err := f.Caller(one, header, value); err == nil {
			t.Errorf("%s with what the other header may say: %+v", header, c)
		}
	}
}

func TestForwardedCallersOfManyConnections(t *testing.T) {
	f := forwarders(t, envoy())
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			peer := proxy()
			for i := range 6000 {
				want := fmt.Sprintf("spiffe://prod/%d", i)
				if c, err := f.Caller(peer, access.EnvoyHeader, "URI="+want); err != nil || c.Name != want {
					t.Errorf("%v, %v; want %s", c, err, want)
					return
				}
			}
		})
	}
	all.Wait()
}

// Whatever a header says, the caller is one that a certificate could name, and
// its name is in the header as a value of its own.
func FuzzForwardedClientCertificate(f *testing.F) {
	for _, s := range []string{
		"By=a;" + hash + `;Subject="CN=x";URI=spiffe://prod/x;DNS=a`, "URI=;DNS=a", `Subject="\";URI=spiffe://a/b";URI=spiffe://prod/x`,
		`Subject="\\";URI=spiffe://a/b`, "URI=a,URI=b", `URI="spiffe://prod/x"`, "DNS=a;URI=spiffe://a/b", `Cert="%0A";Chain="";DNS=a`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, value string) {
		c, err := forwarders(t, envoy()).Caller(proxy(), access.EnvoyHeader, value)
		if err != nil {
			if len(err.Error()) > 250 {
				t.Errorf("the error is long: %v", err)
			}
			return
		}
		wellNamed(t, c)
		name := strings.TrimPrefix(c.Name, "dns:")
		key := "URI="
		if name != c.Name {
			key = "DNS="
		}
		plain := strings.ReplaceAll(strings.ToLower(value), `"`, "")
		if !strings.Contains(";"+plain+";", strings.ToLower(";"+key+name+";")) {
			t.Errorf("%q is not what %q says", c.Name, value)
		}
		if strings.Count(outsideQuotes(value), "URI=") > 1 || strings.Contains(outsideQuotes(value), ",") {
			t.Errorf("%q is ambiguous, and is taken for %q", value, c.Name)
		}
	})
}

// outsideQuotes leaves out what is quoted in the simplest reading.
func outsideQuotes(s string) string {
	var out strings.Builder
	quoted := false
	for i := range len(s) {
		switch {
		case s[i] == '"' && (!quoted || s[i-1] != '\\'):
			quoted = !quoted
		case !quoted:
			out.WriteByte(s[i])
		}
	}
	return out.String()
}

func FuzzLinkerdClientID(f *testing.F) {
	f.Add("worker.batch.serviceaccount.identity.linkerd.cluster.local")
	f.Add("")
	all := forwarders(f, access.Forwarder{Peers: []string{"dns:envoy.example.com"}, Header: access.LinkerdHeader})
	f.Fuzz(func(t *testing.T, value string) {
		if c, err := all.Caller(proxy(), access.LinkerdHeader, value); err == nil {
			wellNamed(t, c)
			if c.Name != "dns:"+strings.ToLower(value) {
				t.Errorf("%q for %q", c.Name, value)
			}
		}
	})
}

func BenchmarkForwarded(b *testing.B) {
	f, peer := forwarders(b, envoy()), proxy()
	value := "By=spiffe://prod/broker;" + hash + `;Subject="";URI=spiffe://prod/ns/a/sa/b`
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.Caller(peer, access.EnvoyHeader, value); err != nil {
			b.Fatal(err)
		}
	}
}
