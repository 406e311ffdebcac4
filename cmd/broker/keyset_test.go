package main

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

// keysetFile is a keyset that the command has made.
func keysetFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keyset.json")
	if o := command(t, "keyset", "new", "--out", path); o.status != 0 || o.stdout != "" {
		t.Fatalf("new: %+v", o)
	}
	return path
}

func readKeys(t *testing.T, path string) *store.Keyset {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	k, err := store.ParseKeyset(broker.NewSecret(string(content)))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func permissions(t *testing.T, path string) fs.FileMode {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Mode()
}

// material is what no output may hold: the keys of a keyset in base64.
var material = regexp.MustCompile(`"value": *"([^"]+)"`)

func wantNoMaterial(t *testing.T, content []byte, o outcome) {
	t.Helper()
	found := material.FindAllSubmatch(content, -1)
	if len(found) == 0 {
		t.Fatal("the keyset holds no key: this test shows nothing")
	}
	for _, m := range found {
		if strings.Contains(o.stdout+o.stderr, string(m[1])) {
			t.Errorf("a key was printed: %+v", o)
		}
	}
}

func TestKeysetNewWritesAFileOnlyItsOwnerReads(t *testing.T) {
	path := filepath.Join(t.TempDir(), "keyset.json")
	o := command(t, "keyset", "new", "--out", path)
	if o.status != 0 || o.stdout != "" || !strings.Contains(o.stderr, path) {
		t.Fatalf("%+v", o)
	}
	if mode := permissions(t, path); mode != 0o600 {
		t.Errorf("the file has mode %v", mode)
	}
	readKeys(t, path)
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	wantNoMaterial(t, content, o)
	if !bytes.HasSuffix(content, []byte("}\n")) {
		t.Errorf("it ends with %q", content[len(content)-3:])
	}
}

func TestKeysetNewWritesToAPipe(t *testing.T) {
	for _, args := range [][]string{{"keyset", "new"}, {"keyset", "new", "--out", "-"}} {
		o := command(t, args...)
		k, err := store.ParseKeyset(broker.NewSecret(o.stdout))
		if o.status != 0 || err != nil {
			t.Fatalf("%v: status %d, %v", args, o.status, err)
		}
		if primary, all := k.KeyIDs(); len(all) != 1 || all[0] != primary {
			t.Errorf("%v: keys %d, %v", args, primary, all)
		}
		wantNoMaterial(t, []byte(o.stdout), outcome{stderr: o.stderr})
	}
}

func TestKeysetNewLeavesWhatExists(t *testing.T) {
	path := keysetFile(t)
	link, dangling := path+".link", path+".dangling"
	for name, target := range map[string]string{link: path, dangling: path + ".nothing"} {
		if err := os.Symlink(target, name); err != nil {
			t.Fatal(err)
		}
	}
	before := readKeys(t, path)
	for _, p := range []string{path, link, dangling, filepath.Dir(path)} {
		o := command(t, "keyset", "new", "--out", p)
		if o.status != exitFailure || !strings.Contains(o.stderr, p+" exists and was left as it is") {
			t.Errorf("%+v", o)
		}
	}
	was, _ := before.KeyIDs()
	if is, _ := readKeys(t, path).KeyIDs(); is != was {
		t.Error("it was overwritten")
	}
	if o := command(t, "keyset", "new", "--out", filepath.Join(path, "in a file")); o.status != exitFailure {
		t.Errorf("%+v", o)
	}
}

func TestKeysetNewShowsNothingOnATerminal(t *testing.T) {
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no terminal to be had: %v", err)
	}
	defer terminal.Close()
	c := exec.CommandContext(t.Context(), binary, "keyset", "new")
	var stderr bytes.Buffer
	c.Stdout, c.Stderr = terminal, &stderr
	if err := c.Run(); err == nil || c.ProcessState.ExitCode() != exitUsage || !strings.Contains(stderr.String(), "--out FILE") {
		t.Errorf("%v: %s", err, &stderr)
	}
}

func TestKeysetRotatesStepByStep(t *testing.T) {
	path := keysetFile(t)
	rotate := func(status int, want string, args ...string) *store.Keyset {
		t.Helper()
		o := command(t, append([]string{"keyset", "rotate", "--keyset", path}, args...)...)
		if o.status != status || !strings.Contains(o.stdout+o.stderr, want) {
			t.Fatalf("%v: %+v", args, o)
		}
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		wantNoMaterial(t, content, o)
		if mode := permissions(t, path); mode != 0o600 {
			t.Errorf("%v: mode %v", args, mode)
		}
		return readKeys(t, path)
	}
	begin := readKeys(t, path)
	first, _ := begin.KeyIDs()
	sealed, err := begin.Seal([]byte("token"), "family", "")
	if err != nil {
		t.Fatal(err)
	}

	k := rotate(0, "--step promote")
	primary, all := k.KeyIDs()
	if primary != first || len(all) != 2 {
		t.Fatalf("after add: %d of %v", primary, all)
	}
	second := all[1]

	k = rotate(0, "--step drop")
	if primary, all = k.KeyIDs(); primary != second || !slices.Equal(all, []uint32{first, second}) {
		t.Fatalf("after promote: %d of %v", primary, all)
	}

	k = rotate(exitUsage, "say --step drop") // a drop is never next by itself
	if _, err := k.Open(sealed, "family", ""); err != nil {
		t.Error(err)
	}

	k = rotate(0, "dropped all keys but", "--step", "drop")
	if primary, all = k.KeyIDs(); primary != second || len(all) != 1 {
		t.Fatalf("after drop: %d of %v", primary, all)
	}
	if !bytes.Equal(k.FingerprintKey(), begin.FingerprintKey()) {
		t.Error("fingerprints have changed")
	}

	rotate(exitFailure, "no key to drop", "--step", "drop")
	rotate(exitFailure, "no key to promote", "--step", "promote")
	k = rotate(0, "dropped all keys but", "--step", "drop", "--leaked")
	if bytes.Equal(k.FingerprintKey(), begin.FingerprintKey()) {
		t.Error("fingerprints still come from the leaked key")
	}
	rotate(0, "--step promote", "--step", "add")

	left, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(left) != 1 {
		t.Errorf("beside the keyset there is %v, %v", left, err)
	}
}

// As Kubernetes mounts a Secret: a link to a file in a linked directory.
func TestKeysetRotateFollowsLinks(t *testing.T) {
	path := keysetFile(t)
	dir := filepath.Dir(path)
	if err := os.Mkdir(filepath.Join(dir, "..version"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, filepath.Join(dir, "..version", "keyset.json")); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"..data": "..version", "keyset.json": "..data/keyset.json"} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if o := command(t, "keyset", "rotate", "--keyset", path); o.status != 0 {
		t.Fatalf("%+v", o)
	}
	if _, all := readKeys(t, filepath.Join(dir, "..version", "keyset.json")).KeyIDs(); len(all) != 2 {
		t.Errorf("the file behind the links has keys %v", all)
	}
	if permissions(t, path).Type() != fs.ModeSymlink {
		t.Error("the link was replaced")
	}
}

func TestKeysetRotateKeepsPermissions(t *testing.T) {
	path := keysetFile(t)
	owner := os.Geteuid()
	if owner == 0 {
		owner = 65534
		if err := os.Chown(path, owner, 65533); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if o := command(t, "keyset", "rotate", "--keyset", path); o.status != 0 {
		t.Fatalf("%+v", o)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if is := info.Sys().(*syscall.Stat_t); info.Mode() != 0o640 || int(is.Uid) != owner {
		t.Errorf("the file has mode %v and belongs to %d", info.Mode(), is.Uid)
	}
}

func TestKeysetRotateInADirectoryThatCannotBeWritten(t *testing.T) {
	path := keysetFile(t)
	c := exec.CommandContext(t.Context(), binary, "keyset", "rotate", "--keyset", path)
	if os.Geteuid() == 0 { // whom no permission stops
		const nobody = 65534
		if err := os.Chown(path, nobody, nobody); err != nil {
			t.Fatal(err)
		}
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		for _, d := range []string{filepath.Dir(binary), filepath.Dir(filepath.Dir(path))} {
			if err := os.Chmod(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := os.Chmod(filepath.Dir(path), 0o555); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Chmod(filepath.Dir(path), 0o755) }) // so that it can be removed
	out, err := c.CombinedOutput()
	if err == nil || c.ProcessState.ExitCode() != exitFailure || !strings.Contains(string(out), "the directory "+filepath.Dir(path)+" cannot be written") {
		t.Errorf("%v: %s", err, out)
	}
	if _, all := readKeys(t, path).KeyIDs(); len(all) != 1 {
		t.Errorf("the file has keys %v", all)
	}
}

func TestKeysetExplainsMistakes(t *testing.T) {
	path := keysetFile(t)
	broken := filepath.Join(t.TempDir(), "broken.json")
	if err := os.WriteFile(broken, []byte(`{"key": "canary"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		status int
		want   string
		args   []string
	}{
		{exitUsage, "say --keyset FILE", []string{"rotate"}},
		{exitUsage, "use add, promote or drop", []string{"rotate", "--keyset", path, "--step", "all"}},
		{exitUsage, "--leaked goes with --step drop", []string{"rotate", "--keyset", path, "--leaked"}},
		{exitUsage, "--help", []string{"rotate", path}},
		{exitUsage, "--help", []string{"rotated"}},
		{exitUsage, "--help", []string{"new", "extra"}},
		{exitFailure, "no such file", []string{"rotate", "--keyset", path + ".nothing"}},
		{exitFailure, "no Tink keyset", []string{"rotate", "--keyset", broken}},
		{exitFailure, "promote it first", []string{"rotate", "--keyset", added(t), "--step", "drop"}},
	} {
		o := command(t, append([]string{"keyset"}, c.args...)...)
		if o.status != c.status || o.stdout != "" || !strings.Contains(o.stderr, c.want) || strings.Contains(o.stderr, "canary") {
			t.Errorf("%v: %+v", c.args, o)
		}
	}
	if o := command(t, "keyset"); o.status != 0 || !strings.Contains(o.stdout, "rotate") {
		t.Errorf("%+v", o)
	}
}

// added is a keyset in the midst of a rotation.
func added(t *testing.T) string {
	t.Helper()
	path := keysetFile(t)
	if o := command(t, "keyset", "rotate", "--keyset", path, "--step", "add"); o.status != 0 {
		t.Fatalf("%+v", o)
	}
	return path
}
