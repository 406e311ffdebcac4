package oauth_test

import (
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

// onWire is the one request that client makes, byte by byte.
func onWire(t *testing.T, path string, asked oauth.TokenRequest, change ...func(*oauth.ProfileConfig)) string {
	t.Helper()
	seen := make(chan string, 1)
	address := serveTCP(t, func(c net.Conn) {
		var raw strings.Builder
		buffer := make([]byte, 64<<10)
		for !complete(raw.String()) {
			n, err := c.Read(buffer)
			if err != nil {
				return
			}
			raw.Write(buffer[:n])
		}
		seen <- raw.String()
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(bearer), bearer)
	})
	client := clientFor(t, strings.TrimSuffix(address, "/token")+path, change...)
	if _, err := client.RequestToken(t.Context(), asked); err != nil {
		t.Fatal(err)
	}
	host := strings.TrimPrefix(strings.TrimSuffix(address, "/token"), "http://")
	return strings.ReplaceAll(<-seen, host, "HOST")
}

func complete(raw string) bool {
	head, body, found := strings.Cut(raw, "\r\n\r\n")
	var n int
	if _, after, ok := strings.Cut(head, "Content-Length: "); ok {
		fmt.Sscan(after, &n)
	}
	return found && len(body) >= n
}

func basic(c *oauth.ProfileConfig) { c.ClientAuth = oauth.ClientSecretBasic }

func TestClientSecretPostOnTheWire(t *testing.T) {
	got := onWire(t, "/a%2Fb/token?tenant=x%20y&b=1", oauth.TokenRequest{
		GrantType:    broker.ClientCredentials,
		Scopes:       []string{"openid", "global.wildcard"},
		ClientSecret: broker.NewSecret("p+&%=: é"),
	}, func(c *oauth.ProfileConfig) { c.UserAgent = "broker/1" })
	body := "client_id=tester&client_secret=p%2B%26%25%3D%3A+%C3%A9&grant_type=client_credentials&scope=openid+global.wildcard"
	want := "POST /a%2Fb/token?tenant=x%20y&b=1 HTTP/1.1\r\n" +
		"Host: HOST\r\n" +
		"User-Agent: broker/1\r\n" +
		fmt.Sprintf("Content-Length: %d\r\n", len(body)) +
		"Accept: application/json\r\n" +
		"Accept-Encoding: identity\r\n" +
		"Content-Type: application/x-www-form-urlencoded\r\n" +
		"\r\n" + body
	if got != want {
		t.Errorf("the server saw\n%s\nwant\n%s", got, want)
	}
}

func TestClientSecretBasicOnTheWire(t *testing.T) {
	got := onWire(t, "/token", oauth.TokenRequest{
		GrantType:    broker.ClientCredentials,
		ClientSecret: broker.NewSecret("p+&%=: é"),
	}, basic, func(c *oauth.ProfileConfig) { c.ClientID = "https://id/a b" })
	body := "grant_type=client_credentials"
	want := "POST /token HTTP/1.1\r\n" +
		"Host: HOST\r\n" +
		"User-Agent: tokenbroker\r\n" +
		fmt.Sprintf("Content-Length: %d\r\n", len(body)) +
		"Accept: application/json\r\n" +
		"Accept-Encoding: identity\r\n" +
		"Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte("https%3A%2F%2Fid%2Fa%20b:p%2B%26%25%3D%3A%20%C3%A9")) + "\r\n" +
		"Content-Type: application/x-www-form-urlencoded\r\n" +
		"\r\n" + body
	if got != want {
		t.Errorf("the server saw\n%s\nwant\n%s", got, want)
	}
}

func TestEveryGrantsParametersAreSentOnce(t *testing.T) {
	asked := oauth.TokenRequest{
		GrantType:    broker.AuthorizationCode,
		ClientSecret: broker.NewSecret("s"),
		Parameters: url.Values{
			"redirect_uri":  {"https://b.example/oauth/callback?x=1"},
			"resource":      {"https://one", "https://two"},
			"audience":      {""},
			"grant_type":    {"password"},
			"client_id":     {"someone else"},
			"client_secret": {"another"},
		},
		Secrets: map[string]broker.Secret{
			"code":          broker.NewSecret("c+o/d=e"),
			"code_verifier": broker.NewSecret("v~1"),
			"client_secret": broker.NewSecret("yet another"),
			"username":      {},
		},
	}
	const rest = "code=c%2Bo%2Fd%3De&code_verifier=v~1&grant_type=authorization_code" +
		"&redirect_uri=https%3A%2F%2Fb.example%2Foauth%2Fcallback%3Fx%3D1&resource=https%3A%2F%2Fone&resource=https%3A%2F%2Ftwo"
	if _, body, _ := strings.Cut(onWire(t, "/token", asked), "\r\n\r\n"); body != "client_id=tester&client_secret=s&"+rest {
		t.Errorf("with client_secret_post the server saw %s", body)
	}
	if _, body, _ := strings.Cut(onWire(t, "/token", asked, basic), "\r\n\r\n"); body != rest {
		t.Errorf("with client_secret_basic the server saw %s", body)
	}
}

func TestAPublicClientSendsItsIDAlone(t *testing.T) {
	asked := oauth.TokenRequest{GrantType: oauth.RefreshToken, Secrets: map[string]broker.Secret{"refresh_token": broker.NewSecret("r")}}
	if _, body, _ := strings.Cut(onWire(t, "/token", asked), "\r\n\r\n"); body != "client_id=tester&grant_type=refresh_token&refresh_token=r" {
		t.Errorf("the server saw %s", body)
	}
}

func TestConfigMistakes(t *testing.T) {
	for name, tc := range map[string]struct {
		config oauth.ProfileConfig
		words  string
	}{
		"nothing":      {oauth.ProfileConfig{}, "token_url is missing\nclient_id is missing\nclient_auth \"\" is not"},
		"no host":      {oauth.ProfileConfig{TokenURL: "https:///token"}, "not an absolute URL"},
		"relative":     {oauth.ProfileConfig{TokenURL: "/token"}, "not an absolute URL"},
		"broken":       {oauth.ProfileConfig{TokenURL: "https://h/%zz" + canary}, "not an absolute URL"},
		"user":         {oauth.ProfileConfig{TokenURL: "https://u:secret-value@h/token"}, "user name"},
		"fragment":     {oauth.ProfileConfig{TokenURL: "https://h/token#secret-value"}, "fragment"},
		"secret":       {oauth.ProfileConfig{TokenURL: "https://h/token?client_secret=secret-value"}, "replace that secret"},
		"clear":        {oauth.ProfileConfig{TokenURL: "http://h/token?x=secret-value"}, "http://h/token would send secrets in clear"},
		"ftp":          {oauth.ProfileConfig{TokenURL: "ftp://h/token"}, "neither https"},
		"blank id":     {oauth.ProfileConfig{TokenURL: "https://h", ClientID: "id\n"}, "blanks around it"},
		"in clear too": {oauth.ProfileConfig{TokenURL: "https://h", RevocationURL: "http://h/revoke?x=secret-value"}, "http://h/revoke would send secrets in clear"},
		"no scheme":    {oauth.ProfileConfig{TokenURL: "https://h", RevocationURL: "h/revoke"}, "revocation_url is not an absolute URL such as https://id.example.com/revocation"},
		"other style":  {oauth.ProfileConfig{TokenURL: "https://h", ClientID: "id", ClientAuth: "magic"}, `"magic" is not one of client_secret_post, client_secret_basic`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := oauth.NewClient(tc.config)
			if err == nil || !strings.Contains(err.Error(), tc.words) || strings.Contains(err.Error(), "secret-value") {
				t.Errorf("error is %v, want %q", err, tc.words)
			}
		})
	}
}

func TestPlainHTTPOnlyToLoopbackHosts(t *testing.T) {
	for _, host := range []string{"localhost", "LOCALHOST:80", "127.0.0.1:1", "127.8.8.8", "[::1]:1", "[::ffff:127.0.0.1]"} {
		if _, err := oauth.NewClient(oauth.ProfileConfig{TokenURL: "http://" + host, ClientID: "c", ClientAuth: oauth.ClientSecretPost}); err != nil {
			t.Errorf("%s: %v", host, err)
		}
	}
	for _, host := range []string{"localhost.example.com", "10.0.0.1", "128.0.0.1", "[::2]", "127.0.0.1.example.com"} {
		if _, err := oauth.NewClient(oauth.ProfileConfig{TokenURL: "http://" + host, ClientID: "c", ClientAuth: oauth.ClientSecretPost}); err == nil {
			t.Errorf("%s was admitted", host)
		}
	}
}

func TestOneSpellingOfAnEndpoint(t *testing.T) {
	for _, raw := range []string{"https://ID.example.com/t?x=1", "https://id.example.com:443/t", "HTTPS://id.EXAMPLE.com/t"} {
		client, err := oauth.NewClient(oauth.ProfileConfig{TokenURL: raw, ClientID: "c", ClientAuth: oauth.ClientSecretPost})
		if err != nil {
			t.Fatal(err)
		}
		if got := client.Endpoint(); got != "https://id.example.com/t" {
			t.Errorf("%s is shown as %s", raw, got)
		}
	}
}

func TestConnectionsAreReused(t *testing.T) {
	var remotes []string
	client := clientFor(t, serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		remotes = append(remotes, r.RemoteAddr)
		if len(remotes)%2 == 0 { // an error's connection too
			w.WriteHeader(http.StatusBadRequest)
		}
		io.WriteString(w, bearer)
	})))
	for range 4 {
		request(t, client)
	}
	for _, r := range remotes {
		if r != remotes[0] {
			t.Fatalf("the server saw connections from %v", remotes)
		}
	}
}
