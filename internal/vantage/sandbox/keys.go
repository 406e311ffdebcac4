package sandbox

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"

	"github.com/go-jose/go-jose/v4"
)

// keys sign this server's tokens. Each server makes its own, so that a token of
// another one is unknown here. ES256, because a signature costs a fiftieth of
// RS256's and tests ask for thousands.
type keys struct {
	public      jose.JSONWebKeySet
	accessToken jose.Signer // typ at+jwt
	idToken     jose.Signer // typ JWT
}

func newKeys() (*keys, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the signing key: %w", err)
	}
	public := jose.JSONWebKey{Key: private.Public(), Algorithm: string(jose.ES256), Use: "sig"}
	thumbprint, err := public.Thumbprint(crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("naming the signing key: %w", err)
	}
	public.KeyID = base64.RawURLEncoding.EncodeToString(thumbprint)
	k := &keys{public: jose.JSONWebKeySet{Keys: []jose.JSONWebKey{public}}}
	if k.accessToken, err = newSigner(private, public.KeyID, "at+jwt"); err != nil {
		return nil, err
	}
	if k.idToken, err = newSigner(private, public.KeyID, "JWT"); err != nil {
		return nil, err
	}
	return k, nil
}

func newSigner(private *ecdsa.PrivateKey, id string, typ jose.ContentType) (jose.Signer, error) {
	key := jose.JSONWebKey{Key: private, KeyID: id}
	signer, err := jose.NewSigner(
		jose.SigningKey{Algorithm: jose.ES256, Key: key},
		(&jose.SignerOptions{}).WithType(typ),
	)
	if err != nil {
		return nil, fmt.Errorf("making a signer: %w", err)
	}
	return signer, nil
}

// sign makes a JWT. It fails only if this package is wrong.
func sign(signer jose.Signer, claims any) string {
	payload, err := json.Marshal(claims)
	if err != nil {
		panic("sandbox: encoding claims of our own: " + err.Error())
	}
	signature, err := signer.Sign(payload)
	if err != nil {
		panic("sandbox: signing: " + err.Error())
	}
	compact, err := signature.CompactSerialize()
	if err != nil {
		panic("sandbox: writing a signature: " + err.Error())
	}
	return compact
}
