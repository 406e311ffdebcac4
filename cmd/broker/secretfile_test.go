package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// TestSecretFilesLeaveNothingBehind sees to what a crash has left: a secret in a
// file that nobody looks at.
func TestSecretFilesLeaveNothingBehind(t *testing.T) {
	dir := t.TempDir()
	path, old := filepath.Join(dir, "secret"), time.Now().Add(-2*time.Hour)
	for name, kept := range map[string]bool{
		"secret": true, ".client-secret-secret-123": false, ".client-secret-secret-2-456": true, ".client-secret-other-789": true,
	} {
		file := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(file, []byte("old"), 0o600), os.Chtimes(file, old, old)); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if _, err := os.Lstat(file); (err == nil) != kept {
				t.Errorf("%s is kept: %v, want %v", name, err == nil, kept)
			}
		}()
	}
	under := filepath.Join(dir, ".client-secret-secret-42") // another process is at it
	if err := os.WriteFile(under, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	var files secretFiles
	if err := errors.Join(files.Check(path), files.Write(path, broker.NewSecret("new"))); err != nil {
		t.Fatal(err)
	}
	if content, err := os.ReadFile(path); err != nil || string(content) != "new" {
		t.Errorf("the file has %q, %v", content, err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 4 {
		t.Errorf("%v are left, %v", entries, err)
	}
	if _, err := os.Lstat(under); err != nil {
		t.Error(err)
	}
}

// full is a device without room.
type full struct{}

func (full) Write([]byte) (int, error) { return 0, errors.New("no space left on device") }

func TestSecretThatCannotBeWrittenIsNoSuccess(t *testing.T) {
	s := newAdministered(t)
	p := start(t, s.administered(""))
	root := newRoot()
	root.SetArgs([]string{"secret", "create", "tenant-admin", "--client-id", "rotated", "--address", p.address})
	var stderr strings.Builder
	root.SetOut(full{})
	root.SetErr(&stderr)
	if err := root.ExecuteContext(t.Context()); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("got %v, and %q", err, stderr.String())
	}
}
