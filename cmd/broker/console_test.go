package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/vantage"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// consoleStage is a broker, and a stand-in Vantage that people can sign in at.
type consoleStage struct {
	t       *testing.T
	url     string // of the console
	address string // of the gRPC services
	log     *lockedBuffer
	here    *stage
}

func newConsoleStage(t *testing.T, change func(*serverOptions)) *consoleStage {
	t.Helper()
	s := &consoleStage{t: t, log: &lockedBuffer{}, here: newStage(t)}
	o := serverOptions{log: slog.New(slog.NewTextHandler(s.log, nil)), admin: adminOptions{local: true}}
	if change != nil {
		change(&o)
	}
	server, err := newServer(o)
	if err != nil {
		t.Fatal(err)
	}
	listeners, err := listenAll("127.0.0.1:0", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.address, s.url = listeners[0].Addr().String(), "http://"+listeners[1].Addr().String()
	server.configure(s.profiles(), &access.Policy{})
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- server.run(ctx, listeners[0], listeners[1]) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if strings.Contains(s.log.String(), sandbox.DemoPassword) {
			t.Error("the log has a password")
		}
	})
	return s
}

func (s *consoleStage) profiles() []*broker.Profile {
	s.t.Helper()
	key := make([]byte, 32)
	rand.Read(key)
	scopes := []string{"openid", "permissions", "global.wildcard"}
	var all []*broker.Profile
	for _, c := range []oauth.ProfileConfig{
		{Name: "archive", ClientID: "admin", ClientSecrets: []broker.Secret{broker.NewSecret("of last year")}},
		{Name: "contracts", ClientID: "review", GrantType: broker.AuthorizationCode},
		{Name: "forecasts", ClientID: "forecasts", ClientSecrets: []broker.Secret{broker.NewSecret("of nobody")}},
		{Name: "invoices", ClientID: "invoices"},
		{Name: "review", ClientID: "review", GrantType: broker.AuthorizationCode},
	} {
		base := s.here.url
		if c.Name == "forecasts" { // a server that is not there
			base = "http://127.0.0.1:1"
		}
		c.FingerprintKey, c.Scopes = key, scopes
		if c.ClientSecrets == nil {
			c.ClientSecrets = []broker.Secret{broker.NewSecret(s.here.vantage.ClientSecret(c.ClientID))}
		}
		if c.GrantType == broker.AuthorizationCode {
			c.Scopes, c.RedirectURL = append(scopes[:3:3], "offline_access"), s.url+"/oauth/callback"
		}
		p, err := vantage.NewProfile(vantage.Config{ProfileConfig: c, BaseURL: base})
		if err != nil {
			s.t.Fatal(err)
		}
		all = append(all, p)
	}
	return all
}

// signIn goes from a profile's page to where the browser ends.
func (s *consoleStage) signIn(b *browser, profile, account string) {
	b.t.Helper()
	b.click(`form[action="/profiles/` + profile + `/authorize"] button`)
	b.at("Sign in for " + profile)
	b.click("#continue")
	b.await(`document.querySelector("h1")?.textContent === "Sign in" && document.readyState === "complete"`)
	b.run(chromedp.SendKeys(chromedp.CSS("#username"), account), chromedp.SendKeys(chromedp.CSS("#password"), sandbox.DemoPassword))
	b.click(`button[value=allow]`)
}

// TestConsoleInBrowser is what an operator does, in a real browser, at a real
// authorization server: signs in by keyboard alone, cancels, signs in as
// somebody else and keeps and replaces the account, refreshes, resets.
func TestConsoleInBrowser(t *testing.T) {
	s := newConsoleStage(t, nil)
	b := newBrowser(t)

	b.open(s.url)
	b.at("Profiles")
	b.says(`[data-state=review]`, "Needs sign-in")

	// By keyboard alone, to the authorization server and back.
	b.press("#authorize-review")
	b.at("Sign in for review")
	b.says("main", strings.TrimPrefix(s.here.url, "http://"))
	b.press("#continue")
	b.await(`document.querySelector("h1")?.textContent === "Sign in" && document.readyState === "complete"`)
	b.keys("#username", "reviewer@example.com")
	b.keys("#password", sandbox.DemoPassword)
	b.press("button[value=allow]")
	b.at("review")
	b.says("[role=status]", "The sign-in is complete.")
	b.says("[data-state=review]", "OK")
	b.says("#account", "reviewer@example.com")
	b.says("#profile", "29 days left")
	if address := b.page(); strings.Contains(address, "code=") {
		t.Errorf("the address still has the code: %s", address)
	}
	first := b.text("#token-id")

	// Cancelled at the server.
	b.click(`form[action="/profiles/review/authorize"] button`)
	b.at("Sign in for review")
	b.click("#continue")
	b.await(`document.querySelector("h1")?.textContent === "Sign in" && document.readyState === "complete"`)
	b.click("button[value=cancel]")
	b.at("The sign-in was refused")
	b.says("main", "access_denied")
	refused, err := eval[string](b, "location.href")
	if err != nil {
		t.Fatal(err)
	}
	b.click(`a[href="/profiles/review"]`)
	b.at("review")
	b.says("#token-id", first)

	// The same address once more, and another one of the same kind.
	b.open(refused)
	b.at("The sign-in is not complete")
	b.says("main", "Start the sign-in again")
	b.open(s.url + "/oauth/callback?state=unknown&code=stolen")
	b.at("The sign-in is not complete")

	// As somebody else: kept, then replaced.
	b.open(s.url + "/profiles/review")
	b.at("review")
	s.signIn(b, "review", "admin@example.com")
	b.at("Replace the account?")
	b.says("#previous", "reviewer@example.com")
	b.says("#account", "admin@example.com")
	replay, err := eval[string](b, "location.href")
	if err != nil {
		t.Fatal(err)
	}
	b.click("#keep")
	b.at("review")
	b.says("[role=status]", "stays as it was")
	b.says("#account", "reviewer@example.com")
	b.says("#token-id", first)

	// The code came back once, and once only: in this browser and in another.
	for _, tab := range []*browser{b, newBrowser(t)} {
		tab.open(replay)
		tab.at("The sign-in is not complete")
	}

	// The endpoint is spared a second request within ten seconds of the first.
	refreshed := false
	for deadline := time.Now().Add(time.Minute); !refreshed && time.Now().Before(deadline); {
		b.open(s.url + "/profiles/review")
		b.at("review")
		b.click(`form[action="/profiles/review/refresh"] button`)
		b.await(`["review", "Not done: refresh"].includes(document.querySelector("h1")?.textContent) && !!(location.search || location.pathname.endsWith("/refresh"))`)
		refreshed = b.text("h1") == "review"
	}
	b.at("review")
	b.says("[role=status]", "There is a new token.")
	second := b.text("#token-id")
	if second == first {
		t.Error("Refresh now has brought the same token")
	}

	s.signIn(b, "review", "admin@example.com")
	b.at("Replace the account?")
	b.click("#replace")
	b.at("review")
	b.says("[role=status]", "has replaced")
	b.says("#account", "admin@example.com")
	if third := b.text("#token-id"); third == second {
		t.Error("the replaced grant's token is still there")
	}

	// A refused client, in the list and on its page.
	b.open(s.url + "/profiles/archive")
	b.at("archive")
	b.click(`form[action="/profiles/archive/refresh"] button`)
	b.at("Not done: refresh")
	b.says("main", "invalid_client")
	// An unreachable server, and a caller.
	b.open(s.url + "/profiles/forecasts")
	b.at("forecasts")
	b.click(`form[action="/profiles/forecasts/refresh"] button`)
	b.at("Not done: refresh")
	if got := command(t, "token", "invoices", "--address", s.address); got.status != 0 {
		t.Fatalf("token: %+v", got)
	}
	b.open(s.url)
	b.at("Profiles")
	b.says("[data-state=forecasts]", "Backing off until")
	b.says("tr", "anonymous")
	b.says("[data-state=archive]", "Credentials rejected")
	b.says("[data-state=invoices]", "OK")
	s.screenshot(b)

	// The page brings itself up to date, and says what has changed.
	b.reach("#reset-archive")
	if r, err := http.Post(s.url+"/profiles/archive/reset", "", nil); err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("reset: %v %v", r, err)
	} else {
		_, _ = io.Copy(io.Discard, r.Body)
		r.Body.Close()
	}
	b.run(chromedp.Evaluate[chromedp.Void]("update()", chromedp.EvalAwaitPromise))
	b.says("[data-state=archive]", "Idle")
	b.says("#changes", "archive: ○ Idle")
	b.await(`document.activeElement.id === "reset-archive"`)
	b.checkAccessible()
	for _, want := range []string{
		"action=authorize operator=local profile=review outcome=ok", "action=sign-in operator=local profile=review outcome=ok", "action=\"keep account\"", "action=\"replace account\"",
		"action=refresh operator=local profile=archive outcome=failed",
	} {
		if !strings.Contains(s.log.String(), want) {
			t.Errorf("the log lacks %q", want)
		}
	}
}

// TestConsoleLogin opens a console behind a bearer token.
func TestConsoleLogin(t *testing.T) {
	const token = "an operator's bearer token"
	s := newConsoleStage(t, func(o *serverOptions) {
		o.admin.bearer = func() broker.Secret { return broker.NewSecret(token) }
	})
	b := newBrowser(t)
	b.open(s.url + "/profiles/review")
	b.at("Log in")
	b.keys("#token", "a guess")
	b.press("main button")
	b.await(`!!document.querySelector("[role=alert]")`)
	b.at("Log in")
	b.keys("#token", token)
	b.press("main button")
	b.at("review")

	// The session survives the way to the authorization server and back, and so
	// does what binds the sign-in to this browser.
	s.signIn(b, "review", "reviewer@example.com")
	b.at("review")
	b.says("[role=status]", "The sign-in is complete.")

	// In another browser, nobody knows who is asking.
	other := newBrowser(t)
	b.click(`form[action="/profiles/review/authorize"] button`)
	b.at("Sign in for review")
	address, err := eval[string](b, `document.getElementById("continue").href`)
	if err != nil {
		t.Fatal(err)
	}
	other.open(address)
	other.await(`document.querySelector("h1")?.textContent === "Sign in" && document.readyState === "complete"`)
	other.run(chromedp.SendKeys(chromedp.CSS("#username"), "admin@example.com"), chromedp.SendKeys(chromedp.CSS("#password"), sandbox.DemoPassword))
	other.click("button[value=allow]")
	other.at("The sign-in is not complete")

	b.open(s.url)
	b.at("Profiles")
	b.click("header button")
	b.at("Log in")
	b.open(s.url)
	b.at("Log in")
	if strings.Contains(s.log.String(), token) {
		t.Error("the log has the token")
	}
}

// screenshot keeps docs/console.png as the page is, if UPDATE_SCREENSHOT is set.
func (s *consoleStage) screenshot(b *browser) {
	s.t.Helper()
	if os.Getenv("UPDATE_SCREENSHOT") == "" {
		return
	}
	b.run(chromedp.EmulateViewport(1200, 920))
	ctx, cancel := b.within()
	defer cancel()
	png, err := chromedp.Run(ctx, chromedp.CaptureScreenshot())
	if err != nil {
		s.t.Fatal(err)
	}
	b.run(chromedp.ResetViewport())
	if err := os.WriteFile("../../docs/console.png", png, 0o644); err != nil {
		s.t.Fatal(err)
	}
	s.t.Logf("docs/console.png: %d bytes", len(png))
}

// TestConsoleOverTLS knocks at the real listener, as it is configured in a file:
// with certificates, a bearer token, and what changes under a running server.
func TestConsoleOverTLS(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	authority := testca.New(t)
	s.tlsFiles(authority)
	s.write("token", "the-first-bearer-token")
	config := func(allow string) {
		s.write("config.yaml", strings.Replace(read(t, s.config(`policy:`, `  - {callers: ["dns:worker.example.com"], profiles: [invoices], allow: [`+allow+`]}`)),
			`admin: {address: "127.0.0.1:0"}`, `admin: {address: "127.0.0.1:0", bearer_token: {file: token}, tls: {certificate: server.pem, private_key: server.key, client_ca: ca.pem}}`, 1))
	}
	config("admin")
	p := start(t, s.path("config.yaml"))
	if got := command(t, "healthcheck", "--admin-address", p.admin, "--ca", s.path("ca.pem")); got.status != 0 || got.stdout != "ready\n" {
		t.Errorf("healthcheck: %+v", got)
	}
	// get is the status of a page for somebody with these certificates and token.
	get := func(path, token string, certificates ...tls.Certificate) (int, string) {
		client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: authority.Pool(), Certificates: certificates}, DisableKeepAlives: true,
		}}
		r, err := http.NewRequest(http.MethodGet, "https://"+p.admin+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			r.Header.Set("Authorization", "Bearer "+token)
		}
		a, err := client.Do(r)
		if err != nil {
			return 0, err.Error()
		}
		defer a.Body.Close()
		body, err := io.ReadAll(a.Body)
		if err != nil {
			t.Fatal(err)
		}
		return a.StatusCode, string(body)
	}
	worker, err := tls.LoadX509KeyPair(s.path("client.pem"), s.path("client.key"))
	if err != nil {
		t.Fatal(err)
	}
	server, err := tls.LoadX509KeyPair(s.path("server.pem"), s.path("server.key"))
	if err != nil {
		t.Fatal(err)
	}
	const page = `href="/profiles/invoices"`
	for what, c := range map[string]struct {
		path, token  string
		certificates []tls.Certificate
		status       int
		page         bool
	}{
		"machines need nothing":        {"/healthz", "", nil, 200, false},
		"nor does the callback":        {"/oauth/callback", "", nil, 400, false},
		"nobody":                       {"/", "", nil, 401, false},
		"a certificate":                {"/", "", []tls.Certificate{worker}, 200, true},
		"the token":                    {"/", "the-first-bearer-token", nil, 200, true},
		"another token":                {"/", "the-second-bearer-token", nil, 401, false},
		"a certificate without a name": {"/", "", []tls.Certificate{server}, 403, false},
		"a certificate that the policy knows not": {"/", "", []tls.Certificate{authority.Leaf(testca.Named("other.example.com"))}, 200, false},
		"a certificate of another authority":      {"/", "", []tls.Certificate{testca.New(t).Leaf(testca.Named("worker.example.com"))}, 0, false},
	} {
		if status, body := get(c.path, c.token, c.certificates...); status != c.status || strings.Contains(body, page) != c.page {
			t.Errorf("%s: %d, want %d: %s", what, status, c.status, body)
		}
	}

	s.write("token", "the-second-bearer-token")
	p.await("the new token is in force", func() bool { status, _ := get("/", "the-second-bearer-token"); return status == http.StatusOK })
	if status, _ := get("/", "the-first-bearer-token"); status != http.StatusUnauthorized {
		t.Errorf("the old token: %d", status)
	}
	config("issue")
	p.await("the new policy is in force", func() bool { _, body := get("/", "", worker); return !strings.Contains(body, page) })
	if strings.Contains(p.log.String(), "bearer-token") {
		t.Error("the log has the token")
	}
}
