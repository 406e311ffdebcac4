package sandbox_test

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

const (
	tokenPath = "/auth2/connect/token"
	scopes    = "openid permissions global.wildcard"
	offline   = scopes + " offline_access"
	callback  = "http://127.0.0.1:9999/oauth/callback"
	verifier  = "a-verifier-of-at-least-forty-three-characters-0123456789"
)

// rig is a sandbox behind a real listener, and a client without a memory.
type rig struct {
	*sandbox.Server
	t     *testing.T
	url   string
	clock *clock
	http  *http.Client
}

// clock is a time that passes only when told to.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func newRig(t *testing.T, options sandbox.Options) *rig {
	t.Helper()
	c := &clock{now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	options.Now = c.Now
	server, err := sandbox.New(options)
	if err != nil {
		t.Fatal(err)
	}
	listener := httptest.NewServer(server)
	transport := &http.Transport{}
	t.Cleanup(func() {
		server.Close()
		transport.CloseIdleConnections()
		listener.Close()
	})
	return &rig{Server: server, t: t, url: listener.URL, clock: c, http: &http.Client{
		Transport:     transport,
		Timeout:       30 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// answer is a response that was read to its end.
type answer struct {
	status int
	header http.Header
	body   string
}

// field returns a member of a JSON answer, as a string.
func (a answer) field(t *testing.T, name string) string {
	t.Helper()
	members := map[string]any{}
	if err := json.Unmarshal([]byte(a.body), &members); err != nil {
		t.Fatalf("answer %d is not a JSON object: %v", a.status, err)
	}
	value, _ := members[name].(string)
	return value
}

func (r *rig) do(request *http.Request) answer {
	r.t.Helper()
	a, err := r.try(request)
	if err != nil {
		r.t.Fatal(err)
	}
	return a
}

func (r *rig) try(request *http.Request) (answer, error) {
	response, err := r.http.Do(request)
	if err != nil {
		return answer{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return answer{response.StatusCode, response.Header, string(body)}, err
}

func (r *rig) request(method, path, contentType, body string) *http.Request {
	r.t.Helper()
	request, err := http.NewRequestWithContext(r.t.Context(), method, r.url+path, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	if contentType != "" {
		request.Header.Set("Content-Type", contentType)
	}
	return request
}

func (r *rig) postForm(path string, form url.Values) *http.Request {
	r.t.Helper()
	return r.request(http.MethodPost, path, "application/x-www-form-urlencoded", form.Encode())
}

// token asks for a token with pairs of parameters. The client's secret is
// added unless it is among them.
func (r *rig) token(pairs ...string) answer {
	r.t.Helper()
	return r.do(r.postForm(tokenPath, r.form(pairs...)))
}

func (r *rig) form(pairs ...string) url.Values {
	form := url.Values{}
	for i := 0; i < len(pairs); i += 2 {
		form.Set(pairs[i], pairs[i+1])
	}
	if id := form.Get("client_id"); id != "" && !form.Has("client_secret") {
		form.Set("client_secret", r.ClientSecret(id))
	}
	return form
}

func (r *rig) invoices() []string {
	return []string{"client_id", "invoices", "grant_type", "client_credentials", "scope", scopes}
}

func (r *rig) password(password string) []string {
	return []string{
		"client_id", "operator", "grant_type", "password", "scope", scopes,
		"username", "operator@example.com", "password", password,
	}
}

func (r *rig) refresh(client, token string) answer {
	r.t.Helper()
	return r.token("client_id", client, "grant_type", "refresh_token", "refresh_token", token)
}

// authorizeURL is a complete authorization request, changed by pairs; an empty
// value removes a parameter.
func authorizeURL(pairs ...string) string {
	hash := sha256.Sum256([]byte(verifier))
	q := url.Values{
		"client_id":             {"review"},
		"redirect_uri":          {callback},
		"response_type":         {"code"},
		"scope":                 {offline},
		"state":                 {"xyz & more"},
		"code_challenge":        {base64.RawURLEncoding.EncodeToString(hash[:])},
		"code_challenge_method": {"S256"},
		"productId":             {"a8548c9b-cb90-4c66-8567-d7372bb9b963"},
		"nonce":                 {"n-1"},
	}
	for i := 0; i < len(pairs); i += 2 {
		if q.Set(pairs[i], pairs[i+1]); pairs[i+1] == "" {
			q.Del(pairs[i])
		}
	}
	return "/auth2/connect/authorize?" + q.Encode()
}

// signIn fills in the page and returns the parameters that came back.
func (r *rig) signIn(path string, pairs ...string) url.Values {
	r.t.Helper()
	form := url.Values{"username": {"reviewer@example.com"}, "password": {sandbox.DemoPassword}, "action": {"allow"}}
	for i := 0; i < len(pairs); i += 2 {
		form.Set(pairs[i], pairs[i+1])
	}
	a := r.do(r.postForm(path, form))
	if a.status != http.StatusFound {
		r.t.Fatalf("signing in: status %d, want a redirect", a.status)
	}
	target, err := url.Parse(a.header.Get("Location"))
	if err != nil {
		r.t.Fatal(err)
	}
	return target.Query()
}

// exchange redeems a code with pairs of parameters that differ from the usual;
// an empty value removes one.
func (r *rig) exchange(code string, pairs ...string) answer {
	r.t.Helper()
	form := r.form("client_id", "review", "grant_type", "authorization_code",
		"code", code, "code_verifier", verifier, "redirect_uri", callback)
	for i := 0; i < len(pairs); i += 2 {
		if form.Set(pairs[i], pairs[i+1]); pairs[i+1] == "" {
			form.Del(pairs[i])
		}
	}
	return r.do(r.postForm(tokenPath, form))
}

// consent goes through a whole sign-in and returns the token answer.
func (r *rig) consent() answer {
	r.t.Helper()
	a := r.exchange(r.signIn(authorizeURL()).Get("code"))
	r.want(a, http.StatusOK, "")
	return a
}

// skills says whether the resource takes a token.
func (r *rig) skills(token string) int {
	r.t.Helper()
	request := r.request(http.MethodGet, "/api/publicapi/v1/skills", "", "")
	request.Header.Set("Authorization", "Bearer "+token)
	return r.do(request).status
}

// want checks the status, and the error code where there is one.
func (r *rig) want(a answer, status int, code string) {
	r.t.Helper()
	if a.status != status {
		r.t.Errorf("status %d, want %d", a.status, status)
	}
	if code != "" && a.field(r.t, "error") != code {
		r.t.Errorf("error %q, want %q", a.field(r.t, "error"), code)
	}
}

func (r *rig) wantLive(token string, live bool) {
	r.t.Helper()
	want := http.StatusUnauthorized
	if live {
		want = http.StatusOK
	}
	if got := r.skills(token); got != want {
		r.t.Errorf("skills answered %d, want %d", got, want)
	}
}

func id(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])[:16]
}
