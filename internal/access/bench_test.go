package access_test

import (
	"fmt"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/access"
)

// The size that is promised: a decision takes less than a microsecond and
// allocates nothing.
const (
	manyRules   = 1_000
	manyCallers = 10_000
)

// shape is a policy of many rules, and what is asked of it.
type shape struct {
	name    string
	rules   func(i int) access.Rule
	callers int // how many ask in turn; 1 if not set
	caller  func(i int) string
	op      access.Operation // Issue if not set
	profile func(i int) string
	scopes  []string
	denied  bool
}

func always(s string) func(int) string { return func(int) string { return s } }

func numbered(format string, of int) func(int) string {
	return func(i int) string { return fmt.Sprintf(format, i%of) }
}

func namedRule(caller, profile func(int) string, scopes ...string) func(int) access.Rule {
	return func(i int) access.Rule {
		return access.Rule{Callers: []string{caller(i)}, Profiles: []string{profile(i)}, Allow: []string{"issue", "refresh"}, Scopes: scopes}
	}
}

// tenEach are rules that name ten callers each, so that all callers are named.
func tenEach(i int) access.Rule {
	r := access.Rule{Profiles: []string{fmt.Sprintf("p-%d", i), "shared-*"}, Allow: []string{"issue"}}
	for j := range manyCallers / manyRules {
		r.Callers = append(r.Callers, fmt.Sprintf("spiffe://prod/ns/n-%d/sa/s-%d", i, j))
	}
	return r
}

var shapes = []shape{
	{
		name:   "exact",
		rules:  namedRule(numbered("spiffe://prod/ns/n-%d/sa/x", manyRules), numbered("p-%d", manyRules)),
		caller: always("spiffe://prod/ns/n-999/sa/x"), profile: always("p-999"), scopes: []string{"a", "b"},
	},
	{
		name:   "segment",
		rules:  namedRule(numbered("spiffe://prod/ns/*/sa/x-%d", manyRules), numbered("p-%d", manyRules)),
		caller: always("spiffe://prod/ns/batch/sa/x-999"), profile: always("p-999"),
	},
	{
		name:   "partial",
		rules:  namedRule(numbered("spiffe://prod/ns/batch-%d-*/sa/x", manyRules), numbered("p-%d-*", manyRules)),
		caller: always("spiffe://prod/ns/batch-999-7/sa/x"), profile: always("p-999-7"),
	},
	{
		name:   "all rules name the caller/profile by name",
		rules:  namedRule(always("spiffe://prod/ns/*/sa/x"), numbered("p-%d", manyRules)),
		caller: always("spiffe://prod/ns/batch/sa/x"), profile: always("p-999"),
	},
	{
		name:   "all rules name the caller/profile by its beginning",
		rules:  namedRule(always("spiffe://prod/ns/*/sa/x"), numbered("team-%d-*", manyRules)),
		caller: always("spiffe://prod/ns/batch/sa/x"), profile: always("team-999-invoices"),
	},
	{
		name:   "all rules name the caller/profile by its end",
		rules:  namedRule(always("spiffe://prod/ns/*/sa/x"), numbered("*-%d", manyRules)),
		caller: always("spiffe://prod/ns/batch/sa/x"), profile: always("invoices-999"),
	},
	{
		name:   "all rules name the caller/profile by its middle",
		rules:  namedRule(always("spiffe://prod/ns/*/sa/x"), numbered("*-%d-*", manyRules)),
		caller: always("spiffe://prod/ns/batch/sa/x"), profile: always("invoices-999-eu"),
	},
	{
		name: "all rules name the caller/and the profile, not the scopes",
		rules: func(i int) access.Rule {
			return namedRule(always("dns:*.example.com"), always("invoices"), fmt.Sprintf("scope-%d", i), fmt.Sprintf("other-%d.*", i))(i)
		},
		caller: always("dns:worker.example.com"), profile: always("invoices"), scopes: []string{"scope-999", "other-999.read"},
	},
	{
		name: "all rules name the caller/and the profile, denied by scopes",
		rules: func(i int) access.Rule {
			return namedRule(always("dns:*.example.com"), always("invoices"), fmt.Sprintf("scope-%d", i), fmt.Sprintf("other-%d.*", i))(i)
		},
		caller: always("dns:worker.example.com"), profile: always("invoices"), scopes: []string{"scope-999", "other-998.read"}, denied: true,
	},
	{
		name:   "denied/the profile",
		rules:  namedRule(always("spiffe://prod/ns/*/sa/x"), numbered("team-%d-*", manyRules)),
		caller: always("spiffe://prod/ns/batch/sa/x"), profile: always("team-1000-invoices"), denied: true,
	},
	{
		name:   "denied/the operation",
		rules:  namedRule(always("spiffe://prod/ns/*/sa/x"), always("*")),
		caller: always("spiffe://prod/ns/batch/sa/x"), op: access.Admin, profile: always("invoices"), denied: true,
	},
	{
		name:   "denied/the caller",
		rules:  namedRule(numbered("spiffe://prod/ns/n-%d/sa/*", manyRules), always("*")),
		caller: always("spiffe://prod/ns/batch/sa/x"), profile: always("invoices"), denied: true,
	},
	{
		name:    "10 rules of 1000 name the caller",
		rules:   namedRule(numbered("spiffe://prod/ns/n-%d/sa/x", 100), numbered("p-%d", manyRules)),
		caller:  always("spiffe://prod/ns/n-99/sa/x"),
		profile: always("p-999"),
	},
	{
		name:    "10000 callers/profile by name",
		rules:   tenEach,
		callers: manyCallers,
		caller:  func(i int) string { return fmt.Sprintf("spiffe://prod/ns/n-%d/sa/s-%d", i/10, i%10) },
		profile: func(i int) string { return fmt.Sprintf("p-%d", i/10) },
	},
	{
		name:    "10000 callers/profile by pattern",
		rules:   tenEach,
		callers: manyCallers,
		caller:  func(i int) string { return fmt.Sprintf("spiffe://prod/ns/n-%d/sa/s-%d", i/10, i%10) },
		profile: numbered("shared-%d", manyCallers),
	},
	{
		name:    "10000 callers/denied",
		rules:   tenEach,
		callers: manyCallers,
		caller:  func(i int) string { return fmt.Sprintf("spiffe://prod/ns/n-%d/sa/s-%d", i/10, i%10) },
		profile: func(i int) string { return fmt.Sprintf("p-%d", i/10+1) },
		denied:  true,
	},
}

// asker is one caller, and what it asks for.
type asker struct {
	caller  *access.Caller
	profile string
}

// As many rules as a configuration may have.
func TestDecideAmongManyRules(t *testing.T) {
	for _, n := range []int{1_024, 1_025, 10_000, 10_241} {
		rules := make([]access.Rule, n)
		for i := range rules {
			rules[i] = namedRule(always("dns:a"), numbered("p-%d", n), fmt.Sprintf("s-%d", i))(i)
		}
		p := mustPolicy(t, rules...)
		c := &access.Caller{Name: "dns:a"}
		for _, i := range []int{0, 63, 64, n - 1} {
			profile, scopes := fmt.Sprintf("p-%d", i), []string{fmt.Sprintf("s-%d", i)}
			if d := p.Decide(c, access.Issue, profile, scopes); d.Rule != i {
				t.Errorf("%d rules: %d decides, want %d", n, d.Rule, i)
			}
			if d := p.Decide(c, access.Issue, profile, []string{"s"}); d.Allowed {
				t.Errorf("%d rules: %d decides, want none", n, d.Rule)
			}
			if got := testing.AllocsPerRun(100, func() { kept = p.Decide(c, access.Issue, profile, scopes) }); got != 0 && n <= 10_000 && !raceEnabled {
				t.Errorf("%d rules: %v allocations", n, got)
			}
		}
	}
}

// build makes the policy and those who ask, and checks the decisions.
func (s *shape) build(t testing.TB) (*access.Policy, []asker) {
	t.Helper()
	if s.op == 0 {
		s.op = access.Issue
	}
	rules := make([]access.Rule, manyRules)
	for i := range rules {
		rules[i] = s.rules(i)
	}
	p := mustPolicy(t, rules...)
	askers := make([]asker, max(1, s.callers))
	for i := range askers {
		askers[i] = asker{&access.Caller{Name: s.caller(i)}, s.profile(i)}
		if d := p.Decide(askers[i].caller, s.op, askers[i].profile, s.scopes); d.Allowed == s.denied {
			t.Fatalf("%s asks for %s: %+v", s.caller(i), askers[i].profile, d)
		}
	}
	return p, askers
}

var kept access.Decision

func BenchmarkDecide(b *testing.B) {
	for _, s := range shapes {
		b.Run(s.name, func(b *testing.B) {
			p, askers := s.build(b)
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				a := &askers[i]
				kept = p.Decide(a.caller, s.op, a.profile, s.scopes)
				if i++; i == len(askers) {
					i = 0
				}
			}
		})
	}
}

// BenchmarkDecideFirst is the first decision about a caller, for example the first
// call of a connection.
func BenchmarkDecideFirst(b *testing.B) {
	for _, s := range shapes {
		b.Run(s.name, func(b *testing.B) {
			p, askers := s.build(b)
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				a := &askers[i]
				kept = p.Decide(&access.Caller{Name: a.caller.Name}, s.op, a.profile, s.scopes)
				if i++; i == len(askers) {
					i = 0
				}
			}
		})
	}
}

func BenchmarkNewPolicy(b *testing.B) {
	rules := make([]access.Rule, manyRules)
	for i := range rules {
		rules[i] = tenEach(i)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := access.NewPolicy(rules); err != nil {
			b.Fatal(err)
		}
	}
}

func TestDecideAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	for _, s := range shapes {
		t.Run(s.name, func(t *testing.T) {
			p, askers := s.build(t)
			i := 0
			allocations := testing.AllocsPerRun(len(askers), func() {
				a := &askers[i%len(askers)]
				kept = p.Decide(a.caller, s.op, a.profile, s.scopes)
				i++
			})
			if allocations != 0 {
				t.Errorf("%v allocations per decision", allocations)
			}
		})
	}
}
