package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

func newKeyset() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "keyset",
		Short: "Make and rotate the keys that seal what is in the store",
		Long:  "Make and rotate the keys that seal what is in the store. A keyset is a JSON file that\nTink understands (https://developers.google.com/tink); the config names it as\nstore.encryption_keyset, and all replicas need the same one.",
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	cmd.AddCommand(newKeysetNew(), newKeysetRotate())
	return cmd
}

func newKeysetNew() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:     "new [--out FILE]",
		Short:   "Make a keyset",
		Long:    "Make a keyset of one AES-256-GCM key, and write it to a new file that only its owner\nreads, or to standard output. On a terminal it is shown only with --out -.",
		Example: "  broker keyset new --out keyset.json\n  broker keyset new | kubectl create secret generic broker-keyset --from-file=keyset.json=/dev/stdin",
		Args:    explained(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			stdout := cmd.OutOrStdout()
			if out == "" && isTerminal(stdout) {
				return usageError{errors.New("this would show the keyset on the terminal: say --out FILE, or send it through a pipe, or say --out - if it shall be seen")}
			}
			text, err := store.NewKeyset()
			if err != nil {
				return err
			}
			keyset, err := store.ParseKeyset(text)
			if err != nil {
				return fmt.Errorf("reading the new keyset: %w", err)
			}
			where := "on standard output"
			if out == "" || out == "-" {
				_, err = io.WriteString(stdout, text.Reveal())
			} else {
				where = "in " + out
				err = createFile(out, text)
			}
			if err != nil {
				return fmt.Errorf("writing the new keyset: %w", err)
			}
			primary, _ := keyset.KeyIDs()
			fmt.Fprintf(cmd.ErrOrStderr(), "made a keyset with key %d, %s; whoever has it can read all that is in the store\n", primary, where)
			return nil
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "where to write it: a file that does not exist yet, or - for standard output")
	return cmd
}

func newKeysetRotate() *cobra.Command {
	var r rotation
	cmd := &cobra.Command{
		Use:   "rotate --keyset FILE",
		Short: "Take the next step to another key, and say what comes then",
		Long: "Take the next step to another key, and say what comes then. A rotation has three, and\nafter each of them the file goes to all replicas:\n\n" +
			"  add      a new key, which opens and does not seal yet\n  promote  the newest key seals from now on\n  drop     all other keys; what they have sealed does not open any more\n\n" +
			"Without --step the keyset tells whether to add or to promote; drop must be said. The\nfile is replaced at once; its owner and permissions stay, and symbolic links do.",
		Args: explained(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if r.path == "" {
				return usageError{errors.New("which keyset? say --keyset FILE")}
			}
			switch r.step {
			case "", "add", "promote", "drop":
			default:
				return usageError{fmt.Errorf("--step %q: use add, promote or drop", r.step)}
			}
			if r.leaked && r.step != "drop" {
				return usageError{errors.New("--leaked goes with --step drop")}
			}
			return r.run(cmd.OutOrStdout())
		},
	}
	f := cmd.Flags()
	f.StringVar(&r.path, "keyset", "", "the keyset, a file (required)")
	f.StringVar(&r.step, "step", "", "add, promote or drop")
	f.BoolVar(&r.leaked, "leaked", false, "with drop: others know the old keys, so fingerprints must not come from them either (see docs/operations.md)")
	return cmd
}

// rotation is one step of one.
type rotation struct {
	path, step string
	leaked     bool
}

func (r *rotation) run(stdout io.Writer) error {
	text, before, err := readKeyset(r.path)
	if err != nil {
		return err
	}
	if r.step == "" {
		if r.step, err = nextStep(before); err != nil {
			return usageError{fmt.Errorf("rotating the keyset %s: %w", r.path, err)}
		}
	}
	switch r.step {
	case "add":
		text, err = store.AddKey(text)
	case "promote":
		text, err = store.PromoteKey(text)
	case "drop":
		text, err = store.DropKeys(text, r.leaked)
	}
	if err != nil {
		return fmt.Errorf("rotating the keyset %s: %w", r.path, err)
	}
	after, err := store.ParseKeyset(text)
	if err != nil {
		return fmt.Errorf("reading the changed keyset: %w", err)
	}
	if err := replaceFile(r.path, text); err != nil {
		return fmt.Errorf("replacing the keyset %s: %w", r.path, err)
	}
	was, _ := before.KeyIDs()
	primary, ids := after.KeyIDs()
	again := fmt.Sprintf("\n  broker keyset rotate --keyset %s --step", r.path)
	switch r.step {
	case "add":
		fmt.Fprintf(stdout, "added key %d to %s; key %d still seals\nnext: give the file to all replicas, and when each has loaded it:%s promote\n", ids[len(ids)-1], r.path, primary, again)
	case "promote":
		fmt.Fprintf(stdout, "promoted key %d in %s; key %d still opens what it has sealed\nnext: give the file to all replicas, and when nothing in the store is sealed with an older key, copy the file and run:%s drop\n", primary, r.path, was, again)
	case "drop":
		fmt.Fprintf(stdout, "dropped all keys but %d from %s\nnext: give the file to all replicas; should one report a value that it cannot read, put the copy back\n", primary, r.path)
	}
	return nil
}

// nextStep is what a keyset shows to come next. A drop cannot be undone and is
// never next by itself.
func nextStep(k *store.Keyset) (string, error) {
	primary, ids := k.KeyIDs()
	switch newest := ids[len(ids)-1]; {
	case newest != primary:
		return "promote", nil
	case len(ids) == 1:
		return "add", nil
	}
	return "", fmt.Errorf("key %d is promoted, and it still has older ones: %v; say --step drop when nothing in the store is sealed with those, or --step add to go on to another key", primary, ids[:len(ids)-1])
}

func readKeyset(path string) (broker.Secret, *store.Keyset, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return broker.Secret{}, nil, fmt.Errorf("reading the keyset: %w", err)
	}
	text := broker.NewSecret(string(content))
	k, err := store.ParseKeyset(text)
	if err != nil {
		return broker.Secret{}, nil, fmt.Errorf("reading the keyset %s: %w", path, err)
	}
	return text, k, nil
}

// createFile writes a file that only its owner reads. It does not touch one that
// exists.
func createFile(path string, content broker.Secret) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s exists and was left as it is: use another name, or 'broker keyset rotate' for a new key in it", path)
	}
	if err != nil {
		return err
	}
	if err := writeOut(f, content); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	syncDirectory(filepath.Dir(path))
	return nil
}

// replaceFile gives a file new content at once, so that whoever reads it sees the
// old or the new. Behind symbolic links it is the file that they lead to.
func replaceFile(path string, content broker.Secret) error {
	target, err := filepath.EvalSymlinks(path)
	if err != nil {
		return err
	}
	info, err := os.Stat(target)
	if err != nil {
		return err
	}
	directory := filepath.Dir(target)
	f, err := os.CreateTemp(directory, ".keyset-*") // with mode 0600
	if err != nil {
		return fmt.Errorf("the directory %s cannot be written: %w; where the file is mounted read-only, as Kubernetes does, rotate a copy and replace the Secret with it", directory, err)
	}
	return replaceBy(f, target, info, info.Mode().Perm(), content)
}

// replaceBy has a new file f beside target take its place, under the owner that
// info tells, or ours if it is nil, and with this mode.
func replaceBy(f *os.File, target string, info fs.FileInfo, mode fs.FileMode, content broker.Secret) error {
	err := prepare(f, info, mode)
	if err != nil {
		err = errors.Join(err, f.Close())
	} else {
		err = writeOut(f, content)
	}
	if err == nil {
		err = os.Rename(f.Name(), target)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	syncDirectory(filepath.Dir(target))
	return nil
}

// prepare gives a new file the owner that info tells, if any, and this mode.
func prepare(f *os.File, info fs.FileInfo, mode fs.FileMode) error {
	if info != nil {
		if err := keepOwner(f, info); err != nil {
			return err
		}
	}
	return f.Chmod(mode)
}

// writeOut writes all of a file, to the disk, and closes it.
func writeOut(f *os.File, content broker.Secret) error {
	_, err := f.WriteString(content.Reveal())
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// syncDirectory makes a new name in a directory survive a crash, where the system
// can do that.
func syncDirectory(path string) {
	if d, err := os.Open(path); err == nil {
		_ = d.Sync() // the file itself is on the disk
		_ = d.Close()
	}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
