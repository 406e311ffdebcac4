package service

import (
	"fmt"
	"strings"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// Rule allows some callers some operations on some profiles.
type Rule struct {
	// Callers: "spiffe://…", "dns:…" or "anonymous"; "*" stands for
	// anything within one segment of a path, or one label of a DNS name.
	Callers []string
	// Profiles by name; "*" stands for any number of characters.
	Profiles []string
	// Allow: issue, refresh, watch, revoke, admin.
	Allow []string
}

// Policy decides what callers may do. It is immutable. The zero value allows
// nothing to authenticated callers, and everything to an anonymous one, who
// exists only on this machine.
type Policy struct{ rules []rule }

type rule struct {
	callers  []string
	profiles []string
	allow    operations
}

// operations is a set of pb.Operation.
type operations uint

const everything = operations(1<<pb.Operation_OPERATION_ISSUE | 1<<pb.Operation_OPERATION_REFRESH |
	1<<pb.Operation_OPERATION_WATCH | 1<<pb.Operation_OPERATION_REVOKE | 1<<pb.Operation_OPERATION_ADMIN)

func (o operations) has(op pb.Operation) bool { return o&(1<<op) != 0 }

func (o operations) list() []pb.Operation {
	var ops []pb.Operation
	for op := pb.Operation_OPERATION_ISSUE; op <= pb.Operation_OPERATION_ADMIN; op++ {
		if o.has(op) {
			ops = append(ops, op)
		}
	}
	return ops
}

// NewPolicy compiles rules.
func NewPolicy(rules []Rule) (*Policy, error) {
	p := &Policy{}
	for i, r := range rules {
		compiled := rule{profiles: r.Profiles}
		for _, pattern := range r.Callers {
			if strings.HasPrefix(pattern, "dns:") { // DNS names have no case
				pattern = strings.ToLower(pattern)
			}
			compiled.callers = append(compiled.callers, pattern)
		}
		for _, name := range r.Allow {
			op, ok := pb.Operation_value["OPERATION_"+strings.ToUpper(name)]
			if !ok || op == 0 {
				return nil, fmt.Errorf("policy rule %d: there is no operation %q; use issue, refresh, watch, revoke or admin", i, name)
			}
			compiled.allow |= 1 << op
		}
		p.rules = append(p.rules, compiled)
	}
	return p, nil
}

// rulesFor returns the rules that speak of the caller.
func (p *Policy) rulesFor(c *caller) []rule {
	if len(p.rules) == 0 && c.name == Anonymous {
		return []rule{{profiles: []string{"*"}, allow: everything}}
	}
	var found []rule
	for _, r := range p.rules {
		for _, pattern := range r.callers {
			if matchCaller(pattern, c.name) {
				found = append(found, r)
				break
			}
		}
	}
	return found
}

// allowed returns what the caller may do with the profile.
func (p *Policy) allowed(c *caller, profile string) operations {
	var allowed operations
	for _, r := range c.rulesUnder(p) {
		for _, pattern := range r.profiles {
			if match(pattern, profile, 0) {
				allowed |= r.allow
				break
			}
		}
	}
	return allowed
}

// matchCaller holds "*" to one segment: of a path for a URI, of a name for DNS.
func matchCaller(pattern, name string) bool {
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
