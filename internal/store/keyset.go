package store

import (
	"bytes"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/aead/aesgcm"
	"github.com/tink-crypto/tink-go/v2/aead/xchacha20poly1305"
	"github.com/tink-crypto/tink-go/v2/insecurecleartextkeyset"
	"github.com/tink-crypto/tink-go/v2/insecuresecretdataaccess"
	"github.com/tink-crypto/tink-go/v2/keyset"
	tinkpb "github.com/tink-crypto/tink-go/v2/proto/tink_go_proto"
	"github.com/tink-crypto/tink-go/v2/secretdata"
	"github.com/tink-crypto/tink-go/v2/tink"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Why a sealed value does not open.
var (
	// ErrUnreadable is not an absence: the value may be in perfect order for
	// another replica, which has a key or understands a layout that this
	// process does not. It must not be overwritten.
	ErrUnreadable = broker.ErrUnreadable
	// ErrCorrupt: the value was damaged, was moved here from another place, or
	// was never sealed by a broker.
	ErrCorrupt = errors.New("corrupt")
)

// A sealed value is a header, then what Tink makes of the plain text:
//
//	"tb" | layout | oldest layout whose readers understand it | 1 | key id (4) | nonce | cipher text | tag
//
// The layout is how a value is sealed and what is in it. Header, family and slot
// are associated data, and nothing that a merge of two records may change:
// sealed values move as they are.
const (
	sealMagic = "tb"
	// sealWritten is the layout that Seal writes. It follows sealKnown one
	// release later, so that no replica meets what it cannot read.
	sealWritten = 1
	// sealOldest is the oldest layout whose readers understand that.
	sealOldest = 1
	// sealKnown is the newest layout that Open understands, beside the one
	// before it.
	sealKnown = 1

	sealHeader = len(sealMagic) + 2
	sealPrefix = sealHeader + 5
)

// Keyset seals what leaves for the store, and opens what comes from there. It is
// a Tink keyset: the primary key seals, all enabled keys open. It does not
// change, is safe for concurrent use, and cannot print itself.
type Keyset struct {
	aead        tink.AEAD
	primary     uint32
	ids         []uint32 // of the enabled keys, oldest first
	fingerprint broker.Secret
}

// ParseKeyset reads a Tink keyset in JSON, in clear text. Its keys are AES-GCM or
// XChaCha20-Poly1305 and have the output prefix TINK. The error tells what is
// wrong without repeating any of it.
func ParseKeyset(text broker.Secret) (*Keyset, error) {
	handle, err := parseKeyset(text)
	if err != nil {
		return nil, err
	}
	info := handle.KeysetInfo()
	k := &Keyset{primary: info.GetPrimaryKeyId(), ids: enabledKeys(info)}
	if k.aead, err = aead.New(handle); err != nil {
		return nil, fmt.Errorf("preparing the keys %v of the keyset: %w", k.ids, err)
	}
	if k.fingerprint, err = fingerprintKey(handle); err != nil {
		return nil, err
	}
	return k, nil
}

// Seal encrypts what belongs into one slot of one family, under the primary key.
// The same plain text gives another value each time.
func (k *Keyset) Seal(plain []byte, family, slot string) ([]byte, error) {
	header := append([]byte(sealMagic), sealWritten, sealOldest)
	sealed, err := k.aead.Encrypt(plain, associatedData(header, family, slot))
	if err != nil {
		return nil, fmt.Errorf("sealing a value of family %s: %w", family, err)
	}
	return append(header, sealed...), nil
}

// Open gives back what was sealed for this slot of this family. The error wraps
// ErrUnreadable or ErrCorrupt.
func (k *Keyset) Open(sealed []byte, family, slot string) ([]byte, error) {
	id, err := SealedWith(sealed)
	if err != nil {
		return nil, fmt.Errorf("opening a value of family %s: %w", family, err)
	}
	if !slices.Contains(k.ids, id) {
		return nil, fmt.Errorf("opening a value of family %s: %w: sealed with key %d, and its keyset has %v; give every replica the same keyset", family, ErrUnreadable, id, k.ids)
	}
	plain, err := k.aead.Decrypt(sealed[sealHeader:], associatedData(sealed[:sealHeader], family, slot))
	if err != nil { // Tink does not say more
		return nil, fmt.Errorf("opening a value of family %s: %w: key %d does not authenticate it in this place", family, ErrCorrupt, id)
	}
	return plain, nil
}

// FingerprintKey is the key for broker.Fingerprint, 32 bytes. It comes from the
// oldest key of the keyset, enabled or not, so that replicas in the midst of a
// rotation agree on it; see DropKeys.
func (k *Keyset) FingerprintKey() []byte { return []byte(k.fingerprint.Reveal()) }

// KeyIDs returns the id of the key that seals, and the ids of all keys that
// open, oldest first. They are no secret.
func (k *Keyset) KeyIDs() (primary uint32, all []uint32) { return k.primary, slices.Clone(k.ids) }

func (k *Keyset) String() string       { return "[redacted keyset]" }
func (k *Keyset) GoString() string     { return k.String() }
func (k *Keyset) LogValue() slog.Value { return slog.StringValue(k.String()) }

// SealedWith returns the id of the key that a value says to be sealed with. The
// error is or wraps ErrUnreadable for a newer layout, ErrCorrupt for what is no
// sealed value.
func SealedWith(sealed []byte) (keyID uint32, err error) {
	if len(sealed) < sealHeader || string(sealed[:len(sealMagic)]) != sealMagic {
		return 0, fmt.Errorf("%w: this was not sealed by a broker", ErrCorrupt)
	}
	layout, oldest := sealed[sealHeader-2], sealed[sealHeader-1]
	if oldest > sealKnown {
		return 0, fmt.Errorf("%w: it has layout %d, for brokers that know layout %d, and this one knows %d; upgrade all replicas", ErrUnreadable, layout, oldest, sealKnown)
	}
	if oldest == 0 || oldest > layout || len(sealed) < sealPrefix || sealed[sealHeader] != 1 {
		return 0, fmt.Errorf("%w: its header makes no sense", ErrCorrupt)
	}
	return binary.BigEndian.Uint32(sealed[sealHeader+1:]), nil
}

// associatedData ties a value to its place. The lengths keep family and slot
// apart.
func associatedData(header []byte, family, slot string) []byte {
	data := bytes.Clone(header)
	for _, s := range []string{family, slot} {
		data = binary.BigEndian.AppendUint64(data, uint64(len(s)))
		data = append(data, s...)
	}
	return data
}

// NewKeyset makes a keyset of one AES-256-GCM key, in JSON.
func NewKeyset() (broker.Secret, error) {
	handle, err := keyset.NewHandle(aead.AES256GCMKeyTemplate())
	if err != nil {
		return broker.Secret{}, fmt.Errorf("making a key: %w", err)
	}
	return formatKeyset(handle)
}

// AddKey adds a key that opens but does not seal yet: the first step of a
// rotation. PromoteKey comes when all replicas have it.
func AddKey(text broker.Secret) (broker.Secret, error) {
	return editKeyset(text, func(m *keyset.Manager, _ *tinkpb.KeysetInfo) error {
		if _, err := m.Add(aead.AES256GCMKeyTemplate()); err != nil {
			return fmt.Errorf("making a key: %w", err)
		}
		return nil
	})
}

// PromoteKey makes the newest key the one that seals. A replica that does not
// have it cannot read what others write from then on.
func PromoteKey(text broker.Secret) (broker.Secret, error) {
	return editKeyset(text, func(m *keyset.Manager, info *tinkpb.KeysetInfo) error {
		newest := newestKey(info)
		if newest == info.GetPrimaryKeyId() {
			return fmt.Errorf("there is no key to promote: key %d is the newest, and the primary one", newest)
		}
		return m.SetPrimary(newest)
	})
}

// DropKeys takes all keys but the primary one out of use: what they have sealed
// does not open any more. The oldest key is not removed but disabled, because
// FingerprintKey comes from it: with another one no remembered rejection would
// bind, and each replica would present each refused password once more.
//
// That price is due when the oldest key has leaked, for it lets passwords be
// guessed from fingerprints: leaked removes it, too.
func DropKeys(text broker.Secret, leaked bool) (broker.Secret, error) {
	return editKeyset(text, func(m *keyset.Manager, info *tinkpb.KeysetInfo) error {
		primary := info.GetPrimaryKeyId()
		if newest := newestKey(info); newest != primary {
			return fmt.Errorf("key %d was added and not promoted: the rotation is under way, promote it first", newest)
		}
		dropped := false
		for i, key := range info.GetKeyInfo() {
			var err error
			switch oldest := i == 0 && !leaked; {
			case key.GetKeyId() == primary, oldest && !isEnabled(key):
				continue
			case oldest:
				err = m.Disable(key.GetKeyId())
			default:
				err = m.Delete(key.GetKeyId())
			}
			if err != nil {
				return fmt.Errorf("dropping key %d: %w", key.GetKeyId(), err)
			}
			dropped = true
		}
		if !dropped {
			return fmt.Errorf("there is no key to drop: all is sealed and opened with key %d", primary)
		}
		return nil
	})
}

func parseKeyset(text broker.Secret) (*keyset.Handle, error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text.Reveal()), &members); err != nil { // which may quote the text
		return nil, errors.New("this is not a JSON object; a keyset looks as 'broker keyset new' prints it")
	}
	if members["encryptedKeyset"] != nil || members["encrypted_keyset"] != nil {
		return nil, errors.New("this keyset is encrypted; decrypt it first, the broker does not ask a key management service")
	}
	keys, err := keyset.NewJSONReader(strings.NewReader(text.Reveal())).Read()
	if err != nil { // which may quote the text
		return nil, errors.New("this is JSON, but no Tink keyset; a keyset looks as 'broker keyset new' prints it")
	}
	if err := checkKeys(keys); err != nil {
		return nil, err
	}
	handle, err := insecurecleartextkeyset.Read(keyset.NewJSONReader(strings.NewReader(text.Reveal())))
	if err != nil {
		return nil, errors.New("this is no valid Tink keyset: the material of a key, or its status, makes no sense")
	}
	return handle, nil
}

// checkKeys names the mistakes that people make.
func checkKeys(keys *tinkpb.Keyset) error {
	if len(keys.GetKey()) == 0 {
		return errors.New("this keyset has no keys; make one with 'broker keyset new'")
	}
	seen := map[uint32]bool{}
	primary := false
	for _, key := range keys.GetKey() {
		id := key.GetKeyId()
		if seen[id] {
			return fmt.Errorf("this keyset has two keys with the id %d", id)
		}
		seen[id] = true
		switch key.GetKeyData().GetTypeUrl() {
		case "type.googleapis.com/google.crypto.tink.AesGcmKey", "type.googleapis.com/google.crypto.tink.XChaCha20Poly1305Key":
		default:
			return fmt.Errorf("key %d is of another kind than AES-GCM and XChaCha20-Poly1305, which seal here", id)
		}
		if key.GetOutputPrefixType() != tinkpb.OutputPrefixType_TINK {
			return fmt.Errorf("key %d needs the output prefix TINK: without it a sealed value does not tell its key", id)
		}
		if id == keys.GetPrimaryKeyId() {
			primary = key.GetStatus() == tinkpb.KeyStatusType_ENABLED
		}
	}
	if !primary {
		return fmt.Errorf("the primary key of this keyset, %d, is missing or not enabled", keys.GetPrimaryKeyId())
	}
	return nil
}

// editKeyset makes one change to a keyset.
func editKeyset(text broker.Secret, change func(*keyset.Manager, *tinkpb.KeysetInfo) error) (broker.Secret, error) {
	handle, err := parseKeyset(text)
	if err != nil {
		return broker.Secret{}, err
	}
	m := keyset.NewManagerFromHandle(handle)
	if err := change(m, handle.KeysetInfo()); err != nil {
		return broker.Secret{}, err
	}
	if handle, err = m.Handle(); err != nil {
		return broker.Secret{}, fmt.Errorf("changing the keyset: %w", err)
	}
	return formatKeyset(handle)
}

func formatKeyset(handle *keyset.Handle) (broker.Secret, error) {
	var compact, indented bytes.Buffer
	if err := insecurecleartextkeyset.Write(handle, keyset.NewJSONWriter(&compact)); err != nil {
		return broker.Secret{}, fmt.Errorf("writing the keyset: %w", err)
	}
	if err := json.Indent(&indented, compact.Bytes(), "", "  "); err != nil {
		return broker.Secret{}, fmt.Errorf("writing the keyset: %w", err)
	}
	indented.WriteByte('\n')
	return broker.NewSecret(indented.String()), nil
}

// enabledKeys are the ids of the keys that open, oldest first. The primary key
// is one of them.
func enabledKeys(info *tinkpb.KeysetInfo) (ids []uint32) {
	for _, key := range info.GetKeyInfo() {
		if isEnabled(key) {
			ids = append(ids, key.GetKeyId())
		}
	}
	return ids
}

func newestKey(info *tinkpb.KeysetInfo) uint32 {
	ids := enabledKeys(info)
	return ids[len(ids)-1]
}

func isEnabled(key *tinkpb.KeysetInfo_KeyInfo) bool {
	return key.GetStatus() == tinkpb.KeyStatusType_ENABLED
}

// fingerprintKey is derived from the bytes of the oldest key alone: its status
// and what is encoded around it may change.
func fingerprintKey(handle *keyset.Handle) (broker.Secret, error) {
	entry, err := handle.Entry(0)
	if err != nil {
		return broker.Secret{}, fmt.Errorf("reading the oldest key of the keyset: %w", err)
	}
	var material secretdata.Bytes
	switch key := entry.Key().(type) {
	case *aesgcm.Key:
		material = key.KeyBytes()
	case *xchacha20poly1305.Key:
		material = key.KeyBytes()
	default:
		return broker.Secret{}, fmt.Errorf("key %d is of a kind from which no fingerprint key can be derived", entry.KeyID())
	}
	derived, err := hkdf.Key(sha256.New, material.Data(insecuresecretdataaccess.Token{}), nil, "token broker: fingerprints of credentials", 32)
	if err != nil {
		return broker.Secret{}, fmt.Errorf("deriving the fingerprint key: %w", err)
	}
	return broker.NewSecret(string(derived)), nil
}
