package config_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/config"
)

func secret(t testing.TB, reference string) string {
	t.Helper()
	return with(t, minimal, "{env: SECRET}", reference)
}

// credential is the name of the secret that a profile uses.
func credential(secret string) string {
	return presented(options.FingerprintKey, broker.NewSecret(secret))
}

func TestSecretSources(t *testing.T) {
	directory := t.TempDir()
	for name, test := range map[string]struct{ content, want string }{
		"plain":       {canary, canary},
		"newline":     {canary + "\n", canary},
		"crlf":        {canary + "\r\n", canary},
		"two lines":   {canary + "\n" + canary, canary + "\n" + canary},
		"with-dollar": {"$" + canary, "$" + canary},
	} {
		path := write(t, filepath.Join(directory, name), test.content)
		c := mustParse(t, secret(t, fmt.Sprintf("{file: %q}", path)))
		if c.Profiles[0].Credential != credential(test.want) {
			t.Errorf("%s: another secret", name)
		}
		equal(t, warnings(t, c), nil)
	}
	if c := mustParse(t, secret(t, "{env: SECRET}")); c.Profiles[0].Credential != credential(canary+"-env") {
		t.Error("env: another secret")
	}
	c := mustParse(t, secret(t, "{value: "+canary+"}"))
	if c.Profiles[0].Credential != credential(canary) {
		t.Error("value: another secret")
	}
	equal(t, warnings(t, c), []string{
		"6:30: profiles[0].vantage.client_secret.value: whoever reads the configuration reads this secret: write {file: /path/of/file} or {env: NAME_OF_VARIABLE}",
	})
	noCanary(t, fmt.Sprintf("%v %+v %#v", c, c, c.Profiles[0]))
}

func TestSecretMistakes(t *testing.T) {
	directory := t.TempDir()
	write(t, filepath.Join(directory, "empty"), "\n")
	write(t, filepath.Join(directory, "large"), strings.Repeat("x", 64<<10+1))
	write(t, filepath.Join(directory, "blanks"), " "+canary)
	write(t, filepath.Join(directory, "newlines"), canary+"\n\n")
	write(t, filepath.Join(directory, "binary"), canary+"\xff")
	const at = "6:29: profiles[0].vantage.client_secret.file: "
	for name, want := range map[string]string{
		"empty":    at + "the secret's file is empty: write the secret into " + directory + "/empty",
		"large":    at + "reading the secret from " + directory + "/large: the file is larger than 64 KiB",
		"missing":  at + "reading the secret from " + directory + "/missing: no such file or directory",
		"":         at + "reading the secret from " + directory + ": it is not a regular file",
		"blanks":   at + "the secret has blanks or line ends around it: remove them where it comes from",
		"newlines": at + "the secret has blanks or line ends around it: remove them where it comes from",
		"binary":   at + "the secret is not text: it has bytes that no secret has",
	} {
		equal(t, problems(t, secret(t, "{file: "+directory+"/"+name+"}")), []string{want})
	}
	equal(t, problems(t, secret(t, "{env: BLANKS}")), []string{
		"6:28: profiles[0].vantage.client_secret.env: the secret has blanks or line ends around it: remove them where it comes from"})
}

// A secret in the wrong place is not shown, wherever that is.
func TestMisplacedSecrets(t *testing.T) {
	for name, text := range map[string]string{
		"scalar":         secret(t, canary),
		"list":           secret(t, "["+canary+"]"),
		"key":            secret(t, "{"+canary+": x}"),
		"bare key":       secret(t, "{"+canary+"}"),
		"no colon":       secret(t, "{file "+canary+"}"),
		"file":           secret(t, "{file: "+canary+"}"),
		"file in quotes": secret(t, "{file: \"-----BEGIN PRIVATE KEY-----\\n"+canary+"\\n\"}"),
		"env":            secret(t, "{env: "+canary+"}"),
		"env allowed":    secret(t, "{env: "+strings.ReplaceAll(canary, "-", "_")+"}"),
		"alias":          secret(t, "*"+canary),
		"anchor":         secret(t, "&"+canary+" {env: [x]}"),
		"tag":            secret(t, "!"+canary+" x"),
		"float":          secret(t, "!!float "+canary),
		"binary":         secret(t, "{value: !!binary "+canary+"}"),
		"value is list":  secret(t, "{value: ["+canary+"]}"),
		"value and file": secret(t, "{value: "+canary+", file: "+canary+"}"),
		"blanks":         secret(t, "{value: ' "+canary+"'}"),
		"broken line":    secret(t, "{value: "+canary),
		"broken quote":   secret(t, "{value: \""+canary),
		"next line":      secret(t, "\n      "+canary),
		"unindented":     secret(t, "\n"+canary),
		"as key":         secret(t, "\n      "+canary+": x"),
		"region":         with(t, minimal, "region: eu", "region: "+canary),
		"tenant":         with(t, minimal, "region: eu", "region: eu\n      tenant_id: "+canary+" "),
		"base_url":       with(t, minimal, "region: eu", "base_url: https://user:"+canary+"@vantage.example.com"),
		"base_url query": with(t, minimal, "region: eu", "base_url: https://vantage.example.com?"+canary),
		"client_id":      with(t, minimal, "client_id: c", "client_id: [\""+canary+"\"]"),
		"bool":           with(t, minimal, "region: eu", "region: eu\n      allow_insecure_http: "+canary),
		"duration":       with(t, minimal, "name: p", "name: p\n    timeout: "+canary),
		"name":           with(t, minimal, "name: p", "name: "+canary),
		"scope":          with(t, minimal, "name: p", "name: p\n    scopes: [\"x "+canary+"\"]"),
		"map key":        minimal + "  - name: o\n    oauth2: {extra_parameters: {" + canary + ": [" + canary + "]}}\n",
		"map key rule":   minimal + "  - name: o\n    oauth2: {extra_parameters: {" + canary + strings.Repeat("x", 128) + ": x}}\n",
		"policy":         minimal + "policy: [{callers: [" + canary + "], profiles: [" + canary + "], allow: [" + canary + "]}]\n",
		"log":            minimal + "log: {level: " + canary + "}\n",
		"address":        minimal + "server: {address: " + canary + "}\n",
		"key of TLS":     minimal + "server: {tls: {certificate: x, client_ca: x, private_key: \"-----BEGIN PRIVATE KEY-----\\n" + canary + "\\n\"}}\n",
		"top":            minimal + canary + "\n",
		"top key":        minimal + canary + ": x\n",
		"document":       canary,
		"second":         minimal + "---\n" + canary,
		"redirect":       with(t, minimal, "client_credentials: {}", "authorization_code: {redirect_url: 'https://u:"+canary+"@broker/'}"),
		"redirect part":  with(t, minimal, "client_credentials: {}", "authorization_code: {redirect_url: 'http://broker/?"+canary+"'}"),
		"bearer token":   minimal + "admin: {bearer_token: " + canary + "}\n",
		"admin.url":      minimal + "admin: {url: 'https://u:" + canary + "@broker'}\n",
		"admin profile":  with(t, minimal, "name: p", "name: p\n    secret_rotation: {before_expiry: 30d, admin_profile: "+canary+"}"),
		"private key":    "profiles: [{name: p, oauth2: {issuer: 'https://id.example.com', client_id: c, client_auth: private_key_jwt, private_key: {value: " + canary + "}, client_credentials: {}}}]\n",
		"certificate":    "profiles: [{name: p, oauth2: {issuer: 'https://id.example.com', client_id: c, client_auth: tls_client_auth, private_key: {value: " + canary + "}, certificate: \"-----BEGIN\\n" + canary + "\", client_credentials: {}}}]\n",
		"redis":          minimal + "store: {redis: {password: " + canary + "}}\n",
	} {
		t.Run(name, func(t *testing.T) {
			c, err := parse(text)
			if err == nil {
				if name != "tenant" && name != "anchor" {
					t.Error("accepted")
				}
				noCanary(t, c.Warnings.Error())
				return
			}
			for _, line := range shorten(t, err) {
				if line == "" || line[0] < '1' || line[0] > '9' {
					t.Errorf("no place: %s", line)
				}
			}
		})
	}
}

func TestOpenFilesAreWarnedOf(t *testing.T) {
	directory := t.TempDir()
	path := write(t, filepath.Join(directory, "s"), canary)
	for mode, want := range map[os.FileMode][]string{
		0o600: nil,
		0o440: nil,
		0o604: {"6:29: profiles[0].vantage.client_secret.file: every user of this machine has access to " + path +
			" (mode 0604): chmod o= it, or in Kubernetes set defaultMode: 0440"},
	} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		equal(t, warnings(t, mustParse(t, secret(t, "{file: "+path+"}"))), want)
	}
}

func TestInsecureHTTPIsWarnedOf(t *testing.T) {
	c := mustParse(t, with(t, minimal, "region: eu", "base_url: http://vantage.internal\n      allow_insecure_http: true"))
	equal(t, warnings(t, c), []string{
		"5:28: profiles[0].vantage.allow_insecure_http: secrets and tokens may travel in clear: use https:// and remove allow_insecure_http",
	})
}

func FuzzParse(f *testing.F) {
	f.Add(minimal)
	f.Add(wholeConfig)
	f.Add(secret(f, canary))
	f.Add(secret(f, "{value: "+canary+"}"))
	f.Add(secret(f, "{value: [&a "+canary+", *a]}"))
	f.Add(secret(f, "{value: "+canary))
	f.Add(withPassword(f, "{value: "+canary+"}", "{value: ["+canary+"]}", "    rotation: {one_time: "+canary+"}"))
	f.Add(withCode(f, callback, "    rotation: {lifetime: 60d}"))
	f.Add(rotating(f, "before_expiry: 30d, admin_profile: administrater"))
	f.Add("profiles:\n" + another("q", "oauth2", "issuer: 'https://"+canary+"'", codeGrant(callback)) + another("r", "secureauth", "tenant_id: t, workspace_id: w", codeGrant(callback)))
	f.Add(minimal + "admin: {address: 0.0.0.0:1, url: 'http://broker', bearer_token: {value: " + canary + canary + "}, tls: {certificate: x, private_key: x}}\n")
	f.Add(minimal + "---\n" + canary + "\n\t? " + canary)
	f.Add("profiles:\n  - {name: " + canary + ", timeout: " + canary + ", vantage: {region: " + canary + "}}\n")
	f.Add("policy: [{callers: [" + canary + "], profiles: [" + canary + "]}]\nlog: " + canary)
	f.Fuzz(func(t *testing.T, text string) {
		c, err := config.Parse("/nowhere/broker.yaml", []byte(text), options)
		if (c == nil) == (err == nil) {
			t.Fatal("neither a configuration nor problems, or both")
		}
		if strings.Contains(text, "/"+canary) {
			return // Paths are shown.
		}
		if err != nil {
			for _, line := range shorten(t, err) {
				if line == "" || line[0] < '1' || line[0] > '9' {
					t.Errorf("no place: %s", line)
				}
			}
			return
		}
		noCanary(t, c.Warnings.Error())
	})
}
