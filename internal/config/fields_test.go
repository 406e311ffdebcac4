package config_test

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/config"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

// A profile to set fields in, and one that the fields of other kinds of
// profiles are set in.
const (
	profile = "profiles: [{name: p, vantage: {region: eu, client_id: c, client_secret: {env: SECRET}, client_credentials: {}}}]\n"
	tlsPart = "server: {address: 127.0.0.1:7443, tls: {certificate: $DIR/tls.crt, private_key: $DIR/tls.key, client_ca: $DIR/ca.crt}}\n"

	// A profile with refresh tokens.
	passwordProfile = "profiles: [{name: p, scopes: [openid, offline_access], rotation: {}, vantage: {region: eu, client_id: c, client_secret: {env: SECRET}, " +
		"password: {username: {env: SECRET}, password: {env: SECRET}}}}]\n"

	// A store, without and with all that TLS can have.
	storePart = "store: {redis: {addresses: ['r:1'], password: {env: SECRET}}, encryption_keyset: {file: $DIR/keyset}}\n"
	redisTLS  = "store: {redis: {addresses: ['r:1'], tls: {ca: $DIR/ca.crt, certificate: $DIR/tls.crt, private_key: $DIR/tls.key}}, encryption_keyset: {file: $DIR/keyset}}\n"
)

// probe sets one field: a replacement in a configuration, or text after it.
type probe struct{ base, old, new string }

// used is every field that makes a difference, and how to see it.
var used = map[string]probe{
	"server.address":                           {profile, "", "server: {address: 127.0.0.1:1}\n"},
	"server.tls.certificate":                   {profile + tlsPart, "$DIR/tls.crt", "$DIR/other/tls.crt"},
	"server.tls.private_key":                   {profile + tlsPart, "$DIR/tls.key", "$DIR/other/tls.key"},
	"server.tls.client_ca":                     {profile + tlsPart, "$DIR/ca.crt", "$DIR/other/ca.crt"},
	"server.tls.min_version":                   {profile + tlsPart, "tls: {", "tls: {min_version: 1.2, "},
	"server.reflection":                        {profile, "", "server: {reflection: true}\n"},
	"admin.address":                            {profile, "", "admin: {address: 127.0.0.1:1}\n"},
	"store.redis.addresses":                    {profile + storePart, "'r:1'", "'r:2'"},
	"store.redis.master_name":                  {profile + storePart, "password:", "master_name: m, password:"},
	"store.redis.username":                     {profile + storePart, "password:", "username: u, password:"},
	"store.redis.password.file":                {profile + storePart, "password: {env: SECRET}", "password: {file: $DIR/secret}"},
	"store.redis.password.env":                 {profile + storePart, "password: {env: SECRET}", "password: {env: OTHER}"},
	"store.redis.password.value":               {profile + storePart, "password: {env: SECRET}", "password: {value: s}"},
	"store.redis.tls.ca":                       {profile + redisTLS, "$DIR/ca.crt", "$DIR/other/ca.crt"},
	"store.redis.tls.certificate":              {profile + redisTLS, "$DIR/tls.crt", "$DIR/other/tls.crt"},
	"store.redis.tls.private_key":              {profile + redisTLS, "$DIR/tls.key", "$DIR/other/tls.key"},
	"store.redis.tls.server_name":              {profile + redisTLS, "tls: {", "tls: {server_name: redis, "},
	"store.redis.lease":                        {profile + storePart, "password:", "lease: 5s, password:"},
	"store.redis.cluster":                      {profile + storePart, "password:", "cluster: true, password:"},
	"store.encryption_keyset.file":             {profile + storePart, "$DIR/keyset", "$DIR/other/keyset"},
	"store.encryption_keyset.env":              {profile + storePart, "{file: $DIR/keyset}", "{env: KEYSET}"},
	"store.encryption_keyset.value":            {profile + storePart, "{file: $DIR/keyset}", "{value: $KEYSET}"},
	"profiles.name":                            {profile, "name: p", "name: q"},
	"profiles.scopes":                          {profile, "name: p", "name: p, scopes: [a]"},
	"profiles.default_lifetime":                {profile, "name: p", "name: p, default_lifetime: 5m"},
	"profiles.max_token_age":                   {profile, "name: p", "name: p, max_token_age: 5m"},
	"profiles.coordinated":                     {profile, "name: p", "name: p, coordinated: true"},
	"profiles.rejected_retry":                  {profile, "name: p", "name: p, rejected_retry: 5m"},
	"profiles.vantage.region":                  {profile, "region: eu", "region: us"},
	"profiles.vantage.base_url":                {profile, "region: eu", "base_url: https://vantage.example.com"},
	"profiles.vantage.allow_insecure_http":     {profile, "region: eu", "region: eu, allow_insecure_http: true"},
	"profiles.vantage.tenant_id":               {profile, "region: eu", "region: eu, tenant_id: t"},
	"profiles.vantage.client_id":               {profile, "client_id: c", "client_id: d"},
	"profiles.vantage.client_secret.file":      {profile, "{env: SECRET}", "{file: $DIR/secret}"},
	"profiles.vantage.client_secret.env":       {profile, "{env: SECRET}", "{env: OTHER}"},
	"profiles.vantage.client_secret.value":     {profile, "{env: SECRET}", "{value: s}"},
	"profiles.vantage.client_secrets.file":     {profile, "client_secret: {env: SECRET}", "client_secrets: [{file: $DIR/secret}]"},
	"profiles.vantage.client_secrets.env":      {profile, "client_secret: {env: SECRET}", "client_secrets: [{env: OTHER}]"},
	"profiles.vantage.client_secrets.value":    {profile, "client_secret: {env: SECRET}", "client_secrets: [{value: s}]"},
	"profiles.vantage.client_credentials":      {profile, "client_credentials: {}", ""},
	"profiles.vantage.password.username.file":  {passwordProfile, "username: {env: SECRET}", "username: {file: $DIR/secret}"},
	"profiles.vantage.password.username.env":   {passwordProfile, "username: {env: SECRET}", "username: {env: OTHER}"},
	"profiles.vantage.password.username.value": {passwordProfile, "username: {env: SECRET}", "username: {value: s}"},
	"profiles.vantage.password.password.file":  {passwordProfile, "password: {env: SECRET}", "password: {file: $DIR/secret}"},
	"profiles.vantage.password.password.env":   {passwordProfile, "password: {env: SECRET}", "password: {env: OTHER}"},
	"profiles.vantage.password.password.value": {passwordProfile, "password: {env: SECRET}", "password: {value: s}"},
	"profiles.rotation.one_time":               {passwordProfile, "rotation: {}", "rotation: {one_time: false}"},
	"profiles.rotation.grace":                  {passwordProfile, "rotation: {}", "rotation: {grace: 30s}"},
	"policy.callers":                           {profile + rule, "anonymous", "dns:x"},
	"policy.profiles":                          {profile + rule, "profiles: [p]", "profiles: ['*']"},
	"policy.allow":                             {profile + rule, "issue", "watch"},
	"log.level":                                {profile, "", "log: {level: debug}\n"},
	"log.format":                               {profile, "", "log: {format: text}\n"},
	"profiles.timeout" /* see TestTimeout */ :  {},
}

const rule = "policy: [{callers: [anonymous], profiles: [p], allow: [issue]}]\n"

// refused is every field that this version answers for with a problem. What is
// inside a refused field is refused with it.
var refused = map[string]probe{
	"profiles.secureauth":                 {profile, "vantage:", "secureauth:"},
	"profiles.oauth2":                     {profile, "vantage:", "oauth2:"},
	"profiles.allow_password_grant":       {profile, "name: p", "name: p, allow_password_grant: true"},
	"profiles.secret_rotation":            {profile, "name: p", "name: p, secret_rotation: {before_expiry: 30d}"},
	"profiles.vantage.authorization_code": {profile, "client_credentials: {}", "authorization_code: {redirect_url: 'https://x/'}"},
	"profiles.vantage.product_id":         {profile, "region: eu", "region: eu, product_id: x"},
}

// Every field of the schema is used or refused.
func TestEveryField(t *testing.T) {
	found := map[string]bool{}
	leaves((&configv1.Config{}).ProtoReflect().Descriptor(), "", func(path string) (inside bool) {
		_, isUsed := used[path]
		_, isRefused := refused[path]
		found[path] = true
		return !isUsed && !isRefused
	}, func(path string) { t.Errorf("%s is neither used nor refused", path) })
	for path := range used {
		if !found[path] {
			t.Errorf("%s is not in the schema", path)
		}
	}
	for path := range refused {
		if !found[path] {
			t.Errorf("%s is not in the schema", path)
		}
	}
}

// leaves goes through the fields of message, asks at each whether to go inside,
// and tells those that have no inside.
func leaves(message protoreflect.MessageDescriptor, prefix string, enter func(string) bool, leaf func(string)) {
	for i := range message.Fields().Len() {
		field := message.Fields().Get(i)
		path := strings.TrimPrefix(prefix+"."+string(field.Name()), ".")
		switch inside := field.Message(); {
		case !enter(path):
		case inside == nil || field.IsMap() || inside.Fields().Len() == 0 || inside.FullName() == "google.protobuf.Duration":
			leaf(path)
		default:
			leaves(inside, path, enter, leaf)
		}
	}
}

// aKeyset stands where a configuration has the keyset itself.
var aKeyset = sync.OnceValue(func() string {
	keyset, err := store.NewKeyset()
	if err != nil {
		panic(err)
	}
	return keyset.Reveal()
})

func (p probe) texts(t *testing.T, directory string) (before, after string) {
	t.Helper()
	in := strings.NewReplacer("$DIR", directory, "$KEYSET", strconv.Quote(aKeyset())).Replace
	if p.old == "" {
		return in(p.base), in(p.base + p.new)
	}
	return in(p.base), in(with(t, p.base, p.old, p.new))
}

func TestUsedFieldsMakeADifference(t *testing.T) {
	directory := t.TempDir()
	writeServerFiles(t, directory)
	writeServerFiles(t, filepath.Join(directory, "other"))
	write(t, filepath.Join(directory, "secret"), canary)
	for _, name := range []string{"keyset", "other/keyset"} {
		write(t, filepath.Join(directory, name), newKeyset(t))
	}
	environment := options
	environment.LookupEnv = func(name string) (string, bool) {
		if name == "KEYSET" {
			return aKeyset(), true
		}
		return canary + name, true
	}
	outcome := func(text string) string {
		c, err := config.Parse("broker.yaml", []byte(text), environment)
		if err != nil {
			return err.Error()
		}
		return describe(c)
	}
	for path, p := range used {
		if p.base == "" {
			continue
		}
		t.Run(path, func(t *testing.T) {
			before, after := p.texts(t, directory)
			if _, err := config.Parse("broker.yaml", []byte(before), environment); err != nil {
				t.Fatalf("without the field: %v", err)
			}
			if outcome(before) == outcome(after) {
				t.Error("the field makes no difference")
			}
		})
	}
}

func TestRefusedFieldsAreRefused(t *testing.T) {
	for path, p := range refused {
		t.Run(path, func(t *testing.T) {
			_, after := p.texts(t, "/nowhere")
			got := problems(t, after)
			path := strings.Replace(path, "profiles.", "profiles[0].", 1)
			if !slices.ContainsFunc(got, func(line string) bool {
				return strings.Contains(line, ": "+path+": ") && strings.Contains(line, "this version") && strings.Contains(line, "remove")
			}) {
				t.Errorf("got %q", got)
			}
		})
	}
}

// describe is all that a configuration says, secrets by their fingerprints.
func describe(c *config.Config) string {
	var s strings.Builder
	fmt.Fprintln(&s, c.Server.Network, c.Server.Address, c.Server.Reflection, c.Admin, c.Log, c.Policy, c.Warnings)
	if c.Server.TLS != nil {
		//lint:ignore SA1019 Subjects says too little of the system's authorities only.
		fmt.Fprintln(&s, c.Server.TLS.MinVersion, c.Server.TLS.Certificates[0].Certificate, c.Server.TLS.ClientCAs.Subjects())
	}
	if c.Store != nil {
		fmt.Fprintf(&s, "%+v %s %x\n", c.Store.Redis, credential(c.Store.Access.Password.Reveal()), c.Store.Access.Keyset.FingerprintKey())
		if c.Store.Access.TLS != nil {
			//lint:ignore SA1019 Subjects says too little of the system's authorities only.
			fmt.Fprintln(&s, c.Store.Access.TLS.ServerName, c.Store.Access.TLS.Certificates[0].Certificate, c.Store.Access.TLS.RootCAs.Subjects())
		}
	}
	for _, p := range c.Profiles {
		fmt.Fprintln(&s, p.Name, p.Provider, p.GrantType, p.Scopes, p.Identity, p.Credential, p.DefaultLifetime, p.MaxTokenAge, p.RejectedRetry, p.Coordinated, p.Endpoint,
			p.RefreshTokens, p.Reusable, p.Grace)
	}
	return s.String()
}

// The timeout reaches the token request.
func TestTimeout(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	c := mustParse(t, with(t, with(t, profile, "region: eu", "base_url: http://"+silent.Addr().String()), "name: p", "name: p, timeout: 1s"))
	began := time.Now()
	_, err = c.Profiles[0].Issuer.Issue(context.Background(), broker.Request{})
	if err == nil {
		t.Fatal("got a grant")
	}
	if took := time.Since(began); took < time.Second || took > 9*time.Second {
		t.Errorf("it took %s, want 1 s: %v", took, err)
	}
}
