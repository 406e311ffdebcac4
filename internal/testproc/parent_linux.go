package testproc

import (
	"os/exec"
	"syscall"
)

// dieWithParent keeps a test that is killed from leaving its children behind.
func dieWithParent(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}
