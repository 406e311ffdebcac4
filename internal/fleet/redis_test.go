package fleet_test

import (
	"strings"
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
	load := f.load(plain, personal)
	f.redis.Kill()
	time.Sleep(2 * time.Second) // calls go on meanwhile
	f.redis.RestartEmpty()
	f.await("what was lost is there again", 20*time.Second, func() bool { return len(f.recordsWithToken()) == 2 })
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

// records in Redis, by key. Keys that are no hashes are left out.
func (f *harness) records() map[string]map[string]string {
	keys, err := f.redis.Try("KEYS", "tb1:*")
	if err != nil {
		return nil
	}
	all := map[string]map[string]string{}
	for _, key := range keys.([]any) {
		content, err := f.redis.Try("HGETALL", key)
		if err != nil {
			continue
		}
		values := content.([]any)
		record := map[string]string{}
		for i := 0; i+1 < len(values); i += 2 {
			record[values[i].(string)] = values[i+1].(string)
		}
		all[key.(string)] = record
	}
	return all
}

// recordsWith counts the records that have a field.
func (f *harness) recordsWith(field string) int {
	n := 0
	for _, record := range f.records() {
		if _, has := record[field]; has {
			n++
		}
	}
	return n
}

// recordsWithToken are those of families that have an access token, by key, and
// the field where it is. What a gate seals is shorter.
func (f *harness) recordsWithToken() map[string]string {
	found := map[string]string{}
	for key, record := range f.records() {
		for field, value := range record {
			if strings.HasPrefix(field, "a:") && len(value) > 300 {
				found[key] = field
			}
		}
	}
	return found
}
