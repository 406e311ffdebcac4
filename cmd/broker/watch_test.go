package main

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// watching is a running "broker watch".
type watching struct {
	*process
}

// watch runs it, against a broker at an address.
func (s *stage) watching(address string, args ...string) watching {
	s.t.Helper()
	p := &process{t: s.t, log: &lockedBuffer{}, out: &lockedBuffer{}, exited: make(chan struct{})}
	p.cmd = exec.Command(binary, append([]string{"watch", "--address", address}, args...)...)
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.log
	if err := p.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	go func() {
		defer close(p.exited)
		_ = p.cmd.Wait() // the exit status is in ProcessState
	}()
	s.t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // it may have ended already
		<-p.exited
	})
	return watching{p}
}

// ended waits for the exit status.
func (w watching) ended() int {
	w.t.Helper()
	select {
	case <-w.exited:
	case <-time.After(30 * time.Second):
		w.t.Fatalf("it does not end\n%s", w.log)
	}
	return w.cmd.ProcessState.ExitCode()
}

// at is a config whose broker can be stopped and started again at one address.
func (s *stage) at(address string, more ...string) string {
	s.t.Helper()
	return s.write("config.yaml", strings.Replace(read(s.t, s.config(more...)), `server: {address: "127.0.0.1:0"}`, `server: {address: "`+address+`"}`, 1))
}

// TestWatchPrints each token until it is interrupted.
func TestWatchPrints(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	p := start(t, s.config())
	w := s.watching(p.address, "invoices", "--output", "json")
	tokens := func() (ids []string) {
		for d := json.NewDecoder(strings.NewReader(w.out.String())); ; {
			var token struct{ ID, Source string }
			if d.Decode(&token) != nil {
				return ids
			}
			if token.Source == "" {
				t.Errorf("token %s comes from nowhere", token.ID)
			}
			ids = append(ids, token.ID)
		}
	}
	for n := 1; n < 4; n++ {
		w.await("it prints a token", func() bool { return len(tokens()) == n })
		if current := p.token("--output", "json"); !strings.Contains(current, tokens()[n-1]) {
			t.Errorf("it printed %s, current is %s", tokens()[n-1], current)
		}
		p.run("revoke", "invoices")
	}
	w.signal(syscall.SIGINT)
	if status := w.ended(); status != 0 || w.log.String() != "" {
		t.Errorf("exit status %d, %s", status, w.log)
	}
}

// TestWatchKeepsAFile while the broker goes and comes. Nobody who reads the file
// finds anything but a whole token.
func TestWatchKeepsAFile(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	address := freeAddress(t)
	config := s.at(address)
	file, abandoned := s.path("token"), s.path(".token-token-123")
	if err := errors.Join(os.WriteFile(file, []byte("token of yesterday\n"), 0o644), os.WriteFile(abandoned, nil, 0o600), os.Chtimes(abandoned, time.Time{}, time.Now().Add(-time.Hour))); err != nil {
		t.Fatal(err)
	}
	w := s.watching(address, "invoices", "--file", file)
	w.logged("reaching the broker at " + address) // which is not there yet
	if content := read(t, file); content != "token of yesterday\n" {
		t.Errorf("the file has %q before there is a token", content)
	}
	p := start(t, config)
	w.logged(file + " has token ")
	done := make(chan struct{})
	var readers sync.WaitGroup
	seen := map[string]bool{}
	readers.Go(func() {
		pace := time.NewTicker(100 * time.Microsecond)
		defer pace.Stop()
		for {
			select {
			case <-done:
				return
			case <-pace.C:
			}
			content, err := os.ReadFile(file)
			if text := string(content); err != nil || len(text) < 100 || strings.Count(text, "\n") != 1 || !strings.HasSuffix(text, "\n") {
				t.Errorf("a reader found %q, %v", text, err)
				return
			}
			seen[string(content)] = true
			entries, err := os.ReadDir(s.dir)
			if err != nil {
				t.Error(err)
			}
			for _, e := range entries {
				if info, err := e.Info(); err == nil && strings.Contains(e.Name(), "token") && info.Mode().Perm() != 0o600 {
					t.Errorf("%s has the mode %v", e.Name(), info.Mode())
				}
			}
		}
	})
	last := ""
	current := func() string {
		t.Helper()
		w.await("the file has the current token", func() bool {
			content := read(t, file)
			is := content != last && strings.TrimSpace(content) == p.token()
			if is {
				last = content
			}
			return is
		})
		return last
	}
	current()
	for range 3 {
		p.run("revoke", "invoices")
		current()
	}
	if code := p.stop(); code != 0 {
		t.Errorf("exit status %d", code)
	}
	if read(t, file) != last {
		t.Error("the file has changed with the broker's end")
	}
	p = start(t, config) // without a store it has another token
	current()
	close(done)
	readers.Wait()
	if len(seen) < 2 {
		t.Errorf("the reader has seen %d tokens", len(seen))
	}
	if entries, err := filepath.Glob(s.path(".token-*")); err != nil || len(entries) > 0 {
		t.Errorf("%v are left, %v", entries, err)
	}
	w.signal(syscall.SIGTERM)
	if status := w.ended(); status != 0 || read(t, file) != last {
		t.Errorf("exit status %d\n%s", status, w.log)
	}
	if n := strings.Count(w.log.String(), "has token"); n != 1 {
		t.Errorf("%d lines about the first token\n%s", n, w.log)
	}
	if strings.Contains(w.log.String(), strings.TrimSpace(last)) || w.out.String() != "" {
		t.Errorf("it printed %s\n%s", w.out, w.log)
	}
}

func TestWatchRemovesItsFile(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	p := start(t, s.config())
	file, another := s.path("token"), s.path("another")
	w := s.watching(p.address, "invoices", "--file", file, "--remove", "--output", "header")
	v := s.watching(p.address, "invoices", "--file", another, "--remove", "--output", "json")
	w.logged("has token")
	v.logged("has token")
	if content := read(t, file); content != "Authorization: Bearer "+p.token()+"\n" {
		t.Errorf("the file has %q", content)
	}
	if content := read(t, another); !strings.Contains(content, `"expire_time": "`) {
		t.Errorf("the file has %q", content)
	}
	s.write("another", "of somebody else")
	w.signal(syscall.SIGTERM)
	v.signal(syscall.SIGTERM)
	if w.ended() != 0 || v.ended() != 0 {
		t.Errorf("exit status\n%s\n%s", w.log, v.log)
	}
	if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file is there: %v", err)
	}
	if read(t, another) != "of somebody else" {
		t.Error("it removed what it had not written")
	}
}

// Who is refused for good hears it, and nothing is written; who was served goes on.
func TestWatchRefused(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	p := start(t, s.config())
	file := s.path("token")
	w := s.watching(p.address, "payroll", "--file", file)
	if status := w.ended(); status != 1 || !strings.Contains(w.log.String(), "reason: CALLER_DENIED") {
		t.Errorf("exit status %d\n%s", status, w.log)
	}
	if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("there is a file: %v", err)
	}
	w = s.watching(p.address, "invoices", "--file", file)
	w.logged("has token")
	token := func() outcome { return command(t, "token", "invoices", "--address", p.address) }
	s.write("config.yaml", strings.Replace(read(t, s.path("config.yaml")), "- name: invoices", "- name: renamed", 1))
	w.await("the right is gone", func() bool { return token().status == 1 })
	s.config()
	w.await("the right is back", func() bool { return token().status == 0 })
	p.run("revoke", "invoices")
	w.await("it goes on", func() bool { return read(t, file) == token().stdout })
}

// jobs is a broker that sends one token, and ends the job when it is told to.
type jobs struct {
	pb.UnimplementedTokenBrokerServer
	end chan struct{}
}

func (j *jobs) WatchToken(r *pb.WatchTokenRequest, stream grpc.ServerStreamingServer[pb.WatchTokenResponse]) error {
	if !r.GetJob().GetDedicated() || r.GetJob().GetId() != "nightly" || strings.Join(r.GetScopes(), " ") != "a b" || r.GetMinLifetime().AsDuration() != time.Minute {
		return status.Error(codes.InvalidArgument, "this is not what was asked for")
	}
	if err := stream.Send(&pb.WatchTokenResponse{Token: &pb.Token{AccessToken: "one", TokenType: "Bearer", Id: "0123456789abcdef", ExpireTime: timestamppb.New(time.Now().Add(time.Hour))}}); err != nil {
		return err
	}
	<-j.end
	s, err := status.New(codes.FailedPrecondition, "the job was ended").WithDetails(&errdetails.ErrorInfo{Domain: "tokenbroker.v1", Reason: "JOB_ENDED"})
	if err != nil {
		return err
	}
	return s.Err()
}

// Who keeps the token of a job ends with the job.
func TestWatchEndsWithItsJob(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	j, server := &jobs{end: make(chan struct{})}, grpc.NewServer()
	pb.RegisterTokenBrokerServer(server, j)
	go func() { _ = server.Serve(ln) }() // Stop ends it
	defer server.Stop()
	s := newStage(t)
	file := s.path("token")
	w := s.watching(ln.Addr().String(), "invoices", "--job", "nightly", "--dedicated", "--scope", "b,a", "--min-lifetime", "1m", "--file", file, "--remove")
	w.logged("has token 0123456789abcdef")
	if content := read(t, file); content != "one\n" {
		t.Errorf("the file has %q", content)
	}
	close(j.end)
	if status := w.ended(); status != 0 || !strings.Contains(w.log.String(), "reason: JOB_ENDED") {
		t.Errorf("exit status %d\n%s", status, w.log)
	}
	if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the file is there: %v", err)
	}
}

// TestTokenFile is the init step: it writes once and ends. What cannot be written in
// safety is left alone, before anything is asked.
func TestTokenFile(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	p := start(t, s.config())
	dir := s.path("out")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Mkdir(filepath.Join(dir, "directory"), 0o700), os.Symlink(s.path("secret"), filepath.Join(dir, "link")),
		os.Symlink("nowhere", filepath.Join(dir, "dangling")), syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600)); err != nil {
		t.Fatal(err)
	}
	before := s.vantage.Calls().Total
	secret := read(t, s.path("secret"))
	for name, text := range map[string]string{
		"link": "is a link", "dangling": "is a link", "directory": "is no regular file", "pipe": "is no regular file", "new/": "is a directory", "no/such": "no such file or directory",
	} {
		for _, verb := range []string{"token", "watch"} {
			if got := command(t, verb, "invoices", "--address", p.address, "--file", dir+"/"+name); got.status != 2 || !strings.Contains(got.stderr, text) || got.stdout != "" {
				t.Errorf("%s --file %s: %+v, want %q", verb, name, got, text)
			}
		}
	}
	if s.vantage.Calls().Total != before || read(t, s.path("secret")) != secret {
		t.Error("a token was asked for, or the link followed")
	}
	file := filepath.Join(dir, "token")
	if got := command(t, "token", "invoices", "--address", p.address, "--job", "nightly", "--file", file); got.status != 0 || got.stdout != "" || got.stderr != "" {
		t.Fatalf("%+v", got)
	}
	if info, err := os.Lstat(file); err != nil || info.Mode() != 0o600 || read(t, file) != p.token()+"\n" {
		t.Errorf("%v, %v", info, err)
	}
	p.await("the job is in the audit log", func() bool { return strings.Contains(p.out.String(), `"job":"nightly"`) })
	if got := command(t, "token", "payroll", "--address", p.address, "--file", file); got.status != 1 || read(t, file) != p.token()+"\n" {
		t.Errorf("refused: %+v", got)
	}
	t.Run("in the current directory", func(t *testing.T) {
		c := exec.Command(binary, "token", "invoices", "--address", p.address, "--file", "here")
		c.Dir = dir
		if out, err := c.CombinedOutput(); err != nil || read(t, filepath.Join(dir, "here")) != p.token()+"\n" {
			t.Errorf("%v\n%s", err, out)
		}
	})
	if os.Geteuid() == 0 {
		if err := os.Chown(file, 1, 1); err != nil {
			t.Fatal(err)
		}
		if got := command(t, "token", "invoices", "--address", p.address, "--file", file); got.status != 2 || !strings.Contains(got.stderr, "belongs to another user") {
			t.Errorf("a file of another user: %+v", got)
		}
	}
	if entries, err := filepath.Glob(dir + "/.token-*"); err != nil || len(entries) > 0 {
		t.Errorf("%v are left, %v", entries, err)
	}
}
