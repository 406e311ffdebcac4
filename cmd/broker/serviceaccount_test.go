package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/tokenbroker/tokenbroker/internal/testca"
)

const kubeIssuer = "https://kube.example.com"

// kube signs service account tokens.
type kube struct {
	t    testing.TB
	id   string
	key  *ecdsa.PrivateKey
	sign jose.Signer
}

func newKube(t testing.TB, id string) *kube {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	sign, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key, KeyID: id}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return &kube{t, id, key, sign}
}

func (k *kube) keys() string {
	k.t.Helper()
	data, err := json.Marshal(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: &k.key.PublicKey, KeyID: k.id}}})
	if err != nil {
		k.t.Fatal(err)
	}
	return string(data)
}

// token is that of an account in the namespace "shop", for an hour.
func (k *kube) token(account, audience string) string {
	k.t.Helper()
	now := time.Now()
	token, err := jwt.Signed(k.sign).Claims(jwt.Claims{
		Issuer: kubeIssuer, Subject: "system:serviceaccount:shop:" + account, Audience: jwt.Audience{audience},
		IssuedAt: jwt.NewNumericDate(now), NotBefore: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(time.Hour)),
	}).Claims(map[string]any{"kubernetes.io": map[string]any{"namespace": "shop", "serviceaccount": map[string]any{"name": account, "uid": "1"}}}).Serialize()
	if err != nil {
		k.t.Fatal(err)
	}
	return token
}

// withAccounts is a config with TLS and one cluster.
func (s *stage) withAccounts(keys string) string {
	s.t.Helper()
	whole := read(s.t, s.config(`policy:`, `  - {callers: ["k8s://prod/shop/web"], profiles: [invoices], allow: [issue]}`))
	return s.write("config.yaml", strings.Replace(whole, `{address: "127.0.0.1:0"}`,
		`{address: "127.0.0.1:0", tls: {certificate: server.pem, private_key: server.key, client_ca: ca.pem}, `+
			`service_accounts: [{cluster: prod, issuer: "`+kubeIssuer+`", audience: token-broker, `+keys+`}]}`, 1))
}

// Who shows a token of the cluster needs no certificate, and is that account.
func TestServeToServiceAccounts(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.tlsFiles(testca.New(t))
	k := newKube(t, "one")
	s.write("jwks.json", k.keys())
	p := start(t, s.withAccounts("jwks_file: jwks.json"))
	as := func(token string, args ...string) outcome {
		return command(t, append(args, "--address", p.address, "--ca", s.path("ca.pem"), "--timeout", "10s", "--token-file", s.write("token", token+"\n"))...)
	}
	good := k.token("web", "token-broker")
	if got := as(good, "token", "invoices"); got.status != 0 || strings.Count(got.stdout, ".") != 2 {
		t.Errorf("token: %+v", got)
	}
	if got := as(good, "whoami"); !strings.Contains(got.stdout, "k8s://prod/shop/web") || !strings.Contains(got.stdout, "service_account") {
		t.Errorf("whoami: %+v", got)
	}
	if got := as(good, "reset", "invoices"); got.status != 1 || !strings.Contains(got.stderr, "CALLER_DENIED") {
		t.Errorf("reset: %+v", got)
	}
	if got := as(k.token("other", "token-broker"), "token", "invoices"); got.status != 1 || !strings.Contains(got.stderr, "CALLER_DENIED") {
		t.Errorf("another account: %+v", got)
	}
	stranger := newKube(t, "one").token("web", "token-broker")
	for name, token := range map[string]string{"another audience": k.token("web", "vault"), "a stranger's key": stranger, "garbage": "a.b.c"} {
		got := as(token, "token", "invoices")
		if got.status != 1 || !strings.Contains(got.stderr, "CALLER_UNKNOWN") {
			t.Errorf("%s: %+v", name, got)
		}
		if _, signature, _ := strings.Cut(token, "."); strings.Contains(got.stderr+p.log.String(), signature) {
			t.Errorf("%s: the token is told", name)
		}
	}

	// A new key in the file is the cluster's, and the old one is not any more.
	next := newKube(t, "two")
	s.write("jwks.json", next.keys())
	p.await("the new key is in force", func() bool { return as(next.token("web", "token-broker"), "token", "invoices").status == 0 })
	if got := as(good, "token", "invoices"); got.status != 1 {
		t.Errorf("with the old key: %+v", got)
	}

	// Keys that cannot be used leave those that can.
	s.write("jwks.json", `{"keys":[{"kty":"oct","kid":"two","k":"`+base64.RawURLEncoding.EncodeToString([]byte("canary-canary"))+`"}]}`)
	p.logged("key 1 is not public")
	if got := as(next.token("web", "token-broker"), "token", "invoices"); got.status != 0 {
		t.Errorf("after bad keys: %+v", got)
	}
	for _, secret := range []string{"canary", good} {
		if strings.Contains(p.log.String(), secret) {
			t.Errorf("%q is in the log", secret)
		}
	}
}

// Keys come from the API server, which wants a token that changes.
func TestServeToServiceAccountsWithKeysFromTheAPIServer(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	ca := testca.New(t)
	s.tlsFiles(ca)
	k := newKube(t, "one")
	var mu sync.Mutex
	wanted := "reviewer-one"
	web := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if r.URL.Path != "/openid/v1/jwks" || r.Header.Get("Authorization") != "Bearer "+wanted {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = io.WriteString(w, k.keys()) // who is gone needs none
	}))
	web.TLS = &tls.Config{Certificates: []tls.Certificate{ca.Leaf(testca.Loopback)}}
	web.Config.ErrorLog = log.New(io.Discard, "", 0)
	web.StartTLS()
	defer web.Close()
	s.write("reviewer", "reviewer-zero\n") // ended already
	p := start(t, s.withAccounts("jwks_url: '"+web.URL+"/openid/v1/jwks', ca: ca.pem, jwks_token: {file: reviewer}"))
	ask := func() outcome {
		return command(t, "token", "invoices", "--address", p.address, "--ca", s.path("ca.pem"), "--timeout", "10s",
			"--token-file", s.write("token", k.token("web", "token-broker")))
	}
	if got := ask(); got.status != 1 || !strings.Contains(got.stderr, "reason: IDENTITY_UNAVAILABLE") {
		t.Errorf("without keys: %+v", got)
	}
	p.logged("answered 401: it does not take the bearer token")
	s.write("reviewer", wanted)
	p.await("the new token is in force", func() bool { return ask().status == 0 })
	if strings.Contains(p.log.String(), "reviewer-") {
		t.Errorf("the token for the keys is in the log\n%s", p.log)
	}
}

func TestTokenFileMistakes(t *testing.T) {
	s := newStage(t)
	for name, c := range map[string]struct{ content, text string }{
		"empty":  {"\n", "does not hold one token and nothing else"},
		"two":    {"canary-1\ncanary-2", "does not hold one token and nothing else"},
		"blanks": {" canary", "does not hold one token and nothing else"},
		"large":  {strings.Repeat("canary", 10000), "is larger than"},
	} {
		got := command(t, "token", "a", "--token-file", s.write(name, c.content))
		if got.status != 2 || !strings.Contains(got.stderr, c.text) || !strings.Contains(got.stderr, s.path(name)) || strings.Contains(got.stderr, "canary") {
			t.Errorf("%s: %+v", name, got)
		}
	}
	if got := command(t, "token", "a", "--token-file", "/no/such/file"); got.status != 2 || !strings.Contains(got.stderr, "reading --token-file /no/such/file: no such file or directory") {
		t.Errorf("missing: %+v", got)
	}
}
