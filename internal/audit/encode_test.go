package audit_test

import (
	"encoding/json"
	"net"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/tokenbroker/tokenbroker/internal/audit"
)

var noon = time.Date(2026, 5, 4, 14, 0, 0, 123456789, time.FixedZone("CEST", 7200))

// whole is an event with all there is.
var whole = audit.Event{
	Time: noon, Door: "grpc", Method: "/tokenbroker.v1.TokenBroker/IssueToken", Caller: "spiffe://prod/ns/batch/worker", Proof: "forwarded",
	Forwarder: "dns:envoy", Peer: &net.TCPAddr{IP: net.IPv4(10, 0, 0, 7), Port: 4711}, Profile: "invoices", Operation: "issue",
	Scopes: []string{"openid", "permissions"}, Job: "night run", Allowed: true, Rule: "policy[0]", Outcome: "ok",
	TokenID: "0123456789abcdef", Source: "memory", RequestID: "r-1", TraceID: "0af7651916cd43dd8448eb211c80319c",
}

func TestLines(t *testing.T) {
	for name, c := range map[string]struct {
		event audit.Event
		want  string
	}{
		"all there is": {
			whole,
			`{"time":"2026-05-04T12:00:00.123456Z","door":"grpc","method":"/tokenbroker.v1.TokenBroker/IssueToken","caller":"spiffe://prod/ns/batch/worker",` +
				`"proof":"forwarded","forwarder":"dns:envoy","peer":"10.0.0.7:4711","profile":"invoices","operation":"issue","scopes":["openid","permissions"],` +
				`"job":"night run","decision":"allow","rule":"policy[0]","outcome":"ok","token_id":"0123456789abcdef","source":"memory","request_id":"r-1",` +
				`"trace_id":"0af7651916cd43dd8448eb211c80319c"}`,
		},
		"a denial": {
			audit.Event{Time: noon, Door: "grpc", PeerName: "dns:web", Outcome: "CALLER_UNKNOWN", RequestID: "r"},
			`{"time":"2026-05-04T12:00:00.123456Z","door":"grpc","peer_name":"dns:web","decision":"deny","outcome":"CALLER_UNKNOWN","request_id":"r"}`,
		},
		"what would end a line": {
			audit.Event{Time: noon, Job: "a\"b\\c\nd\r\x00\x1b[2J\u2028", Scopes: []string{"\x7f", "é", "\U0001F600", "\xff"}, RequestID: "r"},
			`{"time":"2026-05-04T12:00:00.123456Z","scopes":["\u007f","\u00e9","\ud83d\ude00","\ufffd"],` +
				`"job":"a\"b\\c\u000ad\u000d\u0000\u001b[2J\u2028","decision":"deny","request_id":"r"}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got := audit.Line(&c.event, audit.LongestLine); got != c.want+"\n" {
				t.Errorf("got  %swant %s", got, c.want)
			}
		})
	}
}

// The example of docs/audit.md is a line as it is written.
func TestDocumentedLine(t *testing.T) {
	docs, err := os.ReadFile("../../docs/audit.md")
	if err != nil {
		t.Fatal(err)
	}
	if want := audit.Line(&whole, audit.LongestLine); !strings.Contains(string(docs), "\n"+want) {
		t.Errorf("docs/audit.md does not have the line %s", want)
	}
}

func TestLinesHaveIDsOfTheirOwn(t *testing.T) {
	seen := map[string]bool{}
	for range 100 {
		var line struct {
			ID string `json:"request_id"`
		}
		if err := json.Unmarshal([]byte(audit.Line(&audit.Event{}, audit.LongestLine)), &line); err != nil || line.ID == "" || seen[line.ID] {
			t.Fatalf("%+v, %v", line, err)
		}
		seen[line.ID] = true
	}
}

func TestLinesAreBounded(t *testing.T) {
	long := strings.Repeat("\n", 100_000)
	huge := audit.Event{
		Time: noon, Door: long, Method: long, Caller: long, Proof: long, Forwarder: long, Peer: &net.UnixAddr{Name: long}, PeerName: long, Profile: long, Operation: long,
		Scopes: []string{long}, Job: long, Rule: long, Outcome: long, TokenID: long, Source: long, RequestID: long, TraceID: long,
	}
	for _, most := range []int{audit.LongestLine, audit.LongestDatagram} {
		got := audit.Line(&huge, most)
		if len(got) > most || !json.Valid([]byte(got)) || !strings.HasSuffix(got, ",\"truncated\":true}\n") {
			t.Errorf("%d bytes of %d: %s", len(got), most, got)
		}
	}
	// As much as a request may ask for.
	most := audit.Event{Time: noon, Job: strings.Repeat("j", 128), Caller: strings.Repeat("c", 2048), Forwarder: strings.Repeat("f", 2048)}
	for range 100 {
		most.Scopes = append(most.Scopes, strings.Repeat("s", 256))
	}
	if got := audit.Line(&most, audit.LongestLine); strings.Contains(got, "truncated") {
		t.Error("a line of a valid request is cut in a file")
	}
	var cut struct {
		Job       string
		Scopes    []string
		Truncated bool
	}
	if err := json.Unmarshal([]byte(audit.Line(&most, audit.LongestDatagram)), &cut); err != nil || !cut.Truncated || cut.Scopes != nil || cut.Job != most.Job {
		t.Errorf("%+v, %v", cut, err)
	}
}

func FuzzLine(f *testing.F) {
	f.Add("spiffe://prod/x", "job \"1\"", "scope\n", "\xff\U0001F600")
	f.Fuzz(func(t *testing.T, caller, job, scope, outcome string) {
		line := audit.Line(&audit.Event{Time: noon, Caller: caller, Job: job, Scopes: []string{scope}, Outcome: outcome, RequestID: "r"}, audit.LongestLine)
		if len(line) > audit.LongestLine || strings.IndexByte(line, '\n') != len(line)-1 || strings.ContainsFunc(line[:len(line)-1], func(r rune) bool { return r < ' ' || r > '~' }) {
			t.Fatalf("not one line of ASCII: %q", line)
		}
		var got struct {
			Caller, Job, Outcome string
			Scopes               []string
			Truncated            bool
		}
		if err := json.Unmarshal([]byte(line), &got); err != nil {
			t.Fatalf("%v: %q", err, line)
		}
		sound := strings.ToValidUTF8(caller+job+scope+outcome, "") == caller+job+scope+outcome && utf8.ValidString(caller) && utf8.ValidString(job) && utf8.ValidString(scope) && utf8.ValidString(outcome)
		if want := []string{caller, job, outcome, scope}; sound && !got.Truncated && !reflect.DeepEqual(append([]string{got.Caller, got.Job, got.Outcome}, got.Scopes...), want) {
			t.Fatalf("got %+v, want %q", got, want)
		}
	})
}
