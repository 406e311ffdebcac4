//go:build !unix

package main

import "net"

// bind is net.Listen.
func bind(network, address string) (net.Listener, error) { return net.Listen(network, address) }
