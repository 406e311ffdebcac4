package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// Values of Fault.Cut.
const (
	CutBefore = "before" // close the connection without an answer
	CutAfter  = "after"  // process the request, then cut the answer in its middle
)

// A Fault is what happens to coming requests instead of the usual.
//
// A fault with a status, a body, hang or cut answers in place of the server,
// which does not process the request unless Process or CutAfter says so. A
// fault without any of these leaves the server's own answer, but late, slowly
// or with other headers.
//
// The first fault set that fits a request applies to it, alone.
type Fault struct {
	// Times is how many requests the fault applies to: 1 when zero, and until
	// ClearFaults when -1.
	Times int
	// Path is the prefix of the paths it applies to. By default that is the
	// token endpoint, with or without a tenant.
	Path string
	// Grant and Client, when not empty, narrow it to token requests of that
	// grant type and that client, as Calls names them.
	Grant, Client string

	Status  int               // 200 when there is a body
	Headers map[string]string // added to the answer, or replacing its own
	Body    string            // labelled as JSON when it is that
	// Delay comes before the request is processed, or after it when Process
	// or CutAfter says that it is to be processed for real.
	Delay time.Duration
	// Process has the request processed for real before all else: tokens are
	// issued, refresh tokens are used up, only the answer is another.
	Process bool
	// Hang never answers: until the client leaves or the server closes.
	Hang bool
	// Cut is CutBefore, CutAfter or empty.
	Cut string
	// SlowDrip sends the body byte by byte, this far apart.
	SlowDrip time.Duration

	// Hook, when not nil, is called while the request is in hand: after it was
	// processed if it is to be processed first, before any delay and answer.
	Hook func()
}

const (
	maxFaults     = 1000
	maxFaultDelay = time.Hour
)

// Fault adds faults behind those already set.
func (s *Server) Fault(faults ...Fault) error {
	for i := range faults {
		if err := faults[i].check(); err != nil {
			return fmt.Errorf("setting fault %d: %w", i+1, err)
		}
	}
	return s.faults.add(faults)
}

// ClearFaults forgets all faults. Requests that already hang go on hanging.
func (s *Server) ClearFaults() { s.faults.clear() }

// check completes the fault or says what is wrong with it.
func (f *Fault) check() error {
	setDefault(&f.Times, 1)
	if f.Status == 0 && f.Body != "" {
		f.Status = http.StatusOK
	}
	switch {
	case f.Times < -1:
		return errors.New("times must be a positive number, or -1 for until cleared")
	case f.Path != "" && !strings.HasPrefix(f.Path, "/"):
		return errors.New("path must begin with a slash")
	case f.Status != 0 && (f.Status < 200 || f.Status > 599):
		return errors.New("status must be between 200 and 599")
	case f.Delay < 0 || f.Delay > maxFaultDelay || f.SlowDrip < 0 || f.SlowDrip > maxFaultDelay:
		return fmt.Errorf("delay and slow_drip must be between 0 and %v", maxFaultDelay)
	case f.Cut != "" && f.Cut != CutBefore && f.Cut != CutAfter:
		return errors.New(`cut must be "before" or "after"`)
	case f.Hang && (f.Cut != "" || f.Status != 0 || f.SlowDrip != 0):
		return errors.New("hang never answers: it goes with neither cut nor status, body or slow_drip")
	case f.Cut == CutBefore && f.Status != 0:
		return errors.New("cut before never answers: it goes with neither status nor body")
	}
	for name, value := range f.Headers {
		if name == "" || strings.ContainsAny(name, " :\r\n") || strings.ContainsAny(value, "\r\n") {
			return fmt.Errorf("header %q: the name or the value is malformed", name)
		}
	}
	return nil
}

// answers reports whether the fault answers in place of the server.
func (f *Fault) answers() bool { return f.Status != 0 || f.Hang || f.Cut != "" }

// processes reports whether the request is processed before anything else.
func (f *Fault) processes() bool { return f.Process || f.Cut == CutAfter }

func (f *Fault) fits(c *call) bool {
	if f.Path == "" && !c.token || !strings.HasPrefix(c.URL.Path, f.Path) {
		return false
	}
	return (f.Grant == "" || f.Grant == c.grant) && (f.Client == "" || f.Client == c.client)
}

// rewrite puts the fault's answer in the place of a.
func (f *Fault) rewrite(a reply) reply {
	if f.Status != 0 {
		a = reply{status: f.Status, body: []byte(f.Body)}
		if json.Valid(a.body) {
			a = a.with("Content-Type", "application/json; charset=UTF-8")
		}
	}
	for name, value := range f.Headers {
		a = a.with(name, value)
	}
	return a
}

// faults is the queue of faults that are set.
type faults struct {
	mu    sync.Mutex // guards queue
	queue []Fault    // Times counts down to zero, then the fault goes
}

func (q *faults) add(faults []Fault) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.queue)+len(faults) > maxFaults {
		return fmt.Errorf("setting faults: there may be %d at once", maxFaults)
	}
	q.queue = append(q.queue, faults...)
	return nil
}

func (q *faults) clear() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.queue = nil
}

// take returns the fault for a call, if there is one, and uses it once.
func (q *faults) take(c *call) (Fault, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	i := slices.IndexFunc(q.queue, func(f Fault) bool { return f.fits(c) })
	if i < 0 {
		return Fault{}, false
	}
	f := q.queue[i]
	if f.Times > 0 {
		q.queue[i].Times--
		if q.queue[i].Times == 0 {
			q.queue = slices.Delete(q.queue, i, i+1)
		}
	}
	return f, true
}

// answer lets h decide the answer to a call, and sends it unless a fault has
// other plans. The outcome is counted before the first byte leaves.
func (s *Server) answer(w http.ResponseWriter, c *call, h handler) {
	f, ok := s.faults.take(c)
	if !ok {
		a := h(c)
		c.settle(a.outcome)
		c.leave()
		a.write(w)
		return
	}
	a, ok := s.suffer(c, h, f)
	c.leave()
	switch {
	case !ok:
		abort()
	case f.Cut == CutAfter:
		writeHalf(w, a)
	case f.SlowDrip > 0:
		s.drip(w, c, a, f.SlowDrip)
	default:
		a.write(w)
	}
}

// suffer goes through a fault up to the answer. It returns false when there is
// to be none.
func (s *Server) suffer(c *call, h handler, f Fault) (reply, bool) {
	var a reply
	if f.processes() {
		a = h(c)
	}
	if f.Hook != nil {
		f.Hook()
	}
	if f.Hang {
		c.settle(outcomeFault)
		s.wait(c, f.Delay)
		s.hang(c)
		return reply{}, false
	}
	if !s.wait(c, f.Delay) {
		c.settle(outcomeFault)
		return reply{}, false
	}
	if f.answers() {
		a.outcome = outcomeFault
		c.settle(outcomeFault)
		return f.rewrite(a), f.Cut != CutBefore
	}
	if !f.processes() {
		a = h(c)
	}
	c.settle(a.outcome)
	return f.rewrite(a), true
}

// wait lets d pass. It returns false when the client left or the server closed
// before.
func (s *Server) wait(c *call, d time.Duration) bool {
	if d == 0 {
		return true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-c.Context().Done():
		return false
	case <-s.closed:
		return false
	}
}

// hang waits until the client left or the server closed.
func (s *Server) hang(c *call) {
	select {
	case <-c.Context().Done():
	case <-s.closed:
	}
}

// abort closes the connection under the client. It does not return.
func abort() { panic(http.ErrAbortHandler) }

// writeHalf promises the whole answer, sends half of it and aborts.
func writeHalf(w http.ResponseWriter, a reply) {
	a = a.with("Content-Length", fmt.Sprint(max(len(a.body), 1)))
	a.writeHeader(w)
	_, _ = w.Write(a.body[:len(a.body)/2])
	_ = http.NewResponseController(w).Flush()
	abort()
}

// drip sends the answer byte by byte.
func (s *Server) drip(w http.ResponseWriter, c *call, a reply, interval time.Duration) {
	control := http.NewResponseController(w)
	a = a.with("Content-Length", fmt.Sprint(len(a.body)))
	a.writeHeader(w)
	for i := range a.body {
		if control.Flush() != nil || !s.wait(c, interval) {
			abort()
		}
		if _, err := w.Write(a.body[i : i+1]); err != nil {
			abort()
		}
	}
}

// A wireFault is a Fault in JSON.
type wireFault struct {
	Times    int               `json:"times"`
	Path     string            `json:"path"`
	Grant    string            `json:"grant"`
	Client   string            `json:"client"`
	Status   int               `json:"status"`
	Headers  map[string]string `json:"headers"`
	Body     string            `json:"body"`
	Delay    wireDuration      `json:"delay"`
	Process  bool              `json:"process"`
	Hang     bool              `json:"hang"`
	Cut      string            `json:"cut"`
	SlowDrip wireDuration      `json:"slow_drip"`
}

func (f wireFault) fault() Fault {
	return Fault{
		Times: f.Times, Path: f.Path, Grant: f.Grant, Client: f.Client,
		Status: f.Status, Headers: f.Headers, Body: f.Body,
		Delay: time.Duration(f.Delay), Process: f.Process, Hang: f.Hang,
		Cut: f.Cut, SlowDrip: time.Duration(f.SlowDrip),
	}
}

// wireDuration is a time.Duration written as in Go: "1.5s", "200ms".
type wireDuration time.Duration

func (d *wireDuration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	if err != nil {
		return fmt.Errorf("%q is not a duration such as 2s or 150ms", text)
	}
	*d = wireDuration(v)
	return nil
}

func parseFaults(body []byte) ([]Fault, error) {
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.DisallowUnknownFields()
	var list []wireFault
	if err := decoder.Decode(&list); err != nil {
		return nil, fmt.Errorf("reading the faults, which must be a JSON list: %w", err)
	}
	if _, err := decoder.Token(); err != io.EOF {
		return nil, errors.New("reading the faults: something follows the JSON list")
	}
	faults := make([]Fault, len(list))
	for i, f := range list {
		faults[i] = f.fault()
	}
	return faults, nil
}

// controlFaults serves /sandbox/faults: POST adds, DELETE clears.
func (s *Server) controlFaults(w http.ResponseWriter, r *http.Request) {
	switch r.Method {
	case http.MethodPost:
		if err := s.readFaults(w, r); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	case http.MethodDelete:
		s.ClearFaults()
		w.WriteHeader(http.StatusNoContent)
	default:
		methodNotAllowed("POST, DELETE").write(w)
	}
}

func (s *Server) readFaults(w http.ResponseWriter, r *http.Request) error {
	c, err := s.read(w, r)
	if err != nil {
		return err
	}
	faults, err := parseFaults(c.body)
	if err != nil {
		return err
	}
	return s.Fault(faults...)
}

// loopbackOnly guards what can read and change the server: the peer must be on
// this machine, must call it by a loopback name (a name of its own that was
// rebound to 127.0.0.1 is what a hostile web page would use), and must not be a
// page of another origin.
func loopbackOnly(h http.HandlerFunc) http.Handler {
	origin := http.NewCrossOriginProtection()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		peer, err := netip.ParseAddrPort(r.RemoteAddr)
		if err != nil || !peer.Addr().Unmap().IsLoopback() || !isLoopbackHost(r.Host) || origin.Check(r) != nil {
			http.Error(w, "the sandbox is steered from its own machine only, by a loopback address", http.StatusForbidden)
			return
		}
		h(w, r)
	})
}

func isLoopbackHost(hostport string) bool {
	host, _, err := net.SplitHostPort(hostport)
	if err != nil {
		host = strings.TrimSuffix(strings.TrimPrefix(hostport, "["), "]")
	}
	if strings.EqualFold(host, "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback()
}
