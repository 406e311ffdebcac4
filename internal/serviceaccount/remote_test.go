package serviceaccount_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/serviceaccount"
	"github.com/tokenbroker/tokenbroker/internal/testca"
)

// remote is a cluster with keys at a URL.
func remote() serviceaccount.Cluster {
	return serviceaccount.Cluster{Name: "prod", Issuer: issuer, Audience: audience, Source: &serviceaccount.Source{URL: "https://kube.example.com/jwks"}}
}

// es is a key that is quick to use, under an id.
func es(id string) signer { return signer{id, jose.ES256, keysOfTests()["p256"]} }

// published is a stand-in for what is at the URL, in virtual time.
type published struct {
	mu      sync.Mutex
	set     []byte
	err     error
	delay   time.Duration
	fetches []time.Time
	token   string // what was presented with the last fetch
	now     int    // fetches under way
	most    int    // at one time
}

func (p *published) fetch(_ context.Context, s *serviceaccount.Source) ([]byte, error) {
	p.mu.Lock()
	p.fetches = append(p.fetches, time.Now())
	p.token = s.Token.Reveal()
	p.now++
	p.most = max(p.most, p.now)
	delay := p.delay
	p.mu.Unlock()
	time.Sleep(delay) // virtual
	p.mu.Lock()
	defer p.mu.Unlock()
	p.now--
	return p.set, p.err
}

// publish changes what is there.
func (p *published) publish(set []byte, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set, p.err = set, err
}

// count is the number of fetches since the last count.
func (p *published) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer func() { p.fetches = nil }()
	return len(p.fetches)
}

func (p *published) want(t *testing.T, n int, when string) {
	t.Helper()
	synctest.Wait()
	if got := p.count(); got != n {
		t.Errorf("%s: %d fetches, want %d", when, got, n)
	}
}

func (p *published) verifier(o serviceaccount.Options) *serviceaccount.Verifier {
	o.Fetch = p.fetch
	return serviceaccount.New([]serviceaccount.Cluster{remote()}, o)
}

func TestKeysAreFetchedWhenTheyAreNeeded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &published{set: set(t, es("one"))}
		v := p.verifier(serviceaccount.Options{})
		p.want(t, 0, "at the start")
		refused(t, v, es("one").sign(t, but(claims(), map[string]any{"aud": "other"})), "another audience")
		p.want(t, 0, "for a token that is none of ours")
		accepted(t, v, es("one").sign(t, claims()))
		p.want(t, 1, "for the first token")
		for i := range 100 {
			accepted(t, v, es("one").sign(t, but(claims(), map[string]any{"jti": i})))
		}
		p.want(t, 0, "for more of the same key")

		p.publish(set(t, es("one"), es("two")), nil)
		time.Sleep(10 * time.Second)
		accepted(t, v, es("two").sign(t, claims()))
		p.want(t, 1, "for a new key")

		time.Sleep(5*time.Minute - time.Second)
		accepted(t, v, es("one").sign(t, but(claims(), map[string]any{"jti": "late"})))
		p.want(t, 0, "before they are old")
		time.Sleep(time.Second)
		accepted(t, v, es("one").sign(t, but(claims(), map[string]any{"jti": "later"})))
		p.want(t, 1, "when they are old")
	})
}

// A key that is taken away is not believed for long, though its tokens are
// remembered, nor when nobody came for hours.
func TestKeysThatAreTakenAway(t *testing.T) {
	for name, idle := range map[string]time.Duration{"in use": 0, "after hours": 3 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := &published{set: set(t, es("one"), es("two")), delay: time.Second}
				v := p.verifier(serviceaccount.Options{})
				old, other := es("one").sign(t, claims()), es("two").sign(t, claims())
				accepted(t, v, old)
				accepted(t, v, other)
				p.publish(set(t, es("two")), nil)
				if idle > 0 {
					time.Sleep(idle)
					refused(t, v, es("one").sign(t, claims()), "a key that is not the cluster's")
					return
				}
				ended := time.Duration(0)
				for began := time.Now(); ; time.Sleep(10 * time.Second) {
					accepted(t, v, other)
					if _, err := v.Verify(t.Context(), old); err != nil {
						ended = time.Since(began)
						break
					}
				}
				if ended > 10*time.Minute+20*time.Second {
					t.Errorf("believed for %v", ended)
				}
				accepted(t, v, other)
			})
		})
	}
}

// What is remembered goes with the key that it was verified by, and stays where
// the keys have not changed.
func TestRememberedTokensEndWithTheirKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &published{set: set(t, es("one"))}
		v := p.verifier(serviceaccount.Options{})
		token := es("one").sign(t, claims())
		first := accepted(t, v, token)

		time.Sleep(10 * time.Second)
		refused(t, v, es("two").sign(t, claims()), "a key that is not the cluster's")
		p.want(t, 2, "for the first token and the unknown key")
		if accepted(t, v, token) != first {
			t.Error("forgotten though the keys are the same")
		}

		p.publish(set(t, es("two")), nil)
		time.Sleep(10 * time.Second)
		accepted(t, v, es("two").sign(t, claims()))
		refused(t, v, token, "a key that is not the cluster's")
	})
}

// A flood of tokens that name keys which do not exist is no flood of fetches,
// and does not hold up those whose keys are known.
func TestFloodOfUnknownKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &published{set: set(t, es("one")), delay: 2 * time.Second}
		v := p.verifier(serviceaccount.Options{})
		accepted(t, v, es("one").sign(t, claims()))
		p.want(t, 1, "for the first token")
		forged := func(i int) string {
			return encode(fmt.Appendf(nil, `{"alg":"ES256","kid":"k%d"}`, i)) + "." + encode([]byte(payload(t, claims()))) + "." + encode(make([]byte, 64))
		}
		const flood, spread = 10_000, 100 * time.Second
		var wg sync.WaitGroup
		for i := range flood {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * spread / flood)
				if c, err := v.Verify(t.Context(), forged(i)); c != nil || err == nil {
					t.Error("accepted")
				}
			})
		}
		for i := range 100 {
			time.Sleep(spread / 100)
			began := time.Now()
			accepted(t, v, es("one").sign(t, but(claims(), map[string]any{"jti": i})))
			if took := time.Since(began); took > 0 {
				t.Fatalf("a good token waited for %v", took)
			}
		}
		wg.Wait()
		// One per 10 s, and the 2 s that each takes.
		if got := p.count(); got > 10 || got < 5 || p.most > 1 {
			t.Errorf("%d fetches for %d tokens within %v, %d at a time", got, flood, spread, p.most)
		}
		p.publish(set(t, es("one"), es("two")), nil)
		time.Sleep(10 * time.Second)
		accepted(t, v, es("two").sign(t, claims()))
	})
}

// While the server is down what is known stays, and it is asked seldom.
func TestServerThatIsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var logged bytes.Buffer
		p := &published{err: errors.New("no route")}
		v := p.verifier(serviceaccount.Options{Logger: slog.New(slog.NewTextHandler(&logged, nil))})
		unavailable := func() {
			t.Helper()
			_, err := v.Verify(t.Context(), es("one").sign(t, claims()))
			var u *serviceaccount.Unavailable
			if !errors.As(err, &u) || err.Error() != "by what is configured for cluster prod: its keys could not be fetched: no route" {
				t.Fatalf("got %v", err)
			}
		}
		for range 3600 {
			unavailable()
			time.Sleep(time.Second)
		}
		// 10, 20, 40 and then 60 seconds apart.
		if got := p.count(); got > 63 || got < 60 {
			t.Errorf("%d fetches in an hour", got)
		}
		if !strings.Contains(logged.String(), `level=WARN msg="keys of service accounts not fetched" cluster=prod known=false error="no route"`) {
			t.Errorf("logged\n%s", &logged)
		}
		p.publish(set(t, es("one")), nil)
		time.Sleep(time.Minute)
		accepted(t, v, es("one").sign(t, claims()))
		p.publish(nil, errors.New("down again"))
		p.count()
		for i := range 24 {
			time.Sleep(time.Hour)
			accepted(t, v, es("one").sign(t, but(claims(), map[string]any{"jti": i})))
		}
		p.want(t, 24, "in a day with a token per hour")
		// A key that nobody knows may be one that has come since.
		var u *serviceaccount.Unavailable
		if _, err := v.Verify(t.Context(), es("two").sign(t, claims())); !errors.As(err, &u) {
			t.Errorf("a new key while the server is down: %v", err)
		}
		p.count()
		p.publish([]byte("<html>"), nil)
		time.Sleep(time.Hour)
		accepted(t, v, es("one").sign(t, claims()))
		p.publish([]byte(`{"keys":[]}`), nil)
		time.Sleep(time.Hour)
		accepted(t, v, es("one").sign(t, claims()))
	})
}

// A server that takes long holds up nobody whose key is known, and a caller
// that goes away does not end what others wait for.
func TestServerThatIsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &published{set: set(t, es("one")), delay: 5 * time.Second}
		v := p.verifier(serviceaccount.Options{})
		gone, leave := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() {
			_, err := v.Verify(gone, es("one").sign(t, claims()))
			if u := (*serviceaccount.Unavailable)(nil); !errors.As(err, &u) {
				t.Errorf("got %v", err)
			}
		})
		synctest.Wait()
		for range 20 {
			wg.Go(func() { accepted(t, v, es("one").sign(t, claims())) })
		}
		time.Sleep(time.Second)
		leave()
		wg.Wait()
		p.want(t, 1, "for all")

		time.Sleep(6 * time.Minute)
		token, began := es("one").sign(t, claims()), time.Now()
		accepted(t, v, token)
		if time.Since(began) != 0 {
			t.Errorf("waited for %v though the key is known", time.Since(began))
		}
		time.Sleep(time.Minute)
		p.want(t, 1, "in the background")
	})
}

// Who replaces a Verifier need not fetch again what is known, unless it is from
// elsewhere.
func TestKeysAreTakenOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &published{set: set(t, es("one"))}
		was := p.verifier(serviceaccount.Options{})
		accepted(t, was, es("one").sign(t, claims()))
		p.want(t, 1, "by the first")

		c := remote()
		c.Source.Token = broker.NewSecret("new-token")
		o := serviceaccount.Options{Fetch: p.fetch, Previous: was}
		v := serviceaccount.New([]serviceaccount.Cluster{c}, o)
		p.publish(nil, errors.New("down"))
		accepted(t, v, es("one").sign(t, claims()))
		p.want(t, 0, "by the second")
		time.Sleep(6 * time.Minute)
		accepted(t, v, es("one").sign(t, claims()))
		p.want(t, 1, "by the second, when they are old")
		if p.token != "new-token" {
			t.Errorf("it was asked with %q", p.token)
		}

		c.Audience = "other"
		refused(t, serviceaccount.New([]serviceaccount.Cluster{c}, serviceaccount.Options{Fetch: p.fetch, Previous: v}), es("one").sign(t, claims()), "another audience")
		elsewhere := remote()
		elsewhere.Source.URL = "https://other.example.com"
		_, err := serviceaccount.New([]serviceaccount.Cluster{elsewhere}, o).Verify(t.Context(), es("one").sign(t, claims()))
		if u := (*serviceaccount.Unavailable)(nil); !errors.As(err, &u) {
			t.Errorf("keys of one URL serve for another: %v", err)
		}
		trusting := remote()
		trusting.Source.CA = x509.NewCertPool()
		if _, err = serviceaccount.New([]serviceaccount.Cluster{trusting}, o).Verify(t.Context(), es("one").sign(t, claims())); err == nil {
			t.Error("keys that one authority vouched for serve for another")
		}
	})
}

// Who brings a new token for the keys need not wait until the old one would be
// tried again.
func TestNewTokenForTheKeysIsTriedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &published{err: errors.New("answered 401")}
		was := p.verifier(serviceaccount.Options{})
		if _, err := was.Verify(t.Context(), es("one").sign(t, claims())); err == nil {
			t.Fatal("accepted without keys")
		}
		p.publish(set(t, es("one")), nil)
		accepted(t, p.verifier(serviceaccount.Options{Previous: was}), es("one").sign(t, claims()))
	})
}

// apiServer is a real HTTPS server with keys, which counts.
type apiServer struct {
	source  serviceaccount.Source
	handler atomic.Value // http.HandlerFunc
	fetches atomic.Int32
}

func newAPIServer(t testing.TB, h http.HandlerFunc) *apiServer {
	t.Helper()
	a := &apiServer{}
	a.handler.Store(h)
	ca := testca.New(t)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.fetches.Add(1)
		a.handler.Load().(http.HandlerFunc)(w, r)
	}))
	server.TLS = &tls.Config{Certificates: []tls.Certificate{ca.Leaf(testca.Loopback)}}
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	t.Cleanup(server.Close)
	a.source = serviceaccount.Source{URL: server.URL + "/openid/v1/jwks", CA: ca.Pool(), Token: broker.NewSecret("reviewer-canary")}
	return a
}

func (a *apiServer) verifier() *serviceaccount.Verifier {
	c := remote()
	c.Source = &a.source
	return verifier(c)
}

func answer(body []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { w.Write(body) }
}

func TestKeysOverHTTPS(t *testing.T) {
	body := set(t, rs256())
	a := newAPIServer(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.URL.Path != "/openid/v1/jwks" || r.Header.Get("Authorization") != "Bearer reviewer-canary" {
			t.Errorf("asked %s %s with %q", r.Method, r.URL, r.Header.Get("Authorization"))
		}
		if !slices.Contains(strings.Split(r.Header.Get("Accept"), ", "), "application/jwk-set+json") {
			w.WriteHeader(http.StatusNotAcceptable) // as Kubernetes does
			return
		}
		w.Header().Set("Content-Type", "application/jwk-set+json")
		w.Write(body)
	})
	v := a.verifier()
	token := rs256().sign(t, claims())
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() { accepted(t, v, token) })
	}
	wg.Wait()
	refused(t, v, key("p256", jose.ES256).sign(t, claims()), "a key that is not the cluster's")
	if n := a.fetches.Load(); n != 1 {
		t.Errorf("%d fetches", n)
	}
}

// A flood at a real server: all within the ten seconds after the first
// fetch cost none.
func TestFloodOverHTTPS(t *testing.T) {
	a := newAPIServer(t, answer(set(t, es("one"))))
	v := a.verifier()
	began := time.Now()
	accepted(t, v, es("one").sign(t, claims()))
	body := encode([]byte(payload(t, claims())))
	for i := range 1000 {
		if c, err := v.Verify(t.Context(), encode(fmt.Appendf(nil, `{"alg":"ES256","kid":"k%d"}`, i))+"."+body+"."+encode(make([]byte, 64))); c != nil || err == nil {
			t.Fatal("accepted")
		}
	}
	most := 1 + int(time.Since(began)/(10*time.Second))
	if n := int(a.fetches.Load()); n > most {
		t.Errorf("%d fetches, want %d at the most", n, most)
	}
}

// What a server may answer instead of keys.
func TestAnswersThatAreNoKeys(t *testing.T) {
	good := set(t, rs256())
	for name, tc := range map[string]struct {
		answer http.HandlerFunc
		words  string
	}{
		"a redirect": {func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/elsewhere" {
				w.Write(good)
				return
			}
			http.Redirect(w, r, "/elsewhere", http.StatusFound)
		}, "answered 302, a redirect, which is not followed"},
		"unauthorized":  {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401); w.Write(good) }, "answered 401: it does not take the bearer token"},
		"forbidden":     {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403); w.Write(good) }, "answered 403: it does not take the bearer token, or whose that is may not read the keys"},
		"not found":     {http.NotFound, "answered 404"},
		"an error":      {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500); w.Write(good) }, "answered 500"},
		"no content":    {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) }, "answered 204"},
		"a page":        {answer([]byte("<html>reviewer-canary</html>")), "the answer cannot be used: there is no JSON Web Key Set in it"},
		"nothing":       {answer(nil), "there is no JSON Web Key Set in it"},
		"10 MB":         {answer(bytes.Repeat(append(bytes.Clone(good), ' '), 10<<20/len(good))), "with a body of more than 1 MiB"},
		"no keys":       {answer([]byte(`{"keys":[]}`)), "there is no key in it"},
		"a private key": {answer([]byte(`{"keys":[{"kty":"RSA","kid":"rsa","d":"AAAA"}]}`)), "key 1 is not public"},
		"half of it": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(good)))
			w.Write(good[:len(good)/2])
		}, "broke the connection off"},
		"a broken connection": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "broke the connection off"},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAPIServer(t, tc.answer)
			_, err := a.verifier().Verify(t.Context(), rs256().sign(t, claims()))
			var u *serviceaccount.Unavailable
			if !errors.As(err, &u) || !strings.Contains(err.Error(), tc.words) || strings.Contains(err.Error(), "canary") {
				t.Errorf("got %v, want %q", err, tc.words)
			}
			if n := a.fetches.Load(); n != 1 {
				t.Errorf("%d requests, want 1", n)
			}
		})
	}
}

// Without a token none is sent, and a server that wants one says so.
func TestKeysWithoutToken(t *testing.T) {
	var public atomic.Bool
	body := set(t, rs256())
	a := newAPIServer(t, func(w http.ResponseWriter, r *http.Request) {
		if _, sent := r.Header["Authorization"]; sent || !public.Load() {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.Write(body)
	})
	a.source.Token = broker.Secret{}
	_, err := a.verifier().Verify(t.Context(), rs256().sign(t, claims()))
	if err == nil || !strings.HasSuffix(err.Error(), "answered 401: it demands a bearer token") {
		t.Errorf("got %v", err)
	}
	public.Store(true)
	accepted(t, a.verifier(), rs256().sign(t, claims()))
}

// Keys are taken from nobody who cannot prove to be the server.
func TestServersThatAreNotBelieved(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*serviceaccount.Source)
		words  string
	}{
		"another authority": {func(s *serviceaccount.Source) { s.CA = testca.New(t).Pool() }, "; or name it in ca"},
		"the system's":      {func(s *serviceaccount.Source) { s.CA = nil }, "; or name it in ca"},
		"another host": {func(s *serviceaccount.Source) { s.URL = strings.Replace(s.URL, "127.0.0.1", "localhost", 1) },
			"its certificate is not for localhost"},
		"in clear": {func(s *serviceaccount.Source) { s.URL = strings.Replace(s.URL, "https", "http", 1) }, "answered 400"},
		"in clear, far away": {func(s *serviceaccount.Source) { s.URL = "http://kube.example.com/jwks" },
			"the URL http://kube.example.com/jwks would send secrets in clear"},
		"nobody": {func(s *serviceaccount.Source) { s.URL = "https://127.0.0.1:1/jwks" }, "nothing listens at 127.0.0.1:1"},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAPIServer(t, answer(set(t, rs256())))
			tc.change(&a.source)
			_, err := a.verifier().Verify(t.Context(), rs256().sign(t, claims()))
			if err == nil || !strings.Contains(err.Error(), tc.words) {
				t.Errorf("got %v, want %q", err, tc.words)
			}
			if a.fetches.Load() != 0 {
				t.Error("it was asked, and so has the bearer token")
			}
		})
	}
}

// FuzzVerify tries what is not signed.
func FuzzVerify(f *testing.F) {
	good := rs256().sign(f, claims())
	for _, seed := range []string{"", ".", "..", "a.b.c", good[:len(good)-1], good + ".", inJSON(f, rs256()), encrypted(f), shared([]byte("k"), payload(f, claims()))} {
		f.Add(seed)
	}
	v := verifier(prod(f, rs256(), key("p256", jose.ES256), key("ed25519", jose.EdDSA)))
	f.Fuzz(func(t *testing.T, token string) {
		if c, err := v.Verify(t.Context(), token); c != nil || err == nil {
			t.Errorf("accepted as %v", c)
		} else {
			silent(t, err, token)
		}
	})
}

// FuzzClaims tries claims of any kind under a header and a signature that are
// right: only what names an account as Kubernetes does may come out.
func FuzzClaims(f *testing.F) {
	for _, changes := range []map[string]any{nil, {"sub": "system:serviceaccount:a:b.c"}, {"aud": audience}, {"exp": 1}, {"kubernetes.io": bound("a", "b")}} {
		f.Add(payload(f, but(claims(), changes)))
	}
	f.Add(`{"iss":` + strings.Repeat("[", 1000))
	s := es("p256")
	c := prod(f, s)
	accepted(f, verifier(c), s.signText(f, nil, payload(f, claims()))) // the signature is no hurdle
	f.Fuzz(func(t *testing.T, claims string) {
		caller, err := verifier(c).Verify(t.Context(), s.signText(t, nil, claims))
		if err == nil && strings.Count(caller.Name, "/") != 4 || caller != nil && !strings.HasPrefix(caller.Name, "k8s://prod/") {
			t.Errorf("accepted as %q", caller.Name)
		}
	})
}

// FuzzParseKeys never panics, and never takes a key without an id.
func FuzzParseKeys(f *testing.F) {
	f.Add(set(f, rs256(), key("p256", jose.ES256), key("ed25519", jose.EdDSA)))
	f.Add([]byte(`{"keys":[{"kty":"EC"},{"kty":"oct","k":"AA"},null]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		k, err := serviceaccount.ParseKeys(data)
		if (k == nil) == (err == nil) {
			t.Errorf("got %v, %v", k, err)
		}
		if k != nil && (len(k.IDs()) == 0 || k.IDs()[0] == "") {
			t.Errorf("got keys %q", k.IDs())
		}
	})
}
