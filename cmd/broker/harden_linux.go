package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// harden keeps what is in the memory of this process to itself: no core dump is
// written when it crashes, and no other process of the same user can read its
// memory or attach to it. A limit of zero alone would not do: the kernel ignores
// it when dumps go to a program.
func harden() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("making the process undumpable: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("switching off core dumps: %w", err)
	}
	return nil
}
