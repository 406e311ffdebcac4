package service

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// peerOf returns the user and the groups, the primary one first, that the
// process at the other end of a unix socket had when it connected.
func peerOf(fd int) (uid uint32, gids []uint32, err error) {
	c, err := unix.GetsockoptXucred(fd, unix.SOL_LOCAL, unix.LOCAL_PEERCRED)
	if err != nil {
		return 0, nil, fmt.Errorf("LOCAL_PEERCRED: %w", err)
	}
	return c.Uid, c.Groups[:min(max(int(c.Ngroups), 0), len(c.Groups))], nil
}
