//go:build unix && !linux

package main

import (
	"net"
	"syscall"
)

// bind is net.Listen. A unix socket has at most socketMode from its first
// moment. The umask is the whole process's: what else makes files meanwhile
// makes them as narrow or narrower, and nothing does while it starts.
func bind(network, address string) (net.Listener, error) {
	if network == "unix" {
		defer syscall.Umask(syscall.Umask(0o777 &^ socketMode))
	}
	return net.Listen(network, address)
}
