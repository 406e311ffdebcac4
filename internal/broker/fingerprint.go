package broker

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"hash"
)

// Identity names by digest what parts say, 128 bits in hex. Each part is
// preceded by its length, so that no two lists of parts run together.
// Nothing secret or guessable may be among the parts; see Fingerprint.
func Identity(parts ...string) string { return digest(sha256.New(), parts) }

// Fingerprint names secrets by a keyed digest: the same secrets under the same
// key give the same name, and without the key nothing can be guessed from it.
func Fingerprint(key []byte, secrets ...Secret) string {
	parts := make([]string, len(secrets))
	for i, s := range secrets {
		parts[i] = s.Reveal()
	}
	return digest(hmac.New(sha256.New, key), parts)
}

func digest(h hash.Hash, parts []string) string {
	var length [8]byte
	for _, p := range parts {
		binary.BigEndian.PutUint64(length[:], uint64(len(p)))
		h.Write(length[:])
		h.Write([]byte(p))
	}
	return hex.EncodeToString(h.Sum(nil)[:16])
}
