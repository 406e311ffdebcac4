package store

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
)

// past is a record that lived through much: it was saved to, dropped from, and
// Redis went back in time, while mirrors looked at it now and then.
type past struct {
	t       *testing.T
	r       *Redis
	server  *testredis.Server
	rng     *rand.Rand
	family  string
	mirrors []fields
	// backups are whole records as they were.
	backups []fields
	tokens  int
	trail   []string
}

func (p *past) note(format string, args ...any) {
	p.trail = append(p.trail, fmt.Sprintf(format, args...))
}

func (p *past) call(s *script, args ...any) reply {
	p.t.Helper()
	answer, err := p.r.call(p.t.Context(), "testing", s, p.family, false, args...)
	if err != nil {
		p.t.Fatal(err)
	}
	return answer
}

// record is the content as Redis has it, and the time there.
func (p *past) record() (fields, int64) {
	answer := p.call(lookScript, "stamp", "", "only", "")
	maps.DeleteFunc(answer.out, func(name, _ string) bool { return !isContent(name) })
	return answer.out, answer.now
}

// backup is the whole hash.
func (p *past) backup() fields {
	all, f := p.server.Do("HGETALL", recordKey(p.family)).([]any), fields{}
	for i := 0; i < len(all); i += 2 {
		f[all[i].(string)] = all[i+1].(string)
	}
	return f
}

func (p *past) goBackTo(f fields) {
	p.server.Do("DEL", recordKey(p.family))
	if len(f) > 0 {
		args := []any{"HSET", recordKey(p.family)}
		for name, value := range f {
			args = append(args, name, value)
		}
		p.server.Do(args...)
	}
}

func (p *past) lease() broker.Lease {
	p.tokens++
	owner := fmt.Sprint("owner", p.tokens)
	answer := p.call(acquireScript, "owner", owner, "length", 3000, "floor", 0, "slot", "", "life", 0, "newer", 1<<60,
		"reported", "", "credentials", "", "consent", "no", "asked", "0", "settling", 0, "again", "0", "absent", "")
	if answer.code != "GRANTED" {
		p.r.offset.Add(4000)
		return p.lease()
	}
	return broker.Lease{Family: p.family, Owner: owner, Fence: broker.Generation(answer.out.number("fence")), Length: 3 * time.Second}
}

func (p *past) name(kind string) broker.Secret {
	p.tokens++
	return broker.NewSecret(fmt.Sprint(kind, p.tokens))
}

func (p *past) step() {
	slot := []string{"", "b", "c"}[p.rng.IntN(3)]
	r, _ := p.record()
	current, consented := r.register("r")
	consented = consented && current.inService
	switch p.rng.IntN(12) {
	case 0, 1, 2: // a grant anew, or a refresh
		s := broker.Result{Slot: slot, Token: broker.StoredToken{Access: p.name("token"), Lifetime: time.Hour, Remaining: time.Hour}}
		if p.rng.IntN(2) == 0 {
			s.Refresh = p.name("refresh")
		}
		if consented && p.rng.IntN(3) > 0 {
			s.Spent, s.Rotates = current.id, broker.RotatesYes
			if s.Refresh.IsEmpty() {
				s.Rotates = broker.RotatesNo
			}
		}
		s.Supersede = p.rng.IntN(6) == 0
		answer, err := p.r.save(p.t.Context(), p.lease(), s, known{})
		if err != nil {
			p.t.Fatal(err)
		}
		p.note("save %s in %q, refresh %s, spent %s: %s", s.Token.Access.ID(), slot, s.Refresh.ID(), s.Spent, answer.code)
	case 3: // a failure
		l := p.lease()
		kind, subject := "rejected", "secret"
		if consented && p.rng.IntN(2) == 0 {
			kind, subject = "dead", current.id
		}
		answer := p.call(failScript, "owner", l.Owner, "fence", int64(l.Fence), "kind", kind, "code", "", "subject", subject,
			"text", "", "rest", "forever", "jitter", 1, "outcome", "unknown")
		p.note("fail %s: %s", kind, answer.code)
	case 4: // a presentation
		if consented {
			l := p.lease()
			answer := p.call(intendScript, "owner", l.Owner, "fence", int64(l.Fence), "refresh", current.id, "horizon", 1, "most", 5)
			p.note("intend: %s", answer.code)
		}
	case 5: // the drop of a token, or of all
		id := ""
		if s, ok := r.register("s:" + slot); ok && p.rng.IntN(4) > 0 {
			id = s.id
		}
		p.tokens++
		p.call(dropScript, "operation", fmt.Sprint("drop", p.tokens), "token", id, "remember", 3_600_000, "floor", 0, "age", 0)
		p.note("drop %q", id)
	case 6:
		p.call(resetScript)
		p.note("reset")
	case 7: // it is lost, or goes back
		p.backups = append(p.backups, nil)
		i := p.rng.IntN(len(p.backups))
		p.goBackTo(p.backups[i])
		p.note("back to backup %d", i)
	case 8:
		p.backups = append(p.backups, p.backup())
		p.note("backup %d", len(p.backups)-1)
	default: // somebody looks
		i := p.rng.IntN(len(p.mirrors))
		content, now := p.record()
		p.mirrors[i].join(content, now)
		p.note("mirror %d looks", i)
	}
}

// seedAll begins with a record and seeds the mirrors in that order, twice: what
// is said of a refresh token counts once it is known which one has won.
func (p *past) seedAll(begin fields, order []int) fields {
	p.goBackTo(begin)
	for range 2 {
		for _, i := range order {
			args := []any{"g", 0, "f", 0}
			for name, value := range p.mirrors[i] {
				args = append(args, name, value)
			}
			p.call(seedScript, args...)
		}
	}
	content, _ := p.record()
	return content
}

// The join of what mirrors know is the same in any order, in Redis and in Go. It
// is the newest of what any of them knew, and nothing that was dropped returns.
func TestSeedsJoinInAnyOrder(t *testing.T) {
	server, k := testredis.Start(t, testredis.Options{}), testKeyset(t)
	r := replica(t, server.Address(), k)
	for n := range 150 {
		seed := rand.Uint64()
		p := &past{t: t, r: r, server: server, rng: rand.New(rand.NewPCG(seed, 0)), family: fmt.Sprint("family", n), mirrors: []fields{{}, {}, {}}}
		for range 40 {
			p.step()
		}
		var begin fields
		if len(p.backups) > 0 && p.rng.IntN(2) == 0 {
			begin = p.backups[p.rng.IntN(len(p.backups))]
		}
		p.goBackTo(begin)
		first, now := p.record()
		orders := [][]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}}
		var want fields
		for _, order := range orders {
			got := p.seedAll(begin, order)
			if want == nil {
				want = got
			}
			inGo := maps.Clone(first)
			for range 2 {
				for _, i := range order {
					inGo.join(p.mirrors[i], now)
				}
			}
			inGo.join(nil, now)
			if !maps.Equal(got, want) || !maps.Equal(inGo, want) {
				t.Fatalf("seed %d\n%s\nfrom %v\norder %v\nmirrors\n%v\nmakes\n%v\nin Go\n%v\nand before\n%v",
					seed, strings.Join(p.trail, "\n"), show(first), order, show(p.mirrors...), show(got), show(inGo), show(want))
			}
		}
		p.judge(seed, append(p.mirrors, first), want, now)
	}
}

// judge compares the join with what went into it.
func (p *past) judge(seed uint64, parts []fields, joined fields, now int64) {
	for _, part := range parts {
		for _, name := range append(joined.slots(), "r") {
			got, ok := joined.register(name)
			if !ok || !got.inService {
				continue
			}
			if part.buried(got.id, now) || got.generation <= part.number("d") {
				p.t.Fatalf("seed %d\n%s\n%s came back in %s", seed, strings.Join(p.trail, "\n"), got.id, name)
			}
			if known, ok := part.register(name); ok && known.generation > got.generation && !(name != "r" && known.over(now)) {
				p.t.Fatalf("seed %d\n%s\n%s has %v, and %v was known", seed, strings.Join(p.trail, "\n"), name, got, known)
			}
		}
	}
}

func show(all ...fields) string {
	var b strings.Builder
	for _, f := range all {
		for _, name := range slices.Sorted(maps.Keys(f)) {
			value := f[name]
			if name == "rt" || strings.HasPrefix(name, "a:") {
				value = fmt.Sprint(len(value), " bytes ending ", value[len(value)-2:])
			}
			fmt.Fprintf(&b, "  %s = %q\n", name, value)
		}
		b.WriteString("  --\n")
	}
	return b.String()
}
