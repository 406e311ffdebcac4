package main

import (
	"context"
	"net"
	"syscall"
)

// bind is net.Listen. A unix socket has at most socketMode from its first
// moment, whatever the umask: Linux makes the file with the mode that the socket
// itself has, which fchmod(2) can set before there is a file. Whoever connected
// before a later chmod would stay connected.
func bind(network, address string) (net.Listener, error) {
	c := net.ListenConfig{Control: func(network, _ string, conn syscall.RawConn) error {
		if network != "unix" {
			return nil
		}
		var failed error
		if err := conn.Control(func(fd uintptr) { failed = syscall.Fchmod(int(fd), socketMode) }); err != nil {
			return err
		}
		return failed
	}}
	return c.Listen(context.Background(), network, address)
}
