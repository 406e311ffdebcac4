package store_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

const (
	sealFamily = "0123456789abcdef0123456789abcdef"
	sealSlot   = "openid permissions"
	sealText   = "an.access.token"
)

const (
	aesGCM  = "AesGcmKey"
	xChaCha = "XChaCha20Poly1305Key"
)

// tinkKey is one of a keyset that was made by other means than ours.
type tinkKey struct {
	id             uint32
	kind           string
	material       string
	status, prefix string
}

// tinkJSON is a keyset as Tink's own tools write it.
func tinkJSON(primary uint32, keys ...tinkKey) broker.Secret {
	var list []string
	for _, k := range keys {
		// Field 3 of both messages is the key itself.
		value := append([]byte{3<<3 | 2, byte(len(k.material))}, k.material...)
		list = append(list, fmt.Sprintf(`{"keyData":{"typeUrl":"type.googleapis.com/google.crypto.tink.%s","value":%q,"keyMaterialType":"SYMMETRIC"},"status":%q,"keyId":%d,"outputPrefixType":%q}`,
			k.kind, base64.StdEncoding.EncodeToString(value), k.status, k.id, k.prefix))
	}
	return broker.NewSecret(fmt.Sprintf(`{"primaryKeyId":%d,"key":[%s]}`, primary, strings.Join(list, ",")))
}

func fixedKey(id uint32, letter string) tinkKey {
	return tinkKey{id, aesGCM, strings.Repeat(letter, 32), "ENABLED", "TINK"}
}

// noError is for what cannot fail here.
func noError[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func parseKeys(t testing.TB, text broker.Secret) *store.Keyset {
	t.Helper()
	return noError[*store.Keyset](t)(store.ParseKeyset(text))
}

func sealPlain(t testing.TB, k *store.Keyset) []byte {
	t.Helper()
	return noError[[]byte](t)(k.Seal([]byte(sealText), sealFamily, sealSlot))
}

func wantOpen(t *testing.T, k *store.Keyset, sealed []byte) {
	t.Helper()
	if got, err := k.Open(sealed, sealFamily, sealSlot); err != nil || string(got) != sealText {
		t.Errorf("opened %q, %v", got, err)
	}
}

// wantShut holds that a value does not open in the place for which it was sealed.
func wantShut(t *testing.T, k *store.Keyset, sealed []byte, want ...error) {
	t.Helper()
	wantShutIn(t, k, sealed, sealFamily, sealSlot, want...)
}

func wantShutIn(t *testing.T, k *store.Keyset, sealed []byte, family, slot string, want ...error) {
	t.Helper()
	got, err := k.Open(sealed, family, slot)
	if got != nil || !slices.ContainsFunc(want, func(w error) bool { return errors.Is(err, w) }) {
		t.Errorf("opening %d bytes gave %q, %v; want one of %v", len(sealed), got, err, want)
	}
}

func TestKeysetOpensWhatItSealed(t *testing.T) {
	k := parseKeys(t, noError[broker.Secret](t)(store.NewKeyset()))
	for _, c := range []struct{ plain, family, slot string }{
		{sealText, sealFamily, sealSlot},
		{sealText, sealFamily, ""},
		{"", sealFamily, ""},
		{"", "", ""},
		{strings.Repeat("x", 1<<20), sealFamily, strings.Repeat("s", 1<<12)},
		{"\x00\xff", "\x00", "\xff"},
	} {
		sealed, err := k.Seal([]byte(c.plain), c.family, c.slot)
		if err != nil {
			t.Fatal(err)
		}
		if c.plain != "" && bytes.Contains(sealed, []byte(c.plain)) {
			t.Errorf("%.20q is in the clear", c.plain)
		}
		if got, err := k.Open(sealed, c.family, c.slot); err != nil || string(got) != c.plain {
			t.Errorf("%.20q came back as %.20q, %v", c.plain, got, err)
		}
	}
	if bytes.Equal(sealPlain(t, k), sealPlain(t, k)) {
		t.Error("sealing twice gave the same value")
	}
}

func TestSealedValuesStayInTheirPlace(t *testing.T) {
	k := parseKeys(t, noError[broker.Secret](t)(store.NewKeyset()))
	sealed := sealPlain(t, k)
	for _, c := range []struct{ family, slot string }{
		{sealFamily, ""},
		{sealFamily, sealSlot + " "},
		{"f" + sealFamily[1:], sealSlot},
		{"", sealSlot},
		{sealSlot, sealFamily},
		{sealFamily + sealSlot, ""},
		{"", sealFamily + sealSlot},
		{sealFamily + sealSlot[:1], sealSlot[1:]},
	} {
		wantShutIn(t, k, sealed, c.family, c.slot, store.ErrCorrupt)
	}
}

func TestDamagedValuesDoNotOpen(t *testing.T) {
	k := parseKeys(t, noError[broker.Secret](t)(store.NewKeyset()))
	sealed := sealPlain(t, k)
	for i := range len(sealed) * 8 {
		damaged := bytes.Clone(sealed)
		damaged[i/8] ^= 1 << (i % 8)
		wantShut(t, k, damaged, store.ErrCorrupt, store.ErrUnreadable)
		if i/8 >= 4+5 { // behind header and key id
			wantShut(t, k, damaged, store.ErrCorrupt)
		}
	}
	for n := range sealed {
		wantShut(t, k, sealed[:n], store.ErrCorrupt)
		wantShut(t, k, sealed[n+1:], store.ErrCorrupt)
	}
	wantShut(t, k, nil, store.ErrCorrupt)
	wantShut(t, k, append(bytes.Clone(sealed), 0), store.ErrCorrupt)
	wantShut(t, k, []byte(sealText), store.ErrCorrupt)
	wantOpen(t, k, sealed)
}

func TestNewerLayoutsAreNotTakenForCorrupt(t *testing.T) {
	k := parseKeys(t, noError[broker.Secret](t)(store.NewKeyset()))
	for _, c := range []struct {
		layout, oldest byte
		want           error
	}{
		{2, 2, store.ErrUnreadable},
		{3, 2, store.ErrUnreadable},
		{255, 255, store.ErrUnreadable},
		{2, 1, store.ErrCorrupt}, // readable, but it was sealed as another one
		{1, 0, store.ErrCorrupt},
		{0, 0, store.ErrCorrupt},
		{0, 1, store.ErrCorrupt},
	} {
		sealed := sealPlain(t, k)
		sealed[2], sealed[3] = c.layout, c.oldest
		wantShut(t, k, sealed, c.want)
	}
	wantShut(t, k, []byte("tb\x02\x02whatever comes then"), store.ErrUnreadable)
}

func TestUnknownKeysAreNotTakenForCorrupt(t *testing.T) {
	ours, theirs := tinkJSON(1, fixedKey(1, "a")), tinkJSON(2, fixedKey(2, "b"))
	wantShut(t, parseKeys(t, ours), sealPlain(t, parseKeys(t, theirs)), store.ErrUnreadable)

	disabled := fixedKey(2, "b")
	disabled.status = "DISABLED"
	wantShut(t, parseKeys(t, tinkJSON(1, fixedKey(1, "a"), disabled)), sealPlain(t, parseKeys(t, theirs)), store.ErrUnreadable)

	sameID := tinkJSON(2, fixedKey(2, "c"))
	wantShut(t, parseKeys(t, sameID), sealPlain(t, parseKeys(t, theirs)), store.ErrCorrupt)

	id, err := store.SealedWith(sealPlain(t, parseKeys(t, theirs)))
	if id != 2 || err != nil {
		t.Errorf("sealed with %d, %v", id, err)
	}
}

// Values that a release has written must open for ever, and fingerprints must
// not change under remembered rejections.
func TestSealedFormatIsFixed(t *testing.T) {
	for kind, sealed := range map[string]string{
		aesGCM:  "7462010101075bcd15" + "54efcdce85893a0651754f12dd34ff055c37229aa35e7ef53ba0f3ee6957785a7924f94741444b891bceef",
		xChaCha: "7462010101075bcd15" + "377e81bb7cf5e8b2b6f98d8986ad0e180a8847b3e793c1e37a768d576ee3636e72926f48c8b23abbbe2bbd2dd42823e2ea77a78e87d58d",
	} {
		fixed := fixedKey(123456789, "k")
		fixed.kind = kind
		k := parseKeys(t, tinkJSON(fixed.id, fixed))
		wantOpen(t, k, noError[[]byte](t)(hex.DecodeString(sealed)))
		if fresh := hex.EncodeToString(sealPlain(t, k)); len(fresh) != len(sealed) || fresh[:18] != sealed[:18] {
			t.Errorf("a fresh value is %s", fresh)
		}
		if got := hex.EncodeToString(k.FingerprintKey()); got != "f541d31eff8b37ff1b816c08d6d4ddb1deebd8063654a6216537249d886d981b" {
			t.Errorf("the fingerprint key is %s", got)
		}
	}
}

// Two replicas whose files change at different times, through a whole rotation.
func TestRotationBetweenReplicas(t *testing.T) {
	file := noError[broker.Secret](t)(store.NewKeyset())
	first := parseKeys(t, file)
	p, q := first, first
	fingerprint := func() {
		t.Helper()
		if !bytes.Equal(p.FingerprintKey(), q.FingerprintKey()) || !bytes.Equal(p.FingerprintKey(), first.FingerprintKey()) {
			t.Error("the fingerprint key has changed")
		}
	}
	bothWays := func() {
		t.Helper()
		wantOpen(t, p, sealPlain(t, q))
		wantOpen(t, q, sealPlain(t, p))
		fingerprint()
	}
	if len(p.FingerprintKey()) != 32 {
		t.Errorf("the fingerprint key has %d bytes", len(p.FingerprintKey()))
	}

	change := func(step func(broker.Secret) (broker.Secret, error)) *store.Keyset {
		t.Helper()
		file = noError[broker.Secret](t)(step(file))
		return parseKeys(t, file)
	}
	drop := func(text broker.Secret) (broker.Secret, error) { return store.DropKeys(text, false) }
	for rotation := range 3 {
		old := sealPlain(t, p)
		was, _ := p.KeyIDs()

		p = change(store.AddKey)
		if primary, all := p.KeyIDs(); primary != was || len(all) != 2 || all[0] != was {
			t.Fatalf("after add: primary %d of %v", primary, all)
		}
		bothWays()
		q = p
		bothWays()

		p = change(store.PromoteKey)
		primary, all := p.KeyIDs()
		if primary == was || len(all) != 2 || all[1] != primary {
			t.Fatalf("after promote: primary %d of %v", primary, all)
		}
		bothWays()
		wantOpen(t, p, old)
		q = p
		fresh := sealPlain(t, q)
		if id, _ := store.SealedWith(fresh); id != primary {
			t.Errorf("sealed with %d", id)
		}

		p = change(drop)
		if got, all := p.KeyIDs(); got != primary || len(all) != 1 {
			t.Fatalf("after drop: primary %d of %v", got, all)
		}
		bothWays()
		wantOpen(t, p, fresh)
		wantShut(t, p, old, store.ErrUnreadable)
		wantOpen(t, q, old)
		q = p
		if n := strings.Count(file.Reveal(), "typeUrl"); n != 2 {
			t.Errorf("rotation %d leaves %d keys: want the primary one and the one for fingerprints", rotation, n)
		}
	}
}

func TestPromotingTooEarlyDestroysNothing(t *testing.T) {
	file := noError[broker.Secret](t)(store.NewKeyset())
	behind := parseKeys(t, file)
	added := noError[broker.Secret](t)(store.AddKey(file))
	promoted := noError[broker.Secret](t)(store.PromoteKey(added))
	sealed := sealPlain(t, parseKeys(t, promoted))
	wantShut(t, behind, sealed, store.ErrUnreadable)
	wantOpen(t, parseKeys(t, added), sealed)
}

func TestDropAfterALeakChangesFingerprints(t *testing.T) {
	file := noError[broker.Secret](t)(store.NewKeyset())
	before := parseKeys(t, file)
	for _, step := range []func(broker.Secret) (broker.Secret, error){
		store.AddKey, store.PromoteKey,
		func(text broker.Secret) (broker.Secret, error) { return store.DropKeys(text, false) },
		func(text broker.Secret) (broker.Secret, error) { return store.DropKeys(text, true) },
	} {
		file = noError[broker.Secret](t)(step(file))
	}
	if bytes.Equal(before.FingerprintKey(), parseKeys(t, file).FingerprintKey()) {
		t.Error("fingerprints still come from the leaked key")
	}
	if n := strings.Count(file.Reveal(), "typeUrl"); n != 1 {
		t.Errorf("%d keys are left", n)
	}
}

func TestStepsOutOfTurnAreRefused(t *testing.T) {
	file := noError[broker.Secret](t)(store.NewKeyset())
	if _, err := store.PromoteKey(file); err == nil || !strings.Contains(err.Error(), "no key to promote") {
		t.Errorf("promoting the only key: %v", err)
	}
	for _, leaked := range []bool{false, true} {
		if _, err := store.DropKeys(file, leaked); err == nil || !strings.Contains(err.Error(), "no key to drop") {
			t.Errorf("dropping the only key: %v", err)
		}
		if _, err := store.DropKeys(noError[broker.Secret](t)(store.AddKey(file)), leaked); err == nil || !strings.Contains(err.Error(), "promote it first") {
			t.Errorf("dropping in the midst of a rotation: %v", err)
		}
	}
}

func TestParseKeysetSaysWhatIsWrong(t *testing.T) {
	good := fixedKey(7, "canary")
	good.material = strings.Repeat("canary!!", 4)
	with := func(change func(*tinkKey)) tinkKey {
		k := good
		change(&k)
		return k
	}
	value := base64.StdEncoding.EncodeToString([]byte("\x1a\x20" + good.material))
	for name, c := range map[string]struct {
		text broker.Secret
		want string
	}{
		"empty":             {broker.Secret{}, "not a JSON object"},
		"no JSON":           {broker.NewSecret("canary!!"), "not a JSON object"},
		"a list":            {broker.NewSecret(`["canary!!"]`), "not a JSON object"},
		"null":              {broker.NewSecret(`null`), "no Tink keyset"},
		"cut short":         {broker.NewSecret(tinkJSON(7, good).Reveal()[:200]), "not a JSON object"},
		"something else":    {broker.NewSecret(`{"token": "canary!!"}`), "no Tink keyset"},
		"wrong types":       {broker.NewSecret(`{"primaryKeyId": "canary!!", "key": []}`), "no Tink keyset"},
		"no base64":         {broker.NewSecret(strings.Replace(tinkJSON(7, good).Reveal(), value, "canary!!", 1)), "no Tink keyset"},
		"encrypted":         {broker.NewSecret(`{"encryptedKeyset": "canary!!", "keysetInfo": {}}`), "is encrypted"},
		"no keys":           {tinkJSON(7), "no keys"},
		"two of one id":     {tinkJSON(7, good, good), "two keys with the id 7"},
		"no such primary":   {tinkJSON(8, good), "primary key of this keyset, 8, is missing or not enabled"},
		"primary disabled":  {tinkJSON(7, with(func(k *tinkKey) { k.status = "DISABLED" })), "primary key of this keyset, 7, is missing or not enabled"},
		"primary destroyed": {tinkJSON(7, with(func(k *tinkKey) { k.status = "DESTROYED" })), "is missing or not enabled"},
		"signing key":       {tinkJSON(7, with(func(k *tinkKey) { k.kind = "HmacKey" })), "key 7 is of another kind"},
		"remote key":        {tinkJSON(7, with(func(k *tinkKey) { k.kind = "KmsEnvelopeAeadKey" })), "key 7 is of another kind"},
		"no kind":           {broker.NewSecret(`{"primaryKeyId": 7, "key": [{"keyId": 7, "status": "ENABLED", "outputPrefixType": "TINK"}]}`), "key 7 is of another kind"},
		"raw":               {tinkJSON(7, with(func(k *tinkKey) { k.prefix = "RAW" })), "output prefix TINK"},
		"one of them raw":   {tinkJSON(7, good, with(func(k *tinkKey) { k.prefix, k.id = "RAW", 8 })), "key 8 needs the output prefix TINK"},
		"legacy prefix":     {tinkJSON(7, with(func(k *tinkKey) { k.prefix = "CRUNCHY" })), "output prefix TINK"},
		"short key":         {tinkJSON(7, with(func(k *tinkKey) { k.material = "canary!!" })), "no valid Tink keyset"},
		"odd key":           {tinkJSON(7, with(func(k *tinkKey) { k.material = strings.Repeat("canary!!", 3) })), "keys [7]"},
		"short disabled":    {tinkJSON(7, with(func(k *tinkKey) { k.material, k.id, k.status = "canary!!", 3, "DISABLED" }), good), "no valid Tink keyset"},
		"unknown status":    {tinkJSON(7, good, with(func(k *tinkKey) { k.id, k.status = 8, "UNKNOWN_STATUS" })), "no valid Tink keyset"},
	} {
		k, err := store.ParseKeyset(c.text)
		if k != nil || err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
		if text := fmt.Sprint(err); strings.Contains(text, "canary") || strings.Contains(text, value[:12]) {
			t.Errorf("%s: the error repeats the keyset: %s", name, text)
		}
	}
}

func TestParseKeysetTakesWhatTinkMakes(t *testing.T) {
	short := fixedKey(1, "s")
	short.material = short.material[:16]
	for name, k := range map[string]tinkKey{
		"AES-128-GCM":        short,
		"AES-256-GCM":        fixedKey(1, "k"),
		"XChaCha20-Poly1305": {1, xChaCha, strings.Repeat("k", 32), "ENABLED", "TINK"},
	} {
		t.Run(name, func(t *testing.T) {
			text := tinkJSON(1, k)
			before := parseKeys(t, text)
			sealed := sealPlain(t, before)
			wantOpen(t, before, sealed)
			after := parseKeys(t, noError[broker.Secret](t)(store.PromoteKey(noError[broker.Secret](t)(store.AddKey(text)))))
			wantOpen(t, after, sealed)
			if !bytes.Equal(before.FingerprintKey(), after.FingerprintKey()) {
				t.Error("the fingerprint key has changed")
			}
		})
	}
}

func TestKeysetDoesNotPrintItself(t *testing.T) {
	text := tinkJSON(7, fixedKey(7, "k"))
	k := parseKeys(t, text)
	var all strings.Builder
	log := slog.New(slog.NewJSONHandler(&all, nil))
	log.Info("j", "keyset", k, "in", struct{ K *store.Keyset }{k}, "by value", *k)
	slog.New(slog.NewTextHandler(&all, nil)).Info("t", "keyset", k, "by value", *k)
	for _, v := range []any{k, *k, &k, []*store.Keyset{k}, struct{ k *store.Keyset }{k}, struct{ k store.Keyset }{*k}, struct{ K store.Keyset }{*k}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%c", "%o", "%b"} {
			fmt.Fprintf(&all, verb+"\n", v)
		}
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(b)
	}
	fingerprint := k.FingerprintKey()
	for _, secret := range [][]byte{[]byte("kkkk"), fingerprint[:8]} {
		for _, shown := range []string{
			string(secret), hex.EncodeToString(secret), strings.ToUpper(hex.EncodeToString(secret)), base64.StdEncoding.EncodeToString(secret)[:5],
			strings.Trim(fmt.Sprint(secret), "[]"), strings.Trim(fmt.Sprintf("%#v", secret), "[]byte{}"), strings.Trim(fmt.Sprintf("%o", secret), "[]"), strings.Trim(fmt.Sprintf("%b", secret), "[]"),
		} {
			if strings.Contains(all.String(), shown) {
				t.Errorf("%q was printed in\n%s", shown, all.String())
			}
		}
	}
	if !strings.Contains(all.String(), `"keyset":"[redacted keyset]"`) {
		t.Errorf("the log has\n%s", all.String())
	}
	k.FingerprintKey()[0]++
	if _, ids := k.KeyIDs(); len(ids) > 0 {
		ids[0]++
	}
	if primary, ids := k.KeyIDs(); primary != 7 || ids[0] != 7 || !bytes.Equal(k.FingerprintKey(), fingerprint) {
		t.Error("a caller has changed the keyset")
	}
}

func TestKeysetIsSafeForConcurrentUse(t *testing.T) {
	k := parseKeys(t, noError[broker.Secret](t)(store.NewKeyset()))
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 100 {
				sealed, err := k.Seal([]byte(sealText), sealFamily, sealSlot)
				if err != nil {
					t.Error(err)
				}
				wantOpen(t, k, sealed)
			}
		})
	}
	wg.Wait()
}

// FuzzOpen holds that nothing opens but what was sealed for this place.
func FuzzOpen(f *testing.F) {
	k := parseKeys(f, tinkJSON(7, fixedKey(7, "a"), fixedKey(8, "b")))
	sealed := sealPlain(f, k)
	f.Add(sealed, sealFamily, sealSlot)
	f.Add(sealed[:20], sealFamily, sealSlot)
	f.Add(sealed, sealFamily+sealSlot, "")
	f.Add(sealPlain(f, parseKeys(f, tinkJSON(9, fixedKey(9, "c")))), sealFamily, sealSlot)
	f.Add([]byte("tb\x02\x02"), sealFamily, sealSlot)
	f.Add([]byte("tb\x01\x01\x01\x00\x00\x00\x08"), "", "")
	f.Fuzz(func(t *testing.T, value []byte, toFamily, toSlot string) {
		got, err := k.Open(value, toFamily, toSlot)
		if err == nil {
			// Seeds of other runs were sealed with the same keys.
			if string(got) != sealText || toFamily != sealFamily || toSlot != sealSlot {
				t.Fatalf("%x opened in %q, %q as %q", value, toFamily, toSlot, got)
			}
			return
		}
		if got != nil || errors.Is(err, store.ErrCorrupt) == errors.Is(err, store.ErrUnreadable) {
			t.Errorf("%q, %v", got, err)
		}
	})
}

// FuzzParseKeyset holds that a keyset that is taken works, through a rotation.
func FuzzParseKeyset(f *testing.F) {
	disabled := fixedKey(1, "a")
	disabled.status = "DISABLED"
	f.Add(tinkJSON(1, fixedKey(1, "a")).Reveal())
	f.Add(tinkJSON(2, disabled, fixedKey(2, "b"), fixedKey(3, "c")).Reveal())
	f.Add(tinkJSON(1, tinkKey{1, xChaCha, strings.Repeat("x", 32), "ENABLED", "TINK"}).Reveal())
	f.Add(tinkJSON(1, tinkKey{1, aesGCM, "short", "ENABLED", "RAW"}).Reveal())
	f.Add(`{"encryptedKeyset": "AAAA"}`)
	f.Add(`{"primary_key_id": 1, "key": [{"key_data": null}, null]}`)
	f.Fuzz(func(t *testing.T, text string) {
		k, err := store.ParseKeyset(broker.NewSecret(text))
		if err != nil {
			if k != nil || len(err.Error()) > 400 {
				t.Errorf("%v, %v", k, err)
			}
			return
		}
		sealed := sealPlain(t, k)
		wantOpen(t, k, sealed)
		added := noError[broker.Secret](t)(store.AddKey(broker.NewSecret(text)))
		promoted := noError[broker.Secret](t)(store.PromoteKey(added))
		dropped := noError[broker.Secret](t)(store.DropKeys(promoted, false))
		for _, next := range []broker.Secret{added, promoted, dropped} {
			n := parseKeys(t, next)
			if !bytes.Equal(n.FingerprintKey(), k.FingerprintKey()) || len(k.FingerprintKey()) != 32 {
				t.Error("the fingerprint key has changed")
			}
			if next != dropped {
				wantOpen(t, n, sealed)
			} else {
				wantShut(t, n, sealed, store.ErrUnreadable)
			}
		}
	})
}
