package serviceaccount_test

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/serviceaccount"
)

// Every algorithm that can be configured works, with a key of its own kind.
func TestGoodTokens(t *testing.T) {
	for _, s := range []signer{
		key("rsa", jose.RS256), key("rsa", jose.RS384), key("rsa", jose.RS512), key("rsa", jose.PS256), key("rsa", jose.PS384), key("rsa", jose.PS512),
		key("p256", jose.ES256), key("p384", jose.ES384), key("p521", jose.ES512), key("ed25519", jose.EdDSA),
	} {
		t.Run(string(s.algorithm), func(t *testing.T) {
			c := prod(t, s)
			c.Algorithms = []string{string(s.algorithm)}
			said := claims()
			got := accepted(t, verifier(c), s.sign(t, said))
			if got.Name != "k8s://prod/shop/web" || got.Proof != access.ServiceAccount || got.Expires.Unix() != said["exp"] || len(got.Groups) > 0 || got.Forwarder != "" {
				t.Errorf("got %+v", got)
			}
		})
	}
}

func TestGoodTokensOfSomeKinds(t *testing.T) {
	now := time.Now().Unix()
	for name, changes := range map[string]map[string]any{
		"one audience, not in a list": {"aud": audience},
		"several audiences":           {"aud": []string{"other", audience}},
		"3,607 seconds":               {"exp": now + 3607},
		"10 minutes":                  {"exp": now + 600},
		"no private claims":           {"kubernetes.io": nil},
		"a name with dots":            {"sub": "system:serviceaccount:shop:web.v2", "kubernetes.io": bound("shop", "web.v2")},
		"a clock that is ahead":       {"iat": now + 20, "nbf": now + 20},
		"a clock that is behind":      {"iat": now - 3600, "nbf": now - 3600, "exp": now - 20},
	} {
		t.Run(name, func(t *testing.T) { accepted(t, verifier(prod(t, rs256())), rs256().sign(t, but(claims(), changes))) })
	}
	t.Run("a type", func(t *testing.T) {
		accepted(t, verifier(prod(t, rs256())), rs256().signWith(t, (&jose.SignerOptions{}).WithType("JWT"), claims()))
	})
}

func bound(namespace, account string) map[string]any {
	return map[string]any{"namespace": namespace, "serviceaccount": map[string]any{"name": account}}
}

// What is wrong with the claims of a token that the cluster has signed.
func TestClaimsThatAreRefused(t *testing.T) {
	now := time.Now().Unix()
	long := strings.Repeat("a", 254)
	for name, tc := range map[string]struct {
		changes map[string]any
		words   string
	}{
		"another audience":             {map[string]any{"aud": []string{"vault"}}, "another audience"},
		"an audience in other letters": {map[string]any{"aud": []string{"Token-Broker"}}, "another audience"},
		"a longer audience":            {map[string]any{"aud": []string{audience + "/"}}, "another audience"},
		"an audience of blanks":        {map[string]any{"aud": "vault " + audience}, "another audience"},
		"no audience":                  {map[string]any{"aud": nil}, "claims"},
		"an empty list of audiences":   {map[string]any{"aud": []string{}}, "claims"},
		"audience null":                {map[string]any{"aud": json.RawMessage("null")}, "claims"},
		"an audience that is a number": {map[string]any{"aud": []any{1}}, "claims"},
		"another issuer":               {map[string]any{"iss": "https://evil.example.com"}, "an issuer that is not configured"},
		"a slash more":                 {map[string]any{"iss": issuer + "/"}, "an issuer that is not configured"},
		"an issuer in other letters":   {map[string]any{"iss": strings.ToUpper(issuer)}, "an issuer that is not configured"},
		"no issuer":                    {map[string]any{"iss": nil}, "claims"},
		"several issuers":              {map[string]any{"iss": []string{issuer}}, "claims"},
		"expired":                      {map[string]any{"iat": now - 3600, "nbf": now - 3600, "exp": now - 31}, "has expired"},
		"not valid yet":                {map[string]any{"nbf": now + 40}, "not valid yet"},
		"made in the future":           {map[string]any{"iat": now + 40}, "not valid yet"},
		"lives too long":               {map[string]any{"exp": now + 3600 + 20}, "longer than max_lifetime"},
		"a year":                       {map[string]any{"exp": now + 365*24*3600}, "longer than max_lifetime"},
		"long before and for long":     {map[string]any{"nbf": now - 3600, "exp": now + 3600}, "longer than max_lifetime"},
		"ends before it begins":        {map[string]any{"exp": now, "iat": now, "nbf": now}, "contradict each other"},
		"no end":                       {map[string]any{"exp": nil}, "claims"},
		"no beginning":                 {map[string]any{"nbf": nil}, "claims"},
		"no making":                    {map[string]any{"iat": nil}, "claims"},
		"an end that is text":          {map[string]any{"exp": fmt.Sprint(now + 600)}, "claims"},
		"an end that is a fraction":    {map[string]any{"exp": json.RawMessage(fmt.Sprint(now+600) + ".5")}, "claims"},
		"an end beyond all numbers":    {map[string]any{"exp": json.RawMessage("1e300")}, "claims"},
		"an end beyond all years":      {map[string]any{"exp": int64(1) << 62}, "claims"},
		"an end before all years":      {map[string]any{"exp": -(int64(1) << 62)}, "claims"},
		"a secret's, which never ends": {map[string]any{
			"iss": "kubernetes/serviceaccount", "aud": nil, "exp": nil, "iat": nil, "nbf": nil, "kubernetes.io": nil,
			"kubernetes.io/serviceaccount/namespace": "shop", "kubernetes.io/serviceaccount/service-account.name": "web"}, "claims"},
		"a user":                    {map[string]any{"sub": "alice", "kubernetes.io": nil}, "not that of a service account"},
		"a node":                    {map[string]any{"sub": "system:node:node-1", "kubernetes.io": nil}, "not that of a service account"},
		"a group":                   {map[string]any{"sub": "system:serviceaccounts:shop:web", "kubernetes.io": nil}, "not that of a service account"},
		"no account":                {map[string]any{"sub": "system:serviceaccount:shop", "kubernetes.io": nil}, "not that of a service account"},
		"an empty account":          {map[string]any{"sub": "system:serviceaccount:shop:", "kubernetes.io": nil}, "not that of a service account"},
		"an empty namespace":        {map[string]any{"sub": "system:serviceaccount::web", "kubernetes.io": nil}, "not that of a service account"},
		"too many parts":            {map[string]any{"sub": "system:serviceaccount:shop:web:admin", "kubernetes.io": nil}, "not that of a service account"},
		"a namespace with dots":     {map[string]any{"sub": "system:serviceaccount:sh.op:web", "kubernetes.io": nil}, "not that of a service account"},
		"a namespace with a slash":  {map[string]any{"sub": "system:serviceaccount:shop/x:web", "kubernetes.io": nil}, "not that of a service account"},
		"an account with a slash":   {map[string]any{"sub": "system:serviceaccount:shop:web/../admin", "kubernetes.io": nil}, "not that of a service account"},
		"an account with a star":    {map[string]any{"sub": "system:serviceaccount:shop:*", "kubernetes.io": nil}, "not that of a service account"},
		"an account with two dots":  {map[string]any{"sub": "system:serviceaccount:shop:a..b", "kubernetes.io": nil}, "not that of a service account"},
		"an account in capitals":    {map[string]any{"sub": "system:serviceaccount:shop:Web", "kubernetes.io": nil}, "not that of a service account"},
		"a long namespace":          {map[string]any{"sub": "system:serviceaccount:" + long[:64] + ":web", "kubernetes.io": nil}, "not that of a service account"},
		"a long account":            {map[string]any{"sub": "system:serviceaccount:shop:" + long, "kubernetes.io": nil}, "not that of a service account"},
		"a line end":                {map[string]any{"sub": "system:serviceaccount:shop:web\n", "kubernetes.io": nil}, "not that of a service account"},
		"no subject":                {map[string]any{"sub": nil}, "claims"},
		"another namespace":         {map[string]any{"kubernetes.io": bound("kube-system", "web")}, "contradicts its subject"},
		"another account":           {map[string]any{"kubernetes.io": bound("shop", "admin")}, "contradicts its subject"},
		"empty private claims":      {map[string]any{"kubernetes.io": map[string]any{}}, "contradicts its subject"},
		"private claims of no kind": {map[string]any{"kubernetes.io": "shop"}, "contradicts its subject"},
		"an account of no kind":     {map[string]any{"kubernetes.io": map[string]any{"namespace": "shop", "serviceaccount": "web"}}, "contradicts its subject"},
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, verifier(prod(t, rs256())), rs256().sign(t, but(claims(), tc.changes)), tc.words)
		})
	}
}

// What is wrong with how a token is written and signed, where its claims are
// right.
func TestFormsThatAreRefused(t *testing.T) {
	good := rs256().sign(t, claims())
	header, body, signature := cut(t, good)
	rsaHeader := `{"alg":"RS256","kid":"rsa"}`
	said := payload(t, claims())
	public, err := x509.MarshalPKIXPublicKey(rs256().private.Public())
	if err != nil {
		t.Fatal(err)
	}
	publicPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public})
	embedded := string(set(t, key("rsa2", jose.RS256)))
	embedded = embedded[len(`{"keys":[`) : len(embedded)-len(`]}`)]
	stranger := signer{"rsa", jose.RS256, keysOfTests()["rsa2"]}
	for name, tc := range map[string]struct{ token, words string }{
		"nothing":                           {"", "no JWT"},
		"garbage":                           {"garbage", "no JWT"},
		"dots":                              {"..", "no JWT"},
		"binary":                            {"\x00\xff.\x00.\xff", "no JWT"},
		"oversized":                         {good + strings.Repeat("A", 16<<10), "longer than 16 KiB"},
		"a blank before":                    {" " + good, "no JWT"},
		"a blank after":                     {good + " ", "no JWT"},
		"a line end after":                  {good + "\n", "no JWT"},
		"a line end inside":                 {header + ".\r\n" + body + "." + signature, "no JWT"},
		"a tab inside":                      {header + ".\t" + body + "." + signature, "no JWT"},
		"padding":                           {good + "==", "no JWT"},
		"the scheme before it":              {"Bearer " + good, "no JWT"},
		"two parts":                         {header + "." + body, "no JWT"},
		"four parts":                        {good + "." + signature, "no JWT"},
		"five parts, encrypted":             {encrypted(t), "no JWT"},
		"no payload":                        {header + ".." + signature, "no JWT"},
		"no signature":                      {header + "." + body + ".", "no JWT"},
		"JSON with one signature":           {inJSON(t, rs256()), "no JWT"},
		"JSON with two signatures":          {inJSON(t, rs256(), key("p256", jose.ES256)), "no JWT"},
		"another spelling of the signature": {header + "." + body + "." + respelled(signature), "no JWT"},
		"half a signature":                  {header + "." + body + "." + signature[:len(signature)/2/4*4], "signature is not valid"},
		"a changed payload":                 {header + "." + encode([]byte(payload(t, but(claims(), map[string]any{"sub": "system:serviceaccount:shop:admin", "kubernetes.io": nil})))) + "." + signature, "signature is not valid"},
		"a changed signature":               {header + "." + body + "." + flipped(signature), "signature is not valid"},
		"a stranger's key of that name":     {stranger.sign(t, claims()), "signature is not valid"},
		"a key that is not there":           {key("rsa2", jose.RS256).sign(t, claims()), "a key that is not the cluster's"},
		"no kid":                            {rs256().raw(t, `{"alg":"RS256"}`, said), "header"},
		"an empty kid":                      {rs256().raw(t, `{"alg":"RS256","kid":""}`, said), "header"},
		"a kid that is a number":            {rs256().raw(t, `{"alg":"RS256","kid":1}`, said), "header"},
		"two kids":                          {rs256().raw(t, `{"alg":"RS256","kid":"p256","kid":"rsa"}`, said), "header"},
		"no alg":                            {rs256().raw(t, `{"kid":"rsa"}`, said), "header"},
		"alg in other letters":              {rs256().raw(t, `{"ALG":"RS256","kid":"rsa"}`, said), "header"},
		"alg none":                          {encode([]byte(`{"alg":"none","kid":"rsa"}`)) + "." + body + "." + signature, "an algorithm that is not accepted"},
		"alg none, unsigned":                {encode([]byte(`{"alg":"none","kid":"rsa"}`)) + "." + body + ".", "no JWT"},
		"alg None":                          {encode([]byte(`{"alg":"None","kid":"rsa"}`)) + "." + body + "." + signature, "an algorithm that is not accepted"},
		"HS256 with the public key":         {shared(publicPEM, said), "an algorithm that is not accepted"},
		"HS256 with the key's DER":          {shared(public, said), "an algorithm that is not accepted"},
		"an algorithm that is not listed":   {key("rsa", jose.RS512).sign(t, claims()), "an algorithm that is not accepted"},
		"an algorithm of another key":       {rs256().raw(t, `{"alg":"RS256","kid":"p256"}`, said), "another algorithm than the key is for"},
		"ES256 with an RSA key":             {rs256().raw(t, `{"alg":"ES256","kid":"rsa"}`, said), "another algorithm than the key is for"},
		"crit":                              {rs256().raw(t, `{"alg":"RS256","kid":"rsa","crit":["exp"]}`, said), "header"},
		"empty crit":                        {rs256().raw(t, `{"alg":"RS256","kid":"rsa","crit":[]}`, said), "header"},
		"a payload as it is":                {rs256().raw(t, `{"alg":"RS256","kid":"rsa","crit":["b64"],"b64":false}`, said), "header"},
		"a key of its own":                  {stranger.raw(t, `{"alg":"RS256","kid":"rsa","jwk":`+embedded+`}`, said), "header"},
		"a place of its own for keys":       {stranger.raw(t, `{"alg":"RS256","kid":"rsa","jku":"https://evil.example.com"}`, said), "header"},
		"certificates of its own":           {stranger.raw(t, `{"alg":"RS256","kid":"rsa","x5c":["AAAA"]}`, said), "header"},
		"nested":                            {rs256().raw(t, `{"alg":"RS256","kid":"rsa","cty":"JWT"}`, good), "header"},
		"a token inside":                    {rs256().raw(t, rsaHeader, good), "claims"},
		"another type":                      {rs256().raw(t, `{"alg":"RS256","kid":"rsa","typ":"at+jwt"}`, said), "header"},
		"a header that is a list":           {rs256().raw(t, `[]`, said), "header"},
		"a header that is null":             {rs256().raw(t, `null`, said), "header"},
		"two headers in one":                {rs256().raw(t, rsaHeader+rsaHeader, said), "header"},
		"claims that are a list":            {rs256().raw(t, rsaHeader, `[]`), "claims"},
		"claims that are null":              {rs256().raw(t, rsaHeader, `null`), "claims"},
		"a claim twice":                     {rs256().raw(t, rsaHeader, said[:len(said)-1]+`,"sub":"system:serviceaccount:shop:admin"}`), "claims"},
		"a claim in other letters":          {rs256().raw(t, rsaHeader, strings.Replace(said, `"aud"`, `"AUD"`, 1)), "claims"},
		"claims of some depth":              {rs256().raw(t, rsaHeader, `{"iss":`+strings.Repeat("[", 8000)), "claims"},
		"private claims that are null":      {rs256().raw(t, rsaHeader, payload(t, but(claims(), map[string]any{"kubernetes.io": json.RawMessage("null")}))), "contradicts"},
		"private claims that are a list":    {rs256().raw(t, rsaHeader, payload(t, but(claims(), map[string]any{"kubernetes.io": json.RawMessage("[null]")}))), "contradicts"},
	} {
		t.Run(name, func(t *testing.T) {
			v := verifier(prod(t, rs256(), key("p256", jose.ES256)))
			refused(t, v, tc.token, tc.words)
			accepted(t, v, good) // and what is right still is
		})
	}
}

func cut(t testing.TB, token string) (header, body, signature string) {
	t.Helper()
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		t.Fatal("no token")
	}
	return parts[0], parts[1], parts[2]
}

// respelled is the same signature with other bits where there are none: 256
// bytes leave four bits of the last letter without a meaning.
func respelled(signature string) string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := strings.IndexByte(alphabet, signature[len(signature)-1])
	return signature[:len(signature)-1] + alphabet[last+1:last+2]
}

func flipped(signature string) string {
	if signature[0] == 'A' {
		return "B" + signature[1:]
	}
	return "A" + signature[1:]
}

// shared is a token that is signed with the public key as a shared secret.
func shared(secret []byte, payload string) string {
	signed := encode([]byte(`{"alg":"HS256","kid":"rsa"}`)) + "." + encode([]byte(payload))
	mac := hmac.New(sha256.New, secret)
	mac.Write([]byte(signed))
	return signed + "." + encode(mac.Sum(nil))
}

func encrypted(t testing.TB) string {
	t.Helper()
	e, err := jose.NewEncrypter(jose.A128GCM, jose.Recipient{Algorithm: jose.RSA_OAEP, Key: rs256().private.Public(), KeyID: "rsa"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := e.Encrypt([]byte(rs256().sign(t, claims())))
	if err != nil {
		t.Fatal(err)
	}
	token, err := sealed.CompactSerialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// inJSON is a token in the other serialisation, with any number of signatures.
func inJSON(t testing.TB, signers ...signer) string {
	t.Helper()
	var by []jose.SigningKey
	for _, s := range signers {
		by = append(by, jose.SigningKey{Algorithm: s.algorithm, Key: jose.JSONWebKey{Key: s.private, KeyID: s.id}})
	}
	all, err := jose.NewMultiSigner(by, nil)
	if err != nil {
		t.Fatal(err)
	}
	signed, err := all.Sign([]byte(payload(t, claims())))
	if err != nil {
		t.Fatal(err)
	}
	return signed.FullSerialize()
}

// A cluster's keys vouch for its own tokens alone, even where key ids are the
// same.
func TestClustersDoNotVouchForEachOther(t *testing.T) {
	const otherIssuer = "https://other.example.com"
	own, foreign := signer{"k", jose.RS256, keysOfTests()["rsa"]}, signer{"k", jose.RS256, keysOfTests()["rsa2"]}
	here := prod(t, own)
	there := serviceaccount.Cluster{Name: "other", Issuer: otherIssuer, Audience: "broker-of-other", Keys: keys(t, foreign)}
	v := verifier(here, there)
	theirs := but(claims(), map[string]any{"iss": otherIssuer, "aud": "broker-of-other"})
	if got := accepted(t, v, own.sign(t, claims())).Name; got != "k8s://prod/shop/web" {
		t.Errorf("got %s", got)
	}
	if got := accepted(t, v, foreign.sign(t, theirs)).Name; got != "k8s://other/shop/web" {
		t.Errorf("got %s", got)
	}
	refused(t, v, foreign.sign(t, claims()), "signature is not valid")
	refused(t, v, own.sign(t, theirs), "signature is not valid")
	refused(t, v, own.sign(t, but(claims(), map[string]any{"aud": "broker-of-other"})), "another audience")
	refused(t, verifier(), own.sign(t, claims()), "an issuer that is not configured")
}

// What a key says that it is for is all it is for.
func TestKeysAreUsedForWhatTheyAreFor(t *testing.T) {
	s := rs256()
	for name, tc := range map[string]struct{ members, words string }{
		"any":                    {``, ""},
		"for signatures":         {`,"use":"sig"`, ""},
		"for this algorithm":     {`,"alg":"RS256"`, ""},
		"for another algorithm":  {`,"alg":"PS256"`, "another algorithm than the key is for"},
		"for encryption":         {`,"use":"enc"`, "a key that is not the cluster's"},
		"to verify":              {`,"key_ops":["verify"]`, ""},
		"to encrypt":             {`,"key_ops":["encrypt"]`, "a key that is not the cluster's"},
		"for nothing":            {`,"key_ops":[]`, "a key that is not the cluster's"},
		"with certificates":      {`,"x5c":["AAAA"],"x5t":"AAAA"`, ""},
		"of a kind of the day":   {`},{"kty":"AKP","kid":"x","alg":"ML-DSA-44","pub":"AAAA"`, ""},
		"beside another's curve": {`},{"kty":"EC","kid":"x","crv":"secp256k1","x":"AA","y":"AA"`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			whole := string(set(t, signer{"spare", jose.ES256, keysOfTests()["p256"]}, s))
			whole = strings.Replace(whole, `{"use":"sig","kty":"RSA"`, `{"kty":"RSA"`, 1)
			text := strings.TrimSuffix(whole, "}]}") + tc.members + "}]}"
			k, err := serviceaccount.ParseKeys([]byte(text))
			if err != nil {
				t.Fatal(err)
			}
			v := verifier(serviceaccount.Cluster{Name: "prod", Issuer: issuer, Audience: audience, Keys: k})
			if token := s.sign(t, claims()); tc.words == "" {
				accepted(t, v, token)
			} else {
				refused(t, v, token, tc.words)
			}
		})
	}
}

func TestLongestLifetime(t *testing.T) {
	c := prod(t, rs256())
	c.MaxLifetime = 10 * time.Minute
	v := verifier(c)
	now := time.Now().Unix()
	accepted(t, v, rs256().sign(t, but(claims(), map[string]any{"exp": now + 610})))
	refused(t, v, rs256().sign(t, but(claims(), map[string]any{"exp": now + 611})), "longer than max_lifetime")
}

// One token is one caller, until it ends, and nobody after.
func TestVerifiedTokensAreRemembered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := verifier(prod(t, rs256()))
		token := rs256().sign(t, claims())
		first := accepted(t, v, token)
		if accepted(t, v, token) != first {
			t.Error("another caller for the same token")
		}
		if accepted(t, v, rs256().sign(t, but(claims(), map[string]any{"jti": "other"}))) == first {
			t.Error("the same caller for another token")
		}
		time.Sleep(5*time.Minute + time.Second)
		if accepted(t, v, token) == first {
			t.Error("remembered for more than five minutes")
		}
		time.Sleep(time.Until(first.Expires) + 29*time.Second)
		accepted(t, v, token)
		time.Sleep(time.Second)
		refused(t, v, token, "has expired")
	})
}

// However many ask at once with one token, they are one caller.
func TestOneCallerForManyAtOnce(t *testing.T) {
	v := verifier(prod(t, rs256()))
	token := rs256().sign(t, claims())
	callers := make([]*access.Caller, 50)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() { callers[i], _ = v.Verify(context.Background(), token) })
	}
	wg.Wait()
	for _, c := range callers {
		if c == nil || c != callers[0] {
			t.Fatalf("got %p beside %p", c, callers[0])
		}
	}
}

// Who has no time is told so, and that it is not the token's fault.
func TestNoTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := serviceaccount.New([]serviceaccount.Cluster{remote()}, serviceaccount.Options{Fetch: func(ctx context.Context, _ *serviceaccount.Source) ([]byte, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}})
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		began := time.Now()
		_, err := v.Verify(ctx, rs256().sign(t, claims()))
		var u *serviceaccount.Unavailable
		if !errors.As(err, &u) || !u.Temporary() || time.Since(began) != time.Second {
			t.Errorf("got %v after %v", err, time.Since(began))
		}
		time.Sleep(time.Minute) // the fetch ends by itself
	})
}

// While others' signatures are checked, tokens that are known and tokens that
// need no check do not wait, and the rest no longer than they can.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := verifier(prod(t, rs256()))
		known, fresh := rs256().sign(t, claims()), rs256().sign(t, but(claims(), map[string]any{"jti": "fresh"}))
		accepted(t, v, known)
		release := v.Occupy()
		began := time.Now()
		accepted(t, v, known)
		refused(t, v, rs256().sign(t, but(claims(), map[string]any{"aud": "other"})), "another audience")
		refused(t, v, key("rsa2", jose.RS256).sign(t, claims()), "a key that is not the cluster's")
		if took := time.Since(began); took != 0 {
			t.Errorf("it took %v", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := v.Verify(ctx, fresh)
		if u := (*serviceaccount.Unavailable)(nil); !errors.As(err, &u) || time.Since(began) != time.Second {
			t.Errorf("got %v after %v", err, time.Since(began))
		}
		go func() {
			time.Sleep(time.Second)
			release()
		}()
		accepted(t, v, fresh)
		if took := time.Since(began); took != 2*time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

var sink *access.Caller

func BenchmarkVerify(b *testing.B) {
	for _, s := range []signer{rs256(), key("p256", jose.ES256)} {
		c := prod(b, s)
		known := verifier(c)
		token := s.sign(b, claims())
		head, body, signature := cut(b, token)
		forged := head + "." + body + "." + flipped(signature)
		for name, run := range map[string]func() (*access.Caller, error){
			"known": func() (*access.Caller, error) { return known.Verify(b.Context(), token) },
			"new":   func() (*access.Caller, error) { return verifier(c).Verify(b.Context(), token) },
			"forged": func() (*access.Caller, error) {
				if c, err := known.Verify(b.Context(), forged); err == nil {
					return c, errors.New("accepted")
				}
				return nil, nil
			},
		} {
			b.Run(string(s.algorithm)+"/"+name, func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					c, err := run()
					if err != nil {
						b.Fatal(err)
					}
					sink = c
				}
			})
		}
	}
}

// The bound on what is remembered holds, and what is used stays.
func TestRememberedTokensAreBounded(t *testing.T) {
	v := verifier(prod(t, key("p256", jose.ES256)))
	const size = 100
	v.Remember(size)
	used := key("p256", jose.ES256).sign(t, claims())
	first := accepted(t, v, used)
	for i := range 5 * size {
		accepted(t, v, key("p256", jose.ES256).sign(t, but(claims(), map[string]any{"jti": i})))
		if n := v.Remembered(); n > size {
			t.Fatalf("%d tokens are remembered, want %d at the most", n, size)
		}
		if i%(size/4) == 0 && accepted(t, v, used) != first {
			t.Fatal("forgot a token that is in use")
		}
	}
	if n := v.Remembered(); n < size/2 {
		t.Errorf("only %d tokens are remembered", n)
	}
	for i := range size {
		refused(t, v, key("p256", jose.ES256).sign(t, but(claims(), map[string]any{"jti": i, "aud": "other"})), "another audience")
	}
	if accepted(t, v, used) != first {
		t.Error("refused tokens pushed out a good one")
	}
}
