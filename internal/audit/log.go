package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"
)

const (
	// capacity of the buffer, in events: 5 MiB, and half a second of the most
	// that one replica answers.
	capacity = 16384
	// mostHeld bounds what callers can make the events in it hold, in bytes.
	mostHeld = 16 << 20
	// flushTime is how long an event waits for others to be written with.
	flushTime = 100 * time.Millisecond
	// batch is how many bytes of lines are written at once, or one line more.
	batch = 64 << 10
	// What was not written is tried again after a while that doubles.
	firstRetry, lastRetry = 100 * time.Millisecond, time.Second
	// lastWait is for a writer that was told to give up.
	lastWait = 100 * time.Millisecond
	// repeatTime is how often the log tells of a failure that lasts.
	repeatTime = time.Minute
)

// Settings say where lines go and what happens while they cannot. The zero
// value is standard output, and going on without. They can be compared.
type Settings struct {
	// Disabled: lines go nowhere.
	Disabled bool
	// File that lines are appended to, an absolute path; empty is none.
	File string
	// Syslog server that gets them; the zero value is none.
	Syslog Syslog
	// Refuse has calls refused while lines cannot be written; see [Log.Ready].
	Refuse bool
}

// Options of a Log.
type Options struct {
	Settings
	// Stdout is standard output, for settings that name nothing else.
	Stdout io.Writer
	// Logger is told, seldom, that lines cannot be written, and that they can
	// again. Never nil.
	Logger *slog.Logger
}

// Log takes events. A nil Log takes them and does nothing. Its methods may be
// called from any goroutine.
type Log struct {
	refuse bool
	log    *slog.Logger
	sink   sink

	some, many chan struct{} // the buffer is not empty, is half full
	poke       chan struct{} // the sink is to be looked after
	reopen     chan struct{} // and to be opened anew
	news       chan struct{} // for the reporter; all four have room for one
	closing    chan struct{} // closed when nothing more comes
	ended      chan struct{} // closed when nothing more is written
	reported   chan struct{} // and when nothing more is told

	// stop ends attempts to write, when the time for them is over.
	stopped context.Context
	stop    context.CancelFunc

	mu sync.Mutex // held for moments only
	// ring holds n events from first on that are not written yet; reserved more
	// have a place.
	ring               []Event
	first, n, reserved int
	held               int // weight of the events
	closed             bool
	failure            error // of the last attempt to write
	recorded, lost     uint64
	untold             uint64 // lost, and no line tells of it
	since              time.Time

	// The writer's own: lines of the first taken events, of which some bytes
	// are written.
	lines   []byte
	written int
	taken   int
	telling uint64 // lost events that the lines tell of
	retry   time.Duration
}

// Open makes a log that is ready to take events; nil if the settings are not to
// have one. A file that cannot be opened is an error. A syslog server may be
// out of reach, and is tried again.
func Open(o Options) (*Log, error) { return open(o, capacity) }

func open(o Options, capacity int) (*Log, error) {
	if o.Disabled {
		return nil, nil
	}
	l := &Log{
		refuse: o.Refuse, log: o.Logger, ring: make([]Event, capacity),
		some: make(chan struct{}, 1), many: make(chan struct{}, 1), poke: make(chan struct{}, 1),
		reopen: make(chan struct{}, 1), news: make(chan struct{}, 1),
		closing: make(chan struct{}), ended: make(chan struct{}), reported: make(chan struct{}),
	}
	for i := range l.ring { // have the memory now, not page by page when calls come
		l.ring[i].Allowed = false
	}
	l.stopped, l.stop = context.WithCancel(context.Background())
	var err error
	switch {
	case o.File != "":
		l.sink, err = openFile(o.File)
	case o.Syslog != (Syslog{}):
		l.sink = newSyslog(o.Syslog, func() { signal(l.poke) })
	default:
		l.sink = stream{o.Stdout}
	}
	if err != nil {
		l.stop()
		return nil, fmt.Errorf("opening the audit log: %w", err)
	}
	go l.write()
	go l.report()
	return l, nil
}

// signal wakes whoever reads c, now or when it next looks.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Record takes an event. It waits for nothing but other events that are being
// taken, and allocates nothing.
func (l *Log) Record(e *Event) {
	if l != nil {
		l.add(e, false)
	}
}

// Place is room in the buffer that is kept for one event. The zero Place is
// none.
type Place struct{ kept bool }

// Ready returns why calls must be refused: lines cannot be written, and the
// operator would rather have no answers than answers without a trace. Nil in
// all other cases.
func (l *Log) Ready() error {
	if l == nil || !l.refuse {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.unready()
}

var (
	errUnwritable = errors.New("the audit log cannot be written")
	errFull       = errors.New("the audit log is written too slowly")
)

func (l *Log) unready() error {
	switch {
	case l.failure != nil || l.closed:
		return errUnwritable
	case l.n+l.reserved >= len(l.ring) || l.held >= mostHeld:
		return errFull
	}
	return nil
}

// Reserve keeps a place for the event of a call that is about to hand out or
// change something, or returns why it must not, as Ready does. Where calls go
// on whatever happens it keeps none. A place ends with Fill or Release.
func (l *Log) Reserve() (Place, error) {
	if l == nil || !l.refuse {
		return Place{}, nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.unready(); err != nil {
		return Place{}, err
	}
	l.reserved++
	return Place{kept: true}, nil
}

// Fill records an event in its place, where it cannot be lost to others; without
// a place it is Record. The place is none from then on.
func (l *Log) Fill(p *Place, e *Event) {
	if l == nil {
		return
	}
	kept := p.kept
	*p = Place{}
	l.add(e, kept)
}

// Release gives back a place that was not filled.
func (l *Log) Release(p *Place) {
	if l == nil || !p.kept {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reserved--
	*p = Place{}
}

// add puts an event into the buffer, in one of the places that are kept.
func (l *Log) add(e *Event, kept bool) {
	weight := e.weight()
	l.mu.Lock()
	l.recorded++
	if kept {
		l.reserved--
	}
	if l.closed || l.n+l.reserved >= len(l.ring) || !kept && l.held+weight > mostHeld {
		l.lost++
		l.untold++
		first := l.untold == 1
		if first {
			l.since = e.Time
		}
		l.mu.Unlock()
		if first {
			signal(l.news)
		}
		return
	}
	l.ring[(l.first+l.n)%len(l.ring)] = *e
	l.n++
	l.held += weight
	n := l.n
	l.mu.Unlock()
	switch n {
	case 1:
		signal(l.some)
	case len(l.ring) / 2:
		signal(l.many)
	}
}

// Reopen has a file opened anew, because the old one was moved. It returns at
// once. What is not written yet goes to the new file; if that cannot be opened,
// the old one stays in use and the Logger is told.
func (l *Log) Reopen() {
	if l != nil {
		signal(l.reopen)
	}
}

// Stats is how a log fares. Counts are since it was opened.
type Stats struct {
	// Recorded events, the lost ones among them.
	Recorded uint64
	// Lost events have no line and will have none.
	Lost uint64
	// Buffered events are not written yet; Reserved places are not filled yet.
	Buffered, Reserved int
	// Failure is why the last attempt to write failed; nil if it did not.
	Failure error
}

// Stats returns how the log fares at this moment.
func (l *Log) Stats() Stats {
	if l == nil {
		return Stats{}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return Stats{Recorded: l.recorded, Lost: l.lost, Buffered: l.n, Reserved: l.reserved, Failure: l.failure}
}

// Close writes what is in the buffer, and returns when that is done, or when ctx
// ends: then with an error that says how much is lost. Events that come later are
// lost, too.
func (l *Log) Close(ctx context.Context) error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		close(l.closing)
	}
	l.mu.Unlock()
	defer context.AfterFunc(ctx, l.stop)()
	select {
	case <-l.reported:
	case <-ctx.Done():
		select {
		case <-l.reported:
		case <-time.After(lastWait): // a reader that does not read holds the writer up for good
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if gone := uint64(l.n) + l.untold; gone > 0 {
		return fmt.Errorf("closing the audit log: %d events were not written", gone)
	}
	return nil
}

// write is the writer.
func (l *Log) write() {
	defer close(l.ended)
	defer l.sink.close()
	l.attempt() // a syslog server is told of before anything depends on it
	for l.wait() {
		l.attempt()
	}
}

// wait returns when there is something to write, or to try again; false when
// nothing remains to be done.
func (l *Log) wait() bool {
	closing := l.closing
	select {
	case <-closing:
		if l.stopped.Err() != nil || l.empty() {
			return false
		}
		closing = nil
	default:
	}
	switch {
	case l.retry > 0:
		select {
		case <-time.After(l.retry):
		case <-l.reopen:
			l.openAnew()
		case <-closing:
		case <-l.stopped.Done():
		}
		return true
	case closing == nil:
		return true
	case !l.empty(): // it came while the last lines were written
	default:
		select {
		case <-l.some:
		case <-l.poke:
			return true
		case <-l.reopen:
			l.openAnew()
			return true
		case <-closing:
			return true
		}
	}
	select {
	case <-time.After(flushTime):
	case <-l.many:
	case <-closing:
	case <-l.reopen:
		l.openAnew()
	}
	return true
}

func (l *Log) empty() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.n == 0 && l.untold == 0
}

// openAnew opens the sink anew. A line that was begun in the old one is written to
// the new one from its beginning.
func (l *Log) openAnew() {
	if err := l.sink.reopen(); err != nil {
		l.log.Error("audit log not opened anew, the old file stays in use", "error", err)
		return
	}
	l.written = bytes.LastIndexByte(l.lines[:l.written], '\n') + 1
	l.log.Info("audit log opened anew")
}

// attempt writes all there is, or notes why it cannot.
func (l *Log) attempt() {
	for first := true; ; first = false {
		if len(l.lines) == 0 && !l.take() && !first {
			return
		}
		n, err := l.sink.write(l.stopped, l.lines[l.written:])
		l.written += n
		if err != nil {
			l.failed(err)
			return
		}
		l.wrote()
	}
}

// take makes lines of the oldest events; false if there are none.
func (l *Log) take() bool {
	l.mu.Lock()
	first, n, now := l.first, l.n, time.Now()
	l.mu.Unlock()
	// Until wrote says so, nobody else touches these n.
	for l.taken = 0; l.taken < n && len(l.lines) < batch; l.taken++ {
		l.lines = appendLine(l.lines, &l.ring[(first+l.taken)%len(l.ring)], l.sink.longest())
	}
	if l.taken == n { // what was lost came after all of these, but for those that came meanwhile
		l.mu.Lock()
		l.telling = l.untold
		if l.telling > 0 {
			l.lines = appendLost(l.lines, l.telling, l.since, now)
		}
		l.mu.Unlock()
	}
	return len(l.lines) > 0
}

// wrote frees what the lines were of.
func (l *Log) wrote() {
	l.lines, l.written, l.retry = l.lines[:0], 0, 0
	if cap(l.lines) > 4*batch {
		l.lines = nil
	}
	first, weight := l.first, 0 // nobody else changes it
	for range l.taken {
		e := &l.ring[first]
		weight += e.weight()
		*e = Event{}
		first = (first + 1) % len(l.ring)
	}
	l.mu.Lock()
	l.first, l.n, l.held = first, l.n-l.taken, l.held-weight
	l.untold -= l.telling
	changed := l.failure != nil || l.telling > 0
	l.failure, l.taken, l.telling = nil, 0, 0
	l.mu.Unlock()
	if changed {
		signal(l.news)
	}
}

func (l *Log) failed(err error) {
	l.retry = min(max(2*l.retry, firstRetry), lastRetry)
	l.mu.Lock()
	l.failure = err
	l.mu.Unlock()
	signal(l.news)
}

// report tells the Logger. It has a goroutine of its own, because the writer may
// be held up.
func (l *Log) report() {
	defer close(l.reported)
	var told bool         // of a trouble that lasts
	var before uint64     // lost before it
	var again *time.Timer // when to tell of it once more
	repeat := func() <-chan time.Time {
		if again == nil {
			return nil
		}
		return again.C
	}
	for {
		over := false
		select {
		case <-l.news:
		case <-repeat():
			told = false
		case <-l.ended:
			over = true
		}
		l.mu.Lock()
		failure, lost, untold := l.failure, l.lost, l.untold
		if over { // nobody writes them any more
			l.lost += uint64(l.n)
			lost = l.lost
		}
		l.mu.Unlock()
		if failure == nil && untold > 0 {
			failure = errFull
		}
		switch {
		case over && lost > before:
			l.log.Error("audit log not written to its end", "lost", lost-before)
		case failure != nil && !told:
			if again == nil {
				again = time.NewTimer(repeatTime)
			} else {
				again.Reset(repeatTime)
			}
			told = true
			l.log.Error("audit log not written", "error", failure, "lost", lost-before, "calls_refused", l.refuse)
		case failure == nil && (again != nil || lost > before):
			if again != nil {
				again.Stop()
			}
			again, told = nil, false
			l.log.Warn("audit log written again", "lost", lost-before)
			before = lost
		}
		if over {
			return
		}
	}
}
