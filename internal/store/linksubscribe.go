package store

import (
	"context"
	"crypto/rand"
	"errors"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	// beatInterval between the messages that a link sends to itself.
	beatInterval = 2 * time.Second
	// beatTimeout for such a message to come back. With the interval before it
	// makes five seconds from the last that was heard.
	beatTimeout = 3 * time.Second
	// receiveTimeout after which a silent connection is asked for a PONG.
	receiveTimeout = time.Second
	// silenceTimeout after which it is taken for dead. The library would go on
	// asking, and never look for the answer.
	silenceTimeout = 3 * time.Second

	firstBackoff = 100 * time.Millisecond
	lastBackoff  = time.Second
	// forbiddenBackoff: nobody changes an ACL that often.
	forbiddenBackoff = 10 * time.Second

	// inboxSize is how many messages may wait for whoever hears them.
	inboxSize = 1024
)

var (
	errSilent = errors.New("nothing came over the connection, not even an answer to PING")
	errDeaf   = errors.New("messages that were sent do not arrive")
	errMoved  = errors.New("another node is the master")
	errSpent  = errors.New("the connection is over")
)

// subscribe keeps a subscription to the event channel until the link is closed.
func (l *link) subscribe() {
	backoff := firstBackoff
	for l.alive.Err() == nil {
		confirmed, err := l.listen()
		forbiddenNow := outcomeOf(err) == forbidden
		l.tally.add(func(s *linkStats) { s.subscribed, s.subscriptionForbidden = false, forbiddenNow })
		switch {
		case forbiddenNow:
			l.complain("changes that other replicas make are noticed late: the redis user needs the permission for SUBSCRIBE and the channels tb1:*", err)
			l.pause(forbiddenBackoff)
			continue
		case confirmed:
			l.o.log.Info("redis subscription lost", "error", err)
			backoff = firstBackoff
		default:
			backoff = min(2*backoff, lastBackoff)
		}
		l.pause(backoff)
	}
}

// listen subscribes once and hears messages until something is wrong. It reports
// whether the subscription was confirmed.
func (l *link) listen() (confirmed bool, err error) {
	addr, name := l.o.addresses[0], ""
	if l.o.cluster {
		if addr, err = l.anyNode(); err != nil {
			return false, err
		}
		name = addr
	}
	var master string
	var dialed atomic.Bool
	o := l.options(addr, name)
	o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if dialed.Swap(true) { // the library would connect again by itself
			return nil, errSpent
		}
		var err error
		if master, err = l.target(ctx, addr); err != nil {
			return nil, err
		}
		return l.connect(ctx, network, master)
	}
	client := redis.NewClient(o)
	defer client.Close()
	ctx, cancel := context.WithTimeout(l.alive, dialTimeout+callTimeout)
	defer cancel()
	s := client.Subscribe(ctx) // to nothing: that does not connect
	defer s.Close()
	defer context.AfterFunc(l.alive, func() { _ = s.Close() })() // a read does not heed a context
	if err := s.Subscribe(ctx, eventChannel, l.beats.channel); err != nil {
		return false, err
	}
	return l.receive(s, func() bool { return l.o.masterName == "" || *l.master.Load() == master })
}

// anyNode returns the address of a master of the Cluster: messages reach all.
func (l *link) anyNode() (string, error) {
	p := l.borrow()
	if p == nil {
		return "", errClosed
	}
	defer p.users.Done()
	ctx, cancel := context.WithTimeout(l.alive, callTimeout)
	defer cancel()
	n, err := p.node(ctx, l.anyKey())
	return n.addr, err
}

// receive returns when the subscription is over: it broke, it is silent, what is
// sent does not arrive, or it is not at the right node any more.
func (l *link) receive(s *redis.PubSub, current func() bool) (confirmed bool, err error) {
	l.beats.forget() // those that were sent while nobody listened
	latest := time.Now()
	for channels := 0; ; {
		message, err := s.ReceiveTimeout(l.alive, receiveTimeout)
		if outcomeOf(err) == timeout {
			if time.Since(latest) >= silenceTimeout {
				return confirmed, errSilent
			}
			ctx, cancel := context.WithTimeout(l.alive, callTimeout)
			err = s.Ping(ctx)
			cancel()
		} else if err == nil {
			latest = time.Now()
		}
		if err != nil {
			return confirmed, err
		}
		switch m := message.(type) {
		case *redis.Subscription:
			if channels++; channels == 2 {
				confirmed = true
				l.subscribed()
			}
		case *redis.Message:
			l.hear(m)
		}
		if l.beats.lost(time.Now()) {
			return confirmed, errDeaf
		}
		if !current() {
			return confirmed, errMoved
		}
	}
}

func (l *link) subscribed() {
	l.beats.forget()
	var again bool
	l.tally.add(func(s *linkStats) {
		s.subscribed = true
		s.subscriptions++
		again = s.subscriptions > 1
	})
	if again {
		l.o.log.Info("redis subscription renewed")
	}
	l.miss()
}

// hear never waits, so that a slow reader of messages does not look like a dead
// connection.
func (l *link) hear(m *redis.Message) {
	if m.Channel != eventChannel {
		l.beats.hear(m.Payload)
		return
	}
	select {
	case l.inbox <- m.Payload:
	default:
		l.miss()
	}
}

// miss makes o.resync due.
func (l *link) miss() {
	select {
	case l.missed <- struct{}{}:
	default:
	}
}

// deliver hands over what was heard.
func (l *link) deliver() {
	for {
		select {
		case m := <-l.inbox:
			l.o.heard(m)
		case <-l.missed:
			l.o.resync()
		case <-l.alive.Done():
			return
		}
	}
}

// beat sends a message to ourselves, again and again, the way that other replicas
// send theirs.
func (l *link) beat() {
	l.greet()
	for blind := false; ; {
		if l.o.masterName != "" {
			blind = l.askAround(blind)
		}
		number, missed := l.beats.next()
		if missed {
			l.tally.add(func(s *linkStats) { s.heartbeatsMissed++ })
		}
		err := l.call(l.alive, "heartbeat", l.anyKey(), reading, func(ctx context.Context, n node) error {
			return n.Publish(ctx, l.beats.channel, number).Err()
		})
		if err == nil {
			l.beats.sent(number, time.Now())
		}
		if !l.pause(beatInterval) {
			return
		}
	}
}

// askAround looks whether the Sentinels name another master: the old one may go on
// answering, cut off from all others. It returns whether no Sentinel answers.
func (l *link) askAround(wasBlind bool) (blind bool) {
	ctx, cancel := context.WithTimeout(l.alive, dialTimeout)
	defer cancel()
	_, err := l.findMaster(ctx)
	switch {
	case err != nil && !wasBlind && l.alive.Err() == nil:
		l.o.log.Warn("redis sentinels are out of reach; a failover would not be noticed", "error", err)
	case err == nil && wasBlind:
		l.o.log.Info("redis sentinels are back")
	}
	return err != nil
}

// beats are the messages that a link sends to itself.
type beats struct {
	channel string

	mu            sync.Mutex
	number, heard int64
	// unheard since the first was sent that has not been heard.
	unheard time.Time
}

func newBeats() *beats { return &beats{channel: "tb1:hb:" + rand.Text()} }

// next returns the number of the next, and whether the one before was missed.
func (b *beats) next() (number int64, missed bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.number++
	return b.number, !b.unheard.IsZero()
}

// sent notes that Redis has taken one. It may have been heard before.
func (b *beats) sent(number int64, now time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.heard < number && b.unheard.IsZero() {
		b.unheard = now
	}
}

func (b *beats) hear(payload string) {
	number, err := strconv.ParseInt(payload, 10, 64)
	if err != nil {
		return // not ours
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.heard = max(b.heard, number)
	b.unheard = time.Time{}
}

// lost reports whether messages that were sent do not arrive.
func (b *beats) lost(now time.Time) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.unheard.IsZero() && now.Sub(b.unheard) > beatTimeout
}

// forget begins anew, with a new subscription.
func (b *beats) forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.unheard = time.Time{}
}
