package oauth_test

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// FuzzAnswer serves any answer and holds what callers rely on.
func FuzzAnswer(f *testing.F) {
	f.Add(uint16(200), "application/json", "", "", []byte(bearer))
	f.Add(uint16(400), "application/json", "", "t-1", []byte(`{"error":"invalid_client","error_description":"`+canary+`"}`))
	f.Add(uint16(200), "text/plain", "", "", []byte("access_token=a&expires_in=-1"))
	f.Add(uint16(302), "https://elsewhere.example/?"+canary, "30", "", []byte("<html>"))
	f.Add(uint16(429), "", "Fri, 31 Dec 1999 23:59:59 GMT", "", []byte{0xff, 0xfe})
	f.Add(uint16(200), "", "", "", []byte(`{"access_token":"a","expires_in":"1e400","scope":["a"],"token_type":"BeArEr","refresh_token":null}`))
	var now answering
	address := serve(f, &now)
	client := clientFor(f, address, revoking(address))
	f.Fuzz(func(t *testing.T, status uint16, text, wait, trace string, body []byte) {
		now = answering{200 + int(status)%800, text, wait, trace, body}
		if err := client.Revoke(t.Context(), broker.NewSecret("token-"+canary), broker.RefreshToken, broker.NewSecret(canary)); err != nil {
			checkFailure(t, failure(t, nil, err))
		}
		grant, err := request(t, client)
		again, onceErr := client.RequestToken(t.Context(), spend(nil))
		if (err == nil) != (onceErr == nil) {
			t.Errorf("as a repeatable request: %v; as a one-time one: %v", err, onceErr)
		}
		if onceErr != nil {
			checkFailure(t, failure(t, again, onceErr))
		}
		if err != nil {
			checkFailure(t, failure(t, grant, err))
			return
		}
		if grant.AccessToken.IsEmpty() || grant.Lifetime < 0 || grant.Lifetime > 10*365*24*time.Hour || grant.TokenType != "Bearer" && grant.TokenType != "DPoP" {
			t.Errorf("grant %+v of lifetime %s", grant, grant.Lifetime)
		}
		for _, c := range []byte(grant.AccessToken.Reveal() + grant.RefreshToken.Reveal() + grant.IDToken.Reveal()) {
			if c < ' ' || c > '~' {
				t.Errorf("a token holds %q", c)
			}
		}
	})
}

func checkFailure(t *testing.T, e *broker.IssueError) {
	if e.Kind < broker.Unavailable || e.Kind > broker.RequestRejected {
		t.Errorf("kind is %v", e.Kind)
	}
	if e.Outcome != broker.Answered && e.Outcome != broker.OutcomeUnknown {
		t.Errorf("outcome is %s", outcomeName(e.Outcome))
	}
	if e.RetryAfter < 0 || e.RetryAfter > time.Hour {
		t.Errorf("RetryAfter is %s", e.RetryAfter)
	}
	if len(e.Text) > 1000 || strings.ContainsFunc(e.Text+e.Trace, func(c rune) bool { return c < ' ' || c > '~' }) {
		t.Errorf("text is %q, trace %q", e.Text, e.Trace)
	}
}

type answering struct {
	status            int
	text, wait, trace string
	body              []byte
}

func (a *answering) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", a.text)
	w.Header().Set("Location", a.text)
	w.Header().Set("Retry-After", a.wait)
	w.Header().Set("X-Trace-ID", a.trace)
	w.WriteHeader(a.status)
	w.Write(a.body)
}

// FuzzRetryAfter holds the bounds of Retry-After, and plain seconds exactly.
func FuzzRetryAfter(f *testing.F) {
	f.Add("120", "")
	f.Add("1.5e3", "")
	f.Add("Fri, 31 Dec 1999 23:59:59 GMT", "Fri, 31 Dec 1999 23:59:00 GMT")
	f.Add("Friday, 31-Dec-99 23:59:59 GMT", "tomorrow")
	f.Add("-1", "NaN")
	var wait, date string
	client := clientFor(f, serve(f, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", wait)
		w.Header().Set("Date", date)
		w.WriteHeader(http.StatusTooManyRequests)
	})))
	f.Fuzz(func(t *testing.T, w, d string) {
		if strings.ContainsFunc(w+d, unicode.IsControl) {
			return // no header, and no complete answer
		}
		wait, date = w, d
		grant, err := request(t, client)
		e := failure(t, grant, err)
		wantKind(t, e, broker.Throttled)
		checkFailure(t, e)
		var n uint16
		if _, err := fmt.Sscanf(w, "%d", &n); err == nil && fmt.Sprint(n) == w && e.RetryAfter != min(time.Duration(n)*time.Second, time.Hour) {
			t.Errorf("%q was taken for %s", w, e.RetryAfter)
		}
	})
}

// FuzzEncoding sends any credentials both ways and decodes them with a decoder
// that shares nothing with the encoder.
func FuzzEncoding(f *testing.F) {
	f.Add("client", "secret", "value")
	f.Add("https://id/a b", canary, "é+%2B %")
	f.Add("a:b", "::", "\x00\xff")
	var post, auth string
	address := serve(f, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body) // a body cut short fails the comparison
		post, auth = string(body), r.Header.Get("Authorization")
		io.WriteString(w, bearer)
	}))
	transport := oauth.NewTransport(oauth.TransportConfig{})
	f.Cleanup(transport.CloseIdleConnections)
	f.Fuzz(func(t *testing.T, id, secret, value string) {
		for _, style := range []oauth.ClientAuth{oauth.ClientSecretPost, oauth.ClientSecretBasic} {
			client, err := oauth.NewClient(oauth.ProfileConfig{TokenURL: address, ClientID: id, ClientAuth: style, Transport: transport})
			if err != nil {
				return // an ID that no client can have
			}
			asked := oauth.TokenRequest{
				GrantType:    "password",
				ClientSecret: broker.NewSecret(secret),
				Secrets:      map[string]broker.Secret{"password": broker.NewSecret(value)},
			}
			if _, err := client.RequestToken(t.Context(), asked); err != nil {
				t.Fatal(err)
			}
			form, err := decodeForm(post)
			if err != nil || form["grant_type"] != "password" || form["password"] != value {
				t.Fatalf("the form %q reads as %q, %v", post, form, err)
			}
			if style == oauth.ClientSecretPost {
				if form["client_id"] != id || form["client_secret"] != secret || auth != "" {
					t.Errorf("client_secret_post: form %q, header %q", form, auth)
				}
				continue
			}
			gotID, gotSecret, err := decodeBasic(auth)
			if err != nil || gotID != id || gotSecret != secret || form["client_id"]+form["client_secret"] != "" {
				t.Errorf("client_secret_basic: %q, %q, %v, form %q", gotID, gotSecret, err, form)
			}
		}
	})
}

func decodeForm(body string) (map[string]string, error) {
	form := map[string]string{}
	for pair := range strings.SplitSeq(body, "&") {
		name, value, found := strings.Cut(pair, "=")
		decoded, err := percentDecode(strings.ReplaceAll(value, "+", " "))
		if _, again := form[name]; !found || again || err != nil {
			return nil, fmt.Errorf("pair %q: %v", pair, err)
		}
		form[name] = decoded
	}
	return form, nil
}

// decodeBasic knows percent signs and not the plus sign, as some servers do.
func decodeBasic(header string) (id, secret string, err error) {
	raw, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(header, "Basic "))
	left, right, found := strings.Cut(string(raw), ":")
	if err != nil || !found {
		return "", "", fmt.Errorf("header %q: %v", header, err)
	}
	id, idErr := percentDecode(left)
	secret, secretErr := percentDecode(right)
	return id, secret, errors.Join(idErr, secretErr)
}

func percentDecode(s string) (string, error) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c <= ' ' && c != ' ' || c > '~' {
			return "", fmt.Errorf("%q is not encoded", c)
		}
		if c == '%' {
			if _, err := fmt.Sscanf(s[i:min(i+3, len(s))], "%%%02x", &c); err != nil {
				return "", err
			}
			i += 2
		}
		b.WriteByte(c)
	}
	return b.String(), nil
}
