package audit_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/audit"
)

// buffer is what several goroutines write to.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *buffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *buffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// rig is a log and what it tells.
type rig struct {
	*audit.Log
	t    *testing.T
	told *buffer
}

func newRig(t *testing.T, o audit.Options, capacity int) *rig {
	t.Helper()
	r := &rig{t: t, told: &buffer{}}
	o.Logger = slog.New(slog.NewTextHandler(r.told, nil))
	var err error
	if r.Log, err = audit.OpenSized(o, capacity); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !r.closed() {
			_ = r.close(time.Second)
		}
	})
	return r
}

func (r *rig) closed() bool { _, err := r.Reserve(); return err != nil && r.Stats().Failure == nil }

func (r *rig) close(most time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), most)
	defer cancel()
	return r.Close(ctx)
}

// record records events whose jobs are numbers.
func (r *rig) record(from, to int) {
	for i := from; i < to; i++ {
		r.Record(&audit.Event{Time: noon, Door: "grpc", Job: strconv.Itoa(i), Allowed: true})
	}
}

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !condition(); {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 20 s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

// line is what a reader of the log makes of one.
type line struct {
	Time   time.Time
	Event  string
	Count  uint64
	Job    string
	Source string
}

// read parses all lines, and fails at one that is not whole.
func read(t *testing.T, text string) (lines []line) {
	t.Helper()
	for s := bufio.NewScanner(strings.NewReader(text)); s.Scan(); {
		var l line
		if err := json.Unmarshal(s.Bytes(), &l); err != nil {
			t.Fatalf("not a line: %q", s.Text())
		}
		lines = append(lines, l)
	}
	if text != "" && !strings.HasSuffix(text, "\n") {
		t.Fatalf("the last line is not whole: %q", text[strings.LastIndexByte(text, '\n')+1:])
	}
	return lines
}

// wantJobs checks that the jobs from one number to another are there, in order
// and once.
func wantJobs(t *testing.T, lines []line, from, to int) {
	t.Helper()
	want := from
	for _, l := range lines {
		if l.Event != "" {
			continue
		}
		if l.Job != strconv.Itoa(want) {
			t.Fatalf("job %s, want %d", l.Job, want)
		}
		want++
	}
	if want != to {
		t.Fatalf("the jobs end before %d, want %d", want, to)
	}
}

func content(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func inFile(path string) audit.Options { return audit.Options{Settings: audit.Settings{File: path}} }

func TestNoLog(t *testing.T) {
	l, err := audit.Open(audit.Options{Settings: audit.Settings{Disabled: true, Refuse: true}})
	if l != nil || err != nil {
		t.Fatalf("%v, %v", l, err)
	}
	p, err := l.Reserve()
	l.Record(&audit.Event{})
	l.Fill(&p, &audit.Event{})
	l.Release(&p)
	l.Reopen()
	if err != nil || l.Ready() != nil || l.Close(t.Context()) != nil || l.Stats() != (audit.Stats{}) {
		t.Error("nothing to write to is not ready")
	}
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	if err := os.WriteFile(path, []byte("{}\n{\"cut by a crash"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := newRig(t, inFile(path), audit.Capacity)
	r.record(0, 3)
	eventually(t, "the lines are in the file", func() bool { return strings.Count(content(t, path), "\n") == 5 })
	r.record(3, audit.Capacity)
	if err := r.close(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	text, ok := strings.CutPrefix(content(t, path), "{}\n{\"cut by a crash\n")
	if !ok {
		t.Fatalf("it begins with %.80q", content(t, path))
	}
	wantJobs(t, read(t, text), 0, audit.Capacity)
	r.record(0, 2)
	if s := r.Stats(); s != (audit.Stats{Recorded: audit.Capacity + 2, Lost: 2}) || content(t, path) != "{}\n{\"cut by a crash\n"+text {
		t.Errorf("after the end: %+v", s)
	}
}

func TestLinesAreWrittenWithinATenthOfASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &switched{}
		r := newRig(t, audit.Options{Stdout: out}, 10)
		for i := range 5 {
			r.record(i, i+1)
			time.Sleep(100 * time.Millisecond)
			synctest.Wait()
			wantJobs(t, read(t, out.String()), 0, i+1)
		}
		if err := r.close(time.Minute); err != nil {
			t.Error(err)
		}
	})
}

func TestModeOfFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	newRig(t, inFile(path), 8)
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if mode := info.Mode().Perm(); mode&^0o640 != 0 || mode&0o600 != 0o600 {
		t.Errorf("mode %o", mode)
	}
}

func TestFilesThatCannotBe(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{"directory": dir, "pipe without a reader": pipe, "no directory": filepath.Join(dir, "x", "y")} {
		if _, err := audit.Open(inFile(path)); err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "opening the audit log") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Files are moved away under load, and the log is told.
func TestRotation(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit.jsonl")
	r := newRig(t, inFile(path), audit.Capacity)
	const rounds, each = 20, 2000
	var recorded atomic.Int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range rounds * each {
			for r.Stats().Buffered > audit.Capacity/2 { // nothing is to be lost here
				time.Sleep(time.Millisecond)
			}
			r.record(i, i+1)
			recorded.Add(1)
		}
	}()
	var old []string
	for i := range rounds {
		eventually(t, "more events", func() bool { return recorded.Load() >= int64(i*each) })
		moved := fmt.Sprintf("%s.%d", path, i)
		if err := os.Rename(path, moved); err != nil {
			t.Fatal(err)
		}
		old = append(old, moved)
		r.Reopen()
		eventually(t, "the new file", func() bool { _, err := os.Stat(path); return err == nil })
	}
	<-done
	if err := r.close(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	var all []line
	for _, name := range append(old, path) {
		all = append(all, read(t, content(t, name))...)
	}
	wantJobs(t, all, 0, rounds*each)
}

func TestReopenThatFails(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "audit.jsonl")
	r := newRig(t, inFile(path), 8)
	r.record(0, 1)
	eventually(t, "a line", func() bool { return content(t, path) != "" })
	if err := os.Rename(dir, dir+".old"); err != nil {
		t.Fatal(err)
	}
	r.Reopen()
	eventually(t, "the log says so", func() bool { return strings.Contains(r.told.String(), "the old file stays in use") })
	r.record(1, 3)
	if err := r.close(10 * time.Second); err != nil {
		t.Fatal(err)
	}
	wantJobs(t, read(t, content(t, filepath.Join(dir+".old", "audit.jsonl"))), 0, 3)
	if !strings.Contains(r.told.String(), "no such file or directory") {
		t.Error(r.told)
	}
}

// A disk is full, and later is not. A symbolic link stands for the disk.
func TestDiskFull(t *testing.T) {
	for name, refuse := range map[string]bool{"continue": false, "refuse": true} {
		t.Run(name, func(t *testing.T) {
			const size = 100
			path, disk := filepath.Join(t.TempDir(), "audit.jsonl"), filepath.Join(t.TempDir(), "disk")
			if err := os.Symlink("/dev/full", path); err != nil {
				t.Fatal(err)
			}
			o := inFile(path)
			o.Refuse = refuse
			r := newRig(t, o, size)
			if err := r.Ready(); err != nil {
				t.Fatalf("before anything failed: %v", err)
			}
			r.record(0, 1)
			eventually(t, "a failure", func() bool { return r.Stats().Failure != nil })
			if !errors.Is(r.Stats().Failure, syscall.ENOSPC) {
				t.Error(r.Stats().Failure)
			}
			_, err := r.Reserve()
			if (r.Ready() != nil) != refuse || (err != nil) != refuse {
				t.Errorf("ready: %v, a place: %v", r.Ready(), err)
			}
			r.record(1, size+11)
			if s := r.Stats(); s.Recorded != size+11 || s.Lost != 11 || s.Buffered != size {
				t.Errorf("%+v", s)
			}
			eventually(t, "the log says so", func() bool { return strings.Contains(r.told.String(), "no space left on device") })
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(disk, path); err != nil {
				t.Fatal(err)
			}
			r.Reopen()
			eventually(t, "it is written again", func() bool { return r.Stats().Buffered == 0 && r.Stats().Failure == nil })
			if err := r.Ready(); err != nil {
				t.Error(err)
			}
			eventually(t, "the log says so", func() bool { return strings.Contains(r.told.String(), `"audit log written again" lost=11`) })
			r.record(size, size+5)
			if err := r.close(10 * time.Second); err != nil {
				t.Fatal(err)
			}
			lines := read(t, content(t, disk))
			wantJobs(t, lines, 0, size+5)
			if l := lines[size]; l.Event != "lost" || l.Count != 11 {
				t.Errorf("instead of those that are lost: %+v", l)
			}
		})
	}
}

// narrow takes so many bytes at a time, and then says that there is no room.
type narrow struct {
	buffer
	most int
}

func (n *narrow) Write(p []byte) (int, error) {
	if len(p) <= n.most {
		return n.buffer.Write(p)
	}
	_, _ = n.buffer.Write(p[:n.most])
	return n.most, syscall.ENOSPC
}

// What was written in part is not written twice.
func TestPartsOfLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, most := range []int{1, 7, 100, 1000} {
			out := &narrow{most: most}
			r := newRig(t, audit.Options{Stdout: out}, 100)
			r.record(0, 20)
			time.Sleep(time.Hour) // of virtual time
			if err := r.close(time.Minute); err != nil {
				t.Fatal(err)
			}
			wantJobs(t, read(t, out.String()), 0, 20)
		}
	})
}

func TestClosedPipe(t *testing.T) {
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	reader.Close()
	r := newRig(t, audit.Options{Stdout: writer}, 10)
	r.record(0, 15)
	eventually(t, "a failure", func() bool { return errors.Is(r.Stats().Failure, syscall.EPIPE) })
	if err := r.close(300 * time.Millisecond); err == nil || !strings.Contains(err.Error(), "15 events were not written") {
		t.Error(err)
	}
	if s := r.Stats(); s.Lost != 15 || !strings.Contains(r.told.String(), "audit log not written to its end") {
		t.Errorf("%+v\n%s", s, r.told)
	}
}

// Nobody reads, so that the writer hangs. Nobody else does.
func TestReaderThatDoesNotRead(t *testing.T) {
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	const size = 5000 // more than a pipe has room for
	r := newRig(t, audit.Options{Stdout: writer}, size)
	r.record(0, size)
	r.record(size, 3*size)
	s := r.Stats()
	if s.Lost == 0 || s.Recorded != 3*size || s.Failure != nil {
		t.Fatalf("%+v", s)
	}
	eventually(t, "the log says so", func() bool { return strings.Contains(r.told.String(), "written too slowly") })
	if err := r.close(50 * time.Millisecond); err == nil {
		t.Error("it claims to have written everything")
	}
	go func() {
		defer writer.Close()
		eventually(t, "the rest is written", func() bool { return r.Stats().Buffered == 0 })
	}()
	text, err := io.ReadAll(reader)
	if err != nil {
		t.Fatal(err)
	}
	lines := read(t, string(text))
	wantJobs(t, lines, 0, 3*size-int(s.Lost))
	if last := lines[len(lines)-1]; last.Event != "lost" || last.Count != s.Lost {
		t.Errorf("at the end: %+v, want %d lost", last, s.Lost)
	}
}

// switched is output that works or does not, as told.
type switched struct {
	buffer
	broken atomic.Bool
}

func (s *switched) Write(p []byte) (int, error) {
	if s.broken.Load() {
		return 0, syscall.EIO
	}
	return s.buffer.Write(p)
}

// Nothing is handed out that has no place, and nothing that has one is lost.
func TestRefuse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 50
		out := &switched{}
		out.broken.Store(true)
		r := newRig(t, audit.Options{Settings: audit.Settings{Refuse: true}, Stdout: out}, size)
		// Calls that began while nothing was known to be wrong.
		var places []audit.Place
		for range size {
			p, err := r.Reserve()
			if err != nil {
				t.Fatal(err)
			}
			places = append(places, p)
		}
		if _, err := r.Reserve(); err == nil || r.Ready() == nil {
			t.Error("there are more places than events fit in")
		}
		r.record(1000, 1010) // denials, which wait for no place: they are lost
		for i := range places[:size-1] {
			r.Fill(&places[i], &audit.Event{Time: noon, Job: strconv.Itoa(i)})
		}
		r.Release(&places[size-1])
		r.Release(&places[size-1]) // twice is once
		time.Sleep(time.Second)    // of virtual time
		if _, err := r.Reserve(); err == nil {
			t.Error("a place, while nothing can be written")
		}
		if s := r.Stats(); s.Buffered != size-1 || s.Lost != 10 {
			t.Errorf("%+v", s)
		}
		out.broken.Store(false)
		time.Sleep(5 * time.Second)
		if err := r.Ready(); err != nil {
			t.Error(err)
		}
		for range 2 * size { // none has gone lost
			p, err := r.Reserve()
			if err != nil {
				t.Fatal(err)
			}
			r.Release(&p)
		}
		if err := r.close(time.Minute); err != nil {
			t.Fatal(err)
		}
		wantJobs(t, read(t, out.String()), 0, size-1)
	})
}

// Callers cannot fill the memory with what they make up.
func TestHeldMemoryIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &switched{}
		out.broken.Store(true)
		r := newRig(t, audit.Options{Settings: audit.Settings{Refuse: true}, Stdout: out}, audit.Capacity)
		scopes := make([]string, 100)
		for i := range scopes {
			scopes[i] = strings.Repeat("s", 256)
		}
		for range audit.Capacity {
			r.Record(&audit.Event{Scopes: scopes})
		}
		if held := r.Stats().Buffered * 25600; held > 16<<20 || held < 15<<20 {
			t.Errorf("%d bytes are held", held)
		}
		r.Record(&audit.Event{}) // there is room for those that weigh nothing
		out.broken.Store(false)
		time.Sleep(time.Minute)
		if s := r.Stats(); s.Buffered != 0 || s.Lost == 0 || r.Ready() != nil {
			t.Errorf("%+v, %v", s, r.Ready())
		}
	})
}

// The process's log is told at once, then once a minute, then that it is over.
func TestTroubleIsToldSeldom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out := &switched{}
		r := newRig(t, audit.Options{Stdout: out}, 10)
		count := func(text string) int {
			synctest.Wait()
			return strings.Count(r.told.String(), text)
		}
		r.record(0, 1)
		time.Sleep(time.Hour)
		if r.told.String() != "" {
			t.Errorf("of nothing: %s", r.told)
		}
		out.broken.Store(true)
		for range 10 * 60 {
			r.record(0, 1)
			time.Sleep(time.Second)
		}
		if n := count("audit log not written"); n < 10 || n > 11 {
			t.Errorf("told %d times in 10 minutes:\n%s", n, r.told)
		}
		out.broken.Store(false)
		time.Sleep(time.Minute)
		if count(`"audit log written again" lost=590`) != 1 {
			t.Errorf("not told that it is over:\n%s", r.told)
		}
		out.broken.Store(true)
		r.record(0, 1)
		time.Sleep(time.Minute / 2)
		out.broken.Store(false)
		time.Sleep(time.Hour)
		if count(`"audit log written again" lost=0`) != 1 {
			t.Errorf("the second time:\n%s", r.told)
		}
		if err := r.close(time.Minute); err != nil {
			t.Error(err)
		}
	})
}

// Recorders, a writer that comes and goes, and the end, all at once: what is not
// in the log is counted.
func TestNothingIsLostUncounted(t *testing.T) {
	out := &switched{}
	r := newRig(t, audit.Options{Settings: audit.Settings{Refuse: true}, Stdout: out}, 300)
	var wg sync.WaitGroup
	var filled atomic.Int64
	stop := make(chan struct{})
	for range 4 {
		wg.Go(func() {
			for range 5000 {
				r.Record(&audit.Event{Time: noon, Source: "denied"})
				if p, err := r.Reserve(); err == nil {
					r.Fill(&p, &audit.Event{Time: noon, Source: "handed out"})
					filled.Add(1)
				}
			}
		})
	}
	flapped := make(chan struct{})
	go func() {
		defer close(flapped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				out.broken.Store(i%3 == 0)
			}
		}
	}()
	wg.Wait()
	close(stop)
	<-flapped
	out.broken.Store(false)
	if err := r.close(20 * time.Second); err != nil {
		t.Fatal(err)
	}
	var lines, handedOut, lost uint64
	for _, l := range read(t, out.String()) {
		switch {
		case l.Event == "lost":
			lost += l.Count
		case l.Source == "handed out":
			handedOut++
			lines++
		default:
			lines++
		}
	}
	if s := r.Stats(); s.Lost != lost || s.Recorded != lines+lost || handedOut != uint64(filled.Load()) {
		t.Errorf("%d lines and %d told as lost, %d of %d handed out; counted %+v", lines, lost, handedOut, filled.Load(), s)
	}
}

func TestRecordAllocatesNothing(t *testing.T) {
	r := newRig(t, audit.Options{Settings: audit.Settings{Refuse: true}, Stdout: io.Discard}, audit.Capacity)
	scopes := []string{"a"}
	if n := testing.AllocsPerRun(1000, func() {
		p, _ := r.Reserve()
		r.Fill(&p, &audit.Event{Time: noon, Scopes: scopes, RequestID: "r"})
	}); n > 0.5 { // the writer's are counted, too
		t.Errorf("%v allocations", n)
	}
}

// BenchmarkRecord is what a call pays. The writer keeps up: it is waited for off
// the clock.
func BenchmarkRecord(b *testing.B) {
	for name, refuse := range map[string]bool{"continue": false, "refuse": true} {
		null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
		if err != nil {
			b.Fatal(err)
		}
		defer null.Close()
		l, err := audit.Open(audit.Options{Settings: audit.Settings{Refuse: refuse}, Stdout: null, Logger: slog.New(slog.DiscardHandler)})
		if err != nil {
			b.Fatal(err)
		}
		record := func(n int) {
			for range n {
				p, err := l.Reserve()
				if err != nil {
					b.Error(err)
				}
				l.Fill(&p, &audit.Event{
					Time: noon, Door: "grpc", Method: "/tokenbroker.v1.TokenBroker/IssueToken", Caller: "spiffe://prod/ns/batch/worker", Proof: "uri_san",
					Profile: "invoices", Operation: "issue", Allowed: true, Rule: "policy[0]", Outcome: "ok", TokenID: "0123456789abcdef", Source: "memory", RequestID: "r",
				})
			}
		}
		for parallel := range 3 {
			b.Run(fmt.Sprintf("%s/goroutines=%d", name, 1<<parallel), func(b *testing.B) {
				b.ReportAllocs()
				for left := b.N; left > 0; left -= audit.Capacity {
					each := min(left, audit.Capacity) >> parallel
					var wg sync.WaitGroup
					for range 1 << parallel {
						wg.Go(func() { record(each) })
					}
					wg.Wait()
					b.StopTimer()
					for l.Stats().Buffered > 0 {
						time.Sleep(time.Millisecond)
					}
					b.StartTimer()
				}
			})
		}
		if err := l.Close(b.Context()); err != nil || l.Stats().Lost > 0 {
			b.Errorf("%v, %+v", err, l.Stats())
		}
	}
}

// BenchmarkLine is what the writer does for each event.
func BenchmarkLine(b *testing.B) {
	e := &audit.Event{
		Time: noon, Door: "grpc", Method: "/tokenbroker.v1.TokenBroker/IssueToken", Caller: "spiffe://prod/ns/batch/worker", Proof: "uri_san",
		Profile: "invoices", Operation: "issue", Allowed: true, Rule: "policy[0]", Outcome: "ok", TokenID: "0123456789abcdef", Source: "memory",
	}
	b.ReportAllocs()
	var line []byte
	for b.Loop() {
		line = audit.AppendLine(line[:0], e, audit.LongestLine)
	}
}
