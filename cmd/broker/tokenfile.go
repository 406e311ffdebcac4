package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// aboutTheFile is for the help of commands that have --file.
const aboutTheFile = `The file has mode 0600 from its first byte and is replaced at once, so whoever reads it
finds one whole token. It belongs to the user who runs this, who alone can read it. A
link, or a file of another user, is refused; nobody else should be able to write in
the directory.`

func fileFlag(cmd *cobra.Command, path *string) {
	cmd.Flags().StringVar(path, "file", "", "write the token into this file, as --output says, instead of printing it")
}

// tokenFile is the path of a file that programs read a token from.
type tokenFile string

// tokenAbandonedAfter is how old a new file of ours is that nobody will put into
// place any more. It takes moments.
const tokenAbandonedAfter = time.Minute

// check reports whether the file can be written, before a token is asked for. No
// file is fine.
func (f tokenFile) check() error {
	if f == "" {
		return nil
	}
	err := f.replaceable()
	if err == nil {
		var trial *os.File
		if trial, err = f.beside(); err == nil {
			err = errors.Join(trial.Close(), os.Remove(trial.Name()))
		}
	}
	if err != nil {
		return usageError{fmt.Errorf("--file: %w", err)}
	}
	return nil
}

// replaceable reports whether what is at the path, if anything, is a file of ours.
func (f tokenFile) replaceable() error {
	info, err := os.Lstat(string(f))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.Mode().Type() == fs.ModeSymlink:
		return fmt.Errorf("%s is a link; name the file itself", f)
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is no regular file", f)
	case !isOurs(info):
		return fmt.Errorf("%s belongs to another user; remove it, or run this as that user", f)
	}
	return nil
}

// beside makes a new file in the same directory, with mode 0600.
func (f tokenFile) beside() (*os.File, error) {
	directory, base := filepath.Split(string(f))
	if base == "" {
		return nil, fmt.Errorf("%s is a directory", f)
	}
	return os.CreateTemp(filepath.Clean(directory), tokenName(base)+"*")
}

func tokenName(base string) string { return ".token-" + base + "-" }

// write replaces the file by one with this token. Whatever fails, what was there
// stays.
func (f tokenFile) write(output string, t *pb.Token, source pb.Source) error {
	var content strings.Builder
	err := printers[output](&content, t, source)
	if err == nil {
		err = f.replaceable()
	}
	if err != nil {
		return fmt.Errorf("writing the token: %w", err)
	}
	removeAbandoned(string(f), tokenName, tokenAbandonedAfter)
	next, err := f.beside()
	if err == nil {
		err = replaceBy(next, string(f), nil, secretMode, broker.NewSecret(content.String()))
	}
	if err != nil {
		return fmt.Errorf("writing the token: %w", err)
	}
	return nil
}
