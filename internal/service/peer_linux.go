package service

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peerOf returns the user and the groups, the primary one first, that the
// process at the other end of a unix socket had when it connected.
func peerOf(fd int) (uid uint32, gids []uint32, err error) {
	c, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return 0, nil, fmt.Errorf("SO_PEERCRED: %w", err)
	}
	more, err := supplementary(fd)
	if err != nil {
		return 0, nil, fmt.Errorf("SO_PEERGROUPS: %w", err)
	}
	return c.Uid, append([]uint32{c.Gid}, more...), nil
}

// supplementary are the peer's further groups; none on a kernel before 4.13,
// which does not tell.
func supplementary(fd int) ([]uint32, error) {
	const size = uint32(unsafe.Sizeof(uint32(0)))
	for room := uint32(64); ; {
		gids := make([]uint32, room)
		length := room * size
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&gids[0])), uintptr(unsafe.Pointer(&length)), 0)
		switch {
		case errno == 0:
			return gids[:length/size], nil
		case errors.Is(errno, unix.ENOPROTOOPT):
			return nil, nil
		case errors.Is(errno, unix.ERANGE) && length/size > room: // what it takes
			room = length / size
		default:
			return nil, errno
		}
	}
}
