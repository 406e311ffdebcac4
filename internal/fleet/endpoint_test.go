package fleet_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// endpoint is the authorization server of a fleet: a sandbox, and a witness who
// writes down what came to it and what it said. Each replica reaches it at an
// address of its own, so that the witness knows who asks.
type endpoint struct {
	*sandbox.Server
	addresses []string // by replica

	mu       sync.Mutex // guards all below
	requests []request
	asked    func(*request)        // called when a token request has come
	watch    func(*request, stage) // called as one is answered
	tokens   map[string]issued     // by id
	secrets  []string
}

// request is a token request that arrived.
type request struct {
	replica  int
	grant    string
	client   string
	refresh  string // id of the refresh token that was presented
	arrived  time.Time
	decided  time.Time // when all but the answer was done
	answered time.Time // zero as long as it was not
	status   int       // zero without an answer
	code     string    // OAuth error code
	tokenID  string
	next     string // id of the refresh token that came with it
}

// stage is how far the answer to a request has come.
type stage string

const (
	arrived  stage = "arrived"
	decided  stage = "decided" // and no byte of the answer has left
	halfway  stage = "halfway" // half of the body has
	complete stage = "complete"
)

// issued is an access token that the endpoint gave away.
type issued struct {
	at time.Time // when it was asked for
}

// Callers that a fleet's endpoint knows.
const (
	invoices     = "invoices" // client credentials
	operator     = "operator" // password or a person's sign-in, with a refresh token that rotates
	operatorName = "operator@example.com"
	redirectURL  = "http://127.0.0.1:9999/oauth/callback" // nobody listens there

	invoicesSecret   = "canary-invoices-secret-5e1d"
	operatorSecret   = "canary-operator-secret-77aa"
	operatorPassword = "canary-operator-password-c0de"
)

// world is the sandbox's: tokens live as long as they say.
func world(accessLife time.Duration, change func(*sandbox.Options)) sandbox.Options {
	o := sandbox.Options{
		AccessTokenLifetime: accessLife,
		Users:               []sandbox.User{{Name: operatorName, Password: operatorPassword}},
		Clients: []sandbox.Client{
			{ID: invoices, GrantTypes: []string{"client_credentials"}, Secrets: []sandbox.Secret{{Value: invoicesSecret}}},
			{
				ID: operator, GrantTypes: []string{"password", "authorization_code"}, RedirectURIs: []string{redirectURL},
				AllowOfflineAccess: true, Secrets: []sandbox.Secret{{Value: operatorSecret}},
			},
		},
	}
	if change != nil {
		change(&o)
	}
	return o
}

func newEndpoint(t testing.TB, replicas int, o sandbox.Options) *endpoint {
	t.Helper()
	s, err := sandbox.New(o)
	if err != nil {
		t.Fatal(err)
	}
	e := &endpoint{Server: s, tokens: map[string]issued{}, secrets: []string{invoicesSecret, operatorSecret, operatorPassword}}
	for i := range replicas {
		web := httptest.NewServer(e.witness(i))
		t.Cleanup(func() {
			s.Close()
			web.Close()
		})
		e.addresses = append(e.addresses, strings.TrimPrefix(web.URL, "http://"))
	}
	return e
}

// witness hands requests of one replica on to the sandbox.
func (e *endpoint) witness(replica int) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, "/connect/token") {
			e.Server.ServeHTTP(w, r)
			return
		}
		var body bytes.Buffer
		if _, err := body.ReadFrom(r.Body); err != nil { // it never came in full
			panic(http.ErrAbortHandler)
		}
		form, _ := url.ParseQuery(body.String()) // the sandbox complains
		at := e.arrive(request{
			replica: replica, grant: form.Get("grant_type"), client: form.Get("client_id"), arrived: time.Now(),
			refresh: idOf(form.Get("refresh_token")),
		})
		r.Body = readCloser{&body}
		e.reached(at, arrived)
		answer := &tee{ResponseWriter: w, reached: func(s stage) { e.reached(at, s) }, halve: e.watched()}
		defer func() { e.answered(at, answer) }()
		e.Server.ServeHTTP(answer, r)
		e.reached(at, complete)
	})
}

func (e *endpoint) arrive(r request) int {
	e.mu.Lock()
	e.requests = append(e.requests, r)
	at, asked := len(e.requests)-1, e.asked
	e.mu.Unlock()
	if asked != nil {
		asked(&r)
	}
	return at
}

func (e *endpoint) reached(at int, s stage) {
	e.mu.Lock()
	if s == decided {
		e.requests[at].decided = time.Now()
	}
	r, watch := e.requests[at], e.watch
	e.mu.Unlock()
	if watch != nil {
		watch(&r, s)
	}
}

func (e *endpoint) answered(at int, answer *tee) {
	e.mu.Lock()
	defer e.mu.Unlock()
	r := &e.requests[at]
	r.status, r.answered = answer.status, time.Now()
	var said struct {
		Error        string `json:"error"`
		AccessToken  string `json:"access_token"`
		RefreshToken string `json:"refresh_token"`
	}
	if json.Unmarshal(answer.body.Bytes(), &said) != nil {
		return
	}
	r.code = said.Error
	if said.AccessToken != "" {
		r.tokenID = idOf(said.AccessToken)
		e.tokens[r.tokenID] = issued{at: r.arrived}
		e.secrets = append(e.secrets, said.AccessToken)
	}
	if said.RefreshToken != "" {
		r.next = idOf(said.RefreshToken)
		e.secrets = append(e.secrets, said.RefreshToken)
	}
}

// onRequest calls f for each token request that arrives, before it is answered,
// in the place of any f before. f may block.
func (e *endpoint) onRequest(f func(*request)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.asked = f
}

// onStage calls f at each stage of each token request, in the place of any f
// before. f may block.
func (e *endpoint) onStage(f func(*request, stage)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.watch = f
}

func (e *endpoint) watched() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.watch != nil
}

// seen returns the token requests so far, in the order in which they arrived.
func (e *endpoint) seen() []request {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.requests)
}

// issues returns the access tokens that were given away, by their ids.
func (e *endpoint) issues() map[string]issued {
	e.mu.Lock()
	defer e.mu.Unlock()
	return maps.Clone(e.tokens)
}

// lastAnswer is when the last token request was answered with a token.
func (e *endpoint) lastAnswer() time.Time {
	var last time.Time
	for _, r := range e.seen() {
		if r.tokenID != "" && r.answered.After(last) {
			last = r.answered
		}
	}
	return last
}

// presentations counts how often each refresh token was presented, without
// those that were answered in full by a server that could not serve just then:
// such an answer says that the refresh token was not looked at.
func (e *endpoint) presentations() map[string]int {
	counts := map[string]int{}
	for _, r := range e.seen() {
		if r.refresh != "" && r.status != http.StatusTooManyRequests && r.status < 500 {
			counts[r.refresh]++
		}
	}
	return counts
}

// hide adds to what must be found nowhere.
func (e *endpoint) hide(secret string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.secrets = append(e.secrets, secret)
}

// mostSecrets are looked for; there are more where thousands of tokens are issued.
const mostSecrets = 200

// confidential is what must be found nowhere.
func (e *endpoint) confidential() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.secrets[:min(len(e.secrets), mostSecrets)])
}

// idOf is the id of a token, as the API defines it; empty for none.
func idOf(token string) string {
	if token == "" {
		return ""
	}
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:8])
}

type readCloser struct{ *bytes.Buffer }

func (readCloser) Close() error { return nil }

// tee keeps what is answered, and tells how far that is.
type tee struct {
	http.ResponseWriter
	reached func(stage)
	halve   bool // what is written leaves in two halves
	status  int
	body    bytes.Buffer
}

func (t *tee) WriteHeader(status int) {
	if t.status == 0 {
		t.status = status
		t.reached(decided)
	}
	t.ResponseWriter.WriteHeader(status)
}

func (t *tee) Write(p []byte) (int, error) {
	if t.status == 0 {
		t.WriteHeader(http.StatusOK)
	}
	t.body.Write(p)
	if !t.halve {
		return t.ResponseWriter.Write(p)
	}
	n, err := t.ResponseWriter.Write(p[:len(p)/2])
	if err == nil {
		err = http.NewResponseController(t.ResponseWriter).Flush()
	}
	if err != nil {
		return n, err
	}
	t.reached(halfway)
	rest, err := t.ResponseWriter.Write(p[n:])
	return n + rest, err
}

func (t *tee) Unwrap() http.ResponseWriter { return t.ResponseWriter }
