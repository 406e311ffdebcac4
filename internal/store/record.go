package store

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// A record is one Redis hash, "tb1:{FAMILY}", in clear but for what is sealed.
// Words within a field are separated by spaces, instants are milliseconds of
// Redis time, generations are what broker.Generation says.
//
// Its content is restored after a loss:
//
//	s:SLOT  generation, token id, + or -, obtained, ends, life, refused, early
//	a:SLOT  the sealed access token, while it is in service (+)
//	r       generation, refresh token id, + or -, rotates, start, ends, origin, dead, proof
//	rt      the sealed refresh token, while it is in service (+)
//	t:ID    a tombstone: the token with this id is out of service; forget it when
//	j:JOB   the job, or one slot of it, has ended: no token is for it; forget it when
//	d       the last drop of the grant: what is not newer is out of service
//	e       the failure: fence, kind, count, at, ends (0: never)
//	ec ek et  its code, its subject (a credential or a refresh token), its text
//	p       presentations: refresh token id, how many are in doubt, when the last
//	        began, turn; of the one under way the fence, horizon, owner (-: none)
//	ff      the highest fence whose failures say nothing any more
//	rs      the last reset
//
// The rest is about now:
//
//	v       the layout of the record, 1
//	c       a stamp that is never used for two contents
//	g f     the highest generation, the highest fence reserved
//	l       the lease: fence, ends, length, owner
//	w:ID    waits for its revocation: since, forget it when, kind, slot
//	x:ID    that token, sealed
//	q:ID    a refresh token that was found damaged, sealed
//	su      until when the refresh token may be an old one: it was put back
//	nc      nobody who was asked had a consent
//	do      the last drops
//	k       until when something in it matters
type fields map[string]string

const (
	layout    = "1"
	keyPrefix = "tb1:{"
	keySuffix = "}"
)

func recordKey(family string) string { return keyPrefix + family + keySuffix }

// mostTombstones of a record, and mostEnded jobs; those that are to be forgotten
// first go first.
const mostTombstones, mostEnded = 64, 4096

// pruneAfter is how long what has ended is kept.
const pruneAfter = 10 * 60 * 1000

func (f fields) number(name string) int64 {
	n, _ := strconv.ParseInt(f[name], 10, 64)
	return n
}

func (f fields) raise(name string, n int64) {
	if n > f.number(name) {
		f[name] = strconv.FormatInt(n, 10)
	}
}

// register is what a slot, or the consent, holds or held.
type register struct {
	generation int64
	id         string
	inService  bool
	rest       []string // the words after these
}

// register parses a field, and reports whether it is there: nothing is that is
// not newer than the last drop.
func (f fields) register(name string) (register, bool) {
	r, ok := parseRegister(f[name])
	return r, ok && r.isConsent() == (name == "r") && r.generation > f.number("d")
}

func parseRegister(value string) (register, bool) {
	words := strings.Fields(value)
	if len(words) != slotWords && len(words) != consentWords {
		return register{}, false
	}
	g, err := strconv.ParseInt(words[0], 10, 64)
	return register{generation: g, id: words[1], inService: words[2] == "+", rest: words[3:]}, err == nil
}

const slotWords, consentWords = 8, 9

func (r register) isConsent() bool { return len(r.rest) == consentWords-3 }

func (r register) number(i int) int64 {
	n, _ := strconv.ParseInt(r.rest[i], 10, 64)
	return n
}

// The words of a slot.
func (r register) obtained() int64 { return r.number(0) }
func (r register) ends() int64     { return r.number(1) }
func (r register) life() int64     { return r.number(2) }

// The words of a consent.
func (r register) rotates() string     { return r.rest[0] }
func (r register) start() int64        { return r.number(1) }
func (r register) consentEnds() int64  { return r.number(2) }
func (r register) origin() string      { return r.rest[3] }
func (r register) dead() int64         { return r.number(4) }
func (r register) proof() int64        { return r.number(5) }
func (r register) is(o register) bool  { return r.generation == o.generation && r.id == o.id }
func (r register) over(now int64) bool { return r.ends() <= now }

func (r register) String() string {
	state := "-"
	if r.inService {
		state = "+"
	}
	return fmt.Sprintf("%d %s %s %s", r.generation, r.id, state, strings.Join(r.rest, " "))
}

// slots returns the names of the fields that are slots.
func (f fields) slots() (names []string) {
	for name := range f {
		if strings.HasPrefix(name, "s:") {
			names = append(names, name)
		}
	}
	return names
}

func sealedField(name string) string {
	if name == "r" {
		return "rt"
	}
	return "a:" + strings.TrimPrefix(name, "s:")
}

// set makes r the register's value, with its sealed value if that is in service.
func (f fields) set(name string, r register, sealed string) {
	f[name] = r.String()
	if r.inService {
		f[sealedField(name)] = sealed
	} else {
		delete(f, sealedField(name))
	}
}

func (f fields) remove(name string) {
	delete(f, name)
	delete(f, sealedField(name))
}

// buried reports whether the token with this id is out of service.
func (f fields) buried(id string, now int64) bool { return f.number("t:"+id) > now }

func (f fields) bury(id string, until int64) { f.raise("t:"+id, until) }

// ended reports whether the slot's job has ended, or that one token of it.
func (f fields) ended(slot string, now int64) bool {
	job := broker.JobOf(slot)
	return job != "" && (f.number("j:"+job) > now || f.number("j:"+slot) > now)
}

// slotOf is the slot that a field of one is about.
func slotOf(name string) string { return strings.TrimPrefix(name, "s:") }

// failure of the content: its fence, and whether there is one that still stands.
func (f fields) failure(now int64) (fence int64, subject string, ok bool) {
	words := strings.Fields(f["e"])
	if len(words) != 5 {
		return 0, "", false
	}
	numbers := make([]int64, len(words))
	for i, w := range words {
		numbers[i], _ = strconv.ParseInt(w, 10, 64)
	}
	if words[1] == failureKinds[broker.Dead] {
		subject = f["ek"]
	}
	return numbers[0], subject, numbers[4] == 0 || numbers[4] > now
}

var failureFields = []string{"e", "ec", "ek", "et"}

// join takes in what another content knows. Joins commute, and repeating one
// changes nothing; seed.lua joins by the same rules.
func (f fields) join(other fields, now int64) {
	for _, floor := range []string{"d", "ff", "rs"} {
		f.raise(floor, other.number(floor))
	}
	f.raise("ff", f.number("d"))
	for name := range other {
		if strings.HasPrefix(name, "t:") || strings.HasPrefix(name, "j:") {
			f.raise(name, other.number(name))
		}
	}
	f.settle(now)
	for _, name := range append(other.slots(), "r") {
		f.joinRegister(name, other, now)
	}
	f.joinPresentations(other)
	f.joinFailure(other, now)
	f.prune(now)
}

// settle applies drops and tombstones to the registers.
func (f fields) settle(now int64) {
	for _, name := range append(f.slots(), "r") {
		r, ok := f.register(name)
		switch {
		case !ok, f.ended(slotOf(name), now):
			f.remove(name)
		case r.inService && f.buried(r.id, now):
			r.inService = false
			f.set(name, r, "")
		}
	}
}

func (f fields) joinRegister(name string, other fields, now int64) {
	isSlot := name != "r"
	theirs, ok := parseRegister(other[name])
	if !ok || theirs.isConsent() == isSlot || theirs.generation <= f.number("d") || isSlot && (theirs.over(now) || f.ended(slotOf(name), now)) {
		return
	}
	sealed, has := other[sealedField(name)]
	if theirs.inService && f.buried(theirs.id, now) {
		theirs.inService = false
	}
	ours, ok := f.register(name)
	switch {
	case ok && !isSlot && ours.is(theirs):
		f.set(name, ours.merged(theirs), f[sealedField(name)])
	case ok && !theirs.beats(ours, isSlot), theirs.inService && !has:
	default:
		f.set(name, theirs, sealed)
	}
}

// beats tells whether r wins over o. Between two of one generation, which a
// store that went back can have handed out twice, the id decides.
func (r register) beats(o register, isSlot bool) bool {
	switch {
	case r.generation != o.generation:
		return r.generation > o.generation
	case r.id != o.id:
		return r.id > o.id
	case !isSlot: // they are merged
		return false
	case r.inService != o.inService:
		return o.inService
	case r.obtained() != o.obtained():
		return r.obtained() > o.obtained()
	}
	return r.String() > o.String()
}

// merged is what two say of one refresh token.
func (r register) merged(o register) register {
	r.rest = slices.Clone(r.rest)
	known := []string{rotates[broker.RotatesUnknown], rotates[broker.RotatesNo], rotates[broker.RotatesYes]}
	if slices.Index(known, o.rotates()) > slices.Index(known, r.rotates()) {
		r.rest[0] = o.rotates()
	}
	if o.start() < r.start() {
		r.rest[1] = o.rest[1]
	}
	if o.consentEnds() > r.consentEnds() {
		r.rest[2] = o.rest[2]
	}
	r.rest[3] = max(r.origin(), o.origin())
	if o.dead() > r.dead() {
		r.rest[4] = o.rest[4]
	}
	if o.proof() > r.proof() {
		r.rest[5] = o.rest[5]
	}
	r.inService = r.inService && o.inService
	return r
}

// presentations in doubt of the refresh token in service.
func (f fields) presentations(of register) (count, at, turn int64) {
	words := strings.SplitN(f["p"], " ", 7)
	if len(words) != 7 || words[0] != of.id {
		return 0, 0, 0
	}
	numbers := register{rest: words[1:]}
	return numbers.number(0), numbers.number(1), numbers.number(2)
}

// joinPresentations keeps the latest word about the refresh token that won.
func (f fields) joinPresentations(other fields) {
	r, ok := f.register("r")
	if !ok || !r.inService {
		delete(f, "p")
		return
	}
	_, _, ours := f.presentations(r)
	if ours == 0 {
		delete(f, "p")
	}
	if _, _, theirs := other.presentations(r); theirs > ours || theirs == ours && other["p"] > f["p"] {
		f["p"] = other["p"]
	}
}

// joinFailure keeps the latest failure that still says something.
func (f fields) joinFailure(other fields, now int64) {
	consent, consented := f.register("r")
	void := func(of fields) (int64, bool) {
		fence, subject, ok := of.failure(now)
		about := subject == "" || consented && consent.inService && consent.id == subject
		return fence, !ok || !about || fence <= f.number("ff")
	}
	ours, none := void(f)
	if none {
		for _, name := range failureFields {
			delete(f, name)
		}
	}
	theirs, nothing := void(other)
	if nothing || !none && (theirs < ours || theirs == ours && other.whole() <= f.whole()) {
		return
	}
	for _, name := range failureFields {
		f[name] = other[name]
	}
}

// whole is the failure as one text.
func (f fields) whole() string {
	return strings.Join([]string{f["e"], f["ec"], f["ek"], f["et"]}, " ")
}

// prune forgets what is over.
func (f fields) prune(now int64) {
	f.pruneKind("t:", mostTombstones, now)
	f.pruneKind("j:", mostEnded, now)
	for _, name := range f.slots() {
		r, ok := f.register(name)
		if !ok || name != "s:" && r.ends()+pruneAfter <= now || f.ended(slotOf(name), now) {
			f.remove(name)
		}
	}
}

// pruneKind forgets the fields of a kind whose instant has come, and those that are
// to be forgotten first where there are too many.
func (f fields) pruneKind(kind string, most int, now int64) {
	type tombstone struct {
		name string
		ends int64
	}
	var left []tombstone
	for name := range f {
		if !strings.HasPrefix(name, kind) {
			continue
		}
		if ends := f.number(name); ends <= now {
			delete(f, name)
		} else {
			left = append(left, tombstone{name, ends})
		}
	}
	slices.SortFunc(left, func(a, b tombstone) int {
		if a.ends != b.ends {
			return int(max(-1, min(1, b.ends-a.ends)))
		}
		return strings.Compare(b.name, a.name)
	})
	for _, t := range left[min(most, len(left)):] {
		delete(f, t.name)
	}
}

// isContent tells what is restored after a loss from what is not.
func isContent(name string) bool {
	switch name {
	case "p", "r", "rt", "d", "ff", "rs", "e", "ec", "ek", "et":
		return true
	}
	return len(name) > 1 && name[1] == ':' && strings.Contains("satj", name[:1])
}

// knows reports whether nothing in other would change f.
func (f fields) knows(other fields, now int64) bool {
	as, joined := maps.Clone(f), maps.Clone(f)
	as.join(nil, now)
	joined.join(other, now)
	return maps.Equal(as, joined)
}

// What the words of a record are to the broker.
var (
	failureKinds = map[broker.FailureKind]string{
		broker.NoFailure: "none", broker.Transient: "transient", broker.Throttling: "throttled",
		broker.Rejection: "rejected", broker.Dead: "dead",
	}
	rotates = map[broker.Rotates]string{
		broker.RotatesUnknown: "unknown", broker.RotatesNo: "no", broker.RotatesYes: "yes",
	}
	outcomes = map[broker.Outcome]string{
		broker.OutcomeUnknown: "unknown", broker.Unsent: "unsent", broker.Answered: "answered",
	}
	consentUses = map[broker.ConsentUse]string{
		broker.NoConsent: "no", broker.ConsentPreferred: "preferred", broker.ConsentRequired: "required",
	}
)

func named[K comparable](names map[K]string, name string) (k K) {
	for k, n := range names {
		if n == name {
			return k
		}
	}
	return k
}

func span(ms int64) time.Duration { return time.Duration(ms) * time.Millisecond }

// dated is the token with what the record says of it.
func dated(t broker.StoredToken, r register, now int64) broker.StoredToken {
	t.Generation, t.Lifetime, t.Remaining = broker.Generation(r.generation), span(r.life()), max(span(r.ends()-now), 0)
	return t
}

// seenFailure is the failure in the fields as of now, or nil.
func seenFailure(f fields, now int64) *broker.Failure {
	words := strings.Fields(f["e"])
	if len(words) != 5 {
		return nil
	}
	count, _ := strconv.Atoi(words[2])
	at, _ := strconv.ParseInt(words[3], 10, 64)
	ends, _ := strconv.ParseInt(words[4], 10, 64)
	seen := &broker.Failure{
		Kind: named(failureKinds, words[1]), Code: f["ec"], Credential: f["ek"], Text: f["et"],
		Attempts: count, Age: span(now - at), Rest: broker.Forever,
	}
	if ends != 0 {
		seen.Rest = max(span(ends-now), 0)
	}
	return seen
}

// seenConsent is the consent in the fields as of now, without its refresh token,
// or nil if none is in service.
func seenConsent(f fields, now int64) *broker.Consent {
	r, ok := f.register("r")
	if !ok || !r.inService {
		return nil
	}
	seen := &broker.Consent{
		Generation: broker.Generation(r.generation), Rotates: named(rotates, r.rotates()),
		Age: span(now - r.start()), Remaining: broker.Forever, Dead: r.dead() > r.proof(),
	}
	if ends := r.consentEnds(); ends != 0 {
		seen.Remaining = span(ends - now)
	}
	if count, at, _ := f.presentations(r); count > 0 {
		seen.Presentations, seen.PresentedAge = int(count), span(now-at)
	}
	return seen
}

// seenRevocations tells whether something waits for its revocation, and how long.
func seenRevocations(f fields, now int64) (waits bool, since time.Duration) {
	for name, value := range f {
		words := strings.Fields(value)
		if !strings.HasPrefix(name, "w:") || len(words) < 2 {
			continue
		}
		at, _ := strconv.ParseInt(words[0], 10, 64)
		if until, _ := strconv.ParseInt(words[1], 10, 64); until > now {
			waits, since = true, max(since, span(now-at))
		}
	}
	return waits, since
}

// Sealed values are bound to their place by what Keyset calls a slot.
const refreshPlace = "refresh"

func accessPlace(slot string) string { return "access/" + slot }

// payload is what is sealed. Readers ignore what they do not know.
type payload struct {
	Token  string   `json:"token"`
	Type   string   `json:"type,omitempty"`
	Scopes []string `json:"scopes,omitempty"`
	// Account is beside a refresh token.
	Account broker.Account `json:"account,omitzero"`
}

func sealPayload(k *Keyset, p payload, family, place string) (string, error) {
	plain, err := json.Marshal(p)
	if err != nil {
		return "", fmt.Errorf("encoding a token of family %s: %w", family, err)
	}
	sealed, err := k.Seal(plain, family, place)
	return string(sealed), err
}

func openPayload(k *Keyset, sealed, family, place string) (p payload, err error) {
	plain, err := k.Open([]byte(sealed), family, place)
	if err != nil {
		return p, err
	}
	if err := json.Unmarshal(plain, &p); err != nil || p.Token == "" {
		return p, fmt.Errorf("opening a value of family %s: %w: what was sealed is no token", family, ErrCorrupt)
	}
	return p, nil
}
