package config

import "google.golang.org/protobuf/reflect/protoreflect"

// discouraged is what works and deserves a warning.
var discouraged = map[protoreflect.FullName]string{
	"tokenbroker.config.v1.Secret.value":                   "whoever reads the configuration reads this secret: write {file: /path/of/file} or {env: NAME_OF_VARIABLE}",
	"tokenbroker.config.v1.Vantage.allow_insecure_http":    "secrets and tokens may travel in clear: use https:// and remove allow_insecure_http",
	"tokenbroker.config.v1.SecureAuth.allow_insecure_http": "secrets and tokens may travel in clear: use https:// and remove allow_insecure_http",
	"tokenbroker.config.v1.OAuth2.allow_insecure_http":     "secrets and tokens may travel in clear: use https:// and remove allow_insecure_http",
	"tokenbroker.config.v1.Vantage.password":               "the grant password hands the user's password to this process (RFC 9700 section 2.4): use another grant where you can",
	"tokenbroker.config.v1.SecureAuth.password":            "the grant password hands the user's password to this process (RFC 9700 section 2.4): use another grant where you can",
	"tokenbroker.config.v1.OAuth2.password":                "the grant password hands the user's password to this process (RFC 9700 section 2.4): use another grant where you can",
}
