package broker

import (
	"context"
	"errors"
)

// Watch follows one token from each to its successor. Its methods are for one
// goroutine. Close it when done: a token that is watched is renewed ahead of its
// end, whether or not anybody asks for it.
type Watch struct {
	b   *Broker
	ask Ask
	e   *entry // that counts the watch; nil before the first token
}

// Watch begins to follow a token. It asks for nothing yet.
func (b *Broker) Watch(ask Ask) *Watch { return &Watch{b: b, ask: ask} }

// Next returns a token as Issue does, and a channel that is closed once Next
// would return another one: it was replaced, or taken out of service, or the
// profile was. Nothing is missed between two calls. Who lets the token end by
// itself is not told: then Next obtains one, or says why there is none.
func (w *Watch) Next(ctx context.Context, d Demand) (*Token, Source, <-chan struct{}, error) {
	for {
		p, e, err := w.b.find(w.ask)
		if err != nil {
			return nil, 0, nil, err
		}
		w.follow(e)
		news := e.hears()
		t, source, err := e.serve(ctx, p, d)
		if errors.Is(err, errReplaced) {
			continue
		}
		if err == nil {
			p.count(w.ask)
		}
		return t, source, news, err
	}
}

// Close ends the watch.
func (w *Watch) Close() { w.follow(nil) }

// follow counts the watch where it belongs.
func (w *Watch) follow(e *entry) {
	if w.e == e {
		return
	}
	if w.e != nil {
		w.e.watches.Add(-1)
	}
	if e != nil {
		e.watches.Add(1)
	}
	w.e = e
}

// hears returns the channel that is closed with the next change of the token.
func (e *entry) hears() <-chan struct{} {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.news == nil {
		e.news = make(chan struct{})
		if e.retired.Load() { // nothing changes it any more
			close(e.news)
		}
	}
	return e.news
}

// tell wakes those who follow the token. e.mu is held.
func (e *entry) tell() {
	if e.news != nil {
		close(e.news)
		e.news = nil
	}
}
