package config

import (
	"context"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// settleTime is how long files must be quiet before they are looked at:
	// who writes one file often writes the next at once.
	settleTime = 100 * time.Millisecond
	// maxSettleTime ends the waiting for files that are never quiet.
	maxSettleTime = time.Second
	// pollTime is how often files are looked at without an event: network
	// file systems have none, and directories that are replaced lose theirs.
	pollTime = 5 * time.Second
)

// Watch calls onChange when a file that the last load has read, or has tried to
// read, has another content than it had then, whether that load succeeded or
// not. It is made for an onChange that makes somebody call Load: until then the
// same change may be told again.
//
// It blocks until ctx ends. Give it a goroutine of its own: onChange runs there
// too, so that its calls never overlap. What changes meanwhile is not lost.
//
// Watched are the directories, because files are replaced more often than
// written: editors rename, Kubernetes swaps a symbolic link further up. Where
// the system has no notifications to give, polling does alone.
func (l *Loader) Watch(ctx context.Context, onChange func()) {
	w := newWatch(l.poll, l.loaded)
	defer w.close()
	for polled := false; ctx.Err() == nil; polled = w.wait(ctx) {
		seen := l.lastSeen()
		w.follow(seen)
		if (w.stirred(seen) || !polled) && seen.changed() {
			onChange()
		}
	}
}

func (l *Loader) lastSeen() files {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.seen // never written to after its load
}

// changed reports whether any of the files has another content now.
func (f files) changed() bool {
	for path, was := range f {
		if digestOf(path) != was {
			return true
		}
	}
	return false
}

// watch waits for the moments when it is worth looking at files.
type watch struct {
	notify *fsnotify.Watcher // nil when the system has none left
	events chan fsnotify.Event
	errors chan error
	loaded <-chan struct{}
	poll   *time.Ticker
	stamps map[string]fs.FileInfo // of the files when they were last looked at; nil for none
}

func newWatch(poll time.Duration, loaded <-chan struct{}) *watch {
	w := &watch{loaded: loaded, poll: time.NewTicker(poll), stamps: map[string]fs.FileInfo{}}
	if notify, err := fsnotify.NewWatcher(); err == nil {
		w.notify, w.events, w.errors = notify, notify.Events, notify.Errors
	}
	return w
}

func (w *watch) close() {
	w.poll.Stop()
	if w.notify != nil {
		_ = w.notify.Close()
	}
}

// follow asks for notifications about all directories in which a change can
// give one of the files another content, and about no others. A directory that
// is missing is asked for again at the next poll.
func (w *watch) follow(f files) {
	if w.notify == nil {
		return
	}
	wanted := map[string]bool{}
	for path := range f {
		directories(path, wanted, 0)
	}
	for _, directory := range w.notify.WatchList() {
		if !wanted[directory] {
			_ = w.notify.Remove(directory)
		}
		delete(wanted, directory)
	}
	for directory := range wanted {
		_ = w.notify.Add(directory)
	}
}

// directories adds those in which path, and every symbolic link on the way to
// it, has its entry: under their real names, because a notification sticks to
// the directory and not to the name that it was asked for by.
func directories(path string, found map[string]bool, links int) {
	if real, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
		found[real] = true
	}
	for p := path; links < 40 && p != filepath.Dir(p); p = filepath.Dir(p) {
		target, err := os.Readlink(p)
		if err != nil {
			continue
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(p), target)
		}
		if real, err := filepath.EvalSymlinks(filepath.Dir(p)); err == nil {
			found[real] = true
		}
		directories(filepath.Join(target, path[len(p):]), found, links+1)
		return
	}
}

// stirred reports whether any of the files looks different than when it was
// last asked, without reading them.
func (w *watch) stirred(f files) bool {
	stamps := make(map[string]fs.FileInfo, len(f))
	for path := range f {
		stamps[path], _ = os.Stat(path)
	}
	same := maps.EqualFunc(stamps, w.stamps, func(a, b fs.FileInfo) bool {
		if a == nil || b == nil {
			return a == nil && b == nil
		}
		return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
	})
	w.stamps = stamps
	return !same
}

// wait returns when the files should be looked at, or ctx has ended. polled
// means that nothing in particular is the reason.
func (w *watch) wait(ctx context.Context) (polled bool) {
	select {
	case <-ctx.Done():
		return false
	case <-w.poll.C:
		return true
	case <-w.events:
	case <-w.errors: // Notifications were lost.
	case <-w.loaded: // The files may be others now.
	}
	w.settle(ctx)
	return false
}

// settle waits until the directories are quiet.
func (w *watch) settle(ctx context.Context) {
	quiet := time.NewTimer(settleTime)
	defer quiet.Stop()
	longest := time.NewTimer(maxSettleTime)
	defer longest.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-quiet.C:
			return
		case <-longest.C:
			return
		case <-w.events:
			quiet.Reset(settleTime)
		case <-w.errors:
		case <-w.loaded:
		}
	}
}
