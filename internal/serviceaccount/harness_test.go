package serviceaccount_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/serviceaccount"
)

const (
	issuer   = "https://kube.example.com"
	audience = "token-broker"
)

// signer is one of a cluster's keys.
type signer struct {
	id        string
	algorithm jose.SignatureAlgorithm
	private   crypto.Signer
}

// keysOfTests are made once, as RSA keys take long.
var keysOfTests = sync.OnceValue(func() map[string]crypto.Signer {
	one, err1 := rsa.GenerateKey(rand.Reader, 2048)
	two, err2 := rsa.GenerateKey(rand.Reader, 2048)
	p256, err3 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p384, err4 := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	p521, err5 := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	_, ed, err6 := ed25519.GenerateKey(rand.Reader)
	if err := errors.Join(err1, err2, err3, err4, err5, err6); err != nil {
		panic(err)
	}
	return map[string]crypto.Signer{"rsa": one, "rsa2": two, "p256": p256, "p384": p384, "p521": p521, "ed25519": ed}
})

// key is one of those, under the id that tokens name it by.
func key(name string, algorithm jose.SignatureAlgorithm) signer {
	return signer{name, algorithm, keysOfTests()[name]}
}

func rs256() signer { return key("rsa", jose.RS256) }

// set is the JSON Web Key Set of the signers' public keys.
func set(t testing.TB, signers ...signer) []byte {
	t.Helper()
	var keys jose.JSONWebKeySet
	for _, s := range signers {
		keys.Keys = append(keys.Keys, jose.JSONWebKey{Key: s.private.Public(), KeyID: s.id, Use: "sig"})
	}
	data, err := json.Marshal(keys)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func keys(t testing.TB, signers ...signer) *serviceaccount.Keys {
	t.Helper()
	k, err := serviceaccount.ParseKeys(set(t, signers...))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// claims as Kubernetes writes them into a projected token, for an hour.
func claims() map[string]any {
	now := time.Now().Unix()
	return map[string]any{
		"iss": issuer, "aud": []string{audience}, "sub": "system:serviceaccount:shop:web",
		"iat": now, "nbf": now, "exp": now + 3600, "jti": "2a4f1b1e-1f52-4c1a-8d0c-0a2b8c1f0e11",
		"kubernetes.io": map[string]any{
			"namespace":      "shop",
			"node":           map[string]any{"name": "node-1", "uid": "5d1e2a7c-43d0-4a0e-9c39-8b4b2e64a111"},
			"pod":            map[string]any{"name": "web-0", "uid": "8f0a8f0c-2a43-41b5-9f0a-0a7ad1f9a222"},
			"serviceaccount": map[string]any{"name": "web", "uid": "1c9d2f34-7e0d-4a7b-b6cf-3f8a4f6ae333"},
			"warnafter":      now + 3000,
		},
	}
}

// but is the claims with some changed; nil removes one.
func but(c map[string]any, changes map[string]any) map[string]any {
	changed := maps.Clone(c)
	for name, value := range changes {
		if changed[name] = value; value == nil {
			delete(changed, name)
		}
	}
	return changed
}

// sign makes a token as Kubernetes does, with a library that is not ours.
func (s signer) sign(t testing.TB, c map[string]any) string {
	t.Helper()
	return s.signWith(t, nil, c)
}

func (s signer) signWith(t testing.TB, o *jose.SignerOptions, c map[string]any) string {
	t.Helper()
	return s.signText(t, o, payload(t, c))
}

func (s signer) signText(t testing.TB, o *jose.SignerOptions, payload string) string {
	t.Helper()
	by, err := jose.NewSigner(jose.SigningKey{Algorithm: s.algorithm, Key: jose.JSONWebKey{Key: s.private, KeyID: s.id}}, o)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := by.Sign([]byte(payload))
	if err != nil {
		t.Fatal(err)
	}
	token, err := signed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// raw puts a token together by hand, for what no library would sign. The
// signature is right, by RS256, for what stands there.
func (s signer) raw(t testing.TB, header, payload string) string {
	t.Helper()
	signed := encode([]byte(header)) + "." + encode([]byte(payload))
	digest := crypto.SHA256.New()
	digest.Write([]byte(signed))
	signature, err := s.private.Sign(rand.Reader, digest.Sum(nil), crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + encode(signature)
}

func encode(data []byte) string { return base64.RawURLEncoding.EncodeToString(data) }

func payload(t testing.TB, c map[string]any) string {
	t.Helper()
	data, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// prod is a cluster with fixed keys.
func prod(t testing.TB, signers ...signer) serviceaccount.Cluster {
	return serviceaccount.Cluster{Name: "prod", Issuer: issuer, Audience: audience, Keys: keys(t, signers...)}
}

func verifier(clusters ...serviceaccount.Cluster) *serviceaccount.Verifier {
	return serviceaccount.New(clusters, serviceaccount.Options{})
}

// accepted verifies a token that is right.
func accepted(t testing.TB, v *serviceaccount.Verifier, token string) *access.Caller {
	t.Helper()
	c, err := v.Verify(context.Background(), token)
	if err != nil {
		t.Fatalf("refused: %v", err)
	}
	return c
}

// refused verifies a token that is not, and wants these words.
func refused(t testing.TB, v *serviceaccount.Verifier, token, words string) {
	t.Helper()
	for range 2 { // a refusal is not forgotten by being told
		c, err := v.Verify(context.Background(), token)
		if c != nil || err == nil || !strings.Contains(err.Error(), words) {
			t.Fatalf("got %v, %v; want a refusal that says %q", c, err, words)
		}
		silent(t, err, token)
	}
}

// silent fails if an error repeats any part of the token, decoded or not, that
// is long enough to be one.
func silent(t testing.TB, err error, token string) {
	t.Helper()
	const part = 12
	texts := []string{token}
	for _, p := range strings.Split(token, ".") {
		decoded, _ := base64.RawURLEncoding.DecodeString(p)
		texts = append(texts, string(decoded))
	}
	for _, text := range texts {
		for i := 0; i+part <= len(text); i++ {
			piece := text[i : i+part]
			if strings.Contains(err.Error(), piece) && !strings.Contains("kubernetes.io", piece) {
				t.Fatalf("the error %q repeats %q of the token", err, piece)
			}
		}
	}
}
