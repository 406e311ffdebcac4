package config

import (
	"strings"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
	"github.com/tokenbroker/tokenbroker/internal/access"
)

// forwarders are the proxies that may speak for others; nil if there is none, or
// when there are problems.
func (l *load) forwarders(message *configv1.Server) *access.Forwarders {
	const at = "server.forwarders"
	var rules []access.Forwarder
	for i, f := range message.GetForwarders() {
		here := item(at, i)
		l.checkEach(child(here, "peers"), f.GetPeers(), access.CheckPeer)
		l.checkEach(child(here, "callers"), f.GetCallers(), access.CheckForwarded)
		l.checkReachable(child(here, "peers"), message, f.GetPeers())
		rules = append(rules, access.Forwarder{Peers: f.GetPeers(), Header: f.GetHeader(), Callers: f.GetCallers()})
	}
	if len(rules) == 0 || l.tainted[at] {
		return nil
	}
	forwarders, err := access.NewForwarders(rules)
	if err != nil { // all that it says has been looked for
		l.problem(at, err.Error())
	}
	return forwarders
}

func (l *load) checkEach(at string, patterns []string, check func(string) error) {
	for i, pattern := range patterns {
		if l.tainted[item(at, i)] {
			continue
		}
		if err := check(pattern); err != nil {
			l.problem(item(at, i), err.Error())
		}
	}
}

// checkReachable warns of proxies that cannot prove who they are to this
// address: by a certificate without TLS, or as a user but over a socket.
func (l *load) checkReachable(at string, message *configv1.Server, peers []string) {
	for i, peer := range peers {
		user := strings.HasPrefix(peer, "unix:")
		switch {
		case l.tainted[item(at, i)]:
		case user && (message.GetTls() != nil || !strings.HasPrefix(message.GetAddress(), "unix:")):
			l.warning(item(at, i), "nobody can prove to be this user here: that takes a server.address on a unix socket, without tls")
		case !user && message.GetTls() == nil:
			l.warning(item(at, i), "nobody can prove to have this name here: that takes a client certificate, and so server.tls")
		}
	}
}
