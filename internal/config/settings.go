package config

import (
	"cmp"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
)

const (
	defaultServerAddress = "127.0.0.1:7443"
	defaultAdminAddress  = "127.0.0.1:7444"

	// maxSocketPath is what Linux has room for.
	maxSocketPath = 107
)

func (l *load) server(message *configv1.Server) Server {
	s := Server{Network: "tcp", Address: cmp.Or(message.GetAddress(), defaultServerAddress), Reflection: message.GetReflection()}
	if message.GetTls() != nil {
		s.TLS = l.serverTLS(message.GetTls())
	}
	const at = "server.address"
	if l.tainted[at] {
		return s
	}
	if socket, ok := strings.CutPrefix(s.Address, "unix:"); ok {
		s.Network, s.Address = "unix", l.absolute(socket)
		if len(s.Address) > maxSocketPath {
			l.problem(at, fmt.Sprintf("the socket's path is longer than %d characters: choose a shorter one", maxSocketPath))
		}
		return s
	}
	l.checkPort(at, s.Address)
	if message.GetTls() == nil && !isLoopback(s.Address) && !l.tainted["server"] {
		l.problem(at, "without tls the address must be loopback (127.0.0.1, [::1], localhost) or unix: add tls, or change address")
	}
	return s
}

// admin may be any address: what is served there asks for no identity and holds
// no secret.
func (l *load) admin(message *configv1.Admin) Admin {
	a := Admin{Address: cmp.Or(message.GetAddress(), defaultAdminAddress)}
	if !l.tainted["admin.address"] {
		l.checkPort("admin.address", a.Address)
	}
	return a
}

func (l *load) checkPort(at, address string) {
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		l.problem(at, "must be host:port, for example 127.0.0.1:7443")
		return
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		l.problem(at, "the port must be at most 65535")
	}
}

func isLoopback(address string) bool {
	host, _, _ := net.SplitHostPort(address)
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

func logging(message *configv1.Log) Log {
	levels := map[string]slog.Level{"debug": slog.LevelDebug, "": slog.LevelInfo, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}
	return Log{Level: levels[message.GetLevel()], Format: cmp.Or(message.GetFormat(), "json")}
}

func (l *load) policy(message *configv1.Config) []Rule {
	var rules []Rule
	names := namesOf(message.GetProfiles())
	for i, rule := range message.GetPolicy() {
		at := item("policy", i)
		l.checkCallers(child(at, "callers"), rule.GetCallers())
		l.checkNamed(child(at, "profiles"), rule.GetProfiles(), names)
		rules = append(rules, Rule{Callers: rule.GetCallers(), Profiles: rule.GetProfiles(), Allow: rule.GetAllow()})
	}
	l.warnOfSilence(message)
	return rules
}

// checkCallers notes patterns that no caller's name can match.
func (l *load) checkCallers(at string, callers []string) {
	for i, caller := range callers {
		if !l.tainted[item(at, i)] && !isCaller(caller) {
			l.problem(item(at, i), "no caller has such a name: begin with spiffe:// or dns:, or write anonymous")
		}
	}
}

func isCaller(pattern string) bool {
	return pattern == "anonymous" || strings.HasPrefix(pattern, "dns:") || strings.HasPrefix(pattern, "spiffe://")
}

// checkNamed notes profiles that a rule names and that do not exist: a rule
// with a mistyped name would silently allow nothing.
func (l *load) checkNamed(at string, patterns, names []string) {
	for i, pattern := range patterns {
		if l.tainted[item(at, i)] || matchesAny(pattern, names) {
			continue
		}
		message := "no profile has this name: correct it, or remove it"
		if strings.Contains(pattern, "*") {
			message = "no profile has a name like this: correct it, or remove it"
		}
		if like := closest(pattern, names); like != "" {
			message += "; did you mean " + like + "?"
		}
		l.problem(item(at, i), message)
	}
}

// namesOf returns the profiles' names, sorted.
func namesOf(profiles []*configv1.Profile) []string {
	names := make([]string, 0, len(profiles))
	for _, profile := range profiles {
		names = append(names, profile.GetName())
	}
	slices.Sort(names)
	return names
}

// matchesAny looks for a name in names, which are sorted, or for one that a
// pattern matches.
func matchesAny(pattern string, names []string) bool {
	if !strings.Contains(pattern, "*") {
		_, found := slices.BinarySearch(names, pattern)
		return found
	}
	return slices.ContainsFunc(names, func(name string) bool {
		// Names have no slashes, for which path.Match would stop.
		ok, _ := path.Match(pattern, name)
		return ok
	})
}

// warnOfSilence warns when nobody can do anything.
func (l *load) warnOfSilence(message *configv1.Config) {
	switch {
	case message.GetServer().GetTls() != nil && len(message.GetPolicy()) == 0:
		l.warning("policy", "there is no rule, so nobody may do anything: add one that says which callers may use which profiles")
	case message.GetServer().GetTls() == nil && len(message.GetPolicy()) > 0 && !namesAnonymous(message.GetPolicy()):
		l.warning("policy", "callers are anonymous without tls, and no rule names them, so nobody may do anything: add tls, or a rule for anonymous")
	}
}

func namesAnonymous(rules []*configv1.PolicyRule) bool {
	return slices.ContainsFunc(rules, func(rule *configv1.PolicyRule) bool {
		return slices.Contains(rule.GetCallers(), "anonymous")
	})
}
