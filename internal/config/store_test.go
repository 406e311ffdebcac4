package config_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/config"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

// storeText is a configuration with a store and a keyset in directory.
func storeText(t testing.TB, directory string, redis ...string) string {
	t.Helper()
	write(t, filepath.Join(directory, "keyset.json"), newKeyset(t))
	return minimal + fmt.Sprintf(`store:
  redis: {%s}
  encryption_keyset: {file: %s/keyset.json}
`, strings.Join(redis, ", "), directory)
}

func TestNoStoreIsMemory(t *testing.T) {
	if c := mustParse(t, minimal); c.Store != nil {
		t.Errorf("got %+v", c.Store)
	}
}

func TestStore(t *testing.T) {
	const sentinels, nodes = "[s1:26379, s2:26379]", "[n1:6379, n2:6379]"
	for name, test := range map[string]struct {
		redis []string
		want  store.RedisOptions
	}{
		"standalone": {[]string{"addresses: ['redis:6379']"}, store.RedisOptions{Addresses: []string{"redis:6379"}}},
		"sentinel": {[]string{"addresses: " + sentinels, "master_name: main"},
			store.RedisOptions{Addresses: []string{"s1:26379", "s2:26379"}, MasterName: "main"}},
		"one sentinel": {[]string{"addresses: ['s:26379']", "master_name: main"},
			store.RedisOptions{Addresses: []string{"s:26379"}, MasterName: "main"}},
		"cluster": {[]string{"addresses: " + nodes}, store.RedisOptions{Addresses: []string{"n1:6379", "n2:6379"}, Cluster: true}},
		"one node of a cluster": {[]string{"addresses: ['n1:6379']", "cluster: true"},
			store.RedisOptions{Addresses: []string{"n1:6379"}, Cluster: true}},
		"user and lease": {[]string{"addresses: ['redis:6379']", "username: broker", "lease: 10s"},
			store.RedisOptions{Addresses: []string{"redis:6379"}, Username: "broker", Lease: 10 * time.Second}},
	} {
		t.Run(name, func(t *testing.T) {
			got := mustParse(t, storeText(t, t.TempDir(), test.redis...)).Store
			if test.want.Lease == 0 {
				test.want.Lease = 3 * time.Second
			}
			if fmt.Sprintf("%+v", got.Redis) != fmt.Sprintf("%+v", test.want) {
				t.Errorf("got\n%+v, want\n%+v", got.Redis, test.want)
			}
			if got.Access.Keyset == nil || !got.Access.Password.IsEmpty() || got.Access.TLS != nil {
				t.Errorf("got access %+v", got.Access)
			}
		})
	}
}

func TestStoreSecrets(t *testing.T) {
	directory := t.TempDir()
	write(t, filepath.Join(directory, "redis"), canary+"\n")
	c := mustParse(t, storeText(t, directory, "addresses: ['localhost:6379']", "password: {file: "+directory+"/redis}"))
	if got := c.Store.Access.Password.Reveal(); got != canary {
		t.Errorf("got password %q", got)
	}
	equal(t, warnings(t, c), nil)
	equal(t, c.Files, []string{filepath.Join(directory, "keyset.json"), filepath.Join(directory, "redis")})
	noCanary(t, fmt.Sprintf("%+v %#v %+v %#v", c, c, c.Store, c.Store))
}

func TestStoreTLS(t *testing.T) {
	directory := t.TempDir()
	writeServerFiles(t, directory)
	redis := func(tls string) []string { return []string{"addresses: ['redis:6379']", "tls: {" + tls + "}"} }

	system := mustParse(t, storeText(t, directory, redis("")...)).Store.Access.TLS
	if system == nil || system.RootCAs != nil || len(system.Certificates) != 0 || system.MinVersion != tls.VersionTLS12 || system.InsecureSkipVerify {
		t.Errorf("got %+v", system)
	}
	c := mustParse(t, storeText(t, directory, redis(fmt.Sprintf("ca: %[1]s/ca.crt, certificate: %[1]s/tls.crt, private_key: %[1]s/tls.key, server_name: cache", directory))...))
	equal(t, warnings(t, c), nil)
	all := c.Store.Access.TLS
	if all.RootCAs == nil || len(all.Certificates) != 1 || all.ServerName != "cache" {
		t.Errorf("got %+v", all)
	}
	for _, name := range []string{"ca.crt", "tls.crt", "tls.key"} {
		if !slices.Contains(c.Files, filepath.Join(directory, name)) {
			t.Errorf("%s is not among the files to watch: %v", name, c.Files)
		}
	}
}

func TestStoreMistakes(t *testing.T) {
	directory := t.TempDir()
	authority := newAuthority(t)
	leaf, _ := authority.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: "redis"}})
	_, other := authority.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: "other"}})
	write(t, filepath.Join(directory, "leaf.crt"), certificatePEM(leaf))
	write(t, filepath.Join(directory, "other.key"), keyPEM(t, other))
	good := storeText(t, directory, "addresses: ['redis:6379']")
	for name, test := range map[string]struct{ old, new, want string }{
		"empty":            {"store:\n  redis: {addresses: ['redis:6379']}\n  encryption_keyset: {file: " + directory + "/keyset.json}", "store:", "8:1: store.redis: is missing: add it"},
		"no keyset":        {"  encryption_keyset: {file: " + directory + "/keyset.json}\n", "", "8:1: store.encryption_keyset: is missing: add it"},
		"no redis":         {"  redis: {addresses: ['redis:6379']}\n", "", "8:1: store.redis: is missing: add it"},
		"no address":       {"['redis:6379']", "[]", "9:22: store.redis.addresses: must have at least 1 item"},
		"URL":              {"redis:6379", "redis://redis:6379", "9:22: store.redis.addresses: each address must be host:port, for example redis:6379, without redis://"},
		"port":             {"redis:6379", "redis:66379", "9:23: store.redis.addresses[0]: the port must be at most 65535"},
		"short lease":      {"['redis:6379']", "['redis:6379'], lease: 100ms", "9:45: store.redis.lease: must be 1s to 30s"},
		"long lease":       {"['redis:6379']", "['redis:6379'], lease: 1m", "9:45: store.redis.lease: must be 1s to 30s"},
		"sentinel cluster": {"['redis:6379']", "['redis:6379'], master_name: m, cluster: true", "9:63: store.redis.cluster: Sentinels do not watch over a Cluster: remove cluster or master_name"},
		"no password":      {"['redis:6379']", "['redis:6379'], password: {file: /nowhere/redis}", "9:55: store.redis.password.file: reading the secret from /nowhere/redis: no such file or directory"},
		"no authority":     {"['redis:6379']", "['redis:6379'], tls: {ca: /nowhere/ca.crt}", "9:48: store.redis.tls.ca: reading the authorities' certificates from /nowhere/ca.crt: no such file or directory"},
		"no CA":            {"['redis:6379']", "['redis:6379'], tls: {ca: " + directory + "/leaf.crt}", "9:48: store.redis.tls.ca: " + directory + "/leaf.crt: certificate 1 is not that of an authority (CA): remove it"},
		"half a pair":      {"['redis:6379']", "['redis:6379'], tls: {certificate: " + directory + "/leaf.crt}", "9:43: store.redis.tls: certificate and private_key belong together: set both or neither"},
		"another key": {"['redis:6379']", "['redis:6379'], tls: {certificate: " + directory + "/leaf.crt, private_key: " + directory + "/other.key}",
			fmt.Sprintf("9:%d: store.redis.tls.private_key: %[2]s/other.key does not belong to the certificate in %[2]s/leaf.crt: use the two that were made together", 81+len(directory), directory)},
	} {
		t.Run(name, func(t *testing.T) {
			got := problems(t, with(t, good, test.old, test.new))
			if name == "empty" { // both are missing
				equal(t, got, []string{"8:1: store.encryption_keyset: is missing: add it", test.want})
				return
			}
			equal(t, got, []string{test.want})
		})
	}
}

// What is wrong with a keyset is told where the configuration names it, and
// nothing of it is shown.
func TestKeysetMistakes(t *testing.T) {
	directory := t.TempDir()
	text := storeText(t, directory, "addresses: ['redis:6379']")
	path := filepath.Join(directory, "keyset.json")
	good := newKeyset(t)
	for name, content := range map[string]string{
		"no JSON":           canary,
		"another JSON":      `{"` + canary + `": "` + canary + `"}`,
		"cut":               good[:len(good)/2],
		"broken key":        strings.Replace(good, `"value": "`, `"value": "###`+canary, 1),
		"no primary key":    strings.Replace(good, `"primaryKeyId": `, `"primaryKeyId": 1`, 1),
		"of another kind":   strings.Replace(good, "AesGcmKey", "HmacKey", 1),
		"without a prefix":  strings.Replace(good, `"TINK"`, `"RAW"`, 1),
		"encrypted already": `{"encryptedKeyset": "` + canary + `"}`,
	} {
		t.Run(name, func(t *testing.T) {
			write(t, path, content)
			got := problems(t, text)
			if len(got) != 1 || !strings.HasPrefix(got[0], "10:29: store.encryption_keyset.file: ") {
				t.Errorf("got %q", got)
			}
		})
	}
	got := problems(t, with(t, text, "{file: "+path+"}", "{env: SECRET}"))
	if len(got) != 1 || !strings.HasPrefix(got[0], "10:28: store.encryption_keyset.env: ") {
		t.Errorf("got %q", got)
	}
}

func TestStoreWarnings(t *testing.T) {
	directory := t.TempDir()
	const clear = "9:22: store.redis.addresses: without tls the password, and all that is not sealed, travel in clear: add tls"
	for addresses, want := range map[string][]string{
		"['127.0.0.1:6379']":               nil,
		"['localhost:1', '[::1]:2']":       nil,
		"['redis:6379']":                   {clear},
		"['localhost:6379', '10.0.0.1:1']": {clear},
		"['redis:6379'], tls: {}":          nil,
	} {
		equal(t, warnings(t, mustParse(t, storeText(t, directory, "addresses: "+addresses))), want)
	}
	const reads = ": whoever reads the configuration reads this secret: write {file: /path/of/file} or {env: NAME_OF_VARIABLE}"
	var compact bytes.Buffer
	if err := json.Compact(&compact, []byte(newKeyset(t))); err != nil {
		t.Fatal(err)
	}
	text := storeText(t, directory, "addresses: ['127.0.0.1:6379']", "password: {value: "+canary+"}")
	text = with(t, text, "{file: "+directory+"/keyset.json}", "{value: '"+compact.String()+"'}")
	equal(t, warnings(t, mustParse(t, text)), []string{
		"9:60: store.redis.password.value" + reads,
		"10:30: store.encryption_keyset.value" + reads,
	})
}

// Replicas that share a keyset call the same credential the same, whatever else
// their processes have; and they go on doing so while keys are rotated.
func TestReplicasAgreeOnCredentials(t *testing.T) {
	directory := t.TempDir()
	path := write(t, filepath.Join(directory, "broker.yaml"), storeText(t, directory, "addresses: ['127.0.0.1:6379']"))
	credential := func() string {
		t.Helper()
		c, err := config.Load(path, config.Options{LookupEnv: options.LookupEnv}) // with a random key of its own
		if err != nil {
			t.Fatal(err)
		}
		return c.Profiles[0].Credential
	}
	before := credential()
	if credential() != before {
		t.Error("two replicas call one credential differently")
	}
	keyset := broker.NewSecret(newKeyset(t))
	write(t, filepath.Join(directory, "keyset.json"), keyset.Reveal())
	other := credential()
	if other == before {
		t.Error("the credential's name does not come from the keyset")
	}
	for _, step := range []func(broker.Secret) (broker.Secret, error){store.AddKey, store.PromoteKey} {
		var err error
		if keyset, err = step(keyset); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(directory, "keyset.json"), keyset.Reveal())
		if credential() != other {
			t.Error("a rotation of keys gives the credential another name")
		}
	}
}
