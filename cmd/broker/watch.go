package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	brokerclient "github.com/tokenbroker/tokenbroker/client"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// watch follows a token, on standard output or in a file.
type watch struct {
	demand
	file   tokenFile
	remove bool

	stdout, stderr io.Writer
	said           string      // the kind of trouble that was told last; empty since a token came
	wrote          fs.FileInfo // the file as it was written last; nil before
}

func newWatch() *cobra.Command {
	var w watch
	var file string
	cmd := &cobra.Command{
		Use:   "watch PROFILE",
		Short: "Print a token and each of its successors, or keep them in a file",
		Long: "Print a token and each of its successors as soon as there is one, until interrupted;\nor keep the current one in a file, for programs that only read files.\n\n" + aboutTheFile + `

While the broker is away the last token stays; when it is back, watch goes on by
itself. With --file one line on standard error says that the first token is there.

The exit status is 0 when it is interrupted (SIGINT, SIGTERM), and when the job whose
token it follows is ended (broker revoke). It is 1 when the broker refuses the first
token for good, or that cannot be written. After the first token watch never gives up:
it says what is wrong and tries again. The file stays when watch ends, so that a
restart of watch takes nothing from who reads it; --remove removes it.`,
		Example: "  broker watch invoices --file /run/token/invoices\n  broker watch invoices --output header --file /run/token/header   # curl -H @/run/token/header …",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			w.file, w.stdout, w.stderr = tokenFile(file), cmd.OutOrStdout(), cmd.ErrOrStderr()
			if w.remove && file == "" {
				return usageError{errors.New("--remove goes with --file")}
			}
			if err := errors.Join(w.check(), w.file.check()); err != nil {
				return err
			}
			b, err := w.connect()
			if err != nil {
				return err
			}
			defer b.Close()
			return w.run(cmd.Context(), b.TokenSource(args[0], w.options()...))
		},
	}
	w.connectionFlags(cmd)
	w.tokenFlags(cmd)
	fileFlag(cmd, &file)
	cmd.Flags().BoolVar(&w.remove, "remove", false, "remove the file at the end")
	return cmd
}

// options are the demand's, for a token source.
func (d *demand) options() []brokerclient.TokenOption {
	o := []brokerclient.TokenOption{brokerclient.WithScopes(d.scopes...), brokerclient.WithMinLifetime(d.minLifetime)}
	if d.dedicated {
		return append(o, brokerclient.WithDedicatedJob(d.job))
	}
	return append(o, brokerclient.WithJob(d.job))
}

// pauseAfterTrouble is how long watch waits before it asks again. The token source
// has its own back-off towards the broker.
const pauseAfterTrouble = 5 * time.Second

// run follows the source until ctx ends, or there is no sense in it.
func (w *watch) run(ctx context.Context, source *brokerclient.TokenSource) error {
	defer w.leave()
	var current *brokerclient.Token
	for {
		next, err := source.Next(ctx, current)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			if err = w.show(next); err == nil {
				if current == nil && w.file != "" {
					fmt.Fprintf(w.stderr, "broker: %s has token %s, until %s\n", w.file, next.ID, next.ExpireTime.Format(time.RFC3339))
				}
				current, w.said = next, ""
				continue
			}
			if current == nil || w.file == "" {
				return err
			}
			w.tell("file", err)
		} else if e, ok := brokerclient.FromError(err); ok {
			err = w.explain(err)
			switch {
			case current == nil && e.Final():
				return err
			case current != nil && e.Reason == brokerclient.ReasonJobEnded:
				fmt.Fprintf(w.stderr, "broker: %v\n", err)
				return nil
			}
			w.tell(e.Code.String()+string(e.Reason), err)
		}
		select {
		case <-time.After(pauseAfterTrouble):
		case <-ctx.Done():
			return nil
		}
	}
}

// show prints a token, or writes it into the file.
func (w *watch) show(t *brokerclient.Token) error {
	message := &pb.Token{
		AccessToken: t.AccessToken(), TokenType: t.Type(), Id: t.ID, Scopes: t.Scopes,
		IssueTime: timestamppb.New(t.IssueTime), RefreshTime: timestamppb.New(t.RefreshTime), ExpireTime: timestamppb.New(t.ExpireTime),
	}
	if w.file == "" {
		return printers[w.output](w.stdout, message, t.Source)
	}
	if err := w.file.write(w.output, message, t.Source); err != nil {
		return err
	}
	w.wrote, _ = os.Lstat(string(w.file)) // nil: somebody has removed it already
	return nil
}

// tell says what is wrong, once for each kind.
func (w *watch) tell(kind string, err error) {
	if kind != w.said {
		w.said = kind
		fmt.Fprintf(w.stderr, "broker: %v\n", err)
	}
}

// leave removes the file if it is to be removed, and still the one that was written.
func (w *watch) leave() {
	if !w.remove || w.wrote == nil {
		return
	}
	if is, err := os.Lstat(string(w.file)); err != nil || !os.SameFile(is, w.wrote) {
		return
	}
	if err := os.Remove(string(w.file)); err != nil {
		fmt.Fprintf(w.stderr, "broker: removing the token: %v\n", err)
	}
}
