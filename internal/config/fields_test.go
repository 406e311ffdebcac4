package config_test

import (
	"context"
	"crypto/x509"
	"fmt"
	"maps"
	"net"
	"path/filepath"
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

	// A server whose identity comes from a Workload API.
	workloadPart = "server: {tls: {workload_api: {address: 'unix:/run/api.sock', trust_domains: [a.test]}}}\n"

	// A profile with refresh tokens.
	passwordProfile = "profiles: [{name: p, scopes: [openid, offline_access], rotation: {}, vantage: {region: eu, client_id: c, client_secret: {env: SECRET}, " +
		"password: {username: {env: SECRET}, password: {env: SECRET}}}}]\n"

	// A profile whose secret is renewed.
	renewedProfile = "profiles: [{name: p, secret_rotation: {before_expiry: 30d}, " +
		"vantage: {region: eu, tenant_id: t, client_id: c, client_secret: {env: SECRET}, client_credentials: {}}}]\n"

	// A profile that a person signs in to.
	codeProfile = "profiles: [{name: p, rotation: {}, vantage: {region: eu, client_id: c, client_secret: {env: SECRET}, " +
		"authorization_code: {redirect_url: 'https://broker.example.com/oauth/callback'}}}]\n"

	// Another server, which is addressed by two lines, and the same with a key
	// and a certificate.
	otherProfile = "profiles: [{name: p, scopes: [a], $PROVIDER: {$SERVER, client_id: c, client_secret: {env: SECRET}, client_credentials: {}}}]\n"
	keyProfile   = "profiles: [{name: p, scopes: [a], $PROVIDER: {$SERVER, client_id: c, client_auth: private_key_jwt, private_key: {file: $DIR/tls.key}, client_credentials: {}}}]\n"
	chainProfile = "profiles: [{name: p, scopes: [a], $PROVIDER: {$SERVER, client_id: c, client_auth: tls_client_auth, " +
		"private_key: {file: $DIR/tls.key}, certificate: $DIR/tls.crt, client_credentials: {}}}]\n"
	otherPassword = "profiles: [{name: p, scopes: [a], allow_password_grant: true, $PROVIDER: {$SERVER, client_id: c, client_secret: {env: SECRET}, " +
		"password: {username: {env: SECRET}, password: {env: SECRET}}}}]\n"
	otherCode = "profiles: [{name: p, scopes: [a, offline_access], $PROVIDER: {$SERVER, client_id: c, client_secret: {env: SECRET}, " +
		"authorization_code: {redirect_url: 'https://broker.example.com/oauth/callback'}}}]\n"

	// The admin address with all that it can have.
	adminPart = "admin: {address: 0.0.0.0:7444, tls: {certificate: $DIR/tls.crt, private_key: $DIR/tls.key, client_ca: $DIR/ca.crt}, bearer_token: {env: SECRET}}\n"

	// Clusters whose keys are in a file, and at a URL.
	clusterPart       = "server: {service_accounts: [{cluster: c, issuer: 'https://kube.example.com', audience: a, jwks_file: $DIR/jwks.json}]}\n"
	remoteClusterPart = "server: {service_accounts: [{cluster: c, issuer: 'https://kube.example.com', audience: a, " +
		"jwks_url: 'https://kube.example.com/jwks', ca: $DIR/ca.crt, jwks_token: {env: SECRET}}]}\n"

	// A store, without and with all that TLS can have.
	storePart = "store: {redis: {addresses: ['r:1'], password: {env: SECRET}}, encryption_keyset: {file: $DIR/keyset}}\n"
	redisTLS  = "store: {redis: {addresses: ['r:1'], tls: {ca: $DIR/ca.crt, certificate: $DIR/tls.crt, private_key: $DIR/tls.key}}, encryption_keyset: {file: $DIR/keyset}}\n"
)

// probe sets one field: a replacement in a configuration, or text after it.
type probe struct{ base, old, new string }

// used is every field that makes a difference, and how to see it.
var used = map[string]probe{
	"server.address":                                   {profile, "", "server: {address: 127.0.0.1:1}\n"},
	"server.tls.certificate":                           {profile + tlsPart, "$DIR/tls.crt", "$DIR/other/tls.crt"},
	"server.tls.private_key":                           {profile + tlsPart, "$DIR/tls.key", "$DIR/other/tls.key"},
	"server.tls.client_ca":                             {profile + tlsPart, "$DIR/ca.crt", "$DIR/other/ca.crt"},
	"server.tls.min_version":                           {profile + tlsPart, "tls: {", "tls: {min_version: 1.2, "},
	"server.tls.client_crl":                            {profile + tlsPart, "tls: {", "tls: {client_crl: [$DIR/ca.crl], "},
	"server.tls.workload_api.address":                  {profile + workloadPart, "unix:/run/api.sock", "unix:/run/other.sock"},
	"server.tls.workload_api.trust_domains":            {profile + workloadPart, "a.test", "b.test"},
	"admin.tls.client_crl":                             {profile + adminPart, "tls: {", "tls: {client_crl: [$DIR/ca.crl], "},
	"admin.tls.min_version":                            {profile + adminPart, "tls: {", "tls: {min_version: 1.2, "},
	"server.reflection":                                {profile, "", "server: {reflection: true}\n"},
	"server.service_accounts.cluster":                  {profile + clusterPart, "cluster: c", "cluster: d"},
	"server.service_accounts.issuer":                   {profile + clusterPart, "https://kube.example.com'", "https://other.example.com'"},
	"server.service_accounts.audience":                 {profile + clusterPart, "audience: a", "audience: b"},
	"server.service_accounts.jwks_file":                {profile + clusterPart, "$DIR/jwks.json", "$DIR/other/jwks.json"},
	"server.service_accounts.jwks_url":                 {profile + remoteClusterPart, "/jwks", "/keys"},
	"server.service_accounts.ca":                       {profile + remoteClusterPart, "$DIR/ca.crt", "$DIR/other/ca.crt"},
	"server.service_accounts.jwks_token.file":          {profile + remoteClusterPart, "{env: SECRET}}", "{file: $DIR/secret}}"},
	"server.service_accounts.jwks_token.env":           {profile + remoteClusterPart, "{env: SECRET}}", "{env: OTHER}}"},
	"server.service_accounts.jwks_token.value":         {profile + remoteClusterPart, "{env: SECRET}}", "{value: s}}"},
	"server.service_accounts.algorithms":               {profile + clusterPart, "audience: a", "audience: a, algorithms: [ES384]"},
	"server.service_accounts.max_lifetime":             {profile + clusterPart, "audience: a", "audience: a, max_lifetime: 10m"},
	"server.limits.caller_rate":                        {profile, "", "server: {limits: {caller_rate: 7}}\n"},
	"server.limits.caller_calls":                       {profile, "", "server: {limits: {caller_calls: 7}}\n"},
	"server.limits.calls":                              {profile, "", "server: {limits: {calls: 7}}\n"},
	"server.limits.connections":                        {profile, "", "server: {limits: {connections: 7}}\n"},
	"server.limits.connection_streams":                 {profile, "", "server: {limits: {connection_streams: 7}}\n"},
	"server.limits.connection_age":                     {profile, "", "server: {limits: {connection_age: 10s}}\n"},
	"server.limits.connection_age_grace":               {profile, "", "server: {limits: {connection_age_grace: 7s}}\n"},
	"server.limits.ping_interval":                      {profile, "", "server: {limits: {ping_interval: 7s}}\n"},
	"server.limits.deadline":                           {profile, "", "server: {limits: {deadline: 7s}}\n"},
	"server.limits.header_size":                        {profile, "", "server: {limits: {header_size: 4096}}\n"},
	"admin.address":                                    {profile, "", "admin: {address: 127.0.0.1:1}\n"},
	"admin.url":                                        {profile, "", "admin: {url: 'https://broker.example.com'}\n"},
	"admin.tls.certificate":                            {profile + adminPart, "$DIR/tls.crt", "$DIR/other/tls.crt"},
	"admin.tls.private_key":                            {profile + adminPart, "$DIR/tls.key", "$DIR/other/tls.key"},
	"admin.tls.client_ca":                              {profile + adminPart, "$DIR/ca.crt", "$DIR/other/ca.crt"},
	"admin.bearer_token.file":                          {profile + adminPart, "bearer_token: {env: SECRET}", "bearer_token: {file: $DIR/secret}"},
	"admin.bearer_token.env":                           {profile + adminPart, "bearer_token: {env: SECRET}", "bearer_token: {env: OTHER}"},
	"admin.bearer_token.value":                         {profile + adminPart, "bearer_token: {env: SECRET}", "bearer_token: {value: a-token-that-is-long}"},
	"store.redis.addresses":                            {profile + storePart, "'r:1'", "'r:2'"},
	"store.redis.master_name":                          {profile + storePart, "password:", "master_name: m, password:"},
	"store.redis.username":                             {profile + storePart, "password:", "username: u, password:"},
	"store.redis.password.file":                        {profile + storePart, "password: {env: SECRET}", "password: {file: $DIR/secret}"},
	"store.redis.password.env":                         {profile + storePart, "password: {env: SECRET}", "password: {env: OTHER}"},
	"store.redis.password.value":                       {profile + storePart, "password: {env: SECRET}", "password: {value: s}"},
	"store.redis.tls.ca":                               {profile + redisTLS, "$DIR/ca.crt", "$DIR/other/ca.crt"},
	"store.redis.tls.certificate":                      {profile + redisTLS, "$DIR/tls.crt", "$DIR/other/tls.crt"},
	"store.redis.tls.private_key":                      {profile + redisTLS, "$DIR/tls.key", "$DIR/other/tls.key"},
	"store.redis.tls.server_name":                      {profile + redisTLS, "tls: {", "tls: {server_name: redis, "},
	"store.redis.lease":                                {profile + storePart, "password:", "lease: 5s, password:"},
	"store.redis.cluster":                              {profile + storePart, "password:", "cluster: true, password:"},
	"store.encryption_keyset.file":                     {profile + storePart, "$DIR/keyset", "$DIR/other/keyset"},
	"store.encryption_keyset.env":                      {profile + storePart, "{file: $DIR/keyset}", "{env: KEYSET}"},
	"store.encryption_keyset.value":                    {profile + storePart, "{file: $DIR/keyset}", "{value: $KEYSET}"},
	"profiles.name":                                    {profile, "name: p", "name: q"},
	"profiles.scopes":                                  {profile, "name: p", "name: p, scopes: [a]"},
	"profiles.default_lifetime":                        {profile, "name: p", "name: p, default_lifetime: 5m"},
	"profiles.max_token_age":                           {profile, "name: p", "name: p, max_token_age: 5m"},
	"profiles.coordinated":                             {profile, "name: p", "name: p, coordinated: true"},
	"profiles.max_dedicated_tokens":                    {profile, "name: p", "name: p, max_dedicated_tokens: 500"},
	"profiles.rejected_retry":                          {profile, "name: p", "name: p, rejected_retry: 5m"},
	"profiles.vantage.region":                          {profile, "region: eu", "region: us"},
	"profiles.vantage.base_url":                        {profile, "region: eu", "base_url: https://vantage.example.com"},
	"profiles.vantage.allow_insecure_http":             {profile, "region: eu", "region: eu, allow_insecure_http: true"},
	"profiles.vantage.tenant_id":                       {profile, "region: eu", "region: eu, tenant_id: t"},
	"profiles.vantage.client_id":                       {profile, "client_id: c", "client_id: d"},
	"profiles.vantage.client_secret.file":              {profile, "{env: SECRET}", "{file: $DIR/secret}"},
	"profiles.vantage.client_secret.env":               {profile, "{env: SECRET}", "{env: OTHER}"},
	"profiles.vantage.client_secret.value":             {profile, "{env: SECRET}", "{value: s}"},
	"profiles.vantage.client_secrets.file":             {profile, "client_secret: {env: SECRET}", "client_secrets: [{file: $DIR/secret}]"},
	"profiles.vantage.client_secrets.env":              {profile, "client_secret: {env: SECRET}", "client_secrets: [{env: OTHER}]"},
	"profiles.vantage.client_secrets.value":            {profile, "client_secret: {env: SECRET}", "client_secrets: [{value: s}]"},
	"profiles.vantage.client_credentials":              {profile, "client_credentials: {}", ""},
	"profiles.vantage.password.username.file":          {passwordProfile, "username: {env: SECRET}", "username: {file: $DIR/secret}"},
	"profiles.vantage.password.username.env":           {passwordProfile, "username: {env: SECRET}", "username: {env: OTHER}"},
	"profiles.vantage.password.username.value":         {passwordProfile, "username: {env: SECRET}", "username: {value: s}"},
	"profiles.vantage.password.password.file":          {passwordProfile, "password: {env: SECRET}", "password: {file: $DIR/secret}"},
	"profiles.vantage.password.password.env":           {passwordProfile, "password: {env: SECRET}", "password: {env: OTHER}"},
	"profiles.vantage.password.password.value":         {passwordProfile, "password: {env: SECRET}", "password: {value: s}"},
	"profiles.rotation.one_time":                       {passwordProfile, "rotation: {}", "rotation: {one_time: false}"},
	"profiles.rotation.grace":                          {passwordProfile, "rotation: {}", "rotation: {grace: 30s}"},
	"profiles.rotation.lifetime":                       {codeProfile, "rotation: {}", "rotation: {lifetime: 60d}"},
	"profiles.allow_password_grant":                    {passwordProfile, "name: p", "name: p, allow_password_grant: true"},
	"profiles.secret_rotation.before_expiry":           {renewedProfile + storePart, "before_expiry: 30d", "before_expiry: 20d"},
	"profiles.secret_rotation.lifetime":                {renewedProfile + storePart, "before_expiry: 30d", "before_expiry: 30d, lifetime: 90d"},
	"profiles.secret_rotation.admin_profile":           {renewedProfile + storePart, "before_expiry: 30d", "before_expiry: 30d, admin_profile: p"},
	"profiles.vantage.product_id":                      {codeProfile, "region: eu", "region: eu, product_id: x"},
	"profiles.vantage.authorization_code.redirect_url": {codeProfile, "/oauth/callback", "/oauth/callback/vantage"},
	"policy.callers":                                   {profile + rule, "anonymous", "dns:x"},
	"policy.profiles":                                  {profile + rule, "profiles: [p]", "profiles: ['*']"},
	"policy.allow":                                     {profile + rule, "issue", "watch"},
	"policy.scopes":                                    {profile + rule, "allow: [issue]", "allow: [issue], scopes: [a]"},
	"server.forwarders.peers":                          {profile + forwarder, "dns:envoy", "dns:other"},
	"server.forwarders.header":                         {profile + forwarder, "x-forwarded-client-cert", "l5d-client-id"},
	"server.forwarders.callers":                        {profile + forwarder, "spiffe://prod/*", "spiffe://prod/x"},
	"log.level":                                        {profile, "", "log: {level: debug}\n"},
	"log.format":                                       {profile, "", "log: {format: text}\n"},
	"audit.file":                                       {profile, "", "audit: {file: $DIR/audit.jsonl}\n"},
	"audit.stdout" /* the default */ :                  {},
	"audit.syslog.address":                             {profile + syslogPart, "local0", "local0, address: 'udp:127.0.0.1:514'"},
	"audit.syslog.facility":                            {profile + syslogPart, "local0", "local1"},
	"audit.disabled":                                   {profile, "", "audit: {disabled: {}}\n"},
	"audit.when_unwritable":                            {profile, "", "audit: {when_unwritable: refuse}\n"},
	"profiles.timeout" /* see TestTimeout */ :          {},
}

const (
	syslogPart = "audit: {syslog: {facility: local0}}\n"
	rule       = "policy: [{callers: [anonymous], profiles: [p], allow: [issue]}]\n"
	forwarder  = "server: {address: 'unix:s', forwarders: [{peers: ['dns:envoy'], header: x-forwarded-client-cert, callers: ['spiffe://prod/*']}]}\n"
)

// usedByOthers is what the two providers have that are much alike, with what
// each has alone.
func usedByOthers() map[string]probe {
	const issuer, tenant, endpoint = "issuer: 'https://id.example.com'", "tenant_id: t, workspace_id: w", "token_url: 'https://id.example.com/token'"
	all := map[string]probe{}
	add := func(provider, server string, probes map[string]probe) {
		for field, p := range probes {
			p.base = strings.NewReplacer("$PROVIDER", provider, "$SERVER", server).Replace(p.base)
			all["profiles."+provider+"."+field] = p
		}
	}
	for _, provider := range []string{"secureauth", "oauth2"} {
		add(provider, issuer, map[string]probe{
			"issuer":                          {otherProfile, "id.example.com", "other.example.com"},
			"allow_insecure_http":             {otherProfile, "client_id: c", "client_id: c, allow_insecure_http: true"},
			"client_id":                       {otherProfile, "client_id: c", "client_id: d"},
			"client_secret.file":              {otherProfile, "{env: SECRET}", "{file: $DIR/secret}"},
			"client_secret.env":               {otherProfile, "{env: SECRET}", "{env: OTHER}"},
			"client_secret.value":             {otherProfile, "{env: SECRET}", "{value: s}"},
			"client_secrets.file":             {otherProfile, "client_secret: {env: SECRET}", "client_secrets: [{file: $DIR/secret}]"},
			"client_secrets.env":              {otherProfile, "client_secret: {env: SECRET}", "client_secrets: [{env: OTHER}]"},
			"client_secrets.value":            {otherProfile, "client_secret: {env: SECRET}", "client_secrets: [{value: s}]"},
			"private_key.file":                {keyProfile, "$DIR/tls.key", "$DIR/other/tls.key"},
			"private_key.env":                 {keyProfile, "{file: $DIR/tls.key}", "{env: KEY}"},
			"private_key.value":               {keyProfile, "{file: $DIR/tls.key}", "{value: $KEY}"},
			"certificate":                     {chainProfile, "$DIR/tls.crt", "$DIR/again.crt"},
			"audience":                        {otherProfile, "client_id: c", "client_id: c, audience: a"},
			"client_credentials":              {otherProfile, "client_credentials: {}", ""},
			"password.username.file":          {otherPassword, "username: {env: SECRET}", "username: {file: $DIR/secret}"},
			"password.username.env":           {otherPassword, "username: {env: SECRET}", "username: {env: OTHER}"},
			"password.username.value":         {otherPassword, "username: {env: SECRET}", "username: {value: s}"},
			"password.password.file":          {otherPassword, "password: {env: SECRET}", "password: {file: $DIR/secret}"},
			"password.password.env":           {otherPassword, "password: {env: SECRET}", "password: {env: OTHER}"},
			"password.password.value":         {otherPassword, "password: {env: SECRET}", "password: {value: s}"},
			"authorization_code.redirect_url": {otherCode, "/oauth/callback", "/oauth/callback/it"},
			"client_auth":                     {}, // see TestClientAuth
			"key_id":                          {},
			"assertion_audience":              {},
		})
	}
	add("secureauth", tenant, map[string]probe{
		"tenant_id":    {otherProfile, "tenant_id: t", "tenant_id: u"},
		"region":       {otherProfile, "tenant_id: t", "tenant_id: t, region: eu"},
		"workspace_id": {otherProfile, "workspace_id: w", "workspace_id: v"},
	})
	add("oauth2", endpoint, map[string]probe{
		"token_url":         {otherProfile, "/token", "/other"},
		"authorization_url": {strings.Replace(otherCode, "$SERVER", "$SERVER, authorization_url: 'https://id.example.com/authorize'", 1), "/authorize", "/other"},
		"revocation_url":    {otherProfile, "client_id: c", "client_id: c, revocation_url: 'https://id.example.com/revoke'"},
		"resource":          {otherProfile, "client_id: c", "client_id: c, resource: ['urn:a']"},
		"extra_parameters":  {otherProfile, "client_id: c", "client_id: c, extra_parameters: {purpose: batch}"},
	})
	return all
}

// Every field of the schema is used.
func TestEveryField(t *testing.T) {
	probes := usedByOthers()
	maps.Copy(probes, used)
	found := map[string]bool{}
	leaves((&configv1.Config{}).ProtoReflect().Descriptor(), "", func(path string) (inside bool) {
		_, isUsed := probes[path]
		found[path] = true
		return !isUsed
	}, func(path string) { t.Errorf("%s is not used", path) })
	for path := range probes {
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

func (p probe) texts(t *testing.T, directory, key string) (before, after string) {
	t.Helper()
	in := strings.NewReplacer("$DIR", directory, "$KEYSET", strconv.Quote(aKeyset()), "$KEY", strconv.Quote(key)).Replace
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
	for _, name := range []string{"jwks.json", "other/jwks.json"} {
		write(t, filepath.Join(directory, name), newKeySet(t, name))
	}
	for _, name := range []string{"keyset", "other/keyset"} {
		write(t, filepath.Join(directory, name), newKeyset(t))
	}
	// Another certificate for the same key, and another key.
	_, otherKey := newAuthority(t).sign(t, &x509.Certificate{})
	key := keyPEM(t, otherKey)
	again(t, directory)
	environment := options
	environment.LookupEnv = func(name string) (string, bool) {
		switch name {
		case "KEYSET":
			return aKeyset(), true
		case "KEY":
			return key, true
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
	probes := usedByOthers()
	maps.Copy(probes, used)
	for path, p := range probes {
		if p.base == "" {
			continue
		}
		t.Run(path, func(t *testing.T) {
			before, after := p.texts(t, directory, key)
			if _, err := config.Parse("broker.yaml", []byte(before), environment); err != nil {
				t.Fatalf("without the field: %v", err)
			}
			if outcome(before) == outcome(after) {
				t.Error("the field makes no difference")
			}
		})
	}
}

// describe is all that a configuration says, secrets by their fingerprints.
func describe(c *config.Config) string {
	var s strings.Builder
	ended, end := context.WithCancel(context.Background())
	end()
	fmt.Fprintln(&s, c.Server.Network, c.Server.Address, c.Server.Reflection, c.Server.Limits, c.Server.Forwarders.Rules(), c.Admin.Address, c.Admin.URL, credential(c.Admin.BearerToken.Reveal()), c.Log, c.Audit, c.Policy, c.Warnings)
	if c.Admin.TLS != nil {
		//lint:ignore SA1019 Subjects says too little of the system's authorities only.
		fmt.Fprintln(&s, c.Admin.TLS.MinVersion, c.Admin.TLS.Certificates[0].Certificate, c.Admin.TLS.ClientCAs.Subjects(), c.Admin.Revocations.Lists())
	}
	if c.Server.WorkloadAPI != nil {
		fmt.Fprintln(&s, *c.Server.WorkloadAPI)
	} else if c.Server.TLS != nil {
		//lint:ignore SA1019 Subjects says too little of the system's authorities only.
		fmt.Fprintln(&s, c.Server.TLS.MinVersion, c.Server.TLS.Certificates[0].Certificate, c.Server.TLS.ClientCAs.Subjects(), c.Server.Revocations.Lists())
	}
	for _, k := range c.Server.ServiceAccounts {
		fmt.Fprintln(&s, k.Name, k.Issuer, k.Audience, k.Algorithms, k.MaxLifetime)
		if k.Keys != nil {
			fmt.Fprintln(&s, k.Keys.IDs())
		}
		if k.Source != nil {
			//lint:ignore SA1019 Subjects says too little of the system's authorities only.
			fmt.Fprintln(&s, k.Source.URL, k.Source.CA.Subjects(), credential(k.Source.Token.Reveal()))
		}
	}
	if c.Store != nil {
		fmt.Fprintf(&s, "%+v %s %x\n", c.Store.Redis, credential(c.Store.Access.Password.Reveal()), c.Store.Access.Keyset.FingerprintKey())
		if c.Store.Access.TLS != nil {
			//lint:ignore SA1019 Subjects says too little of the system's authorities only.
			fmt.Fprintln(&s, c.Store.Access.TLS.ServerName, c.Store.Access.TLS.Certificates[0].Certificate, c.Store.Access.TLS.RootCAs.Subjects())
		}
	}
	for _, p := range c.Profiles {
		fmt.Fprintln(&s, p.Name, p.Provider, p.GrantType, p.Scopes, p.Identity, p.Credential, p.DefaultLifetime, p.MaxTokenAge, p.RejectedRetry, p.Coordinated, p.MaxDedicated, p.Endpoint,
			p.RefreshTokens, p.Reusable, p.Grace, p.ConsentLifetime, p.ConsoleURL, p.SecretFile)
		if p.Rotation != nil {
			fmt.Fprintln(&s, p.Rotation.Before, p.Rotation.Lifetime, p.Rotation.AdminProfile)
		}
		if a, ok := p.Issuer.(broker.Authorizer); ok {
			address, _ := a.AuthorizationURL(ended, broker.AuthorizationRequest{State: "s", Challenge: "c"}) // an error where it must be discovered
			fmt.Fprintln(&s, a.RedirectURL(), address)
		}
		_, revokes := p.Issuer.(broker.Revoker)
		fmt.Fprintln(&s, revokes)
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
