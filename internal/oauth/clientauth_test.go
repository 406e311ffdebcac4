package oauth_test

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
	"github.com/tokenbroker/tokenbroker/internal/testca"
)

// keyPEM is a private key in PKCS #8.
func keyPEM(t testing.TB, key any) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return block("PRIVATE KEY", der)
}

func block(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

// made is a key, or the end of the test.
func made[K any](t testing.TB) func(K, error) K {
	return func(key K, err error) K {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
}

func weakRSA(t testing.TB) *rsa.PrivateKey {
	t.Setenv("GODEBUG", "rsa1024min=0")
	return made[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 1024))
}

func p256(t testing.TB) *ecdsa.PrivateKey {
	return made[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
}

func p384(t testing.TB) *ecdsa.PrivateKey {
	return made[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
}

func x25519(t testing.TB) *ecdh.PrivateKey {
	return made[*ecdh.PrivateKey](t)(ecdh.X25519().GenerateKey(rand.Reader))
}

// clientPair is a client's certificate and key.
func clientPair(t testing.TB) (certificate []byte, key broker.Secret) {
	certificate, private := testca.PEM(t, testca.New(t).Leaf(testca.Named("tester")))
	return certificate, broker.NewSecret(string(private))
}

// With each method the server sees the client once, and nasty characters whole.
func TestSecretsOnTheWireOfAProfile(t *testing.T) {
	for auth, want := range map[oauth.ClientAuth]string{
		oauth.ClientSecretPost: "POST|/token|application/x-www-form-urlencoded||" +
			"client_id=a+b%3Ac&client_secret=%2B+%26+%25+%3D+%3A+%C3%A9&grant_type=client_credentials",
		oauth.ClientSecretBasic: "POST|/token|application/x-www-form-urlencoded|" +
			"Basic " + base64.StdEncoding.EncodeToString([]byte("a%20b%3Ac:%2B%20%26%20%25%20%3D%20%3A%20%C3%A9")) + "|grant_type=client_credentials",
	} {
		r, base := record(t, reply{body: bearer})
		p := profileFor(t, profileConfig(base, func(c *oauth.ProfileConfig) {
			c.ClientID, c.ClientAuth, c.ClientSecrets = "a b:c", auth, []broker.Secret{broker.NewSecret(nasty)}
		}))
		if _, err := p.Issuer.Issue(t.Context(), broker.Request{}); err != nil {
			t.Fatal(err)
		}
		r.want(t, want)
	}
}

// byKey has the client sign with a key.
func byKey(key string) func(*oauth.ProfileConfig) {
	return func(c *oauth.ProfileConfig) {
		c.ClientAuth, c.ClientSecrets, c.PrivateKey, c.KeyID = oauth.PrivateKeyJWT, nil, broker.NewSecret(key), "key-1"
	}
}

// verified are the claims of a form's assertion, once its signature was verified.
func verified(t testing.TB, form url.Values, algorithm jose.SignatureAlgorithm, public crypto.PublicKey) (claims map[string]any, kid string) {
	t.Helper()
	if got := form.Get("client_assertion_type"); got != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer" {
		t.Errorf("client_assertion_type is %q", got)
	}
	token, err := jwt.ParseSigned(form.Get("client_assertion"), []jose.SignatureAlgorithm{algorithm})
	if err != nil {
		t.Fatalf("assertion: %v", err)
	}
	if err := token.Claims(public, &claims); err != nil {
		t.Fatalf("assertion: %v", err)
	}
	return claims, token.Headers[0].KeyID
}

func TestAssertionsVerify(t *testing.T) {
	rsaKey := made[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048))
	ecKey := p256(t)
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sec1 := made[[]byte](t)(x509.MarshalECPrivateKey(ecKey))
	for name, tc := range map[string]struct {
		pem       string
		key       crypto.Signer
		algorithm jose.SignatureAlgorithm
	}{
		"RSA":         {keyPEM(t, rsaKey), rsaKey, jose.RS256},
		"RSA, PKCS 1": {block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey)), rsaKey, jose.RS256},
		"P-256":       {keyPEM(t, ecKey), ecKey, jose.ES256},
		"P-256, SEC1": {block("EC PARAMETERS", []byte("x")) + block("EC PRIVATE KEY", sec1), ecKey, jose.ES256},
		"Ed25519":     {keyPEM(t, edKey), edKey, jose.EdDSA},
	} {
		t.Run(name, func(t *testing.T) {
			var forms []url.Values
			_, base := record(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if _, _, basic := r.BasicAuth(); basic || r.ParseForm() != nil || r.PostForm.Has("client_secret") {
					t.Error("the client authenticated in two ways")
				}
				forms = append(forms, r.PostForm)
				io.WriteString(w, bearer)
			}))
			p := profileFor(t, profileConfig(base, byKey(tc.pem), func(c *oauth.ProfileConfig) { c.RevocationURL = base + "/revoke" }))
			start := time.Now().Unix()
			for range 2 {
				if _, err := p.Issuer.Issue(t.Context(), broker.Request{Scopes: []string{"a"}}); err != nil {
					t.Fatal(err)
				}
			}
			if err := p.Issuer.(broker.Revoker).Revoke(t.Context(), broker.NewSecret("token"), broker.AccessToken); err != nil {
				t.Fatal(err)
			}
			ids := map[any]bool{}
			for _, form := range forms {
				claims, kid := verified(t, form, tc.algorithm, tc.key.Public())
				issued, _ := claims["iat"].(float64)
				expires, _ := claims["exp"].(float64)
				if claims["iss"] != "tester" || claims["sub"] != "tester" || claims["aud"] != base+"/token" || kid != "key-1" || form.Get("client_id") != "tester" {
					t.Errorf("claims are %v, kid %q", claims, kid)
				}
				if life := expires - issued; life < 60 || life > 300 || int64(issued) < start || int64(issued) > time.Now().Unix() {
					t.Errorf("from %v to %v", issued, expires)
				}
				if _, has := claims["nbf"]; has {
					t.Error("there is a nbf")
				}
				ids[claims["jti"]] = true
			}
			if len(forms) != 3 || len(ids) != 3 {
				t.Errorf("%d requests with %d ids", len(forms), len(ids))
			}
		})
	}
}

func TestTheAssertionsAudience(t *testing.T) {
	key := p256(t)
	for name, tc := range map[string]struct {
		discover bool
		audience string
		want     string
	}{
		"token endpoint": {false, "", "BASE/token"},
		"issuer":         {true, "", "BASE/"}, // as it calls itself
		"as configured":  {true, "https://audience", "https://audience"},
	} {
		r, base := record(t, nil)
		var form url.Values
		r.then(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodGet {
				reply{body: metadataOf(base, `"issuer":"`+base+`/"`)}.ServeHTTP(w, r)
				return
			}
			r.ParseForm()
			form = r.PostForm
			io.WriteString(w, bearer)
		}))
		p := profileFor(t, profileConfig(base, byKey(keyPEM(t, key)), func(c *oauth.ProfileConfig) {
			if c.AssertionAudience = tc.audience; tc.discover {
				c.Issuer, c.TokenURL, c.AuthorizationURL = base, "", ""
			}
		}))
		if _, err := p.Issuer.Issue(t.Context(), broker.Request{}); err != nil {
			t.Fatal(err)
		}
		claims, _ := verified(t, form, jose.ES256, key.Public())
		if want := strings.Replace(tc.want, "BASE", base, 1); claims["aud"] != want {
			t.Errorf("%s: the audience is %v, want %s", name, claims["aud"], want)
		}
	}
}

// A server that refuses an assertion is not asked again, and what it repeats of
// it is not shown.
func TestAnAssertionThatIsRefused(t *testing.T) {
	seen, base := record(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusUnauthorized)
		io.WriteString(w, `{"error":"invalid_client","error_description":"not `+r.PostFormValue("client_assertion")[20:60]+`"}`)
	}))
	grant, err := profileFor(t, profileConfig(base, byKey(keyPEM(t, p256(t))))).Issuer.Issue(t.Context(), broker.Request{})
	wantKind(t, failure(t, grant, err), broker.ClientRejected, `401 invalid_client: "not [redacted]"`)
	if n := len(seen.requests()); n != 1 {
		t.Errorf("the server was asked %d times", n)
	}
}

// mutualTLS is a server that admits no connection without a client's certificate
// from clients, and remembers whose it was.
func mutualTLS(t *testing.T, server, clients *testca.Authority, h http.Handler) (base string, subjects *[]string) {
	t.Helper()
	subjects = new([]string)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*subjects = append(*subjects, strings.Join(r.TLS.PeerCertificates[0].DNSNames, " "))
		h.ServeHTTP(w, r)
	}))
	s.TLS = &tls.Config{
		Certificates: []tls.Certificate{server.Leaf(testca.Loopback)},
		ClientAuth:   tls.RequireAndVerifyClientCert,
		ClientCAs:    clients.Pool(),
	}
	s.Config.ErrorLog = discardLog()
	s.EnableHTTP2 = true
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.URL, subjects
}

// byCertificate has the client present what clients' authority made for it.
func byCertificate(t *testing.T, server, clients *testca.Authority) func(*oauth.ProfileConfig) {
	t.Helper()
	certificate, key := testca.PEM(t, clients.Leaf(testca.Named("tester")))
	return func(c *oauth.ProfileConfig) {
		c.ClientAuth, c.ClientSecrets, c.Certificate, c.PrivateKey = oauth.TLSClientAuth, nil, certificate, broker.NewSecret(string(key))
		c.Transport = oauth.NewTransport(oauth.TransportConfig{TLS: &tls.Config{RootCAs: server.Pool()}})
		t.Cleanup(c.Transport.CloseIdleConnections)
	}
}

func TestTLSClientAuth(t *testing.T) {
	server, clients := testca.New(t), testca.New(t)
	r := &recorder{answer: reply{body: bearer}}
	base, subjects := mutualTLS(t, server, clients, r)
	p := profileFor(t, profileConfig(base, byCode, byCertificate(t, server, clients), func(c *oauth.ProfileConfig) { c.RevocationURL = base + "/revoke" }))
	// One-time requests have connections of their own, others share them.
	if _, err := p.Issuer.Issue(t.Context(), broker.Request{RefreshToken: broker.NewSecret("r")}); err != nil {
		t.Fatal(err)
	}
	if err := p.Issuer.(broker.Revoker).Revoke(t.Context(), broker.NewSecret("token"), broker.AccessToken); err != nil {
		t.Fatal(err)
	}
	r.want(t,
		posted("/token", "client_id=tester&grant_type=refresh_token&refresh_token=r"),
		posted("/revoke", "client_id=tester&token=token&token_type_hint=access_token"))
	if got := strings.Join(*subjects, ","); got != "tester,tester" {
		t.Errorf("the server saw certificates of %s", got)
	}

	// Another profile over the same Transport presents nothing.
	plain := profileConfig(base, byCertificate(t, server, clients))
	if _, err := oauth.NewProfile(plain); err != nil {
		t.Fatal(err)
	}
	plain.ClientAuth, plain.Certificate, plain.PrivateKey = oauth.ClientSecretPost, nil, broker.Secret{}
	plain.ClientSecrets = []broker.Secret{broker.NewSecret(canary)}
	grant, err := profileFor(t, plain).Issuer.Issue(t.Context(), broker.Request{})
	failure(t, grant, err)
	r.want(t)
}

// A certificate that the server does not trust is no verdict on the client: the
// server has not answered.
func TestAClientCertificateThatIsNotTrusted(t *testing.T) {
	server := testca.New(t)
	r := &recorder{answer: reply{body: bearer}}
	base, _ := mutualTLS(t, server, testca.New(t), r)
	grant, err := profileFor(t, profileConfig(base, byCertificate(t, server, testca.New(t)))).Issuer.Issue(t.Context(), broker.Request{})
	if e := failure(t, grant, err); e.Kind != broker.Unavailable && e.Kind != broker.Ambiguous {
		t.Errorf("kind is %v (%s)", e.Kind, e.Text)
	}
	r.want(t)
}

// The aliases are for clients with a certificate, and for them alone; the
// metadata is asked for without it.
func TestMTLSAliases(t *testing.T) {
	server, clients := testca.New(t), testca.New(t)
	r := &recorder{answer: reply{body: bearer}}
	secure, subjects := mutualTLS(t, server, clients, r)
	var asked []string
	plainServer := httptest.NewUnstartedServer(nil)
	plainServer.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && len(r.TLS.PeerCertificates) > 0 {
			t.Error("the metadata was asked for with a certificate")
		}
		asked = append(asked, r.Method+" "+r.URL.Path)
		if r.Method == http.MethodGet {
			io.WriteString(w, metadataOf(plainServer.URL, `"mtls_endpoint_aliases":{"token_endpoint":"`+secure+`/mtls/token","authorization_endpoint":"`+secure+`/mtls/authorize"}`))
			return
		}
		io.WriteString(w, bearer)
	})
	plainServer.TLS = &tls.Config{Certificates: []tls.Certificate{server.Leaf(testca.Loopback)}, ClientAuth: tls.RequestClientCert}
	plainServer.StartTLS()
	t.Cleanup(plainServer.Close)
	discovered := func(c *oauth.ProfileConfig) { c.Issuer, c.TokenURL, c.AuthorizationURL = plainServer.URL, "", "" }
	byTLS := profileConfig("", byCode, byCertificate(t, server, clients), discovered)
	p := profileFor(t, byTLS)
	if _, err := p.Issuer.Issue(t.Context(), broker.Request{RefreshToken: broker.NewSecret("r")}); err != nil {
		t.Fatal(err)
	}
	r.want(t, posted("/mtls/token", "client_id=tester&grant_type=refresh_token&refresh_token=r"))
	if err := p.Issuer.(broker.Revoker).Revoke(t.Context(), broker.NewSecret("t"), broker.AccessToken); err != nil { // has no alias
		t.Fatal(err)
	}
	if u, err := p.Issuer.(broker.Authorizer).AuthorizationURL(t.Context(), broker.AuthorizationRequest{}); err != nil || !strings.HasPrefix(u, plainServer.URL+"/authorize?") {
		t.Errorf("a person signs in at %s (error %v)", u, err)
	}
	bySecret := profileConfig("", discovered)
	bySecret.Transport = byTLS.Transport
	if _, err := profileFor(t, bySecret).Issuer.Issue(t.Context(), broker.Request{}); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(asked, ","); got != "GET /.well-known/openid-configuration,POST /revoke,POST /token" {
		t.Errorf("the plain endpoints saw %s", got)
	}
	if len(*subjects) != 1 {
		t.Errorf("the others saw certificates of %v", *subjects)
	}
}

// A certificate file may hold the chain, and a key in another block.
func TestAChainIsPresented(t *testing.T) {
	server, clients := testca.New(t), testca.New(t)
	var chain int
	base, _ := mutualTLS(t, server, clients, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		chain = len(r.TLS.PeerCertificates)
		io.WriteString(w, bearer)
	}))
	p := profileFor(t, profileConfig(base, byCertificate(t, server, clients), func(c *oauth.ProfileConfig) {
		c.Certificate = bytes.Join([][]byte{[]byte(c.PrivateKey.Reveal()), c.Certificate, clients.PEM()}, nil)
	}))
	if _, err := p.Issuer.Issue(t.Context(), broker.Request{}); err != nil || chain != 2 {
		t.Errorf("%d certificates were presented (error %v)", chain, err)
	}
}
