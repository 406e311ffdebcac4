package broker

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"io"
	"log/slog"
)

// redacted is what every formatter shows in place of a secret.
const redacted = "[redacted]"

// Secret is a string that cannot print itself: every formatter, marshaller and
// logger shows "[redacted]". Only Reveal gives the value, so that a search for
// Reveal lists every place where a secret is used. The zero value is empty.
//
// The value sits behind a pointer because fmt prints the unexported fields of a
// struct without asking their methods; it then prints an address.
type Secret struct{ value *string }

// NewSecret wraps s.
func NewSecret(s string) Secret {
	if s == "" {
		return Secret{}
	}
	return Secret{value: &s}
}

// Reveal returns the value itself.
func (s Secret) Reveal() string {
	if s.value == nil {
		return ""
	}
	return *s.value
}

// IsEmpty reports whether there is no value.
func (s Secret) IsEmpty() bool { return s.value == nil }

// Equal compares in constant time.
func (s Secret) Equal(other Secret) bool {
	return subtle.ConstantTimeCompare([]byte(s.Reveal()), []byte(other.Reveal())) == 1
}

// ID is the first 16 hex digits of the value's SHA-256: safe to log, to compare
// and to report for random values such as tokens. A password is guessable and
// has no ID; see Fingerprint.
func (s Secret) ID() string {
	sum := sha256.Sum256([]byte(s.Reveal()))
	return hex.EncodeToString(sum[:8])
}

func (s Secret) String() string               { return redacted }
func (s Secret) GoString() string             { return redacted }
func (s Secret) LogValue() slog.Value         { return slog.StringValue(redacted) }
func (s Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Format covers every verb, those that String does not reach included.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }
