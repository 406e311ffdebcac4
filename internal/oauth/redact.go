package oauth

import (
	"encoding/base64"
	"errors"
	"net/url"
	"slices"
	"strings"
	"unicode"
)

const (
	// maxProviderText is how much of a provider's words is repeated.
	maxProviderText = 200
	// maxExamined is how much of them is looked at.
	maxExamined = 512
	// A provider may repeat a part of what it was sent; this many characters
	// in a row are taken for a part of a secret, fewer for chance.
	revealing = 8
	// tokenLength is from where on a run of characters may be a token.
	tokenLength = 20

	hidden = "[redacted]"
)

// redactor shows a provider's words without what must not be shown: any part
// of a secret that was sent, in any spelling, and whatever looks like a token.
type redactor struct {
	pieces map[string]bool // revealing parts of secrets
	short  []string        // secrets that are shorter than that
}

func newRedactor(clientID string, request TokenRequest) *redactor {
	r := &redactor{pieces: map[string]bool{}}
	user, password := basicHalves(clientID, request.ClientSecret)
	r.hide(request.ClientSecret.Reveal())
	r.hide(request.assertion.Reveal())
	for _, secret := range request.Secrets {
		r.hide(secret.Reveal())
	}
	if !request.ClientSecret.IsEmpty() {
		r.hideBase64(user + ":" + password)
	}
	return r
}

// hide remembers a secret in the spellings in which it may come back.
func (r *redactor) hide(secret string) {
	if secret == "" {
		return
	}
	r.hideSpelling(secret)
	r.hideSpelling(url.QueryEscape(secret))
	r.hideSpelling(basicEncode(secret))
	r.hideSpelling(url.PathEscape(secret))
	r.hideBase64(secret)
}

func (r *redactor) hideBase64(secret string) {
	r.hideSpelling(base64.RawStdEncoding.EncodeToString([]byte(secret)))
	r.hideSpelling(base64.RawURLEncoding.EncodeToString([]byte(secret)))
}

func (r *redactor) hideSpelling(spelling string) {
	s := fold(plain(spelling, len(spelling)))
	if len(s) < revealing {
		r.short = append(r.short, s)
		return
	}
	for i := range len(s) - revealing + 1 {
		r.pieces[s[i:i+revealing]] = true
	}
}

// show is s fit to be shown: printable ASCII of at most limit bytes.
func (r *redactor) show(s string, limit int) string {
	text := plain(s, maxExamined)
	secret := make([]bool, len(text))
	r.markSecrets(fold(text), secret)
	markTokens(text, secret)
	shown := replaceMarked(text, secret)
	if len(shown) > limit {
		return shown[:limit-len("...")] + "..."
	}
	return shown
}

// finds reports whether a part of a secret is in s.
func (r *redactor) finds(s string) bool {
	text := fold(plain(s, len(s)))
	secret := make([]bool, len(text))
	r.markSecrets(text, secret)
	return slices.Contains(secret, true)
}

// cause is err, or where its words must not be shown an error with what is left
// of them.
func (r *redactor) cause(err error) error {
	if text := err.Error(); r.show(text, maxExamined) != plain(text, len(text)) {
		return errors.New(r.show(text, maxExamined))
	}
	return err
}

func (r *redactor) markSecrets(text string, secret []bool) {
	for i := range len(text) - revealing + 1 {
		if r.pieces[text[i:i+revealing]] {
			mark(secret[i : i+revealing])
		}
	}
	for _, s := range r.short {
		for from := 0; s != ""; from++ {
			i := strings.Index(text[from:], s)
			if i < 0 {
				break
			}
			from += i
			mark(secret[from : from+len(s)])
		}
	}
}

// markTokens marks the runs that may be tokens, JWTs or keys. Words, however
// long, and UUIDs, which name failures for support, are none.
func markTokens(text string, secret []bool) {
	for from := 0; from < len(text); {
		run := strings.IndexFunc(text[from:], func(c rune) bool { return !isTokenRune(c) })
		if run < 0 {
			run = len(text) - from
		}
		if looksLikeToken(text[from : from+run]) {
			mark(secret[from : from+run])
		}
		from += run + 1
	}
}

func isTokenRune(c rune) bool {
	return unicode.IsLetter(c) || unicode.IsDigit(c) || strings.ContainsRune("-._~+/=%", c)
}

func looksLikeToken(run string) bool {
	return len(run) >= tokenLength && !isUUID(run) && strings.ContainsAny(run, "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ+=%") ||
		len(run) >= 3*tokenLength
}

func isUUID(s string) bool {
	return len(s) == 36 && strings.Count(s, "-") == 4 && strings.Trim(s, "0123456789abcdefABCDEF-") == ""
}

func mark(marks []bool) {
	for i := range marks {
		marks[i] = true
	}
}

func replaceMarked(text string, marked []bool) string {
	var b strings.Builder
	for i := range len(text) {
		switch {
		case !marked[i]:
			b.WriteByte(text[i])
		case i == 0 || !marked[i-1]:
			b.WriteString(hidden)
		}
	}
	return b.String()
}

// plain is s in printable ASCII without quotation marks, so that it can stand
// between them; runs of blanks become one. It stops after limit bytes.
func plain(s string, limit int) string {
	var b strings.Builder
	blank := true
	for _, c := range s {
		switch {
		case b.Len() >= limit:
			return b.String()
		case unicode.IsSpace(c) || unicode.IsControl(c):
			c = ' '
		case c == '"':
			c = '\''
		case c > unicode.MaxASCII:
			c = '?'
		}
		if c != ' ' || !blank {
			b.WriteRune(c)
		}
		blank = c == ' '
	}
	return strings.TrimSuffix(b.String(), " ")
}

// fold makes spellings that differ in case equal; it keeps ASCII's length.
func fold(ascii string) string { return strings.ToLower(ascii) }
