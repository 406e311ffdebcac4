package oauth

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

const (
	// maxName is how many characters of an account's name are kept.
	maxName = 256
	// clockSkew is by how much the server's clock may differ.
	clockSkew = 5 * time.Minute
)

var errNoIDToken = errors.New("no readable ID token")

// idToken is what an ID token claims (OpenID Connect Core section 2). Its
// signature is not verified: it came from the token endpoint itself, over TLS
// (section 3.1.3.7 point 6).
type idToken struct {
	issuer, subject, name string
	audience              []string
	expires               float64 // seconds since 1970
}

// readIDToken reads a token's claims, which must be there as the standard wants
// them.
func readIDToken(token broker.Secret) (*idToken, error) {
	parts := strings.Split(token.Reveal(), ".")
	if len(parts) != 3 { // a JWT that is signed, not encrypted
		return nil, errNoIDToken
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	var claims map[string]json.RawMessage // unlike a struct it knows upper case from lower case
	if err != nil || json.Unmarshal(payload, &claims) != nil {
		return nil, errNoIDToken
	}
	t := &idToken{audience: audience(claims["aud"])}
	t.issuer, _ = stringMember(claims["iss"])
	t.subject, _ = stringMember(claims["sub"])
	for _, claim := range []string{"preferred_username", "email", "name"} {
		if t.name == "" {
			s, _ := stringMember(claims[claim])
			t.name = printable(s)
		}
	}
	if t.issuer == "" || t.subject == "" || printable(t.subject) != t.subject || len(t.audience) == 0 || json.Unmarshal(claims["exp"], &t.expires) != nil {
		return nil, errNoIDToken
	}
	return t, nil
}

// audience is one name, or several.
func audience(raw json.RawMessage) (names []string) {
	if raw = bytes.TrimSpace(raw); len(raw) > 0 && raw[0] == '"' {
		raw = slices.Concat([]byte("["), raw, []byte("]"))
	}
	if json.Unmarshal(raw, &names) != nil {
		return nil
	}
	return names
}

// mismatch says why a token is not one for this client from this issuer, who is
// empty if nobody knows; "" if it is.
func (t *idToken) mismatch(issuer, clientID string) string {
	switch {
	case issuer != "" && t.issuer != issuer:
		return "is from another issuer than " + issuer
	case !slices.Contains(t.audience, clientID):
		return "is for another client than " + clientID
	}
	return ""
}

// account is whose token it is, if it is still good. Accounts of different
// issuers never have the same subject.
func (t *idToken) account(now time.Time) broker.Account {
	if float64(now.Add(-clockSkew).Unix()) > t.expires {
		return broker.Account{}
	}
	issuer := sha256.Sum256([]byte(t.issuer))
	return broker.Account{Subject: hex.EncodeToString(issuer[:8]) + "#" + t.subject, Name: cmp.Or(t.name, t.subject)}
}

// printable is s without control characters, and no longer than a name may be.
func printable(s string) string {
	clean := []rune(strings.Map(func(c rune) rune {
		if unicode.IsControl(c) || unicode.Is(unicode.Cf, c) || c == unicode.ReplacementChar {
			return -1
		}
		return c
	}, s))
	return strings.TrimSpace(string(clean[:min(len(clean), maxName)]))
}
