package access

import (
	"fmt"
	"strings"
)

// Explanation is a decision and how it comes about, for operators. Callers must
// not see it: it speaks of rules that are about others.
type Explanation struct {
	Decision
	// Naming are the rules that name the caller, Covering those of them that
	// have the profile, and Allowing those of these that allow the operation.
	// Nil if no rule decides; see [Decision].
	Naming, Covering, Allowing []int
	// Missing are the scopes that the nearest of Allowing lacks; nil if none
	// does.
	Missing []string
	// Why says all this in words, and what to change if it is denied.
	Why string
}

// Explain decides as [Policy.Decide] does, and says why. It is slow.
func (p *Policy) Explain(c *Caller, op Operation, profile string, scopes []string) Explanation {
	e := Explanation{Decision: p.Decide(c, op, profile, scopes)}
	switch e.Rule {
	case ByDefault:
		e.Why = "there is no rule, and then anonymous callers, who exist only on this machine, may do everything"
		return e
	case ByToken:
		e.Why = "whoever knows the bearer token may do everything"
		return e
	case ByAddress:
		e.Why = "whoever is on this machine may do everything, at an address that others cannot reach"
		return e
	}
	if op.String() == "" {
		e.Why = "there is no such operation"
		return e
	}
	if p.also != nil && !p.also.Decide(c, op, profile, scopes).Allowed {
		e.Why = "the configuration was being replaced, and the one before did not allow it"
		return e
	}
	p.trace(&e, c, op, profile)
	switch {
	case e.Allowed:
		e.Why = ruleName(e.Rule) + " allows it"
	case len(p.rules) == 0:
		e.Why = "there is no rule: add one with the caller, the profile and " + op.String()
	case len(e.Naming) == 0:
		e.Why = p.whyNobody(op, profile)
	case len(e.Covering) == 0:
		e.Why = say(e.Naming, "names the caller, but not the profile", "name the caller, but none of them the profile") +
			": add it to the profiles of a rule"
	case len(e.Allowing) == 0:
		e.Why = p.whyNotAllowed(e.Covering, op)
	case len(scopes) == 0:
		e.Why = say(e.Allowing, "limits the scopes", "limit the scopes") +
			"; the request names none, and neither does the profile, so nobody knows what would be granted: name scopes in the profile"
	default:
		e.Why = p.whyScopes(&e, scopes)
	}
	return e
}

// trace finds the rules that come close, or decide.
func (p *Policy) trace(e *Explanation, c *Caller, op Operation, profile string) {
	g := c.under(p)
	if g.rules == nil {
		return
	}
	e.Naming = numbers(g.rules)
	found := make([]uint64, p.words)
	p.profiles.find(profile, found)
	for i := range found {
		found[i] &= g.rules[i]
	}
	e.Covering = numbers(found)
	for i := range found {
		found[i] &= p.allowing[op][i]
	}
	e.Allowing = numbers(found)
}

// whyNobody is for a caller that no rule names.
func (p *Policy) whyNobody(op Operation, profile string) string {
	found := make([]uint64, p.words)
	p.profiles.find(profile, found)
	for i := range found {
		found[i] &= p.allowing[op][i]
	}
	if others := numbers(found); len(others) > 0 {
		return "no rule names the caller; " + say(others, "allows", "allow") + " " + op.String() + " on this profile to others: add the caller to the callers of one"
	}
	return "no rule names the caller, and none allows anybody " + op.String() + " on this profile: add a rule with the caller, the profile and " + op.String()
}

// whyNotAllowed is for rules that allow the caller something else.
func (p *Policy) whyNotAllowed(rules []int, op Operation) string {
	if len(rules) == 1 {
		return fmt.Sprintf("%s names the caller and the profile, but allows only %s: add %s to its allow", ruleName(rules[0]), strings.Join(p.allow[rules[0]].list(), ", "), op)
	}
	return listed(rules) + fmt.Sprintf(" name the caller and the profile, but none of them allows %s: add it to the allow of one", op)
}

// whyScopes is for rules that allow all but some of the scopes. The nearest rule
// lacks the fewest.
func (p *Policy) whyScopes(e *Explanation, scopes []string) string {
	nearest := -1
	for _, i := range e.Allowing {
		if missing := p.rules[i].missing(scopes); nearest < 0 || len(missing) < len(e.Missing) {
			nearest, e.Missing = i, missing
		}
	}
	why := ruleName(nearest) + " allows it, but not for all of the scopes"
	if len(e.Allowing) > 1 {
		why = listed(e.Allowing) + " allow it, but none of them for all of the scopes; " + ruleName(nearest) + " comes nearest"
	}
	return why + ": ask for fewer, or add " + some(e.Missing) + " to the scopes of " + ruleName(nearest)
}

// missing are the scopes that no pattern of the rule matches.
func (r *Rule) missing(scopes []string) (missing []string) {
	for _, scope := range scopes {
		if !anyMatches(r.Scopes, scope) {
			missing = append(missing, scope)
		}
	}
	return missing
}

// mostShown bounds what an explanation lists.
const mostShown = 5

// say names rules and what they do, in the right number.
func say(rules []int, one, several string) string {
	if len(rules) == 1 {
		return ruleName(rules[0]) + " " + one
	}
	return listed(rules) + " " + several
}

// list names the first of the rules.
func listed(rules []int) string {
	names := make([]string, len(rules))
	for i, rule := range rules {
		names[i] = ruleName(rule)
	}
	return some(names)
}

// some lists the first of the words.
func some(words []string) string {
	switch n := len(words); {
	case n > mostShown:
		return strings.Join(words[:mostShown], ", ") + fmt.Sprintf(" and %d more", n-mostShown)
	case n > 1:
		return strings.Join(words[:n-1], ", ") + " and " + words[n-1]
	}
	return strings.Join(words, "")
}
