package oauth

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"syscall"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// notSent is the failure of an attempt of which no byte left.
func (a *attempt) notSent(ctx context.Context, err error) *broker.IssueError {
	failure := &broker.IssueError{Kind: broker.Unavailable, Outcome: broker.Unsent}
	failure.Text = fmt.Sprintf("%s was not reached: %s", a.endpoint, a.unsent(ctx, err))
	if a.oneTime != nil {
		if held := a.oneTime.heldBack(); held != nil {
			failure.Text = fmt.Sprintf("%s was not asked: the request was held back before its first byte", a.endpoint)
			err = held
		} else if ended := a.oneTime.ended(); ended != nil {
			err = ended // net/http may have seen no more than a closed connection
		}
	}
	failure.Err = a.redactor().cause(err)
	return failure
}

// unsent says why, and what to check.
func (a *attempt) unsent(ctx context.Context, err error) string {
	switch ctx.Err() {
	case context.DeadlineExceeded:
		return fmt.Sprintf("there was no connection within %s: check firewalls and proxies", a.within())
	case context.Canceled:
		return "the request was given up before it was sent"
	}
	for _, explain := range []func(*attempt, error) string{(*attempt).proxyTrouble, (*attempt).certificateTrouble, (*attempt).dialTrouble} {
		if why := explain(a, err); why != "" {
			return why
		}
	}
	return a.redactor().show(err.Error(), maxProviderText)
}

func (a *attempt) proxyTrouble(err error) string {
	var refusal proxyRefusal
	var op *net.OpError
	switch {
	case errors.As(err, &refusal):
		return refusal.Error()
	case errors.Is(err, errProxyURL):
		return errProxyURL.Error()
	case errors.As(err, &op) && op.Op == "proxyconnect":
		return "the proxy of HTTPS_PROXY or HTTP_PROXY does not answer: " + a.redactor().show(op.Err.Error(), maxProviderText)
	}
	return ""
}

func (a *attempt) certificateTrouble(err error) string {
	var authority x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	var record tls.RecordHeaderError
	switch {
	case errors.As(err, &authority):
		return "its certificate comes from an authority that is not trusted here: add that authority to the system's trusted certificates, or name its file in SSL_CERT_FILE"
	case errors.As(err, &host):
		return fmt.Sprintf("its certificate is not for %s: check the host in the URL, and for a proxy that intercepts TLS", a.endpoint.url.Hostname())
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return "its certificate has expired or is not valid yet: check this machine's clock, then the certificate"
	case errors.As(err, &record) && string(record.RecordHeader[:]) == "HTTP/":
		return "it speaks plain HTTP where the URL says https://"
	case a.stage() == handshaking && isTimeout(err):
		return fmt.Sprintf("the TLS handshake took more than %s", a.client.transport.handshakeTimeout)
	case a.stage() == handshaking:
		return fmt.Sprintf("the TLS handshake failed, which must be TLS 1.2 or newer with a valid certificate (%s)", a.redactor().show(err.Error(), maxProviderText))
	}
	return ""
}

func (a *attempt) dialTrouble(err error) string {
	var dns *net.DNSError
	switch host := a.endpoint.url.Host; {
	case errors.As(err, &dns) && dns.IsNotFound:
		return fmt.Sprintf("there is no host %s: check the URL and this machine's DNS", a.redactor().show(dns.Name, maxProviderText))
	case errors.As(err, &dns):
		return fmt.Sprintf("host %s could not be looked up: check this machine's DNS", a.redactor().show(dns.Name, maxProviderText))
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Sprintf("nothing listens at %s (connection refused): check host and port", host)
	case isTimeout(err):
		return fmt.Sprintf("there was no connection to %s within %s: check firewalls and proxies", host, a.client.transport.connectTimeout)
	}
	return ""
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}
