package oauth

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// members are the members of an answer that mean something here; others are
// ignored (RFC 6749 section 5.1). An answer that is form-encoded has them as
// JSON strings.
type members map[string]json.RawMessage

var known = []string{
	"access_token", "token_type", "expires_in", "scope", "refresh_token", "id_token",
	"error", "error_code", "error_description", "error_hint", "details",
}

// flaw is why a body cannot be used, in words that follow "answered 200 with".
type flaw string

func (f flaw) Error() string { return string(f) }

const (
	flawEmpty      flaw = "an empty body"
	flawPage       flaw = "an HTML page, probably from a gateway"
	flawOversized  flaw = "a body of more than 1 MiB"
	flawCompressed flaw = "a compressed body, which was not asked for"
	flawUnreadable flaw = "a body that is neither JSON nor form-encoded"
	flawJSON       flaw = "JSON that is not valid"
)

var byteOrderMark = []byte("\xef\xbb\xbf")

// read finds out what the body is by looking at it: media types are too often
// wrong to be believed.
func (a *answer) read() (members, error) {
	body := bytes.TrimSpace(bytes.TrimPrefix(a.body, byteOrderMark))
	switch {
	case len(a.body) > maxBodyBytes:
		return nil, flawOversized
	case len(body) == 0:
		return nil, flawEmpty
	case body[0] == '{':
		return readJSON(body)
	case body[0] == '<':
		return nil, flawPage
	}
	if m, err := readForm(string(body)); err != flawUnreadable {
		return m, err
	}
	if coding := a.header.Get("Content-Encoding"); coding != "" && !strings.EqualFold(coding, "identity") {
		return nil, flawCompressed
	}
	return nil, flawUnreadable
}

func readJSON(body []byte) (members, error) {
	if !json.Valid(body) {
		return nil, flawJSON
	}
	m := members{}
	d := json.NewDecoder(bytes.NewReader(body))
	_, _ = d.Token() // the opening brace; nothing can fail in what is valid
	for d.More() {
		name, _ := d.Token()
		var value json.RawMessage
		_ = d.Decode(&value)
		if err := m.add(name.(string), value); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func readForm(body string) (members, error) {
	form, err := url.ParseQuery(body)
	if err != nil || !form.Has("access_token") && !form.Has("error") {
		return nil, flawUnreadable
	}
	m := members{}
	for name, values := range form {
		for _, v := range values {
			raw, _ := json.Marshal(v) // a string always can be
			if err := m.add(name, raw); err != nil {
				return nil, err
			}
		}
	}
	return m, nil
}

// add refuses a second value for a known name: which of two tokens or errors
// counts must not depend on who reads them.
func (m members) add(name string, value json.RawMessage) error {
	if !slices.Contains(known, name) {
		return nil
	}
	if _, again := m[name]; again {
		return flaw("two values for " + name)
	}
	m[name] = value
	return nil
}

var errNotString = errors.New("not a string")

// stringMember is a member's string; absent and null are the empty one.
func stringMember(raw json.RawMessage) (string, error) {
	if len(raw) == 0 || string(raw) == "null" {
		return "", nil
	}
	if raw[0] != '"' {
		return "", errNotString
	}
	var s string
	err := json.Unmarshal(raw, &s)
	return s, err
}

// text is a member that is a string; "" when it is anything else.
func (m members) text(name string) string {
	s, _ := stringMember(m[name])
	return s
}

// grant reads a successful answer (RFC 6749 section 5.1). Its error is a flaw.
func (m members) grant() (*broker.Grant, error) {
	access, err := m.token("access_token")
	if err != nil {
		return nil, err
	}
	if access.IsEmpty() {
		return nil, flaw("no access_token and no error")
	}
	refresh, refreshErr := m.token("refresh_token")
	id, idErr := m.token("id_token")
	tokenType, typeErr := m.tokenType()
	scopes, scopeErr := m.scopes()
	life, lifeErr := lifetime(m["expires_in"])
	if lifeErr != nil {
		lifeErr = flaw(fmt.Sprintf("an expires_in that is %s", lifeErr))
	}
	for _, err := range []error{refreshErr, idErr, typeErr, scopeErr, lifeErr} {
		if err != nil {
			return nil, err
		}
	}
	return &broker.Grant{
		AccessToken:  access,
		TokenType:    tokenType,
		Lifetime:     life,
		Scopes:       scopes,
		RefreshToken: refresh,
		IDToken:      id,
	}, nil
}

// token is a member of the *VSCHAR that all tokens are made of (RFC 6749
// appendix A.12); empty when there is none. Blanks inside are the server's
// affair, blanks around would not survive a header.
func (m members) token(name string) (broker.Secret, error) {
	s, err := stringMember(m[name])
	if err != nil || !isVSCHAR(s) || strings.TrimSpace(s) != s {
		return broker.Secret{}, flaw(fmt.Sprintf("a value for %s that is no token", name))
	}
	return broker.NewSecret(s), nil
}

// tokenType is in the case that resource servers expect, since some compare
// it. A type that is not understood must not be used (RFC 6749 section 7.1).
func (m members) tokenType() (string, error) {
	s, err := stringMember(m["token_type"])
	if err != nil {
		return "", flaw("a token_type that is no string")
	}
	switch strings.ToLower(strings.TrimSpace(s)) {
	case "", "bearer":
		return "Bearer", nil
	case "dpop":
		return "DPoP", nil
	}
	return "", flaw("a token_type that is neither Bearer nor DPoP")
}

// scopes are separated by blanks, or in an array as some servers have them.
// None means as requested.
func (m members) scopes() ([]string, error) {
	list := make([]string, 1)
	var err error
	if list[0], err = stringMember(m["scope"]); err != nil {
		var array []*string // a pointer, as null would else be an empty string
		err = json.Unmarshal(m["scope"], &array)
		list = list[:0]
		for _, s := range array {
			if s == nil {
				return nil, errScope
			}
			list = append(list, *s)
		}
	}
	scopes := strings.Fields(strings.Join(list, " "))
	if err != nil || !isVSCHAR(strings.Join(scopes, "")) {
		return nil, errScope
	}
	if len(scopes) == 0 {
		return nil, nil
	}
	return scopes, nil
}

const errScope flaw = "a scope that is no list of scopes"

// isVSCHAR reports whether s consists of the visible characters and the blank
// of ASCII (RFC 6749 appendix A).
func isVSCHAR(s string) bool {
	return strings.IndexFunc(s, func(c rune) bool { return c < ' ' || c > '~' }) < 0
}
