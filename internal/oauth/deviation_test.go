package oauth_test

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// member puts a JSON member into an otherwise good answer.
func member(m string) reply {
	return reply{body: `{"access_token":"abc.DEF-123",` + m + `}`}
}

// TestDeviationsThatAreAccepted holds what servers in the field answer instead
// of RFC 6749 section 5.1, by the number that our notes on them give.
func TestDeviationsThatAreAccepted(t *testing.T) {
	hour := broker.Grant{TokenType: "Bearer", Lifetime: time.Hour}
	for name, tc := range map[string]struct {
		answer reply
		want   broker.Grant // the access token is always abc.DEF-123
	}{
		"D.1 expires_in is a string":            {member(`"expires_in":"3600"`), hour},
		"D.1 with blanks":                       {member(`"expires_in":" 3600 "`), hour},
		"D.2 null":                              {member(`"expires_in":null`), broker.Grant{TokenType: "Bearer"}},
		"D.2 empty":                             {member(`"expires_in":""`), broker.Grant{TokenType: "Bearer"}},
		"D.2 zero":                              {member(`"expires_in":0`), broker.Grant{TokenType: "Bearer"}},
		"D.2 missing":                           {member(`"x":0`), broker.Grant{TokenType: "Bearer"}},
		"D.2 fraction":                          {member(`"expires_in":3600.5`), broker.Grant{TokenType: "Bearer", Lifetime: time.Hour + time.Second/2}},
		"D.2 fraction in a string":              {member(`"expires_in":"0.25"`), broker.Grant{TokenType: "Bearer", Lifetime: time.Second / 4}},
		"D.2 exponent":                          {member(`"expires_in":3.6e3`), hour},
		"D.2 next to nothing is not forgotten":  {member(`"expires_in":1e-30`), broker.Grant{TokenType: "Bearer", Lifetime: 1}},
		"D.2 beyond int32":                      {member(`"expires_in":2147483648`), broker.Grant{TokenType: "Bearer", Lifetime: 10 * 365 * 24 * time.Hour}},
		"D.2 beyond int64":                      {member(`"expires_in":9223372036854775808`), broker.Grant{TokenType: "Bearer", Lifetime: 10 * 365 * 24 * time.Hour}},
		"D.2 beyond float64":                    {member(`"expires_in":1e999`), broker.Grant{TokenType: "Bearer", Lifetime: 10 * 365 * 24 * time.Hour}},
		"D.3 expires is not expires_in":         {member(`"expires":3600`), broker.Grant{TokenType: "Bearer"}},
		"D.4 form-encoded":                      {reply{header: map[string]string{"Content-Type": "application/x-www-form-urlencoded"}, body: "access_token=abc.DEF-123&expires_in=3600&scope=a+b"}, broker.Grant{TokenType: "Bearer", Lifetime: time.Hour, Scopes: []string{"a", "b"}}},
		"D.4 form-encoded as text/plain":        {reply{header: map[string]string{"Content-Type": "text/plain"}, body: "access_token=abc.DEF-123&expires_in=3600\n"}, hour},
		"D.4 JSON as text/html":                 {reply{header: map[string]string{"Content-Type": "text/html"}, body: bearer}, hour},
		"D.4 JSON without a media type":         {reply{header: map[string]string{"Content-Type": ""}, body: bearer}, hour},
		"D.4 byte order mark and blanks":        {reply{body: "\xef\xbb\xbf\r\n " + bearer + " \n"}, hour},
		"D.4 a coding that does not code":       {reply{header: map[string]string{"Content-Encoding": "utf-8"}, body: bearer}, hour},
		"D.6 an empty error is none":            {member(`"expires_in":3600,"error":""`), hour},
		"D.6 a null error is none":              {member(`"expires_in":3600,"error":null`), hour},
		"D.13 no token_type":                    {member(`"expires_in":3600`), hour},
		"D.13 null":                             {member(`"expires_in":3600,"token_type":null`), hour},
		"D.13 bearer":                           {member(`"expires_in":3600,"token_type":"bearer"`), hour},
		"D.13 BEARER":                           {member(`"expires_in":3600,"token_type":"BEARER"`), hour},
		"D.13 dpop":                             {member(`"token_type":"dpop"`), broker.Grant{TokenType: "DPoP"}},
		"D.14 scope is an array":                {member(`"scope":["a","b"]`), broker.Grant{TokenType: "Bearer", Scopes: []string{"a", "b"}}},
		"D.14 scope is an empty array":          {member(`"scope":[]`), broker.Grant{TokenType: "Bearer"}},
		"D.14 scope is empty":                   {member(`"scope":""`), broker.Grant{TokenType: "Bearer"}},
		"D.14 scope is null":                    {member(`"scope":null`), broker.Grant{TokenType: "Bearer"}},
		"D.14 scope has blanks":                 {member(`"scope":" a  b "`), broker.Grant{TokenType: "Bearer", Scopes: []string{"a", "b"}}},
		"D.18 201 instead of 200":               {reply{status: http.StatusCreated, body: bearer}, hour},
		"unknown members are ignored":           {member(`"expires_in":3600,"x":{"access_token":1},"x":2,"Access_Token":"no"`), hour},
		"the other tokens":                      {member(`"refresh_token":"r t","id_token":"i"`), broker.Grant{TokenType: "Bearer", RefreshToken: broker.NewSecret("r t"), IDToken: broker.NewSecret("i")}},
		"empty tokens are none":                 {member(`"refresh_token":"","id_token":null`), broker.Grant{TokenType: "Bearer"}},
		"a token may be written with \\u":       {reply{body: `{"access_token":"abc.DEF\u002d123"}`}, broker.Grant{TokenType: "Bearer"}},
		"a member name may be written with \\u": {reply{body: `{"access\u005ftoken":"abc.DEF-123"}`}, broker.Grant{TokenType: "Bearer"}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := request(t, clientFor(t, serve(t, tc.answer)))
			if err != nil {
				t.Fatal(err)
			}
			tc.want.AccessToken = broker.NewSecret("abc.DEF-123")
			wantGrant(t, got, tc.want)
		})
	}
}

func wantGrant(t *testing.T, got *broker.Grant, want broker.Grant) {
	t.Helper()
	switch {
	case !got.AccessToken.Equal(want.AccessToken), !got.RefreshToken.Equal(want.RefreshToken), !got.IDToken.Equal(want.IDToken):
		t.Errorf("tokens are %q, %q, %q", got.AccessToken.Reveal(), got.RefreshToken.Reveal(), got.IDToken.Reveal())
	case got.TokenType != want.TokenType || got.Lifetime != want.Lifetime:
		t.Errorf("got type %s, lifetime %s; want %s, %s", got.TokenType, got.Lifetime, want.TokenType, want.Lifetime)
	case !slices.Equal(got.Scopes, want.Scopes) || (got.Scopes == nil) != (want.Scopes == nil):
		t.Errorf("scopes are %#v, want %#v", got.Scopes, want.Scopes)
	}
}

// TestDeviationsThatAreRefused holds complete answers that make no sense.
func TestDeviationsThatAreRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		answer reply
		words  string
	}{
		"D.2 negative":               {member(`"expires_in":-1`), "answered 200 with an expires_in that is negative"},
		"D.2 negative string":        {member(`"expires_in":"-0.5"`), "negative"},
		"D.2 NaN":                    {member(`"expires_in":"NaN"`), "not a decimal number of seconds"},
		"D.2 Infinity":               {member(`"expires_in":"Infinity"`), "not a decimal number"},
		"D.2 hexadecimal":            {member(`"expires_in":"0x10"`), "not a decimal number"},
		"D.2 words":                  {member(`"expires_in":"an hour"`), "not a decimal number"},
		"D.2 boolean":                {member(`"expires_in":true`), "not a decimal number"},
		"D.2 object":                 {member(`"expires_in":{}`), "not a decimal number"},
		"D.2 array":                  {member(`"expires_in":[3600]`), "not a decimal number"},
		"D.4 plain text":             {reply{body: "here you are"}, "neither JSON nor form-encoded"},
		"D.4 a form of other things": {reply{body: "a=b&c=d"}, "neither JSON nor form-encoded"},
		"D.4 a JSON array":           {reply{body: `[` + bearer + `]`}, "neither JSON nor form-encoded"},
		"D.4 a JSON string":          {reply{body: `"abc"`}, "neither JSON nor form-encoded"},
		"D.4 UTF-16":                 {reply{body: "\xff\xfe{\x00}\x00"}, "neither JSON nor form-encoded"},
		"D.4 two JSON objects":       {reply{body: bearer + bearer}, "JSON that is not valid"},
		"D.4 half a JSON object":     {reply{body: bearer[:20]}, "JSON that is not valid"},
		"D.4 nothing":                {reply{}, "an empty body"},
		"D.4 no content":             {reply{status: http.StatusNoContent}, "answered 204 with an empty body"},
		"D.6 prose for an error":     {member(`"error":"bad_verification_code"`), `answered 200 without a registered OAuth error code: "bad_verification_code"`},
		"D.6 an error of some type":  {member(`"error":true`), "without a registered OAuth error code"},
		"D.6 ok false":               {reply{body: `{"ok":false}`}, "no access_token and no error"},
		"D.7 HTML":                   {reply{header: map[string]string{"Content-Type": "text/html"}, body: "<!DOCTYPE html>" + canary}, "answered 200 with an HTML page, probably from a gateway"},
		"D.7 HTML said to be JSON":   {reply{body: "\n<html>"}, "HTML page"},
		"D.13 another token_type":    {member(`"token_type":"mac"`), "a token_type that is neither Bearer nor DPoP"},
		"D.13 a number":              {member(`"token_type":1`), "a token_type that is no string"},
		"D.14 a scope of numbers":    {member(`"scope":[1]`), "a scope that is no list of scopes"},
		"D.14 a scope of nulls":      {member(`"scope":["a",null]`), "a scope that is no list"},
		"D.14 a scope object":        {member(`"scope":{}`), "a scope that is no list"},
		"D.14 a scope of bells":      {member(`"scope":"a\u0007"`), "a scope that is no list"},
		"D.15 nested tokens":         {reply{body: `{"authed_user":{"access_token":"abc"}}`}, "no access_token and no error"},
		"D.16 more than 1 MiB":       {reply{body: `{"access_token":"` + strings.Repeat("a", 1<<20) + `"}`}, "more than 1 MiB"},
		"no token":                   {reply{body: `{}`}, "no access_token and no error"},
		"empty token":                {reply{body: `{"access_token":""}`}, "no access_token and no error"},
		"null token":                 {reply{body: `{"access_token":null}`}, "no access_token and no error"},
		"token of blanks":            {reply{body: `{"access_token":"  "}`}, "a value for access_token that is no token"},
		"token with a line end":      {reply{body: `{"access_token":"a\r\nX: y"}`}, "a value for access_token that is no token"},
		"token with an accent":       {reply{body: `{"access_token":"é"}`}, "a value for access_token that is no token"},
		"token of bad UTF-8":         {reply{body: "{\"access_token\":\"\xff\"}"}, "a value for access_token that is no token"},
		"token is a number":          {reply{body: `{"access_token":1}`}, "a value for access_token that is no token"},
		"refresh token is an object": {member(`"refresh_token":{}`), "a value for refresh_token that is no token"},
		"ID token is a boolean":      {member(`"id_token":false`), "a value for id_token that is no token"},
		"two tokens":                 {reply{body: `{"access_token":"a","access_token":"b"}`}, "two values for access_token"},
		"two tokens in a form":       {reply{body: `access_token=a&access_token=b`}, "two values for access_token"},
		"compressed":                 {reply{header: map[string]string{"Content-Encoding": "gzip"}, body: zipped(bearer)}, "a compressed body, which was not asked for"},
	} {
		t.Run(name, func(t *testing.T) {
			grant, err := request(t, clientFor(t, serve(t, tc.answer)))
			wantKind(t, failure(t, grant, err), broker.Malformed, tc.words)
		})
	}
}

func TestABombStaysPacked(t *testing.T) {
	bomb := zipped(`{"access_token":"` + strings.Repeat("a", 8<<20) + `"}`)
	grant, err := request(t, clientFor(t, serve(t, reply{header: map[string]string{"Content-Encoding": "gzip"}, body: bomb})))
	wantKind(t, failure(t, grant, err), broker.Malformed, "a compressed body")
}

func zipped(s string) string {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	z.Write([]byte(s))
	z.Close()
	return b.String()
}

// D.16
func TestLargeTokensAreWhole(t *testing.T) {
	token := strings.Repeat("a.B-9", 200_000)
	grant, err := request(t, clientFor(t, serve(t, reply{body: `{"access_token":"` + token + `"}`})))
	if err != nil {
		t.Fatal(err)
	}
	if grant.AccessToken.Reveal() != token {
		t.Errorf("%d of %d bytes came back", len(grant.AccessToken.Reveal()), len(token))
	}
}

// D.17
func TestChunkedAnswersAreReadToTheirEnd(t *testing.T) {
	address := serveConn(t, func(c net.Conn, _ *http.Request) {
		fmt.Fprint(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
		for _, b := range []byte(bearer) {
			fmt.Fprintf(c, "1\r\n%c\r\n", b)
		}
		fmt.Fprint(c, "0\r\n\r\n")
	})
	grant, err := request(t, clientFor(t, address))
	if err != nil {
		t.Fatal(err)
	}
	wantGrant(t, grant, broker.Grant{AccessToken: broker.NewSecret("abc.DEF-123"), TokenType: "Bearer", Lifetime: time.Hour})
}

// An answer may also be all that comes until the connection ends (RFC 9112
// section 6.3).
func TestAnswersWithoutALength(t *testing.T) {
	address := serveConn(t, func(c net.Conn, _ *http.Request) { fmt.Fprint(c, "HTTP/1.0 200 OK\r\n\r\n"+bearer) })
	if _, err := request(t, clientFor(t, address)); err != nil {
		t.Fatal(err)
	}
}
