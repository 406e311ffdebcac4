package config_test

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/tokenbroker/tokenbroker/internal/config"
	"github.com/tokenbroker/tokenbroker/internal/serviceaccount"
)

// keySet is a JSON Web Key Set of these keys.
func keySet(t testing.TB, keys ...jose.JSONWebKey) string {
	t.Helper()
	set, err := json.Marshal(jose.JSONWebKeySet{Keys: keys})
	if err != nil {
		t.Fatal(err)
	}
	return string(set)
}

// newKeySet has one new public key.
func newKeySet(t testing.TB, id string) string {
	t.Helper()
	return keySet(t, jose.JSONWebKey{Key: &newAuthority(t).key.PublicKey, KeyID: id, Use: "sig"})
}

// cluster is a configuration with one cluster, whose lines begin at 10.
func cluster(lines ...string) string {
	return minimal + "server:\n  service_accounts:\n  - cluster: prod\n    " + strings.Join(lines, "\n    ") + "\n"
}

func TestServiceAccounts(t *testing.T) {
	directory := t.TempDir()
	writeServerFiles(t, directory)
	write(t, filepath.Join(directory, "jwks.json"), newKeySet(t, "k"))
	write(t, filepath.Join(directory, "token"), canary+"\n")
	c := mustParse(t, cluster("issuer: https://kube.example.com", "audience: token-broker", "jwks_file: "+directory+"/jwks.json")+
		"  - {cluster: dev, issuer: https://dev.example.com, audience: token-broker, algorithms: [EdDSA], max_lifetime: 10m,\n"+
		"     jwks_url: https://dev.example.com/openid/v1/jwks, ca: "+directory+"/ca.crt, jwks_token: {file: "+directory+"/token}}\n")
	equal(t, warnings(t, c), nil)
	prod, dev := c.Server.ServiceAccounts[0], c.Server.ServiceAccounts[1]
	if prod.Name != "prod" || prod.Issuer != "https://kube.example.com" || prod.Audience != "token-broker" || prod.MaxLifetime != time.Hour || prod.Source != nil {
		t.Errorf("got %+v", prod)
	}
	equal(t, prod.Keys.IDs(), []string{"k"})
	equal(t, prod.Algorithms, []string{"RS256", "ES256"})
	if dev.Keys != nil || dev.Source.URL != "https://dev.example.com/openid/v1/jwks" || dev.Source.CA == nil || dev.Source.Token.Reveal() != canary || dev.MaxLifetime != 10*time.Minute {
		t.Errorf("got %+v", dev)
	}
	equal(t, dev.Algorithms, []string{"EdDSA"})
	for _, name := range []string{"jwks.json", "ca.crt", "token"} {
		if !strings.Contains(strings.Join(c.Files, " ")+" ", filepath.Join(directory, name)+" ") {
			t.Errorf("%s is not watched, only %v", name, c.Files)
		}
	}
	noCanary(t, fmt.Sprintf("%+v %#v", dev, dev.Source))
}

func TestServiceAccountsMistakes(t *testing.T) {
	const (
		issuer, audience, url = "issuer: https://kube.example.com", "audience: token-broker", "jwks_url: https://kube.example.com/jwks"
		at                    = "server.service_accounts[0]"
	)
	for name, test := range map[string]struct {
		text string
		want []string
	}{
		"nothing": {cluster(), []string{
			"10:5: " + at + ": say where the cluster's keys are: set jwks_file or jwks_url",
			"10:5: " + at + ".audience: is missing: add it",
			"10:5: " + at + ".issuer: is missing: add it"}},
		"both": {cluster(issuer, audience, url, "jwks_file: x"), []string{
			"14:5: " + at + ".jwks_file: cannot be set beside jwks_url (line 13): remove one of the two"}},
		"a cluster's name": {strings.Replace(cluster(issuer, audience, url), "prod", "pro/d", 1), []string{
			"10:14: " + at + ".cluster: must be 1 to 63 of the characters a to z, 0 to 9, . and -, and begin and end with a letter or digit"}},
		"tokens without an end": {cluster("issuer: kubernetes/serviceaccount", audience, url), []string{
			"11:13: " + at + ".issuer: is that of tokens without an end, which are not accepted: write the issuer that is in projected tokens, which kubectl get --raw /.well-known/openid-configuration shows"}},
		"no URL": {cluster(issuer, audience, "jwks_url: kube.example.com"), []string{
			"13:15: " + at + ".jwks_url: must be https:// and a host, for example https://kubernetes.default.svc/openid/v1/jwks"}},
		"in clear": {cluster(issuer, audience, "jwks_url: http://kube.example.com"), []string{
			"13:15: " + at + ".jwks_url: whoever is on the way could put in keys of their own: use https://"}},
		"a password in the URL": {cluster(issuer, audience, "jwks_url: https://user:"+canary+"@kube.example.com"), []string{
			"13:15: " + at + ".jwks_url: holds a user name: remove it, and use jwks_token"}},
		"a fragment": {cluster(issuer, audience, url+"#"+canary), []string{
			"13:15: " + at + ".jwks_url: has a fragment (#...): remove it"}},
		"a token for a file": {cluster(issuer, audience, "jwks_file: /nowhere/jwks.json", "jwks_token: {env: SECRET}"), []string{
			"10:5: " + at + ": ca and jwks_token are about jwks_url: set it, or remove them",
			"13:16: " + at + ".jwks_file: reading the keys from /nowhere/jwks.json: no such file or directory"}},
		"a token that no header can carry": {cluster(issuer, audience, url, "jwks_token: {env: BLANKS}"), []string{
			"14:23: " + at + ".jwks_token.env: the token has blanks or letters that no header can carry"}},
		"no authority": {cluster(issuer, audience, url, "ca: /nowhere/ca.crt"), []string{
			"14:9: " + at + ".ca: reading the authorities' certificates from /nowhere/ca.crt: no such file or directory"}},
		"an algorithm with a shared secret": {cluster(issuer, audience, url, "algorithms: [RS256, HS256]"), []string{
			"14:25: " + at + ".algorithms[1]: must be one of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, ES512, EdDSA"}},
		"a long life": {cluster(issuer, audience, url, "max_lifetime: 48h"), []string{
			"14:19: " + at + ".max_lifetime: must be 5m to 24h"}},
		"twice": {cluster(issuer, audience, url) + "  - {cluster: prod, issuer: https://kube.example.com, audience: b, jwks_url: https://kube.example.com}\n", []string{
			"14:15: server.service_accounts[1].cluster: service_accounts[0] has the same name: each cluster must have its own",
			"14:29: server.service_accounts[1].issuer: service_accounts[0] has the same issuer: each cluster must have its own"}},
	} {
		t.Run(name, func(t *testing.T) { equal(t, problems(t, test.text), test.want) })
	}
}

func TestKeySetMistakes(t *testing.T) {
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	private := newAuthority(t).key
	public := jose.JSONWebKey{Key: &private.PublicKey, KeyID: "k"}
	for name, test := range map[string]struct{ content, want string }{
		"no JSON":           {canary, "there is no JSON Web Key Set in it"},
		"a page":            {"<html>" + canary, "there is no JSON Web Key Set in it"},
		"a key, not a set":  {`{"kty":"oct","k":"` + canary + `"}`, "there is no JSON Web Key Set in it"},
		"empty":             {`{"keys":[]}`, "there is no key in it that verifies signatures"},
		"null":              {`{"keys":[null]}`, "key 1 cannot be read"},
		"two sets":          {`{"keys":[],"keys":[]}`, "there is no JSON Web Key Set in it"},
		"a private key":     {keySet(t, public, jose.JSONWebKey{Key: private, KeyID: "x"}), "key 2 is not public: remove it, replace that key, and publish its public half only"},
		"a symmetric key":   {`{"keys":[{"kty":"oct","kid":"x"}]}`, "key 1 is symmetric, so whoever can check tokens could make them: remove it"},
		"a shared secret":   {keySet(t, jose.JSONWebKey{Key: []byte(canary), KeyID: "x"}), "key 1 is not public: remove it"},
		"a weak key":        {keySet(t, jose.JSONWebKey{Key: &weak.PublicKey, KeyID: "x"}), "key 1 is weak: RSA takes 2048 bits and the exponent 65537 at least"},
		"no id":             {keySet(t, jose.JSONWebKey{Key: &private.PublicKey}), "key 1 has no kid, by which tokens would name it: add it"},
		"one id for two":    {keySet(t, public, jose.JSONWebKey{Key: &newAuthority(t).key.PublicKey, KeyID: "k"}), "key 2 has the same kid as another one"},
		"a damaged key":     {`{"keys":[{"kty":"EC","crv":"P-256","kid":"x","x":"` + canary + `","y":"AA"}]}`, "key 1 cannot be used: it is damaged, or larger than 4096 bits"},
		"for encryption":    {keySet(t, jose.JSONWebKey{Key: &private.PublicKey, KeyID: "x", Use: "enc"}), "there is no key in it that verifies signatures"},
		"a kind of the day": {`{"keys":[{"kty":"` + canary + `","kid":"x"}]}`, "there is no key in it that verifies signatures"},
		"too large":         {`{"keys":[]}` + strings.Repeat(" ", 1<<20), "the file is larger than 1024 KiB"},
	} {
		t.Run(name, func(t *testing.T) {
			file := write(t, filepath.Join(t.TempDir(), "jwks.json"), test.content)
			got := problems(t, cluster("issuer: https://kube.example.com", "audience: a", "jwks_file: "+file))
			if len(got) != 1 || !strings.HasPrefix(got[0], "13:16: server.service_accounts[0].jwks_file: ") || !strings.Contains(got[0], file) || !strings.Contains(got[0], test.want) {
				t.Errorf("got %q", got)
			}
		})
	}
	whole, err := serviceaccount.ParseKeys([]byte(keySet(t, public, public)))
	if err != nil {
		t.Fatal(err)
	}
	equal(t, whole.IDs(), []string{"k"})
}

// A token that is made for the API server is one that its bearer shows to
// others; whoever gets it could be the bearer here.
func TestAudienceOfTheAPIServerIsWarnedOf(t *testing.T) {
	for _, audience := range []string{"https://kube.example.com", "https://kubernetes.default.svc"} {
		got := warnings(t, mustParse(t, cluster("issuer: https://kube.example.com", "audience: "+audience, "jwks_url: https://kube.example.com/jwks")))
		if len(got) != 1 || !strings.HasPrefix(got[0], "12:15: server.service_accounts[0].audience: is the API server's own") {
			t.Errorf("%s: got %q", audience, got)
		}
	}
}

// On a socket without TLS tokens may say who somebody is.
func TestServiceAccountsWithoutTLSAreNoSilence(t *testing.T) {
	text := cluster("issuer: https://kube.example.com", "audience: a", "jwks_url: https://kube.example.com/jwks") +
		"policy: [{callers: ['k8s://prod/shop/web'], profiles: [p], allow: [issue]}]\n"
	equal(t, warnings(t, mustParse(t, text)), nil)
}

// A rule for a cluster that nobody has configured would silently allow nothing.
func TestRulesForUnknownClustersAreWarnedOf(t *testing.T) {
	for pattern, want := range map[string]string{
		"k8s://prod/shop/web": "",
		"k8s://p*/shop/web":   "",
		"k8s://*/shop/web":    "",
		"k8s://prd/shop/web":  "nobody can prove to have this name: server.service_accounts has no cluster prd; did you mean prod?",
		"k8s://test*/shop/*":  "nobody can prove to have this name: server.service_accounts has no cluster test*",
	} {
		text := cluster("issuer: https://kube.example.com", "audience: a", "jwks_url: https://kube.example.com/jwks") +
			"policy: [{callers: [anonymous, '" + pattern + "'], profiles: [p], allow: [issue]}]\n"
		got := warnings(t, mustParse(t, text))
		if want == "" {
			equal(t, got, nil)
		} else if len(got) != 1 || !strings.HasSuffix(got[0], "policy[0].callers[1]: "+want) {
			t.Errorf("%s: got %q", pattern, got)
		}
	}
}

// New keys in the file are new keys at the next load.
func TestKeySetIsReadAgain(t *testing.T) {
	directory := t.TempDir()
	file := write(t, filepath.Join(directory, "jwks.json"), newKeySet(t, "one"))
	path := write(t, filepath.Join(directory, "broker.yaml"), cluster("issuer: https://kube.example.com", "audience: a", "jwks_file: jwks.json"))
	loader := config.NewLoader(path, options)
	for _, id := range []string{"one", "two"} {
		write(t, file, newKeySet(t, id))
		c, err := loader.Load()
		if err != nil {
			t.Fatal(err)
		}
		equal(t, c.Server.ServiceAccounts[0].Keys.IDs(), []string{id})
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := loader.Load(); err == nil {
		t.Error("loaded without the file")
	}
}
