package audit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
)

// sink is where lines go.
type sink interface {
	// write writes lines, each with "\n" at its end, and returns how many bytes
	// of them were. No lines means to find out whether some could be written.
	// Attempts are given up when ctx ends.
	write(ctx context.Context, lines []byte) (int, error)
	// reopen begins anew, or leaves all as it is.
	reopen() error
	close()
	// longest is the most that a line may have.
	longest() int
}

// longestLine has room for all scopes that a request may name.
const longestLine = 32 << 10

// stream is standard output. A reader that does not read holds write up.
type stream struct{ io.Writer }

func (s stream) write(_ context.Context, lines []byte) (int, error) {
	if len(lines) == 0 {
		return 0, nil
	}
	n, err := s.Write(lines)
	if err != nil {
		err = fmt.Errorf("writing to standard output: %w", err)
	}
	return n, err
}

func (stream) reopen() error { return nil }
func (stream) close()        {}
func (stream) longest() int  { return longestLine }

// file appends to what is at a path.
type file struct {
	path string
	open *os.File
	cut  bool // a line was not finished
}

func openFile(path string) (*file, error) {
	f := &file{path: path}
	return f, f.reopen()
}

var errNoFile = errors.New("it is no file")

// reopen opens what is at the path now, and makes a file if nothing is.
func (f *file) reopen() error {
	// To open a pipe that nobody reads would take forever.
	if info, err := os.Stat(f.path); err == nil && info.Mode()&(fs.ModeDir|fs.ModeNamedPipe|fs.ModeSocket) != 0 {
		return &fs.PathError{Op: "open", Path: f.path, Err: errNoFile}
	}
	opened, err := os.OpenFile(f.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640) // closed on exec, as all that Go opens
	if err != nil {
		return err
	}
	if f.open != nil {
		f.open.Close()
	}
	f.open, f.cut = opened, isCut(f.path)
	return nil
}

// isCut reports whether the file's last line was not finished: its writer has
// crashed. What cannot be read is taken to be whole.
func isCut(path string) bool {
	old, err := os.Open(path)
	if err != nil {
		return false
	}
	defer old.Close()
	info, err := old.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Size() == 0 {
		return false
	}
	last := make([]byte, 1)
	_, err = old.ReadAt(last, info.Size()-1)
	return err == nil && last[0] != '\n'
}

func (f *file) write(_ context.Context, lines []byte) (int, error) {
	if len(lines) == 0 {
		return 0, nil
	}
	if f.cut {
		if _, err := f.open.Write([]byte{'\n'}); err != nil {
			return 0, err
		}
		f.cut = false
	}
	return f.open.Write(lines)
}

func (f *file) close()     { f.open.Close() }
func (*file) longest() int { return longestLine }
