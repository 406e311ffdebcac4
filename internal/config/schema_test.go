package config_test

import (
	"strings"
	"testing"

	"buf.build/go/protovalidate"
	"buf.build/go/protoyaml"
	"google.golang.org/protobuf/proto"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
)

// wholeConfig uses every part of the schema that can stand side by side.
const wholeConfig = `
server:
  address: 0.0.0.0:7443
  tls:
    certificate: /etc/broker/tls.crt
    private_key: /etc/broker/tls.key
    client_ca: /etc/broker/ca.crt
    min_version: 1.2
  reflection: false
admin:
  address: 127.0.0.1:7444
store:
  redis:
    addresses: [redis:6379]
    master_name: ""
    username: broker
    password: {file: /run/secrets/redis}
    tls: {ca: /etc/redis/ca.crt}
    lease: 3s
    cluster: false
  encryption_keyset: {file: /run/secrets/keyset.json}
profiles:
  - name: invoices
    scopes: [openid, permissions, global.wildcard]
    default_lifetime: 1h
    max_token_age: 24h
    timeout: 10s
    rejected_retry: 30m
    secret_rotation: {before_expiry: 720h}
    vantage:
      region: eu
      tenant_id: acme
      client_id: invoices-svc
      client_secrets: [{file: /run/secrets/vantage}, {file: /run/secrets/vantage-old}]
      client_credentials: {}
  - name: operator
    vantage:
      region: us
      client_id: ops
      client_secret: {env: OPS_SECRET}
      password: {username: {env: OPS_USER}, password: {file: /run/secrets/ops}}
  - name: review
    scopes: [openid, permissions, global.wildcard, offline_access]
    rotation: {one_time: true, grace: 30s}
    vantage:
      region: au
      product_id: a8548c9b-cb90-4c66-8567-d7372bb9b963
      client_id: review
      client_secret: {env: REVIEW_SECRET}
      authorization_code: {redirect_url: "https://broker.example.com/oauth/callback"}
  - name: private-cloud
    vantage:
      base_url: http://vantage.internal:8080/sub
      allow_insecure_http: true
      client_id: x
      client_secret: {value: plain}
      client_credentials: {}
  - name: payments
    scopes: [payments.read]
    secureauth:
      issuer: https://acme.eu.authz.cloudentity.io/acme/default
      client_id: payments
      client_secret: {env: PAYMENTS_SECRET}
      client_auth: client_secret_post
      client_credentials: {}
  - name: payments-key
    scopes: [payments.read]
    secureauth:
      tenant_id: acme
      region: eu
      workspace_id: default
      client_id: payments
      client_auth: private_key_jwt
      private_key: {file: /run/secrets/key.pem}
      key_id: k1
      client_credentials: {}
  - name: payments-certificate
    scopes: [payments.read]
    secureauth:
      tenant_id: acme
      workspace_id: default
      client_id: payments
      client_auth: tls_client_auth
      private_key: {file: /run/secrets/key.pem}
      certificate: /etc/broker/payments.crt
      client_credentials: {}
  - name: anything-else
    scopes: [a, b]
    oauth2:
      issuer: https://id.example.com
      client_id: x
      client_secret: {env: X}
      client_auth: client_secret_basic
      audience: https://api.example.com
      resource: ["https://api.example.com/", "urn:example:api"]
      extra_parameters: {purpose: batch}
      client_credentials: {}
  - name: explicit
    allow_password_grant: true
    oauth2:
      token_url: http://127.0.0.1:8080/token?tenant=x
      revocation_url: http://[::1]:8080/revoke
      client_id: x
      client_secret: {env: X}
      password: {username: {value: u}, password: {value: p}}
policy:
  - callers: ["spiffe://prod/ns/batch/*", "dns:worker.example.com"]
    profiles: [invoices]
    allow: [issue, refresh, watch]
  - callers: [anonymous]
    profiles: ["*"]
    allow: [revoke, admin]
log: {level: debug, format: text}
`

// plain makes a protovalidate.Validator what protoyaml wants.
type plain struct{ protovalidate.Validator }

func (p plain) Validate(message proto.Message) error { return p.Validator.Validate(message) }

func read(t testing.TB, validator protovalidate.Validator, text string) (*configv1.Config, error) {
	t.Helper()
	config := &configv1.Config{}
	err := protoyaml.UnmarshalOptions{Path: "broker.yaml", Validator: plain{validator}}.Unmarshal([]byte(text), config)
	return config, err
}

func newValidator(t testing.TB) protovalidate.Validator {
	t.Helper()
	validator, err := protovalidate.New()
	if err != nil {
		t.Fatal(err)
	}
	return validator
}

func TestSchemaAcceptsTheWholeConfig(t *testing.T) {
	config, err := read(t, newValidator(t), wholeConfig)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := len(config.GetProfiles()), 9; got != want {
		t.Errorf("got %d profiles, want %d", got, want)
	}
	if got := config.GetProfiles()[8].GetOauth2().GetPassword().GetUsername().GetValue(); got != "u" {
		t.Errorf("got user name %q, want %q", got, "u")
	}
}

// A change is one replacement in a config that is valid without it.
func TestSchemaRefuses(t *testing.T) {
	validator := newValidator(t)
	const vantage = `profiles:
  - name: p
    vantage:
      region: eu
      client_id: c
      client_secret: {env: S}
      client_credentials: {}
`
	const oauth2 = `profiles:
  - name: p
    oauth2:
      token_url: https://id.example.com/token
      client_id: c
      client_secret: {env: S}
      client_credentials: {}
`
	const secureauth = `profiles:
  - name: p
    scopes: [s]
    secureauth:
      tenant_id: t
      workspace_id: w
      client_id: c
      client_secret: {env: S}
      client_credentials: {}
`
	for _, valid := range []string{vantage, oauth2, secureauth} {
		if _, err := read(t, validator, valid); err != nil {
			t.Fatalf("without a change: %v", err)
		}
	}
	for name, test := range map[string]struct {
		config   string
		old, new string
		want     string // Where and why, as far as it matters.
	}{
		"unknown key":              {vantage, "region: eu", "regoin: eu", `:4:7 unknown field "regoin"`},
		"wrong type":               {vantage, "client_credentials: {}", "client_credentials: yes", ":7:27 expected "},
		"no profiles":              {vantage, vantage, "profiles: []", "profiles: must contain at least 1 item(s)"},
		"name missing":             {vantage, "- name: p\n    vantage", "- vantage", "profiles[0].name: must be 1 to 64"},
		"name with capital":        {vantage, "name: p", "name: P", ":2:11 profiles[0].name: must be 1 to 64"},
		"name ends in dot":         {vantage, "name: p", "name: p.", "profiles[0].name: must be 1 to 64"},
		"name too long":            {vantage, "name: p", "name: " + strings.Repeat("a", 65), "profiles[0].name: must be 1 to 64"},
		"no provider":              {vantage, vantage, "profiles:\n  - name: p\n", "name the authorization server: add vantage, secureauth or oauth2"},
		"two providers":            {vantage, "    vantage:", "    oauth2: {}\n    vantage:", "already set for oneof provider"},
		"no grant":                 {vantage, "      client_credentials: {}\n", "", "say how tokens are obtained"},
		"two grants":               {vantage, "client_credentials: {}", "client_credentials: {}\n      authorization_code: {redirect_url: \"https://b/\"}", "already set for oneof grant"},
		"two secret sources":       {vantage, "{env: S}", "{env: S, file: s}", "already set for oneof source"},
		"no secret source":         {vantage, "{env: S}", "{}", ":6:22 profiles[0].vantage.client_secret: say where the secret is: set file, env or value"},
		"bad variable name":        {vantage, "{env: S}", "{env: $S}", "client_secret.env: does not match"},
		"no client id":             {vantage, "      client_id: c\n", "", "client_id: value is required"},
		"no client secret":         {vantage, "      client_secret: {env: S}\n", "", "one of client_secret, client_secrets must be set"},
		"both client secrets":      {vantage, "client_secret: {env: S}", "client_secret: {env: S}\n      client_secrets: [{env: S}]", "only one of client_secret, client_secrets can be set"},
		"three client secrets":     {vantage, "client_secret: {env: S}", "client_secrets: [{env: A}, {env: B}, {env: C}]", "client_secrets: must contain no more than 2 item(s)"},
		"unknown region":           {vantage, "region: eu", "region: de", ":4:15 profiles[0].vantage.region: must be in list [eu, us, au]"},
		"no region":                {vantage, "      region: eu\n", "", "one of region, base_url must be set"},
		"region and base_url":      {vantage, "region: eu", "region: eu\n      base_url: https://v", "only one of region, base_url can be set"},
		"base_url in clear":        {vantage, "region: eu", "base_url: http://v.example.com", "base_url uses http:// for a host that is not loopback"},
		"loopback only in name":    {vantage, "region: eu", "base_url: http://localhost.example.com", "base_url uses http://"},
		"loopback only in user":    {vantage, "region: eu", "base_url: http://127.0.0.1@example.com", "base_url: must be an absolute https:// URL"},
		"loopback as domain":       {vantage, "region: eu", "base_url: http://127.0.0.1.example.com", "base_url uses http://"},
		"base_url without scheme":  {vantage, "region: eu", "base_url: v.example.com", "base_url: must be an absolute https:// URL"},
		"base_url with user":       {vantage, "region: eu", "base_url: https://u:p@v.example.com", "base_url: must be an absolute https:// URL"},
		"base_url with fragment":   {vantage, "region: eu", "base_url: https://v.example.com/#x", "base_url: must be an absolute https:// URL"},
		"base_url with query":      {vantage, "region: eu", "base_url: https://v.example.com/?x", "base_url: must be an absolute https:// URL"},
		"tenant climbs the path":   {vantage, "region: eu", "region: eu\n      tenant_id: ..", "tenant_id: does not match"},
		"relative redirect":        {vantage, "client_credentials: {}", "authorization_code: {redirect_url: /oauth/callback}", "redirect_url: must be an absolute URL"},
		"no redirect":              {vantage, "client_credentials: {}", "authorization_code: {}", "redirect_url: must be an absolute URL"},
		"user without password":    {vantage, "client_credentials: {}", "password: {username: {env: U}}", "password.password: value is required"},
		"same scope twice":         {secureauth, "[s]", "[s, s]", "scopes: repeated value must contain unique items"},
		"scope with space":         {secureauth, "[s]", `["s t"]`, "scopes[0]: does not match"},
		"scope with quote":         {secureauth, "[s]", `['s"t']`, "scopes[0]: does not match"},
		"secureauth without scope": {secureauth, "    scopes: [s]\n", "", "secureauth needs scopes"},
		"half an address":          {secureauth, "      workspace_id: w\n", "", "set either issuer, or tenant_id and workspace_id"},
		"issuer and tenant":        {secureauth, "tenant_id: t", "tenant_id: t\n      issuer: https://i", "set either issuer, or tenant_id and workspace_id"},
		"issuer in clear":          {secureauth, "tenant_id: t\n      workspace_id: w", "issuer: http://i", "issuer uses http://"},
		"unknown client_auth":      {secureauth, "client_id: c", "client_id: c\n      client_auth: post", "client_auth: must be in list"},
		"key without client_auth":  {secureauth, "client_id: c", "client_id: c\n      private_key: {file: k}", "private_key and certificate need client_auth"},
		"client_auth without key":  {secureauth, "client_secret: {env: S}", "client_auth: private_key_jwt", "private_key_jwt needs private_key"},
		"key and secret":           {secureauth, "client_id: c", "client_id: c\n      client_auth: private_key_jwt\n      private_key: {file: k}", "private_key_jwt uses private_key only"},
		"no certificate":           {secureauth, "client_secret: {env: S}", "client_auth: tls_client_auth\n      private_key: {file: k}", "tls_client_auth needs certificate and private_key"},
		"no secret of either kind": {oauth2, "      client_secret: {env: S}\n", "", "set exactly one of client_secret and client_secrets"},
		"secrets of both kinds":    {oauth2, "client_id: c", "client_id: c\n      client_secrets: [{env: S}]", "set exactly one of client_secret and client_secrets"},
		"no endpoint":              {oauth2, "      token_url: https://id.example.com/token\n", "", "set issuer, or token_url"},
		"issuer and token_url":     {oauth2, "client_id: c", "issuer: https://i\n      client_id: c", "set either issuer"},
		"token_url in clear":       {oauth2, "https://id", "http://id", "token_url uses http://"},
		"revocation_url in clear":  {oauth2, "client_id: c", "client_id: c\n      revocation_url: http://r.example.com/", "revocation_url uses http://"},
		"no authorization_url":     {oauth2, "client_credentials: {}", "authorization_code: {redirect_url: \"https://b/\"}", "needs authorization_url"},
		"password elsewhere":       {oauth2, "client_credentials: {}", "password: {username: {env: U}, password: {env: P}}", "the grant password is off for this provider"},
		"parameter of ours":        {oauth2, "client_id: c", "client_id: c\n      extra_parameters: {grant_type: x}", "extra_parameters"},
		"rotation elsewhere":       {oauth2, "name: p", "name: p\n    secret_rotation: {before_expiry: 720h}", "secret_rotation works with vantage only"},
		"rotation without a time":  {vantage, "name: p", "name: p\n    secret_rotation: {}", "before_expiry: value is required"},
		"timeout too long":         {vantage, "name: p", "name: p\n    timeout: 61s", "timeout: must be greater than or equal to 1s and less than or equal to 25s"},
		"timeout without unit":     {vantage, "name: p", "name: p\n    timeout: 10", ":3:14 invalid duration: missing unit"},
		"negative lifetime":        {vantage, "name: p", "name: p\n    default_lifetime: -1h", "default_lifetime: must be"},
		"open without TLS":         {vantage, "profiles:", "server: {address: 0.0.0.0:1}\nprofiles:", "server: without tls the address must be loopback"},
		"any host without TLS":     {vantage, "profiles:", "server: {address: ':7443'}\nprofiles:", "server: without tls the address must be loopback"},
		"address without port":     {vantage, "profiles:", "server: {address: localhost}\nprofiles:", "server.address: must be host:port"},
		"TLS without callers' CA":  {vantage, "profiles:", "server: {tls: {certificate: c, private_key: k}}\nprofiles:", "client_ca is missing: add it"},
		"old TLS":                  {vantage, "profiles:", "server: {tls: {certificate: c, private_key: k, client_ca: a, min_version: 1.1}}\nprofiles:", "min_version: must be in list [1.3, 1.2]"},
		"redis in the clear":       {vantage, "profiles:", "store: {redis: {addresses: ['r:1']}}\nprofiles:", "store.encryption_keyset: value is required"},
		"keyset without redis":     {vantage, "profiles:", "store: {encryption_keyset: {file: k}}\nprofiles:", "store.redis: value is required"},
		"redis as a URL":           {vantage, "profiles:", "store: {encryption_keyset: {file: k}, redis: {addresses: ['redis://r:1']}}\nprofiles:", "each address must be host:port"},
		"half a key pair":          {vantage, "profiles:", "store: {encryption_keyset: {file: k}, redis: {addresses: ['r:1'], tls: {certificate: c}}}\nprofiles:", "certificate and private_key belong together"},
		"Cluster with Sentinels":   {vantage, "profiles:", "store: {encryption_keyset: {file: k}, redis: {addresses: ['r:1'], master_name: m, cluster: true}}\nprofiles:", "remove cluster or master_name"},
		"long lease":               {vantage, "profiles:", "store: {encryption_keyset: {file: k}, redis: {addresses: ['r:1'], lease: 1m}}\nprofiles:", "store.redis.lease: must be"},
		"policy for nobody":        {vantage, "profiles:", "policy: [{callers: [], profiles: [p], allow: [issue]}]\nprofiles:", "policy[0].callers: must contain at least 1 item(s)"},
		"policy for an empty name": {vantage, "profiles:", "policy: [{callers: [''], profiles: [p], allow: [issue]}]\nprofiles:", "policy[0].callers[0]: does not match"},
		"unknown operation":        {vantage, "profiles:", "policy: [{callers: [a], profiles: [p], allow: [read]}]\nprofiles:", "must be in list [issue, refresh, watch, revoke, admin]"},
		"unknown level":            {vantage, "profiles:", "log: {level: trace}\nprofiles:", "log.level: must be in list [debug, info, warn, error]"},
	} {
		t.Run(name, func(t *testing.T) {
			if !strings.Contains(test.config, test.old) {
				t.Fatalf("the config has no %q to replace", test.old)
			}
			_, err := read(t, validator, strings.Replace(test.config, test.old, test.new, 1))
			if err == nil {
				t.Fatal("it is accepted")
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("got\n%v\nwant %q in it", err, test.want)
			}
		})
	}
}

func TestSchemaReportsAllMistakesAtOnce(t *testing.T) {
	_, err := read(t, newValidator(t), `server:
  address: 0.0.0.0:7443
  reflction: true
profiles:
  - name: Bad Name
    timeout: 2m
    vantage: {region: de, client_id: x, client_secret: {env: A}}
`)
	if err == nil {
		t.Fatal("it is accepted")
	}
	for _, want := range []string{
		`broker.yaml:3:3 unknown field "reflction"`,
		"broker.yaml:2:3 server: without tls",
		"broker.yaml:5:11 profiles[0].name",
		"broker.yaml:6:14 profiles[0].timeout",
		"broker.yaml:7:23 profiles[0].vantage.region",
		"broker.yaml:7:14 profiles[0].vantage: say how tokens are obtained",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("got\n%v\nwant %q in it", err, want)
		}
	}
}

// The rules are compiled when they are used first, which is part of every start.
func BenchmarkSchemaAtStart(b *testing.B) {
	for b.Loop() {
		if _, err := read(b, newValidator(b), wholeConfig); err != nil {
			b.Fatal(err)
		}
	}
}
