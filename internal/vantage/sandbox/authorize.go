package sandbox

import (
	"crypto/sha256"
	"encoding/base64"
	"html/template"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// An authorizeRequest is a checked request of RFC 6749 section 4.1.1.
type authorizeRequest struct {
	client      *client
	tenant      *Tenant // nil: the user's name decides
	redirectURI *url.URL
	state       string
	scopes      []string
	challenge   string
	nonce       string
}

// authorize serves the sign-in page. GET shows it; POST, to the same query,
// signs in and sends the browser back with a code.
//
// Errors about the client or its redirect URI stay here, on a page: there is
// nobody to trust with them. All others travel to the redirect URI.
func (s *Server) authorize(c *call) reply {
	switch c.Method {
	case http.MethodGet, http.MethodHead:
	case http.MethodPost:
		if c.form == nil || http.NewCrossOriginProtection().Check(c.Request) != nil {
			return errorPage("The form did not come from this page.")
		}
	default:
		return methodNotAllowed("GET, POST")
	}
	query := c.URL.Query()
	a, problem := s.authorizeClient(c, query)
	if problem != "" {
		return errorPage(problem)
	}
	if code := a.read(query); code != "" {
		return c.redirect(a, url.Values{"error": {code}})
	}
	if c.Method != http.MethodPost {
		return signInPage(a, signIn{})
	}
	if c.form.Get("action") == "cancel" {
		return c.redirect(a, url.Values{"error": {"access_denied"}})
	}
	return s.signInForm(c, a)
}

// authorizeClient reads what must be right before anything is sent anywhere.
// It returns the problem in words for the page.
func (s *Server) authorizeClient(c *call, query url.Values) (*authorizeRequest, string) {
	a := &authorizeRequest{tenant: c.tenant, state: query.Get("state")}
	if id := query.Get("tenantId"); id != "" && a.tenant == nil {
		if a.tenant = s.world.tenant(id); a.tenant == nil {
			return nil, "The tenant is unknown."
		}
	}
	s.mu.Lock()
	a.client = s.world.clients[query.Get("client_id")]
	s.mu.Unlock()
	if a.client == nil || a.tenant != nil && a.client.Tenant != "" && a.client.Tenant != a.tenant.ID {
		return nil, "The application is unknown."
	}
	if a.redirectURI = a.client.redirectTo(query.Get("redirect_uri")); a.redirectURI == nil {
		return nil, "The redirect URI is not registered for the application."
	}
	return a, ""
}

// plainOrigin is what may be written into a Content-Security-Policy.
var plainOrigin = regexp.MustCompile(`^[a-z][a-z0-9+.-]*://[A-Za-z0-9.:\[\]_-]+$`)

// redirectTo matches a redirect URI by prefix, as Vantage does. It refuses the
// forms in which a prefix that ends inside the authority would be no protection
// at all.
func (c *client) redirectTo(uri string) *url.URL {
	u, err := url.Parse(uri)
	if err != nil || u.User != nil || u.Fragment != "" || !plainOrigin.MatchString(u.Scheme+"://"+u.Host) {
		return nil
	}
	if !slices.ContainsFunc(c.RedirectURIs, func(prefix string) bool { return strings.HasPrefix(uri, prefix) }) {
		return nil
	}
	return u
}

// read checks the rest. It returns an error code of RFC 6749 section 4.1.2.1,
// or "".
func (a *authorizeRequest) read(query url.Values) string {
	if query.Get("response_type") != "code" {
		return "unsupported_response_type"
	}
	if !a.client.mayUse("authorization_code") {
		return "unauthorized_client"
	}
	if mode := query.Get("response_mode"); mode != "" && mode != "query" {
		return "invalid_request"
	}
	scopes, err := a.client.scopesOf(query.Get("scope"), true)
	if err != nil {
		return err.Code
	}
	a.scopes, a.nonce, a.challenge = scopes, query.Get("nonce"), query.Get("code_challenge")
	if len(a.nonce) > maxScope {
		return "invalid_request"
	}
	switch {
	case a.challenge == "" && !a.client.AllowNoPKCE:
		return "invalid_request"
	case a.challenge == "":
	case query.Get("code_challenge_method") != "S256": // plain is off
		return "invalid_request"
	case len(a.challenge) < minVerifier || len(a.challenge) > maxVerifier:
		return "invalid_request"
	}
	if query.Get("prompt") == "none" {
		return "login_required" // there are no sessions
	}
	return ""
}

// redirect sends the browser back, with the state and the issuer (RFC 9207).
func (c *call) redirect(a *authorizeRequest, parameters url.Values) reply {
	if a.state != "" {
		parameters.Set("state", a.state)
	}
	parameters.Set("iss", c.issuer)
	target := *a.redirectURI
	if target.RawQuery != "" {
		target.RawQuery += "&"
	}
	target.RawQuery += parameters.Encode()
	return reply{status: http.StatusFound}.with("Location", target.String()).noStore().
		with("Referrer-Policy", "no-referrer")
}

// signInForm judges a filled-in page.
func (s *Server) signInForm(c *call, a *authorizeRequest) reply {
	form := signIn{Name: c.form.Get("username"), Tenant: c.form.Get("tenant")}
	tenant := a.tenant
	if tenant == nil && form.Tenant != "" {
		tenant = s.world.tenant(form.Tenant)
	}
	if form.Tenants = s.choices(tenant, form.Name); len(form.Tenants) > 1 {
		return signInPage(a, form)
	}
	password := c.form.Get("password")
	u := s.account(tenant, a.client, form.Name)
	form.Wrong, form.Tenants = true, nil
	if u == nil || len(password) > maxCredential || !s.signIn(u, password) {
		return signInPage(a, form)
	}
	value := strings.ToUpper(randomToken())
	s.mu.Lock()
	s.world.codes.put(sum(value), &code{
		client:      a.client,
		user:        u,
		scopes:      a.scopes,
		redirectURI: c.URL.Query().Get("redirect_uri"),
		challenge:   a.challenge,
		nonce:       a.nonce,
		issued:      s.options.Now(),
	})
	s.mu.Unlock()
	return c.redirect(a, url.Values{"code": {value}})
}

// choices lists the tenants among which the user must choose; one at most when
// there is no choice.
func (s *Server) choices(tenant *Tenant, name string) []*Tenant {
	s.mu.Lock()
	defer s.mu.Unlock()
	var tenants []*Tenant
	for _, u := range s.world.accounts(tenant, name) {
		tenants = append(tenants, s.world.tenant(u.Tenant))
	}
	return tenants
}

// signIn is what the page shows of an attempt.
type signIn struct {
	Name    string
	Tenant  string
	Wrong   bool
	Tenants []*Tenant // to choose from, when there are several
}

const signInStyle = `
:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif; }
body { max-width: 26rem; margin: 3rem auto; padding: 0 1rem; }
label { display: block; margin-top: 1rem; font-weight: 600; }
input, select, button { box-sizing: border-box; width: 100%; padding: .6rem; font: inherit; }
button { margin-top: 1.5rem; }
button + button { margin-top: .5rem; }
:focus-visible { outline: 3px solid; outline-offset: 2px; }
[role=alert] { border-left: .3rem solid; padding-left: .8rem; font-weight: 600; }
`

var signInTemplate = template.Must(template.New("sign-in").Parse(`<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{if .Form.Wrong}}Error: {{end}}Sign in – Vantage sandbox</title>
<style>{{.Style}}</style>
</head>
<body>
<main>
<h1>Sign in</h1>
<p><strong>{{.Client}}</strong> asks for access{{with .Tenant}} to the tenant <strong>{{.}}</strong>{{end}}.
This is a sandbox: no real account is needed or asked for.</p>
{{if .Form.Wrong}}<p role="alert" id="problem">The e-mail address or the password is wrong, or the account is locked.</p>
{{else if .Form.Tenants}}<p role="alert" id="problem">This e-mail address has several accounts. Choose a tenant and enter its password.</p>
{{end}}<form method="post">
<label for="username">E-mail address</label>
<input id="username" name="username" type="email" autocomplete="username" required maxlength="100" value="{{.Form.Name}}"{{if .Form.Wrong}} aria-invalid="true" aria-describedby="problem"{{end}}>
{{if .Form.Tenants}}<label for="tenant">Tenant</label>
<select id="tenant" name="tenant">{{range .Form.Tenants}}<option value="{{.ID}}">{{.Name}}</option>{{end}}</select>
{{else if .Form.Tenant}}<input type="hidden" name="tenant" value="{{.Form.Tenant}}">
{{end}}<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required maxlength="100"{{if .Form.Wrong}} aria-invalid="true" aria-describedby="problem"{{end}}>
<button type="submit" name="action" value="allow">Sign in and allow</button>
<button type="submit" name="action" value="cancel" formnovalidate>Cancel</button>
</form>
<h2>What it asks for</h2>
<ul>{{range .Scopes}}<li><code>{{.}}</code></li>{{end}}</ul>
</main>
</body>
</html>
`))

// signInPage renders the page. The policy lets the form go to this server and
// on to the redirect URI, since browsers apply form-action to redirects too.
func signInPage(a *authorizeRequest, form signIn) reply {
	data := struct {
		Client, Tenant string
		Scopes         []string
		Form           signIn
		Style          template.CSS
	}{Client: a.client.Name, Scopes: a.scopes, Form: form, Style: signInStyle}
	if a.tenant != nil {
		data.Tenant = a.tenant.Name
	}
	var b strings.Builder
	if err := signInTemplate.Execute(&b, data); err != nil {
		panic("sandbox: rendering the sign-in page: " + err.Error())
	}
	style := sha256.Sum256([]byte(signInStyle))
	policy := "default-src 'none'; base-uri 'none'; frame-ancestors 'none'" +
		"; style-src 'sha256-" + base64.StdEncoding.EncodeToString(style[:]) + "'" +
		"; form-action 'self' " + policySource(a.redirectURI)
	return reply{status: http.StatusOK, body: []byte(b.String())}.noStore().
		with("Content-Type", "text/html; charset=utf-8").
		with("Content-Security-Policy", policy).
		with("X-Content-Type-Options", "nosniff").
		with("X-Frame-Options", "DENY").
		with("Referrer-Policy", "same-origin") // no-referrer would hide the form's origin
}

// policySource names the origin of u in a Content-Security-Policy, whose grammar
// has no IPv6 addresses.
func policySource(u *url.URL) string {
	if strings.Contains(u.Host, "[") {
		return u.Scheme + ":"
	}
	return u.Scheme + "://" + u.Host
}

// errorPage tells the person at the browser what no redirect may tell.
func errorPage(problem string) reply {
	return page(http.StatusBadRequest, problem).noStore()
}
