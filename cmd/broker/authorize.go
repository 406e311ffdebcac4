package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// authorize is a person's sign-in, as seen from a terminal.
type authorize struct {
	client
	noBrowser      bool
	paste          bool
	replaceAccount bool
}

func newAuthorize() *cobra.Command {
	var a authorize
	cmd := &cobra.Command{
		Use:   "authorize PROFILE",
		Short: "Sign in for a profile that needs a person, in the browser",
		Long: "Sign in for a profile of the grant authorization_code. Opens the browser at the\nauthorization server and waits until the browser has come back to the broker, which\n" +
			"gets the tokens. Where the browser cannot reach the broker, --paste reads the address\nthat the browser ended at, from standard input, and hands over what is in it.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if a.replaceAccount && !a.paste {
				return usageError{errors.New("--replace-account goes with --paste; in the browser, the broker asks")}
			}
			a.timeout = 11 * time.Minute // the sign-in ends by itself before
			return a.call(cmd, func(ctx context.Context, conn grpc.ClientConnInterface) error {
				return a.run(ctx, cmd, pb.NewProfileAdminClient(conn), args[0])
			})
		},
	}
	a.connectionFlags(cmd)
	cmd.Flags().BoolVar(&a.noBrowser, "no-browser", false, "only print the address")
	cmd.Flags().BoolVar(&a.paste, "paste", false, "read the address that the browser ended at from standard input")
	cmd.Flags().BoolVar(&a.replaceAccount, "replace-account", false, "replace a working grant of another account")
	return cmd
}

func (a *authorize) run(ctx context.Context, cmd *cobra.Command, admin pb.ProfileAdminClient, profile string) error {
	before, err := admin.GetProfile(ctx, &pb.GetProfileRequest{Profile: profile})
	if err != nil {
		return err
	}
	began, err := admin.StartAuthorization(ctx, &pb.StartAuthorizationRequest{Profile: profile})
	if err != nil {
		return err
	}
	w := cmd.ErrOrStderr()
	fmt.Fprintf(w, "Sign in for %s at\n\n  %s\n\nbefore %s. The address is for you alone: whoever opens it can sign in with an account of theirs.\n",
		profile, began.GetAuthorizationUrl(), instant(began.GetExpireTime()))
	if !a.noBrowser {
		if err := openBrowser(ctx, began.GetAuthorizationUrl()); err != nil {
			fmt.Fprintf(w, "No browser opened (%v): open the address yourself.\n", err)
		}
	}
	var after *pb.Profile
	if a.paste {
		after, err = a.complete(ctx, w, cmd.InOrStdin(), admin, began.GetState())
	} else {
		fmt.Fprintln(w, "Waiting for the browser to come back to the broker; --paste is for browsers that cannot reach it.")
		after, err = awaitConsent(ctx, admin, before.GetProfile(), began.GetExpireTime().AsTime())
	}
	if err != nil {
		return err
	}
	return printProfile(cmd.OutOrStdout(), after)
}

// complete hands over what the browser brought back to an address that may not
// have answered.
func (a *authorize) complete(ctx context.Context, w io.Writer, in io.Reader, admin pb.ProfileAdminClient, state string) (*pb.Profile, error) {
	fmt.Fprint(w, "Paste the address that the browser ended at: ")
	line, err := bufio.NewReader(io.LimitReader(in, 16<<10)).ReadString('\n')
	if err != nil && line == "" {
		return nil, fmt.Errorf("reading the address: %w", err)
	}
	r, err := callbackOf(line, state)
	if err != nil {
		return nil, err
	}
	r.ReplaceAccount = a.replaceAccount
	done, err := admin.CompleteAuthorization(ctx, r)
	return done.GetProfile(), err
}

// callbackOf reads the address that a sign-in ended at. Its errors do not repeat
// the address, which may hold a code.
func callbackOf(address, state string) (*pb.CompleteAuthorizationRequest, error) {
	u, err := url.Parse(strings.TrimSpace(address))
	if err != nil {
		return nil, errors.New("this is no address: copy all of the browser's address bar, from http on")
	}
	query := u.Query()
	switch {
	case query.Get("error") != "":
		return nil, fmt.Errorf("the authorization server refused the sign-in: %q %q; start again", query.Get("error"), query.Get("error_description"))
	case query.Get("code") == "":
		return nil, errors.New("there is no code in this address: sign in until the browser ends at the redirect URL, then copy all of its address bar")
	case query.Get("state") != state:
		return nil, errors.New("this is the end of another sign-in: start again, and use the address that is printed then")
	}
	return &pb.CompleteAuthorizationRequest{State: state, Code: query.Get("code"), Iss: query.Get("iss")}, nil
}

// consentClock is by how much two readings of one consent's start may differ: it
// is kept as an age.
const consentClock = 5 * time.Second

// awaitConsent returns the profile once its consent is a later one than before, or
// its token one that nobody's consent renews.
func awaitConsent(ctx context.Context, admin pb.ProfileAdminClient, before *pb.Profile, until time.Time) (*pb.Profile, error) {
	poll := time.NewTicker(time.Second)
	defer poll.Stop()
	for time.Now().Before(until) {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-poll.C:
		}
		r, err := admin.GetProfile(ctx, &pb.GetProfileRequest{Profile: before.GetName()})
		if err != nil {
			return nil, err
		}
		now := r.GetProfile()
		switch start := now.GetConsentStartTime(); {
		case start != nil && start.AsTime().Sub(before.GetConsentStartTime().AsTime()) > consentClock,
			start == nil && now.GetTokenId() != "" && now.GetTokenId() != before.GetTokenId():
			return now, nil
		}
	}
	return nil, errors.New("nobody has signed in within ten minutes: start again")
}

// openBrowser opens the system's browser and does not wait for it.
func openBrowser(ctx context.Context, address string) error {
	command := map[string][]string{
		"darwin":  {"open"},
		"windows": {"rundll32", "url.dll,FileProtocolHandler"},
	}[runtime.GOOS]
	if command == nil {
		command = []string{"xdg-open"}
	}
	cmd := exec.CommandContext(ctx, command[0], append(command[1:], address)...)
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }()
	return nil
}
