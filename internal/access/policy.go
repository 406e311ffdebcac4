package access

import (
	"fmt"
	"math/bits"
	"slices"
	"sync/atomic"
)

// Rule allows some callers some operations on some profiles. The first rule, in
// the order of the file, that allows a caller all that it asks for decides: rules
// do not add up, so that one of them can always be named.
type Rule struct {
	// Callers: "spiffe://…", "k8s://…", "dns:…", "unix:uid:…", "unix:gid:…" or
	// "anonymous"; "*" stands for anything within one segment of a path, or one
	// label of a DNS name, and never for user 0 or group 0. See [Match]. A
	// pattern that says less than the whole of how names begin, such as "*",
	// means nobody.
	Callers []string
	// Profiles by name; "*" stands for any number of characters.
	Profiles []string
	// Allow: issue, refresh, watch, revoke, admin.
	Allow []string
	// Scopes that may be asked for; "*" stands for any number of characters.
	// None means any scope. The rule allows a request if each scope of it is
	// matched. A request that names no scopes asks for all of the profile's
	// own; if the profile has none either, nobody knows what the server would
	// grant, and a rule with scopes does not allow it. Admin knows no scopes.
	Scopes []string
}

// Policy decides what callers may do. It is immutable. The zero value allows
// nothing to authenticated callers, and everything to an anonymous one, who
// exists only on this machine.
//
// Each thing that a rule speaks of (callers, profiles, operations, scopes) has an
// [index] from names to sets of rules; a decision is the first rule that is in
// all of the sets. The set of a caller is worked out once per caller.
type Policy struct {
	rules []Rule
	allow []set // of each rule
	words int   // of a set of rules

	callers, profiles, scopes *index
	allowing                  [len(operations)][]uint64
	unlimited                 []uint64 // the rules without scopes

	// also must allow what is to be allowed; nil asks nobody else.
	also *Policy
}

// set is a set of operations.
type set uint

func (s set) has(op Operation) bool { return s&(1<<op) != 0 }

// list names the operations of the set.
func (s set) list() (names []string) {
	for _, op := range Operations() {
		if s.has(op) {
			names = append(names, op.String())
		}
	}
	return names
}

// NewPolicy compiles rules, which must not be changed any more.
func NewPolicy(rules []Rule) (*Policy, error) {
	words := (len(rules) + 63) / 64
	p := &Policy{
		rules: rules, allow: make([]set, len(rules)), words: words, unlimited: make([]uint64, words),
		callers: newIndex(words, matchName), profiles: newIndex(words, matchText), scopes: newIndex(words, matchText),
	}
	for _, op := range Operations() {
		p.allowing[op] = make([]uint64, words)
	}
	for i, r := range rules {
		for _, name := range r.Allow {
			op := slices.Index(operations[:], name)
			if op <= 0 {
				return nil, fmt.Errorf("policy rule %d: there is no operation %q; use issue, refresh, watch, revoke or admin", i, name)
			}
			p.allow[i] |= 1 << op
			setBit(p.allowing[op], i)
		}
		for _, pattern := range r.Callers {
			p.callers.add(fold(pattern), i)
		}
		for _, pattern := range r.Profiles {
			p.profiles.add(pattern, i)
		}
		for _, pattern := range r.Scopes {
			p.scopes.add(pattern, i)
		}
		if len(r.Scopes) == 0 {
			setBit(p.unlimited, i)
		}
	}
	for _, x := range []*index{p.callers, p.profiles, p.scopes} {
		x.build()
	}
	return p, nil
}

// And returns a policy that allows only what both allow, by a rule of p. It is for
// the moment in which one configuration replaces another, part by part: neither
// is a name that the old one believes judged by the rules of the new one alone,
// nor the other way round.
func (p *Policy) And(other *Policy) *Policy {
	both := *p
	both.also = other
	return &both
}

// Passing reports whether the policy is one that And has made. What it denies may
// be allowed in a moment.
func (p *Policy) Passing() bool { return p.also != nil }

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
// matter for Admin. The first rule that allows all of it decides. It allocates
// nothing, but for the first decision about a caller.
func (p *Policy) Decide(c *Caller, op Operation, profile string, scopes []string) Decision {
	if p.also != nil && !p.also.Decide(c, op, profile, scopes).Allowed {
		return Decision{Rule: NoRule}
	}
	g := c.under(p)
	switch {
	case op <= 0 || int(op) >= len(operations):
		return Decision{Rule: NoRule}
	case g.by != 0:
		return Decision{Allowed: true, Rule: g.by}
	case g.rules == nil:
		return Decision{Rule: NoRule}
	case g.few != nil:
		return p.decideAmongFew(g.few, op, profile, scopes)
	}
	if p.words <= fewWords {
		var room [2 * fewWords]uint64
		return p.decide(g, op, profile, scopes, room[:2*p.words])
	}
	return p.decideAmongMany(g, op, profile, scopes)
}

// decideAmongFew looks at one rule after the other, which is quicker while there
// are few patterns.
func (p *Policy) decideAmongFew(rules []int, op Operation, profile string, scopes []string) Decision {
	for _, i := range rules {
		r := &p.rules[i]
		if p.allow[i].has(op) && anyMatches(r.Profiles, profile) && (op == Admin || r.spans(scopes)) {
			return Decision{Allowed: true, Rule: i}
		}
	}
	return Decision{Rule: NoRule}
}

// spans reports whether the rule allows all of the scopes.
func (r *Rule) spans(scopes []string) bool {
	if len(r.Scopes) == 0 {
		return true
	}
	for _, scope := range scopes {
		if !anyMatches(r.Scopes, scope) {
			return false
		}
	}
	return len(scopes) > 0
}

func anyMatches(patterns []string, s string) bool {
	for _, pattern := range patterns {
		if matchText(pattern, s) {
			return true
		}
	}
	return false
}

// decideAmongMany has a larger stack.
func (p *Policy) decideAmongMany(g *grants, op Operation, profile string, scopes []string) Decision {
	if p.words <= manyWords {
		var room [2 * manyWords]uint64
		return p.decide(g, op, profile, scopes, room[:2*p.words])
	}
	return p.decide(g, op, profile, scopes, make([]uint64, 2*p.words))
}

// decide works in a room for two sets, which are empty.
func (p *Policy) decide(g *grants, op Operation, profile string, scopes []string, room []uint64) Decision {
	found := room[:p.words]
	p.covering(g, op, profile, found)
	if op != Admin && anyBut(found, p.unlimited) {
		p.limit(found, scopes, room[p.words:])
	}
	for i, word := range found {
		if word != 0 {
			return Decision{Allowed: true, Rule: i*64 + bits.TrailingZeros64(word)}
		}
	}
	return Decision{Rule: NoRule}
}

// Sets of fewWords are for 1,024 rules, those of manyWords for 10,240, which is
// more than a configuration may have.
const (
	fewWords  = 16
	manyWords = 160
)

// covering puts into found, which is empty, the rules that allow op on the
// profile, for some scopes at least.
func (p *Policy) covering(g *grants, op Operation, profile string, found []uint64) {
	p.profiles.find(profile, found)
	allowing := p.allowing[op]
	for i := range found {
		found[i] &= g.rules[i] & allowing[i]
	}
}

// limit leaves in found the rules that allow all of the scopes. It needs another
// set to work in.
func (p *Policy) limit(found []uint64, scopes []string, with []uint64) {
	if len(scopes) == 0 {
		for i := range found {
			found[i] &= p.unlimited[i]
		}
		return
	}
	for _, scope := range scopes {
		copy(with, p.unlimited)
		p.scopes.find(scope, with)
		for i := range found {
			found[i] &= with[i]
		}
	}
}

// anyBut reports whether there is a rule in found that the others have not.
func anyBut(found, others []uint64) bool {
	for i, word := range found {
		if word&^others[i] != 0 {
			return true
		}
	}
	return false
}

// numbers lists the rules of a set.
func numbers(found []uint64) (rules []int) {
	for i, word := range found {
		for ; word != 0; word &= word - 1 {
			rules = append(rules, i*64+bits.TrailingZeros64(word))
		}
	}
	return rules
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
	g := c.under(p)
	switch {
	case op <= 0 || int(op) >= len(operations):
		return nil
	case g.by != 0:
		return []Allowance{{Index: g.by}}
	case g.rules == nil:
		return nil
	}
	rules := make([]uint64, p.words)
	p.covering(g, op, profile, rules)
	var found []Allowance
	for _, i := range numbers(rules) {
		a := Allowance{Index: i}
		if op != Admin {
			a.Scopes = p.rules[i].Scopes
		}
		found = append(found, a)
	}
	return found
}

// grants are what a policy says of one caller.
type grants struct {
	policy *Policy
	// by decides whatever it is, if it is not zero: [ByDefault] and so on.
	by int
	// rules that name the caller; nil is none.
	rules []uint64
	// few are the same rules, if they have no more than fewPatterns.
	few []int
}

const fewPatterns = 8

// under returns what p grants the caller.
func (c *Caller) under(p *Policy) *grants {
	g := c.granted.Load()
	if g == nil || g.policy != p {
		g = p.grantsOf(c)
		c.granted.Store(g)
	}
	return g
}

func (p *Policy) grantsOf(c *Caller) *grants {
	g := &grants{policy: p}
	switch {
	case c.Proof == BearerToken:
		g.by = ByToken
	case c.Proof == LocalOperator:
		g.by = ByAddress
	case len(p.rules) == 0 && c.Name == Anonymous:
		g.by = ByDefault
	case len(p.rules) > 0:
		g.rules = make([]uint64, p.words)
		p.named(c.Name, g.rules)
		for _, group := range c.Groups {
			p.named(group, g.rules)
		}
		if !slices.ContainsFunc(g.rules, func(word uint64) bool { return word != 0 }) {
			g.rules = nil
		}
		g.few = p.ifFew(g.rules)
	}
	return g
}

// ifFew lists rules that can be looked at one after the other, or none.
func (p *Policy) ifFew(found []uint64) []int {
	count := 0
	for _, word := range found {
		count += bits.OnesCount64(word)
	}
	if count > fewPatterns {
		return nil
	}
	rules, patterns := numbers(found), 0
	for _, i := range rules {
		if patterns += len(p.rules[i].Profiles) + len(p.rules[i].Scopes); patterns > fewPatterns {
			return nil
		}
	}
	return rules
}

// named adds the rules that mean the name to found.
func (p *Policy) named(name string, found []uint64) {
	if CheckName(name) == nil {
		p.callers.find(name, found)
	}
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
