package store

import (
	"context"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// sweeper compares the mirror with Redis in the background: a family when there
// is a word of it, and all by their stamps every few seconds, and at once when
// words may have been missed. Words say nothing that is believed; they only make
// it look.
type sweeper struct {
	r    *Redis
	ctx  context.Context
	halt context.CancelFunc
	done sync.WaitGroup

	// missed is signalled when words may have been missed.
	missed chan struct{}

	// mu guards wanted: the families to compare. True is for those whose
	// waiters are to be told of a change, whatever is found.
	mu     sync.Mutex
	wanted map[string]bool
	wake   chan struct{}
}

const (
	// sweepInterval is how often the families in use are compared, and those
	// whose token memory may serve; all others are every third time. Both are
	// spread, so that replicas do not sweep at once.
	sweepInterval = 10 * time.Second
	sweepSpread   = 2 * time.Second
	sweepOthers   = 3
	// inUse is how long ago a family was asked for at the most.
	inUse = time.Minute
	// resyncSpread keeps all replicas from sweeping in the same moment when they
	// have all lost the same connection.
	resyncSpread = time.Second
	// sweepBatch is how many stamps are read at once.
	sweepBatch = 500
	// sweepPatience is how many failures in a row end a sweep.
	sweepPatience = 3
	// whoHas is the word for a question: whoever knows the family compares.
	whoHas = "who"
)

func newSweeper(r *Redis) *sweeper {
	s := &sweeper{r: r, missed: make(chan struct{}, 1), wake: make(chan struct{}, 1), wanted: make(map[string]bool)}
	s.ctx, s.halt = context.WithCancel(context.Background())
	return s
}

func (s *sweeper) start() {
	s.done.Go(s.compareWanted)
	s.done.Go(s.sweepOnAndOn)
}

func (s *sweeper) stop() {
	s.halt()
	s.done.Wait()
}

// resync has everything compared soon.
func (s *sweeper) resync() { signal(s.missed) }

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // it was signalled already
	}
}

// hear takes note of a word from some replica: what happened, who says it, a
// generation, and the family.
func (s *sweeper) hear(message string) {
	words := strings.SplitN(message, " ", 4)
	if len(words) != 4 || strings.HasPrefix(words[1], s.r.origin) {
		return
	}
	word, family := words[0], words[3]
	// What is a job's concerns those who use it, and nobody else.
	if word != whoHas && !broker.IsJobFamily(family) || s.r.mirror.has(family) {
		s.add(family, word != whoHas)
	}
}

// want has the family compared.
func (s *sweeper) want(family string) { s.add(family, false) }

func (s *sweeper) add(family string, tell bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wanted[family] = s.wanted[family] || tell
	signal(s.wake)
}

func (s *sweeper) take() map[string]bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	taken := s.wanted
	s.wanted = make(map[string]bool)
	return taken
}

func (s *sweeper) compareWanted() {
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.wake:
		}
		for family, tell := range s.take() {
			if err := s.r.sync(s.ctx, family); err == nil && tell {
				s.r.announce(&broker.Change{Family: family})
			}
		}
	}
}

func (s *sweeper) sweepOnAndOn() {
	for n := 1; ; n++ {
		timer := time.NewTimer(sweepInterval - sweepSpread + rand.N(2*sweepSpread))
		within := inUse
		if n%sweepOthers == 0 {
			within = 0
		}
		select {
		case <-s.ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		case <-s.missed:
			within = 0
			timer.Reset(rand.N(resyncSpread))
			select {
			case <-s.ctx.Done():
				timer.Stop()
				return
			case <-timer.C:
			}
		}
		s.sweep(within)
	}
}

// sweep compares the families that were used within that time, or all if it is
// zero. What cannot be read, because a node is away, does not keep it from the
// rest.
func (s *sweeper) sweep(within time.Duration) {
	failures := 0
	names := s.r.mirror.sweepable(within)
	for len(names) > 0 {
		batch := names[:min(sweepBatch, len(names))]
		names = names[len(batch):]
		for i, head := range s.heads(batch) {
			if len(head) == 0 || !s.r.mirror.differs(batch[i], text(head[0])) {
				continue
			}
			if err := s.r.sync(s.ctx, batch[i]); err == nil {
				failures = 0
			} else if failures++; failures == sweepPatience {
				return
			}
		}
	}
	s.r.sweptTimes.Add(1)
}

// heads reads the stamps of families. One that could not be read has none.
func (s *sweeper) heads(families []string) [][]any {
	keys := make([]string, len(families))
	for i, family := range families {
		keys[i] = recordKey(family)
	}
	heads, _ := s.r.link.headers(s.ctx, keys, "c") // counted and logged there
	return heads
}

// syncRounds bounds how often a family is compared that others change meanwhile.
const syncRounds = 3

// sync compares a family with Redis. What Redis does not know is put back, in
// this order: drops, then the rest of the record, then tokens that were obtained
// without it.
func (r *Redis) sync(ctx context.Context, family string) error {
	for _, d := range r.mirror.lateDrops(family) {
		if _, err := r.drop(ctx, d); err != nil {
			return err
		}
	}
	for range syncRounds {
		stamp, registers := r.mirror.registers(family)
		answer, err := r.call(ctx, "reading the record of", lookScript, family, false,
			append([]any{"stamp", stamp, "only", ""}, registers...)...)
		if err != nil {
			return err
		}
		if answer.code == "SAME" {
			break
		}
		change, missing := r.mirror.read(family, answer, false)
		r.announce(change)
		if missing == nil {
			break
		}
		if err := r.seed(ctx, family, missing); err != nil {
			return err
		}
	}
	return r.restoreTokens(ctx, family)
}

// seed joins content into the record.
func (r *Redis) seed(ctx context.Context, family string, content fields) error {
	floor := r.mirror.floor(family)
	args := []any{"g", floor, "f", floor}
	for name, value := range content {
		args = append(args, name, value)
	}
	answer, err := r.call(ctx, "restoring the record of", seedScript, family, false, args...)
	if err != nil {
		return err
	}
	change, _ := r.mirror.read(family, answer, true)
	r.announce(change)
	if answer.before != answer.after {
		r.restoredRecords.Add(1)
		r.log.Info("record restored in Redis, which had lost it or something of it", "family", family)
	}
	return nil
}

// restoreTokens has Redis take in what was obtained without it.
func (r *Redis) restoreTokens(ctx context.Context, family string) error {
	for _, t := range r.mirror.lateTokens(family) {
		if t.Remaining > 0 {
			if err := r.restoreToken(ctx, family, t); err != nil {
				return err
			}
		}
		r.mirror.tokenDone(family, t)
	}
	return nil
}

func (r *Redis) restoreToken(ctx context.Context, family string, t lateToken) error {
	sealed, err := sealPayload(r.keyset.Load(), payload{Token: t.Access.Reveal(), Type: t.Type, Scopes: t.Scopes}, family, accessPlace(t.slot))
	if err != nil {
		return err
	}
	id := t.Access.ID()
	answer, err := r.call(ctx, "restoring a token of", restoreScript, family, false,
		"slot", t.slot, "id", id, "token", sealed, "left", t.Remaining.Milliseconds(), "life", t.Lifetime.Milliseconds(),
		"generation", int64(t.Generation))
	if err != nil {
		return err
	}
	r.took(family, answer)
	if answer.code == "DROPPED" {
		r.announce(&broker.Change{Family: family, Dropped: []string{id}})
	}
	return nil
}
