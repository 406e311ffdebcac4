package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"strings"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

// FileError is about a file that cannot be used. It repeats nothing of its content.
type FileError struct {
	// Setting is which file it is: "ca", "certificate and private-key" or
	// "token-file".
	Setting string
	// Path of the file. Of a certificate and its key it is the certificate's.
	Path string
	// Err says what is wrong.
	Err error
}

func (e *FileError) Error() string {
	return fmt.Sprintf("reading the %s %s: %v", e.Setting, e.Path, e.Err)
}

// Unwrap returns Err.
func (e *FileError) Unwrap() error { return e.Err }

// files are those that TLS takes. They may be replaced at any time: each handshake
// reads them again. While one is missing, half written, or of another pair, the last
// good content counts.
type files struct {
	ca, certificate, privateKey string

	mu    sync.Mutex
	roots *x509.CertPool   // guarded by mu; nil: the system's
	pair  *tls.Certificate // guarded by mu; nil: none
}

// given reports whether there is any.
func (f *files) given() bool { return f.ca != "" || f.certificate != "" || f.privateKey != "" }

// load reads all of them, and keeps those that are good.
func (f *files) load() error {
	roots, errRoots := f.readCA()
	pair, errPair := f.readPair()
	f.mu.Lock()
	defer f.mu.Unlock()
	if errRoots == nil {
		f.roots = roots
	}
	if errPair == nil {
		f.pair = pair
	}
	if errRoots != nil {
		return errRoots
	}
	return errPair
}

func (f *files) readCA() (*x509.CertPool, error) {
	if f.ca == "" {
		return nil, nil
	}
	wrong := func(err error) error { return &FileError{Setting: "ca", Path: f.ca, Err: err} }
	text, err := content(f.ca, largestPEM)
	if err != nil {
		return nil, wrong(err)
	}
	blocks, err := certificates(text)
	if err != nil {
		return nil, wrong(err)
	}
	roots := x509.NewCertPool()
	for _, der := range blocks {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, wrong(err)
		}
		roots.AddCert(c)
	}
	return roots, nil
}

func (f *files) readPair() (*tls.Certificate, error) {
	if f.certificate == "" && f.privateKey == "" {
		return nil, nil
	}
	wrong := func(err error) error {
		return &FileError{Setting: "certificate and private-key", Path: f.certificate, Err: err}
	}
	if f.certificate == "" || f.privateKey == "" {
		return nil, wrong(errors.New("the two go together"))
	}
	certificate, err := content(f.certificate, largestPEM)
	if err != nil {
		return nil, wrong(err)
	}
	if _, err := certificates(certificate); err != nil {
		return nil, wrong(err)
	}
	key, err := content(f.privateKey, largestPEM)
	if err != nil {
		return nil, wrong(fmt.Errorf("its key %s: %w", f.privateKey, err))
	}
	pair, err := tls.X509KeyPair(certificate, key)
	if err != nil {
		return nil, wrong(fmt.Errorf("with the key %s: %w", f.privateKey, err))
	}
	return &pair, nil
}

// largestPEM is more than any bundle of authorities has.
const largestPEM = 16 << 20

// certificates returns those of a PEM file that is whole. A file that somebody is
// writing may end in the middle of one.
func certificates(text []byte) ([][]byte, error) {
	var all [][]byte
	for {
		var b *pem.Block
		if b, text = pem.Decode(text); b == nil {
			break
		}
		if b.Type == "CERTIFICATE" {
			all = append(all, b.Bytes)
		}
	}
	switch {
	case bytes.Contains(text, []byte("-----BEGIN")):
		return nil, errors.New("it ends in the middle of a PEM block")
	case len(all) == 0:
		return nil, errors.New("it holds no PEM certificate")
	}
	return all, nil
}

// content reads a file. Its errors leave out the path, which the caller tells.
func content(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, withoutPath(err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, withoutPath(err)
	}
	if int64(len(text)) > most {
		return nil, fmt.Errorf("it is larger than %d bytes", most)
	}
	return text, nil
}

func withoutPath(err error) error {
	var failure *fs.PathError
	if errors.As(err, &failure) {
		return failure.Err
	}
	return err
}

// config is TLS as the files are now, and what is wrong with them.
func (f *files) config() (*tls.Config, error) {
	err := f.load()
	f.mu.Lock()
	defer f.mu.Unlock()
	c := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: f.roots}
	if f.pair != nil {
		c.Certificates = []tls.Certificate{*f.pair}
	}
	return c, err
}

// handshakes are transport credentials that look at the files for each connection.
type handshakes struct{ files *files }

// ClientHandshake implements credentials.TransportCredentials.
func (h handshakes) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	config, stale := h.files.config()
	conn, info, err := credentials.NewTLS(config).ClientHandshake(ctx, authority, raw)
	if err != nil {
		return nil, nil, h.files.explain(err, stale)
	}
	return conn, info, nil
}

// explain says which file a failed handshake is about. stale is what kept the files
// from being read again, or nil.
func (f *files) explain(err, stale error) error {
	var unknown x509.UnknownAuthorityError
	var plain tls.RecordHeaderError
	switch {
	case errors.As(err, &unknown) && f.ca == "":
		err = fmt.Errorf("the broker's certificate is not signed by an authority of this system, and no CA file is named: %w", err)
	case errors.As(err, &unknown):
		err = fmt.Errorf("the broker's certificate is not signed by an authority in the CA file %s: %w", f.ca, err)
	case errors.As(err, &plain):
		err = fmt.Errorf("the broker does not speak TLS there: %w", err)
	}
	if stale != nil {
		err = fmt.Errorf("%w (what was read before is used, because of an error: %w)", err, stale)
	}
	return err
}

// ServerHandshake implements credentials.TransportCredentials.
func (h handshakes) ServerHandshake(net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are for clients")
}

// Info implements credentials.TransportCredentials.
func (h handshakes) Info() credentials.ProtocolInfo { return credentials.NewTLS(nil).Info() }

// Clone implements credentials.TransportCredentials.
func (h handshakes) Clone() credentials.TransportCredentials { return h }

// OverrideServerName implements credentials.TransportCredentials; gRPC does not call
// it.
func (h handshakes) OverrideServerName(string) error {
	return errors.New("use grpc.WithAuthority")
}

// largestTokenFile is what the broker takes of a token, and a line end.
const largestTokenFile = 16<<10 + 2

// tokenFile sends a file's token with each call, as it is at that moment: Kubernetes
// replaces the tokens of pods long before they end.
type tokenFile struct {
	path string
	// secure says that the token leaves this machine, and not in clear.
	secure bool
}

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (f tokenFile) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	token, err := f.read()
	if err != nil { // somebody may be replacing it
		return nil, status.Error(codes.Unavailable, err.Error())
	}
	return map[string]string{"authorization": "Bearer " + token}, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (f tokenFile) RequireTransportSecurity() bool { return f.secure }

func (f tokenFile) read() (string, error) {
	wrong := func(err error) error { return &FileError{Setting: "token-file", Path: f.path, Err: err} }
	text, err := content(f.path, largestTokenFile)
	if err != nil {
		return "", wrong(err)
	}
	token := strings.TrimSuffix(strings.TrimSuffix(string(text), "\n"), "\r")
	if token == "" || strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return "", wrong(errors.New("it does not hold one token and nothing else"))
	}
	return token, nil
}
