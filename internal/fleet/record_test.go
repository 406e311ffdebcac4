package fleet_test

import (
	"fmt"
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
			key, _ := f.theRecord()
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

// With a refresh token in it, there is nothing to go on with: it could have been
// spent by whoever wrote what cannot be read.
func TestUnreadableConsentIsNotTouched(t *testing.T) {
	t.Parallel()
	f := newFleet(t, options{replicas: 2})
	f.allow.requests = 1
	f.replicas[0].must(personal)
	key, _ := f.theRecord()
	for _, r := range f.replicas {
		r.stop()
	}
	f.redis.Do("HSET", key, "v", "2")
	before := f.dump(key)
	f.startAll()
	for _, a := range f.askAll(personal, f.replicas, 10) {
		if a.OK() || a.Reason != "STORE_UNAVAILABLE" {
			t.Errorf("want the reason that the store cannot be used: %v", a)
		}
	}
	if after := f.dump(key); after != before {
		t.Errorf("the record was changed:\n%s\nbefore:\n%s", after, before)
	}
}

// What was damaged on the way, or in Redis, is good for nothing: it is
// replaced, once for all.
func TestDamagedTokenIsReplaced(t *testing.T) {
	t.Parallel()
	f := newFleet(t, options{replicas: 2})
	f.allow.requests = 2
	f.replicas[0].must(plain)
	key, field := f.theRecord()
	for _, r := range f.replicas {
		r.stop()
	}
	sealed := f.records()[key][field]
	f.redis.Do("HSET", key, field, sealed[:len(sealed)-4]+"AAAA")
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

// theRecord is the only one with a token.
func (f *harness) theRecord() (key, field string) {
	f.t.Helper()
	found := f.recordsWithToken()
	if len(found) != 1 {
		f.t.Fatalf("%d records with a token, want one", len(found))
	}
	for key, field = range found {
	}
	return key, field
}

// dump is a key's type and content.
func (f *harness) dump(key string) string {
	if record, ok := f.records()[key]; ok {
		return fmt.Sprint("hash ", record)
	}
	return fmt.Sprint(f.redis.Do("TYPE", key), " ", f.redis.Do("GET", key))
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
