package config_test

import (
	"context"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/config"
)

const (
	never = time.Hour
	often = 20 * time.Millisecond
)

// rig is a server as far as reloading goes: it loads when told of a change, and
// keeps what it has when that does not work.
type rig struct {
	*testing.T
	loader     *config.Loader
	credential atomic.Pointer[string] // of the configuration in use
	told       atomic.Int32
	changes    chan error // one for each change that was told, after its load
}

func startRig(t *testing.T, path string, poll time.Duration) *rig {
	t.Helper()
	r := &rig{T: t, loader: config.NewLoader(path, options), changes: make(chan error, 1000)}
	r.loader.SetPoll(poll)
	if err := r.load(); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r.loader.Watch(ctx, func() {
			r.told.Add(1)
			r.changes <- r.load()
		})
	}()
	t.Cleanup(func() {
		stop()
		<-ended
	})
	return r
}

func (r *rig) load() error {
	c, err := r.loader.Load()
	if err == nil {
		r.credential.Store(&c.Profiles[0].Credential)
	}
	return err
}

// uses waits until the profile uses the secret.
func (r *rig) uses(secret string) {
	r.Helper()
	want := presented(options.FingerprintKey, broker.NewSecret(secret))
	deadline := time.After(20 * time.Second)
	for *r.credential.Load() != want {
		select {
		case <-r.changes:
		case <-deadline:
			r.Fatalf("%s is not in use", secret)
		}
	}
}

// secretFile writes a configuration into the test's directory whose secret is
// in the file at path.
func secretFile(t *testing.T, path string) (configuration string) {
	t.Helper()
	return write(t, filepath.Join(t.TempDir(), "broker.yaml"), with(t, minimal, "{env: SECRET}", "{file: "+path+"}"))
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func TestWatchWriting(t *testing.T) {
	path := write(t, filepath.Join(t.TempDir(), "secret"), "one")
	r := startRig(t, secretFile(t, path), never)
	write(t, path, "two")
	r.uses("two")
	write(t, path, "three")
	r.uses("three")
}

func TestWatchRenaming(t *testing.T) {
	directory := t.TempDir()
	path := write(t, filepath.Join(directory, "secret"), "one")
	r := startRig(t, secretFile(t, path), never)
	for _, secret := range []string{"two", "three", "four"} {
		rename(t, write(t, path+".new", secret), path)
		r.uses(secret)
	}
}

// Kubernetes: secret -> ..data/secret, ..data -> ..2026_1, and a new ..data is
// renamed over the old one.
func TestWatchKubernetes(t *testing.T) {
	directory := t.TempDir()
	swap := func(version, secret string) {
		write(t, filepath.Join(directory, version, "secret"), secret)
		link := filepath.Join(directory, "..data_tmp")
		if err := os.Symlink(version, link); err != nil {
			t.Fatal(err)
		}
		rename(t, link, filepath.Join(directory, "..data"))
	}
	swap("..1", "one")
	path := filepath.Join(directory, "secret")
	if err := os.Symlink("..data/secret", path); err != nil {
		t.Fatal(err)
	}
	r := startRig(t, secretFile(t, path), never)
	swap("..2", "two")
	r.uses("two")
	if err := os.RemoveAll(filepath.Join(directory, "..1")); err != nil {
		t.Fatal(err)
	}
	swap("..3", "three")
	r.uses("three")
}

// A link somewhere above the file changes.
func TestWatchLinkAbove(t *testing.T) {
	directory := t.TempDir()
	for _, version := range []string{"one", "two"} {
		write(t, filepath.Join(directory, "versions", version, "deep", "secret"), version)
	}
	link := filepath.Join(directory, "links", "current")
	write(t, filepath.Join(directory, "links", "unrelated"), "")
	if err := os.Symlink("../versions/one", link); err != nil {
		t.Fatal(err)
	}
	r := startRig(t, secretFile(t, filepath.Join(link, "deep", "secret")), never)
	if err := os.Symlink("../versions/two", link+".new"); err != nil {
		t.Fatal(err)
	}
	rename(t, link+".new", link)
	r.uses("two")
}

func TestWatchDeletedAndCreated(t *testing.T) {
	directory := t.TempDir()
	path := write(t, filepath.Join(directory, "secret"), "one")
	r := startRig(t, secretFile(t, path), never)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := <-r.changes; err == nil {
		t.Fatal("loaded without the secret")
	}
	r.uses("one")
	write(t, path, "two")
	r.uses("two")
}

func TestWatchDeletedDirectory(t *testing.T) {
	directory := filepath.Join(t.TempDir(), "secrets")
	path := write(t, filepath.Join(directory, "secret"), "one")
	r := startRig(t, secretFile(t, path), often)
	rename(t, directory, directory+".old")
	if err := <-r.changes; err == nil {
		t.Fatal("loaded without the secret")
	}
	write(t, path, "two")
	r.uses("two")
	if err := os.RemoveAll(directory); err != nil {
		t.Fatal(err)
	}
	write(t, path, "three")
	r.uses("three")
}

// The configuration changes to a file that is not there yet; it is waited for
// although nothing in use refers to it.
func TestWatchFileOfBadConfiguration(t *testing.T) {
	directory := t.TempDir()
	one := write(t, filepath.Join(directory, "a", "secret"), "one")
	two := filepath.Join(directory, "b", "secret")
	write(t, filepath.Join(directory, "b", "other"), "")
	configuration := secretFile(t, one)
	r := startRig(t, configuration, never)
	write(t, configuration, with(t, minimal, "{env: SECRET}", "{file: "+two+"}"))
	for err := range r.changes {
		if err != nil {
			break // It may have been seen half written.
		}
	}
	r.uses("one")
	write(t, two, "two")
	r.uses("two")
}

// What happens beside the files, or leaves their content as it was, is no
// change.
func TestWatchIgnores(t *testing.T) {
	directory := t.TempDir()
	path := write(t, filepath.Join(directory, "secret"), "one")
	r := startRig(t, secretFile(t, path), often)
	write(t, filepath.Join(directory, "beside"), "x")
	rename(t, write(t, path+".new", "one"), path)
	if err := os.Chtimes(path, time.Now(), time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	// The next real change comes after the look at all of these.
	write(t, filepath.Join(directory, "beside"), "y")
	rename(t, write(t, path+".new", "two"), path)
	r.uses("two")
	if n := r.told.Load(); n != 1 {
		t.Errorf("%d changes were told, want 1", n)
	}
}

// A change before Watch begins is not lost.
func TestWatchBeginsWithALook(t *testing.T) {
	path := write(t, filepath.Join(t.TempDir(), "secret"), "one")
	loader := config.NewLoader(secretFile(t, path), options)
	loader.SetPoll(never)
	if _, err := loader.Load(); err != nil {
		t.Fatal(err)
	}
	write(t, path, "two")
	ctx, stop := context.WithTimeout(context.Background(), 20*time.Second)
	defer stop()
	told := false
	loader.Watch(ctx, func() { told = true; stop() })
	if !told {
		t.Error("the change was not told")
	}
}
