package store

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// mirror is what this process last read or wrote of each family that it uses:
// sealed values as they are, generations, tombstones, failures. Redis may lose
// what it acknowledged, or go back in time; what the mirror has is then joined
// back. A mirror only ever grows by joins, so the order in which replies come in
// does not matter, and an older truth changes nothing.
//
// It also keeps what Redis has not taken in yet.
type mirror struct {
	// clock is this machine's, which a test may move.
	clock func() time.Time

	mu       sync.Mutex
	families map[string]*mirrored
	// redisTime is what Redis said last, at the instant heard.
	redisTime int64
	heard     time.Time
}

// mirrored is one family.
type mirrored struct {
	content fields
	// stamp of the record in Redis that has this very content: empty is no
	// record, unsure is none that is known to.
	stamp string
	// highest generation and fence seen, and the generation that subscribers
	// were told of.
	highest, announced int64
	// told are the dropped ids that subscribers were told of.
	told map[string]bool
	used time.Time

	// drops that Redis has not confirmed, oldest first.
	drops []lateDrop
	// tokens that were obtained without the store, oldest first, one per slot.
	tokens []lateToken
}

// unsure is the stamp of no record.
const unsure = "?"

func newMirror(clock func() time.Time) *mirror {
	return &mirror{clock: clock, families: make(map[string]*mirrored)}
}

// known is what a call says of a family that it is about.
type known struct {
	// floor is the highest generation seen.
	floor int64
	// late tells that Redis has yet to take in a drop or a token.
	late bool
	// consent is its register.
	consent string
}

// use notes that the family is in use.
func (m *mirror) use(family string) known {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.family(family)
	f.used = m.clock()
	return known{floor: f.highest, late: len(f.drops) > 0, consent: f.content["r"]}
}

// family returns what is known of it. m.mu is held.
func (m *mirror) family(name string) *mirrored {
	f := m.families[name]
	if f == nil {
		f = &mirrored{content: fields{}, told: make(map[string]bool)}
		m.families[name] = f
	}
	return f
}

// wrote takes in the reply of a transition of this process's own. It returns the
// change to announce, or nil, and whether the mirror now has what Redis has.
func (m *mirror) wrote(family string, r reply) (change *broker.Change, agrees bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.family(family)
	agrees = r.before == f.stamp || r.after == f.stamp
	news := r.before != r.after && r.after != f.stamp // a word of it may have been quicker
	change = m.learn(family, r, r.delta, news, true)
	if agrees {
		f.stamp = r.after
	}
	return change, agrees
}

// read takes in the record as Redis has it. It returns the change to announce, or
// nil, and what to put back into Redis, or nil if it has all that is known here.
// tried tells that this was done just now: what Redis has not taken, it will not.
func (m *mirror) read(family string, r reply, tried bool) (change *broker.Change, missing fields) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.family(family)
	view := fields{}
	for name, value := range r.out {
		if isContent(name) {
			view[name] = value
		}
	}
	for _, name := range append(view.slots(), "r") { // sealed values that Redis need not send
		if value := view[name]; value != "" && value == f.content[name] {
			if sealed, ok := f.content[sealedField(name)]; ok {
				view[sealedField(name)] = sealed
			}
		}
	}
	if !tried && !view.knows(f.content, r.now) {
		missing = maps.Clone(f.content)
	}
	change = m.learn(family, r, view, r.after != f.stamp, false)
	if missing == nil {
		f.stamp = r.after
	}
	if f.used.IsZero() && len(f.content)+len(f.drops)+len(f.tokens) == 0 { // there was but a word of it
		delete(m.families, family)
	}
	return change, missing
}

// learn joins what came from Redis into the mirror, and returns what subscribers
// may want to hear, or nil if there is no news. m.mu is held.
func (m *mirror) learn(family string, r reply, came fields, news, own bool) *broker.Change {
	m.redisTime, m.heard = r.now, m.clock()
	f := m.family(family)
	f.highest = max(f.highest, r.generation, r.fence)
	if len(came) == 0 && !news {
		return nil
	}
	before := maps.Clone(f.content)
	f.content.join(came, r.now)
	if !news {
		return nil
	}
	change := &broker.Change{Family: family, Dropped: f.dropped(before, came), Ended: f.newlyEnded(before), Slots: f.changedSlots(before)}
	if r.generation > f.announced {
		f.announced = r.generation
		change.Generation = broker.Generation(r.generation)
	}
	if own || len(before) > 0 { // or it may be long ago
		change.Reset = f.content.number("rs") > before.number("rs")
	}
	return change
}

// dropped returns the ids of access tokens that Redis says are out of service,
// each once.
func (f *mirrored) dropped(before, came fields) (ids []string) {
	tell := func(id string) {
		if !f.told[id] {
			f.told[id] = true
			ids = append(ids, id)
		}
	}
	for id := range f.told {
		if _, ok := f.content["t:"+id]; !ok && came["t:"+id] == "" {
			delete(f.told, id)
		}
	}
	refresh, _ := parseRegister(before["r"])
	for name := range came {
		id, ok := strings.CutPrefix(name, "t:")
		if ok && id != refresh.id && (refresh.rest == nil || id != refresh.origin()) {
			tell(id)
		}
	}
	for _, name := range before.slots() { // that a drop of the grant has swept away
		r, ok := parseRegister(before[name])
		_, kept := f.content[name]
		if ok && r.inService && (r.generation <= f.content.number("d") || !kept && f.endedJob(slotOf(name))) {
			tell(r.id)
		}
	}
	slices.Sort(ids)
	return ids
}

// endedJob reports whether the content says that the slot's job has ended.
func (f *mirrored) endedJob(slot string) bool { return f.content.ended(slot, 0) }

// newlyEnded are the jobs, and the slots of jobs, that had not ended before.
func (f *mirrored) newlyEnded(before fields) (ended []string) {
	for name := range f.content {
		if job, ok := strings.CutPrefix(name, "j:"); ok && before[name] == "" {
			ended = append(ended, job)
		}
	}
	slices.Sort(ended)
	return ended
}

// changedSlots are those whose registers are not what they were.
func (f *mirrored) changedSlots(before fields) []string {
	changed := []string{} // known to be none
	for _, name := range f.content.slots() {
		if f.content[name] != before[name] {
			changed = append(changed, slotOf(name))
		}
	}
	for _, name := range before.slots() {
		if _, kept := f.content[name]; !kept {
			changed = append(changed, slotOf(name))
		}
	}
	return changed
}

// ended reports whether no token is for the slot any more, whatever Redis says.
func (m *mirror) ended(family, slot string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.families[family]
	return f != nil && f.content.ended(slot, m.now())
}

// buried reports whether the token with this id must not be served, whatever
// Redis says.
func (m *mirror) buried(family, id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.families[family]
	return f != nil && f.content.buried(id, m.now())
}

// now is Redis time, as far as this process knows it. m.mu is held.
func (m *mirror) now() int64 {
	now := m.clock()
	if m.heard.IsZero() {
		return now.UnixMilli()
	}
	return m.redisTime + now.Sub(m.heard).Milliseconds()
}

// has reports whether there is a mirror of the family.
func (m *mirror) has(family string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.families[family] != nil
}

// registers of a family, for a reader that tells what it knows.
func (m *mirror) registers(family string) (stamp string, registers []any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.family(family)
	for _, name := range append(f.content.slots(), "r") {
		if value, ok := f.content[name]; ok {
			registers = append(registers, name, value)
		}
	}
	return f.stamp, registers
}

// agrees reports whether the mirror has the record that was read.
func (m *mirror) agrees(family string, r reply) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.family(family).stamp == r.after
}

// floor is the highest generation of the family that was seen.
func (m *mirror) floor(family string) int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.family(family).highest
}

// doubt says that nobody knows what became of a transition.
func (m *mirror) doubt(family string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.family(family).stamp = unsure
}

// forget drops a sealed refresh token that was found damaged.
func (m *mirror) forget(family, sealed string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f := m.family(family); f.content["rt"] == sealed {
		f.content.remove("r")
	}
}

// idleAfter is for how long a family is kept that nobody uses and that holds
// nothing.
const idleAfter = time.Hour

// jobIdleAfter is the same for what is a job's: nobody comes back to it.
const jobIdleAfter = time.Minute

// sweepable lists the families to look after, those with a consent first: all,
// or only those used within a time and those with a token that somebody's memory
// may serve. It forgets those that hold nothing.
func (m *mirror) sweepable(within time.Duration) (names []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now, redisNow := m.clock(), m.now()
	consented := func(name string) bool { return m.families[name].content["r"] != "" }
	for name, f := range m.families {
		switch idle := now.Sub(f.used); {
		case (idle > idleAfter || idle > jobIdleAfter && broker.IsJobFamily(name)) && f.empty(redisNow):
			delete(m.families, name)
		case within == 0 || idle <= within || f.serves(redisNow):
			names = append(names, name)
		}
	}
	slices.SortFunc(names, func(a, b string) int {
		switch {
		case consented(a) == consented(b):
			return strings.Compare(a, b)
		case consented(a):
			return -1
		}
		return 1
	})
	return names
}

// serves reports whether the family has an access token that is not over.
func (f *mirrored) serves(now int64) bool {
	for _, name := range f.content.slots() {
		if r, ok := f.content.register(name); ok && r.inService && !r.over(now) {
			return true
		}
	}
	return false
}

// empty reports whether nothing would be lost by forgetting the family.
func (f *mirrored) empty(now int64) bool {
	if len(f.drops)+len(f.tokens) > 0 {
		return false
	}
	f.content.prune(now)
	for name := range f.content {
		switch {
		case name == "r", strings.HasPrefix(name, "t:"), strings.HasPrefix(name, "j:"):
			return false
		case strings.HasPrefix(name, "s:"):
			if r, ok := f.content.register(name); ok && !r.over(now) {
				return false
			}
		}
	}
	_, _, stands := f.content.failure(now)
	return !stands
}

// differs reports whether a family must be compared with a record that has this
// stamp.
func (m *mirror) differs(family, stamp string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.families[family]
	return f != nil && (f.stamp != stamp || len(f.drops)+len(f.tokens) > 0)
}

// size is how many families are kept.
func (m *mirror) size() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.families)
}
