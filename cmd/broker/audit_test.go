package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// auditLine is what the tests read of one.
type auditLine struct {
	Time                            time.Time
	Door, Caller, Profile, Decision string
	Outcome, Event                  string
	RequestID                       string `json:"request_id"`
	TokenID                         string `json:"token_id"`
}

func auditLines(t testing.TB, text string) (lines []auditLine) {
	t.Helper()
	if text != "" && !strings.HasSuffix(text, "\n") {
		t.Fatalf("the last line is not whole: %q", text)
	}
	for _, line := range strings.Split(strings.TrimSuffix(text, "\n"), "\n") {
		if line == "" {
			continue
		}
		var l auditLine
		if err := json.Unmarshal([]byte(line), &l); err != nil || l.Time.IsZero() {
			t.Fatalf("%v: %q", err, line)
		}
		lines = append(lines, l)
	}
	return lines
}

func readIf(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(b)
}

// issuing has callers ask for tokens until told to stop, and returns the request
// ids of those that got one.
func issuing(p *process) (stop func() []string) {
	tokens := pb.NewTokenBrokerClient(p.dial())
	ctx, cancel := context.WithCancel(p.t.Context())
	var mu sync.Mutex
	var got []string
	var wg sync.WaitGroup
	var n atomic.Int64
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				id := strconv.FormatInt(n.Add(1), 10)
				// What is under way is waited for: the broker cannot know that nobody does.
				_, err := tokens.IssueToken(metadata.AppendToOutgoingContext(context.WithoutCancel(ctx), "x-request-id", id), &pb.IssueTokenRequest{Profile: "invoices"})
				if err != nil {
					continue
				}
				mu.Lock()
				got = append(got, id)
				mu.Unlock()
			}
		})
	}
	p.await("tokens are handed out", func() bool { mu.Lock(); defer mu.Unlock(); return len(got) > 100 })
	return func() []string {
		cancel()
		wg.Wait()
		return got
	}
}

// wantLines checks that each call that got a token has one line.
func wantLines(t *testing.T, text string, ids []string) {
	t.Helper()
	seen := map[string]int{}
	for _, l := range auditLines(t, text) {
		if l.Outcome == "ok" {
			seen[l.RequestID]++
		}
	}
	for _, id := range ids {
		if seen[id] != 1 {
			t.Fatalf("call %s got a token and has %d lines; there are %d tokens and %d lines", id, seen[id], len(ids), len(seen))
		}
	}
}

// Without a word about it, the audit log is standard output, and complete when
// the server has stopped.
func TestAuditOnStandardOutput(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	p := start(t, s.config())
	stop := issuing(p)
	_, _ = p.get("/profiles/none") // the console's door
	ids := stop()
	if status := p.stop(); status != 0 {
		t.Fatalf("exit status %d\n%s", status, p.log)
	}
	wantLines(t, p.out.String(), ids)
	doors := map[string]bool{}
	for _, l := range auditLines(t, p.out.String()) {
		doors[l.Door] = true
	}
	if !doors["grpc"] || !doors["console"] {
		t.Errorf("doors: %v", doors)
	}
	if strings.Contains(p.log.String(), `"decision"`) {
		t.Error("the audit log is in the process's log, too")
	}
}

// A tool moves the file away and sends SIGHUP, under load.
func TestAuditFileIsRotated(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	path := s.path("audit.jsonl")
	p := start(t, s.config("audit: {file: audit.jsonl}"))
	stop := issuing(p)
	var old string
	for i := range 5 {
		size := len(readIf(path))
		p.await("lines are written", func() bool { return len(readIf(path)) > size })
		moved := s.path(fmt.Sprint("audit.", i))
		if err := os.Rename(path, moved); err != nil {
			t.Fatal(err)
		}
		p.signal(syscall.SIGHUP)
		p.await("there is a new file", func() bool { _, err := os.Stat(path); return err == nil })
		p.await("the new file is used", func() bool { return readIf(path) != "" })
		old += readIf(moved)
	}
	ids := stop()
	p.stop()
	wantLines(t, old+readIf(path), ids)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o137 != 0 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if p.out.String() != "" {
		t.Errorf("on standard output: %s", p.out)
	}
}

// Nobody reads standard output any more. The broker goes on, or refuses, as it
// was told.
func TestAuditWithoutReader(t *testing.T) {
	t.Parallel()
	for name, refuse := range map[string]bool{"continue": false, "refuse": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStage(t)
			p := &process{t: t, log: &lockedBuffer{}, exited: make(chan struct{})}
			p.cmd = exec.Command(binary, "serve", "--config", s.config("audit: {stdout: {}, when_unwritable: "+name+"}"))
			reader, writer, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			p.cmd.Stdout, p.cmd.Stderr = writer, p.log
			p.begin()
			writer.Close()
			reader.Close()
			tokens := pb.NewTokenBrokerClient(p.dial())
			ask := func() string {
				_, err := tokens.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
				return status.Convert(err).Message()
			}
			if got := ask(); got != "" {
				t.Fatalf("before anything was found out: %s", got)
			}
			p.logged("audit log not written")
			p.await("it is in the metrics", func() bool {
				_, metrics := p.get("/metrics")
				return strings.Contains(metrics, "token_broker_audit_writable 0")
			})
			if got := ask(); (got != "") != refuse || refuse && !strings.Contains(got, "audit log cannot be written") {
				t.Errorf("while it cannot be written: %q", got)
			}
			if code, ready := p.get("/readyz"); (code != 200) != refuse || !strings.Contains(ready, "the audit log cannot be written") {
				t.Errorf("readyz: %d %s", code, ready)
			}
			if status := p.stop(); status != 1 || !strings.Contains(p.log.String(), "events were not written") {
				t.Errorf("exit status %d, and lines are lost\n%s", status, p.log)
			}
		})
	}
}

// Somebody has standard output and does not read it. The broker goes on, what is
// lost when it stops is counted, and a stop does not wait for ever.
func TestAuditThatNobodyReads(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"continue", "refuse"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			s := newStage(t)
			p := &process{t: t, log: &lockedBuffer{}, exited: make(chan struct{})}
			p.cmd = exec.Command(binary, "serve", "--config", s.config("audit: {stdout: {}, when_unwritable: "+mode+"}"))
			reader, writer, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer reader.Close()
			p.cmd.Stdout, p.cmd.Stderr = writer, p.log
			p.begin()
			writer.Close()
			tokens := pb.NewTokenBrokerClient(p.dial())
			const calls = 1000 // far more than a pipe holds
			for i := range calls {
				if _, err := tokens.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
					t.Fatalf("call %d: %v", i, err)
				}
			}
			if status := p.stop(); status != 1 {
				t.Errorf("exit status %d, and lines are lost", status)
			}
			text, err := io.ReadAll(reader)
			if err != nil {
				t.Fatal(err)
			}
			m := regexp.MustCompile(`(\d+) events were not written`).FindStringSubmatch(p.log.String())
			if m == nil {
				t.Fatalf("it is not told how many lines are lost\n%s", p.log)
			}
			// What the last attempt has brought into the pipe counts as lost.
			lost, _ := strconv.Atoi(m[1])
			if written := strings.Count(string(text), "\n"); lost > calls || written == 0 || written+lost < calls {
				t.Errorf("%d lines and %d lost ones of %d calls", written, lost, calls)
			}
		})
	}
}

// A process that is killed loses what was in its buffer, and no more.
func TestAuditOfAKilledProcess(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	p := start(t, s.config("audit: {file: audit.jsonl, when_unwritable: refuse}"))
	stop := issuing(p)
	p.await("lines are written", func() bool { return strings.Count(readIf(s.path("audit.jsonl")), "\n") > 500 })
	p.signal(syscall.SIGKILL)
	<-p.exited
	ids := stop()
	text := readIf(s.path("audit.jsonl"))
	whole := text[:strings.LastIndexByte(text, '\n')+1]
	missing := len(ids) - len(auditLines(t, whole))
	if missing > 16384 {
		t.Errorf("%d lines of %d are missing", missing, len(ids))
	}
	t.Logf("%d of %d lines were in the buffer", missing, len(ids))
	// The next process ends a line that was cut.
	if err := os.WriteFile(s.path("audit.jsonl"), []byte(whole+`{"time":"2026-`), 0o600); err != nil {
		t.Fatal(err)
	}
	p = start(t, s.path("config.yaml"))
	ids = issuing(p)()
	p.stop()
	rest, found := strings.CutPrefix(readIf(s.path("audit.jsonl")), whole+"{\"time\":\"2026-\n")
	if !found {
		t.Fatal("the line that was cut is not ended")
	}
	wantLines(t, rest, ids)
}

func TestAuditSettings(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	if err := os.Mkdir(s.path("directory"), 0o700); err != nil {
		t.Fatal(err)
	}
	for lines, want := range map[string]struct {
		status int
		text   string
	}{
		"audit: {disabled: {}, when_unwritable: refuse}": {2, "there is nothing to write with disabled"},
		"audit: {file: a, stdout: {}}":                   {2, "audit"},
		"audit: {file: ./nowhere/audit.jsonl}":           {0, "warning: "},
		"audit: {file: ./directory}":                     {0, "is no file; the server will not start with it"},
		"audit: {file: nowhere/secret-in-wrong-place}":   {0, "there is no directory for the file that is named here"},
		"audit: {syslog: {address: 'http://x'}}":         {2, "must be unix:/path, udp:host:port or tcp:host:port"},
	} {
		got := command(t, "check", "--config", s.config(lines))
		if got.status != want.status || !strings.Contains(got.stdout, want.text) || strings.Contains(got.stdout, "secret-in") {
			t.Errorf("%s: %+v", lines, got)
		}
	}
	got := command(t, "serve", "--config", s.config("audit: {file: nowhere/audit.jsonl}"))
	if got.status != 2 || !strings.Contains(got.stderr, "opening the audit log") {
		t.Errorf("without a directory: %+v", got)
	}
	p := start(t, s.config("audit: {file: audit.jsonl}"))
	s.config("audit: {file: other.jsonl}")
	p.logged("audit cannot change under a running server")
}
