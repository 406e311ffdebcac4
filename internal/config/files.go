package config

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// maxFile is the size of the largest file that is read, the configuration
// itself included. A larger one is a mistake.
const maxFile = 4 << 20

// maxList is the size of the largest file of revocation lists that is read: half
// a million certificates.
const maxList = 32 << 20

// digest names the content of a file. The zero digest is that of a file that
// cannot be read.
type digest [sha256.Size]byte

// files are what a load has read, and what it read there.
type files map[string]digest

func (f files) paths() []string {
	var paths []string
	for path := range f {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	return paths
}

// read returns the content of a regular file, and remembers it. The error does
// not repeat the path, which may be a secret in the wrong place.
func (f files) read(path string, limit int) ([]byte, error) {
	data, err := readFile(path)
	if err != nil {
		f[path] = digest{}
		return nil, err
	}
	f[path] = sha256.Sum256(data)
	if len(data) > limit {
		return nil, fmt.Errorf("the file is larger than %d KiB", limit>>10)
	}
	return data, nil
}

// readFile reads what digestOf looks at: one byte more than maxList at the
// most, and nothing but regular files, since others can block for ever.
func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, withoutPath(err)
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("it is not a regular file")
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, withoutPath(err)
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, maxList+1))
	return data, withoutPath(err)
}

// digestOf is what read would remember of the file now.
func digestOf(path string) digest {
	data, err := readFile(path)
	if err != nil {
		return digest{}
	}
	return sha256.Sum256(data)
}

func withoutPath(err error) error {
	var pathError *fs.PathError
	if errors.As(err, &pathError) {
		return pathError.Err
	}
	return err
}

// absolute resolves a path in the configuration against the directory of the
// configuration file.
func (l *load) absolute(path string) string {
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	return filepath.Join(l.directory, path)
}

// shown is a path for people. What does not look like a path may be a secret in
// the wrong place and is not repeated; the problem's line says where it is.
func (l *load) shown(path string) string {
	if !looksLikePath(path) {
		return "the file that is named here, in " + l.directory
	}
	return l.absolute(path)
}

// looksLikePath is meant for what people write; it errs on the careful side.
func looksLikePath(path string) bool {
	if len(path) > 1024 || !(filepath.IsAbs(path) || len(path) > 2 && path[:2] == "./" || len(path) > 3 && path[:3] == "../") {
		return false
	}
	for _, c := range path {
		if c <= ' ' || c == 0x7f {
			return false
		}
	}
	return true
}
