package access_test

import (
	"strings"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/access"
)

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		pattern, name string
		want          bool
	}{
		{"spiffe://prod/ns/batch/sa/x", "spiffe://prod/ns/batch/sa/x", true},
		{"spiffe://prod/ns/*/sa/x", "spiffe://prod/ns/batch/sa/x", true},
		{"spiffe://prod/ns/*/sa/x", "spiffe://prod/ns/a/b/sa/x", false},
		{"spiffe://prod/ns/batch/*", "spiffe://prod/ns/batch/worker", true},
		{"spiffe://prod/ns/batch/*", "spiffe://prod/ns/batch/worker/1", false},
		{"spiffe://prod/ns/batch/*", "spiffe://prod/ns/batch", false},
		{"spiffe://prod/ns/batch-*/sa/x", "spiffe://prod/ns/batch-7/sa/x", true},
		{"spiffe://prod/ns/batch-*/sa/x", "spiffe://prod/ns/batch-/sa/x", true},
		{"spiffe://prod/ns/*-a-*/x", "spiffe://prod/ns/b-a-a-c/x", true},
		{"spiffe://*/x", "spiffe://prod/x", true},
		{"spiffe://*", "spiffe://prod", true},
		{"spiffe://*", "spiffe://prod/x", false},
		{"spiffe://prod*/x", "spiffe://prod.evil.com/x", true}, // whoever writes this has it so

		// One spelling for one name.
		{"spiffe://prod/x", "spiffe://PROD/x", false},
		{"spiffe://PROD/x", "spiffe://PROD/x", false},
		{"spiffe://PROD/x", "spiffe://prod/x", false},
		{"spiffe://*/x", "spiffe://PROD/x", false},
		{"spiffe://prod/x", "SPIFFE://prod/x", false},
		{"spiffe://prod/X", "spiffe://prod/x", false},
		{"spiffe://prod/*", "spiffe://prod/", false},
		{"spiffe://prod/*", "spiffe://prod/..", false},
		{"spiffe://prod/*", "spiffe://prod/.", false},
		{"spiffe://prod/*", "spiffe://prod/%2e%2e", false},
		{"spiffe://prod/*", "spiffe://prod/a%2Fb", false},
		{"spiffe://prod/a/*", "spiffe://prod/a//", false},
		{"spiffe://prod/*", "spiffe://prod/a?b", false},
		{"spiffe://prod/*", "spiffe://prod/a#b", false},
		{"spiffe://prod/*", "spiffe://prod/\u0430", false}, // Cyrillic
		{"spiffe://*/x", "spiffe://user@prod/x", false},
		{"spiffe://*/x", "spiffe://prod:443/x", false},
		{"spiffe://*/x", "spiffe:///x", false},
		{"spiffe://prod/*", "spiffe://prod/*", false},
		{"spiffe://prod/x", "spiffe://prod/x/", false},
		{"spiffe://prod/x", "spiffe://prod/x\x00", false},

		{"dns:*.example.com", "dns:worker.example.com", true},
		{"dns:*.Example.COM", "dns:worker.example.com", true},
		{"dns:Worker.example.com", "dns:worker.example.com", true},
		{"dns:*.example.com", "dns:a.b.example.com", false},
		{"dns:*.example.com", "dns:example.com", false},
		{"dns:*.example.com", "dns:.example.com", false},
		{"dns:*.example.com", "dns:worker.example.com.", false},
		{"dns:*.example.com", "dns:worker.example.com.evil.net", false},
		{"dns:*.example.com", "dns:evil/worker.example.com", false},
		{"dns:worker-*.example.com", "dns:worker-1.example.com", true},
		{"dns:\u212a", "dns:k", false}, // the sign for kelvin
		{"dns:*", "dns:\u212a", false},
		{"dns:*", "dns:localhost", true},
		{"dns:*", "dns:a.b", false},

		{"k8s://c/ns/*", "k8s://c/ns/app", true},
		{"k8s://*/*/*", "k8s://c/ns/app", true},
		{"k8s://c/*", "k8s://c/ns/app", false},
		{"k8s://c/ns/app", "k8s://c/ns/App", false},

		// Kinds never match one another.
		{"*", "anonymous", false},
		{"*", "dns:a", false},
		{"*", "unix:uid:7", false},
		{"dns:*", "spiffe://prod", false},
		{"spiffe://*/*", "dns:prod/x", false},
		{"spiffe://*/*/*", "k8s://c/ns/app", false},
		{"*://c/ns/app", "k8s://c/ns/app", false},
		{"dns*", "dns:a", false},
		{"unix:*", "unix:uid:7", false},
		{"unix:*:7", "unix:uid:7", false},
		{"unix:uid:*", "unix:gid:7", false},
		{"anonym*", "anonymous", false},
		{"", "", false},
		{"https://example.com", "https://example.com", false},

		{"anonymous", "anonymous", true},
		{"unix:uid:1000", "unix:uid:1000", true},
		{"unix:uid:*", "unix:uid:1000", true},
		{"unix:uid:10*", "unix:uid:1000", true},
		{"unix:gid:*", "unix:gid:20", true},
		{"unix:uid:*", "unix:uid:01000", false},
		{"unix:uid:*", "unix:uid:+1", false},
		{"unix:uid:*", "unix:uid:", false},

		// Never user 0, but by name.
		{"unix:uid:0", "unix:uid:0", true},
		{"unix:gid:0", "unix:gid:0", true},
		{"unix:uid:*", "unix:uid:0", false},
		{"unix:gid:*", "unix:gid:0", false},
		{"unix:uid:0*", "unix:uid:0", false},
		{"unix:uid:*0", "unix:uid:0", false},
		{"unix:uid:**", "unix:uid:0", false},
		{"unix:uid:*0", "unix:uid:10", true},
	} {
		if got := access.Match(c.pattern, c.name); got != c.want {
			t.Errorf("Match(%q, %q) is %v", c.pattern, c.name, got)
		}
		if got := allowed(t, c.pattern, c.name); got != c.want {
			t.Errorf("a rule for %q and the caller %q: %v", c.pattern, c.name, got)
		}
	}
}

// allowed asks a policy whether a pattern means a caller.
func allowed(t testing.TB, pattern, name string) bool {
	t.Helper()
	p, err := access.NewPolicy([]access.Rule{{Callers: []string{pattern}, Profiles: []string{"*"}, Allow: []string{"issue"}}})
	if err != nil {
		t.Fatal(err)
	}
	return p.Decide(&access.Caller{Name: name}, access.Issue, "p", nil).Allowed
}

func TestNamesThatNobodyHas(t *testing.T) {
	for name, want := range map[string]string{
		"anonymous":                            "",
		"spiffe://prod":                        "",
		"spiffe://prod/ns/Batch_1/sa/x.y":      "",
		"dns:worker.example.com":               "",
		"k8s://cluster-1/ns/app":               "",
		"unix:uid:0":                           "",
		"unix:gid:4294967294":                  "",
		"":                                     "begin with",
		"worker":                               "begin with",
		"https://example.com":                  "begin with",
		"spiffe://Prod/x":                      "lower case",
		"spiffe://":                            "trust domain",
		"spiffe://prod/":                       "none is empty",
		"spiffe://prod/../x":                   "none is empty",
		"spiffe://prod/*":                      "for patterns",
		"spiffe://prod/" + longText(2048):      "longer than 2048",
		"dns:Worker.example.com":               "lower case",
		"dns:a..b":                             "labels",
		"dns:" + longText(64):                  "labels",
		"k8s://c/ns":                           "CLUSTER/NAMESPACE/ACCOUNT",
		"k8s://c/ns/":                          "CLUSTER/NAMESPACE/ACCOUNT",
		"k8s://c/Ns/app":                       "lower case",
		"unix:uid:root":                        "numbers",
		"unix:uid:007":                         "zeros in front",
		"unix:uid:4294967295":                  "numbers", // (uid_t)-1 is nobody
		"unix:gid:-1":                          "numbers",
		"unix:uid:99999999999999999999999999*": "for patterns",
	} {
		err := access.CheckName(name)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("CheckName(%q): %v; want %q", name, err, want)
		}
	}
	for pattern, want := range map[string]string{
		"spiffe://prod/*": "", "dns:*.Example.com": "", "k8s://*/ns-*/*": "", "unix:uid:10*": "",
		"*": "begin with", "spiffe:*": "begin with", "unix:*": "begin with", "anonym*": "begin with",
		"spiffe://PROD/*": "lower case", "spiffe://prod/*/": "none is empty", "k8s://c/*": "CLUSTER", "unix:uid:a*": "numbers", "unix:uid:" + longText(9) + "*": "numbers",
	} {
		err := access.CheckPattern(pattern)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("CheckPattern(%q): %v; want %q", pattern, err, want)
		}
	}
}

func longText(n int) string { return strings.Repeat("a", n) }

func TestNamed(t *testing.T) {
	c, err := access.Named("dns:Worker.example.com")
	if err != nil || c.Name != "dns:worker.example.com" || c.Proof != access.DNSSAN {
		t.Errorf("got %+v, %v", c, err)
	}
	c, err = access.Named("unix:uid:7", "unix:gid:8", "unix:gid:9")
	if err != nil || len(c.Groups) != 2 || c.Proof != access.UnixPeer {
		t.Errorf("got %+v, %v", c, err)
	}
	for _, bad := range [][]string{
		{"unix:gid:7"}, {"unix:uid:7", "unix:uid:8"}, {"unix:uid:7", "unix:gid:x"}, {"unix:uid:7", "unix:gid:*"}, {"dns:a", "unix:gid:7"}, {"*"},
	} {
		if c, err := access.Named(bad[0], bad[1:]...); err == nil {
			t.Errorf("%q: got %+v", bad, c)
		}
	}
}

// FuzzMatch compares the matcher, alone and within a policy, with an oracle that
// is slow and obvious.
func FuzzMatch(f *testing.F) {
	for _, s := range [][2]string{
		{"spiffe://prod/ns/*/sa/x", "spiffe://prod/ns/batch/sa/x"},
		{"spiffe://prod/*a*b*/c", "spiffe://prod/xxabab/c"},
		{"spiffe://prod/*ab/*", "spiffe://prod/aab/ab"},
		{"spiffe://*/*", "spiffe://prod/../x"},
		{"dns:*.*.example.com", "dns:a.b.example.com"},
		{"dns:*A*.COM", "dns:banana.com"},
		{"k8s://c/*/app*", "k8s://c/ns/app"},
		{"unix:uid:*", "unix:uid:0"},
		{"unix:uid:*0*", "unix:uid:10"},
		{"unix:gid:0", "unix:gid:0"},
		{"*", "anonymous"},
		{"anonymous", "anonymous"},
		{"spiffe://*", "dns:*"},
		{"dns:**", "dns:a"},
		{"spiffe://prod/***/x", "spiffe://prod//x"},
	} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, pattern, name string) {
		want := obvious(pattern, name)
		if got := access.Match(pattern, name); got != want {
			t.Errorf("Match(%q, %q) is %v", pattern, name, got)
		}
		if got := allowed(t, pattern, name); got != want {
			t.Errorf("a rule for %q and the caller %q: %v", pattern, name, got)
		}
		if want && pattern != access.Anonymous && access.CheckPattern(pattern) != nil {
			t.Errorf("%q matches %q and is no pattern for callers: %v", pattern, name, access.CheckPattern(pattern))
		}
	})
}

// obvious takes names apart: the kinds must be the same, the segments as many,
// and each must match its pattern.
func obvious(pattern, name string) bool {
	if access.CheckName(name) != nil {
		return false
	}
	if name == "anonymous" || name == "unix:uid:0" || name == "unix:gid:0" {
		return pattern == name
	}
	for kind, separator := range map[string]string{"spiffe://": "/", "k8s://": "/", "dns:": ".", "unix:uid:": "/", "unix:gid:": "/"} {
		wanted, ok := strings.CutPrefix(pattern, kind)
		given, same := strings.CutPrefix(name, kind)
		if !ok || !same {
			continue
		}
		if kind == "dns:" {
			for c := 'A'; c <= 'Z'; c++ {
				wanted = strings.ReplaceAll(wanted, string(c), string(c+'a'-'A'))
			}
		}
		patterns, segments := strings.Split(wanted, separator), strings.Split(given, separator)
		if len(patterns) != len(segments) {
			return false
		}
		for i := range patterns {
			if !segment(patterns[i], segments[i]) {
				return false
			}
		}
		return true
	}
	return false
}

// segment tries all that "*" can stand for; known are the pairs that were tried.
func segment(pattern, s string) bool {
	known := map[[2]int]bool{}
	var try func(p, i int) bool
	try = func(p, i int) bool {
		switch {
		case p == len(pattern):
			return i == len(s)
		case pattern[p] != '*':
			return i < len(s) && pattern[p] == s[i] && try(p+1, i+1)
		case known[[2]int{p, i}]:
			return false
		}
		known[[2]int{p, i}] = true
		for j := i; j <= len(s); j++ {
			if try(p+1, j) {
				return true
			}
		}
		return false
	}
	return try(0, 0)
}
