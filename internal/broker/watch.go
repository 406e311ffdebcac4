package broker

import (
	"cmp"
	"errors"
	"time"
)

// Watch follows one token from each to its successor, for one who hands them on.
// It never waits: Look says what there is to hand on, and what to wait for until
// it is worth another look. Its methods are for one goroutine. Close it when
// done: a token that is watched is renewed ahead of its end, whether or not
// anybody asks for it.
type Watch struct {
	b   *Broker
	ask Ask
	e   *entry // that counts the watch; nil while none does
	p   *profile

	// flight of e that may bring the next token, or nil.
	flight *flight
	// last token that was handed on, or nil.
	last *Token
	// failed is why there is no successor, or nil, and after the time again, or
	// other news than known, it may be otherwise.
	failed *Error
	again  time.Time
	known  <-chan struct{}
}

// View is what a Watch sees.
type View struct {
	// Token to hand on, in place of the one that was last; nil if there is none.
	Token  *Token
	Source Source
	// News and Landed are closed, and Again is over, when it is worth another
	// look. Landed is nil, and Again zero, where there is nothing of that kind
	// to wait for.
	News, Landed <-chan struct{}
	Again        time.Time
}

// Watch begins to follow a token. It asks for nothing yet.
func (b *Broker) Watch(ask Ask) *Watch { return &Watch{b: b, ask: ask} }

// Look sees what there is at this moment; nothing is missed between two looks.
// Tokens meet the demand when they are seen; one that was handed on need not go
// on to meet it. The error is an *Error: before the first token that of Issue.
// While the last token lives there is none for want of another, and then it is
// that of Issue again. Other errors are final: the profile is gone, or does not
// have the scopes any more, or the job has ended.
func (w *Watch) Look(d Demand) (View, error) {
	for {
		p, e, err := w.b.find(w.ask)
		if err != nil {
			w.follow(nil, nil)
			return w.without(View{}, err)
		}
		w.follow(p, e)
		v := View{News: e.hears()}
		t, source, err := w.see(&v, d)
		if errors.Is(err, errReplaced) {
			continue
		}
		if t != nil && (w.last == nil || t.ID != w.last.ID) {
			v.Token, v.Source = t, source
		}
		if err != nil && v.Token == nil {
			return w.without(v, err)
		}
		v.wake(w.margin(t))
		return v, nil
	}
}

// see returns the best token there is, which may be the last one, and why there
// is no better one if there should be. It has a flight obtain that.
func (w *Watch) see(v *View, d Demand) (*Token, Source, error) {
	e, now := w.e, time.Now()
	t := e.token.Load()
	if t != nil && t.meets(w.rest(t, d), now) {
		w.flight, w.failed = nil, nil
		if e.dormant.Load() {
			e.rouse()
		}
		return t, FromMemory, nil
	}
	if t != nil && !t.serves(w.rest(t, d), now) {
		t = nil
	}
	if w.failed != nil && w.lives(now) && w.known == v.News && now.Before(w.again) {
		return t, FromMemory, w.failed
	}
	for {
		if w.p.replaced.Load() {
			return nil, 0, errReplaced
		}
		if w.flight == nil {
			came, f, err := e.join(w.p, d.rounded())
			if came != nil || err != nil {
				return cmp.Or(came, t), FromMemory, w.fail(v, err)
			}
			w.flight = f
		}
		f := w.flight
		select {
		case <-f.done:
		default:
			v.Landed = f.done
			return t, FromMemory, nil
		}
		w.flight = nil
		came, source, err, settled := e.settle(f, w.p, d.rounded())
		switch {
		case !settled || came != nil && e.isDropped(came.ID): // the next flight's
		case err != nil:
			return t, FromMemory, w.fail(v, err)
		default:
			return came, source, nil
		}
	}
}

// rest is what is still demanded of a token.
func (w *Watch) rest(t *Token, d Demand) Demand {
	if w.last != nil && t.ID == w.last.ID {
		return Demand{}
	}
	return d
}

// leastAgain and mostAgain bound when a watch looks again for a successor that
// could not be obtained. What may end that sooner is news.
const leastAgain, mostAgain = time.Second, time.Minute

// fail remembers why there is no token, so that those who look often do not ask
// often.
func (w *Watch) fail(v *View, err *Error) error {
	w.failed = err
	if err == nil {
		return nil
	}
	after := err.RetryAfter
	if after <= 0 {
		after = mostAgain
	}
	w.again, w.known = time.Now().Add(min(max(after, leastAgain), mostAgain)), v.News
	return err
}

// without is a view in which nothing is to be handed on because of err, which is
// the end if there is nothing to wait for.
func (w *Watch) without(v View, err error) (View, error) {
	var e *Error
	if !errors.As(err, &e) {
		return View{}, err
	}
	if w.b.ctx.Err() != nil && e.Reason != ReasonJobEnded {
		e = shuttingDown(&Profile{Name: w.ask.Profile}) // whatever else is wrong by now
	}
	final := e.Reason == ReasonProfileUnknown || e.Reason == ReasonInvalidRequest || e.Reason == ReasonJobEnded
	if final || !w.lives(time.Now()) {
		return View{}, e
	}
	if w.failed == nil || v.News == nil {
		_ = w.fail(&v, e)
	}
	v.wake(w.again)
	v.wake(w.last.ExpireTime)
	return v, nil
}

// lives reports whether the last token has not ended.
func (w *Watch) lives(now time.Time) bool { return w.last != nil && w.last.remaining(now) > 0 }

// margin is when t does not do any more.
func (w *Watch) margin(t *Token) time.Time {
	switch now := time.Now(); {
	case t == nil && !w.lives(now):
		return time.Time{}
	case t == nil:
		return w.last.ExpireTime
	default:
		if end := t.ExpireTime.Add(-Margin(t.lifetime)); now.Before(end) {
			return end
		}
		return t.ExpireTime
	}
}

// wake has the view end at a time, unless it is zero.
func (v *View) wake(at time.Time) {
	if !at.IsZero() && (v.Again.IsZero() || at.Before(v.Again)) {
		v.Again = at
	}
}

// HandedOn tells that the token of the last view was handed on.
func (w *Watch) HandedOn(v View) {
	now := time.Now()
	w.last = v.Token
	w.e.touch(now)
	w.p.handedOut(v.Source, now)
	w.p.countJob(w.ask)
}

// Lives reports whether the token that was handed on last has not ended.
func (w *Watch) Lives() bool { return w.lives(time.Now()) }

// Close ends the watch.
func (w *Watch) Close() { w.follow(nil, nil) }

// follow counts the watch where it belongs.
func (w *Watch) follow(p *profile, e *entry) {
	w.p = p
	if w.e == e {
		return
	}
	if w.e != nil {
		w.e.watches.Add(-1)
	}
	if e != nil {
		e.mu.Lock() // a renewal either counts it, or has left the token dormant by now
		e.watches.Add(1)
		e.mu.Unlock()
	}
	w.e, w.flight, w.failed = e, nil, nil
}

// hears returns the channel that is closed with the next change of the token, or
// of what keeps it from coming. It takes no lock while there is one: watchers are
// many, and wake all at once.
func (e *entry) hears() <-chan struct{} {
	if news := e.news.Load(); news != nil {
		return *news
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if news := e.news.Load(); news != nil {
		return *news
	}
	news := make(chan struct{})
	if e.retired.Load() { // nothing changes it any more
		close(news)
	}
	e.news.Store(&news)
	return news
}

// tell wakes those who follow the token. e.mu is held.
func (e *entry) tell() {
	if news := e.news.Swap(nil); news != nil {
		select {
		case <-*news: // of a retired entry
		default:
			close(*news)
		}
	}
}

// announce is tell.
func (e *entry) announce() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.tell()
}
