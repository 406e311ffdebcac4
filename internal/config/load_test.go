package config_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/admission"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/config"
)

func TestDefaults(t *testing.T) {
	c := mustParse(t, minimal)
	limits := admission.Limits{
		CallerRate: 5000, CallerCalls: 10_000, Calls: 20_000, Connections: 10_000, ConnectionStreams: 250,
		ConnectionAge: 5 * time.Minute, ConnectionAgeGrace: 30 * time.Second, PingInterval: 10 * time.Second,
		Deadline: time.Minute, HeaderSize: 32_768,
	}
	if want := (config.Server{Network: "tcp", Address: "127.0.0.1:7443", Limits: limits}); !reflect.DeepEqual(c.Server, want) {
		t.Errorf("got server %+v, want %+v", c.Server, want)
	}
	if c.Admin.Address != "127.0.0.1:7444" {
		t.Errorf("got admin address %s", c.Admin.Address)
	}
	if want := (config.Log{Level: slog.LevelInfo, Format: "json"}); c.Log != want {
		t.Errorf("got log %+v, want %+v", c.Log, want)
	}
	if len(c.Policy) != 0 || len(c.Warnings) != 0 || len(c.Files) != 0 {
		t.Errorf("got %v, %v, %v, want nothing", c.Policy, c.Warnings, c.Files)
	}
	if len(c.Profiles) != 1 {
		t.Fatalf("got %d profiles, want 1", len(c.Profiles))
	}
	p := c.Profiles[0]
	if p.Name != "p" || p.Provider != "vantage" || p.GrantType != broker.ClientCredentials || p.Endpoint != "https://vantage-eu.abbyy.com/auth2/connect/token" {
		t.Errorf("got %s, %s, %s, %s", p.Name, p.Provider, p.GrantType, p.Endpoint)
	}
	equal(t, p.Scopes, []string{"openid", "permissions", "global.wildcard"})
}

// Empty values of every kind are values left out.
func TestLeftOut(t *testing.T) {
	c := mustParse(t, minimal+`server:
admin: {address: }
policy:
log: {level: "", format: ~}
`)
	if c.Server.Address != "127.0.0.1:7443" || c.Admin.Address != "127.0.0.1:7444" || c.Log.Format != "json" || c.Log.Level != slog.LevelInfo {
		t.Errorf("got %+v", c)
	}
	// An empty tls is not "no tls".
	equal(t, problems(t, minimal+"server:\n  tls:\n"), []string{
		"9:3: server.tls: certificate is missing: add it, or take all of them from a workload_api",
		"9:3: server.tls: client_ca is missing: add it, or take all of them from a workload_api",
		"9:3: server.tls: private_key is missing: add it, or take all of them from a workload_api",
	})
}

func TestNoFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "broker.yaml")
	_, err := config.Load(path, options)
	want := path + ": reading the configuration: no such file or directory"
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestFiles(t *testing.T) {
	directory := t.TempDir()
	writeServerFiles(t, directory)
	secret := write(t, filepath.Join(directory, "secrets", "s"), canary)
	text := with(t, minimal, "{env: SECRET}", "{file: secrets/s}") +
		"server: {tls: {certificate: tls.crt, private_key: tls.key, client_ca: " + directory + "/ca.crt}}\n"
	path := write(t, filepath.Join(directory, "broker.yaml"), text)
	c, err := config.Load(path, options)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, c.Files, []string{path, directory + "/ca.crt", secret, directory + "/tls.crt", directory + "/tls.key"})
}

// All kinds of mistakes in one file: each is told, with its place.
func TestEverythingAtOnce(t *testing.T) {
	equal(t, problems(t, `server:
  adress: 127.0.0.1:7443
  tls: {certificate: /nowhere/tls.crt, private_key: /nowhere/tls.key, client_ca: /nowhere/ca.crt}
store:
  redis: {addresses: [redis:66379]}
  encryption_keyset: {file: /nowhere/keyset}
profiles:
  - name: first
    timeout: 5 minutes
    vantage:
      region: mars
      client_secret: {file: /nowhere/secret}
      client_credentials: {}
  - name: second
    vantage:
      regoin: eu
      client_id: [c]
      client_secret: {env: NOT_SET}
      client_credentials: {}
  - name: second
    max_token_age: 400d
    vantage:
      region: eu
      base_url: https://vantage.example.com
      client_id: c
      client_secrets: [{env: SECRET}, {env: EMPTY}, {}]
      password: {}
      client_credentials: {}
  - Third
policy:
  - callers: [bob]
    profiles: [frist, x*]
    allow: [isue, issue, issue]
log: {level: loud}
`), []string{
		"2:3: server: unknown key: adress is not known here, did you mean address?",
		"3:22: server.tls.certificate: reading the certificate from /nowhere/tls.crt: no such file or directory",
		"3:53: server.tls.private_key: reading the private key from /nowhere/tls.key: no such file or directory",
		"3:82: server.tls.client_ca: reading the authorities' certificates from /nowhere/ca.crt: no such file or directory",
		"5:23: store.redis.addresses[0]: the port must be at most 65535",
		"6:29: store.encryption_keyset.file: reading the secret from /nowhere/keyset: no such file or directory",
		"9:14: profiles[0].timeout: must be a span of time with units, for example 300ms, 10s, 5m, 1h30m or 30d",
		"10:5: profiles[0].vantage.client_id: is missing: add it",
		"11:15: profiles[0].vantage.region: must be one of eu, us, au",
		"12:29: profiles[0].vantage.client_secret.file: reading the secret from /nowhere/secret: no such file or directory",
		"15:5: profiles[1].vantage: one of region, base_url must be set",
		"16:7: profiles[1].vantage: unknown key: regoin is not known here, did you mean region?",
		"17:18: profiles[1].vantage.client_id: must be text",
		"18:28: profiles[1].vantage.client_secret.env: the environment variable NOT_SET is not set: set it where the broker is started",
		"20:11: profiles[2].name: profiles[1] has the name second already: names must be unique",
		"21:20: profiles[2].max_token_age: must be 1m to 366d",
		"22:5: profiles[2].vantage: only one of region, base_url can be set: remove the others",
		"26:23: profiles[2].vantage.client_secrets: must have at most 2 items",
		"26:45: profiles[2].vantage.client_secrets[1].env: the environment variable that is named here is empty: set it where the broker is started",
		"26:53: profiles[2].vantage.client_secrets[2]: say where the secret is: set file, env or value",
		"27:17: profiles[2].vantage.password.password: is missing: add it",
		"27:17: profiles[2].vantage.password.username: is missing: add it",
		"28:7: profiles[2].vantage.client_credentials: cannot be set beside password (line 27): remove one of the two",
		"29:5: profiles[3]: must have keys and values; it can have name, scopes, vantage, secureauth, oauth2, default_lifetime, max_token_age, timeout, rejected_retry, allow_password_grant, rotation, secret_rotation, coordinated, max_dedicated_tokens",
		"31:15: policy[0].callers[0]: no caller has such a name: begin with spiffe://, dns:, k8s://, unix:uid: or unix:gid:, or write anonymous",
		"32:16: policy[0].profiles[0]: no profile has this name: correct it, or remove it; did you mean first?",
		"32:23: policy[0].profiles[1]: no profile has a name like this: correct it, or remove it",
		"33:12: policy[0].allow: must not have the same item twice",
		"33:13: policy[0].allow[0]: must be one of issue, refresh, watch, revoke, admin",
		"34:14: log.level: must be one of debug, info, warn, error",
	})
}

// A change is one replacement in a configuration that is right without it.
func TestProblem(t *testing.T) {
	for name, test := range map[string]struct {
		text string
		want []string
	}{
		"empty":         {"", []string{"1:1: profiles: must have at least 1 item"}},
		"comments only": {"# nothing\n", []string{"1:1: profiles: must have at least 1 item"}},
		"not a mapping": {"- a\n", []string{"1:1: must have keys and values; it can have server, admin, store, profiles, policy, log, audit"}},
		"no YAML":       {"profiles:\n  a: b: c\n", []string{"2:3: is not YAML: mapping values are not allowed in this context"}},
		"no colon":      {with(t, minimal, "region: eu", "region eu"), []string{"5:7: is not YAML: mapping values are not allowed in this context"}},
		"no end":        {with(t, minimal, "{env: SECRET}", "{env: SECRET"), []string{"6:7: is not YAML: did not find expected ',' or '}'"}},
		"indent":        {with(t, minimal, "      client_credentials: {}", "     client_credentials: {}"), []string{"7:6: is not YAML: did not find expected key"}},
		"quote":         {with(t, minimal, "client_id: c", "client_id: \"c"), []string{"5:7: is not YAML: found unexpected end of stream"}},
		"tab":           {"server:\n\taddress: x\n", []string{"2:2: is not YAML: found character that cannot start any token; indent with blanks instead of tabs, and put text that begins with @, ` or % in quotes"}},
		"alias":         {with(t, minimal, "client_id: c", "client_id: *c"), []string{"5:7: is not YAML: a value begins with *, which means an alias; put it in quotes if it is text"}},
		"known alias": {with(t, with(t, minimal, "name: p", "name: &c p"), "client_id: c", "client_id: *c"),
			[]string{"5:18: profiles[0].vantage.client_id: begins with *, which means a YAML alias, and those are not supported: write the value itself, in quotes if it is text"}},
		"merge": {with(t, minimal, "region: eu", "region: eu\n      <<: {tenant_id: t}"),
			[]string{"5:7: profiles[0].vantage: unknown key: this key is not known here; there can be region, base_url, allow_insecure_http, tenant_id, product_id, client_id, client_secret, client_secrets, client_credentials, password, authorization_code"}},
		"tag":             {with(t, minimal, "region: eu", "region: !x eu"), []string{"4:15: profiles[0].vantage.region: begins with !, which means a YAML tag: put it in quotes if it is text"}},
		"wrong tag":       {with(t, minimal, "region: eu", "region: !!float eu"), []string{"4:15: profiles[0].vantage.region: begins with !, which means a YAML tag: put it in quotes if it is text"}},
		"two documents":   {minimal + "---\n" + minimal, []string{"9:1: a second YAML document begins here: keep one document in the file"}},
		"bad second":      {minimal + "---\n{", []string{"9:1: is not YAML: did not find expected node content"}},
		"twice":           {minimal + "profiles: []\n", []string{"8:1: profiles: is set on line 1 already: remove one of the two"}},
		"camel case":      {with(t, minimal, "client_id", "clientId"), []string{"3:5: profiles[0].vantage.client_id: is missing: add it", "5:7: profiles[0].vantage: unknown key: clientId is not known here, did you mean client_id?"}},
		"number as key":   {with(t, minimal, "region:", "1:"), []string{"3:5: profiles[0].vantage: one of region, base_url must be set", "4:7: profiles[0].vantage: unknown key: this key is not known here; there can be region, base_url, allow_insecure_http, tenant_id, product_id, client_id, client_secret, client_secrets, client_credentials, password, authorization_code"}},
		"list as key":     {with(t, minimal, "region:", "[region]:"), []string{"3:5: profiles[0].vantage: one of region, base_url must be set", "4:7: profiles[0].vantage: unknown key: this key is not known here; there can be region, base_url, allow_insecure_http, tenant_id, product_id, client_id, client_secret, client_secrets, client_credentials, password, authorization_code"}},
		"no list":         {"profiles: {name: p}\n", []string{"1:11: profiles: must be a list: write each item on a line of its own after \"- \", or all in [brackets]"}},
		"empty item":      {with(t, minimal, "name: p", "name: p\n    scopes: [a, , b]"), []string{"3:5: is not YAML: did not find expected node content"}},
		"null item":       {with(t, minimal, "name: p", "name: p\n    scopes: [a, ~]"), []string{"3:17: profiles[0].scopes[1]: is empty: remove it, or write a value"}},
		"quoted bool":     {minimal + "server: {reflection: \"true\"}\n", []string{"8:22: server.reflection: must be true or false, without quotes"}},
		"yes":             {minimal + "server: {reflection: yes}\n", []string{"8:22: server.reflection: must be true or false, without quotes"}},
		"scalar grant":    {with(t, minimal, "client_credentials: {}", "client_credentials: true"), []string{"7:27: profiles[0].vantage.client_credentials: has no fields: write {}"}},
		"grant's field":   {with(t, minimal, "client_credentials: {}", "client_credentials: {audience: x}"), []string{"7:28: profiles[0].vantage.client_credentials: unknown key: audience is not known here, there is nothing to set: write {}"}},
		"no unit":         {with(t, minimal, "name: p", "name: p\n    timeout: 10"), []string{"3:14: profiles[0].timeout: must be a span of time with units, for example 300ms, 10s, 5m, 1h30m or 30d"}},
		"too long":        {with(t, minimal, "name: p", "name: p\n    timeout: 99999999999d"), []string{"3:14: profiles[0].timeout: must be a span of time with units, for example 300ms, 10s, 5m, 1h30m or 30d"}},
		"mixed days":      {with(t, minimal, "name: p", "name: p\n    timeout: 1h1d"), []string{"3:14: profiles[0].timeout: must be a span of time with units, for example 300ms, 10s, 5m, 1h30m or 30d"}},
		"zero":            {with(t, minimal, "name: p", "name: p\n    max_token_age: 0s"), []string{"3:20: profiles[0].max_token_age: must be 1m to 366d"}},
		"scopes in one":   {with(t, minimal, "name: p", "name: p\n    scopes: [a b]"), []string{"3:14: profiles[0].scopes[0]: must be one scope, without blanks, quotes and backslashes (RFC 6749 section 3.3): write each scope as an item of its own"}},
		"no grant":        {with(t, minimal, "      client_credentials: {}\n", ""), []string{"3:5: profiles[0].vantage: say how tokens are obtained: add client_credentials: {}, password or authorization_code"}},
		"two providers":   {minimal + "    oauth2: {}\n", []string{"8:5: profiles[0].oauth2: cannot be set beside vantage (line 3): remove one of the two"}},
		"base_url":        {with(t, minimal, "region: eu", "base_url: https://vantage.example.com/auth2/connect/token"), []string{"4:17: profiles[0].vantage.base_url: reaches into /auth2: end it before that, the rest is added"}},
		"http":            {with(t, minimal, "region: eu", "base_url: http://vantage.example.com"), []string{"4:17: profiles[0].vantage.base_url: base_url uses http:// for a host that is not loopback: use https://, or set allow_insecure_http: true beside it"}},
		"public address":  {minimal + "server: {address: \"0.0.0.0:7443\"}\n", []string{"8:9: server: without tls the address must be loopback (127.0.0.1, [::1], localhost) or unix: add tls, or change address"}},
		"every address":   {minimal + "server: {address: \":7443\"}\n", []string{"8:9: server: without tls the address must be loopback (127.0.0.1, [::1], localhost) or unix: add tls, or change address"}},
		"like loopback":   {minimal + "server: {address: \"127.0.0.999:7443\"}\n", []string{"8:19: server.address: without tls the address must be loopback (127.0.0.1, [::1], localhost) or unix: add tls, or change address"}},
		"port":            {minimal + "server: {address: \"127.0.0.1:65536\"}\n", []string{"8:19: server.address: the port must be at most 65535"}},
		"admin's port":    {minimal + "admin: {address: \"127.0.0.1:65536\"}\n", []string{"8:18: admin.address: the port must be at most 65535"}},
		"socket too long": {minimal + "server: {address: unix:/" + strings.Repeat("x", 107) + "}\n", []string{"8:19: server.address: the socket's path is longer than 107 characters: choose a shorter one"}},
	} {
		t.Run(name, func(t *testing.T) { equal(t, problems(t, test.text), test.want) })
	}
}

// The problem is told once, not again by what it is the reason for.
func TestNoProblemsThatFollow(t *testing.T) {
	for name, text := range map[string]string{
		"region":     with(t, minimal, "region: eu", "region: [eu]"),
		"secret":     with(t, minimal, "client_secret: {env: SECRET}", "client_secret: "+canary),
		"secrets":    with(t, minimal, "client_secret: {env: SECRET}", "client_secrets: ["+canary+"]"),
		"no secrets": with(t, minimal, "client_secret: {env: SECRET}", "client_secrets: "+canary),
		"source":     with(t, minimal, "{env: SECRET}", "{env: [SECRET]}"),
		"grant":      with(t, minimal, "client_credentials: {}", "client_credentials: yes"),
		"vantage":    "profiles: [{name: p, vantage: yes}]",
		"name":       with(t, minimal, "name: p", "name: [p]"),
		"profile":    minimal + "  - p\n  - p\n",
	} {
		t.Run(name, func(t *testing.T) {
			want := 1
			if name == "profile" {
				want = 2
			}
			if got := problems(t, text); len(got) != want {
				t.Errorf("got\n\t%s", strings.Join(got, "\n\t"))
			}
		})
	}
}

func TestTooLarge(t *testing.T) {
	path := write(t, filepath.Join(t.TempDir(), "broker.yaml"), minimal+strings.Repeat("#", 4<<20))
	_, err := config.Load(path, options)
	equal(t, shorten(t, err), []string{"1:1: is larger than 4 MiB: is it the right file?"})
}

func TestProblemAsJSON(t *testing.T) {
	_, err := parse("log: {level: loud}")
	var found config.Problems
	if !errors.As(err, &found) {
		t.Fatal(err)
	}
	got, _ := json.Marshal(found)
	want := `[{"file":"/nowhere/broker.yaml","line":1,"column":1,"path":"profiles","message":"must have at least 1 item"},` +
		`{"file":"/nowhere/broker.yaml","line":1,"column":14,"path":"log.level","message":"must be one of debug, info, warn, error"}]`
	if string(got) != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

func TestSpans(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"90s": 90 * time.Second, "1h30m": 90 * time.Minute, "30d": 30 * 24 * time.Hour, "1d12h": 36 * time.Hour, "0.5d": 12 * time.Hour,
	} {
		c, err := parse(with(t, minimal, "name: p", "name: p\n    max_token_age: "+text))
		if err != nil {
			t.Error(err)
		} else if got := c.Profiles[0].MaxTokenAge; got != want {
			t.Errorf("%s: got %s, want %s", text, got, want)
		}
	}
}

func TestAddresses(t *testing.T) {
	for address, want := range map[string]config.Server{
		"localhost:0":        {Network: "tcp", Address: "localhost:0"},
		"'[::1]:7443'":       {Network: "tcp", Address: "[::1]:7443"},
		"127.1.2.3:7443":     {Network: "tcp", Address: "127.1.2.3:7443"},
		"unix:/run/b.sock":   {Network: "unix", Address: "/run/b.sock"},
		"unix:///run/b.sock": {Network: "unix", Address: "/run/b.sock"},
		"unix:b.sock":        {Network: "unix", Address: "/nowhere/b.sock"},
	} {
		if c := mustParse(t, minimal+"server: {address: "+address+"}\n").Server; c.Network != want.Network || c.Address != want.Address {
			t.Errorf("%s: got %+v, want %+v", address, c, want)
		}
	}
	if c := mustParse(t, minimal+"admin: {address: 0.0.0.0:7444}\n"); c.Admin.Address != "0.0.0.0:7444" {
		t.Errorf("got admin address %s", c.Admin.Address)
	}
}

func TestPolicy(t *testing.T) {
	c := mustParse(t, minimal+`policy:
  - {callers: [anonymous], profiles: ["*"], allow: [issue]}
  - {callers: ["dns:*.example.com", "spiffe://prod/*"], profiles: [p], allow: [admin, revoke]}
`)
	want := []access.Rule{
		{Callers: []string{"anonymous"}, Profiles: []string{"*"}, Allow: []string{"issue"}},
		{Callers: []string{"dns:*.example.com", "spiffe://prod/*"}, Profiles: []string{"p"}, Allow: []string{"admin", "revoke"}},
	}
	same := func(a, b access.Rule) bool {
		return slices.Equal(a.Callers, b.Callers) && slices.Equal(a.Profiles, b.Profiles) && slices.Equal(a.Allow, b.Allow)
	}
	if !slices.EqualFunc(c.Policy, want, same) {
		t.Errorf("got %v, want %v", c.Policy, want)
	}
	equal(t, warnings(t, c), nil)
	silent := mustParse(t, minimal+"policy: [{callers: ['dns:x'], profiles: [p], allow: [issue]}]\n")
	equal(t, warnings(t, silent), []string{
		"8:9: policy: callers are anonymous without tls, and no rule names them, so nobody may do anything: add tls, or a rule for anonymous",
	})
}

func TestPolicyScopes(t *testing.T) {
	const profiles = "profiles:\n" +
		"  - {name: p, scopes: [read, write.all], vantage: {region: eu, client_id: c, client_secret: {env: SECRET}, client_credentials: {}}}\n" +
		"  - {name: q, vantage: {region: eu, client_id: c, client_secret: {env: SECRET}, client_credentials: {}}}\n"
	const useless = "5:69: policy[0].scopes: no profile that the rule names has a scope like these, so it allows no tokens: correct them, or give the profiles' scopes"
	for name, c := range map[string]struct {
		rule string
		want []string
	}{
		"a scope of the profile":                {"profiles: [p],   allow: [issue], scopes: [read]", nil},
		"one of several":                        {"profiles: [p],   allow: [issue], scopes: [x, 'w*.all']", nil},
		"a scope that it does not have":         {"profiles: [p],   allow: [issue], scopes: [raed]", []string{useless}},
		"a profile without scopes":              {"profiles: [q],   allow: [issue], scopes: [read]", []string{useless}},
		"a pattern for profiles":                {"profiles: ['*'], allow: [issue], scopes: [read]", nil},
		"a pattern for others":                  {"profiles: ['q*'],allow: [issue], scopes: [read]", []string{useless}},
		"admin, to which scopes are nothing":    {"profiles: [p],   allow: [admin], scopes: [read]", []string{"5:69: policy[0].scopes: admin has nothing to do with scopes, so they change nothing: remove them"}},
		"admin, and something else with tokens": {"profiles: [p],   allow: [admin, issue], scopes: [read]", nil},
	} {
		t.Run(name, func(t *testing.T) {
			got := mustParse(t, profiles+"policy:\n  - {callers: [anonymous], "+c.rule+"}\n")
			equal(t, warnings(t, got), c.want)
			if len(got.Policy[0].Scopes) == 0 {
				t.Error("the rule has no scopes")
			}
		})
	}
	equal(t, problems(t, profiles+"policy:\n  - {callers: [anonymous], profiles: [p], allow: [issue], scopes: ['a b']}\n"), []string{
		"5:68: policy[0].scopes[0]: must be one scope, without blanks, quotes and backslashes, in which * can stand for any number of characters",
	})
}

func TestPlacesOfRules(t *testing.T) {
	c := mustParse(t, minimal+`policy:
  - callers: [anonymous]
    profiles: [p]
    allow: [issue]

  - {callers: ["dns:a"], profiles: [p], allow: [issue]}
`)
	want := []config.Place{{File: "/nowhere/broker.yaml", Line: 9, Column: 5}, {File: "/nowhere/broker.yaml", Line: 13, Column: 5}}
	if !slices.Equal(c.Places, want) {
		t.Errorf("got %+v, want %+v", c.Places, want)
	}
	if c := mustParse(t, minimal); c.Places != nil {
		t.Errorf("without rules: %+v", c.Places)
	}
}

func TestCallersThatNobodyIs(t *testing.T) {
	for pattern, want := range map[string]string{
		"*":                   "begin with spiffe://, dns:, k8s://, unix:uid: or unix:gid:, or write anonymous",
		"worker.example.com":  "begin with spiffe://, dns:, k8s://, unix:uid: or unix:gid:, or write anonymous",
		"unix:*":              "begin with spiffe://, dns:, k8s://, unix:uid: or unix:gid:, or write anonymous",
		"spiffe://Prod/x":     `a SPIFFE trust domain is made of a to z (lower case), 0 to 9, ".", "-" and "_"`,
		"spiffe://prod/x/":    `the segments of a SPIFFE ID's path are made of letters, 0 to 9, ".", "-" and "_"; none is empty, "." or ".."`,
		"dns:a.example.com.":  `a DNS name has labels of letters, 0 to 9, "-" and "_", with one dot between them and none at the end`,
		"k8s://prod/payments": `a service account is k8s://CLUSTER/NAMESPACE/ACCOUNT, each made of a to z (lower case), 0 to 9, "." and "-"`,
		"unix:uid:root":       "users and groups are written as numbers, without zeros in front",
	} {
		equal(t, problems(t, minimal+"policy:\n  - {callers: ['"+pattern+"'], profiles: [p], allow: [issue]}\n"), []string{
			"9:16: policy[0].callers[0]: no caller has such a name: " + want,
		})
	}
}

// Two loads of one process agree on credentials, those of two do not.
func TestFingerprints(t *testing.T) {
	path := write(t, filepath.Join(t.TempDir(), "broker.yaml"), minimal)
	credential := func(l *config.Loader) string {
		c, err := l.Load()
		if err != nil {
			t.Fatal(err)
		}
		return c.Profiles[0].Credential
	}
	random := config.Options{LookupEnv: options.LookupEnv}
	one, other := config.NewLoader(path, random), config.NewLoader(path, random)
	first, second := credential(one), credential(one)
	if first != second {
		t.Error("a second load has another key")
	}
	if first == credential(other) {
		t.Error("two processes have the same key")
	}
}

// inFiles writes the files that an example names and returns it with their paths
// in directory, and an environment that has every variable.
func inFiles(t *testing.T, directory, example string, secrets ...string) (string, config.Options) {
	t.Helper()
	writeServerFiles(t, directory)
	for _, name := range secrets {
		write(t, filepath.Join(directory, name), canary+name+"\n")
	}
	write(t, filepath.Join(directory, "keyset.json"), newKeyset(t))
	environment := options
	environment.LookupEnv = func(name string) (string, bool) { return canary + name, true }
	return strings.NewReplacer("/etc/broker/", directory+"/", "/etc/redis/", directory+"/", "/run/secrets/", directory+"/").Replace(example), environment
}

// copyFile writes the content of one of directory's files into another.
func copyFile(t *testing.T, directory, from, to string) {
	t.Helper()
	content, err := os.ReadFile(filepath.Join(directory, from))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(directory, to), string(content))
}

func namesOf(c *config.Config) []string {
	var names []string
	for _, p := range c.Profiles {
		names = append(names, p.Name)
	}
	return names
}

// The configuration that users were shown first goes on working, to the letter.
func TestDocumentedConfig(t *testing.T) {
	documented, err := os.ReadFile("testdata/documented.yaml")
	if err != nil {
		t.Fatal(err)
	}
	text, environment := inFiles(t, t.TempDir(), string(documented), "redis", "vantage", "ops")
	c, err := config.Parse("broker.yaml", []byte(text), environment)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, warnings(t, c), []string{"33:17: " + strings.Replace(advice, "[0]", "[1]", 1)})
	equal(t, namesOf(c), []string{"invoices", "operator", "review", "payments", "anything-else"})
	for i, want := range []string{"vantage client_credentials", "vantage password", "vantage authorization_code", "secureauth client_credentials", "oauth2 client_credentials"} {
		if p := c.Profiles[i]; p.Provider+" "+string(p.GrantType) != want {
			t.Errorf("%s is %s %s, want %s", p.Name, p.Provider, p.GrantType, want)
		}
	}
	noCanary(t, fmt.Sprintf("%+v %#v", c, c))
}

// All that the schema has, side by side.
func TestWholeConfig(t *testing.T) {
	directory := t.TempDir()
	text, environment := inFiles(t, directory, wholeConfig, "redis", "vantage", "vantage-old", "ops")
	copyFile(t, directory, "tls.key", "key.pem")
	copyFile(t, directory, "tls.crt", "payments.crt")
	c, err := config.Parse("broker.yaml", []byte(text), environment)
	if err != nil {
		t.Fatal(err)
	}
	equal(t, namesOf(c), []string{"invoices", "operator", "review", "private-cloud", "payments", "payments-key", "payments-certificate", "anything-else", "explicit"})
	noCanary(t, fmt.Sprintf("%+v %#v", c, c))
	for _, name := range []string{"key.pem", "payments.crt"} {
		if !slices.Contains(c.Files, filepath.Join(directory, name)) {
			t.Errorf("%s is not among the files to watch", name)
		}
	}
}

// The example in deploy/ is accepted without a warning; what is commented out in
// it too, and it is only the password that is warned of.
func TestDeployedExample(t *testing.T) {
	text, err := os.ReadFile("../../deploy/config.example.yaml")
	if err != nil {
		t.Fatal(err)
	}
	tried := regexp.MustCompile(`(?m)^( *)#([^ #\n])`).ReplaceAllString(string(text), "$1$2")
	profiles := []string{"invoices", "invoices-us", "archive", "private-cloud", "review", "renewed",
		"payments", "payments-key", "payments-certificate", "payments-person", "anything-else", "plain"}
	all := slices.Insert(slices.Clone(profiles), 6, "operator")
	all = slices.Insert(all, 11, "payments-operator")
	for name, test := range map[string]struct {
		text      string
		profiles  []string
		passwords int
	}{
		"as it is":     {string(text), profiles, 0},
		"all of it in": {tried, append(all, "plain-operator"), 3},
	} {
		t.Run(name, func(t *testing.T) {
			directory := t.TempDir()
			const account = "/var/run/secrets/kubernetes.io/serviceaccount/"
			inCluster := strings.NewReplacer(account+"ca.crt", "/etc/broker/ca.crt", account+"token", "/run/secrets/redis").Replace(test.text)
			text, environment := inFiles(t, directory, inCluster, "vantage-invoices", "vantage-us-new", "vantage-us-old", "vantage-renewed", "redis", "ops", "console-token")
			copyFile(t, directory, "tls.key", "payments.key")
			copyFile(t, directory, "tls.crt", "payments.crt")
			c, err := config.Load(write(t, filepath.Join(directory, "broker.yaml"), text), environment)
			if err != nil {
				t.Fatal(err)
			}
			_, discouraged, _ := strings.Cut(advice, ".vantage.password")
			for _, line := range warnings(t, c) {
				if !strings.HasSuffix(line, discouraged) {
					t.Error(line)
				}
			}
			if len(c.Warnings) != test.passwords {
				t.Errorf("got %d warnings, want %d", len(c.Warnings), test.passwords)
			}
			equal(t, namesOf(c), test.profiles)
			if len(c.Policy) != 4 || c.Server.TLS == nil || c.Server.Address != "0.0.0.0:7443" || c.Store == nil || c.Store.Access.TLS == nil || c.Admin.TLS == nil {
				t.Errorf("got %+v", c)
			}
			noCanary(t, fmt.Sprintf("%+v %#v", c, c))
		})
	}
}
