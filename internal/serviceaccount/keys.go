package serviceaccount

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/json" // tells upper case from lower case, and refuses a member that is there twice
)

const (
	// maxKeys is far beyond what a cluster has, which is a handful.
	maxKeys = 1000
	// leastRSA and leastExponent are the least that signs anything worth
	// believing (NIST SP 800-131A, FIPS 186-5).
	leastRSA      = 2048
	leastExponent = 65537
)

// Keys are the public keys of a cluster, by their ids. They are immutable.
type Keys struct{ byID map[string]key }

// key verifies signatures.
type key struct {
	public any // *rsa.PublicKey, *ecdsa.PublicKey or ed25519.PublicKey
	// algorithm is the only one that the key is for; empty if it says nothing.
	algorithm string
}

// jwk is what a JSON Web Key may say (RFC 7517, RFC 7518). Certificates are not
// looked at.
type jwk struct {
	Kty    string   `json:"kty,omitempty"`
	Kid    string   `json:"kid,omitempty"`
	Use    string   `json:"use,omitempty"`
	KeyOps []string `json:"key_ops,omitempty"`
	Alg    string   `json:"alg,omitempty"`
	Crv    string   `json:"crv,omitempty"`
	N      string   `json:"n,omitempty"`
	E      string   `json:"e,omitempty"`
	X      string   `json:"x,omitempty"`
	Y      string   `json:"y,omitempty"`
}

// private are the members that nobody but a key's owner may see.
var private = []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k", "priv"}

// ParseKeys reads a JSON Web Key Set. Keys of kinds that are not known here, and
// keys that are not for signatures, are left out (RFC 7517 section 5). All others
// must be public, strong, and told apart by their ids. The error names keys by
// their position, from 1, and repeats nothing of them.
func ParseKeys(data []byte) (*Keys, error) {
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(data, &set); err != nil || set.Keys == nil {
		return nil, errors.New(`there is no JSON Web Key Set in it: it must be a JSON object with "keys"`)
	}
	if len(set.Keys) > maxKeys {
		return nil, fmt.Errorf("it has more than %d keys", maxKeys)
	}
	keys := &Keys{byID: map[string]key{}}
	for i, raw := range set.Keys {
		if err := keys.add(raw); err != nil {
			return nil, fmt.Errorf("key %d %w", i+1, err)
		}
	}
	if len(keys.byID) == 0 {
		return nil, errors.New("there is no key in it that verifies signatures: RSA, P-256, P-384, P-521 and Ed25519 can")
	}
	return keys, nil
}

var errKeyUnreadable = errors.New("cannot be read: its members are not those of a JSON Web Key")

// add adds a key, if it is of use here.
func (k *Keys) add(raw json.RawMessage) error {
	var members map[string]json.RawMessage
	var said jwk
	if json.Unmarshal(raw, &members) != nil || members == nil || json.Unmarshal(raw, &said) != nil {
		return errKeyUnreadable
	}
	for _, name := range private {
		if _, ok := members[name]; ok {
			return errors.New("is not public: remove it, replace that key, and publish its public half only")
		}
	}
	switch {
	case said.Kty == "":
		return errKeyUnreadable
	case said.Kty == "oct":
		return errors.New("is symmetric, so whoever can check tokens could make them: remove it")
	case !said.known() || !said.verifies(members):
		return nil
	case said.Kid == "":
		return errors.New("has no kid, by which tokens would name it: add it")
	}
	public, err := said.public()
	if err != nil {
		return err
	}
	if other, taken := k.byID[said.Kid]; taken && !equal(other.public, public) {
		return errors.New("has the same kid as another one")
	}
	k.byID[said.Kid] = key{public, said.Alg}
	return nil
}

// known reports whether the key is of a kind that is supported.
func (j *jwk) known() bool {
	switch j.Kty {
	case "RSA":
		return true
	case "EC":
		return j.Crv == "P-256" || j.Crv == "P-384" || j.Crv == "P-521"
	case "OKP":
		return j.Crv == "Ed25519"
	}
	return false
}

// verifies reports whether the key is meant to (RFC 7517 sections 4.2, 4.3).
func (j *jwk) verifies(members map[string]json.RawMessage) bool {
	_, restricted := members["key_ops"]
	return (j.Use == "" || j.Use == "sig") && (!restricted || slices.Contains(j.KeyOps, "verify"))
}

// public is the key itself.
func (j *jwk) public() (any, error) {
	bare, err := json.Marshal(jwk{Kty: j.Kty, Crv: j.Crv, N: j.N, E: j.E, X: j.X, Y: j.Y})
	if err != nil {
		return nil, errKeyUnreadable
	}
	var parsed jose.JSONWebKey
	if parsed.UnmarshalJSON(bare) != nil { // not shown: it repeats members
		return nil, errors.New("cannot be used: it is damaged, or larger than 4096 bits")
	}
	if k, ok := parsed.Key.(*rsa.PublicKey); ok && (k.N.BitLen() < leastRSA || k.N.Bit(0) == 0 || k.E < leastExponent || k.E%2 == 0) {
		return nil, fmt.Errorf("is weak: RSA takes %d bits and the exponent %d at least", leastRSA, leastExponent)
	}
	return parsed.Key, nil
}

func equal(a, b any) bool {
	k, ok := a.(interface {
		Equal(other crypto.PublicKey) bool
	})
	return ok && k.Equal(b)
}

// IDs returns the keys' ids, sorted.
func (k *Keys) IDs() []string { return slices.Sorted(maps.Keys(k.byID)) }

// same reports whether both have the same keys.
func (k *Keys) same(other *Keys) bool {
	return maps.EqualFunc(k.byID, other.byID, func(a, b key) bool { return a.algorithm == b.algorithm && equal(a.public, b.public) })
}

// find returns the key with that id, and whether there is one.
func (k *Keys) find(id string) (key, bool) {
	if k == nil {
		return key{}, false
	}
	found, ok := k.byID[id]
	return found, ok
}

// fits reports whether a signature by that algorithm can be the key's. The
// algorithm is one that a cluster accepts.
func (k key) fits(algorithm string) bool {
	if k.algorithm != "" && k.algorithm != algorithm {
		return false
	}
	switch public := k.public.(type) {
	case *rsa.PublicKey:
		return algorithm[:2] == "RS" || algorithm[:2] == "PS"
	case *ecdsa.PublicKey:
		return public.Curve == curves[algorithm]
	case ed25519.PublicKey:
		return algorithm == string(jose.EdDSA)
	}
	return false
}

// curves by the algorithm that each is for (RFC 7518 section 3.4).
var curves = map[string]elliptic.Curve{"ES256": elliptic.P256(), "ES384": elliptic.P384(), "ES512": elliptic.P521()}
