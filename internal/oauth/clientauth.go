package oauth

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// ClientAuth is how the client authenticates to the server, in the words of
// OpenID Connect Core section 9 and RFC 8705.
type ClientAuth string

const (
	// ClientSecretPost puts client_id and client_secret into the form. Without
	// a secret the client_id stands alone, as public clients have it.
	ClientSecretPost ClientAuth = "client_secret_post"
	// ClientSecretBasic puts both into the Authorization header and neither
	// into the form.
	ClientSecretBasic ClientAuth = "client_secret_basic"
	// PrivateKeyJWT puts an assertion into the form that the client's private
	// key has signed (RFC 7523), a new one for each request.
	PrivateKeyJWT ClientAuth = "private_key_jwt"
	// TLSClientAuth presents a certificate when it connects, and puts the
	// client_id into the form (RFC 8705 section 2). Where the server has
	// endpoints of their own for that, they are used.
	TLSClientAuth ClientAuth = "tls_client_auth"
)

// hasKey reports whether the client proves itself by a private key.
func (a ClientAuth) hasKey() bool { return a == PrivateKeyJWT || a == TLSClientAuth }

// authenticate prepares what the client presents beside its secrets.
func (c *Client) authenticate(config ProfileConfig) error {
	switch config.ClientAuth {
	case ClientSecretPost, ClientSecretBasic:
		return nil
	case PrivateKeyJWT:
		key, err := parseKey(config.PrivateKey)
		if err != nil {
			return err
		}
		c.assertion, err = newAssertion(key, config)
		return err
	case TLSClientAuth:
		certificate, err := parseCertificate(config.Certificate, config.PrivateKey)
		if err != nil {
			return err
		}
		c.transport = c.transport.presenting(certificate)
		return nil
	}
	return fmt.Errorf("client_auth %q is not one of %s, %s, %s, %s", config.ClientAuth,
		ClientSecretPost, ClientSecretBasic, PrivateKeyJWT, TLSClientAuth)
}

const (
	assertionType = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
	// assertionLifetime is enough for a slow request between two clocks that
	// differ, and too little to be of use to anybody else.
	assertionLifetime = 2 * time.Minute
)

// assertion makes the JWTs by which a client proves itself (RFC 7523 section 3).
type assertion struct {
	signer   jose.Signer
	clientID string
	audience string // empty is the issuer, or the token endpoint
}

func newAssertion(key crypto.Signer, config ProfileConfig) (*assertion, error) {
	options := (&jose.SignerOptions{}).WithType("JWT")
	if config.KeyID != "" {
		options.WithHeader("kid", config.KeyID)
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: algorithm(key), Key: key}, options)
	if err != nil {
		return nil, errors.New("private_key cannot sign: use another one")
	}
	return &assertion{signer, config.ClientID, config.AssertionAudience}, nil
}

// algorithm is what a key that parseKey admits signs with.
func algorithm(key crypto.Signer) jose.SignatureAlgorithm {
	switch key.(type) {
	case *rsa.PrivateKey:
		return jose.RS256
	case *ecdsa.PrivateKey:
		return jose.ES256
	}
	return jose.EdDSA
}

// to makes one. It has one audience only, because with several one server could use it at
// another, and no nbf, because clocks differ.
func (a *assertion) to(at *endpoints) (broker.Secret, error) {
	audience := a.audience
	if audience == "" {
		audience = at.issuer
	}
	if audience == "" {
		audience = at.token.url.String()
	}
	now := time.Now()
	signed, err := jwt.Signed(a.signer).Claims(map[string]any{
		"iss": a.clientID,
		"sub": a.clientID,
		"aud": audience,
		"iat": now.Unix(),
		"exp": now.Add(assertionLifetime).Unix(),
		"jti": rand.Text(),
	}).Serialize()
	return broker.NewSecret(signed), err
}

// sign authenticates the attempt where that takes an assertion.
func (a *attempt) sign() *broker.IssueError {
	if a.client.assertion == nil {
		return nil
	}
	signed, err := a.client.assertion.to(a.at)
	if err != nil {
		return &broker.IssueError{
			Kind:    broker.Unavailable,
			Text:    fmt.Sprintf("%s was not asked: the client's assertion could not be signed with private_key", a.endpoint),
			Outcome: broker.Unsent,
			Err:     err,
		}
	}
	a.request.assertion = signed
	return nil
}

// minRSABits is what NIST has required since 2014.
const minRSABits = 2048

// parseKey reads a private key in PEM: PKCS #8, PKCS #1 or SEC 1. Its errors
// show nothing of it.
func parseKey(secret broker.Secret) (crypto.Signer, error) {
	if secret.IsEmpty() {
		return nil, errors.New("private_key is missing or empty: check the file or variable that it comes from")
	}
	var block *pem.Block
	for rest := []byte(secret.Reveal()); ; {
		if block, rest = pem.Decode(rest); block == nil || strings.HasSuffix(block.Type, "PRIVATE KEY") {
			break // EC keys may come behind their parameters
		}
	}
	if block == nil {
		return nil, errors.New("private_key holds no private key in PEM (-----BEGIN PRIVATE KEY-----)")
	}
	if block.Type == "ENCRYPTED PRIVATE KEY" || block.Headers["DEK-Info"] != "" {
		return nil, errors.New("private_key is encrypted: decrypt it, and protect the file instead")
	}
	var key any
	var err error
	switch block.Type {
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	default:
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	}
	if err != nil {
		return nil, errors.New("private_key holds a damaged key, or one of a kind that is not known here")
	}
	switch key := key.(type) {
	case *rsa.PrivateKey:
		if key.N.BitLen() < minRSABits {
			return nil, fmt.Errorf("private_key is an RSA key of %d bits: use one of %d at least", key.N.BitLen(), minRSABits)
		}
		return key, nil
	case *ecdsa.PrivateKey:
		if key.Curve != elliptic.P256() {
			return nil, fmt.Errorf("private_key is on the curve %s: use P-256, RSA or Ed25519", key.Curve.Params().Name)
		}
		return key, nil
	case ed25519.PrivateKey:
		return key, nil
	}
	return nil, errors.New("private_key cannot sign: use an RSA, P-256 or Ed25519 key")
}

// parseCertificate reads a certificate, with the chain above it, and its key.
func parseCertificate(chain []byte, secret broker.Secret) (*tls.Certificate, error) {
	key, keyErr := parseKey(secret)
	c := &tls.Certificate{PrivateKey: key}
	for rest := chain; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		if block.Type == "CERTIFICATE" {
			c.Certificate = append(c.Certificate, block.Bytes)
		}
	}
	if len(c.Certificate) == 0 {
		return nil, errors.Join(keyErr, errors.New("certificate holds no certificate in PEM (-----BEGIN CERTIFICATE-----)"))
	}
	var err error
	c.Leaf, err = x509.ParseCertificate(c.Certificate[0])
	if err != nil {
		return nil, errors.Join(keyErr, errors.New("certificate is damaged"))
	}
	return c, errors.Join(keyErr, checkLeaf(c.Leaf, key))
}

// checkLeaf leaves the certificate's times alone: the server judges them, and an
// end must not keep all the other profiles from being loaded.
func checkLeaf(leaf *x509.Certificate, key crypto.Signer) error {
	public, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if key != nil && (!ok || !public.Equal(key.Public())) {
		return errors.New("certificate does not belong to private_key: use the two that were made together, the client's own certificate first")
	}
	return nil
}
