package storetest

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Walk lets flights of two replicas, an operator and a person at a family at
// random: transitions go wrong in all ways, are repeated or given up, and some
// happen once more when nobody expects them; processes pause and vanish; a
// server rotates its refresh tokens or does not. After each answer it checks
// that
//
//   - nobody is granted a lease that somebody else must still have,
//   - fences rise, and the generations of a slot never fall,
//   - nothing that was dropped is shown to anybody, and nothing at all of a job
//     that has ended,
//   - one refresh token is presented by one flight at a time, and no more often
//     than presentations may be in doubt,
//   - a refresh token that was replaced is never the record's again.
//
// The seed decides what happens; a walk that fails prints it.
func Walk(t *testing.T, s Subject, seed uint64, steps int) {
	rng := rand.New(rand.NewPCG(seed, 0))
	w := &walk{
		history: begin(t, s, new(string)),
		rng:     rng,
		began:   time.Now(),
		server:  &server{good: make(map[string]bool), rotates: rng.IntN(3) > 0},
		facts: facts{
			ended:   make(map[string]bool),
			dropped: make(map[string]bool), replaced: make(map[string]bool), unsure: make(map[string]bool),
			newest: make(map[string]broker.Generation), presentations: make(map[string]int), limit: make(map[string]int),
		},
	}
	w.replicas = []*Interrupted{Interrupt(s.Store), Interrupt(w.Another)}
	w.use = []broker.ConsentUse{broker.NoConsent, broker.ConsentPreferred, broker.ConsentRequired}[rng.IntN(3)]
	defer func() {
		if t.Failed() {
			t.Logf("seed %d, last steps:\n%s", seed, strings.Join(w.trail[max(0, len(w.trail)-40):], "\n"))
		}
	}()
	for range steps {
		w.step()
	}
	w.rest()
}

type walk struct {
	*history
	rng      *rand.Rand
	replicas []*Interrupted
	server   *server
	flights  []*flight
	// past transitions, any of which may happen once more.
	past []func(broker.Store)
	facts
	trail []string

	began            time.Time
	advanced, inside time.Duration
	names            int
}

// server is the other side: what it thinks of the refresh tokens that it has
// issued is the truth.
type server struct {
	good    map[string]bool
	rotates bool
}

// facts are what the answers so far have established.
type facts struct {
	// holder of the lease until an instant, at the least; empty if it may have
	// ended.
	holder string
	until  time.Duration
	fence  broker.Generation
	// newest generation seen, by slot.
	newest map[string]broker.Generation

	// obtained are the names of all tokens so far; unsure those whose save
	// may have happened or not, since the store has the say.
	obtained []string
	unsure   map[string]bool
	dropped  map[string]bool

	// job whose slot is in use, and the slots of those that have ended.
	job   int
	ended map[string]bool

	// refresh token that the record showed last, and those that it showed
	// before.
	refresh  string
	replaced map[string]bool
	// presenter of a refresh token, who may be waiting for an answer until an
	// instant.
	presenter, presents string
	waits               time.Duration
	// presentations by refresh token, without those that were taken back, and
	// how many there may be.
	presentations, limit map[string]int
}

// flight is one attempt to obtain a token.
type flight struct {
	replica int
	claim   broker.Claim
	lease   broker.Lease
	// doomed flights began before a drop of the grant.
	doomed bool
	// spends is the name of the refresh token; empty for a grant anew.
	spends    string
	committed bool
	result    *broker.Result
	failure   *broker.Failure
}

func (w *walk) now() time.Duration { return w.advanced + time.Since(w.began) - w.inside }

func (w *walk) advance(d time.Duration) {
	start := time.Now()
	w.Advance(d)
	w.advanced += d
	w.inside += time.Since(start)
}

// chance is true once in n times.
func (w *walk) chance(n int) bool { return w.rng.IntN(n) == 0 }

func (w *walk) name(kind string) string {
	w.names++
	return fmt.Sprint(kind, w.names)
}

func (w *walk) note(format string, args ...any) {
	w.trail = append(w.trail, fmt.Sprintf("%10v ", w.now().Round(time.Millisecond))+fmt.Sprintf(format, args...))
}

// try makes the transition, which may go wrong, and repeats it or gives up. It
// reports whether there was an answer.
func (w *walk) try(replica int, what string, transition func(broker.Store) error) bool {
	s := w.replicas[replica]
	w.past = append(w.past, func(s broker.Store) { _ = transition(s) })
	for {
		how := Interruption(0)
		if w.chance(5) {
			how = Interruptions[w.rng.IntN(len(Interruptions))]
		}
		s.Next(how)
		err := transition(s)
		w.note("%s: %v", what, how)
		if err == nil {
			return true
		}
		if how == 0 {
			w.t.Fatalf("%s: %v", what, err)
		}
		if w.chance(3) {
			return false
		}
	}
}

// deliver has happen what is late; that may have been the end of anything.
func (w *walk) deliver() {
	for _, s := range w.replicas {
		if n := s.Deliver(); n > 0 {
			w.note("%d late transitions happen", n)
			w.holder, w.presenter = "", ""
			w.limit[w.refresh] += most
		}
	}
}

func (w *walk) step() {
	switch n := w.rng.IntN(100); {
	case n < 15 && len(w.flights) < 5:
		w.flights = append(w.flights, w.takeOff())
	case n < 65 && len(w.flights) > 0:
		i := w.rng.IntN(len(w.flights))
		if f := w.flights[i]; w.fly(f) {
			w.flights = append(w.flights[:i], w.flights[i+1:]...)
		}
	case n < 75:
		w.advance(time.Duration(w.rng.Int64N(int64(5 * time.Second))))
	case n < 77:
		w.deliver() // a transition that was sent is not under way for that long
		w.past = nil
		w.advance(time.Duration(w.rng.Int64N(int64(40 * time.Minute))))
	case n < 81 && len(w.past) > 0:
		w.note("a transition happens once more")
		w.past[len(w.past)-1-w.rng.IntN(min(len(w.past), 30))](w.Another)
	case n < 83:
		w.deliver()
	case n < 87:
		w.observe()
	case n < 89 && len(w.obtained) > 0:
		w.dropToken(w.obtained[len(w.obtained)-1-w.rng.IntN(min(len(w.obtained), 5))])
	case n < 90:
		w.dropGrant()
	case n < 92:
		w.try(w.rng.IntN(2), "reset", func(s broker.Store) error {
			w.limit[w.refresh] += most
			return s.Reset(w.ctx(), w.family)
		})
	case n < 94 && w.use == broker.ConsentRequired:
		w.signIn()
	case n < 96 && w.use == broker.NoConsent:
		name := w.obtain("restored", false)
		w.unsure[name] = true
		w.Another.Restore(w.family, "", token(name, hour))
	case n < 98:
		w.endJob()
	case len(w.obtained) > 0:
		name := w.obtained[w.rng.IntN(len(w.obtained))]
		w.try(w.rng.IntN(2), "confirm "+name, func(s broker.Store) error { return s.Confirm(w.ctx(), w.family, id(name)) })
	}
}

// rest wants the family to come to rest once everybody has left.
func (w *walk) rest() {
	w.deliver()
	w.advance(2 * hour)
	w.observe()
	w.flights = nil
	last := w.takeOff()
	last.claim.Credentials, last.claim.Asked = []string{"new"}, true
	a, err := w.Another.Acquire(w.ctx(), last.claim)
	w.must("acquire by the last one", err)
	if a.Verdict == broker.Busy || a.Verdict == broker.InDoubt {
		w.t.Errorf("verdict %d long after everybody has left", a.Verdict)
	}
}

// obtain is a token that the server issues; no drop that was acknowledged may
// be undone by it, if it is doomed.
func (w *walk) obtain(kind string, doomed bool) string {
	name := w.name(kind)
	w.obtained = append(w.obtained, name)
	w.dropped[id(name)] = doomed
	return name
}

func (w *walk) takeOff() *flight {
	f := &flight{replica: w.rng.IntN(2)}
	f.claim = broker.Claim{
		Family: w.family, Slot: []string{"", "b", w.jobSlot()}[w.rng.IntN(3)], Owner: w.name("owner"), Length: lease,
		Credentials: []string{"secret"}, Consent: w.use,
	}
	if !w.chance(4) {
		f.claim.Demand = anew
	}
	return f
}

// fly takes a flight one step on, and reports whether that was its last.
func (w *walk) fly(f *flight) (landed bool) {
	if w.chance(8) {
		w.note("%s pauses or vanishes", f.claim.Owner)
		return w.chance(2)
	}
	switch {
	case f.result != nil:
		return w.saved(f)
	case f.failure != nil:
		return w.failed(f)
	case f.lease.Owner == "":
		return w.claimed(f)
	case w.chance(3):
		w.renewed(f)
		return false
	}
	return w.called(f)
}

func (w *walk) claimed(f *flight) (landed bool) {
	var a broker.Acquisition
	start := w.now()
	if !w.try(f.replica, f.claim.Owner+" claims", func(s broker.Store) (err error) {
		start = w.now()
		if a, err = s.Acquire(w.ctx(), f.claim); err == nil && a.Verdict == broker.Usable {
			w.lets(f.claim.Owner)
		}
		return err
	}) {
		return w.chance(2)
	}
	w.note("... verdict %d, fence %d", a.Verdict, a.Fence)
	w.sees(f.claim.Slot, a.Token, a.Consent)
	if w.ended[f.claim.Slot] && a.Verdict != broker.Ended {
		w.t.Fatalf("a claim to %s, whose job has ended: verdict %d", f.claim.Slot, a.Verdict)
	}
	switch a.Verdict {
	case broker.Granted:
	case broker.Unknown:
		f.claim.Asked = true
		return false
	case broker.Refused:
		for name, good := range w.server.good {
			if good && a.Failure.Kind == broker.Dead && a.Failure.Credential == id(name) {
				w.t.Fatalf("%s, which is good, is taken for dead", name)
			}
		}
		return true
	default:
		return true
	}
	if w.holder != "" && w.holder != f.claim.Owner && w.now() < w.until {
		w.t.Fatalf("%s is granted the lease that %s has until %v", f.claim.Owner, w.holder, w.until)
	}
	if a.Fence <= w.fence {
		w.t.Fatalf("%s is granted fence %d, after %d", f.claim.Owner, a.Fence, w.fence)
	}
	w.holder, w.until, w.fence = f.claim.Owner, start+lease, a.Fence
	f.lease = broker.Lease{Family: w.family, Owner: f.claim.Owner, Fence: a.Fence, Length: lease}
	if a.Consent != nil {
		f.spends = a.Consent.RefreshToken.Reveal()
	}
	return false
}

// lets notes that the owner's lease may have ended.
func (w *walk) lets(owner string) {
	if w.holder == owner {
		w.holder = ""
	}
}

func (w *walk) renewed(f *flight) {
	var held bool
	var start time.Duration
	if w.try(f.replica, f.claim.Owner+" renews", func(s broker.Store) (err error) {
		start = w.now()
		held, err = s.Renew(w.ctx(), f.lease)
		return err
	}) && held && w.holder == f.claim.Owner {
		w.until = start + lease
	}
}

// called asks the server, which answers in one of many ways.
func (w *walk) called(f *flight) (landed bool) {
	if f.spends != "" && !w.committed(f) {
		f.failure = &broker.Failure{Outcome: broker.Unsent}
		return false
	}
	failed := transient(0)
	switch {
	case w.chance(6): // the server has other worries
		failed.Outcome = broker.Answered
		f.failure = &failed
	case f.spends != "" && !w.server.good[f.spends]:
		failed = dead(f.spends)
		f.failure = &failed
	default:
		r := w.granted(f)
		if w.chance(6) {
			f.failure = &failed // and the answer was lost
		} else {
			f.result = &r
		}
	}
	return false
}

func (w *walk) committed(f *flight) bool {
	var v broker.IntendVerdict
	var start time.Duration
	if f.committed || !w.try(f.replica, f.claim.Owner+" commits to "+f.spends, func(s broker.Store) (err error) {
		start = w.now()
		v, err = s.Intend(w.ctx(), f.lease, broker.Presentation{RefreshID: id(f.spends), Horizon: horizon, Most: most})
		return err
	}) {
		return false
	}
	w.note("... verdict %d", v)
	if v != broker.Intended {
		return false
	}
	f.committed = true
	if w.presenter != "" && w.presenter != f.claim.Owner && w.presents == f.spends && w.now() < w.waits {
		w.t.Fatalf("%s presents %s while %s may wait for an answer, until %v", f.claim.Owner, f.spends, w.presenter, w.waits)
	}
	w.presenter, w.presents, w.waits = f.claim.Owner, f.spends, start+horizon
	w.presentations[f.spends]++
	if n := w.presentations[f.spends]; w.server.rotates && n > most+w.limit[f.spends] {
		w.t.Fatalf("%s is presented %d times without an outcome", f.spends, n)
	}
	return true
}

// granted is what the server grants.
func (w *walk) granted(f *flight) broker.Result {
	r := broker.Result{Slot: f.claim.Slot, Token: token(w.obtain("t", f.doomed), hour)}
	switch {
	case f.spends == "" && w.use == broker.ConsentPreferred:
		r.Refresh = w.refreshToken(f.doomed)
	case f.spends == "":
	case w.server.rotates:
		r.Spent, r.Rotates = id(f.spends), broker.RotatesYes
		w.server.good[f.spends] = false
		r.Refresh = w.refreshToken(f.doomed)
	default:
		r.Spent, r.Rotates = id(f.spends), broker.RotatesNo
	}
	return r
}

func (w *walk) refreshToken(doomed bool) broker.Secret {
	name := w.obtain("r", doomed)
	w.server.good[name] = true
	return broker.NewSecret(name)
}

func (w *walk) saved(f *flight) (landed bool) {
	var t broker.StoredToken
	var v broker.SaveVerdict
	what := fmt.Sprintf("%s saves %s, %s for %s", f.claim.Owner, f.result.Token.Access.Reveal(), f.result.Refresh.Reveal(), f.spends)
	if w.try(f.replica, what, func(s broker.Store) (err error) {
		w.lets(f.claim.Owner)
		w.heard(f)
		t, v, err = s.Save(w.ctx(), f.lease, *f.result)
		return err
	}) {
		w.saw(f.claim.Slot, v, t, f.result.Refresh)
	}
	return true
}

// saw takes note of the answer to a save.
func (w *walk) saw(slot string, v broker.SaveVerdict, t broker.StoredToken, refresh broker.Secret) {
	w.note("... verdict %d", v)
	if v != broker.Saved {
		return
	}
	var c *broker.Consent
	if !refresh.IsEmpty() {
		c = &broker.Consent{RefreshToken: refresh}
	}
	w.sees(slot, &t, c)
}

// heard notes that the flight no longer waits for an answer.
func (w *walk) heard(f *flight) {
	if w.presenter == f.claim.Owner {
		w.presenter = ""
	}
}

func (w *walk) failed(f *flight) (landed bool) {
	w.try(f.replica, fmt.Sprintf("%s fails, kind %d, outcome %d", f.claim.Owner, f.failure.Kind, f.failure.Outcome), func(s broker.Store) error {
		w.lets(f.claim.Owner)
		w.heard(f)
		if f.committed && f.failure.Outcome != broker.OutcomeUnknown {
			f.committed = false
			w.presentations[f.spends]--
		}
		_, err := s.Fail(w.ctx(), f.lease, *f.failure)
		return err
	})
	return true
}

func (w *walk) signIn() {
	refresh := w.refreshToken(false).Reveal()
	l, r := signedIn(w.family, refresh)
	access := r.Token.Access.Reveal()
	w.obtained = append(w.obtained, access)
	w.unsure[access], w.unsure[refresh] = true, true
	var t broker.StoredToken
	var v broker.SaveVerdict
	if w.try(w.rng.IntN(2), "a person signs in with "+refresh, func(s broker.Store) (err error) {
		w.holder, w.presenter = "", ""
		t, v, err = s.Save(w.ctx(), l, r)
		return err
	}) {
		delete(w.unsure, access)
		delete(w.unsure, refresh)
		w.saw("", v, t, r.Refresh)
	}
}

func (w *walk) dropToken(name string) {
	d := broker.Drop{Family: w.family, Operation: w.name("drop"), Token: id(name), Remember: 1000 * hour}
	if _, refresh := w.server.good[name]; refresh { // dropped with its grant only
		return
	}
	if w.try(w.rng.IntN(2), "drop of "+name, func(s broker.Store) error {
		_, err := s.Drop(w.ctx(), d)
		return err
	}) {
		w.dropped[id(name)] = true
	}
}

func (w *walk) dropGrant() {
	d := broker.Drop{Family: w.family, Operation: w.name("drop"), Remember: 1000 * hour}
	if !w.try(w.rng.IntN(2), "drop of the grant", func(s broker.Store) error {
		w.holder, w.presenter = "", ""
		_, err := s.Drop(w.ctx(), d)
		return err
	}) {
		return
	}
	for _, name := range w.obtained {
		if !w.unsure[name] {
			w.dropped[id(name)] = true
		}
	}
	for _, f := range w.flights {
		f.doomed = f.lease.Owner != ""
	}
}

// jobSlot is that of the job that asks now.
func (w *walk) jobSlot() string { return fmt.Sprintf("job%d/x", w.job) }

// endJob ends the job, and has another one ask from now on.
func (w *walk) endJob() {
	slot := w.jobSlot()
	d := broker.Drop{Family: w.family, Operation: w.name("drop"), Job: []string{slot, broker.JobOf(slot)}[w.rng.IntN(2)], Remember: 1000 * hour}
	if w.try(w.rng.IntN(2), "end of "+d.Job, func(s broker.Store) error {
		_, err := s.Drop(w.ctx(), d)
		return err
	}) {
		w.ended[slot] = true
	}
	w.job++
}

func (w *walk) observe() {
	for _, slot := range []string{"", "b", w.jobSlot(), fmt.Sprintf("job%d/x", w.job-1)} {
		r, err := w.Another.Look(w.ctx(), w.family, slot)
		w.must("look", err)
		w.sees(slot, r.Token, r.Consent)
	}
}

// sees checks what the store shows of a slot and of the consent.
func (w *walk) sees(slot string, t *broker.StoredToken, c *broker.Consent) {
	if t != nil {
		name := t.Access.Reveal()
		delete(w.unsure, name)
		if w.ended[slot] {
			w.t.Fatalf("slot %s shows %s, and its job has ended", slot, name)
		}
		if w.dropped[id(name)] {
			w.t.Fatalf("slot %q shows %s, which was dropped", slot, name)
		}
		if t.Generation < w.newest[slot] {
			w.t.Fatalf("slot %q shows %s under generation %d, after %d", slot, name, t.Generation, w.newest[slot])
		}
		w.newest[slot] = t.Generation
	}
	if c == nil {
		return
	}
	name := c.RefreshToken.Reveal()
	delete(w.unsure, name)
	switch {
	case w.dropped[id(name)]:
		w.t.Fatalf("the record shows refresh token %s, which was dropped", name)
	case w.replaced[name]:
		w.t.Fatalf("the record shows refresh token %s again, which was replaced by %s", name, w.refresh)
	case c.Presentations > most && c.Rotates != broker.RotatesNo:
		w.t.Fatalf("%d presentations of %s are in doubt", c.Presentations, name)
	}
	if w.refresh != "" && w.refresh != name {
		w.replaced[w.refresh] = true
	}
	w.refresh = name
}
