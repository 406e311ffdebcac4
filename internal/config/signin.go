package config

import (
	"cmp"
	"fmt"
	"net/url"
	"strings"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// callbackPath is where the console waits for browsers that come back, there and
// everywhere below.
const callbackPath = "/oauth/callback"

// returns are the first profiles whose sign-ins come back to a path.
type returns map[string]struct{ profile, server string }

// checkReturn looks at where a person comes back to after signing in. By that
// path the broker notices an answer of another server than was asked, so each
// server needs its own; another host is not enough, because what is in front of
// the broker may not pass it on.
func (l *load) checkReturn(at string, message *configv1.Profile, p provider, returns returns) {
	if p.GetAuthorizationCode() == nil {
		return
	}
	at = child(at, "authorization_code.redirect_url")
	u, err := url.Parse(p.GetAuthorizationCode().GetRedirectUrl())
	switch {
	case err != nil || u.Hostname() == "":
		l.problem(at, "must be an absolute URL without fragment, for example https://broker.example.com/oauth/callback")
		return
	case u.Scheme == "http" && !p.GetAllowInsecureHttp() && !oauth.IsLoopback(u.Hostname()):
		l.problem(at, "uses http:// for a host that is not loopback, so that codes would travel in clear: use https://, or set allow_insecure_http: true beside authorization_code")
	case u.Path != callbackPath && !strings.HasPrefix(u.Path, callbackPath+"/"):
		l.warning(at, "is neither /oauth/callback, where the broker waits for browsers, nor below it: change it, or sign in with broker authorize --paste")
	}
	here, server := cmp.Or(u.Path, "/"), serverOf(message)
	first, taken := returns[here]
	switch {
	case !taken:
		returns[here] = struct{ profile, server string }{message.GetName(), server}
	case first.server != server:
		l.problem(at, fmt.Sprintf("the profile %s has the same path for another authorization server: give each authorization server its own, "+
			"for example …/oauth/callback/%s (RFC 9700 section 4.4)", first.profile, message.GetName()))
	}
}

// serverOf names the authorization server. Tenants of one Vantage are one.
func serverOf(message *configv1.Profile) string {
	v, s, o := message.GetVantage(), message.GetSecureauth(), message.GetOauth2()
	return strings.Join([]string{
		v.GetRegion(), strings.TrimRight(v.GetBaseUrl(), "/"),
		s.GetTenantId(), s.GetRegion(), s.GetWorkspaceId(),
		strings.TrimRight(s.GetIssuer()+o.GetIssuer(), "/"), o.GetTokenUrl(),
	}, " ")
}

// consoleURL is a profile's page on the console; empty if nobody knows where
// browsers find that.
func consoleURL(admin Admin, redirectURL, profile string) string {
	console := admin.URL
	if u, err := url.Parse(redirectURL); console == "" && err == nil && u.Host != "" {
		console = u.Scheme + "://" + u.Host
	}
	if console == "" && isLoopback(admin.Address) {
		console = "http://" + admin.Address
		if admin.TLS != nil {
			console = "https://" + admin.Address
		}
	}
	if console == "" {
		return ""
	}
	return console + "/profiles/" + profile
}
