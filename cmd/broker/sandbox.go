package main

import (
	"fmt"
	"net"

	"github.com/spf13/cobra"

	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

func newSandbox() *cobra.Command {
	address := "127.0.0.1:7480"
	cmd := &cobra.Command{
		Use:   "sandbox",
		Short: "Run the stand-in for ABBYY Vantage alone",
		Long:  "Run the stand-in for ABBYY Vantage alone: all four grants, errors, lock-out,\nclient administration. It is meant for this machine only and remembers nothing.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := sandbox.New(sandbox.Options{})
			if err != nil {
				return err
			}
			ln, err := net.Listen("tcp", address)
			if err != nil {
				return fmt.Errorf("listening for the sandbox: %w", err)
			}
			w := cmd.OutOrStdout()
			fmt.Fprintf(w, "sandbox at http://%s, made up for this run:\n\n", ln.Addr())
			fmt.Fprintf(w, "  tenant    %s\n", sandbox.DemoTenant)
			for _, id := range []string{"invoices", "operator", "review", "admin"} {
				fmt.Fprintf(w, "  client    %-9s secret %s\n", id, s.ClientSecret(id))
			}
			fmt.Fprintf(w, "  user      operator@example.com, password %s\n\n", sandbox.DemoPassword)
			fmt.Fprintf(w, "counts:     curl http://%s/sandbox/calls\nfailures:   curl -d '[{\"status\": 503, \"times\": 3}]' http://%s/sandbox/faults\n", ln.Addr(), ln.Addr())
			return s.Serve(cmd.Context(), ln)
		},
	}
	cmd.Flags().StringVar(&address, "address", address, "where to listen, on loopback")
	return cmd
}
