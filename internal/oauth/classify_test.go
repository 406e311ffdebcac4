package oauth_test

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
)

func oauthError(status int, code string) reply {
	return reply{status: status, body: `{"error":"` + code + `"}`}
}

// TestVerdicts holds the registered codes. D.6: under 200 they count as well.
func TestVerdicts(t *testing.T) {
	for code, kind := range map[string]broker.IssueErrorKind{
		"invalid_client":          broker.ClientRejected,
		"invalid_grant":           broker.ClientRejected,
		"invalid_request":         broker.RequestRejected,
		"invalid_scope":           broker.RequestRejected,
		"invalid_target":          broker.RequestRejected,
		"unauthorized_client":     broker.RequestRejected, // D.18: never a wrong secret by itself
		"unsupported_grant_type":  broker.RequestRejected,
		"unsupported_token_type":  broker.RequestRejected,
		"access_denied":           broker.RequestRejected,
		"server_error":            broker.Unavailable,
		"temporarily_unavailable": broker.Unavailable,
	} {
		for _, status := range []int{http.StatusOK, http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden} {
			grant, err := request(t, clientFor(t, serve(t, oauthError(status, code))))
			e := failure(t, grant, err)
			wantKind(t, e, kind, code)
			if e.Code != code {
				t.Errorf("code is %q, want %q", e.Code, code)
			}
		}
	}
}

func TestInvalidGrantCondemnsWhatWasPresented(t *testing.T) {
	client := clientFor(t, serve(t, oauthError(400, "invalid_grant")))
	for grantType, kind := range map[broker.GrantType]broker.IssueErrorKind{
		broker.ClientCredentials: broker.ClientRejected,
		broker.Password:          broker.UserRejected,
		broker.AuthorizationCode: broker.GrantDead,
		oauth.RefreshToken:       broker.GrantDead,
	} {
		grant, err := client.RequestToken(t.Context(), ask(grantType))
		wantKind(t, failure(t, grant, err), kind, "answered 400 invalid_grant")
	}
}

func TestClassification(t *testing.T) {
	html := map[string]string{"Content-Type": "text/html"}
	wait := map[string]string{"Retry-After": "30"}
	for name, tc := range map[string]struct {
		answer reply
		kind   broker.IssueErrorKind
		words  string
	}{
		"429":                         {reply{status: 429}, broker.Throttled, "answered 429 with an empty body"},
		"429 with a verdict":          {oauthError(429, "invalid_client"), broker.Throttled, "429 invalid_client"},
		"403 with Retry-After":        {reply{status: 403, header: wait}, broker.Throttled, "; it asks to wait 30s"},
		"503 with Retry-After":        {reply{status: 503, header: wait}, broker.Throttled, "; it asks to wait 30s"},
		"503":                         {reply{status: 503}, broker.Unavailable, "answered 503"},
		"400 with Retry-After":        {reply{status: 400, header: wait, body: `{"error":"invalid_client"}`}, broker.ClientRejected, "invalid_client"},
		"408":                         {oauthError(408, "invalid_client"), broker.Unavailable, "408"},
		"425":                         {oauthError(425, "invalid_client"), broker.Unavailable, "425"},
		"500 with a verdict":          {oauthError(500, "invalid_client"), broker.Unavailable, "500 invalid_client"},
		"502 HTML":                    {reply{status: 502, header: html, body: "<html><h1>Bad gateway"}, broker.Unavailable, "answered 502 with an HTML page, probably from a gateway"},
		"504":                         {reply{status: 504, body: "upstream"}, broker.Unavailable, "504 with a body that is neither"},
		"500, endless":                {reply{status: 500, body: strings.Repeat("x", 2<<20)}, broker.Unavailable, "more than 1 MiB"},
		"403 HTML, a firewall":        {reply{status: 403, header: html, body: "<html>"}, broker.Unavailable, "403 with an HTML page"},
		"401 HTML":                    {reply{status: 401, header: html, body: "<html>"}, broker.Unavailable, "401 with an HTML page"},
		"401 bare":                    {reply{status: 401, header: map[string]string{"WWW-Authenticate": `Bearer error="invalid_token"`}}, broker.Unavailable, "401 with an empty body"},
		"404":                         {reply{status: 404, body: "not here"}, broker.Unavailable, "check that the URL is that of a token endpoint"},
		"405":                         {reply{status: 405}, broker.Unavailable, "check that the URL"},
		"400 with a token":            {reply{status: 400, body: bearer}, broker.Unavailable, "400 without a registered OAuth error code"},
		"400 in another case":         {oauthError(400, "Invalid_Client"), broker.Unavailable, `without a registered OAuth error code: "Invalid_Client"`},
		"400 of two minds":            {reply{status: 400, body: `{"error":"invalid_client","error":"invalid_scope"}`}, broker.Unavailable, "two values for error"},
		"400 form-encoded":            {reply{status: 400, body: "error=invalid_client&error_description=no+such+client"}, broker.ClientRejected, `400 invalid_client: "no such client"`},
		"200 with an error and token": {member(`"error":"invalid_scope"`), broker.RequestRejected, "answered 200 invalid_scope"},
		"300":                         {reply{status: 300}, broker.Malformed, "answered 300 with a redirect, which is not followed"},
		"304":                         {reply{status: 304}, broker.Malformed, "answered 304"},
		"RFC 6749":                    {reply{status: 401, body: `{"error":"invalid_client","error_description":"who?","error_uri":"https://x"}`}, broker.ClientRejected, `401 invalid_client: "who?"`},
		"SecureAuth, number":          {reply{status: 401, body: `{"error":"Client is blocked","error_code":401,"error_hint":"wait a while"}`}, broker.Unavailable, `401 without a registered OAuth error code: "Client is blocked wait a while"`},
		"SecureAuth, string":          {reply{status: 401, body: `{"error":"Client is unknown","error_code":"invalid_client","status_code":401,"details":"look it up"}`}, broker.ClientRejected, `401 invalid_client: "Client is unknown look it up"`},
		"details of another type":     {reply{status: 400, body: `{"error":"invalid_scope","details":["x"],"error_description":{}}`}, broker.RequestRejected, "invalid_scope"},
		"temporarily unavailable":     {oauthError(400, "temporarily_unavailable"), broker.Unavailable, "400 temporarily_unavailable"},
		"ProblemDetails":              {reply{status: 400, body: `{"type":"about:blank","title":"Bad","status":400}`}, broker.Unavailable, "without a registered OAuth error code"},
	} {
		t.Run(name, func(t *testing.T) {
			grant, err := request(t, clientFor(t, serve(t, tc.answer)))
			e := failure(t, grant, err)
			wantKind(t, e, tc.kind, tc.words)
			if e.Code != "" && !strings.Contains(e.Text, e.Code) {
				t.Errorf("code %q is not in %q", e.Code, e.Text)
			}
		})
	}
}

// A complete answer is an outcome, unless it is a gateway's that gave up waiting,
// or a success that cannot be read: that one may hold a new token.
func TestOutcomes(t *testing.T) {
	for name, tc := range map[string]struct {
		answer reply
		want   broker.Outcome
	}{
		"400 with a verdict":           {oauthError(400, "invalid_grant"), broker.Answered},
		"401 with a verdict":           {oauthError(401, "invalid_client"), broker.Answered},
		"400 that cannot be read":      {reply{status: 400, body: "<html>"}, broker.Answered},
		"403 from a firewall":          {reply{status: 403, body: "<html>"}, broker.Answered},
		"404":                          {reply{status: 404}, broker.Answered},
		"408":                          {oauthError(408, "invalid_request"), broker.OutcomeUnknown},
		"425":                          {reply{status: 425}, broker.Answered},
		"429":                          {reply{status: 429, header: map[string]string{"Retry-After": "1"}}, broker.Answered},
		"500":                          {reply{status: 500}, broker.Answered},
		"500, endless":                 {reply{status: 500, body: strings.Repeat("x", 2<<20)}, broker.Answered},
		"502":                          {reply{status: 502, body: "<html>"}, broker.Answered},
		"503":                          {reply{status: 503}, broker.Answered},
		"504":                          {reply{status: 504, body: "<html>"}, broker.OutcomeUnknown},
		"504 with a verdict":           {oauthError(504, "invalid_grant"), broker.OutcomeUnknown},
		"a redirect":                   {reply{status: 302, header: map[string]string{"Location": "/"}}, broker.Answered},
		"200 with a verdict":           {oauthError(200, "invalid_grant"), broker.Answered},
		"200 with prose for an error":  {reply{body: `{"error":"bad_refresh_token"}`}, broker.Answered},
		"200 with nothing":             {reply{}, broker.OutcomeUnknown},
		"200 without a token":          {reply{body: `{}`}, broker.OutcomeUnknown},
		"200 with an empty error":      {reply{body: `{"error":""}`}, broker.OutcomeUnknown},
		"200 with HTML":                {reply{body: "<html>"}, broker.OutcomeUnknown},
		"200 with half a JSON object":  {reply{body: bearer[:30]}, broker.OutcomeUnknown},
		"200 with a lifetime below 0":  {member(`"expires_in":-1`), broker.OutcomeUnknown},
		"200 with two refresh tokens":  {member(`"refresh_token":"a","refresh_token":"b"`), broker.OutcomeUnknown},
		"200 of another kind of token": {member(`"token_type":"mac"`), broker.OutcomeUnknown},
		"200, endless":                 {reply{body: `{"x":"` + strings.Repeat("x", 2<<20)}, broker.OutcomeUnknown},
		"204":                          {reply{status: 204}, broker.OutcomeUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			address := serve(t, tc.answer)
			bothWays(t, func(t *testing.T, asked oauth.TokenRequest) {
				grant, err := clientFor(t, address).RequestToken(t.Context(), asked)
				wantOutcome(t, failure(t, grant, err), tc.want)
			})
		})
	}
}

func TestRedirectsAreRefused(t *testing.T) {
	followed := false
	elsewhere := serve(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { followed = true }))
	for _, status := range []int{301, 302, 303, 307, 308} {
		address := serve(t, reply{status: status, header: map[string]string{"Location": elsewhere + "/login?secret-value=1"}})
		grant, err := request(t, clientFor(t, address))
		e := failure(t, grant, err)
		wantKind(t, e, broker.Malformed, "with a redirect to "+strings.TrimSuffix(elsewhere, "/token")+", which is not followed")
	}
	if followed {
		t.Error("a redirect was followed")
	}
}

func TestRedirectTargetsAreShownWithCare(t *testing.T) {
	for location, words := range map[string]string{
		"/login":                             "with a redirect, which",
		"https://u:secret-value@h.example/p": "with a redirect to https://h.example, which",
		"//h.example/x":                      "with a redirect to h.example, which",
		"https://secret-value.example/":      "with a redirect to https://[redacted].example, which",
		"http://[::1":                        "with a redirect, which",
	} {
		grant, err := request(t, clientFor(t, serve(t, reply{status: 302, header: map[string]string{"Location": location}})))
		wantKind(t, failure(t, grant, err), broker.Malformed, words)
	}
}

func TestRetryAfter(t *testing.T) {
	at := func(d time.Duration) string { return time.Now().Add(d).UTC().Format(http.TimeFormat) }
	day := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	for name, tc := range map[string]struct {
		value, date string
		want        time.Duration
	}{
		"none":                         {"", "", 0},
		"seconds":                      {"120", "", 2 * time.Minute},
		"blanks around":                {" 5 ", "", 5 * time.Second},
		"a fraction":                   {"1.5", "", 1500 * time.Millisecond},
		"zero":                         {"0", "", 0},
		"negative":                     {"-5", "", 0},
		"too long":                     {"86400", "", time.Hour},
		"overflowing":                  {"99999999999999999999999", "", time.Hour},
		"words":                        {"soon", "", 0},
		"a date by the server's clock": {day.Add(90 * time.Second).Format(http.TimeFormat), day.Format(http.TimeFormat), 90 * time.Second}, // D.11
		"a past date":                  {day.Add(-time.Second).Format(http.TimeFormat), day.Format(http.TimeFormat), 0},
		"a far date":                   {at(48 * time.Hour), at(0), time.Hour},
		"RFC 850":                      {day.Add(time.Minute).Format("Monday, 02-Jan-06 15:04:05 GMT"), day.Format(http.TimeFormat), time.Minute},
		"asctime":                      {day.Add(time.Minute).Format(time.ANSIC), day.Format(http.TimeFormat), time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			header := map[string]string{"Retry-After": tc.value}
			if tc.date != "" {
				header["Date"] = tc.date
			}
			grant, err := request(t, clientFor(t, serve(t, reply{status: 429, header: header})))
			e := failure(t, grant, err)
			wantKind(t, e, broker.Throttled)
			if e.RetryAfter != tc.want {
				t.Errorf("RetryAfter is %s, want %s", e.RetryAfter, tc.want)
			}
		})
	}
}

// Without a Date that can be read, our own clock is what there is.
func TestRetryAfterADateByOurClock(t *testing.T) {
	until := time.Now().Add(10 * time.Minute)
	header := map[string]string{"Retry-After": until.UTC().Format(http.TimeFormat), "Date": "today"}
	grant, err := request(t, clientFor(t, serve(t, reply{status: 503, header: header})))
	e := failure(t, grant, err)
	wantKind(t, e, broker.Throttled)
	if off := e.RetryAfter - time.Until(until); off.Abs() > 3*time.Second {
		t.Errorf("RetryAfter is %s, %s off", e.RetryAfter, off)
	}
}

func TestTraceIDsAreKept(t *testing.T) {
	for id, want := range map[string]string{
		"4bf92f3577b34da6a3ce929d0e0e4736":     "4bf92f3577b34da6a3ce929d0e0e4736",
		"0b1c2d3e-0000-4000-8000-00000000cafe": "0b1c2d3e-0000-4000-8000-00000000cafe",
		"Root=1-5759e988:x":                    "Root=1-5759e988:x",
		"secret-value":                         "",
		"two words":                            "",
		"<script>":                             "",
		strings.Repeat("a", 65):                "",
	} {
		answer := oauthError(400, "invalid_client")
		answer.header = map[string]string{"X-Trace-ID": id}
		grant, err := request(t, clientFor(t, serve(t, answer)))
		if e := failure(t, grant, err); e.Trace != want {
			t.Errorf("trace is %q, want %q", e.Trace, want)
		}
	}
}
