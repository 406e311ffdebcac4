package fleet_test

import (
	"testing"
	"time"
)

func TestRedisIsKilledAndRestartedEmptyUnderLoad(t *testing.T) {
	f := newFleet(t, options{})
	f.allow.requests = 2
	for _, r := range f.replicas {
		r.must(plain)
		r.must(personal)
	}
	before := f.tokensInRedis()
	load := f.load(plain, personal)
	f.redis.Kill()
	time.Sleep(2 * time.Second) // calls go on meanwhile
	f.redis.RestartEmpty()
	f.await("what was lost is there again", 20*time.Second, func() bool { return f.tokensInRedis() >= before })
	// A replica that remembers nothing lives on what the others have put back.
	r := f.replicas[1]
	r.stop()
	r.start()
	for _, a := range []string{r.must(plain).Source, r.must(personal).Source} {
		if a != "STORE" && a != "MEMORY" { // the load may have asked before
			t.Errorf("after a restart a token came from %s", a)
		}
	}
	f.wantNoFailure(load())
}

// tokensInRedis counts what is sealed there.
func (f *harness) tokensInRedis() int {
	keys, err := f.redis.Try("KEYS", "*")
	if err != nil {
		return 0
	}
	list, _ := keys.([]any)
	n := 0
	for _, key := range list {
		content, _ := f.redis.Try("HVALS", key)
		values, _ := content.([]any)
		for _, v := range values {
			if s, ok := v.(string); ok && len(s) > 300 {
				n++
			}
		}
	}
	return n
}
