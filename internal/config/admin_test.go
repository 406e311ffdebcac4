package config_test

import (
	"crypto/tls"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/config"
)

func TestAdmin(t *testing.T) {
	directory := t.TempDir()
	writeServerFiles(t, directory)
	token := write(t, filepath.Join(directory, "token"), canary+"-0123\n")
	c := mustParse(t, minimal+fmt.Sprintf(`admin:
  address: 0.0.0.0:7444
  tls: {certificate: %[1]s/tls.crt, private_key: %[1]s/tls.key, client_ca: %[1]s/ca.crt}
  bearer_token: {file: %[1]s/token}
  url: https://broker.example.com/
`, directory))
	equal(t, warnings(t, c), nil)
	a := c.Admin
	if a.TLS == nil || a.TLS.ClientAuth != tls.VerifyClientCertIfGiven || a.TLS.ClientCAs == nil || a.TLS.MinVersion != tls.VersionTLS13 || len(a.TLS.Certificates) != 1 {
		t.Errorf("got TLS %+v", a.TLS)
	}
	if a.BearerToken.Reveal() != canary+"-0123" || a.URL != "https://broker.example.com" {
		t.Errorf("got %+v", a)
	}
	for _, path := range []string{token, directory + "/tls.crt", directory + "/tls.key", directory + "/ca.crt"} {
		if !slices.Contains(c.Files, path) {
			t.Errorf("%s is not among the files to watch: %v", path, c.Files)
		}
	}
	noCanary(t, fmt.Sprintf("%v %+v %#v", c, c, a))

	a = mustParse(t, minimal+fmt.Sprintf("admin: {tls: {certificate: %[1]s/tls.crt, private_key: %[1]s/tls.key}}\n", directory)).Admin
	if a.TLS == nil || a.TLS.ClientAuth != tls.NoClientCert || a.TLS.ClientCAs != nil {
		t.Errorf("without client_ca: got TLS %+v", a.TLS)
	}
	if a := mustParse(t, minimal).Admin; a != (config.Admin{Address: "127.0.0.1:7444"}) {
		t.Errorf("without anything: got %+v", a)
	}
}

func TestAdminWarnings(t *testing.T) {
	directory := t.TempDir()
	writeServerFiles(t, directory)
	pair := fmt.Sprintf("certificate: %[1]s/tls.crt, private_key: %[1]s/tls.key", directory)
	proof := fmt.Sprintf("%s, client_ca: %s/ca.crt", pair, directory)
	const (
		off = "admin.address: the console is off, because nobody can prove to be an operator; health, metrics and /oauth/callback are served: " +
			"for the console add tls with client_ca, or bearer_token"
		clear    = "admin.bearer_token: travels in clear, unless something in front of this address adds TLS: add tls"
		clearURL = "admin.url: what operators send and see travels in clear: use https://"
	)
	for admin, want := range map[string][]string{
		"address: 127.0.0.1:7444":                                                nil,
		"address: localhost:7444":                                                nil,
		"bearer_token: {env: TOKEN}":                                             nil,
		"address: 0.0.0.0:7444":                                                  {off},
		"address: ':7444'":                                                       {off},
		"address: 0.0.0.0:7444, tls: {" + pair + "}":                             {off},
		"address: 0.0.0.0:7444, tls: {" + proof + "}":                            nil,
		"address: 0.0.0.0:7444, bearer_token: {env: TOKEN}":                      {clear},
		"address: 0.0.0.0:7444, bearer_token: {env: TOKEN}, tls: {" + pair + "}": nil,
		"url: 'http://localhost:7444'":                                           nil,
		"url: 'http://[::1]:7444'":                                               nil,
		"url: http://broker.example.com":                                         {clearURL},
		"url: https://broker.example.com":                                        nil,
	} {
		var got []string
		for _, line := range warnings(t, mustParse(t, minimal+"admin: {"+admin+"}\n")) {
			_, line, _ = strings.Cut(line, ": ")
			got = append(got, line)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %q, want %q", admin, got, want)
		}
	}
}

func TestAdminMistakes(t *testing.T) {
	directory := t.TempDir()
	writeServerFiles(t, directory)
	write(t, filepath.Join(directory, "short"), canary[:12]+"123\n")
	write(t, filepath.Join(directory, "blank"), canary+" "+canary)
	write(t, filepath.Join(directory, "letter"), canary+"ä"+canary)
	const length = "the token has fewer than 16 characters and could be guessed: make a random one, for example with openssl rand -hex 32"
	const header = "the token has blanks or letters that no header can carry: make one of printable ASCII, for example with openssl rand -hex 32"
	for admin, want := range map[string]string{
		"bearer_token: {file: " + directory + "/short}":  "8:30: admin.bearer_token.file: " + length,
		"bearer_token: {env: SHORT}":                     "8:29: admin.bearer_token.env: " + length,
		"bearer_token: {value: " + canary[:12] + "}":     "8:31: admin.bearer_token.value: " + length,
		"bearer_token: {file: " + directory + "/blank}":  "8:30: admin.bearer_token.file: " + header,
		"bearer_token: {file: " + directory + "/letter}": "8:30: admin.bearer_token.file: " + header,
		"bearer_token: {file: /nowhere/token}":           "8:30: admin.bearer_token.file: reading the secret from /nowhere/token: no such file or directory",
		"bearer_token: " + canary:                        "8:23: admin.bearer_token: a secret is a reference: write {file: /path/of/file} or {env: NAME_OF_VARIABLE}",
		"url: broker.example.com":                        "8:14: admin.url: must be http:// or https:// and a host, for example https://broker.example.com",
		"url: https://broker.example.com/console":        "8:14: admin.url: must be http:// or https:// and a host, for example https://broker.example.com",
		"url: 'https://user:" + canary + "@broker'":      "8:14: admin.url: must be http:// or https:// and a host, for example https://broker.example.com",
		"url: 'https://[" + canary + "'":                 "8:14: admin.url: must be http:// or https:// and a host, for example https://broker.example.com",
		"tls: {private_key: " + directory + "/tls.key}":  "8:14: admin.tls.certificate: is missing: add it",
		"tls: {certificate: " + directory + "/tls.key, private_key: " + directory + "/tls.key}": "8:28: admin.tls.certificate: " + directory +
			"/tls.key: there is no certificate in it: it must be PEM, with BEGIN CERTIFICATE",
		"tls: {certificate: " + directory + "/tls.crt, private_key: " + directory + "/tls.key, client_ca: /nowhere/ca}": fmt.Sprintf(
			"8:%d: admin.tls.client_ca: reading the authorities' certificates from /nowhere/ca: no such file or directory", 28+2*len(directory)+len("/tls.crt, private_key: /tls.key, client_ca: ")),
	} {
		if got := problems(t, minimal+"admin: {"+admin+"}\n"); !slices.Equal(got, []string{want}) {
			t.Errorf("%s: got\n\t%s\nwant\n\t%s", admin, strings.Join(got, "\n\t"), want)
		}
	}
}
