package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// secretFiles replaces the files that client secrets are read from. It implements
// broker.SecretFiles.
type secretFiles struct{}

// Check implements broker.SecretFiles: it does all that a replacement takes but
// the last step.
func (secretFiles) Check(path string) error {
	f, _, err := beside(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// Write implements broker.SecretFiles.
func (secretFiles) Write(path string, secret broker.Secret) error {
	f, info, err := beside(path)
	if err != nil {
		return err
	}
	return replaceBy(f, path, info, 0o600, secret)
}

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
	if f, err = os.CreateTemp(filepath.Dir(path), ".client-secret-*"); err != nil { // with mode 0600
		return nil, nil, fmt.Errorf("the directory of %s cannot be written: %w; make it writable, or set secret_rotation to have the secret in the store", path, err)
	}
	return f, info, nil
}
