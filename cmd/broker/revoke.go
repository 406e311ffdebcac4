package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

func newRevoke() *cobra.Command {
	var c client
	var scopes []string
	var id string
	cmd := &cobra.Command{
		Use:     "revoke PROFILE",
		Short:   "Make a token useless before its time",
		Long:    "Make a token useless before its time: no replica hands it out any more, and the\nauthorization server is asked to revoke it. Whoever asks next gets a new one.",
		Example: "  broker revoke invoices\n  broker revoke invoices --token 9f86d081884c7d65",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd, func(ctx context.Context, conn grpc.ClientConnInterface) error {
				r, err := pb.NewTokenBrokerClient(conn).RevokeToken(ctx, &pb.RevokeTokenRequest{Profile: args[0], Scopes: scopes, TokenId: id})
				if err != nil {
					return err
				}
				said := "dropped here; the authorization server did not confirm it, so whoever holds a copy can use it until it ends"
				switch {
				case r.GetTokenId() == "":
					_, err = fmt.Fprintf(cmd.OutOrStdout(), "profile %s has no token to revoke\n", args[0])
					return err
				case r.GetOutcome() == pb.RevocationOutcome_REVOCATION_OUTCOME_CONFIRMED:
					said = "dropped here and revoked at the authorization server"
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "token %s of profile %s: %s\n", r.GetTokenId(), args[0], said)
				return err
			})
		},
	}
	c.flags(cmd)
	cmd.Flags().StringSliceVar(&scopes, "scope", nil, "a scope that the token was asked for with; may be repeated")
	cmd.Flags().StringVar(&id, "token", "", "id of the token, as token --output json shows it; by default the current one")
	return cmd
}
