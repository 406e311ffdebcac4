package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	brokerclient "github.com/tokenbroker/tokenbroker/client"
)

const defaultAddress = brokerclient.DefaultAddress

// client is how a command reaches a broker.
type client struct {
	address     string
	ca          string
	certificate string
	privateKey  string
	tokenFile   string
	timeout     time.Duration
}

// flags adds the client's flags to a command.
func (c *client) flags(cmd *cobra.Command) { c.flagsWithin(cmd, 40*time.Second) }

// flagsWithin are flags for what usually takes less than that.
func (c *client) flagsWithin(cmd *cobra.Command, timeout time.Duration) {
	c.connectionFlags(cmd)
	cmd.Flags().DurationVar(&c.timeout, "timeout", timeout, "give up after this time")
}

// connectionFlags say where the broker is, and who calls. Each can be set as
// BROKER_… in the environment; none of them is a secret.
func (c *client) connectionFlags(cmd *cobra.Command) {
	text := func(p *string, name, standard, usage string) {
		env := "BROKER_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
		if v, ok := os.LookupEnv(env); ok {
			standard = v
		}
		cmd.Flags().StringVar(p, name, standard, usage+" ($"+env+")")
	}
	text(&c.address, "address", defaultAddress, "the broker's address, host:port or unix:/path")
	text(&c.ca, "ca", "", "CA certificates that the broker's certificate is checked against, a PEM file; default: the system's")
	text(&c.certificate, "certificate", "", "client certificate for mTLS, a PEM file")
	text(&c.privateKey, "private-key", "", "private key of the client certificate, a PEM file")
	text(&c.tokenFile, "token-file", "", "a file with a bearer token that says who calls, such as a Kubernetes service account token; read for each call")
}

// connect returns a client of the broker; the caller closes it.
func (c *client) connect() (*brokerclient.Client, error) {
	if (c.certificate == "") != (c.privateKey == "") {
		return nil, usageError{errors.New("--certificate and --private-key go together")}
	}
	b, err := brokerclient.New(
		brokerclient.WithAddress(c.address),
		brokerclient.WithCA(c.ca),
		brokerclient.WithCertificate(c.certificate, c.privateKey),
		brokerclient.WithTokenFile(c.tokenFile),
		brokerclient.WithUserAgent("broker-cli/"+buildVersion()),
	)
	var file *brokerclient.FileError
	switch {
	case errors.As(err, &file):
		err = fmt.Errorf("reading %s %s: %w", inFlags.Replace(file.Setting), file.Path, file.Err)
	case err == nil:
		return b, nil
	}
	return nil, usageError{err}
}

// inFlags turns the names of settings into those of flags.
var inFlags = strings.NewReplacer("ca", "--ca", "certificate", "--certificate", "private-key", "--private-key", "token-file", "--token-file")

// call dials, runs f and explains what went wrong.
func (c *client) call(cmd *cobra.Command, f func(ctx context.Context, conn grpc.ClientConnInterface) error) error {
	b, err := c.connect()
	if err != nil {
		return err
	}
	defer b.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), c.timeout)
	defer cancel()
	return c.explain(f(ctx, b.Conn()))
}

// explain says what a status means to a person, with the details that matter.
func (c *client) explain(err error) error {
	e, ok := brokerclient.FromError(err)
	if !ok {
		return err
	}
	if e.Reason == "" {
		switch e.Code {
		case codes.Unavailable:
			return fmt.Errorf("reaching the broker at %s: %s; is it running there, and does it expect TLS (--ca, --certificate, --private-key)?", c.address, e.Message)
		case codes.DeadlineExceeded:
			if c.timeout == 0 {
				return fmt.Errorf("no answer from the broker at %s", c.address)
			}
			return fmt.Errorf("no answer from the broker at %s within %v (--timeout)", c.address, c.timeout)
		}
		return fmt.Errorf("%s (%s)", e.Message, e.Code)
	}
	text := e.Message + "\n  reason: " + string(e.Reason)
	if e.RetryAfter > 0 {
		text += "\n  retry in: " + e.RetryAfter.Round(100*time.Millisecond).String()
	}
	if request := e.Metadata["request_id"]; request != "" {
		text += "\n  request: " + request
	}
	return errors.New(text)
}
