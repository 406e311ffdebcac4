package config

import (
	"cmp"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

const (
	defaultServerAddress = "127.0.0.1:7443"
	defaultAdminAddress  = "127.0.0.1:7444"

	// leastBearerToken is the length of the shortest that is accepted.
	leastBearerToken = 16

	// maxSocketPath is what Linux has room for.
	maxSocketPath = 107
)

func (l *load) server(message *configv1.Server) Server {
	s := Server{
		Network: "tcp", Address: cmp.Or(message.GetAddress(), defaultServerAddress), Reflection: message.GetReflection(),
		Forwarders: l.forwarders(message), Limits: limits(message.GetLimits()),
	}
	if message.GetTls() != nil {
		l.serverTLS(&s, message.GetTls())
	}
	if s.TLS != nil && len(message.GetServiceAccounts()) > 0 {
		s.TLS.ClientAuth = tls.VerifyClientCertIfGiven // a token can do, which comes later
	}
	s.ServiceAccounts = l.serviceAccounts(message.GetServiceAccounts())
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

// admin may be any address: on one that others can reach the console serves only
// who proves to be an operator, and the rest has no secret.
func (l *load) admin(message *configv1.Admin) Admin {
	a := Admin{
		Address:     cmp.Or(message.GetAddress(), defaultAdminAddress),
		BearerToken: l.secrets[message.GetBearerToken()],
		URL:         strings.TrimSuffix(message.GetUrl(), "/"),
	}
	if message.GetTls() != nil {
		l.adminTLS(&a, message.GetTls())
	}
	if !l.tainted["admin.address"] {
		l.checkPort("admin.address", a.Address)
	}
	if message.GetBearerToken() != nil && !l.tainted["admin.bearer_token"] {
		l.checkBearerToken(a.BearerToken.Reveal())
	}
	if a.URL != "" && !l.tainted["admin.url"] {
		l.checkAdminURL(a.URL)
	}
	if !isLoopback(a.Address) {
		l.warnOfConsole(message)
	}
	return a
}

// checkBearerToken refuses what can be guessed, and what no header can carry
// (RFC 6750 section 2.1).
func (l *load) checkBearerToken(token string) {
	at := l.nearer("admin.bearer_token", "file.env.value")
	switch {
	case strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' }):
		l.problem(at, "the token has blanks or letters that no header can carry: make one of printable ASCII, for example with openssl rand -hex 32")
	case len(token) < leastBearerToken:
		l.problem(at, fmt.Sprintf("the token has fewer than %d characters and could be guessed: make a random one, for example with openssl rand -hex 32", leastBearerToken))
	}
}

func (l *load) checkAdminURL(raw string) {
	const at = "admin.url"
	switch u, err := url.Parse(raw); {
	case err != nil || u.Hostname() == "":
		l.problem(at, "must be http:// or https:// and a host, for example https://broker.example.com")
	case u.Scheme == "http" && !oauth.IsLoopback(u.Hostname()):
		l.warning(at, "what operators send and see travels in clear: use https://")
	}
}

// warnOfConsole is for an address that others than this machine can reach.
func (l *load) warnOfConsole(message *configv1.Admin) {
	token, authorities := message.GetBearerToken() != nil, message.GetTls().GetClientCa() != ""
	switch {
	case !token && !authorities:
		l.warning("admin.address", "the console is off, because nobody can prove to be an operator; health, metrics and /oauth/callback are served: "+
			"for the console add tls with client_ca, or bearer_token")
	case token && message.GetTls() == nil:
		l.warning("admin.bearer_token", "travels in clear, unless something in front of this address adds TLS: add tls")
	}
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
	return oauth.IsLoopback(host)
}

func logging(message *configv1.Log) Log {
	levels := map[string]slog.Level{"debug": slog.LevelDebug, "": slog.LevelInfo, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}
	return Log{Level: levels[message.GetLevel()], Format: cmp.Or(message.GetFormat(), "json")}
}

func (l *load) policy(message *configv1.Config) []access.Rule {
	var rules []access.Rule
	names := namesOf(message.GetProfiles())
	scopes := map[string][]string{}
	for _, profile := range message.GetProfiles() {
		scopes[profile.GetName()] = profile.GetScopes()
	}
	var clusters []string
	for _, accounts := range message.GetServer().GetServiceAccounts() {
		clusters = append(clusters, accounts.GetCluster())
	}
	slices.Sort(clusters)
	for i, rule := range message.GetPolicy() {
		at := item("policy", i)
		l.checkCallers(child(at, "callers"), rule.GetCallers(), clusters)
		l.checkNamed(child(at, "profiles"), rule.GetProfiles(), names)
		l.checkScopes(child(at, "scopes"), rule, scopes)
		rules = append(rules, access.Rule{
			Callers: rule.GetCallers(), Profiles: rule.GetProfiles(), Allow: rule.GetAllow(), Scopes: rule.GetScopes(),
		})
	}
	l.warnOfSilence(message)
	return rules
}

// checkCallers notes patterns that no caller's name can match, and warns of those
// of clusters whose tokens are not accepted.
func (l *load) checkCallers(at string, callers, clusters []string) {
	for i, caller := range callers {
		if l.tainted[item(at, i)] {
			continue
		}
		if err := access.CheckPattern(caller); err != nil {
			l.problem(item(at, i), err.Error())
			continue
		}
		account, ok := strings.CutPrefix(caller, "k8s://")
		if cluster, _, _ := strings.Cut(account, "/"); ok && !matchesAny(cluster, clusters) {
			message := "nobody can prove to have this name: server.service_accounts has no cluster " + cluster
			if like := closest(cluster, clusters); like != "" {
				message += "; did you mean " + like + "?"
			}
			l.warning(item(at, i), message)
		}
	}
}

// checkScopes warns of scopes by which a rule allows nothing, or nothing else.
func (l *load) checkScopes(at string, rule *configv1.PolicyRule, scopesOf map[string][]string) {
	switch {
	case len(rule.GetScopes()) == 0 || l.tainted[parent(at)]:
	case !slices.ContainsFunc(rule.GetAllow(), func(operation string) bool { return operation != access.Admin.String() }):
		l.warning(at, "admin has nothing to do with scopes, so they change nothing: remove them")
	case !slices.ContainsFunc(rule.GetProfiles(), func(pattern string) bool { return reaches(rule.GetScopes(), pattern, scopesOf) }):
		l.warning(at, "no profile that the rule names has a scope like these, so it allows no tokens: correct them, or give the profiles' scopes")
	}
}

// reaches reports whether a profile that a pattern names has one of the scopes.
func reaches(scopes []string, pattern string, scopesOf map[string][]string) bool {
	if !strings.Contains(pattern, "*") {
		return access.AnyScope(scopes, scopesOf[pattern])
	}
	for name, has := range scopesOf {
		if matchesAny(pattern, []string{name}) && access.AnyScope(scopes, has) {
			return true
		}
	}
	return false
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
	server, rules := message.GetServer(), message.GetPolicy()
	anonymous := server.GetTls() == nil && !strings.HasPrefix(server.GetAddress(), "unix:")
	switch {
	case !anonymous && len(rules) == 0:
		l.warning("policy", "there is no rule, so nobody may do anything: add one that says which callers may use which profiles")
	case anonymous && len(server.GetServiceAccounts()) == 0 && len(rules) > 0 && !namesAnonymous(rules):
		l.warning("policy", "callers are anonymous without tls, and no rule names them, so nobody may do anything: add tls, or a rule for anonymous")
	}
}

func namesAnonymous(rules []*configv1.PolicyRule) bool {
	return slices.ContainsFunc(rules, func(rule *configv1.PolicyRule) bool {
		return slices.Contains(rule.GetCallers(), access.Anonymous)
	})
}
