// Command broker gets OAuth 2.0 access tokens for named credential profiles and
// hands them to everything a company runs, over gRPC.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit statuses.
const (
	exitFailure = 1 // it was tried and did not work
	exitUsage   = 2 // a bad config, or bad arguments
)

func main() {
	if err := harden(); err != nil { // a sandbox may forbid it; that is no reason not to serve
		fmt.Fprintf(os.Stderr, "broker: a crash may leave secrets in a core dump: %v\n", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// run is the program, from its arguments to its exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var told alreadyTold
	if !errors.As(err, &told) {
		fmt.Fprintf(stderr, "broker: %v\n", err)
	}
	var usage usageError
	if errors.As(err, &usage) {
		return exitUsage
	}
	return exitFailure
}

// usageError is a mistake in how the program is used; what it is used on was
// not touched.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// alreadyTold is an error that has been printed.
type alreadyTold struct{ error }

func (e alreadyTold) Unwrap() error { return e.error }

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "broker",
		Short:         "Gets OAuth 2.0 access tokens for named profiles and hands them out over gRPC",
		Long:          "Token Broker gets OAuth 2.0 access tokens for named credential profiles and hands\nthem to everything a company runs, over gRPC. See it at work: broker dev",
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          explained(cobra.NoArgs),
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
		// Flags of a command that does not exist must not hide that it does not.
		FParseErrWhitelist: cobra.FParseErrWhitelist{UnknownFlags: true},
	}
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see '%s --help'", err, c.CommandPath())}
	})
	root.AddGroup(
		&cobra.Group{ID: "server", Title: "Servers:"},
		&cobra.Group{ID: "caller", Title: "For callers:"},
		&cobra.Group{ID: "operator", Title: "For operators:"},
	)
	add := func(group string, commands ...*cobra.Command) {
		for _, c := range commands {
			c.GroupID = group
			c.Args = explained(c.Args)
			root.AddCommand(c)
		}
	}
	add("server", newDev(), newServe(), newCheck(), newSandbox(), newHealthcheck())
	add("caller", newToken(), newWatch(), newRefresh(), newRevoke(), newWhoami())
	add("operator", newProfiles(), newAuthorize(), newReset(), newClient(), newSecret(), newKeyset())
	root.AddCommand(newVersion())
	return root
}

// explained turns complaints about arguments into usage errors.
func explained(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if check == nil {
			check = cobra.NoArgs
		}
		if err := check(c, args); err != nil {
			return usageError{fmt.Errorf("%w; see '%s --help'", err, c.CommandPath())}
		}
		return nil
	}
}
