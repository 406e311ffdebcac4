package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A socket lets nobody but its owner and group in, not even before its mode is
// set. The umask belongs to the process, so no other test runs meanwhile.
func TestSocketIsNeverWiderThanItsMode(t *testing.T) {
	for _, umask := range []int{0, 0o022, 0o077} {
		path := filepath.Join(shortDir(t), "s")
		was := syscall.Umask(umask)
		first, err := bind("unix", path)
		syscall.Umask(was)
		if err != nil {
			t.Fatal(err)
		}
		wantMode(t, path, 0o660&^os.FileMode(umask))
		first.Close()

		was = syscall.Umask(umask)
		ln, err := listen("unix", path)
		syscall.Umask(was)
		if err != nil {
			t.Fatal(err)
		}
		wantMode(t, path, 0o660)
		ln.Close()
	}
}

func wantMode(t *testing.T, path string, want os.FileMode) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != want {
		t.Errorf("%s has mode %o, want %o", path, info.Mode().Perm(), want)
	}
}

// user is who runs a process.
type user struct {
	uid, gid uint32
	groups   []uint32
}

// commandAs runs the binary to its end as another user, which takes root.
func commandAs(t *testing.T, u user, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c := exec.CommandContext(ctx, binary, args...)
	c.Dir = "/"
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: u.uid, Gid: u.gid, Groups: u.groups}}
	var stdout, stderr bytes.Buffer
	c.Stdout, c.Stderr = &stdout, &stderr
	err := c.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("broker %s as %v: %v", strings.Join(args, " "), u, err)
	}
	return outcome{c.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// Processes are known by their users and groups, whatever they say themselves.
func TestSocketCallersAreUsersAndGroups(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	dir := shortDir(t)
	socket := filepath.Join(dir, "s")
	const members = 4242 // a group that may connect
	own := uint32(os.Getuid())
	p := start(t, s.onSocket(socket, "policy:",
		fmt.Sprintf(`  - {callers: ["unix:uid:%d", "unix:uid:60001", "unix:gid:60007"], profiles: [invoices], allow: [issue]}`, own)))
	if got := command(t, "token", "invoices", "--address", "unix:"+socket); got.status != 0 {
		t.Errorf("as the server's own user: %+v", got)
	}
	if own != 0 {
		t.Log("NOT TESTED: callers of other users, because only root can be somebody else")
		return
	}
	if err := errors.Join(os.Chmod(dir, 0o711), os.Chmod(filepath.Dir(binary), 0o711), os.Chown(socket, 0, members)); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		as   user
		text string // what a refusal says; empty if there is a token
	}{
		"a user that a rule names":                {user{60001, members, nil}, ""},
		"one of a group that a rule names":        {user{60002, 60007, []uint32{members}}, ""},
		"the same by a supplementary group":       {user{60002, members, []uint32{60005, 60007}}, ""},
		"a user that no rule names":               {user{60003, members, nil}, "caller unix:uid:60003 may not issue"},
		"nobody":                                  {user{65534, members, nil}, "caller unix:uid:65534 may not issue"},
		"a group's number as a user's":            {user{60007, members, nil}, "caller unix:uid:60007 may not issue"},
		"a user's number as a group's":            {user{60003, 60001, []uint32{members}}, "caller unix:uid:60003 may not issue"},
		"a user that may not connect":             {user{60001, 60001, nil}, "permission denied"},
		"a user that may not connect, in a group": {user{60002, 60007, nil}, "permission denied"},
	} {
		got := commandAs(t, c.as, "token", "invoices", "--address", "unix:"+socket, "--timeout", "10s")
		if c.text == "" && (got.status != 0 || got.stdout == "") || c.text != "" && (got.status != 1 || got.stdout != "" || !strings.Contains(got.stderr, c.text)) {
			t.Errorf("%s: %+v, want %q", name, got, c.text)
		}
	}
	if got := commandAs(t, user{60002, members, []uint32{60007}}, "whoami", "--address", "unix:"+socket); !strings.Contains(got.stdout, "unix:uid:60002\n") || !strings.Contains(got.stdout, "unix_peer") {
		t.Errorf("%+v", got)
	}
	if got := s.vantage.Calls().Total; got != 1 {
		t.Errorf("the token endpoint got %d requests, want 1", got)
	}
	if !strings.Contains(p.log.String(), `"caller":"unix:uid:60003"`) {
		t.Errorf("the log does not name who was denied\n%s", p.log)
	}
}
