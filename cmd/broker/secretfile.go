package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// secretFiles replaces the files that client secrets are read from. It implements
// broker.SecretFiles.
type secretFiles struct{}

// Check implements broker.SecretFiles: it does all that a replacement takes but
// the last step.
func (secretFiles) Check(path string) error {
	f, info, err := beside(path)
	if err != nil {
		return err
	}
	err = errors.Join(prepare(f, info, secretMode), f.Close(), os.Remove(f.Name()))
	// A file that is mounted on its own cannot be replaced; a link to it tells.
	if linked := os.Link(path, f.Name()); errors.Is(linked, syscall.EXDEV) {
		return errors.Join(err, fmt.Errorf("%s is mounted on its own, so it cannot be replaced: mount its directory, or set secret_rotation to have the secret in the store", path))
	} else if linked == nil {
		err = errors.Join(err, os.Remove(f.Name()))
	}
	return err
}

// Write implements broker.SecretFiles.
func (secretFiles) Write(path string, secret broker.Secret) error {
	f, info, err := beside(path)
	if err != nil {
		return err
	}
	removeAbandoned(path, newName, abandonedAfter)
	return replaceBy(f, path, info, secretMode, secret)
}

const (
	secretMode = 0o600
	// abandonedAfter is how old a new file is that nobody will put into place
	// any more: whoever made it has died.
	abandonedAfter = time.Hour
)

// beside makes a new file in the directory of the file at path. A symbolic link
// is how Kubernetes mounts a Secret: to replace it would detach the mount, and
// what it leads to belongs to the kubelet.
func beside(path string) (f *os.File, info fs.FileInfo, err error) {
	if info, err = os.Lstat(path); err != nil {
		return nil, nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("%s is no regular file but a link or the like, as in a mounted Kubernetes Secret, which cannot be written from here; set secret_rotation to have the secret in the store", path)
	}
	directory, base := filepath.Split(path)
	if f, err = os.CreateTemp(directory, newName(base)+"*"); err != nil { // with mode 0600
		return nil, nil, fmt.Errorf("the directory of %s cannot be written: %w; make it writable, or set secret_rotation to have the secret in the store", path, err)
	}
	return f, info, nil
}

func newName(base string) string { return ".client-secret-" + base + "-" }

// removeAbandoned removes the new files of path, as name calls them, that have a
// secret in them, and were left behind so long ago by a crash.
func removeAbandoned(path string, name func(base string) string, after time.Duration) {
	directory, base := filepath.Split(path)
	entries, err := os.ReadDir(filepath.Clean(directory))
	if err != nil {
		return
	}
	for _, e := range entries {
		random, ours := strings.CutPrefix(e.Name(), name(base))
		if info, err := e.Info(); ours && strings.Trim(random, "0123456789") == "" && err == nil && info.Mode().IsRegular() && time.Since(info.ModTime()) > after {
			_ = os.Remove(filepath.Join(directory, e.Name())) // the next one tries again
		}
	}
}
