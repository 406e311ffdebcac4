package main

import (
	"fmt"
	"net"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/config"
	"github.com/tokenbroker/tokenbroker/internal/console"
)

// ends tells when the certificates and the revocation lists in force end.
func (s *server) ends() console.Ends {
	all := console.Ends{Certificates: map[string]time.Time{}, Lists: map[console.RevocationList]time.Time{}}
	if c := s.config.Load(); c != nil {
		for _, certificate := range c.Certificates {
			all.Certificates[certificate.Name] = certificate.End
		}
		noteLists(all.Lists, "server", c.Server.Revocations)
		noteLists(all.Lists, "admin", c.Admin.Revocations)
	}
	if s.workload == nil {
		return all
	}
	certificate, domains := s.workload.Ends()
	if !certificate.IsZero() {
		all.Certificates["server"] = certificate
	}
	for domain, end := range domains {
		all.Certificates["trust_domain:"+domain] = end
	}
	return all
}

// noteLists adds the lists of a door. Of authorities with one name the one whose
// list is due first counts.
func noteLists(all map[console.RevocationList]time.Time, door string, r *access.Revocations) {
	for _, list := range r.Lists() {
		by := console.RevocationList{Door: door, Issuer: list.Issuer}
		if known, ok := all[by]; !list.NextUpdate.IsZero() && (!ok || list.NextUpdate.Before(known)) {
			all[by] = list.NextUpdate
		}
	}
}

// listenForCalls opens the gRPC door. Without TLS it must not be reachable from
// elsewhere, whatever the name of the address resolves to.
func listenForCalls(c config.Server) (net.Listener, error) {
	ln, err := listen(c.Network, c.Address)
	if err != nil {
		return nil, err
	}
	if c.TLS == nil && !onlyHere(ln.Addr()) {
		ln.Close()
		return nil, usageError{fmt.Errorf("server.address: %s is %s here, which others can reach: without tls it must be loopback or unix, so add tls, or write 127.0.0.1", c.Address, ln.Addr())}
	}
	return ln, nil
}

// onlyHere reports whether only this machine can connect to the address.
func onlyHere(a net.Addr) bool {
	tcp, ok := a.(*net.TCPAddr)
	return a.Network() == "unix" || ok && tcp.IP.IsLoopback()
}
