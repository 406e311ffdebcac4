//go:build conformance

package conformance_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	tokenbrokerv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/testproc"
)

// binary is the command, built once for all tests.
var binary string

func TestMain(m *testing.M) { os.Exit(testproc.RunWithBroker(m, &binary)) }

// client is the metadata of a client, in the words of RFC 7591.
type client map[string]any

// secret of clients for which any will do.
const secret = "a secret of at least thirty-two characters"

// machine is a client for client_credentials, with more metadata; nil takes some
// away.
func machine(id string, more client) client {
	c := client{
		"client_id": id, "client_secret": secret,
		"grant_types": []string{"client_credentials"}, "response_types": []string{}, "redirect_uris": []string{},
	}
	for name, value := range more {
		if c[name] = value; value == nil {
			delete(c, name)
		}
	}
	return c
}

// redirectURL begins the address that browsers come back to, which ends in the
// client's id. Nobody listens there: tests bring to the broker what comes back.
const redirectURL = "http://127.0.0.1:9/oauth/callback/"

// personal is a client for people who sign in.
func personal(id string) client {
	return client{
		"client_id": id, "client_secret": secret,
		"grant_types": []string{"authorization_code", "refresh_token"}, "redirect_uris": []string{redirectURL + id},
	}
}

// inspector is the client with which tests ask what a token is worth.
var inspector = machine("inspector", nil)

// server is a running third-party authorization server.
type server struct {
	t       testing.TB
	process *testproc.Process
	ca      *testca.Authority
	// http and https are its issuers. mutual is the address that the latter
	// names for clients with a certificate.
	http, https, mutual string
}

// startServer starts a server that knows these clients, and whose access tokens
// live so long.
func startServer(t testing.TB, lifetime time.Duration, clients ...client) *server {
	t.Helper()
	return startServerWith(t, testca.New(t), lifetime, clients...)
}

// startServerWith starts a server that this authority vouches for, and that
// trusts it about clients.
func startServerWith(t testing.TB, ca *testca.Authority, lifetime time.Duration, clients ...client) *server {
	t.Helper()
	testproc.Require(t, "node")
	if _, err := os.Stat("server/node_modules/oidc-provider"); err != nil {
		t.Fatal("the server is not installed: run make conformance, or npm ci in conformance/server")
	}
	s := &server{t: t, ca: ca}
	certificate, key := testca.PEM(t, s.ca.Leaf(testca.Loopback))
	settings, err := json.Marshal(map[string]any{
		"clients":  append(clients, inspector),
		"lifetime": lifetime.Seconds(),
		"tls":      map[string]string{"certificate": string(certificate), "key": string(key), "ca": string(s.ca.PEM())},
	})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("node", "server/server.mjs")
	cmd.Stdin = bytes.NewReader(settings)
	s.process = testproc.Start(t, cmd)
	s.process.Await("the server listens", time.Minute, func() bool {
		for line := range strings.Lines(s.process.Log()) {
			var listening struct{ HTTP, HTTPS, Mutual string }
			if json.Unmarshal([]byte(line), &listening) == nil {
				s.http, s.https, s.mutual = listening.HTTP, listening.HTTPS, listening.Mutual
			}
		}
		return s.http != ""
	})
	return s
}

// call is what the server saw of a request to its token or revocation endpoint,
// and what it made of it. Tokens are told by their ids.
type call struct {
	Time     int64  // when it came, in milliseconds since 1970
	Endpoint string // token or revocation
	Host     string
	Client   string
	// Authentication is the client's, by the names of RFC 7591.
	Authentication string
	Grant, Scope   string
	Resource       []string
	// Extra are the parameters that OAuth does not know.
	Extra map[string]string
	// Presented is the refresh token, or the token to revoke.
	Presented string
	Status    int
	// Error and Detail are error and error_description.
	Error, Detail string
	// Access and Refresh were issued.
	Access, Refresh string
	// Revoked: the server took it for an abuse, or a request, to end all that
	// came of one consent.
	Revoked bool
	// Held: the client never got the answer.
	Held bool
}

func (c call) String() string {
	type plain call
	return fmt.Sprintf("\n\t%+v", plain(c))
}

// calls are what came of a client so far; of all if none is named.
func (s *server) calls(client string) (calls []call) {
	s.t.Helper()
	var all []call
	if err := json.Unmarshal(s.read(http.Get(s.http+"/_calls")), &all); err != nil {
		s.t.Fatal(err)
	}
	for _, c := range all {
		if client == "" || c.Client == client {
			calls = append(calls, c)
		}
	}
	return calls
}

// want fails the test unless so many requests came of the client, and returns
// them.
func (s *server) want(client string, n int) []call {
	s.t.Helper()
	calls := s.calls(client)
	if len(calls) != n {
		s.t.Fatalf("the server counts %d requests of %q, want %d: %v", len(calls), client, n, calls)
	}
	return calls
}

// hold has the next token request get no answer. If act is true the server acts
// on it first.
func (s *server) hold(act bool) {
	s.t.Helper()
	s.read(http.Post(fmt.Sprintf("%s/_hold?act=%t", s.http, act), "", nil))
}

// introspection is what the server says of a token (RFC 7662).
type introspection struct {
	Active   bool
	ClientID string `json:"client_id"`
	Scope    string
	Audience string `json:"aud"`
	Subject  string `json:"sub"`
}

func (s *server) introspect(token string) (i introspection) {
	s.t.Helper()
	answer := s.post("/token/introspection", "inspector", url.Values{"token": {token}})
	if err := json.Unmarshal(answer, &i); err != nil {
		s.t.Fatalf("%v\n%s", err, answer)
	}
	return i
}

// post makes a request as a client would, and returns the answer, whatever it is.
func (s *server) post(path, client string, form url.Values) []byte {
	s.t.Helper()
	r, err := http.NewRequestWithContext(s.t.Context(), http.MethodPost, s.http+path, strings.NewReader(form.Encode()))
	if err != nil {
		s.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	r.SetBasicAuth(client, url.QueryEscape(secret))
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		s.t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return body
}

// read returns the body of an answer that must be a success.
func (s *server) read(r *http.Response, err error) []byte {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	if r.StatusCode/100 != 2 {
		s.t.Fatalf("%s: %s\n%s", r.Request.URL, r.Status, body)
	}
	return body
}

var formAction = regexp.MustCompile(`<form[^>]* action="([^"]+)"[^>]*>\s*<input type="hidden" name="prompt" value="([^"]+)"`)

// signIn is a person with a browser of their own: opens the address, fills in
// what the server asks, and returns what it sends back to the redirect URL.
func (s *server) signIn(address, login string) url.Values {
	s.t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		s.t.Fatal(err)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.ca.Pool()}}
	defer transport.CloseIdleConnections()
	browser := &http.Client{Jar: jar, Transport: transport, CheckRedirect: func(r *http.Request, _ []*http.Request) error {
		if strings.HasPrefix(r.URL.String(), redirectURL) {
			return http.ErrUseLastResponse
		}
		return nil
	}}
	r, err := browser.Get(address)
	for range 5 {
		if err == nil && r.StatusCode == http.StatusSeeOther {
			r.Body.Close()
			back, err := r.Location()
			if err != nil {
				s.t.Fatal(err)
			}
			return back.Query()
		}
		page := s.read(r, err)
		form := formAction.FindSubmatch(page)
		if form == nil {
			s.t.Fatalf("a page that asks for nothing:\n%s", page)
		}
		r, err = browser.PostForm(html.UnescapeString(string(form[1])), url.Values{
			"prompt": {string(form[2])}, "login": {login}, "password": {"any"},
		})
	}
	s.t.Fatal("the server does not stop asking")
	return nil
}

// replica is a running broker.
type replica struct {
	tokenbrokerv1.TokenBrokerClient
	tokenbrokerv1.ProfileAdminClient
	t       testing.TB
	process *testproc.Process
}

var served = regexp.MustCompile(`"msg":"serving".*"address":"([^"]+)"`)

// startBroker starts a broker with this configuration, in which <http> and
// <https> stand for the server's issuers; its listeners need no mention.
func (s *server) startBroker(config string) *replica {
	s.t.Helper()
	config = "server: {address: \"127.0.0.1:0\"}\nadmin: {address: \"127.0.0.1:0\"}\nlog: {level: debug}\n" +
		strings.NewReplacer("<http>", s.http, "<https>", s.https).Replace(config)
	cmd := exec.Command(binary, "serve", "--config", write(s.t, "config.yaml", config))
	cmd.Env = append(os.Environ(), "SSL_CERT_FILE="+write(s.t, "ca.pem", string(s.ca.PEM())), "SSL_CERT_DIR="+s.t.TempDir())
	r := &replica{t: s.t, process: testproc.Start(s.t, cmd)}
	var address string
	r.process.Await("the broker serves", 30*time.Second, func() bool {
		m := served.FindStringSubmatch(r.process.Log())
		if m != nil {
			address = m[1]
		}
		return m != nil
	})
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	r.TokenBrokerClient, r.ProfileAdminClient = tokenbrokerv1.NewTokenBrokerClient(conn), tokenbrokerv1.NewProfileAdminClient(conn)
	return r
}

// write writes a file to a directory of its own, and returns its path.
func write(t testing.TB, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// mostOfACall is how long a call may take: more than the broker lets one wait.
const mostOfACall = 45 * time.Second

// within bounds a call.
func (r *replica) within() context.Context {
	ctx, cancel := context.WithTimeout(r.t.Context(), mostOfACall)
	r.t.Cleanup(cancel)
	return ctx
}

// ask asks for a token. Any number of callers may.
func (r *replica) ask(profile string, scopes ...string) (*tokenbrokerv1.Token, error) {
	ctx, cancel := context.WithTimeout(r.t.Context(), mostOfACall)
	defer cancel()
	response, err := r.IssueToken(ctx, &tokenbrokerv1.IssueTokenRequest{Profile: profile, Scopes: scopes})
	return response.GetToken(), err
}

// issue returns a token that must be had.
func (r *replica) issue(profile string, scopes ...string) *tokenbrokerv1.Token {
	r.t.Helper()
	token, err := r.ask(profile, scopes...)
	if err != nil {
		r.t.Fatalf("issuing a token for %s: %v\n%s", profile, err, r.process.Log())
	}
	return token
}

// until asks for a token until the answer is what is waited for. It pauses like
// any poll of a process.
func (r *replica) until(what, profile string, done func(token *tokenbrokerv1.Token, err error) bool) {
	r.t.Helper()
	r.process.Await(what, time.Minute, func() bool {
		return done(r.ask(profile))
	})
}

// successor returns the token that is served after this one. No call may fail
// meanwhile.
func (r *replica) successor(profile string, of *tokenbrokerv1.Token) (token *tokenbrokerv1.Token) {
	r.t.Helper()
	r.until("a token ends", profile, func(got *tokenbrokerv1.Token, err error) bool {
		if err != nil {
			r.t.Fatalf("waiting for the successor of %s: %v\n%s", of.GetId(), err, r.process.Log())
		}
		token = got
		return got.GetId() != of.GetId()
	})
	return token
}

// refusal returns what ends the service of the token at hand.
func (r *replica) refusal(profile string) (err error) {
	r.t.Helper()
	r.until("a token ends", profile, func(_ *tokenbrokerv1.Token, e error) bool {
		err = e
		return err != nil
	})
	return err
}

// refused fails the test unless a token is refused for the reason.
func (r *replica) refused(profile, reason string) {
	r.t.Helper()
	_, err := r.ask(profile)
	r.wantReason(err, reason)
}

// wantReason fails the test unless the error has the reason.
func (r *replica) wantReason(err error, want string) {
	r.t.Helper()
	if got := reason(err); got != want {
		r.t.Fatalf("%v: has the reason %q, want %s\n%s", err, got, want, r.process.Log())
	}
}

// reason of an error; empty if it has none.
func reason(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

// start begins a sign-in and returns what the person opens.
func (r *replica) start(profile string) *tokenbrokerv1.StartAuthorizationResponse {
	r.t.Helper()
	started, err := r.StartAuthorization(r.within(), &tokenbrokerv1.StartAuthorizationRequest{Profile: profile})
	if err != nil {
		r.t.Fatalf("starting a sign-in for %s: %v\n%s", profile, err, r.process.Log())
	}
	return started
}

// complete brings what came back to the redirect URL.
func (r *replica) complete(back url.Values) (*tokenbrokerv1.Profile, error) {
	completed, err := r.CompleteAuthorization(r.within(), &tokenbrokerv1.CompleteAuthorizationRequest{
		State: back.Get("state"), Code: back.Get("code"), Iss: back.Get("iss"),
	})
	return completed.GetProfile(), err
}

// authorize has a person sign in for the profile.
func (r *replica) authorize(s *server, profile, login string) *tokenbrokerv1.Profile {
	r.t.Helper()
	p, err := r.complete(s.signIn(r.start(profile).GetAuthorizationUrl(), login))
	if err != nil {
		r.t.Fatalf("completing a sign-in for %s: %v\n%s", profile, err, r.process.Log())
	}
	return p
}
