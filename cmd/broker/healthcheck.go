package main

import (
	"crypto/tls"
	"crypto/x509"
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
	var ca, serverName string
	cmd := &cobra.Command{
		Use:   "healthcheck",
		Short: "Ask a running broker whether it can answer calls; for container probes",
		Long:  "Ask a running broker whether it can answer calls, over its admin address. Exit\nstatus 0 means yes. Made for container probes, which cannot present a client\ncertificate to the gRPC port.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			transport, scheme := &http.Transport{}, "http://" // no proxy
			if ca != "" {
				roots, err := authorities(ca)
				if err != nil {
					return usageError{err}
				}
				transport.TLSClientConfig, scheme = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots, ServerName: serverName}, "https://"
			}
			client := http.Client{Timeout: 5 * time.Second, Transport: transport}
			r, err := client.Get(scheme + address + "/readyz")
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
	cmd.Flags().StringVar(&ca, "ca", "", "where the admin address has TLS: CA certificates that its certificate is checked against, a PEM file")
	cmd.Flags().StringVar(&serverName, "server-name", "", "the name in that certificate, where it is not the address")
	return cmd
}

// authorities reads what --ca names.
func authorities(path string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading --ca: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("reading --ca: %s holds no PEM certificate", path)
	}
	return roots, nil
}
