package config

import "google.golang.org/protobuf/reflect/protoreflect"

// unavailable is what the schema has and this version does not. A field that is
// set and listed here is a problem, and what is in it is not looked into. To
// deliver one of them, use it in profiles.go or settings.go and delete its line.
var unavailable = map[protoreflect.FullName]string{
	"tokenbroker.config.v1.Profile.secureauth":           "this version does not have the provider secureauth yet: remove the profile",
	"tokenbroker.config.v1.Profile.oauth2":               "this version does not have the provider oauth2 yet: remove the profile",
	"tokenbroker.config.v1.Profile.allow_password_grant": "vantage needs no allow_password_grant, and this version has no other provider yet: remove it",
	"tokenbroker.config.v1.Profile.secret_rotation":      "this version does not renew client secrets yet: remove secret_rotation, and replace secrets before they end",

	"tokenbroker.config.v1.Vantage.authorization_code": "this version does not have the grant authorization_code yet: remove the profile",
	"tokenbroker.config.v1.Vantage.product_id":         "product_id belongs to the grant authorization_code, which this version does not have yet: remove it",
}

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
