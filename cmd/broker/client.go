package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

const defaultAddress = "127.0.0.1:7443"

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

// call dials, runs f and explains what went wrong.
func (c *client) call(cmd *cobra.Command, f func(ctx context.Context, conn *grpc.ClientConn) error) error {
	creds, err := c.credentials()
	if err != nil {
		return usageError{err}
	}
	target := c.address
	if !strings.HasPrefix(target, "unix:") {
		target = "dns:///" + target
	}
	options := []grpc.DialOption{grpc.WithTransportCredentials(creds), grpc.WithNoProxy(), grpc.WithUserAgent("broker-cli/" + buildVersion())}
	if c.tokenFile != "" {
		token := tokenFile{path: c.tokenFile, secure: !isLocal(c.address)}
		if _, err := token.read(); err != nil {
			return usageError{err}
		}
		options = append(options, grpc.WithPerRPCCredentials(token))
	}
	conn, err := grpc.NewClient(target, options...)
	if err != nil {
		return usageError{fmt.Errorf("address %q: %w", c.address, err)}
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), c.timeout)
	defer cancel()
	return c.explain(f(ctx, conn))
}

// credentials are TLS for everything but a plain connection on this machine.
func (c *client) credentials() (credentials.TransportCredentials, error) {
	if c.ca == "" && c.certificate == "" && c.privateKey == "" && isLocal(c.address) {
		return insecure.NewCredentials(), nil
	}
	settings := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.ca != "" {
		var err error
		if settings.RootCAs, err = authorities(c.ca); err != nil {
			return nil, err
		}
	}
	if (c.certificate == "") != (c.privateKey == "") {
		return nil, errors.New("--certificate and --private-key go together")
	}
	if c.certificate != "" {
		pair, err := tls.LoadX509KeyPair(c.certificate, c.privateKey)
		if err != nil {
			return nil, fmt.Errorf("reading --certificate and --private-key: %w", err)
		}
		settings.Certificates = []tls.Certificate{pair}
	}
	return credentials.NewTLS(settings), nil
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

func isLocal(address string) bool {
	if strings.HasPrefix(address, "unix:") {
		return true
	}
	host, _, err := net.SplitHostPort(address)
	return err == nil && oauth.IsLoopback(host)
}

// explain says what a status means to a person, with the details that matter.
func (c *client) explain(err error) error {
	st, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	text := st.Message()
	var reason, retry, request string
	for _, d := range st.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			reason, request = d.Reason, d.Metadata["request_id"]
		case *errdetails.RetryInfo:
			retry = d.RetryDelay.AsDuration().Round(100 * time.Millisecond).String()
		}
	}
	if reason == "" {
		switch st.Code() {
		case codes.Unavailable:
			text = fmt.Sprintf("reaching the broker at %s: %s; is it running there, and does it expect TLS (--ca, --certificate, --private-key)?", c.address, text)
		case codes.DeadlineExceeded:
			text = fmt.Sprintf("no answer from the broker at %s within %v (--timeout)", c.address, c.timeout)
		default:
			text = fmt.Sprintf("%s (%s)", text, st.Code())
		}
		return errors.New(text)
	}
	text += "\n  reason: " + reason
	if retry != "" {
		text += "\n  retry in: " + retry
	}
	if request != "" {
		text += "\n  request: " + request
	}
	return errors.New(text)
}
