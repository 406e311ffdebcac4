package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// demand holds what token, refresh and watch have in common.
type demand struct {
	client
	scopes      []string
	minLifetime time.Duration
	job         string
	dedicated   bool
	output      string
}

func (d *demand) flags(cmd *cobra.Command) {
	d.client.flags(cmd)
	d.tokenFlags(cmd)
}

// tokenFlags say which token it is, and how it is shown.
func (d *demand) tokenFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringSliceVar(&d.scopes, "scope", nil, "a scope of the profile, to get a token for fewer than all; may be repeated")
	f.DurationVar(&d.minLifetime, "min-lifetime", 0, "how long the token must still live, for example 10m")
	f.Var((*jobID)(&d.job), "job", "id of the batch job that asks, the same one for each try of the same work")
	f.BoolVar(&d.dedicated, "dedicated", false, "a token of the job's own, shared with no other")
	f.StringVar(&d.output, "output", "token", "token, json, or header")
}

// check finds mistakes before anything is asked.
func (d *demand) check() error {
	if _, ok := printers[d.output]; !ok {
		return usageError{fmt.Errorf("--output %q: use token, json or header", d.output)}
	}
	for _, s := range append([]string{d.job}, d.scopes...) {
		if !utf8.ValidString(s) {
			return usageError{fmt.Errorf("--job and --scope take text: %q is not valid UTF-8", s)}
		}
	}
	return hasJob(d.dedicated, d.job)
}

func (d *demand) lifetime() *durationpb.Duration {
	if d.minLifetime == 0 {
		return nil
	}
	return durationpb.New(d.minLifetime)
}

func (d *demand) jobMessage() *pb.Job {
	if d.job == "" && !d.dedicated {
		return nil
	}
	return &pb.Job{Id: d.job, Dedicated: d.dedicated}
}

func newToken() *cobra.Command {
	var d demand
	var file string
	cmd := &cobra.Command{
		Use:     "token PROFILE",
		Short:   "Print an access token of a profile",
		Long:    "Print an access token of a profile, or write it into a file, for programs that only\nread files.\n\n" + aboutTheFile,
		Example: "  broker token invoices\n  broker token invoices --job nightly-import --dedicated --file /run/token/invoices\n  curl -H \"$(broker token invoices --output header)\" https://vantage-eu.abbyy.com/api/publicapi/v1/skills",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := d.check(); err != nil {
				return err
			}
			to := tokenFile(file)
			if err := to.check(); err != nil {
				return err
			}
			return d.call(cmd, func(ctx context.Context, conn grpc.ClientConnInterface) error {
				r, err := pb.NewTokenBrokerClient(conn).IssueToken(ctx, &pb.IssueTokenRequest{
					Profile: args[0], Scopes: d.scopes, MinLifetime: d.lifetime(), Job: d.jobMessage(),
				})
				if err != nil {
					return err
				}
				if to != "" {
					return to.write(d.output, r.GetToken(), r.GetSource())
				}
				return printers[d.output](cmd.OutOrStdout(), r.GetToken(), r.GetSource())
			})
		},
	}
	d.flags(cmd)
	fileFlag(cmd, &file)
	return cmd
}

func newRefresh() *cobra.Command {
	var d demand
	var rejected string
	cmd := &cobra.Command{
		Use:     "refresh PROFILE --rejected ID",
		Short:   "Report a token that a resource server refused, and print another one",
		Long:    "Report a token that a resource server refused, and print another one. Only if the\nreported token is still the current one is a new one obtained.",
		Example: "  broker refresh invoices --rejected 9f86d081884c7d65",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := d.check(); err != nil {
				return err
			}
			if rejected == "" {
				return usageError{errors.New("which token was refused? say --rejected ID")}
			}
			return d.call(cmd, func(ctx context.Context, conn grpc.ClientConnInterface) error {
				r, err := pb.NewTokenBrokerClient(conn).RefreshToken(ctx, &pb.RefreshTokenRequest{
					Profile: args[0], Scopes: d.scopes, MinLifetime: d.lifetime(), Job: d.jobMessage(), RejectedTokenId: rejected,
				})
				if err != nil {
					return err
				}
				return printers[d.output](cmd.OutOrStdout(), r.GetToken(), r.GetSource())
			})
		},
	}
	d.flags(cmd)
	cmd.Flags().StringVar(&rejected, "rejected", "", "id of the refused token: the first 16 hex digits of its SHA-256, as --output json shows it (required)")
	return cmd
}

// printers by the name that --output has for them.
var printers = map[string]func(io.Writer, *pb.Token, pb.Source) error{
	"token": func(w io.Writer, t *pb.Token, _ pb.Source) error {
		_, err := fmt.Fprintln(w, t.GetAccessToken())
		return err
	},
	"header": func(w io.Writer, t *pb.Token, _ pb.Source) error {
		_, err := fmt.Fprintf(w, "Authorization: %s %s\n", t.GetTokenType(), t.GetAccessToken())
		return err
	},
	"json": func(w io.Writer, t *pb.Token, s pb.Source) error {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(struct {
			AccessToken string    `json:"access_token"`
			TokenType   string    `json:"token_type"`
			ID          string    `json:"id"`
			Scopes      []string  `json:"scopes"`
			IssueTime   time.Time `json:"issue_time"`
			RefreshTime time.Time `json:"refresh_time"`
			ExpireTime  time.Time `json:"expire_time"`
			Source      string    `json:"source"`
		}{
			t.GetAccessToken(), t.GetTokenType(), t.GetId(), t.GetScopes(),
			t.GetIssueTime().AsTime(), t.GetRefreshTime().AsTime(), t.GetExpireTime().AsTime(), word(s, "SOURCE_"),
		})
	},
}
