package main

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
)

// TestSecretFileOfAnotherOwnerIsRefusedBeforeItIsNeeded has a file that belongs to
// root beside a broker that does not run as root: it must say so before a secret
// is created, not after.
func TestSecretFileOfAnotherOwnerIsRefusedBeforeItIsNeeded(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can make a file that belongs to somebody else")
	}
	dir, err := os.MkdirTemp("", "") // that of the test is root's all the way up
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "secret")
	if err := errors.Join(os.WriteFile(path, []byte("old"), 0o644), os.Chmod(dir, 0o777)); err != nil {
		t.Fatal(err)
	}
	if err := (secretFiles{}).Check(path); err != nil {
		t.Errorf("root: %v", err)
	}
	refused := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine, and with it who it is
		const nobody = 65534
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
			refused <- nil
			return
		}
		refused <- secretFiles{}.Check(path)
	}()
	if err := <-refused; !errors.Is(err, os.ErrPermission) {
		t.Errorf("another user: got %v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("%v are left, %v", entries, err)
	}
}
