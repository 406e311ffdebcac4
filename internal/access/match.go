package access

import "strings"

// Match reports whether a pattern means the caller, or the group of callers, with
// that name. "*" stands for any number of characters, none at all among them,
// within one segment: of a path for a URI, of a name for DNS. The case of a DNS
// pattern does not matter. User 0 and group 0 are meant only by those who say so.
//
// Nobody's name (see [CheckName]) matches nothing, and kinds of callers never
// match one another: a pattern says the whole of how the names begin.
func Match(pattern, name string) bool {
	return CheckName(name) == nil && matchName(fold(pattern), name)
}

// fold is the spelling of a pattern that matchName wants: DNS has no case.
func fold(pattern string) string {
	if strings.HasPrefix(pattern, "dns:") {
		return lowerCase(pattern)
	}
	return pattern
}

// matchName is Match for a folded pattern and the name of somebody.
func matchName(pattern, name string) bool {
	if !strings.Contains(pattern, "*") {
		return pattern == name
	}
	k := kindOf(pattern)
	return k != nil && strings.HasPrefix(name, k.prefix) && !isRoot(name) && match(pattern, name, k.separator)
}

// isRoot reports whether the name is that of the user, or the group, who may do
// everything on a machine.
func isRoot(name string) bool { return name == "unix:uid:0" || name == "unix:gid:0" }

// matchText is for names of profiles, and for scopes.
func matchText(pattern, s string) bool { return match(pattern, s, 0) }

// AnyScope reports whether one of the patterns matches one of the scopes: without
// that a rule with these patterns allows no request for such scopes.
func AnyScope(patterns, scopes []string) bool {
	for _, scope := range scopes {
		if anyMatches(patterns, scope) {
			return true
		}
	}
	return false
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
