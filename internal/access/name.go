package access

import (
	"errors"
	"slices"
	"strconv"
	"strings"
)

// A name has one spelling. What is spelled otherwise (another case, an empty or
// a dotted segment, an escape) is nobody's name, so that no two names look alike
// and differ, and none differs and is taken for the other.

// longestName is SPIFFE's bound (SPIFFE-ID section 2.3), and ours for all.
const longestName = 2048

// kind is one kind of callers.
type kind struct {
	// prefix is how the names begin, in patterns too.
	prefix string
	// separator is what "*" does not stand for.
	separator byte
	// wrong says what is wrong with the rest of a name, in which there may be
	// "*", or nothing.
	wrong func(rest string) string
}

var kinds = []kind{
	{"spiffe://", '/', wrongSPIFFE},
	{"k8s://", '/', wrongServiceAccount},
	{"dns:", '.', wrongDNS},
	{"unix:uid:", '/', wrongNumber},
	{"unix:gid:", '/', wrongNumber},
}

var errNoKind = errors.New("no caller has such a name: begin with spiffe://, dns:, k8s://, unix:uid: or unix:gid:, or write anonymous")

// kindOf returns the kind of a name or a pattern, nil if it has none.
func kindOf(s string) *kind {
	for i := range kinds {
		if strings.HasPrefix(s, kinds[i].prefix) {
			return &kinds[i]
		}
	}
	return nil
}

// CheckPattern says why no caller's name can match a pattern; nil if one can. The
// error repeats nothing of the pattern.
func CheckPattern(pattern string) error {
	if pattern == Anonymous {
		return nil
	}
	k := kindOf(pattern)
	if k == nil {
		return errNoKind
	}
	if len(pattern) > longestName {
		return errors.New("no caller has such a name: it is longer than " + strconv.Itoa(longestName) + " characters")
	}
	rest := pattern[len(k.prefix):]
	if k.separator == '.' {
		rest = lowerCase(rest)
	}
	if why := k.wrong(rest); why != "" {
		return errors.New("no caller has such a name: " + why)
	}
	return nil
}

// CheckName says why no caller can have a name; nil if one can. The error repeats
// nothing of the name.
func CheckName(name string) error {
	switch {
	case strings.Contains(name, "*"):
		return errors.New(`no caller has such a name: "*" is for patterns`)
	case strings.HasPrefix(name, "dns:") && lowerCase(name) != name:
		return errors.New("no caller has such a name: names of DNS are lower case here")
	}
	return CheckPattern(name)
}

// Named returns the caller of that name and groups as it would be if it had
// proven to be it, to ask a policy about it. It returns an error if no caller can
// have that name: [CheckName] says which can. The case of a DNS name does not
// matter.
func Named(name string, groups ...string) (*Caller, error) {
	if strings.HasPrefix(name, "dns:") {
		name = lowerCase(name)
	}
	if err := CheckName(name); err != nil {
		return nil, err
	}
	c := &Caller{Name: name, Groups: groups}
	switch {
	case name == Anonymous:
		c.Proof = Loopback
	case strings.HasPrefix(name, "spiffe://"):
		c.Proof = URISAN
	case strings.HasPrefix(name, "dns:"):
		c.Proof = DNSSAN
	case strings.HasPrefix(name, "k8s://"):
		c.Proof = ServiceAccount
	case strings.HasPrefix(name, "unix:uid:"):
		c.Proof = UnixPeer
	default:
		return nil, errors.New("no caller has such a name: unix:gid: names a group of callers")
	}
	for _, group := range groups {
		if !strings.HasPrefix(group, "unix:gid:") || CheckName(group) != nil {
			return nil, errors.New("no caller is in such a group: a group is written unix:gid:N")
		}
		if c.Proof != UnixPeer {
			return nil, errors.New("only callers unix:uid:N have groups")
		}
	}
	return c, nil
}

const (
	lower  = "abcdefghijklmnopqrstuvwxyz"
	digits = "0123456789"
)

// lowerCase leaves all but A to Z alone: there are letters of other scripts whose
// lower case is one of ours.
func lowerCase(s string) string {
	return strings.Map(func(c rune) rune {
		if 'A' <= c && c <= 'Z' {
			return c + 'a' - 'A'
		}
		return c
	}, s)
}

// madeOf reports whether s has none but the characters, and "*".
func madeOf(s, characters string) bool {
	for i := range len(s) {
		if s[i] != '*' && strings.IndexByte(characters, s[i]) < 0 {
			return false
		}
	}
	return true
}

// wrongSPIFFE knows SPIFFE-ID sections 2.1 and 2.2.
func wrongSPIFFE(rest string) string {
	domain, path, found := strings.Cut(rest, "/")
	switch {
	case domain == "" || len(domain) > 255 || !madeOf(domain, lower+digits+".-_"):
		return `a SPIFFE trust domain is made of a to z (lower case), 0 to 9, ".", "-" and "_"`
	case !found:
		return ""
	}
	for segment := range strings.SplitSeq(path, "/") {
		if segment == "" || segment == "." || segment == ".." || !madeOf(segment, lower+strings.ToUpper(lower)+digits+".-_") {
			return `the segments of a SPIFFE ID's path are made of letters, 0 to 9, ".", "-" and "_"; none is empty, "." or ".."`
		}
	}
	return ""
}

func wrongServiceAccount(rest string) string {
	segments := strings.Split(rest, "/")
	if len(segments) != 3 || slices.ContainsFunc(segments, func(s string) bool {
		return s == "" || len(s) > 253 || !madeOf(s, lower+digits+".-")
	}) {
		return `a service account is k8s://CLUSTER/NAMESPACE/ACCOUNT, each made of a to z (lower case), 0 to 9, "." and "-"`
	}
	return ""
}

func wrongDNS(rest string) string {
	labels := strings.Split(rest, ".")
	if len(rest) > 253 || slices.ContainsFunc(labels, func(s string) bool {
		return s == "" || len(s) > 63 || !madeOf(s, lower+digits+"-_")
	}) {
		return `a DNS name has labels of letters, 0 to 9, "-" and "_", with one dot between them and none at the end`
	}
	return ""
}

func wrongNumber(rest string) string {
	const most = 1<<32 - 2
	if strings.Contains(rest, "*") && madeOf(rest, digits) && len(rest) <= 16 {
		return ""
	}
	if n, err := strconv.ParseUint(rest, 10, 32); err != nil || n > most || strconv.FormatUint(n, 10) != rest {
		return "users and groups are written as numbers, without zeros in front"
	}
	return ""
}
