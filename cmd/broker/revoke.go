package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// revocation is which token to revoke, and how to tell what became of it.
type revocation struct {
	client
	scopes    []string
	job       string
	dedicated bool
	token     string
	output    string
}

func newRevoke() *cobra.Command {
	var v revocation
	cmd := &cobra.Command{
		Use:   "revoke PROFILE",
		Short: "Make a token useless before its time",
		Long: "Make a token useless before its time: no replica hands it out any more, and the\nauthorization server is asked to revoke it.\n\n" +
			"Without --job it is the token that everybody shares; whoever asks next gets a new one.\n" +
			"With --job it is the dedicated token of that job alone, and the job ends with it: it\ngets no other one until that token would have ended by itself.",
		Example: "  broker revoke invoices\n  broker revoke invoices --token 9f86d081884c7d65\n  broker revoke invoices --job nightly/2026-01-31",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := v.check(); err != nil {
				return err
			}
			request := &pb.RevokeTokenRequest{Profile: args[0], Scopes: v.scopes, TokenId: v.token}
			if v.job != "" {
				// Never the token that everybody shares, whatever the flags: who ends
				// a job must not end all the others.
				request.Job = &pb.Job{Id: v.job, Dedicated: true}
			}
			return v.call(cmd, func(ctx context.Context, conn grpc.ClientConnInterface) error {
				r, err := pb.NewTokenBrokerClient(conn).RevokeToken(ctx, request)
				if err != nil {
					return err
				}
				if v.output == "json" {
					return revokedJSON(cmd.OutOrStdout(), request, r)
				}
				_, err = fmt.Fprintln(cmd.OutOrStdout(), revokedText(request, r))
				return err
			})
		},
	}
	v.flags(cmd)
	f := cmd.Flags()
	f.StringSliceVar(&v.scopes, "scope", nil, "a scope that the token was asked for with; may be repeated")
	f.Var((*jobID)(&v.job), "job", "id of a batch job: revokes the job's own, dedicated token, and ends the job")
	f.BoolVar(&v.dedicated, "dedicated", false, "with --job, which means the job's own token in any case")
	f.StringVar(&v.token, "token", "", "id of the token, as token --output json shows it; by default the current one")
	f.StringVar(&v.output, "output", "text", "text or json")
	return cmd
}

// check finds mistakes before anything is asked.
func (v *revocation) check() error {
	if v.output != "text" && v.output != "json" {
		return usageError{fmt.Errorf("--output %q: use text or json", v.output)}
	}
	for _, s := range append([]string{v.job, v.token}, v.scopes...) {
		if !utf8.ValidString(s) {
			return usageError{errors.New("--job, --scope and --token take text: one is not valid UTF-8")}
		}
	}
	return hasJob(v.dedicated, v.job)
}

// revokedText tells people which of the two happened.
func revokedText(request *pb.RevokeTokenRequest, r *pb.RevokeTokenResponse) string {
	whose := "profile " + request.GetProfile()
	if request.GetJob() != nil {
		whose = "job " + request.GetJob().GetId() + " of " + whose
	}
	switch {
	case r.GetTokenId() == "":
		return whose + " has no token to revoke"
	case r.GetOutcome() == pb.RevocationOutcome_REVOCATION_OUTCOME_CONFIRMED:
		return fmt.Sprintf("token %s of %s: dropped here and revoked at the authorization server", r.GetTokenId(), whose)
	}
	return fmt.Sprintf("token %s of %s: dropped here; the authorization server did not confirm it, so whoever holds a copy can use it until it ends", r.GetTokenId(), whose)
}

// revokedJSON tells programs the same.
func revokedJSON(w io.Writer, request *pb.RevokeTokenRequest, r *pb.RevokeTokenResponse) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(struct {
		Profile string `json:"profile"`
		Job     string `json:"job,omitempty"`
		TokenID string `json:"token_id"`
		Outcome string `json:"outcome"`
	}{request.GetProfile(), request.GetJob().GetId(), r.GetTokenId(), word(r.GetOutcome(), "REVOCATION_OUTCOME_")})
}
