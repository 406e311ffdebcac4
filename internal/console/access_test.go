package console_test

import (
	"crypto/tls"
	"crypto/x509"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/console"
	"github.com/tokenbroker/tokenbroker/internal/testca"
)

func withCertificates(o *console.Options) {
	o.Access.Certificate = access.Identify
	policy, err := access.NewPolicy([]access.Rule{
		{Callers: []string{"spiffe://prod/ops"}, Profiles: []string{"review"}, Allow: []string{"admin"}},
		{Callers: []string{"dns:ops.example.com"}, Profiles: []string{"*"}, Allow: []string{"admin"}},
	})
	if err != nil {
		panic(err)
	}
	o.Access.Authorizer.Use(policy)
}

func withBoth(o *console.Options) {
	withToken(o)
	withCertificates(o)
}

// certificate has a request come with a verified certificate.
func certificate(leaf *x509.Certificate) func(*http.Request) {
	if leaf.NotAfter.IsZero() {
		leaf.NotAfter = time.Now().Add(time.Hour)
	}
	return func(r *http.Request) {
		r.TLS = &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{leaf}}, PeerCertificates: []*x509.Certificate{leaf}}
	}
}

func uris(names ...string) (us []*url.URL) {
	for _, n := range names {
		u, err := url.Parse(n)
		if err != nil {
			panic(err)
		}
		us = append(us, u)
	}
	return us
}

// A certificate can be revoked while its connection is open.
func TestRevokedCertificates(t *testing.T) {
	authority := testca.New(t)
	ops := func(c *x509.Certificate) { c.DNSNames = []string{"ops.example.com"} }
	good, bad := authority.Leaf(ops).Leaf, authority.Leaf(ops).Leaf
	list, err := x509.ParseRevocationList(authority.RevocationList(nil, bad))
	if err != nil {
		t.Fatal(err)
	}
	var now *access.Revocations
	rig := newRig(t, newFake(codeProfile("review")), func(o *console.Options) {
		withCertificates(o)
		o.Access.Revocations = func() *access.Revocations { return now }
	})
	get := func(leaf *x509.Certificate) int {
		a, _ := rig.do(request(http.MethodGet, "/", func(r *http.Request) {
			chain := []*x509.Certificate{leaf, authority.Certificate()}
			r.TLS = &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{chain}, PeerCertificates: chain[:1]}
		}))
		return a.StatusCode
	}
	if g, b := get(good), get(bad); g != 200 || b != 200 {
		t.Fatalf("before: %d and %d", g, b)
	}
	now = access.NewRevocations([]*x509.Certificate{authority.Certificate()})
	if err := now.Add(list); err != nil {
		t.Fatal(err)
	}
	if g, b := get(good), get(bad); g != 200 || b != 403 {
		t.Errorf("afterwards: %d and %d, want 200 and 403", g, b)
	}
}

// An authority can be taken away while its operators are connected.
func TestAuthorityThatIsGone(t *testing.T) {
	old, next := testca.New(t), testca.New(t)
	now := old.Pool()
	rig := newRig(t, newFake(codeProfile("review")), func(o *console.Options) {
		withCertificates(o)
		o.Access.Authorities = func() *x509.CertPool { return now }
	})
	chain := []*x509.Certificate{old.Leaf(testca.Named("ops.example.com")).Leaf, old.Certificate()}
	get := func() int {
		a, _ := rig.do(request(http.MethodGet, "/", func(r *http.Request) {
			r.TLS = &tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{chain}, PeerCertificates: chain[:1]}
		}))
		return a.StatusCode
	}
	if got := get(); got != 200 {
		t.Errorf("before: %d", got)
	}
	now = old.Pool()
	now.AddCert(next.Certificate())
	if got := get(); got != 200 {
		t.Errorf("beside its successor: %d", got)
	}
	now = next.Pool()
	if got := get(); got != 403 {
		t.Errorf("afterwards: %d", got)
	}
}

// TestDoors tries every way in, and every way that is none.
func TestDoors(t *testing.T) {
	host := func(h string) func(*http.Request) { return func(r *http.Request) { r.Host = h } }
	from := func(a string) func(*http.Request) { return func(r *http.Request) { r.RemoteAddr = a } }
	none := func(*http.Request) {}
	commonName := &x509.Certificate{}
	commonName.Subject.CommonName = "ops.example.com"
	nowhere := func(o *console.Options) { o.Access = console.Access{} }
	emptyToken := func(o *console.Options) {
		o.Access.BearerToken = func() broker.Secret { return broker.Secret{} }
	}
	for name, c := range map[string]struct {
		options func(*console.Options)
		change  func(*http.Request)
		want    int
	}{
		"local":                           {nil, none, 200},
		"local, by name":                  {nil, host("localhost:7444"), 200},
		"local, IPv6":                     {nil, func(r *http.Request) { r.Host, r.RemoteAddr = "[::1]:7444", "[::1]:50000" }, 200},
		"local, mapped address":           {nil, from("[::ffff:127.0.0.1]:50000"), 200},
		"local, from elsewhere":           {nil, from("192.0.2.1:50000"), 403},
		"local, from nowhere":             {nil, from("@"), 403},
		"local, a rebound name":           {nil, host("attacker.example:7444"), 403},
		"local, a deceptive name":         {nil, host("127.0.0.1.attacker.example:7444"), 403},
		"local, a deceptive localhost":    {nil, host("localhost.attacker.example"), 403},
		"local, no name":                  {nil, host(""), 403},
		"local, through a proxy":          {nil, header("X-Forwarded-For", "192.0.2.1"), 403},
		"local, through another proxy":    {nil, header("Forwarded", "for=192.0.2.1"), 403},
		"local, through a third proxy":    {nil, header("Via", "1.1 proxy"), 403},
		"local, the proxy tells a host":   {nil, header("X-Forwarded-Host", "broker.example.com"), 403},
		"local, the proxy tells an IP":    {nil, header("X-Real-IP", "192.0.2.1"), 403},
		"local, through a silent proxy":   {nil, func(r *http.Request) { r.Proto, r.ProtoMinor = "HTTP/1.0", 0 }, 403},
		"local, a proxy is configured":    {func(o *console.Options) { o.URL = "https://broker.example.com" }, none, 403},
		"local, its own URL":              {func(o *console.Options) { o.URL = "http://localhost:7444" }, none, 200},
		"nothing configured, elsewhere":   {nowhere, none, 403},
		"nothing configured, a token":     {nowhere, header("Authorization", "Bearer "+bearerToken), 403},
		"token":                           {withToken, header("Authorization", "Bearer "+bearerToken), 200},
		"token, the scheme in lower case": {withToken, header("Authorization", "bearer "+bearerToken), 200},
		"token, wrong":                    {withToken, header("Authorization", "Bearer x"), 401},
		"token, its beginning":            {withToken, header("Authorization", "Bearer "+bearerToken[:20]), 401},
		"token, empty":                    {withToken, header("Authorization", "Bearer "), 401},
		"token, as Basic":                 {withToken, header("Authorization", "Basic "+bearerToken), 401},
		"token, none, though local":       {withToken, none, 401},
		"token, in the query":             {withToken, func(r *http.Request) { r.URL.RawQuery = "token=" + url.QueryEscape(bearerToken) }, 401},
		"empty token, empty header":       {emptyToken, header("Authorization", "Bearer "), 401},
		"empty token, no header":          {emptyToken, none, 401},
		"certificate, one URI":            {withCertificates, certificate(&x509.Certificate{URIs: uris("spiffe://prod/ops")}), 200},
		"certificate, one URI, some DNS":  {withCertificates, certificate(&x509.Certificate{URIs: uris("spiffe://prod/ops"), DNSNames: []string{"a", "b"}}), 200},
		"certificate, one DNS":            {withCertificates, certificate(&x509.Certificate{DNSNames: []string{"ops.example.com"}}), 200},
		"certificate, two URIs":           {withCertificates, certificate(&x509.Certificate{URIs: uris("spiffe://prod/ops", "spiffe://prod/b")}), 403},
		"certificate, two DNS":            {withCertificates, certificate(&x509.Certificate{DNSNames: []string{"ops.example.com", "b"}}), 403},
		"certificate, common name only":   {withCertificates, certificate(commonName), 403},
		"certificate, ended since":        {withCertificates, certificate(&x509.Certificate{URIs: uris("spiffe://prod/ops"), NotAfter: time.Now().Add(-time.Second)}), 403},
		"certificate, its authority ended since": {withCertificates, func(r *http.Request) {
			certificate(&x509.Certificate{URIs: uris("spiffe://prod/ops")})(r)
			r.TLS.VerifiedChains[0] = append(r.TLS.VerifiedChains[0], &x509.Certificate{NotAfter: time.Now().Add(-time.Second)})
		}, 403},
		"certificate, none, though local": {withCertificates, none, 403},
		"certificate, not verified": {withCertificates, func(r *http.Request) {
			r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{{URIs: uris("spiffe://prod/ops")}}}
		}, 403},
		"both, a certificate":                   {withBoth, certificate(&x509.Certificate{URIs: uris("spiffe://prod/ops")}), 200},
		"both, a token":                         {withBoth, header("Authorization", "Bearer "+bearerToken), 200},
		"both, a wrong token and nothing else":  {withBoth, header("Authorization", "Bearer x"), 401},
		"both, neither":                         {withBoth, none, 401},
		"token, a certificate nobody asked for": {withToken, certificate(&x509.Certificate{URIs: uris("spiffe://prod/ops")}), 401},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, newFake(codeProfile("review"), codeProfile("second")), c.options)
			for path, want := range map[string]int{"/": c.want, "/profiles/review": c.want, "/healthz": 200, "/readyz": 200, "/metrics": 200} {
				a, body := r.do(request(http.MethodGet, path, c.change))
				if a.StatusCode != want {
					t.Errorf("%s: %d, want %d", path, a.StatusCode, want)
				}
				if a.StatusCode != http.StatusOK && (strings.Contains(body, "0123456789abcdef") || strings.Contains(body, "vantage.example.com")) {
					t.Errorf("%s tells of profiles: %s", path, body)
				}
				if challenge := a.Header.Get("WWW-Authenticate"); (a.StatusCode == http.StatusUnauthorized) != (challenge != "") {
					t.Errorf("%s: %d with the challenge %q", path, a.StatusCode, challenge)
				}
			}
			r.broker.took()
			a, _ := r.do(post("/profiles/review/reset", nil, c.change))
			done := strings.Join(r.broker.took(), " ")
			if want := map[bool]string{true: "reset review"}[c.want == 200]; done != want {
				t.Errorf("reset: %d, and %q was done, want %q", a.StatusCode, done, want)
			}
		})
	}
}

func TestOperatorsSeeTheirProfilesOnly(t *testing.T) {
	r := newRig(t, newFake(codeProfile("review"), codeProfile("second")), withCertificates)
	mine := certificate(&x509.Certificate{URIs: uris("spiffe://prod/ops")})
	if _, body := r.do(request(http.MethodGet, "/", mine)); !strings.Contains(body, "/profiles/review") || strings.Contains(body, "second") {
		t.Errorf("the list: %s", body)
	}
	same := header("X-Request-Id", "same")
	_, unknown := r.do(request(http.MethodGet, "/profiles/third", mine, same))
	a, foreign := r.do(request(http.MethodGet, "/profiles/second", mine, same))
	if a.StatusCode != http.StatusNotFound || unknown != foreign {
		t.Errorf("another's profile: %d, and it can be told from one that does not exist", a.StatusCode)
	}
	for _, action := range []string{"authorize", "refresh", "reset"} {
		if a, _ := r.do(post("/profiles/second/"+action, nil, mine)); a.StatusCode != http.StatusNotFound {
			t.Errorf("%s of another's profile: %d", action, a.StatusCode)
		}
	}
	nobody := certificate(&x509.Certificate{URIs: uris("spiffe://prod/worker")})
	for _, path := range []string{"/oauth/confirm", "/oauth/abandon"} {
		if a, _ := r.do(post(path, url.Values{"ticket": {"T"}}, nobody)); a.StatusCode != http.StatusBadRequest {
			t.Errorf("%s without the right to: %d", path, a.StatusCode)
		}
	}
	if did := r.broker.took(); len(did) > 0 {
		t.Errorf("something was done: %v", did)
	}
}

// What exists cannot be told from what does not: by no part of the answer, and
// not by the time that it takes.
func TestForbiddenAndUnknownPagesLookAlike(t *testing.T) {
	// The names have one length. Who comes may do something, elsewhere.
	r := newRig(t, newFake(codeProfile("review"), codeProfile("second")), withCertificates)
	mine := certificate(&x509.Certificate{URIs: uris("spiffe://prod/ops")})
	same := header("X-Request-Id", "same")
	paths := map[string]func(string) *http.Request{
		"page": func(name string) *http.Request { return request(http.MethodGet, "/profiles/"+name, mine, same) },
	}
	for _, action := range []string{"authorize", "refresh", "reset"} {
		paths[action] = func(name string) *http.Request { return post("/profiles/"+name+"/"+action, nil, mine, same) }
	}
	for what, ask := range paths {
		t.Run(what, func(t *testing.T) {
			forbidden, its := r.do(ask("second"))
			unknown, other := r.do(ask("absent"))
			if forbidden.StatusCode != http.StatusNotFound || unknown.StatusCode != http.StatusNotFound || !maps.EqualFunc(forbidden.Header, unknown.Header, slices.Equal) || its != other {
				t.Errorf("forbidden: %d %v\n%s\nunknown: %d %v\n%s", forbidden.StatusCode, forbidden.Header, its, unknown.StatusCode, unknown.Header, other)
			}
			const bound = 1.25
			var ratio float64
			for range 5 {
				if ratio = longer(func() { r.do(ask("second")) }, func() { r.do(ask("absent")) }); ratio < bound && ratio > 1/bound {
					return
				}
			}
			t.Errorf("the page of a forbidden profile takes %.2f times what that of an unknown one takes", ratio)
		})
	}
	once := func() { r.do(paths["page"]("second")) }
	if ratio := longer(func() { once(); once() }, once); ratio < 1.25 {
		t.Errorf("two pages take %.2f times what one takes: the measurement shows nothing", ratio)
	}
}

// longer is how many times longer a takes than b, by their medians.
func longer(a, b func()) float64 {
	const samples = 101
	var took [2][]time.Duration
	for i := range 2 * samples {
		began := time.Now()
		[]func(){a, b}[i%2]()
		took[i%2] = append(took[i%2], time.Since(began))
	}
	slices.Sort(took[0])
	slices.Sort(took[1])
	return float64(took[0][samples/2]) / float64(took[1][samples/2])
}

// TestSession logs in, and tries cookies that are none.
func TestSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, newFake(codeProfile("review")), withToken)
		a, body := r.do(request(http.MethodGet, "/profiles/review"))
		if a.StatusCode != http.StatusUnauthorized || !strings.Contains(body, `name="return" value="/profiles/review"`) {
			t.Fatalf("without a session: %d %s", a.StatusCode, body)
		}
		in, _ := r.do(post("/login", url.Values{"token": {bearerToken}, "return": {"/profiles/review"}}))
		if in.StatusCode != http.StatusSeeOther || in.Header.Get("Location") != "/profiles/review" || len(in.Cookies()) != 1 {
			t.Fatalf("login: %d %v", in.StatusCode, in.Header)
		}
		if c := in.Cookies()[0]; !c.HttpOnly || c.SameSite != http.SameSiteLaxMode || c.Path != "/" || c.Secure || c.MaxAge != 8*60*60 || strings.Contains(c.Value, "horse") {
			t.Errorf("the cookie: %v", c)
		}
		if a, body := r.do(request(http.MethodGet, "/profiles/review", cookies(in))); a.StatusCode != http.StatusOK || !strings.Contains(body, "Log out") {
			t.Errorf("with the session: %d", a.StatusCode)
		}
		replica := newRig(t, newFake(codeProfile("review")), withToken)
		if a, _ := replica.do(request(http.MethodGet, "/", cookies(in))); a.StatusCode != http.StatusOK {
			t.Errorf("with the session, on another replica: %d", a.StatusCode)
		}
		changed := newRig(t, newFake(codeProfile("review")), func(o *console.Options) {
			o.Access.BearerToken = func() broker.Secret { return broker.NewSecret("another token altogether") }
		})
		if a, _ := changed.do(request(http.MethodGet, "/", cookies(in))); a.StatusCode != http.StatusUnauthorized {
			t.Errorf("with the session of an older token: %d", a.StatusCode)
		}
		value := in.Cookies()[0].Value
		for what, forged := range map[string]string{
			"empty": "", "cut": value[:len(value)-2], "a later end": "B" + value[1:], "another MAC": value[:len(value)-4] + "AAAA",
			"the token itself": bearerToken, "padded": value + "=", "twice": value + value,
		} {
			if a, _ := r.do(request(http.MethodGet, "/", func(r *http.Request) { r.AddCookie(&http.Cookie{Name: "broker-session", Value: forged}) })); a.StatusCode != http.StatusUnauthorized {
				t.Errorf("a forged cookie, %s: %d", what, a.StatusCode)
			}
		}
		out, _ := r.do(post("/logout", nil, cookies(in)))
		if out.StatusCode != http.StatusSeeOther || len(out.Cookies()) != 1 || out.Cookies()[0].MaxAge >= 0 {
			t.Errorf("logout: %d %v", out.StatusCode, out.Cookies())
		}
		time.Sleep(8*time.Hour - time.Second)
		if a, _ := r.do(request(http.MethodGet, "/", cookies(in))); a.StatusCode != http.StatusOK {
			t.Errorf("just before its end: %d", a.StatusCode)
		}
		time.Sleep(time.Second)
		if a, _ := r.do(request(http.MethodGet, "/", cookies(in))); a.StatusCode != http.StatusUnauthorized {
			t.Errorf("after its end: %d", a.StatusCode)
		}
	})
}

func TestSecureCookies(t *testing.T) {
	r := newRig(t, newFake(), func(o *console.Options) { withToken(o); o.URL = "https://broker.example.com" })
	for what, c := range map[string]struct {
		change func(*http.Request)
		secure bool
	}{
		"behind the proxy": {func(r *http.Request) { r.Host = "broker.example.com" }, true},
		"over TLS":         {func(r *http.Request) { r.TLS = &tls.ConnectionState{} }, true},
		"past the proxy":   {func(*http.Request) {}, false},
	} {
		a, _ := r.do(post("/login", url.Values{"token": {bearerToken}}, c.change))
		if len(a.Cookies()) != 1 || a.Cookies()[0].Secure != c.secure || strings.HasPrefix(a.Cookies()[0].Name, "__Host-") != c.secure {
			t.Errorf("%s: %v", what, a.Cookies())
		}
	}
}

func TestLoginAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, newFake(), withToken)
		attempt := func(token string) int {
			a, body := r.do(post("/login", url.Values{"token": {token}}))
			if strings.Contains(body, token) {
				t.Error("the page repeats what was typed")
			}
			return a.StatusCode
		}
		for i := range 5 {
			if got := attempt("wrong-token-0000"); got != http.StatusUnauthorized {
				t.Errorf("attempt %d: %d", i, got)
			}
		}
		if got := attempt(bearerToken); got != http.StatusTooManyRequests {
			t.Errorf("the sixth within a moment: %d", got)
		}
		time.Sleep(time.Second / 5)
		if got := attempt(bearerToken); got != http.StatusSeeOther {
			t.Errorf("a moment later: %d", got)
		}
		if strings.Contains(r.log.String(), "wrong-token") || strings.Contains(r.log.String(), "horse") {
			t.Errorf("the log has a token: %s", r.log)
		}
	})
}

func TestLoginGoesBackToOurPagesOnly(t *testing.T) {
	for to, want := range map[string]string{
		"/profiles/review": "/profiles/review", "": "/", "https://attacker.example/": "/", "//attacker.example": "/", `/\attacker.example`: "/",
		"/profiles/../healthz": "/", "/profiles/a?x": "/", "/logout": "/", "/profiles/": "/", "javascript:alert(1)": "/",
	} {
		r := newRig(t, newFake(), withToken)
		if a, _ := r.do(post("/login", url.Values{"token": {bearerToken}, "return": {to}})); a.Header.Get("Location") != want {
			t.Errorf("to %q: %q, want %q", to, a.Header.Get("Location"), want)
		}
	}
}

// TestForeignPagesPressNoButtons is about forms of other sites, and links.
func TestForeignPagesPressNoButtons(t *testing.T) {
	r := newRig(t, newFake(codeProfile("review")), func(o *console.Options) { withToken(o); o.URL = "https://broker.example.com" })
	known := header("Authorization", "Bearer "+bearerToken)
	for _, path := range []string{"/profiles/review/authorize", "/profiles/review/refresh", "/profiles/review/reset", "/oauth/confirm", "/oauth/abandon", "/login", "/logout"} {
		for _, foreign := range []func(*http.Request){
			header("Sec-Fetch-Site", "cross-site"), header("Sec-Fetch-Site", "same-site"), header("Origin", "https://attacker.example"), header("Origin", "null"),
			header("Origin", "http://127.0.0.1:9999"),
		} {
			if a, body := r.do(post(path, nil, foreign, known)); a.StatusCode != http.StatusForbidden || !strings.Contains(body, "another site") {
				t.Errorf("%s: %d", path, a.StatusCode)
			}
		}
		if path == "/login" {
			continue
		}
		if a, _ := r.do(request(http.MethodGet, path, known)); a.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("GET %s: %d", path, a.StatusCode)
		}
	}
	if did := r.broker.took(); len(did) > 0 {
		t.Errorf("something was done: %v", did)
	}
	for _, ours := range []func(*http.Request){header("Sec-Fetch-Site", "same-origin"), header("Origin", "http://127.0.0.1:7444"), header("Origin", "https://broker.example.com")} {
		if a, _ := r.do(post("/profiles/review/reset", nil, ours, known)); a.StatusCode != http.StatusSeeOther {
			t.Errorf("from our own page: %d", a.StatusCode)
		}
	}
	long := url.Values{"ticket": {strings.Repeat("x", 20<<10)}}
	if a, _ := r.do(post("/oauth/confirm", long, known)); a.StatusCode != http.StatusBadRequest {
		t.Errorf("a form that is too long: %d", a.StatusCode)
	}
}
