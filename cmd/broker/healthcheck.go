package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

const defaultAdminAddress = "127.0.0.1:7444"

func newHealthcheck() *cobra.Command {
	address := defaultAdminAddress
	if v, ok := os.LookupEnv("BROKER_ADMIN_ADDRESS"); ok {
		address = v
	}
	cmd := &cobra.Command{
		Use:   "healthcheck",
		Short: "Ask a running broker whether it can answer calls; for container probes",
		Long:  "Ask a running broker whether it can answer calls, over its admin address. Exit\nstatus 0 means yes. Made for container probes, which cannot present a client\ncertificate to the gRPC port.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{}} // no proxy
			r, err := client.Get("http://" + address + "/readyz")
			if err != nil {
				return fmt.Errorf("asking the broker at %s: %w", address, err)
			}
			defer r.Body.Close()
			body, err := io.ReadAll(io.LimitReader(r.Body, 4096))
			if err != nil {
				return fmt.Errorf("asking the broker at %s: %w", address, err)
			}
			answer := strings.TrimSpace(string(body))
			if r.StatusCode != http.StatusOK {
				return fmt.Errorf("the broker at %s answered %d: %s", address, r.StatusCode, answer)
			}
			fmt.Fprintln(cmd.OutOrStdout(), answer)
			return nil
		},
	}
	cmd.Flags().StringVar(&address, "admin-address", address, "the broker's admin address ($BROKER_ADMIN_ADDRESS)")
	return cmd
}
