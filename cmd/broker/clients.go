package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

func newClient() *cobra.Command {
	cmd := &cobra.Command{Use: "client", Short: "Create API clients at ABBYY Vantage", Args: cobra.NoArgs, RunE: help}
	cmd.AddCommand(newClientCreate())
	return cmd
}

func help(c *cobra.Command, _ []string) error { return c.Help() }

func newClientCreate() *cobra.Command {
	var c client
	r := &pb.CreateClientRequest{}
	var remember, logout, secret bool
	var access, refresh days
	cmd := &cobra.Command{
		Use:   "create PROFILE --client-id ID --grant GRANT",
		Short: "Create a client, by the right of a profile's token",
		Long: "Create an API client in a Vantage tenant. The owner of the profile's token must be a\nTenant Administrator. The client has no secret yet: broker secret create makes one.\n" +
			"It is tried once; when the answer is lost, the client may exist.",
		Example: "  broker client create tenant-admin --client-id invoices --grant client_credentials",
		Args:    explained(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Profile = args[0]
			for flag, field := range map[string]struct {
				to   **bool
				from *bool
			}{
				"allow-remember-consent":               {&r.AllowRememberConsent, &remember},
				"back-channel-logout-session-required": {&r.BackChannelLogoutSessionRequired, &logout},
				"require-client-secret":                {&r.RequireClientSecret, &secret},
			} {
				if cmd.Flags().Changed(flag) {
					*field.to = field.from
				}
			}
			r.AccessTokenLifetime, r.RefreshTokenLifetime = access.message(), refresh.message()
			return c.call(cmd, func(ctx context.Context, conn grpc.ClientConnInterface) error {
				out, err := pb.NewProfileAdminClient(conn).CreateClient(ctx, r)
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "client %s of tenant %s was created; it has no secret yet: broker secret create %s --client-id %s\n",
					out.GetClientId(), out.GetTenantId(), r.Profile, out.GetClientId())
				return err
			})
		},
	}
	c.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&r.TenantId, "tenant-id", "", "the tenant; by default the profile's")
	f.StringVar(&r.ClientId, "client-id", "", "the client's identifier; required")
	f.StringVar(&r.ClientName, "client-name", "", "the name that people see; by default the identifier")
	f.StringSliceVar(&r.AllowedGrantTypes, "grant", nil, "a grant that it may use: authorization_code, client_credentials or password; may be repeated; required")
	f.StringSliceVar(&r.AllowedScopes, "scope", nil, "a scope that it may ask for; may be repeated; by default openid, permissions and publicapi.all")
	f.StringArrayVar(&r.RedirectUris, "redirect-uri", nil, "where browsers may be sent after a sign-in; may be repeated")
	f.StringArrayVar(&r.PostLogoutRedirectUris, "post-logout-redirect-uri", nil, "where browsers may be sent after a sign-out; may be repeated")
	f.StringArrayVar(&r.AllowedCorsOrigins, "cors-origin", nil, "an origin from which browsers may call; may be repeated")
	f.BoolVar(&r.AllowOfflineAccess, "allow-offline-access", false, "it gets refresh tokens")
	f.BoolVar(&remember, "allow-remember-consent", true, "people may have their consent remembered")
	f.BoolVar(&logout, "back-channel-logout-session-required", true, "back-channel logout needs a session id")
	f.BoolVar(&secret, "require-client-secret", true, "it needs a secret")
	f.BoolVar(&r.RequireConsent, "require-consent", false, "people are asked for their consent")
	f.BoolVar(&r.AllowNoPkce, "allow-no-pkce", false, "the authorization code may be used without PKCE")
	f.Var(&access, "access-token-lifetime", "how long access tokens live, as 30d or 12h; by default 24h")
	f.Var(&refresh, "refresh-token-lifetime", "how long refresh tokens live, as 30d or 12h; by default 30d")
	return cmd
}

// secretTakes is enough for a token, a new secret and its proofs.
const secretTakes = 2 * time.Minute

func newSecret() *cobra.Command {
	cmd := &cobra.Command{Use: "secret", Short: "Create and rotate client secrets at ABBYY Vantage", Args: cobra.NoArgs, RunE: help}
	cmd.AddCommand(newSecretCreate(), newSecretRotate())
	return cmd
}

func newSecretCreate() *cobra.Command {
	var c client
	r := &pb.CreateClientSecretRequest{}
	var starts, expires days
	cmd := &cobra.Command{
		Use:   "create PROFILE --client-id ID",
		Short: "Create a secret for a client, by the right of a profile's token",
		Long: "Create one more secret for a client of a Vantage tenant. With --deliver-to its value\ngoes straight to where that profile reads it, and nobody sees it. Otherwise it is\n" +
			"printed, alone, on stdout, this once: nobody can show it again. It is tried once; when\nthe answer is lost, a secret may exist that nobody knows.",
		Example: "  broker secret create tenant-admin --client-id invoices --deliver-to invoices\n  broker secret create tenant-admin --client-id other --expires 90d > secret",
		Args:    explained(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Profile = args[0]
			r.StartTime, r.ExpireTime = starts.from(time.Now()), expires.from(time.Now())
			return c.call(cmd, func(ctx context.Context, conn grpc.ClientConnInterface) error {
				out, err := pb.NewProfileAdminClient(conn).CreateClientSecret(ctx, r)
				if err != nil {
					return err
				}
				if out.GetDelivery() == pb.SecretDelivery_SECRET_DELIVERY_RESPONSE {
					if isTerminal(cmd.OutOrStdout()) {
						fmt.Fprintln(cmd.ErrOrStderr(), "This is the secret, which nobody can show again; clear the screen when it is where it belongs:")
					}
					if _, err := fmt.Fprintln(cmd.OutOrStdout(), out.GetValue()); err != nil {
						return fmt.Errorf("the secret was created, and is lost, because it could not be written to stdout: %w; create another one, and remove this one in Vantage", err)
					}
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "secret of client %s: went to %s; ends %s\n",
					r.ClientId, whereTo(out.GetDelivery(), r.DeliverToProfile), instant(out.GetExpireTime()))
				return nil
			})
		},
	}
	c.flagsWithin(cmd, secretTakes)
	f := cmd.Flags()
	f.StringVar(&r.TenantId, "tenant-id", "", "the client's tenant; by default the profile's")
	f.StringVar(&r.ClientId, "client-id", "", "the client's identifier; required")
	f.StringVar(&r.Description, "description", "", "what tells this secret from others")
	f.Var(&starts, "starts", "from when on it is valid, from now, as 2d or 12h; by default at once")
	f.Var(&expires, "expires", "when it ends, from now, as 180d: 1d to 1096d; by default after six months")
	f.StringVar(&r.DeliverToProfile, "deliver-to", "", "the profile whose client secret it becomes, unseen")
	return cmd
}

func newSecretRotate() *cobra.Command {
	var c client
	r := &pb.RotateClientSecretRequest{}
	var expires days
	cmd := &cobra.Command{
		Use:   "rotate PROFILE",
		Short: "Replace a profile's client secret without downtime",
		Long: "Replace the client secret of a Vantage profile: a new one is created, proven by a token\nrequest, and put into use by all replicas; the old one stays second choice until it\n" +
			"ends. Nobody sees it. A rotation that was cut short is continued by the next one.",
		Example: "  broker secret rotate invoices --admin-profile tenant-admin",
		Args:    explained(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Profile, r.ExpireTime = args[0], expires.from(time.Now())
			return c.call(cmd, func(ctx context.Context, conn grpc.ClientConnInterface) error {
				out, err := pb.NewProfileAdminClient(conn).RotateClientSecret(ctx, r)
				if err != nil {
					return err
				}
				old := "the old one stays valid until it ends"
				if t := out.GetPreviousExpireTime(); t != nil {
					old = "the old one ends " + instant(t)
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "profile %s has a new client secret in %s; it ends %s; %s\n",
					r.Profile, whereTo(out.GetDelivery(), r.Profile), instant(out.GetExpireTime()), old)
				return err
			})
		},
	}
	c.flagsWithin(cmd, secretTakes)
	cmd.Flags().StringVar(&r.AdminProfile, "admin-profile", "", "the profile whose token authorizes it; by default as the config has it, or the profile itself")
	cmd.Flags().Var(&expires, "expires", "when the new secret ends, from now, as 180d: 1d to 1096d; by default as the config has it, or after six months")
	return cmd
}

func whereTo(d pb.SecretDelivery, profile string) string {
	switch d {
	case pb.SecretDelivery_SECRET_DELIVERY_STORE:
		return "the store, for profile " + profile
	case pb.SecretDelivery_SECRET_DELIVERY_FILE:
		return "the file of profile " + profile
	}
	return "stdout"
}

// days is a span as people write long ones: 180d, or what time.ParseDuration
// knows. It implements pflag.Value. Zero is none.
type days time.Duration

func (d *days) Set(s string) error {
	if n, ok := strings.CutSuffix(s, "d"); ok {
		count, err := strconv.ParseUint(n, 10, 16)
		if err != nil {
			return errors.New("write it as 180d or 12h")
		}
		*d = days(time.Duration(count) * 24 * time.Hour)
		return nil
	}
	span, err := time.ParseDuration(s)
	if err != nil || span <= 0 {
		return errors.New("write it as 180d or 12h")
	}
	*d = days(span)
	return nil
}

func (d *days) String() string {
	if *d == 0 {
		return ""
	}
	return time.Duration(*d).String()
}

func (d *days) Type() string { return "span" }

func (d *days) message() *durationpb.Duration {
	if *d == 0 {
		return nil
	}
	return durationpb.New(time.Duration(*d))
}

// from is the instant so long from now. A day gets a minute more, or it would be
// less than one by the time that it arrives.
func (d *days) from(now time.Time) *timestamppb.Timestamp {
	if *d == 0 {
		return nil
	}
	span := time.Duration(*d)
	if span == 24*time.Hour {
		span += time.Minute
	}
	return timestamppb.New(now.Add(span))
}
