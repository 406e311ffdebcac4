package main

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"syscall"
	"testing"
	"time"
)

// A crash leaves no core dump, and no process of the same user can look into the
// memory: the kernel shows what may not be dumped as root's.
func TestMemoryStaysInTheProcess(t *testing.T) {
	t.Parallel()
	out := &lockedBuffer{}
	c := exec.Command(binary, "sandbox", "--address", "127.0.0.1:0")
	c.Env = append(os.Environ(), "GOTRACEBACK=crash")
	c.Stdout, c.Stderr = out, out
	c.Dir = t.TempDir()
	if os.Geteuid() == 0 { // all of root's processes are shown as root's
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		c.Dir = "/"
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = c.Wait() // it is made to crash
	}()
	t.Cleanup(func() { _ = c.Process.Kill() })
	for deadline := time.Now().Add(30 * time.Second); out.String() == ""; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it does not begin")
		}
	}
	proc := fmt.Sprintf("/proc/%d", c.Process.Pid)
	info, err := os.Stat(proc + "/environ")
	if err != nil {
		t.Fatal(err)
	}
	if owner := info.Sys().(*syscall.Stat_t).Uid; owner != 0 {
		t.Errorf("its memory can be read by user %d", owner)
	}
	limits, err := os.ReadFile(proc + "/limits")
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`(?m)^Max core file size +0 +0 `).Match(limits) {
		t.Errorf("its core dumps are limited to\n%s", limits)
	}
	if err := c.Process.Signal(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	<-ended
	if status := c.ProcessState.Sys().(syscall.WaitStatus); status.CoreDump() {
		t.Errorf("it dumped core: %v", c.ProcessState)
	}
}
