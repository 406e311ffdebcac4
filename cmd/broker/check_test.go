package main

import (
	"encoding/json"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/testca"
)

const explained3 = `policy:
  - callers: ["dns:worker.example.com", "spiffe://prod/ns/*/sa/worker"]
    profiles: [invoices]
    allow: [issue, admin]
    scopes: [openid, "global.*"]
  - callers: ["unix:gid:20", "dns:Ops.example.com"]
    profiles: ["inv*"]
    allow: [issue, refresh, watch, revoke, admin]`

// The lines of the rules in the stage's config.
const firstRule, secondRule = "13", "17"

func TestCheckExplains(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	config := s.config(explained3)
	explain := func(t *testing.T, args ...string) outcome {
		t.Helper()
		return command(t, append([]string{"check", "--config", config, "--explain"}, args...)...)
	}
	for name, c := range map[string]struct {
		args []string
		want []string // lines, blanks squeezed
	}{
		"each operation": {[]string{"--caller", "dns:ops.example.com", "--profile", "invoices"}, []string{
			"caller dns:ops.example.com", "profile invoices", "scopes openid permissions global.wildcard",
			"issue allowed by policy[1] (config.yaml:" + secondRule + ")", "refresh allowed by policy[1] (config.yaml:" + secondRule + ")",
			"watch allowed by policy[1] (config.yaml:" + secondRule + ")", "revoke allowed by policy[1] (config.yaml:" + secondRule + ")",
			"admin allowed by policy[1] (config.yaml:" + secondRule + ")",
		}},
		"the profile's own scopes are too many": {[]string{"--caller", "dns:worker.example.com", "--profile", "invoices", "--operation", "issue"}, []string{
			"issue denied: policy[0] allows it, but not for all of the scopes: ask for fewer, or add permissions to the scopes of policy[0]",
		}},
		"fewer scopes": {[]string{"--caller", "dns:Worker.example.com", "--profile", "invoices", "--scope", "openid,global.wildcard"}, []string{
			"caller dns:worker.example.com", "scopes openid global.wildcard",
			"issue allowed by policy[0] (config.yaml:" + firstRule + "), which limits the scopes to openid global.*",
			"refresh denied: policy[0] names the caller and the profile, but allows only issue, admin: add refresh to its allow",
			"admin allowed by policy[0] (config.yaml:" + firstRule + ")",
		}},
		"a scope that the profile does not have": {[]string{"--caller", "dns:worker.example.com", "--profile", "invoices", "--operation", "issue", "--scope", "global.all"}, []string{
			"issue allowed by policy[0] (config.yaml:" + firstRule + "), which limits the scopes to openid global.*; but the request is not valid: the profile does not have the scopes global.all",
		}},
		"by its group": {[]string{"--caller", "unix:uid:7", "--group", "unix:gid:9", "--group", "unix:gid:20", "--profile", "invoices", "--operation", "watch"}, []string{
			"caller unix:uid:7 unix:gid:9 unix:gid:20", "watch allowed by policy[1] (config.yaml:" + secondRule + ")",
		}},
		"not by its group": {[]string{"--caller", "unix:uid:7", "--profile", "invoices", "--operation", "watch"}, []string{
			"watch denied: no rule names the caller; policy[1] allows watch on this profile to others: add the caller to the callers of one",
		}},
		"a profile that does not exist": {[]string{"--caller", "dns:ops.example.com", "--profile", "inv-2", "--operation", "issue"}, []string{
			"scopes none: the server decides", "issue denied: there is no such profile; if there were: policy[1] allows it",
		}},
		"a caller that nobody can be": {[]string{"--caller", "spiffe://Prod/ns/batch/sa/worker", "--profile", "invoices", "--operation", "issue"}, []string{
			`issue denied: no caller has such a name: a SPIFFE trust domain is made of a to z (lower case), 0 to 9, ".", "-" and "_"`,
		}},
		"a pattern as caller": {[]string{"--caller", "spiffe://prod/*", "--profile", "invoices", "--operation", "issue"}, []string{
			`issue denied: no caller has such a name: "*" is for patterns`,
		}},
	} {
		t.Run(name, func(t *testing.T) {
			got := explain(t, c.args...)
			lines := strings.Split(regexp.MustCompile(` +`).ReplaceAllString(got.stdout, " "), "\n")
			if got.status != 0 || !strings.Contains(lines[0], "is valid") && !strings.Contains(got.stdout, "is valid: 1 profiles") {
				t.Fatalf("%+v", got)
			}
			for _, want := range c.want {
				if !slices.Contains(lines, want) {
					t.Errorf("no line %q in\n%s", want, strings.Join(lines, "\n"))
				}
			}
		})
	}
	if calls := s.vantage.Calls().Total; calls != 0 {
		t.Errorf("check made %d token requests", calls)
	}

	got := explain(t, "--caller", "dns:worker.example.com", "--profile", "invoices", "--scope", "openid", "--output", "json")
	var r report
	if err := json.Unmarshal([]byte(got.stdout), &r); err != nil || !r.Valid || r.Explanation == nil || len(r.Explanation.Decisions) != 5 {
		t.Fatalf("%v: %s", err, got.stdout)
	}
	e := r.Explanation
	issue, refresh := e.Decisions[0], e.Decisions[1]
	if e.Caller != "dns:worker.example.com" || !e.ProfileExists || !slices.Equal(e.Scopes, []string{"openid"}) ||
		!issue.Allowed || issue.Operation != "issue" || issue.Rule != "policy[0]" || issue.Place.File != config || issue.Place.Line != 13 || issue.Place.Column != 5 ||
		!slices.Equal(issue.Limits, []string{"openid", "global.*"}) || issue.Why != "policy[0] allows it" {
		t.Errorf("issue: %s", got.stdout)
	}
	if refresh.Allowed || refresh.Rule != "" || refresh.Place != nil || !strings.Contains(refresh.Why, "add refresh to its allow") {
		t.Errorf("refresh: %s", got.stdout)
	}
	if got := command(t, "check", "--config", config, "--output", "json"); strings.Contains(got.stdout, "explanation") {
		t.Errorf("unasked: %s", got.stdout)
	}
}

func TestCheckExplainsWithoutRules(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	config := s.config()
	got := command(t, "check", "--config", config, "--explain", "--caller", "anonymous", "--profile", "invoices", "--operation", "issue")
	if got.status != 0 || !strings.Contains(got.stdout, "allowed: there is no rule, and then anonymous callers, who exist only on this machine, may do everything") {
		t.Errorf("anonymous: %+v", got)
	}
	got = command(t, "check", "--config", config, "--explain", "--caller", "dns:a", "--profile", "invoices", "--operation", "issue")
	if got.status != 0 || !strings.Contains(got.stdout, "denied: there is no rule: add one with the caller, the profile and issue") {
		t.Errorf("authenticated: %+v", got)
	}
}

func TestCheckIsAskedWrongly(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	config := s.config()
	bad := s.write("bad.yaml", fiveMistakes)
	for _, c := range []struct {
		args []string
		text string
	}{
		{[]string{"--caller", "dns:a"}, "--caller says what to explain: add --explain"},
		{[]string{"--scope", "a"}, "--scope says what to explain: add --explain"},
		{[]string{"--explain"}, "--explain needs --caller and --profile"},
		{[]string{"--explain", "--caller", "dns:a"}, "--explain needs --caller and --profile"},
		{[]string{"--explain", "--caller", "dns:a", "--profile", "p", "--operation", "read"}, "use issue, refresh, watch, revoke or admin"},
		{[]string{"--explain", "--caller", "dns:a", "--profile", "p", "--group", "unix:gid:7"}, "only callers unix:uid:N have groups"},
		{[]string{"--explain", "--caller", "unix:uid:7", "--profile", "p", "--group", "staff"}, "write unix:gid:N"},
		{[]string{"--explain", "--caller", "dns:a", "--profile", "p", "--config", bad}, "bad.yaml:"},
	} {
		got := command(t, append([]string{"check", "--config", config}, c.args...)...)
		if got.status != 2 || !strings.Contains(got.stdout+got.stderr, c.text) || strings.Contains(got.stdout, "allowed") {
			t.Errorf("%q: exit status %d, want 2 and %q:\n%s%s", c.args, got.status, c.text, got.stdout, got.stderr)
		}
	}
}

// What check explains is what serve does, and whoami says.
func TestExplainedAndServed(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.tlsFiles(testca.New(t)) // the client is dns:worker.example.com
	withTLS := strings.Replace(read(t, s.config(explained3)),
		`{address: "127.0.0.1:0"}`, `{address: "127.0.0.1:0", tls: {certificate: server.pem, private_key: server.key, client_ca: ca.pem}}`, 1)
	config := s.write("config.yaml", withTLS)
	p := start(t, config)
	as := func(args ...string) outcome {
		return command(t, append(args, "--address", p.address, "--ca", s.path("ca.pem"), "--certificate", s.path("client.pem"), "--private-key", s.path("client.key"))...)
	}
	explain := func(args ...string) string {
		return command(t, append([]string{"check", "--config", config, "--explain", "--caller", "dns:worker.example.com", "--profile", "invoices", "--operation", "issue"}, args...)...).stdout
	}
	if got := as("token", "invoices", "--scope", "openid"); got.status != 0 || !strings.Contains(explain("--scope", "openid"), "allowed by policy[0]") {
		t.Errorf("fewer scopes: %+v, explained %s", got, explain("--scope", "openid"))
	}
	const why = "policy[0] allows it, but not for all of the scopes: ask for fewer, or add permissions to the scopes of policy[0]"
	if got := as("token", "invoices"); got.status != 1 || !strings.Contains(got.stderr, "CALLER_DENIED") || strings.Contains(got.stderr, "policy[") || !strings.Contains(explain(), why) {
		t.Errorf("all scopes: %+v, explained %s", got, explain())
	}
	p.logged(`"why":"` + why + `"`)

	who := as("whoami")
	squeezed := regexp.MustCompile(` +`).ReplaceAllString(who.stdout, " ")
	for _, want := range []string{"caller dns:worker.example.com\n", "proven by dns_san\n", "PROFILE MAY BY SCOPES\n", "invoices issue policy[0] openid global.*\n", "invoices admin policy[0] any\n"} {
		if !strings.Contains(squeezed, want) {
			t.Errorf("whoami lacks %q:\n%s", want, who.stdout)
		}
	}
	if strings.Contains(who.stdout, "forwarded by") {
		t.Errorf("whoami: %s", who.stdout)
	}
	var j struct {
		Caller, Proof string
		Permissions   []struct {
			Profile string
			Grants  []struct {
				Operation, Rule string
				Scopes          []string
			}
		}
	}
	asJSON := as("whoami", "--output", "json")
	if err := json.Unmarshal([]byte(asJSON.stdout), &j); err != nil || j.Caller != "dns:worker.example.com" || len(j.Permissions) != 1 || len(j.Permissions[0].Grants) != 2 ||
		j.Permissions[0].Grants[0].Rule != "policy[0]" || !slices.Equal(j.Permissions[0].Grants[0].Scopes, []string{"openid", "global.*"}) {
		t.Errorf("%v: %s", err, asJSON.stdout)
	}
	if got := as("whoami", "--output", "xml"); got.status != 2 {
		t.Errorf("%+v", got)
	}

	// Another policy holds for the next call, on whatever connection.
	s.write("config.yaml", strings.Replace(withTLS, `"global.*"`, `"*"`, 1))
	p.await("the new policy is in force", func() bool { return as("token", "invoices").status == 0 })
}

// The output that docs/policy.md shows is that of its first example.
func TestExplanationInTheDocs(t *testing.T) {
	t.Parallel()
	docs := read(t, "../../docs/policy.md")
	example := regexp.MustCompile("(?s)```yaml\n(policy:.*?)```").FindStringSubmatch(docs)
	shown := regexp.MustCompile("(?s)```console\n\\$ broker (check .*?)\n(.*?)```").FindStringSubmatch(docs)
	if example == nil || shown == nil {
		t.Fatal("docs/policy.md has no example, or does not show what check says")
	}
	const profile = "  - {name: %, scopes: [invoices.read, invoices.write], vantage: {region: eu, client_id: c, client_secret: {file: secret}, client_credentials: {}}}\n"
	s := newStage(t)
	config := s.write("broker.yaml", "profiles:\n"+strings.ReplaceAll(profile, "%", "invoices")+strings.ReplaceAll(profile, "%", "a")+strings.ReplaceAll(profile, "%", "b")+example[1])
	got := command(t, strings.Fields(strings.Replace(shown[1], "broker.yaml", config, 1))...)
	_, answer, _ := strings.Cut(got.stdout, config+" is valid") // after the warnings
	if "broker.yaml is valid"+answer != shown[2] {
		t.Errorf("got\n%swant\n%s", got.stdout, shown[2])
	}
}
