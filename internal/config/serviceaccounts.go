package config

import (
	"fmt"
	"net/url"
	"slices"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
	"github.com/tokenbroker/tokenbroker/internal/serviceaccount"
)

// legacyIssuer is that of tokens that never end.
const legacyIssuer = "kubernetes/serviceaccount"

// everyPods are the audiences that the tokens have which every pod gets unasked.
var everyPods = []string{"https://kubernetes.default.svc", "https://kubernetes.default.svc.cluster.local"}

// serviceAccounts returns the clusters in which no problem was found.
func (l *load) serviceAccounts(messages []*configv1.ServiceAccounts) []serviceaccount.Cluster {
	const at = "server.service_accounts"
	var clusters []serviceaccount.Cluster
	names, issuers := map[string]int{}, map[string]int{}
	for i, m := range messages {
		path := item(at, i)
		l.checkTaken(child(path, "cluster"), m.GetCluster(), "name", i, names)
		l.checkTaken(child(path, "issuer"), m.GetIssuer(), "issuer", i, issuers)
		l.checkIssuer(path, m)
		c := serviceaccount.Cluster{
			Name:        m.GetCluster(),
			Issuer:      m.GetIssuer(),
			Audience:    m.GetAudience(),
			Algorithms:  m.GetAlgorithms(),
			MaxLifetime: m.GetMaxLifetime().AsDuration(),
			Keys:        l.keys(child(path, "jwks_file"), m.GetJwksFile()),
			Source:      l.keySource(path, m),
		}
		if c.MaxLifetime == 0 {
			c.MaxLifetime = serviceaccount.DefaultMaxLifetime
		}
		if len(c.Algorithms) == 0 {
			c.Algorithms = serviceaccount.DefaultAlgorithms()
		}
		if !l.tainted[path] {
			clusters = append(clusters, c)
		}
	}
	return clusters
}

// checkTaken notes what an earlier cluster has, too.
func (l *load) checkTaken(path, value, what string, i int, first map[string]int) {
	if value == "" || l.tainted[path] {
		return
	}
	if j, taken := first[value]; taken {
		l.problem(path, fmt.Sprintf("service_accounts[%d] has the same %s: each cluster must have its own", j, what))
		return
	}
	first[value] = i
}

func (l *load) checkIssuer(path string, m *configv1.ServiceAccounts) {
	if at := child(path, "issuer"); m.GetIssuer() == legacyIssuer && !l.tainted[at] {
		l.problem(at, "is that of tokens without an end, which are not accepted: write the issuer that is in projected tokens, which kubectl get --raw /.well-known/openid-configuration shows")
	}
	if at := child(path, "audience"); !l.tainted[at] && (m.GetAudience() == m.GetIssuer() || slices.Contains(everyPods, m.GetAudience())) && m.GetAudience() != "" {
		l.warning(at, "is the API server's own, for which every pod has a token, and which the broker's callers would have to show to it: choose one that only the broker has, for example token-broker")
	}
}

// keys returns those in a file, or nil when there are problems, or no file.
func (l *load) keys(at, name string) *serviceaccount.Keys {
	if l.tainted[at] || name == "" {
		return nil
	}
	data, err := l.files.read(l.absolute(name), maxKeySet)
	if err != nil {
		l.problem(at, fmt.Sprintf("reading the keys from %s: %v", l.shown(name), err))
		return nil
	}
	keys, err := serviceaccount.ParseKeys(data)
	if err != nil {
		l.problem(at, fmt.Sprintf("%s: %v", l.shown(name), err))
		return nil
	}
	return keys
}

// maxKeySet is the size of the largest key set, from a file as from a URL.
const maxKeySet = 1 << 20

// keySource returns nil where there is no URL.
func (l *load) keySource(path string, m *configv1.ServiceAccounts) *serviceaccount.Source {
	if m.GetJwksUrl() == "" {
		return nil
	}
	l.checkKeysURL(child(path, "jwks_url"), m.GetJwksUrl())
	s := &serviceaccount.Source{URL: m.GetJwksUrl(), Token: l.secrets[m.GetJwksToken()]}
	if m.GetCa() != "" {
		s.CA = poolOf(l.authorities(child(path, "ca"), m.GetCa()))
	}
	if at := child(path, "jwks_token"); !l.tainted[at] && !isHeaderText(s.Token.Reveal()) {
		l.problem(l.nearer(at, "file.env.value"), "the token has blanks or letters that no header can carry")
	}
	return s
}

// isHeaderText reports whether a token can be sent (RFC 6750 section 2.1).
func isHeaderText(token string) bool {
	return !slices.ContainsFunc([]byte(token), func(c byte) bool { return c <= ' ' || c > '~' })
}

// checkKeysURL demands what nobody on the way can change.
func (l *load) checkKeysURL(at, raw string) {
	if l.tainted[at] {
		return
	}
	u, err := url.Parse(raw)
	switch {
	case err != nil || u.Hostname() == "" || u.Scheme != "https" && u.Scheme != "http":
		l.problem(at, "must be https:// and a host, for example https://kubernetes.default.svc/openid/v1/jwks")
	case u.User != nil:
		l.problem(at, "holds a user name: remove it, and use jwks_token")
	case u.Fragment != "":
		l.problem(at, "has a fragment (#...): remove it")
	case u.Scheme == "http" && !oauth.IsLoopback(u.Hostname()):
		l.problem(at, "whoever is on the way could put in keys of their own: use https://")
	}
}
