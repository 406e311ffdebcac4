package oauth_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

func discardLog() *log.Logger { return log.New(io.Discard, "", 0) }

// metadataOf is that of the server at base, changed by more members.
func metadataOf(base, more string) string {
	m := fmt.Sprintf(`"token_endpoint":"%[1]s/token","authorization_endpoint":"%[1]s/authorize","revocation_endpoint":"%[1]s/revoke",%[2]s`, base, more)
	if !strings.Contains(more, `"issuer"`) {
		m = fmt.Sprintf(`"issuer":"%s",`, base) + strings.TrimSuffix(m, ",")
	}
	return "{" + m + "}"
}

// publisher is a server that publishes metadata and grants tokens.
type publisher struct {
	*recorder
	base string

	mu       sync.Mutex
	metadata map[string]http.Handler // by path
}

func publish(t testing.TB) *publisher {
	t.Helper()
	p := &publisher{metadata: map[string]http.Handler{}}
	p.recorder, p.base = record(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			io.WriteString(w, bearer)
			return
		}
		p.mu.Lock()
		h := p.metadata[r.URL.EscapedPath()]
		p.mu.Unlock()
		if h == nil {
			h = http.NotFoundHandler()
		}
		h.ServeHTTP(w, r)
	}))
	return p
}

func (p *publisher) at(path string, h http.Handler) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.metadata[path] = h
}

const openID = "/.well-known/openid-configuration"

// discovering makes a profile discover its endpoints.
func discovering(issuer string) func(*oauth.ProfileConfig) {
	return func(c *oauth.ProfileConfig) { c.Issuer, c.TokenURL, c.AuthorizationURL = issuer, "", "" }
}

func TestDiscovery(t *testing.T) {
	const get, post = "GET|%s|||", "POST|%s|application/x-www-form-urlencoded||client_id=tester&client_secret=s&grant_type=client_credentials"
	for name, tc := range map[string]struct {
		issuer string // what is configured, below the base
		at     string
		says   string // its issuer, below the base
		asked  []string
	}{
		"OpenID Connect":             {"", openID, "", []string{openID}},
		"below a path":               {"/t/w", "/t/w" + openID, "/t/w", []string{"/t/w" + openID}},
		"a slash less":               {"/t/", "/t" + openID, "/t", []string{"/t" + openID}},
		"a slash more":               {"/t", "/t" + openID, "/t/", []string{"/t" + openID}},
		"an escaped path":            {"/a%2Fb", "/a%2Fb" + openID, "/a%2Fb", []string{"/a%2Fb" + openID}},
		"RFC 8414":                   {"", "/.well-known/oauth-authorization-server", "", []string{openID, "/.well-known/oauth-authorization-server"}},
		"RFC 8414, between the path": {"/t/w", "/.well-known/oauth-authorization-server/t/w", "/t/w", []string{"/t/w" + openID, "/.well-known/oauth-authorization-server/t/w"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := publish(t)
			s.at(tc.at, reply{header: map[string]string{"Content-Type": "text/html"}, body: metadataOf(s.base, `"issuer":"`+s.base+tc.says+`"`)})
			p := profileFor(t, profileConfig("", discovering(s.base+tc.issuer)))
			s.want(t) // nothing is asked for before it is needed
			if p.Endpoint != strings.TrimRight(s.base+tc.issuer, "/") {
				t.Errorf("the endpoint is shown as %s", p.Endpoint)
			}
			var want []string
			for _, path := range tc.asked {
				want = append(want, fmt.Sprintf(get, path))
			}
			for range 2 {
				if _, err := p.Issuer.Issue(t.Context(), broker.Request{}); err != nil {
					t.Fatal(err)
				}
				s.want(t, append(want, fmt.Sprintf(post, "/token"))...)
				want = nil
			}
		})
	}
}

func TestDiscoveryThatFails(t *testing.T) {
	for name, tc := range map[string]struct {
		answer http.Handler
		words  string
	}{
		"nowhere":             {http.NotFoundHandler(), "/.well-known/oauth-authorization-server answered 404: check issuer, and set token_url"},
		"down":                {reply{status: 503, header: map[string]string{"Retry-After": "30"}}, openID + " answered 503"},
		"a page":              {reply{body: "<html>"}, openID + " answered with metadata that cannot be used: it is no JSON object"},
		"a list":              {reply{body: "[]"}, "no JSON object"},
		"null":                {reply{body: "null"}, "no JSON object"},
		"too large":           {reply{body: strings.Repeat(" ", 2<<20)}, "a body of more than 1 MiB"},
		"a redirect":          {reply{status: 302, header: map[string]string{"Location": "/elsewhere"}}, "answered 302"},
		"another issuer":      {reply{body: `{"issuer":"https://evil.example","token_endpoint":"https://evil.example/token"}`}, `it is that of issuer 'https://evil.example'`},
		"no issuer":           {reply{body: `{"token_endpoint":"https://h/token"}`}, "it is that of issuer ''"},
		"another case":        {reply{body: `{"Issuer":"BASE","token_endpoint":"https://h/token"}`}, "it is that of issuer ''"},
		"issuer of a type":    {reply{body: `{"issuer":7}`}, "it is that of issuer ''"},
		"no token endpoint":   {reply{body: `{"issuer":"BASE"}`}, "token_endpoint is missing"},
		"token of a type":     {reply{body: `{"issuer":"BASE","token_endpoint":7}`}, "token_endpoint is not a string"},
		"in clear":            {reply{body: `{"issuer":"BASE","token_endpoint":"http://h/token"}`}, "token_endpoint http://h/token would send secrets in clear"},
		"revocation in clear": {reply{body: `{"issuer":"BASE","token_endpoint":"https://h/token","revocation_endpoint":"http://h/r"}`}, "revocation_endpoint http://h/r would send"},
		"alias in clear":      {reply{body: `{"issuer":"BASE","token_endpoint":"https://h/token","mtls_endpoint_aliases":{"token_endpoint":"http://h/t"}}`}, "of the mtls_endpoint_aliases token_endpoint http://h/t would send"},
		"aliases of a type":   {reply{body: `{"issuer":"BASE","token_endpoint":"https://h/token","mtls_endpoint_aliases":[]}`}, "mtls_endpoint_aliases is no JSON object"},
		"cut off": {http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "9")
			io.WriteString(w, "{")
		}), "broke the connection off"},
	} {
		t.Run(name, func(t *testing.T) {
			s := publish(t)
			if r, ok := tc.answer.(reply); ok {
				r.body = strings.ReplaceAll(r.body, "BASE", s.base)
				tc.answer = r
			}
			s.at(openID, tc.answer)
			p := profileFor(t, profileConfig("", byCode, discovering(s.base)))
			_, issueErr := p.Issuer.Issue(t.Context(), broker.Request{RefreshToken: broker.NewSecret(canary)})
			_, urlErr := p.Issuer.(broker.Authorizer).AuthorizationURL(t.Context(), broker.AuthorizationRequest{})
			for _, err := range []error{
				issueErr, urlErr,
				p.Issuer.(broker.Revoker).Revoke(t.Context(), broker.NewSecret(canary), broker.AccessToken),
				p.Issuer.(broker.Authorizer).CheckIssuer(t.Context(), s.base),
			} {
				e := failure(t, nil, err)
				wantKind(t, e, broker.Unavailable, "metadata endpoint "+s.base, tc.words)
				wantOutcome(t, e, broker.Unsent)
				if name == "down" && e.RetryAfter != 30*time.Second {
					t.Errorf("RetryAfter is %s", e.RetryAfter)
				}
			}
			for _, r := range s.requests() {
				if !strings.HasPrefix(r, "GET|") || !strings.HasSuffix(r, "|||") {
					t.Errorf("the server saw %s", r)
				}
			}
		})
	}
}

func TestAServerThatIsNotThereIsNotDiscovered(t *testing.T) {
	p := profileFor(t, profileConfig("", discovering("http://127.0.0.1:1/x")))
	grant, err := p.Issuer.Issue(t.Context(), broker.Request{})
	e := failure(t, grant, err)
	wantKind(t, e, broker.Unavailable, "metadata endpoint http://127.0.0.1:1/x"+openID+" was not reached: nothing listens at 127.0.0.1:1 (connection refused): check host and port")
	wantOutcome(t, e, broker.Unsent)
}

// What fails is asked for again, what is known is not.
func TestDiscoveryRecovers(t *testing.T) {
	s := publish(t)
	s.at(openID, reply{status: 500})
	p := profileFor(t, profileConfig("", discovering(s.base)))
	grant, err := p.Issuer.Issue(t.Context(), broker.Request{})
	failure(t, grant, err)
	s.at(openID, reply{body: metadataOf(s.base, "")})
	for range 3 {
		if _, err := p.Issuer.Issue(t.Context(), broker.Request{}); err != nil {
			t.Fatal(err)
		}
	}
	if n := strings.Count(strings.Join(s.requests(), "\n"), "GET|"); n != 2 {
		t.Errorf("the metadata was asked for %d times", n)
	}
}

// All that share a Transport share what is known of a server, and one request
// for it, whichever of them made it and whoever of them leaves.
func TestDiscoveryIsShared(t *testing.T) {
	s := publish(t)
	arrived, release := make(chan struct{}, 2), make(chan struct{})
	s.at(openID, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		arrived <- struct{}{}
		select {
		case <-release:
		case <-r.Context().Done():
		}
		io.WriteString(w, metadataOf(s.base, ""))
	}))
	transport := oauth.NewTransport(oauth.TransportConfig{})
	t.Cleanup(transport.CloseIdleConnections)
	issue := func(ctx context.Context, client string) error {
		c := profileConfig("", discovering(s.base))
		c.Transport, c.ClientID = transport, client
		_, err := profileFor(t, c).Issuer.Issue(ctx, broker.Request{})
		return err
	}
	leaving, leave := context.WithCancel(t.Context())
	left := make(chan error)
	go func() { left <- issue(leaving, "leader") }()
	<-arrived
	var waiting sync.WaitGroup
	for i := range 20 {
		waiting.Go(func() {
			if err := issue(t.Context(), fmt.Sprint("waiting-", i)); err != nil {
				t.Error(err)
			}
		})
	}
	leave() // someone else must take over
	if err := <-left; err == nil {
		t.Error("whoever left was served")
	}
	<-arrived
	close(release)
	waiting.Wait()
	if n := strings.Count(strings.Join(s.requests(), "\n"), "GET|"); n != 2 {
		t.Errorf("the metadata was asked for %d times", n)
	}
}

func TestDiscoveryEndsInTime(t *testing.T) {
	s := publish(t)
	s.at(openID, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	c := profileConfig("", discovering(s.base))
	c.Timeout = 200 * time.Millisecond
	p := profileFor(t, c)
	for name, ctx := range map[string]func() (context.Context, context.CancelFunc){
		"the profile's time-out": func() (context.Context, context.CancelFunc) { return t.Context(), func() {} },
		"the caller's": func() (context.Context, context.CancelFunc) {
			return context.WithTimeout(t.Context(), 50*time.Millisecond)
		},
	} {
		ctx, cancel := ctx()
		start := time.Now()
		grant, err := p.Issuer.Issue(ctx, broker.Request{})
		cancel()
		e := failure(t, grant, err)
		wantKind(t, e, broker.Unavailable, "did not answer within")
		wantOutcome(t, e, broker.Unsent)
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("%s: it took %s", name, took)
		}
	}
	for _, r := range s.requests() {
		if strings.HasPrefix(r, "POST") {
			t.Errorf("the server saw %s", r)
		}
	}
}

// The time-out is one for the metadata and the token request together.
func TestDiscoveryAndTheRequestShareOneTimeout(t *testing.T) {
	const timeout = time.Second
	s := publish(t)
	s.then(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			<-r.Context().Done()
			return
		}
		late := time.NewTimer(timeout * 7 / 10)
		defer late.Stop()
		<-late.C
		io.WriteString(w, metadataOf(s.base, ""))
	}))
	c := profileConfig("", discovering(s.base))
	c.Timeout = timeout
	start := time.Now()
	grant, err := profileFor(t, c).Issuer.Issue(t.Context(), broker.Request{})
	took := time.Since(start)
	if e := failure(t, grant, err); e.Kind != broker.Ambiguous || took < timeout || took > timeout*3/2 {
		t.Errorf("after %s: %v", took, e)
	}
}

// Old metadata goes on being used, while new metadata is asked for and when that
// fails.
func TestOldMetadata(t *testing.T) {
	s := publish(t)
	s.at(openID, reply{body: metadataOf(s.base, "")})
	transport := oauth.NewTransport(oauth.TransportConfig{MetadataAge: time.Nanosecond})
	t.Cleanup(transport.CloseIdleConnections)
	c := profileConfig("", discovering(s.base))
	c.Transport = transport
	p := profileFor(t, c)
	issue := func() {
		t.Helper()
		if _, err := p.Issuer.Issue(t.Context(), broker.Request{}); err != nil {
			t.Fatal(err)
		}
	}
	issue()
	s.at(openID, reply{status: 500})
	for range 3 {
		issue()
	}
	s.at(openID, reply{body: metadataOf(s.base+"/moved", `"issuer":"`+s.base+`"`)})
	eventually(t, "the new endpoint is used", func() bool {
		s.requests()
		issue()
		return strings.Contains(strings.Join(s.requests(), "\n"), "POST|/moved/token")
	})
}

// FuzzMetadata serves any metadata and holds what callers rely on.
func FuzzMetadata(f *testing.F) {
	f.Add(`{"issuer":"BASE","token_endpoint":"BASE/token"}`)
	f.Add(metadataOf("BASE", `"mtls_endpoint_aliases":{"token_endpoint":"BASE/mtls"}`))
	f.Add(`{"issuer":"BASE","token_endpoint":"http://u:p@h/#x"}`)
	f.Add(`{"issuer":null,"token_endpoint":["https://h"]}`)
	f.Add("<html>")
	var now string
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, now) }))
	f.Cleanup(s.Close)
	f.Fuzz(func(t *testing.T, body string) {
		now = strings.ReplaceAll(body, "BASE", s.URL)
		c := profileConfig("", byCode, discovering(s.URL))
		p := profileFor(t, c) // over a Transport of its own, which knows nothing yet
		u, err := p.Issuer.(broker.Authorizer).AuthorizationURL(t.Context(), broker.AuthorizationRequest{State: "state", Challenge: "challenge"})
		if err != nil {
			e := failure(t, nil, err)
			wantKind(t, e, broker.Unavailable)
			wantOutcome(t, e, broker.Unsent)
			if len(e.Text) > 1000 || strings.ContainsFunc(e.Text, func(c rune) bool { return c < ' ' || c > '~' }) {
				t.Errorf("text is %q", e.Text)
			}
			return
		}
		if !strings.HasPrefix(u, "https://") && !strings.HasPrefix(u, "http://127.") && !strings.HasPrefix(u, "http://localhost") && !strings.HasPrefix(u, "http://[") || !strings.Contains(u, "state=state") {
			t.Errorf("a person signs in at %s", u)
		}
	})
}
