package fleet_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"google.golang.org/genproto/googleapis/rpc/errdetails"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// askJob asks on behalf of a job, and comes back when it is told to, as clients do.
func (r *replica) askJob(ctx context.Context, job *pb.Job) (*pb.IssueTokenResponse, int, error) {
	for tries := 1; ; tries++ {
		out, err := pb.NewTokenBrokerClient(r.conn).IssueToken(ctx, &pb.IssueTokenRequest{Profile: invoices, Job: job})
		wait, ok := comeBack(err)
		if err == nil || !ok || ctx.Err() != nil {
			return out, tries, err
		}
		time.Sleep(wait)
	}
}

// comeBack is when to ask again, if that helps.
func comeBack(err error) (time.Duration, bool) {
	s := status.Convert(err)
	for _, d := range s.Details() {
		if retry, ok := d.(*errdetails.RetryInfo); ok {
			return retry.GetRetryDelay().AsDuration(), true
		}
	}
	return 100 * time.Millisecond, s.Code() == codes.Unavailable // no replica was there
}

// reasonOf is the reason that an error gives.
func reasonOf(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

// owners are who got which token.
type owners struct {
	mu     sync.Mutex
	token  map[string]string // by owner
	owner  map[string]string // by token
	source map[pb.Source]int
	again  int
}

func (o *owners) note(t testing.TB, who string, out *pb.IssueTokenResponse, tries int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	id := out.GetToken().GetId()
	if had := o.token[who]; had != "" && had != id {
		t.Errorf("%s has two tokens: %s and %s", who, had, id)
	}
	if other := o.owner[id]; other != "" && other != who {
		t.Errorf("%s and %s have one token: %s", who, other, id)
	}
	o.token[who], o.owner[id] = id, who
	o.source[out.GetSource()]++
	o.again += tries - 1
}

func TestTenThousandJobs(t *testing.T) {
	f := newFleet(t, options{logLevel: "info"})
	f.allow.requests = workers/2 + 1
	seen := owners{token: map[string]string{}, owner: map[string]string{}, source: map[pb.Source]int{}}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	all := func(ask func(i int, r *replica), replicasEach int) time.Duration {
		t.Helper()
		began := time.Now()
		var wg sync.WaitGroup
		for i := range workers {
			first := rand.IntN(len(f.replicas))
			for n := range replicasEach {
				wg.Go(func() { ask(i, f.replicas[(first+n)%len(f.replicas)]) })
			}
		}
		wg.Wait()
		return time.Since(began)
	}
	dedicated := func(i int) bool { return i%2 == 0 }
	name := func(i int) string { return fmt.Sprint("job-", i) }
	ask := func(i int, r *replica) {
		out, tries, err := r.askJob(ctx, &pb.Job{Id: name(i), Dedicated: dedicated(i)})
		if err != nil {
			t.Errorf("job %d on replica %d: %v", i, r.index, err)
			return
		}
		who := "all others"
		if dedicated(i) {
			who = name(i)
		}
		seen.note(t, who, out, tries)
	}
	took := all(ask, 2)
	t.Logf("%d jobs, half of them dedicated, each on two of 3 replicas at once: %v; %d token requests; %d told to come back; answers by source: %v",
		workers, took.Round(time.Millisecond), f.endpoint.Calls().Total, seen.again, seen.source)

	// A replica that crashes knows them again from what the others share.
	f.replicas[2].kill()
	f.replicas[2].start()
	seen.source = map[pb.Source]int{}
	took = all(func(i int, _ *replica) { ask(i, f.replicas[2]) }, 1)
	t.Logf("all of them again on a replica that was killed: %v; %d token requests; answers by source: %v",
		took.Round(time.Millisecond), f.endpoint.Calls().Total, seen.source)
	if len(seen.token) != workers/2+1 {
		t.Errorf("%d tokens, want %d", len(seen.token), workers/2+1)
	}

	const memory = `
		local job, owner, n, m = 0, 0, 0, 0
		for _, key in ipairs(redis.call('KEYS', 'tb1:{job.*')) do n, job = n + 1, job + redis.call('MEMORY', 'USAGE', key) end
		for _, key in ipairs(redis.call('KEYS', 'tb1:owner:*')) do m, owner = m + 1, owner + redis.call('MEMORY', 'USAGE', key) end
		return {math.floor(job / n), math.floor(owner / m)}`
	t.Logf("bytes in Redis for a job, and for whose its token is: %v", f.redis.Do("EVAL", memory, "0"))

	// All end, each on a replica of its own.
	took = all(func(i int, r *replica) {
		if !dedicated(i) {
			return
		}
		out, err := pb.NewTokenBrokerClient(r.conn).RevokeToken(ctx, &pb.RevokeTokenRequest{Profile: invoices, Job: &pb.Job{Id: name(i), Dedicated: true}})
		if err != nil || out.GetOutcome() != pb.RevocationOutcome_REVOCATION_OUTCOME_CONFIRMED || out.GetTokenId() != seen.token[name(i)] {
			t.Errorf("ending job %d: %v, %v", i, out, err)
		}
	}, 1)
	t.Logf("all dedicated ones revoked: %v; the endpoint revoked %v", took.Round(time.Millisecond), f.endpoint.Calls().Revocations)
	for range 200 {
		i, r := 2*rand.IntN(workers/2), f.replicas[rand.IntN(3)]
		f.await("the end of a job is known everywhere", 5*time.Second, func() bool {
			_, err := pb.NewTokenBrokerClient(r.conn).IssueToken(ctx, &pb.IssueTokenRequest{Profile: invoices, Job: &pb.Job{Id: name(i), Dedicated: true}})
			return reasonOf(err) == "JOB_ENDED"
		})
	}
	f.wantNoJobsAfter(t, time.Hour)
}

// wantNoJobsAfter wants Redis to forget what is left of jobs by itself: within
// minutes of the end of tokens that live so long.
func (f *harness) wantNoJobsAfter(t *testing.T, life time.Duration) {
	t.Helper()
	const count = `
		local jobs, owners, others, forever, latest = 0, 0, 0, 0, 0
		for _, key in ipairs(redis.call('KEYS', '*')) do
			if string.find(key, '^tb1:{job%.') then jobs = jobs + 1
			elseif string.find(key, '^tb1:owner:') then owners = owners + 1
			else others = others + 1 end
			if string.find(key, '^tb1:{job%.') or string.find(key, '^tb1:owner:') then
				local ttl = redis.call('PTTL', key)
				if ttl < 0 then forever = forever + 1 end
				latest = math.max(latest, ttl)
			end
		end
		return {jobs, owners, others, forever, latest}`
	found := f.redis.Do("EVAL", count, "0").([]any)
	n := func(i int) int64 { return found[i].(int64) }
	latest := time.Duration(n(4)) * time.Millisecond
	t.Logf("Redis has the keys of %d jobs, of the owners of %d tokens, and %d others; the last of the jobs' goes in %v", n(0), n(1), n(2), latest.Round(time.Second))
	if n(0) != workers/2 || n(3) > 0 || latest <= 0 || latest > life+12*time.Minute {
		t.Errorf("%d jobs, %d keys are kept for ever, others for %v", n(0), n(3), latest)
	}
	if n(2) > 4 {
		t.Errorf("%d keys that are no jobs'", n(2))
	}
}

// After RevokeToken the other replicas stop at once.
func TestRevocationReachesTheOtherReplicas(t *testing.T) {
	f := newFleet(t, options{})
	f.allow.requests, f.allow.upTo = 200, true
	for name, job := range map[string]*pb.Job{"shared": nil, "of a job": {Id: "nightly", Dedicated: true}} {
		var late []time.Duration
		for round := range 20 {
			if job != nil {
				job = &pb.Job{Id: fmt.Sprint("nightly-", round), Dedicated: true}
			}
			q := &pb.IssueTokenRequest{Profile: invoices, Job: job}
			var id string
			for _, r := range f.replicas {
				out, err := pb.NewTokenBrokerClient(r.conn).IssueToken(t.Context(), q)
				if err != nil {
					t.Fatal(err)
				}
				id = out.GetToken().GetId()
			}
			if _, err := pb.NewTokenBrokerClient(f.replicas[0].conn).RevokeToken(t.Context(), &pb.RevokeTokenRequest{Profile: invoices, Job: job}); err != nil {
				t.Fatal(err)
			}
			returned := time.Now()
			for _, r := range f.replicas {
				last := time.Duration(0)
				f.await("nobody hands the token out", 5*time.Second, func() bool {
					at := time.Since(returned)
					out, err := pb.NewTokenBrokerClient(r.conn).IssueToken(t.Context(), q)
					if job != nil && err != nil && reasonOf(err) != "JOB_ENDED" {
						t.Fatal(err)
					}
					if err == nil && out.GetToken().GetId() == id {
						last = at
						return false
					}
					return true
				})
				late = append(late, last)
			}
		}
		slices.Sort(late)
		t.Logf("token %s: handed out after RevokeToken had returned for %v at the median, %v at the most", name, late[len(late)/2], late[len(late)-1])
		if most := late[len(late)-1]; most > 2*time.Second {
			t.Errorf("handed out %v after it was revoked", most)
		}
	}
}
