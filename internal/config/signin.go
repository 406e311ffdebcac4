package config

import (
	"cmp"
	"fmt"
	"net/url"
	"strings"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// callbackPath is where the console waits for browsers that come back, there and
// everywhere below.
const callbackPath = "/oauth/callback"

// checkRedirect looks at where a person comes back to after signing in.
func (l *load) checkRedirect(at string, p provider) {
	if p.GetAuthorizationCode() == nil {
		return
	}
	at = child(at, "authorization_code.redirect_url")
	u, err := url.Parse(p.GetAuthorizationCode().GetRedirectUrl())
	switch {
	case err != nil || u.Hostname() == "":
		l.problem(at, "must be an absolute URL without fragment, for example https://broker.example.com/oauth/callback")
	case u.Scheme == "http" && !p.GetAllowInsecureHttp() && !oauth.IsLoopback(u.Hostname()):
		l.problem(at, "uses http:// for a host that is not loopback, so that codes would travel in clear: use https://, or set allow_insecure_http: true beside authorization_code")
	case u.Path != callbackPath && !strings.HasPrefix(u.Path, callbackPath+"/"):
		l.warning(at, "is neither /oauth/callback, where the broker waits for browsers, nor below it: change it, or sign in with broker authorize --paste")
	}
}

// callbacks are the first profiles whose sign-ins come back to a path, and their
// authorization servers.
type callbacks map[string]struct{ profile, server string }

// checkSharing notes a profile that shares the path of its callback with one at
// another authorization server. By the path the broker notices that another
// server has answered than was asked; another host is not enough, because what
// is in front of the broker may not pass it on.
func (l *load) checkSharing(at string, message *configv1.Profile, profile *broker.Profile, seen callbacks) {
	authorizer, ok := profile.Issuer.(broker.Authorizer)
	if !ok {
		return
	}
	u, err := url.Parse(authorizer.RedirectURL())
	if err != nil {
		return // and told already
	}
	path, server := cmp.Or(u.Path, "/"), profile.Endpoint
	if v := message.GetVantage(); v != nil { // whose tenants are one server's
		server = v.GetRegion() + strings.TrimRight(v.GetBaseUrl(), "/")
	}
	first, taken := seen[path]
	switch {
	case !taken:
		seen[path] = struct{ profile, server string }{profile.Name, server}
	case first.server != server:
		l.problem(child(at, "authorization_code.redirect_url"), fmt.Sprintf("the profile %s has the same path for another authorization server: "+
			"give each authorization server its own, for example …/oauth/callback/%s (RFC 9700 section 4.4)", first.profile, profile.Name))
	}
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
