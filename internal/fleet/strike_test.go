package fleet_test

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/faultproxy"
	"github.com/tokenbroker/tokenbroker/internal/fleet"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// What becomes of a consent when a replica is killed, or stands still, while it
// refreshes: everywhere between its first command to Redis and the last reply,
// by a seed. The endpoint and the record say what was presented and what was
// saved; the replicas are not believed.

// strikeMoments are where a refresh may be struck. Scripts and WAIT are told as
// the network to Redis has them: when the command, and when its reply has come
// so far. The others are stages at the endpoint.
var strikeMoments = []moment{
	"acquire sent", "acquire answered", "gate sent", "gate answered",
	"intend sent", "intend answered", "intend's WAIT sent", "intend's WAIT answered",
	moment(arrived), moment(decided), moment(halfway), moment(complete),
	"save sent", "save answered", "save's WAIT sent", "save's WAIT answered",
	"fail sent", "fail answered",
}

// strike is what happens to the replica that refreshes.
type strike struct {
	strict bool   // the server has no grace: a used refresh token that comes back ends the family
	at     moment // where the refresh is then
	// after so long. Without it, what has come so far waits until the replica is
	// struck.
	after time.Duration
	// pause of a replica that stands still; zero for one that is killed.
	pause time.Duration
	// lost tells that what waited is lost with the replica.
	lost bool
	// alone leaves it to the replica itself to go on, restarted if need be.
	alone bool
	// renewal has the token renewed before its end, instead of one for other
	// scopes obtained.
	renewal bool
	// warm has the other replica hold the token from before.
	warm bool
}

// drawStrike draws what is not given by the number of the run: that goes through
// all moments, with a signal each.
func drawStrike(seed uint64, number int, strict bool) strike {
	r := rand.New(rand.NewPCG(seed, uint64(number)))
	millis := func(from, to int) time.Duration { return time.Duration(from+r.IntN(to-from)) * time.Millisecond }
	s := strike{
		strict: strict, at: strikeMoments[number%len(strikeMoments)],
		lost: r.IntN(2) == 0, alone: r.IntN(2) == 0, renewal: r.IntN(4) == 0, warm: r.IntN(2) == 0,
	}
	if r.IntN(2) == 0 {
		s.after = time.Duration(1 + r.IntN(int(20*time.Millisecond)))
	}
	if (number+number/len(strikeMoments))%2 == 1 {
		// Shorter than a lease, than the horizon, longer than that.
		s.pause = []time.Duration{millis(100, 2500), millis(3100, 5500), millis(6500, 9000)}[r.IntN(3)]
	}
	s.lost = s.lost && s.after == 0 && s.pause == 0
	s.warm = s.warm && !s.alone && !s.renewal // it would renew the token itself
	return s
}

func (s strike) signal() string {
	if s.pause > 0 {
		return "SIGSTOP"
	}
	return "SIGKILL"
}

func (s strike) server() string {
	if s.strict {
		return "strict"
	}
	return "grace"
}

func (s strike) String() string {
	return fmt.Sprintf("%s server, %s %v after %q, pause %v, lost %v, alone %v, renewal %v, warm %v",
		s.server(), s.signal(), s.after, s.at, s.pause, s.lost, s.alone, s.renewal, s.warm)
}

// outcome is what came of a strike.
type outcome struct {
	strike
	phase phase
	// presentations of the refresh token that was under way.
	presentations int
	gone          bool          // the grant is
	since         time.Duration // from the server's decision to the strike
	open          time.Duration // from the server's decision to the save, undisturbed
}

// phase is where the refresh was when the strike had its effect, as the endpoint
// and Redis saw it.
type phase string

const (
	unsent   phase = "before the request"
	onTheWay phase = "request on its way"
	inHand   phase = "request at the server"
	unsaved  phase = "consumed, not saved"
	saved    phase = "saved"
	putOff   phase = "put off by the server"
)

// struck is a refresh that is struck.
type struck struct {
	strike
	f      *harness
	holder *replica
	key    string // of the record
	gone   bool   // the grant is

	mu    sync.Mutex // guards all below
	begun bool
	last  string               // transition that was sent last
	saves map[string]time.Time // when the refresh token with an id was saved
	// from and to are when the strike was dealt, and had its effect; again is
	// when the replica goes on.
	from, to, again time.Time
	done            chan struct{}
}

const (
	// struckTokenLife is the least that makes sense to a broker.
	struckTokenLife = 10 * time.Second
	// struckWithin is how long the fleet may take to decide. The horizon is 7 s.
	struckWithin = 50 * time.Second
)

// refreshAndStrike lets a fleet refresh, strikes, and judges.
func refreshAndStrike(t *testing.T, redis *testredis.Server, s strike) outcome {
	redis.Flush()
	replicas, grace := 2, []string{"    rotation: {grace: 1m}"}
	if s.alone {
		replicas = 1
	}
	if s.strict {
		grace = nil
	}
	f := newFleet(t, options{
		replicas: replicas, redis: redis, person: true, tokenLife: struckTokenLife,
		profile: []string{"    timeout: 2s"}, operator: grace,
		world: func(o *sandbox.Options) {
			if !s.strict {
				o.Clients[1].ReuseGrace = time.Minute
			}
		},
	})
	f.allow.requests, f.allow.upTo, f.allow.presentations = 12, true, 2
	k := &struck{strike: s, f: f, holder: f.replicas[0], saves: map[string]time.Time{}, done: make(chan struct{})}
	other := f.replicas[replicas-1]

	f.signIn(k.holder, other)
	first := k.decide(k.holder, personal, "")
	if s.warm {
		k.decide(other, personal, "")
	}
	k.watch()
	question := personal
	if !s.renewal {
		question = personalSubset
		go k.holder.quietly(question)
	}
	receive(f, fmt.Sprintf("the refresh comes to %q", s.at), k.done)
	k.again = k.from.Add(s.pause)
	switch {
	case s.pause > 0 && s.alone:
		time.Sleep(time.Until(k.again))
		k.holder.process.Continue()
	case s.pause > 0:
		resume := time.AfterFunc(time.Until(k.again), k.holder.process.Continue)
		defer resume.Stop()
	case s.alone:
		k.again = time.Now()
		k.holder.start()
	}
	k.decide(other, question, first.TokenID)
	k.decide(other, subset(operator, "permissions"), "")
	if s.pause > 0 && !s.alone {
		time.Sleep(time.Until(k.again))
		k.decide(k.holder, subset(operator, "global.wildcard"), "")
	}
	return k.judge()
}

// quietly asks without telling the checks: the answer may have been made before
// the replica stood still.
func (r *replica) quietly(q fleet.Question) {
	fleet.Ask(r.f.t.Context(), r.conn, r.index, q)
}

// decide asks until there is a token other than the old one, or the grant is
// gone.
func (k *struck) decide(r *replica, q fleet.Question, old string) (a fleet.Answer) {
	k.f.t.Helper()
	k.f.await("the fleet has decided", struckWithin, func() bool {
		a = r.ask(q)
		k.gone = k.gone || a.Reason == "AUTHORIZATION_REQUIRED"
		return a.OK() && a.TokenID != old || k.gone
	})
	return a
}

// watch has the strike come when the refresh is where it shall be.
func (k *struck) watch() {
	for key, record := range k.f.records() {
		if record["r"] != "" {
			k.key = key
		}
	}
	if strings.HasPrefix(string(k.at), "fail") {
		k.fault(sandbox.Fault{Grant: "refresh_token", Status: http.StatusServiceUnavailable})
	}
	for _, r := range k.f.replicas {
		r.redis.Set(faultproxy.Faults{
			CutRequest: func(c faultproxy.Command) bool { return r == k.holder && k.reach(k.sent(c)+" sent") },
			CutReply: func(c faultproxy.Command) bool {
				k.executed(c)
				return r == k.holder && k.reach(k.name(c)+" answered")
			},
		})
	}
	k.f.endpoint.onStage(func(r *request, s stage) {
		if r.grant != "refresh_token" {
			return
		}
		if s == arrived {
			k.wantRecorded(r)
		}
		if r.replica == k.holder.index && k.reach(moment(s)) && s == arrived { // the server has seen the client leave
			k.fault(sandbox.Fault{Grant: "refresh_token", Cut: sandbox.CutBefore})
		}
	})
}

func (k *struck) fault(f sandbox.Fault) {
	if err := k.f.endpoint.Fault(f); err != nil {
		k.f.t.Error(err)
	}
}

// reach strikes if this is the moment, and reports whether what came to it is
// lost.
func (k *struck) reach(m moment) (lost bool) {
	k.mu.Lock()
	now := m == k.at && !k.begun
	k.begun = k.begun || now
	k.mu.Unlock()
	switch {
	case !now:
		return false
	case k.after > 0 || m == moment(complete): // of which the last byte leaves when this returns
		time.AfterFunc(k.after, k.hit)
		return false
	}
	k.hit()
	return k.lost
}

func (k *struck) hit() {
	k.from = time.Now()
	if k.pause > 0 {
		k.holder.process.Pause()
	} else {
		k.holder.kill()
	}
	k.to = time.Now()
	close(k.done)
}

// name of a command of the refresh.
func (k *struck) name(c faultproxy.Command) moment {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case c.Name == "wait":
		return moment(k.last + "'s WAIT")
	case !isScript(c):
		return ""
	case c.Args[2] != k.key:
		return "gate"
	case acquires(c):
		return "acquire"
	case intends(c):
		return "intend"
	case saves(c):
		return "save"
	case transition("outcome")(c):
		return "fail"
	}
	return ""
}

// sent is name of a command that is sent now.
func (k *struck) sent(c faultproxy.Command) moment {
	m := k.name(c)
	if m == "intend" || m == "save" {
		k.mu.Lock()
		k.last = string(m)
		k.mu.Unlock()
	}
	return m
}

// executed notes what Redis has saved.
func (k *struck) executed(c faultproxy.Command) {
	if k.name(c) != "save" {
		return
	}
	at := slices.Index(c.Args, "refresh")
	k.mu.Lock()
	defer k.mu.Unlock()
	if id := c.Args[at+1]; k.saves[id].IsZero() {
		k.saves[id] = time.Now()
	}
}

// wantRecorded: the record has known of each presentation before it came.
func (k *struck) wantRecorded(r *request) {
	presented, recorded := len(k.presentations(r.refresh)), 0
	for _, record := range k.f.records() {
		if w := strings.Fields(record["p"]); len(w) > 1 && w[0] == r.refresh {
			recorded, _ = strconv.Atoi(w[1])
		}
	}
	if recorded < presented || recorded > 2 {
		k.f.t.Errorf("refresh token %s is presented for the %d. time, and the record knows of %d", r.refresh, presented, recorded)
	}
}

// presentations of a refresh token that the server has not put off.
func (k *struck) presentations(id string) (all []request) {
	for _, r := range k.f.endpoint.seen() {
		if r.refresh == id && r.status != http.StatusServiceUnavailable {
			all = append(all, r)
		}
	}
	return all
}

// judge says what came of it, and whether that may be.
func (k *struck) judge() outcome {
	o := outcome{strike: k.strike, phase: unsent, gone: k.gone}
	var under []request // presentations of the refresh token that was under way
	for _, r := range k.f.endpoint.seen() {
		if r.refresh == "" {
			continue
		}
		presented := k.presentations(r.refresh)
		if at := k.savedAt(r); r.next != "" && !at.IsZero() && r.replica != k.holder.index {
			o.open = max(o.open, at.Sub(r.decided))
		}
		if under == nil {
			under = presented
			o.phase, o.presentations = k.phase(r), len(presented)
		} else if r.refresh != under[0].refresh && len(presented) > 1 {
			k.f.t.Errorf("refresh token %s, which was not under way, was presented %d times", r.refresh, len(presented))
		}
	}
	if !o.gone {
		return o
	}
	if !k.strict {
		k.f.t.Errorf("the grant is lost at a server with a grace")
		return o
	}
	if len(under) != 2 || under[0].replica != k.holder.index || under[0].status != http.StatusOK || under[1].code != "invalid_grant" {
		k.f.t.Errorf("the grant is lost, and not because an answer was: %+v", under)
		return o
	}
	o.since = k.from.Sub(under[0].decided)
	if at := k.savedAt(under[0]); !at.IsZero() && at.Before(under[1].arrived) {
		k.f.t.Errorf("the grant is lost although the answer was saved %v before the second presentation", under[1].arrived.Sub(at))
	}
	if o.phase == unsent || o.phase == saved {
		k.f.t.Errorf("the grant is lost to a strike %s", o.phase)
	}
	return o
}

// savedAt is when what a request brought was in the record, if it was.
func (k *struck) savedAt(r request) time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.saves[r.next]
}

// phase is where a request was when the strike came.
func (k *struck) phase(r request) phase {
	used := slices.ContainsFunc(k.f.endpoint.seen(), func(later request) bool { return r.next != "" && later.refresh == r.next })
	savedAt := k.savedAt(r)
	switch {
	case r.replica != k.holder.index || r.arrived.After(k.again) && k.again.After(k.from):
		return unsent
	case r.status == http.StatusServiceUnavailable:
		return putOff
	case k.from.Before(r.arrived):
		return onTheWay
	case r.decided.IsZero() || k.from.Before(r.decided):
		return inHand
	case k.pause == 0 && used, !savedAt.IsZero() && savedAt.Before(k.to):
		return saved
	}
	return unsaved
}

// strikeOften makes so many runs of each kind, as many at a time as flights, and
// returns their outcomes.
func strikeOften(t *testing.T, seed uint64, runs, flights int) []outcome {
	type run struct {
		strict bool
		number int
	}
	queue := make(chan run, 2*runs)
	for i := range runs {
		queue <- run{false, i}
		queue <- run{true, i}
	}
	close(queue)
	var (
		lines sync.WaitGroup
		mu    sync.Mutex
		all   []outcome
	)
	for range flights {
		redis := testredis.Start(t, testredis.Options{})
		_, port, _ := strings.Cut(redis.Address(), ":")
		testredis.Start(t, testredis.Options{Config: []string{"replicaof 127.0.0.1 " + port}})
		lines.Go(func() {
			for r := range queue {
				s := drawStrike(seed, r.number, r.strict)
				t.Run(fmt.Sprintf("%s/%d", s.server(), r.number), func(t *testing.T) {
					t.Logf("seed %d: %v", seed, s)
					o := refreshAndStrike(t, redis, s)
					mu.Lock()
					defer mu.Unlock()
					all = append(all, o)
				})
			}
		})
	}
	lines.Wait()
	return all
}

// A replica that refreshes is killed, or stands still, at each moment. "make
// kills" makes many more runs.
func TestReplicaIsStruckDuringARefresh(t *testing.T) {
	strikeOften(t, rand.Uint64(), 20, 20)
}
