package access

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
)

// Rule allows some callers some operations on some profiles.
type Rule struct {
	// Callers: "spiffe://…", "k8s://…", "dns:…", "unix:uid:…", "unix:gid:…" or
	// "anonymous"; "*" stands for anything within one segment of a path, or one
	// label of a DNS name.
	Callers []string
	// Profiles by name; "*" stands for any number of characters.
	Profiles []string
	// Allow: issue, refresh, watch, revoke, admin.
	Allow []string
	// Scopes that may be asked for; "*" stands for any number of characters.
	// None means any scope.
	Scopes []string
}

// Policy decides what callers may do. It is immutable. The zero value allows
// nothing to authenticated callers, and everything to an anonymous one, who
// exists only on this machine.
type Policy struct{ rules []rule }

type rule struct {
	index    int
	callers  []string
	profiles []string
	scopes   []string
	allow    set
}

// set is a set of operations.
type set uint

const everything = set(1<<Issue | 1<<Refresh | 1<<Watch | 1<<Revoke | 1<<Admin)

func (s set) has(op Operation) bool { return s&(1<<op) != 0 }

// NewPolicy compiles rules.
func NewPolicy(rules []Rule) (*Policy, error) {
	p := &Policy{}
	for i, r := range rules {
		compiled := rule{index: i, profiles: r.Profiles, scopes: r.Scopes}
		for _, pattern := range r.Callers {
			if strings.HasPrefix(pattern, "dns:") { // DNS names have no case
				pattern = strings.ToLower(pattern)
			}
			compiled.callers = append(compiled.callers, pattern)
		}
		for _, name := range r.Allow {
			op := slices.Index(operations[:], name)
			if op <= 0 {
				return nil, fmt.Errorf("policy rule %d: there is no operation %q; use issue, refresh, watch, revoke or admin", i, name)
			}
			compiled.allow |= 1 << op
		}
		p.rules = append(p.rules, compiled)
	}
	return p, nil
}

// What decides when no rule does.
const (
	// NoRule denies: nothing allows it.
	NoRule = -1
	// ByDefault allows an anonymous caller what it likes while the policy has
	// no rule at all.
	ByDefault = -2
	// ByToken allows whoever knows the console's bearer token what it likes.
	ByToken = -3
	// ByAddress allows whoever can use a console that only this machine can
	// reach what it likes.
	ByAddress = -4
)

// Decision is what a policy says of one request.
type Decision struct {
	// Allowed says whether it may be done.
	Allowed bool
	// Rule is the index of the rule that decides, from 0, or one of the
	// constants above.
	Rule int
}

// By names what decides, as the configuration would: "policy[0]".
func (d Decision) By() string {
	switch d.Rule {
	case NoRule:
		return ""
	case ByDefault:
		return "default"
	case ByToken:
		return "bearer_token"
	case ByAddress:
		return "local"
	}
	return ruleName(d.Rule)
}

// Decide says whether the caller may do op with the profile. Scopes are those
// that a token is asked for, never none if the profile has any; they do not
// matter for Admin. The first rule that allows all of it decides.
func (p *Policy) Decide(c *Caller, op Operation, profile string, scopes []string) Decision {
	for _, r := range c.under(p).rules {
		if r.allow.has(op) && r.covers(profile) && (op == Admin || r.spans(scopes)) {
			return Decision{Allowed: true, Rule: r.index}
		}
	}
	return Decision{Rule: NoRule}
}

// Allowance is a rule that allows something.
type Allowance struct {
	// Index of the rule, or one of the constants above.
	Index int
	// Scopes it limits tokens to; none is no limit.
	Scopes []string
}

// Allowing returns all rules that allow the caller op on the profile, for some
// scopes at least.
func (p *Policy) Allowing(c *Caller, op Operation, profile string) []Allowance {
	var found []Allowance
	for _, r := range c.under(p).rules {
		if r.allow.has(op) && r.covers(profile) {
			found = append(found, Allowance{Index: r.index, Scopes: r.scopes})
		}
	}
	return found
}

func (r *rule) covers(profile string) bool {
	for _, pattern := range r.profiles {
		if match(pattern, profile, 0) {
			return true
		}
	}
	return false
}

// spans reports whether the rule allows all of the scopes.
func (r *rule) spans(scopes []string) bool {
	if len(r.scopes) == 0 {
		return true
	}
	for _, scope := range scopes {
		if !slices.ContainsFunc(r.scopes, func(pattern string) bool { return match(pattern, scope, 0) }) {
			return false
		}
	}
	return len(scopes) > 0
}

// grants are the rules of a policy that speak of one caller.
type grants struct {
	policy *Policy
	rules  []rule
}

// under returns what p grants the caller.
func (c *Caller) under(p *Policy) *grants {
	g := c.granted.Load()
	if g == nil || g.policy != p {
		g = &grants{policy: p, rules: p.rulesFor(c)}
		c.granted.Store(g)
	}
	return g
}

var all = []string{"*"}

// rulesFor returns the rules that speak of the caller.
func (p *Policy) rulesFor(c *Caller) []rule {
	switch {
	case c.Proof == BearerToken:
		return []rule{{index: ByToken, profiles: all, allow: everything}}
	case c.Proof == LocalOperator:
		return []rule{{index: ByAddress, profiles: all, allow: everything}}
	case len(p.rules) == 0 && c.Name == Anonymous:
		return []rule{{index: ByDefault, profiles: all, allow: everything}}
	}
	var found []rule
	for _, r := range p.rules {
		if slices.ContainsFunc(r.callers, c.is) {
			found = append(found, r)
		}
	}
	return found
}

// is reports whether a pattern means the caller.
func (c *Caller) is(pattern string) bool {
	return Match(pattern, c.Name) || slices.ContainsFunc(c.Groups, func(group string) bool { return Match(pattern, group) })
}

// Match reports whether a pattern means the caller with that name. "*" is held
// to one segment: of a path for a URI, of a name for DNS.
func Match(pattern, name string) bool {
	separator := byte('/')
	if strings.HasPrefix(name, "dns:") {
		separator = '.'
	}
	return match(pattern, name, separator)
}

// match compares literally but for "*", which stands for any number of
// characters other than the separator (zero: any at all). It takes time in
// proportion to the product of both lengths at the most.
func match(pattern, s string, separator byte) bool {
	p, i := 0, 0
	star, mark := -1, 0
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, mark = p, i
			p++
		case p < len(pattern) && pattern[p] == s[i]:
			p, i = p+1, i+1
		case star >= 0 && (separator == 0 || s[mark] != separator):
			mark++
			p, i = star+1, mark
		default:
			return false
		}
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}

// Authorizer holds the policy in force. Make it with [NewAuthorizer].
type Authorizer struct {
	force atomic.Pointer[force]
}

// force is a policy in force, until changed is closed.
type force struct {
	policy  *Policy
	changed chan struct{}
}

// NewAuthorizer returns an Authorizer of the zero policy.
func NewAuthorizer() *Authorizer {
	a := &Authorizer{}
	a.force.Store(&force{policy: &Policy{}, changed: make(chan struct{})})
	return a
}

// Use puts a policy in force.
func (a *Authorizer) Use(p *Policy) {
	close(a.force.Swap(&force{policy: p, changed: make(chan struct{})}).changed)
}

// Decide decides by the policy in force; see [Policy.Decide].
func (a *Authorizer) Decide(c *Caller, op Operation, profile string, scopes []string) Decision {
	return a.force.Load().policy.Decide(c, op, profile, scopes)
}

// Current returns the policy in force, and a channel that is closed when it no
// longer is.
func (a *Authorizer) Current() (*Policy, <-chan struct{}) {
	f := a.force.Load()
	return f.policy, f.changed
}
