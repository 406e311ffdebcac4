package main

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// terminal is a "broker authorize" under way.
type terminal struct {
	p      *process
	cmd    *exec.Cmd
	in     io.WriteCloser
	stdout lockedBuffer
	stderr lockedBuffer
	url    string // to open in a browser
}

var addressToOpen = regexp.MustCompile(`(?m)^  (http://\S+)$`)

// authorize runs the command until it has said where to sign in.
func (p *process) authorize(args ...string) *terminal {
	p.t.Helper()
	c := &terminal{p: p, cmd: exec.Command(binary, append([]string{"authorize", "review", "--no-browser", "--address", p.address}, args...)...)}
	c.cmd.Stdout, c.cmd.Stderr = &c.stdout, &c.stderr
	var err error
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		p.t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() {
		_ = c.cmd.Process.Kill() // it may have ended already
		_ = c.cmd.Wait()
	})
	p.await("the command says where to sign in", func() bool {
		m := addressToOpen.FindStringSubmatch(c.stderr.String())
		if m != nil {
			c.url = m[1]
		}
		return m != nil
	})
	return c
}

// signIn fills in the page, and returns where the browser is sent.
func (c *terminal) signIn(user string) string {
	c.p.t.Helper()
	browser := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	r, err := browser.PostForm(c.url, url.Values{"username": {user}, "password": {sandbox.DemoPassword}, "action": {"allow"}})
	if err != nil {
		c.p.t.Fatal(err)
	}
	defer r.Body.Close()
	return r.Header.Get("Location")
}

// ends returns how the command ended.
func (c *terminal) ends() outcome {
	_ = c.cmd.Wait() // the status is in ProcessState
	return outcome{c.cmd.ProcessState.ExitCode(), c.stdout.String(), c.stderr.String()}
}

func TestPersonSignsInFromATerminal(t *testing.T) {
	t.Parallel()
	s, console := newStage(t), freeAddress(t)
	p := start(t, s.write("config.yaml", fmt.Sprintf(`server: {address: "127.0.0.1:0"}
admin: {address: %q}
profiles:
  - name: review
    vantage:
      base_url: %s
      client_id: review
      client_secret: {env: REVIEW_SECRET}
      authorization_code: {redirect_url: "http://%s/oauth/callback"}
`, console, s.url, console)), "REVIEW_SECRET="+s.vantage.ClientSecret("review"))

	got := command(t, "token", "review", "--address", p.address)
	for _, want := range []string{"AUTHORIZATION_REQUIRED", "broker authorize review", "http://" + console + "/profiles/review"} {
		if got.status != 1 || !strings.Contains(got.stderr, want) {
			t.Errorf("before the sign-in: %+v, want %s", got, want)
		}
	}

	// The browser comes back to the broker.
	c := p.authorize()
	r, err := http.Get(c.signIn("reviewer@example.com"))
	if err != nil {
		t.Fatal(err)
	}
	r.Body.Close()
	if done := c.ends(); r.StatusCode != http.StatusOK || done.status != 0 || !strings.Contains(done.stdout, "reviewer@example.com") {
		t.Errorf("the browser got %s, the command ended with %+v", r.Status, done)
	}
	p.run("token", "review")

	// It cannot, and another account came.
	c = p.authorize("--paste")
	fmt.Fprintln(c.in, c.signIn("operator@example.com"))
	if done := c.ends(); done.status != 1 || !strings.Contains(done.stderr, "reviewer@example.com") || !strings.Contains(done.stderr, "operator@example.com") {
		t.Errorf("another account, unasked: %+v", done)
	}
	c = p.authorize("--paste", "--replace-account")
	came := c.signIn("operator@example.com")
	fmt.Fprintln(c.in, came)
	if done := c.ends(); done.status != 0 || !strings.Contains(done.stdout, "operator@example.com") {
		t.Errorf("another account: %+v", done)
	}
	if code := regexp.MustCompile(`code=(\w+)`).FindStringSubmatch(came); code == nil || strings.Contains(p.log.String()+c.stderr.String(), code[1]) {
		t.Errorf("the code is missing in the address, or shown")
	}
}

func TestAddressThatASignInEndedAt(t *testing.T) {
	const state, secret = "s1", "c0de-hush"
	for name, tc := range map[string]struct{ address, want string }{
		"fine":           {"http://127.0.0.1:7444/oauth/callback?code=" + secret + "&state=s1&iss=https%3A%2F%2Fid \n", ""},
		"another one's":  {"http://127.0.0.1:7444/oauth/callback?code=" + secret + "&state=s2", "another sign-in"},
		"without a code": {"http://127.0.0.1:7444/oauth/callback?state=s1", "no code"},
		"refused":        {"http://127.0.0.1:7444/oauth/callback?error=access_denied&error_description=no%0Away&state=s1", `"access_denied" "no\nway"`},
		"no address":     {"http://[" + secret, "no address"},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := callbackOf(tc.address, state)
			if tc.want == "" {
				if err != nil || r.GetCode() != secret || r.GetState() != state || r.GetIss() != "https://id" {
					t.Fatalf("got %v", err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), secret) {
				t.Errorf("error is %v, want one that says %q and repeats no code", err, tc.want)
			}
		})
	}
}
