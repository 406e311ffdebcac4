package storetest

import (
	"fmt"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// repeats are about transitions that happen twice, or when nobody expects them
// any more. After an error nobody knows whether one happened, and whoever tried
// it tries again: the outcome must be that of one that went well at once.
var repeats = func() map[string]func(*history) {
	all := make(map[string]func(*history))
	for name, tr := range transitions {
		for _, i := range Interruptions {
			all[fmt.Sprintf("%s that was %v and is repeated", name, i)] = func(h *history) { repeated(h, tr, i) }
		}
	}
	for name, z := range zombies {
		all[name] = func(h *history) { overtaken(h, z) }
	}
	return all
}()

// transition is one of the store's: prepare leads up to it, and returns it.
type transition func(h *history) (call func(broker.Store) (answer string, err error))

var transitions = map[string]transition{
	"a claim": func(h *history) func(broker.Store) (string, error) {
		return func(s broker.Store) (string, error) {
			a, err := s.Acquire(h.ctx(), h.claimOf("p", "", anew))
			return fmt.Sprint(a.Verdict), err
		}
	},
	"a claim on a consent": func(h *history) func(broker.Store) (string, error) {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		return func(s broker.Store) (string, error) {
			a, err := s.Acquire(h.ctx(), h.claimOf("p", "", anew))
			return fmt.Sprint(a.Verdict, a.Consent != nil, a.Token != nil), err
		}
	},
	"a renewal": func(h *history) func(broker.Store) (string, error) {
		l := h.lease("p")
		return func(s broker.Store) (string, error) {
			ok, err := s.Renew(h.ctx(), l)
			return fmt.Sprint(ok), err
		}
	},
	"a commitment": func(h *history) func(broker.Store) (string, error) {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		h.vanish("q", "r1")
		l := h.lease("p")
		return func(s broker.Store) (string, error) {
			v, err := s.Intend(h.ctx(), l, broker.Presentation{RefreshID: id("r1"), Horizon: horizon, Most: most})
			return fmt.Sprint(v), err
		}
	},
	"a save": saving(func(h *history) (broker.Lease, broker.Result) {
		h.save(h.lease("p"), plain("t1"), broker.Saved)
		return h.lease("p"), plain("t2")
	}),
	"a save of a repeated token": saving(func(h *history) (broker.Lease, broker.Result) {
		h.save(h.lease("p"), plain("t1"), broker.Saved)
		h.Advance(hour)
		return h.lease("p"), plain("t1")
	}),
	"a refresh": saving(func(h *history) (broker.Lease, broker.Result) {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		return h.presented("p", "r1"), refreshed("", "t2", "r1", "r2")
	}),
	"a refresh in place": saving(func(h *history) (broker.Lease, broker.Result) {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		return h.presented("p", "r1"), refreshed("", "t2", "r1", "")
	}),
	"a late refresh": saving(func(h *history) (broker.Lease, broker.Result) {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		late := h.vanish("p", "r1")
		h.fail(h.presented("q", "r1"), dead("r1"))
		return late, refreshed("", "t2", "r1", "r2")
	}),
	"a sign-in": saving(func(h *history) (broker.Lease, broker.Result) {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		return signedIn(h.family, "s1")
	}),
	"a failure": failing(func(h *history) (broker.Lease, broker.Failure) {
		h.fail(h.lease("p"), transient(0))
		h.Advance(6 * time.Second)
		return h.lease("p"), transient(0)
	}),
	"a failure with a presentation in doubt": failing(func(h *history) (broker.Lease, broker.Failure) {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		return h.presented("p", "r1"), transient(0)
	}),
	"a failure with a presentation answered": failing(func(h *history) (broker.Lease, broker.Failure) {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		h.vanish("q", "r1")
		f := transient(0)
		f.Outcome = broker.Answered
		return h.presented("p", "r1"), f
	}),
	"a dead verdict": failing(func(h *history) (broker.Lease, broker.Failure) {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		return h.presented("p", "r1"), dead("r1")
	}),
	"giving a lease back": failing(func(h *history) (broker.Lease, broker.Failure) {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		h.vanish("q", "r1")
		return h.presented("p", "r1"), broker.Failure{Outcome: broker.Unsent}
	}),
	"the drop of a token": dropping("token of r1"),
	"the drop of a grant": dropping(""),
	"a confirmation": func(h *history) func(broker.Store) (string, error) {
		h.save(h.lease("p"), plain("t1"), broker.Saved)
		h.drop("operation", "t1")
		return func(s broker.Store) (string, error) { return "", s.Confirm(h.ctx(), h.family, id("t1")) }
	},
	"keeping a ticket": func(h *history) func(broker.Store) (string, error) {
		return func(s broker.Store) (string, error) { return "", s.Keep(h.ctx(), h.ticket(h.family)) }
	},
	"redeeming a ticket": func(h *history) func(broker.Store) (string, error) {
		h.keep(h.family)
		return func(s broker.Store) (string, error) {
			r, err := s.Redeem(h.ctx(), h.family, "p")
			return fmt.Sprint(r.Verdict, r.Content.IsEmpty()), err
		}
	},
	"a reset": func(h *history) func(broker.Store) (string, error) {
		h.fail(h.lease("p"), transient(0))
		return func(s broker.Store) (string, error) { return "", s.Reset(h.ctx(), h.family) }
	},
}

func saving(prepare func(*history) (broker.Lease, broker.Result)) transition {
	return func(h *history) func(broker.Store) (string, error) {
		l, r := prepare(h)
		return func(s broker.Store) (string, error) {
			t, v, err := s.Save(h.ctx(), l, r)
			return fmt.Sprint(v, t.Access.Reveal()), err
		}
	}
}

func failing(prepare func(*history) (broker.Lease, broker.Failure)) transition {
	return func(h *history) func(broker.Store) (string, error) {
		l, f := prepare(h)
		return func(s broker.Store) (string, error) {
			f, err := s.Fail(h.ctx(), l, f)
			return fmt.Sprint(f.Kind, f.Attempts), err
		}
	}
}

func dropping(token string) transition {
	return func(h *history) func(broker.Store) (string, error) {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		h.presented("p", "r1")
		d := broker.Drop{Family: h.family, Operation: "operation", Remember: hour}
		if token != "" {
			d.Token = id(token)
		}
		return func(s broker.Store) (string, error) {
			dropped, err := s.Drop(h.ctx(), d)
			return fmt.Sprint(names(dropped)), err
		}
	}
}

// repeated has the transition go wrong, repeats it, and compares with one that
// went well.
func repeated(h *history, tr transition, i Interruption) {
	undisturbed := *h
	undisturbed.family = "undisturbed"
	want, err := tr(&undisturbed)(h.Store)
	h.must("undisturbed", err)
	record := undisturbed.summary()

	call := tr(h)
	if !h.Interrupt(i) {
		h.cannot(fmt.Sprintf("the subject's transitions cannot be %v", i))
	}
	if _, err := call(h.Store); err == nil {
		h.t.Fatal("no error, although the transition was interrupted")
	}
	got, err := call(h.Store)
	h.must("repeated", err)
	h.want("answer", got, want)
	h.want("record", h.summary(), record)
	h.late()
	h.want("record, at last", h.summary(), record)
}

// zombie is a transition that is overtaken by others: it returns the first one
// once more.
type zombie func(h *history) (again func())

var zombies = map[string]zombie{
	"a claim, after the save": func(h *history) func() {
		l := h.lease("p")
		h.save(l, plain("t1"), broker.Saved)
		return func() {
			h.acquire("p", anew, broker.Granted) // nobody uses this one
			h.Advance(lease + time.Millisecond)
		}
	},
	"a renewal, under another's lease": func(h *history) func() {
		l := h.lease("p")
		h.Advance(lease + time.Millisecond)
		h.lease("q")
		return func() { h.renew(l, false) }
	},
	"a commitment, after it was given back": func(h *history) func() {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		l := h.presented("p", "r1")
		h.fail(l, broker.Failure{Outcome: broker.Unsent})
		return func() { h.intend(l, "r1", broker.IntendLost) }
	},
	"a commitment, after the refresh": func(h *history) func() {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		l := h.presented("p", "r1")
		h.save(l, refreshed("", "t2", "r1", "r2"), broker.Saved)
		return func() { h.intend(l, "r1", broker.IntendLost) }
	},
	"a save, after the next": func(h *history) func() {
		l := h.lease("p")
		h.save(l, plain("t1"), broker.Saved)
		h.save(h.lease("q"), plain("t2"), broker.Saved)
		return func() { h.save(l, plain("t1"), broker.Stale) }
	},
	"a save, after a restored token": func(h *history) func() {
		l := h.lease("p")
		h.save(l, plain("t1"), broker.Saved)
		h.Advance(30 * time.Minute)
		h.restore(token("t2", hour))
		return func() { h.save(l, plain("t1"), broker.Stale) }
	},
	"a save, after the drop of the token": func(h *history) func() {
		l := h.lease("p")
		h.save(l, plain("t1"), broker.Saved)
		h.drop("operation", "t1")
		return func() { h.save(l, plain("t1"), broker.WasDropped) }
	},
	"a save, after the drop of the grant and a new one": func(h *history) func() {
		l := h.lease("p")
		h.save(l, plain("t1"), broker.Saved)
		h.drop("operation", "")
		h.save(h.lease("q"), plain("t2"), broker.Saved)
		return func() { h.save(l, plain("t1"), broker.WasDropped) }
	},
	"a refresh, after the next": func(h *history) func() {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		l := h.presented("p", "r1")
		h.save(l, refreshed("", "t2", "r1", "r2"), broker.Saved)
		h.save(h.presented("q", "r2"), refreshed("", "t3", "r2", "r3"), broker.Saved)
		return func() { h.save(l, refreshed("", "t2", "r1", "r2"), broker.Superseded) }
	},
	"a refresh, while the next is under way": func(h *history) func() {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		l := h.presented("p", "r1")
		h.save(l, refreshed("", "t2", "r1", "r2"), broker.Saved)
		h.presented("q", "r2")
		return func() { h.save(l, refreshed("", "t2", "r1", "r2"), broker.Saved) }
	},
	"a refresh, after the next that failed": func(h *history) func() {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		l := h.presented("p", "r1")
		h.save(l, refreshed("", "t2", "r1", "r2"), broker.Saved)
		h.fail(h.presented("q", "r2"), transient(0))
		return func() { h.save(l, refreshed("", "t2", "r1", "r2"), broker.Saved) }
	},
	"a refresh in place, after the next": func(h *history) func() {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		l := h.presented("p", "r1")
		h.save(l, refreshed("", "t2", "r1", ""), broker.Saved)
		h.save(h.presented("q", "r1"), refreshed("", "t3", "r1", ""), broker.Saved)
		return func() { h.save(l, refreshed("", "t2", "r1", ""), broker.Stale) }
	},
	"a refresh, after a sign-in": func(h *history) func() {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		l := h.presented("p", "r1")
		h.save(l, refreshed("", "t2", "r1", "r2"), broker.Saved)
		h.signIn("s1")
		return func() { h.save(l, refreshed("", "t2", "r1", "r2"), broker.Superseded) }
	},
	"a sign-in, after refreshes": func(h *history) func() {
		h.use = broker.ConsentRequired
		l, r := signedIn(h.family, "r1")
		h.save(l, r, broker.Saved)
		h.save(h.presented("p", "r1"), refreshed("", "t2", "r1", "r2"), broker.Saved)
		h.save(h.presented("q", "r2"), refreshed("", "t3", "r2", "r3"), broker.Saved)
		return func() { h.save(l, r, broker.Superseded) }
	},
	"a sign-in, after the next": func(h *history) func() {
		h.use = broker.ConsentRequired
		l, r := signedIn(h.family, "r1")
		h.save(l, r, broker.Saved)
		h.signIn("s1")
		return func() { h.save(l, r, broker.WasDropped) }
	},
	"a failure, after a success": func(h *history) func() {
		l := h.lease("p")
		h.fail(l, transient(0))
		h.Advance(6 * time.Second)
		h.save(h.lease("q"), plain("t1"), broker.Saved)
		return func() { h.fail(l, transient(0)) }
	},
	"a failure, after a reset": func(h *history) func() {
		l := h.lease("p")
		h.fail(l, transient(0))
		h.reset()
		return func() { h.fail(l, transient(0)) }
	},
	"a failure in doubt, after a reset": func(h *history) func() {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		l := h.presented("p", "r1")
		h.fail(l, transient(0))
		h.reset()
		return func() { h.fail(l, transient(0)) }
	},
	"a failure in doubt, after the next": func(h *history) func() {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		l := h.presented("p", "r1")
		h.fail(l, transient(0))
		h.Advance(6 * time.Second)
		h.fail(h.lease("q"), transient(0)) // without having presented it
		return func() { h.fail(l, transient(0)) }
	},
	"a dead verdict, after a sign-in": func(h *history) func() {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		l := h.presented("p", "r1")
		h.fail(l, dead("r1"))
		h.signIn("s1")
		return func() { h.fail(l, dead("r1")) }
	},
	"the drop of the grant, after a sign-in": func(h *history) func() {
		h.use = broker.ConsentRequired
		h.signIn("r1")
		h.drop("operation", "")
		h.signIn("s1")
		return func() { h.drop("operation", "") }
	},
	"the drop of a token, after the next": func(h *history) func() {
		h.save(h.lease("p"), plain("t1"), broker.Saved)
		h.drop("operation", "t1")
		h.save(h.lease("q"), plain("t2"), broker.Saved)
		return func() { h.drop("operation", "t1") }
	},
}

// overtaken has a transition happen once more, late, and wants nothing to
// change.
func overtaken(h *history, z zombie) {
	again := z(h)
	before := h.summary()
	again()
	h.want("record", h.summary(), before)
}
