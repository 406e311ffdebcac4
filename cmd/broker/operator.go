package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

func newProfiles() *cobra.Command {
	var c client
	var output string
	cmd := &cobra.Command{
		Use:   "profiles [NAME]",
		Short: "Show how the profiles fare, or all about one",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if output != "table" && output != "json" {
				return usageError{fmt.Errorf("--output %q: use table or json", output)}
			}
			var profiles []*pb.Profile
			err := c.call(cmd, func(ctx context.Context, conn grpc.ClientConnInterface) (err error) {
				admin := pb.NewProfileAdminClient(conn)
				if len(args) == 1 {
					r, err := admin.GetProfile(ctx, &pb.GetProfileRequest{Profile: args[0]})
					profiles = []*pb.Profile{r.GetProfile()}
					return err
				}
				profiles, err = listAll(ctx, admin)
				return err
			})
			if err != nil {
				return err
			}
			w := cmd.OutOrStdout()
			switch {
			case output == "json":
				return printJSON(w, profiles)
			case len(args) == 1:
				return printProfile(w, profiles[0])
			}
			return printTable(w, profiles)
		},
	}
	c.flags(cmd)
	cmd.Flags().StringVar(&output, "output", "table", "table or json")
	return cmd
}

func listAll(ctx context.Context, admin pb.ProfileAdminClient) (all []*pb.Profile, err error) {
	for token := ""; ; {
		r, err := admin.ListProfiles(ctx, &pb.ListProfilesRequest{PageToken: token})
		if err != nil {
			return nil, err
		}
		all = append(all, r.GetProfiles()...)
		if token = r.GetNextPageToken(); token == "" {
			return all, nil
		}
	}
}

func printJSON(w io.Writer, profiles []*pb.Profile) error {
	raw := make([]json.RawMessage, len(profiles))
	for i, p := range profiles { // a Profile holds no secret
		b, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(p)
		if err != nil {
			return err
		}
		raw[i] = b
	}
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(raw)
}

func printTable(w io.Writer, profiles []*pb.Profile) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "PROFILE\tPROVIDER\tGRANT\tSTATE\tTOKEN\tEXPIRES")
	for _, p := range profiles {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", p.GetName(), word(p.GetProvider(), "PROVIDER_"), word(p.GetGrantType(), "GRANT_TYPE_"),
			word(p.GetState(), "STATE_"), or(p.GetTokenId(), "-"), distance(p.GetExpireTime()))
	}
	return t.Flush()
}

func printProfile(w io.Writer, p *pb.Profile) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	row := func(name, value string) { fmt.Fprintf(t, "%s\t%s\n", name, value) }
	row("profile", p.GetName())
	row("provider", word(p.GetProvider(), "PROVIDER_"))
	row("grant", word(p.GetGrantType(), "GRANT_TYPE_"))
	row("scopes", or(strings.Join(p.GetScopes(), " "), "-"))
	row("state", word(p.GetState(), "STATE_")+": "+p.GetStateText())
	if p.GetTokenId() != "" {
		row("token", p.GetTokenId())
		row("issued", instant(p.GetIssueTime()))
		row("renewed by", instant(p.GetRefreshTime()))
		row("expires", instant(p.GetExpireTime()))
	}
	if p.GetConsentStartTime() != nil {
		row("signed in", or(p.GetConsentAccount(), "an account that the server does not name")+", "+instant(p.GetConsentStartTime()))
	}
	if p.GetConsentEndTime() != nil {
		row("sign in again by", instant(p.GetConsentEndTime()))
	}
	if p.GetLastCaller() != "" {
		row("last caller", p.GetLastCaller()+", "+instant(p.GetLastCallTime()))
	}
	if e := p.GetLastError(); e != nil {
		row("last error", e.GetMessage())
		row("reason", word(e.GetReason(), "ERROR_REASON_"))
		row("failed", fmt.Sprintf("%s, %d in a row", instant(e.GetErrorTime()), e.GetAttempts()))
		next := "never by itself"
		if e.GetNextAttemptTime() != nil {
			next = instant(e.GetNextAttemptTime())
		}
		row("next attempt", next)
	}
	return t.Flush()
}

func newReset() *cobra.Command {
	var c client
	cmd := &cobra.Command{
		Use:   "reset PROFILE",
		Short: "Forget a remembered failure, after its cause is mended",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, conn grpc.ClientConnInterface) error {
				r, err := pb.NewProfileAdminClient(conn).ResetProfile(ctx, &pb.ResetProfileRequest{Profile: args[0]})
				if err != nil {
					return err
				}
				return printProfile(cmd.OutOrStdout(), r.GetProfile())
			})
		},
	}
	c.flags(cmd)
	return cmd
}

func newWhoami() *cobra.Command {
	var c client
	var output string
	cmd := &cobra.Command{
		Use:   "whoami",
		Short: "Show how the broker sees you, what you may use, and which rules say so",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "table" && output != "json" {
				return usageError{fmt.Errorf("--output %q: use table or json", output)}
			}
			var who *pb.WhoAmIResponse
			err := c.call(cmd, func(ctx context.Context, conn grpc.ClientConnInterface) (err error) {
				who, err = pb.NewTokenBrokerClient(conn).WhoAmI(ctx, &pb.WhoAmIRequest{})
				return err
			})
			if err != nil {
				return err
			}
			if output == "json" {
				return printWhoJSON(cmd.OutOrStdout(), who)
			}
			return printWho(cmd.OutOrStdout(), who)
		},
	}
	c.flags(cmd)
	cmd.Flags().StringVar(&output, "output", "table", "table or json")
	return cmd
}

func printWhoJSON(w io.Writer, who *pb.WhoAmIResponse) error {
	b, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(who) // it holds no secret
	if err != nil {
		return err
	}
	e := json.NewEncoder(w) // protojson's own blanks differ from build to build
	e.SetIndent("", "  ")
	return e.Encode(json.RawMessage(b))
}

func printWho(w io.Writer, who *pb.WhoAmIResponse) error {
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintf(t, "caller\t%s\nproven by\t%s\n", who.GetCaller(), word(who.GetProof(), "IDENTITY_PROOF_"))
	if who.GetForwarder() != "" {
		fmt.Fprintf(t, "forwarded by\t%s\n", who.GetForwarder())
	}
	fmt.Fprintf(t, "request\t%s\n", who.GetRequestId())
	if len(who.GetPermissions()) == 0 {
		fmt.Fprintln(t, "may use\tnothing: no policy rule allows this caller anything")
		return t.Flush()
	}
	fmt.Fprintln(t, "\nPROFILE\tMAY\tBY\tSCOPES")
	for _, p := range who.GetPermissions() {
		for _, row := range grantRows(p) {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", p.GetProfile(), strings.Join(row.operations, " "), row.rule, or(row.scopes, "any"))
		}
	}
	return t.Flush()
}

// grantRow is what one rule grants, with the same limit.
type grantRow struct {
	operations   []string
	rule, scopes string
}

// grantRows has a row per rule; admin, which scopes do not limit, may have one of
// its own.
func grantRows(p *pb.Permission) (rows []*grantRow) {
	for _, g := range p.GetGrants() {
		rule, scopes := g.GetRule(), strings.Join(g.GetScopes(), " ")
		i := slices.IndexFunc(rows, func(r *grantRow) bool { return r.rule == rule && r.scopes == scopes })
		if i < 0 {
			i, rows = len(rows), append(rows, &grantRow{rule: rule, scopes: scopes})
		}
		rows[i].operations = append(rows[i].operations, word(g.GetOperation(), "OPERATION_"))
	}
	return rows
}

// word is an enum value as people write it.
func word(value fmt.Stringer, prefix string) string {
	return strings.ToLower(strings.TrimPrefix(value.String(), prefix))
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

func instant(t *timestamppb.Timestamp) string {
	return t.AsTime().Format(time.RFC3339) + " (" + distance(t) + ")"
}

// distance from now, in words.
func distance(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	d := time.Until(t.AsTime()).Round(time.Second)
	if d < 0 {
		return (-d).String() + " ago"
	}
	return "in " + d.String()
}
