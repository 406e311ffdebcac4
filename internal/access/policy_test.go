package access_test

import (
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/access"
)

func mustPolicy(t testing.TB, rules ...access.Rule) *access.Policy {
	t.Helper()
	p, err := access.NewPolicy(rules)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// rule is written in one line: callers, profiles, allow, scopes, each with blanks
// between them.
func rule(callers, profiles, allow, scopes string) access.Rule {
	return access.Rule{
		Callers: strings.Fields(callers), Profiles: strings.Fields(profiles), Allow: strings.Fields(allow), Scopes: strings.Fields(scopes),
	}
}

func TestDecide(t *testing.T) {
	p := mustPolicy(t,
		rule("spiffe://prod/ns/batch/* dns:Worker.example.com", "invoices inv-*", "issue refresh", ""),
		rule("dns:worker.example.com", "payroll", "issue", "read write.*"),
		rule("dns:worker.example.com", "payroll", "issue admin", "audit"),
		rule("dns:worker.example.com", "p*l", "issue revoke", ""),
		rule("unix:gid:20", "*", "watch", "*"),
		rule("dns:late.example.com", "payroll", "admin", "nothing"),
		rule("*", "*", "issue refresh watch revoke admin", ""),
	)
	worker := &access.Caller{Name: "dns:worker.example.com"}
	for name, c := range map[string]struct {
		caller  *access.Caller
		op      access.Operation
		profile string
		scopes  []string
		want    int
	}{
		"an exact profile":                        {worker, access.Issue, "invoices", []string{"a"}, 0},
		"a pattern for profiles":                  {worker, access.Refresh, "inv-7", nil, 0},
		"another operation":                       {worker, access.Watch, "invoices", nil, access.NoRule},
		"another profile":                         {worker, access.Issue, "orders", nil, access.NoRule},
		"another caller":                          {&access.Caller{Name: "dns:other.example.com"}, access.Issue, "invoices", nil, access.NoRule},
		"a pattern for callers":                   {&access.Caller{Name: "spiffe://prod/ns/batch/x"}, access.Issue, "invoices", nil, 0},
		"all scopes matched":                      {worker, access.Issue, "payroll", []string{"read", "write.all"}, 1},
		"a later rule for other scopes":           {worker, access.Issue, "payroll", []string{"audit"}, 2},
		"rules do not add up":                     {worker, access.Issue, "payroll", []string{"read", "audit"}, 3},
		"no scopes to know":                       {worker, access.Issue, "payroll", nil, 3},
		"no scopes to know, and none without":     {&access.Caller{Name: "unix:uid:7", Groups: []string{"unix:gid:20"}}, access.Watch, "payroll", nil, access.NoRule},
		"any scope":                               {&access.Caller{Name: "unix:uid:7", Groups: []string{"unix:gid:20"}}, access.Watch, "payroll", []string{"a", "b"}, 4},
		"another group":                           {&access.Caller{Name: "unix:uid:7", Groups: []string{"unix:gid:21"}}, access.Watch, "payroll", []string{"a"}, access.NoRule},
		"admin without scopes":                    {worker, access.Admin, "payroll", nil, 2},
		"admin whatever the scopes":               {&access.Caller{Name: "dns:late.example.com"}, access.Admin, "payroll", []string{"x"}, 5},
		"anonymous once there is a rule":          {&access.Caller{Name: access.Anonymous}, access.Issue, "invoices", nil, access.NoRule},
		"an operation that does not exist":        {worker, 0, "invoices", nil, access.NoRule},
		"an operation beyond those that do":       {worker, 99, "invoices", nil, access.NoRule},
		"a name in capitals":                      {&access.Caller{Name: "dns:WORKER.example.com"}, access.Issue, "invoices", nil, access.NoRule},
		"whoever has the bearer token":            {&access.Caller{Name: "bearer", Proof: access.BearerToken}, access.Admin, "nothing", nil, access.ByToken},
		"whoever is at this machine's console":    {&access.Caller{Name: "local", Proof: access.LocalOperator}, access.Admin, "nothing", nil, access.ByAddress},
		"a caller that calls itself bearer":       {&access.Caller{Name: "bearer"}, access.Admin, "payroll", nil, access.NoRule},
		"a bearer token for no operation":         {&access.Caller{Name: "bearer", Proof: access.BearerToken}, 0, "payroll", nil, access.NoRule},
		"a pattern that is longer than the name":  {worker, access.Issue, "inv", nil, access.NoRule},
		"a pattern whose ends would overlap":      {worker, access.Revoke, "p", nil, access.NoRule},
		"a pattern with nothing between its ends": {worker, access.Revoke, "pl", nil, 3},
	} {
		t.Run(name, func(t *testing.T) {
			got := p.Decide(c.caller, c.op, c.profile, c.scopes)
			if got.Rule != c.want || got.Allowed != (c.want != access.NoRule) {
				t.Errorf("got %+v, want rule %d", got, c.want)
			}
			if e := p.Explain(c.caller, c.op, c.profile, c.scopes); e.Decision != got || e.Why == "" {
				t.Errorf("explained %+v, decided %+v", e, got)
			}
		})
	}
}

func TestBothPolicies(t *testing.T) {
	was := mustPolicy(t, rule("dns:old dns:same", "invoices", "issue admin", "a b"))
	next := mustPolicy(t, rule("dns:nobody", "*", "watch", ""), rule("dns:new dns:same", "invoices payroll", "issue refresh", "b c"))
	both := next.And(was)
	if !both.Passing() || next.Passing() || was.Passing() {
		t.Error("only both together are for a moment")
	}
	for name, c := range map[string]struct {
		caller  string
		op      access.Operation
		profile string
		scopes  string
		want    int
	}{
		"both allow it":         {"dns:same", access.Issue, "invoices", "b", 1},
		"only the old one":      {"dns:old", access.Issue, "invoices", "b", access.NoRule},
		"only the new one":      {"dns:new", access.Issue, "invoices", "b", access.NoRule},
		"another profile":       {"dns:same", access.Issue, "payroll", "b", access.NoRule},
		"scopes of the old one": {"dns:same", access.Issue, "invoices", "a b", access.NoRule},
		"scopes of the new one": {"dns:same", access.Issue, "invoices", "b c", access.NoRule},
		"an old operation":      {"dns:same", access.Admin, "invoices", "", access.NoRule},
		"a new operation":       {"dns:same", access.Refresh, "invoices", "b", access.NoRule},
	} {
		caller := &access.Caller{Name: c.caller}
		for range 2 {
			if got := both.Decide(caller, c.op, c.profile, strings.Fields(c.scopes)); got.Rule != c.want || got.Allowed != (c.want >= 0) {
				t.Errorf("%s: %+v", name, got)
			}
		}
		if got := next.Explain(caller, c.op, c.profile, strings.Fields(c.scopes)); got.Allowed && c.want < 0 &&
			both.Explain(caller, c.op, c.profile, strings.Fields(c.scopes)).Why != "the configuration was being replaced, and the one before did not allow it" {
			t.Errorf("%s: the reason is another", name)
		}
	}
	if got := mustPolicy(t).And(&access.Policy{}).Decide(&access.Caller{Name: access.Anonymous}, access.Issue, "x", nil); !got.Allowed {
		t.Error("the default of both is none")
	}
}

func TestZeroPolicy(t *testing.T) {
	for name, p := range map[string]*access.Policy{"zero": {}, "no rules": mustPolicy(t)} {
		if d := p.Decide(&access.Caller{Name: access.Anonymous}, access.Admin, "p", nil); !d.Allowed || d.By() != "default" {
			t.Errorf("%s: anonymous: %+v", name, d)
		}
		c := &access.Caller{Name: "dns:a"}
		if d := p.Decide(c, access.Issue, "p", nil); d.Allowed || d.By() != "" || p.Allowing(c, access.Issue, "p") != nil {
			t.Errorf("%s: authenticated: %+v", name, d)
		}
	}
}

func TestPolicyWithAnOperationThatDoesNotExist(t *testing.T) {
	if _, err := access.NewPolicy([]access.Rule{rule("dns:a", "p", "issue read", "")}); err == nil || !strings.Contains(err.Error(), `rule 0: there is no operation "read"`) {
		t.Errorf("got %v", err)
	}
}

func TestCallerIsJudgedByThePolicyAtHand(t *testing.T) {
	c := &access.Caller{Name: "dns:a"}
	yes, no := mustPolicy(t, rule("dns:a", "p", "issue", "")), mustPolicy(t, rule("dns:b", "p", "issue", ""))
	for range 3 {
		if !yes.Decide(c, access.Issue, "p", nil).Allowed || no.Decide(c, access.Issue, "p", nil).Allowed {
			t.Fatal("one policy decided for the other")
		}
	}
}

func TestAuthorizerTellsWhenThePolicyChanges(t *testing.T) {
	a := access.NewAuthorizer()
	c := &access.Caller{Name: "dns:a"}
	p := mustPolicy(t, rule("dns:a", "p", "issue", ""))
	_, changed := a.Current()
	select {
	case <-changed:
		t.Fatal("it changed before it did")
	default:
	}
	a.Use(p)
	<-changed
	if now, again := a.Current(); now != p || again == changed || !a.Decide(c, access.Issue, "p", nil).Allowed {
		t.Error("the new policy is not in force")
	}
}

// Random policies decide as somebody would who reads the rules one by one.
func TestDecideAgainstAReader(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	pick := func(from ...string) string { return from[r.IntN(len(from))] }
	several := func(most int, next func() string) (all []string) {
		for range r.IntN(most + 1) {
			all = append(all, next())
		}
		return all
	}
	caller := func() string {
		return pick("spiffe://", "spiffe://x", "dns:", "unix:uid:") + pick("a", "b", "*", "a*", "0", "1*") + pick("/a", "/*", "", ".b", ".*")
	}
	name := func() string {
		return pick("", "", "a", "b", "ab") + pick("a", "b", "c", "bc") + pick("", "-", "1") + pick("", "a", "b")
	}
	profile := func() string {
		return pick("", "*", "a*", "*b", "") + name() + pick("", "", "*", "*a", "*b*")
	}
	allow := func() string { return pick("issue", "refresh", "watch", "revoke", "admin") }
	asked, allowed := 0, 0
	for range 60 {
		var rules []access.Rule
		for range r.IntN(100) {
			rules = append(rules, access.Rule{Callers: several(4, caller), Profiles: several(4, profile), Allow: several(3, allow), Scopes: several(3, profile)})
		}
		rules = append(rules, rule("unix:gid:5", "*", "issue", ""))
		p := mustPolicy(t, rules...)
		for range 80 {
			c := &access.Caller{Name: strings.ReplaceAll(caller(), "*", "c"), Groups: several(1, func() string { return "unix:gid:5" })}
			op, profile, scopes := access.Operations()[r.IntN(5)], name(), several(2, name)
			want := access.NoRule
			if i := slices.IndexFunc(rules, func(r access.Rule) bool { return read(r, c, op, profile, scopes) }); i >= 0 {
				want = i
				allowed++
			}
			if asked++; p.Decide(c, op, profile, scopes).Rule != want {
				t.Fatalf("%s may %s %q for %q by %d, want %d\n%q", c.Name, op, profile, scopes, p.Decide(c, op, profile, scopes).Rule, want, rules)
			}
			var all []int
			for i, r := range rules {
				r.Scopes = nil
				if read(r, c, op, profile, scopes) {
					all = append(all, i)
				}
			}
			for i, a := range p.Allowing(c, op, profile) {
				if i >= len(all) || a.Index != all[i] {
					t.Fatalf("allowing: %v, want %v", p.Allowing(c, op, profile), all)
				}
			}
			e := p.Explain(c, op, profile, scopes)
			if e.Rule != want || !slices.Equal(e.Allowing, all) {
				t.Fatalf("explained %+v, want rule %d of %v", e, want, all)
			}
		}
	}
	if allowed < asked/20 || allowed > asked*19/20 {
		t.Errorf("%d of %d were allowed: this shows little", allowed, asked)
	}
}

// read reports whether a rule allows all of a request.
func read(r access.Rule, c *access.Caller, op access.Operation, profile string, scopes []string) bool {
	like := func(pattern, s string) bool {
		return regexpOf(pattern).MatchString(s)
	}
	means := func(pattern string) bool {
		return slices.ContainsFunc(append([]string{c.Name}, c.Groups...), func(name string) bool { return obvious(pattern, name) })
	}
	if !slices.ContainsFunc(r.Callers, means) || !slices.Contains(r.Allow, op.String()) ||
		!slices.ContainsFunc(r.Profiles, func(pattern string) bool { return like(pattern, profile) }) {
		return false
	}
	if op == access.Admin || len(r.Scopes) == 0 {
		return true
	}
	for _, scope := range scopes {
		if !slices.ContainsFunc(r.Scopes, func(pattern string) bool { return like(pattern, scope) }) {
			return false
		}
	}
	return len(scopes) > 0
}

var regexps = map[string]*regexp.Regexp{}

func regexpOf(pattern string) *regexp.Regexp {
	if regexps[pattern] == nil {
		regexps[pattern] = regexp.MustCompile("^" + strings.ReplaceAll(regexp.QuoteMeta(pattern), `\*`, ".*") + "$")
	}
	return regexps[pattern]
}

func TestExplain(t *testing.T) {
	p := mustPolicy(t,
		rule("dns:a", "invoices", "issue refresh", ""),
		rule("dns:a", "payroll", "issue", "read write"),
		rule("dns:a", "payroll", "issue", "read audit admin"),
		rule("dns:b", "ledger", "watch", ""),
		rule("dns:b", "ledger", "revoke", "x"),
	)
	for name, c := range map[string]struct {
		caller  string
		op      access.Operation
		profile string
		scopes  []string
		want    string
	}{
		"allowed":                        {"dns:a", access.Issue, "invoices", nil, "policy[0] allows it"},
		"a caller that no rule names":    {"dns:c", access.Issue, "invoices", nil, "no rule names the caller; policy[0] allows issue on this profile to others: add the caller to the callers of one"},
		"and nobody has the profile":     {"dns:c", access.Issue, "orders", nil, "no rule names the caller, and none allows anybody issue on this profile: add a rule with the caller, the profile and issue"},
		"another profile":                {"dns:b", access.Watch, "invoices", nil, "policy[3] and policy[4] name the caller, but none of them the profile: add it to the profiles of a rule"},
		"another operation":              {"dns:a", access.Watch, "invoices", nil, "policy[0] names the caller and the profile, but allows only issue, refresh: add watch to its allow"},
		"another operation, two rules":   {"dns:b", access.Issue, "ledger", nil, "policy[3] and policy[4] name the caller and the profile, but none of them allows issue: add it to the allow of one"},
		"a scope too many":               {"dns:b", access.Revoke, "ledger", []string{"x", "y"}, "policy[4] allows it, but not for all of the scopes: ask for fewer, or add y to the scopes of policy[4]"},
		"a scope too many for each rule": {"dns:a", access.Issue, "payroll", []string{"read", "audit", "admin", "write"}, "policy[1] and policy[2] allow it, but none of them for all of the scopes; policy[2] comes nearest: ask for fewer, or add write to the scopes of policy[2]"},
		"no scopes at all":               {"dns:b", access.Revoke, "ledger", nil, "policy[4] limits the scopes; the request names none, and neither does the profile, so nobody knows what would be granted: name scopes in the profile"},
	} {
		t.Run(name, func(t *testing.T) {
			if e := p.Explain(&access.Caller{Name: c.caller}, c.op, c.profile, c.scopes); e.Why != c.want {
				t.Errorf("got  %s\nwant %s", e.Why, c.want)
			}
		})
	}
	if e := (&access.Policy{}).Explain(&access.Caller{Name: "dns:a"}, access.Issue, "p", nil); e.Why != "there is no rule: add one with the caller, the profile and issue" {
		t.Error(e.Why)
	}
	if e := (&access.Policy{}).Explain(&access.Caller{Name: access.Anonymous}, access.Issue, "p", nil); !e.Allowed || !strings.Contains(e.Why, "there is no rule") {
		t.Error(e.Why)
	}
	var many []access.Rule
	for i := range 100 {
		many = append(many, rule("dns:a", fmt.Sprintf("p%d", i), "issue", ""))
	}
	want := "policy[0], policy[1], policy[2], policy[3], policy[4] and 95 more name the caller, but none of them the profile: add it to the profiles of a rule"
	if e := mustPolicy(t, many...).Explain(&access.Caller{Name: "dns:a"}, access.Issue, "q", nil); e.Why != want {
		t.Error(e.Why)
	}
}
