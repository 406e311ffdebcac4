package main

import (
	"context"
	_ "embed"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/config"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// dev is a whole world in one process: an authorization server and a broker.
type dev struct {
	address, admin, sandbox string
	once, showConfig        bool
}

func newDev() *cobra.Command {
	var d dev
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Show the broker at work: a stand-in Vantage and a broker in one process",
		Long: "Run a stand-in for ABBYY Vantage and a broker in one process, on loopback, in\nmemory, with every grant as a profile. Prints a table of the tokens that it issued\n" +
			"over gRPC, and the commands to try next. Needs no setup and leaves nothing behind.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if d.showConfig {
				_, err := io.WriteString(cmd.OutOrStdout(), d.config())
				return err
			}
			for flag, address := range map[string]*string{"address": &d.address, "admin-address": &d.admin, "sandbox-address": &d.sandbox} {
				if d.once && !cmd.Flags().Changed(flag) { // beside whatever else runs here
					*address = "127.0.0.1:0"
				}
			}
			return d.run(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().BoolVar(&d.showConfig, "show-config", false, "print the profiles that it runs with, as a config to begin one's own from, and stop")
	cmd.Flags().BoolVar(&d.once, "once", false, "stop after the table; takes free ports unless told others")
	cmd.Flags().StringVar(&d.address, "address", defaultAddress, "where the broker listens")
	cmd.Flags().StringVar(&d.admin, "admin-address", defaultAdminAddress, "where health and metrics are")
	cmd.Flags().StringVar(&d.sandbox, "sandbox-address", "127.0.0.1:7480", "where the stand-in listens")
	return cmd
}

func (d *dev) run(ctx context.Context, stdout, stderr io.Writer) error {
	for _, address := range []string{d.address, d.admin, d.sandbox} {
		if !isLocal(address) {
			return usageError{fmt.Errorf("address %s: dev serves this machine only, without TLS; use a loopback address, or 'broker serve'", address)}
		}
	}
	vantageServer, err := sandbox.New(sandbox.Options{})
	if err != nil {
		return err
	}
	s, err := newServer(serverOptions{
		log:        slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		reflection: true,
		admin:      adminOptions{local: true},
	})
	if err != nil {
		return err
	}
	listeners, err := listenAll(d.sandbox, d.address, d.admin)
	if err != nil {
		return fmt.Errorf("%w; is another 'broker dev' running? choose other ports with --address, --admin-address and --sandbox-address", err)
	}
	d.sandbox, d.address, d.admin = listeners[0].Addr().String(), listeners[1].Addr().String(), listeners[2].Addr().String()
	profiles, err := d.profiles(vantageServer)
	if err != nil {
		return err
	}
	s.configure(profiles, &access.Policy{})

	ctx, stop := context.WithCancel(ctx)
	defer stop()
	g, ctx := errgroup.WithContext(ctx)
	// The stand-in outlives the broker, which may still be talking to it.
	world, end := context.WithCancel(context.WithoutCancel(ctx))
	g.Go(func() error { return vantageServer.Serve(world, listeners[0]) })
	g.Go(func() error {
		defer end()
		return s.run(ctx, listeners[1], listeners[2])
	})
	g.Go(func() error {
		if d.once {
			defer stop()
		}
		if err := d.show(ctx, stdout, profiles); err != nil {
			stop()
			return err
		}
		calls := vantageServer.Calls()
		fmt.Fprintf(stdout, "The stand-in counted %d token requests for %d tokens issued.\n", calls.Total, 2*len(profiles))
		if !d.once {
			d.next(stdout)
		}
		return nil
	})
	return g.Wait()
}

func listenAll(addresses ...string) ([]net.Listener, error) {
	var open []net.Listener
	for _, a := range addresses {
		ln, err := listen("tcp", a)
		if err != nil {
			for _, l := range open {
				l.Close()
			}
			return nil, err
		}
		open = append(open, ln)
	}
	return open, nil
}

//go:embed dev.yaml
var devConfig string

// config is what the broker runs with here.
func (d *dev) config() string {
	return strings.NewReplacer("SANDBOX", d.sandbox, "CONSOLE", d.admin, "TENANT", sandbox.DemoTenant).Replace(devConfig)
}

// profiles are those of the config, with the secrets that the stand-in has made up.
func (d *dev) profiles(s *sandbox.Server) ([]*broker.Profile, error) {
	secrets := map[string]string{
		"INVOICES_SECRET":   s.ClientSecret("invoices"),
		"ADMIN_SECRET":      s.ClientSecret("admin"),
		"OPERATOR_SECRET":   s.ClientSecret("operator"),
		"OPERATOR_NAME":     "operator@example.com",
		"OPERATOR_PASSWORD": sandbox.DemoPassword,
		"REVIEW_SECRET":     s.ClientSecret("review"),
	}
	c, err := config.Parse("dev.yaml", []byte(d.config()), config.Options{
		UserAgent: "token-broker/" + buildVersion(),
		LookupEnv: func(name string) (string, bool) { secret, ok := secrets[name]; return secret, ok },
	})
	if err != nil {
		return nil, err
	}
	return c.Profiles, nil
}

// signIn does what a person does with a browser.
func (d *dev) signIn(ctx context.Context, conn *grpc.ClientConn, profile string) error {
	began, err := pb.NewProfileAdminClient(conn).StartAuthorization(ctx, &pb.StartAuthorizationRequest{Profile: profile}, grpc.WaitForReady(true))
	if err != nil {
		return (&client{address: d.address}).explain(err)
	}
	form := url.Values{"username": {"reviewer@example.com"}, "password": {sandbox.DemoPassword}, "action": {"allow"}}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, began.GetAuthorizationUrl(), strings.NewReader(form.Encode()))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		return fmt.Errorf("signing in for %s: %w", profile, err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("signing in for %s: the browser ended at %s with %s", profile, response.Request.URL.Path, response.Status)
	}
	return nil
}

// show asks for each token twice, as any caller would, and tries it.
func (d *dev) show(ctx context.Context, w io.Writer, profiles []*broker.Profile) error {
	conn, err := grpc.NewClient("passthrough:///"+d.address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	tokens := pb.NewTokenBrokerClient(conn)
	fmt.Fprintf(w, "A stand-in for ABBYY Vantage at http://%s, a broker at %s:\n\n", d.sandbox, d.address)
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(t, "PROFILE\tPROVIDER\tGRANT\tTOKEN\tEXPIRES\tFROM\tTOOK\tACCEPTED BY THE API")
	for _, p := range profiles {
		if p.GrantType == broker.AuthorizationCode {
			if err := d.signIn(ctx, conn, p.Name); err != nil {
				return err
			}
		}
		for range 2 {
			began := time.Now()
			r, err := tokens.IssueToken(ctx, &pb.IssueTokenRequest{Profile: p.Name}, grpc.WaitForReady(true))
			if err != nil {
				return (&client{address: d.address}).explain(err)
			}
			took := time.Since(began).Round(10 * time.Microsecond)
			if err := d.try(ctx, r.GetToken()); err != nil {
				return err
			}
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%v\tyes\n", p.Name, p.Provider, p.GrantType, r.GetToken().GetId(), distance(r.GetToken().GetExpireTime()),
				word(r.GetSource(), "SOURCE_"), took)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(w)
	return nil
}

// try calls the stand-in's API with the token.
func (d *dev) try(ctx context.Context, token *pb.Token) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+d.sandbox+"/api/publicapi/v1/skills", nil)
	if err != nil {
		return err
	}
	r.Header.Set("Authorization", token.GetTokenType()+" "+token.GetAccessToken())
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		return fmt.Errorf("trying the token: %w", err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("trying the token: the stand-in answered %s", response.Status)
	}
	return nil
}

func (d *dev) next(w io.Writer) {
	command := "go run ./cmd/broker"
	address := ""
	if d.address != defaultAddress {
		address = " --address " + d.address
	}
	fmt.Fprint(w, strings.NewReplacer("BROKER", command, " ADDRESS", address, "ADMIN", d.admin, "SANDBOX", d.sandbox, "PASSWORD", sandbox.DemoPassword).Replace(`
It goes on until Ctrl-C. The console, where profiles are watched and people sign in, is at

  http://ADMIN/

In another terminal, try:

  BROKER token invoices ADDRESS                  print a token
  BROKER token invoices --output header ADDRESS  as a header for curl
  BROKER token invoices --job night-1 --dedicated ADDRESS
                                                              a token that no other job ever gets
  BROKER watch invoices ADDRESS                  each token, as it comes; meanwhile, elsewhere:
  BROKER revoke invoices ADDRESS                 make the one that all share useless
  BROKER profiles ADDRESS                        how the profiles fare
  BROKER profiles review ADDRESS                 all about one
  BROKER authorize review ADDRESS                sign in yourself: reviewer@example.com, password PASSWORD
  BROKER secret create tenant-admin --client-id invoices ADDRESS
                                                              one more secret for a client, at the stand-in
  BROKER whoami ADDRESS                          how the broker sees you
  BROKER dev --show-config                                    the profiles, as a config
  curl http://ADMIN/metrics                                   Prometheus metrics
  curl http://SANDBOX/sandbox/calls                           what the stand-in received

Rehearse an outage: three bad answers, and a token that is not in memory yet:

  curl -d '[{"status": 503, "times": 3}]' http://SANDBOX/sandbox/faults
  BROKER token invoices --scope openid ADDRESS
`))
}
