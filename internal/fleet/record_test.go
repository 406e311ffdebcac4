package fleet_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// A record that this version, or this process, cannot read is somebody else's
// truth. Replicas go on without it, one request each, and leave it as it is.
func TestUnreadableRecordIsLeftAlone(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(f *harness, key string){
		"a newer layout": func(f *harness, key string) { f.redis.Do("HSET", key, "v", "2") },
		"a stranger's hash": func(f *harness, key string) {
			f.redis.Do("DEL", key)
			f.redis.Do("HSET", key, "colour", "blue")
		},
		"a stranger's string": func(f *harness, key string) { f.redis.Do("SET", key, "blue") },
		"an unknown key": func(f *harness, _ string) {
			keyset := f.newKeyset()
			for _, r := range f.replicas {
				r.write("keyset.json", keyset)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFleet(t, options{replicas: 2})
			f.allow.requests, f.allow.upTo = 3, true // one more for each replica
			f.replicas[0].must(plain)
			key := f.recordWithToken()
			for _, r := range f.replicas {
				r.stop()
			}
			spoil(f, key)
			before := f.dump(key)
			f.startAll()
			for range 3 {
				for _, a := range f.askAll(plain, f.replicas, 10) {
					if !a.OK() {
						t.Fatalf("a call failed: %v", a)
					}
				}
			}
			if after := f.dump(key); after != before {
				t.Errorf("the record was changed:\n%s\nbefore:\n%s", after, before)
			}
			for _, r := range f.replicas {
				if n := complaints(r); n > 4 {
					t.Errorf("replica %d complained %d times\n%s", r.index, n, r.tail())
				}
			}
		})
	}
}

// What was damaged on the way, or in Redis, is good for nothing: it is
// replaced, once for all.
func TestDamagedTokenIsReplaced(t *testing.T) {
	t.Parallel()
	f := newFleet(t, options{replicas: 2})
	f.allow.requests = 2
	f.replicas[0].must(plain)
	key := f.recordWithToken()
	for _, r := range f.replicas {
		r.stop()
	}
	sealed := f.redis.Do("HGET", key, "a:").(string)
	f.redis.Do("HSET", key, "a:", sealed[:len(sealed)-4]+"AAAA")
	f.startAll()
	tokens := map[string]bool{}
	for _, a := range f.askAll(plain, f.replicas, 10) {
		if !a.OK() {
			t.Fatalf("a call failed: %v", a)
		}
		tokens[a.TokenID] = true
	}
	if len(tokens) != 1 {
		t.Errorf("%d tokens, want one for all", len(tokens))
	}
	for _, r := range f.replicas {
		if n := complaints(r); n > 3 {
			t.Errorf("replica %d complained %d times\n%s", r.index, n, r.tail())
		}
	}
}

// recordWithToken finds the record of a family that has a token for all its scopes.
func (f *harness) recordWithToken() string {
	f.t.Helper()
	list, _ := f.redis.Do("KEYS", "tb1:*").([]any)
	for _, key := range list {
		if has, err := f.redis.Try("HEXISTS", key, "a:"); err == nil && has == int64(1) {
			return fmt.Sprint(key)
		}
	}
	f.t.Fatalf("no record with a token among %v", list)
	return ""
}

// dump is a key's type and content.
func (f *harness) dump(key string) string {
	kind := f.redis.Do("TYPE", key)
	if kind == "hash" {
		return sortedPairs(f.redis.Do("HGETALL", key))
	}
	return fmt.Sprint(kind, f.redis.Do("GET", key))
}

// complaints counts what the current process has logged as a warning or worse.
func complaints(r *replica) int {
	n := 0
	for line := range strings.Lines(r.process.Log()) {
		if (strings.Contains(line, `"level":"WARN"`) || strings.Contains(line, `"level":"ERROR"`)) && !strings.Contains(line, `"msg":"config"`) {
			n++
		}
	}
	return n
}

func sortedPairs(reply any) string {
	values, _ := reply.([]any)
	var pairs []string
	for i := 0; i+1 < len(values); i += 2 {
		pairs = append(pairs, fmt.Sprintf("%v=%v", values[i], values[i+1]))
	}
	slices.Sort(pairs)
	return strings.Join(pairs, "\n")
}
