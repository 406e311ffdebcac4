//go:build unix && !linux

package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// harden keeps core dumps, which would hold secrets, from being written.
func harden() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("switching off core dumps: %w", err)
	}
	return nil
}
