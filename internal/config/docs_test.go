package config_test

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/config"
)

// documented is what the examples of docs/policy.md are about.
const documented = `server: {address: 127.0.0.1:7443, tls: {certificate: tls.crt, private_key: tls.key, client_ca: ca.crt}}
profiles:
  - {name: invoices, scopes: [invoices.read, invoices.write], vantage: {region: eu, client_id: c, client_secret: {env: SECRET}, client_credentials: {}}}
  - {name: ledger-eu, scopes: [ledger.read, ledger.write], vantage: {region: eu, client_id: c, client_secret: {env: SECRET}, client_credentials: {}}}
  - {name: ledger-us, scopes: [ledger.read, ledger.write], vantage: {region: us, client_id: c, client_secret: {env: SECRET}, client_credentials: {}}}
`

// Every example loads without a warning and decides as the text says.
func TestExamplesOfPolicies(t *testing.T) {
	text, err := os.ReadFile("../../docs/policy.md")
	if err != nil {
		t.Fatal(err)
	}
	directory := t.TempDir()
	writeServerFiles(t, directory)
	var policies []*access.Policy
	for i, example := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllSubmatch(text, -1) {
		c, err := config.Parse(filepath.Join(directory, "broker.yaml"), []byte(documented+string(example[1])), options)
		if err != nil {
			t.Fatalf("example %d: %v", i, err)
		}
		equal(t, warnings(t, c), nil)
		p, err := access.NewPolicy(c.Policy)
		if err != nil {
			t.Fatalf("example %d: %v", i, err)
		}
		policies = append(policies, p)
	}
	if len(policies) != 2 {
		t.Fatalf("there are %d examples", len(policies))
	}
	first, ledger := policies[0], policies[1]
	for _, c := range []struct {
		policy  *access.Policy
		caller  string
		groups  []string
		op      access.Operation
		profile string
		scopes  []string
		by      string
	}{
		{first, "spiffe://prod/ns/batch/sa/invoices", nil, access.Issue, "invoices", []string{"invoices.read"}, "policy[0]"},
		{first, "spiffe://prod/ns/batch/sa/invoices", nil, access.Issue, "invoices", []string{"invoices.read", "invoices.write"}, ""},
		{first, "dns:a.ops.example.com", nil, access.Admin, "ledger-eu", nil, "policy[1]"},
		{ledger, "spiffe://prod/ns/batch/sa/nightly", nil, access.Issue, "ledger-us", []string{"ledger.read"}, "policy[0]"},
		{ledger, "spiffe://prod/ns/batch/sa/nightly", nil, access.Issue, "ledger-us", []string{"ledger.read", "ledger.write"}, ""},
		{ledger, "spiffe://prod/ns/ledger/sa/server", nil, access.Watch, "ledger-eu", []string{"ledger.read", "ledger.write"}, "policy[1]"},
		{ledger, "unix:uid:7", []string{"unix:gid:2000"}, access.Admin, "ledger-eu", nil, "policy[2]"},
		{ledger, "unix:uid:7", []string{"unix:gid:2000"}, access.Issue, "ledger-eu", []string{"ledger.read"}, ""},
	} {
		caller, err := access.Named(c.caller, c.groups...)
		if err != nil {
			t.Fatal(err)
		}
		if d := c.policy.Decide(caller, c.op, c.profile, c.scopes); d.By() != c.by || d.Allowed != (c.by != "") {
			t.Errorf("%s, %v %s: decided by %q, want %q", c.caller, c.op, c.profile, d.By(), c.by)
		}
	}
}
