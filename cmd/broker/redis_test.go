package main

import (
	"fmt"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/store"
	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// shared writes a config whose replicas share tokens over the Redis at address,
// or at several that are joined by commas, with more fields of store.redis, and a
// keyset unless there is one. It has a profile of which refresh tokens come, too.
func (s *stage) shared(address string, redis ...string) string {
	s.t.Helper()
	if s.keyset.IsEmpty() {
		s.rotate(func(broker.Secret) (broker.Secret, error) { return store.NewKeyset() })
	}
	redis = append([]string{"addresses: [" + address + "]"}, redis...)
	s.write("operator-secret", s.vantage.ClientSecret("operator"))
	s.write("operator-password", sandbox.DemoPassword)
	return s.config(
		"  - name: operator",
		"    scopes: [openid, permissions, global.wildcard, offline_access]",
		"    vantage:",
		"      base_url: "+s.url,
		"      client_id: operator",
		"      client_secret: {file: operator-secret}",
		"      password: {username: {value: operator@example.com}, password: {file: operator-password}}",
		"store:",
		"  redis: {"+strings.Join(redis, ", ")+"}",
		"  encryption_keyset: {file: keyset.json}")
}

// rotate replaces the keyset.
func (s *stage) rotate(step func(broker.Secret) (broker.Secret, error)) {
	s.t.Helper()
	next, err := step(s.keyset)
	if err != nil {
		s.t.Fatal(err)
	}
	s.keyset = next
	s.write("keyset.json", next.Reveal())
}

// token asks for one, and fails the test if none comes.
func (p *process) token(more ...string) string {
	p.t.Helper()
	return p.run(append([]string{"token", "invoices"}, more...)...)
}

// run asks the process as its callers and operators do, and fails the test if
// that does not work.
func (p *process) run(args ...string) string {
	p.t.Helper()
	got := command(p.t, append(args, "--address", p.address)...)
	if got.status != 0 {
		p.t.Fatalf("%v: %+v\n%s", args, got, p.log)
	}
	return strings.TrimSpace(got.stdout)
}

// ready waits until /readyz says just that, or for what it says beside it.
func (p *process) ready(degraded string) {
	p.t.Helper()
	p.await(fmt.Sprintf("/readyz says %q", degraded), func() bool {
		code, body := p.get("/readyz")
		if code != 200 || !strings.HasPrefix(body, "ready\n") {
			p.t.Fatalf("readyz: %d %s", code, body)
		}
		if degraded == "" {
			return body == "ready\n"
		}
		return strings.Contains(body, "\ndegraded: ") && strings.Contains(body, degraded)
	})
}

// logs counts the lines in the log that have all of the texts.
func (p *process) logs(texts ...string) (n int) {
lines:
	for line := range strings.Lines(p.log.String()) {
		for _, text := range texts {
			if !strings.Contains(line, text) {
				continue lines
			}
		}
		n++
	}
	return n
}

// metric waits for a line in the metrics. Its value may be a regular expression.
func (p *process) metric(line string) {
	p.t.Helper()
	name, value, _ := strings.Cut(line, " ")
	pattern := regexp.MustCompile("(?m)^" + regexp.QuoteMeta(name) + " " + value + "$")
	p.await("the metrics have "+line, func() bool {
		_, metrics := p.get("/metrics")
		return pattern.MatchString(metrics)
	})
}

// everything is all that a Redis holds, as text.
func everything(redis *testredis.Server) string {
	var all strings.Builder
	for _, key := range redis.Do("KEYS", "*").([]any) {
		fields, err := redis.Try("HGETALL", key)
		if err != nil { // in a Cluster, a replica's copy is the master's to show
			fields = err
		}
		fmt.Fprintln(&all, key, fields)
	}
	return all.String()
}

func TestReplicasShareOneToken(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	redis := testredis.Start(t, testredis.Options{})
	config := s.shared(redis.Address())
	one, other := start(t, config), start(t, config)
	token := one.token()
	if other.token() != token {
		t.Error("two replicas hand out different tokens")
	}
	if got := command(t, "token", "invoices", "--address", other.address, "--output", "json"); !strings.Contains(got.stdout, `"source": "memory"`) {
		t.Errorf("the second answer of the other replica: %+v", got)
	}
	if calls := s.vantage.Calls().Total; calls != 1 {
		t.Errorf("%d token requests, want 1", calls)
	}
	one.metric(`token_broker_tokens_served_total{profile="invoices",source="endpoint"} 1`)
	other.metric(`token_broker_tokens_served_total{profile="invoices",source="store"} 1`)
	for _, p := range []*process{one, other} {
		p.ready("")
		p.metric("token_broker_store_reachable 1")
		p.metric(`token_broker_store_operations_total{operation="acquire",outcome="ok"} [1-9]`)
		p.metric("token_broker_store_corrupt_total 0")
	}

	inRedis := everything(redis)
	if !strings.Contains(inRedis, broker.NewSecret(token).ID()) {
		t.Errorf("the token is not in Redis:\n%s", inRedis)
	}
	for what, secret := range map[string]string{"token": token, "client secret": s.vantage.ClientSecret("invoices"), "profile's name": "invoices"} {
		if strings.Contains(inRedis, secret) {
			t.Errorf("the %s is in Redis, in clear", what)
		}
	}

	// A third one has it from Redis alone, the first two being gone.
	for _, p := range []*process{one, other} {
		if status := p.stop(); status != 0 {
			t.Errorf("exit status %d\n%s", status, p.log)
		}
	}
	if start(t, config).token() != token {
		t.Error("a new replica has another token")
	}
	if calls := s.vantage.Calls().Total; calls != 1 {
		t.Errorf("%d token requests, want 1", calls)
	}
}

func TestServeStartsThoughRedisIsDown(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	redis := testredis.Start(t, testredis.Options{})
	redis.Kill()
	p := start(t, s.shared(redis.Address()))
	p.ready("the store is out of reach")
	p.metric("token_broker_store_reachable 0")
	token := p.token()
	p.metric(`token_broker_tokens_served_total{profile="invoices",source="uncoordinated"} 1`)

	redis.Restart()
	p.ready("")
	p.metric("token_broker_store_reachable 1")
	// What was obtained meanwhile is shared from now on.
	p.await("the token is in Redis", func() bool { return strings.Contains(everything(redis), broker.NewSecret(token).ID()) })
	if start(t, s.path("config.yaml")).token() != token {
		t.Error("another replica has another token")
	}
	if calls := s.vantage.Calls().Total; calls != 1 {
		t.Errorf("%d token requests, want 1", calls)
	}
	for _, line := range []string{"redis is out of reach", "redis is back"} {
		if n := p.logs(line); n != 1 {
			t.Errorf("%q is logged %d times, want once\n%s", line, n, p.log)
		}
	}
}

func TestRedisLostAndRegained(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	redis := testredis.Start(t, testredis.Options{Persist: true})
	p := start(t, s.shared(redis.Address()))
	token := p.token()
	redis.Kill()
	p.ready("the store is out of reach")
	if p.token() != token {
		t.Error("the token was lost with Redis")
	}
	redis.Restart()
	p.ready("")
	if start(t, s.path("config.yaml")).token() != token {
		t.Error("another replica has another token")
	}
	if calls := s.vantage.Calls().Total; calls != 1 {
		t.Errorf("%d token requests, want 1", calls)
	}
	redis.Kill() // a stop does not need it either
	if status := p.stop(); status != 0 {
		t.Errorf("exit status %d\n%s", status, p.log)
	}
}

func TestRedisPasswordIsReadAgain(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	redis := testredis.Start(t, testredis.Options{Users: []string{"broker on >first-secret ~* &* +@all"}})
	s.write("redis", "first-secret\n")
	p := start(t, s.shared(redis.Address(), "username: broker", "password: {file: redis}"))
	p.token()

	// First the new password beside the old one, then the file, then the old
	// one goes: nobody notices.
	redis.Do("ACL", "SETUSER", "broker", ">second-secret")
	s.write("redis", "second-secret\n")
	p.logged("config reloaded")
	redis.Do("ACL", "SETUSER", "broker", "<first-secret")
	redis.Do("CLIENT", "KILL", "USER", "broker")
	p.ready("")
	p.token("--scope", "openid")

	// The other way round, it is out of reach until the file follows.
	redis.Do("ACL", "SETUSER", "broker", "resetpass", ">third-secret")
	redis.Do("CLIENT", "KILL", "USER", "broker")
	p.ready("the store is out of reach")
	s.write("redis", "third-secret\n")
	p.ready("")
	p.token("--scope", "permissions")
	if strings.Contains(p.log.String(), "-secret") {
		t.Errorf("a password is in the log:\n%s", p.log)
	}
}

func TestKeysetIsRotatedUnderRunningReplicas(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	redis := testredis.Start(t, testredis.Options{})
	config := s.shared(redis.Address())
	one, other := start(t, config), start(t, config)
	token := one.token()
	scopes := []string{"openid", "permissions", "global.wildcard"}
	for i, step := range []func(broker.Secret) (broker.Secret, error){
		store.AddKey, store.PromoteKey, func(k broker.Secret) (broker.Secret, error) { return store.DropKeys(k, false) },
	} {
		s.rotate(step)
		for _, p := range []*process{one, other} {
			p.await("the keyset is in force", func() bool { return p.logs("config reloaded") == i+1 })
		}
		if one.token("--scope", scopes[i]) != other.token("--scope", scopes[i]) {
			t.Errorf("after step %d the replicas have different tokens", i+1)
		}
		if one.token() != token || other.token() != token {
			t.Errorf("step %d lost the token", i+1)
		}
	}
	if calls := s.vantage.Calls().Total; calls != 4 {
		t.Errorf("%d token requests, want 4: all scopes, and each", calls)
	}
	for _, p := range []*process{one, other} {
		p.metric("token_broker_store_corrupt_total 0")
	}
}

func TestBadKeysetIsABadConfig(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.vantage.Close()
	config := s.shared("127.0.0.1:1")
	s.write("keyset.json", `{"primaryKeyId": 1, "key": [{"keyData": {"value": "hunter2-canary"}}]}`)
	for _, verb := range []string{"check", "serve"} {
		got := command(t, verb, "--config", config)
		out := got.stdout + got.stderr
		if got.status != 2 || !strings.Contains(out, config+":21:29: store.encryption_keyset.file: ") {
			t.Errorf("%s: exit status %d: %s", verb, got.status, out)
		}
		if strings.Contains(out, "hunter2") {
			t.Errorf("%s shows the keyset:\n%s", verb, out)
		}
	}
}

func TestWhatOfTheStoreNeedsARestart(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	redis := testredis.Start(t, testredis.Options{})
	p := start(t, s.shared(redis.Address()))
	token := p.token()
	for field, change := range map[string]func(){
		"store":                   func() { s.config() },
		"store.redis.addresses":   func() { s.shared("127.0.0.1:1") },
		"store.redis.master_name": func() { s.shared(redis.Address(), "master_name: main") },
		"store.redis.cluster":     func() { s.shared(redis.Address(), "cluster: true") },
		"store.redis.username":    func() { s.shared(redis.Address(), "username: other") },
		"store.redis.lease":       func() { s.shared(redis.Address(), "lease: 5s") },
	} {
		change()
		p.logged(field + " cannot change under a running server")
	}
	// A keyset that is none leaves the old one in force.
	s.shared(redis.Address())
	s.write("keyset.json", "{}")
	p.logged(`"path":"store.encryption_keyset.file"`)
	p.ready("")
	if p.token() != token {
		t.Error("the token was lost")
	}
	p.token("--scope", "openid")
	p.signal(syscall.SIGTERM)
	<-p.exited
}

func TestRedisOverTLS(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	ca := testca.New(t)
	redis := testredis.Start(t, testredis.Options{TLS: ca, Config: []string{"tls-auth-clients yes"}})
	s.tlsFiles(testca.New(t)) // of an authority that Redis does not know
	files := "tls: {ca: ca.pem, certificate: client.pem, private_key: client.key}"
	p := start(t, s.shared(redis.Address(), files))
	p.ready("the store is out of reach")
	p.logged("certificate signed by unknown authority")
	s.tlsFiles(ca)
	p.ready("")
	p.token()
	p.metric(`token_broker_tokens_served_total{profile="invoices",source="endpoint"} 1`)
	if !strings.Contains(everything(redis), "tb1:") {
		t.Error("nothing is in Redis")
	}
}

// The user that docs/redis.md has operators create may do all that the broker
// does, on each layout of Redis, and nothing is denied on the way.
func TestDocumentedUserIsEnough(t *testing.T) {
	t.Parallel()
	found := regexp.MustCompile("(?m)^user (broker .*)$").FindStringSubmatch(read(t, "../../docs/redis.md"))
	if found == nil {
		t.Fatal("docs/redis.md has no line that begins with: user broker")
	}
	const password = "CHANGE-THIS"
	options := testredis.Options{Users: []string{found[1]}}
	for name, layout := range map[string]func(t *testing.T) (address string, more []string, nodes []*testredis.Server){
		"standalone": func(t *testing.T) (string, []string, []*testredis.Server) {
			redis := testredis.Start(t, options)
			return redis.Address(), nil, []*testredis.Server{redis}
		},
		"Sentinel": func(t *testing.T) (string, []string, []*testredis.Server) {
			s := testredis.StartSentinel(t, testredis.SentinelOptions{Options: options})
			return strings.Join(s.Addresses(), ", "), []string{"master_name: " + testredis.MasterName}, s.Nodes()
		},
		"Cluster": func(t *testing.T) (string, []string, []*testredis.Server) {
			c := testredis.StartCluster(t, testredis.ClusterOptions{Options: options, Replicas: 1})
			return c.Addresses()[0], []string{"cluster: true"}, c.Nodes()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStage(t)
			s.write("redis", password)
			address, more, nodes := layout(t)
			config := s.shared(address, append(more, "username: broker", "password: {file: redis}")...)
			one, other := start(t, config), start(t, config)
			token := one.token()
			if other.token() != token {
				t.Error("two replicas hand out different tokens")
			}
			if one.run("token", "operator") != other.run("token", "operator") {
				t.Error("two replicas hand out different tokens of a person")
			}
			other.run("token", "operator", "--scope", "openid") // spends the refresh token
			one.run("revoke", "invoices")
			other.await("the revoked token is out of service", func() bool { return other.token() != token })
			for _, profile := range []string{"invoices", "operator"} { // a record of its own, and a slot of the person's
				own := one.run("token", profile, "--job", "nightly", "--dedicated")
				if other.run("token", profile, "--job", "nightly", "--dedicated") != own {
					t.Errorf("two replicas hand out different tokens of a job of %s", profile)
				}
				one.run("revoke", profile, "--job", "nightly")
			}
			one.run("reset", "operator")
			one.run("profiles")

			id := broker.NewSecret(one.token()).ID()
			for _, node := range nodes {
				if _, err := node.Try("FLUSHALL"); err != nil && !strings.Contains(err.Error(), "READONLY") {
					t.Fatal(err)
				}
			}
			one.await("what was flushed is back", func() bool {
				for _, node := range nodes {
					if strings.Contains(everything(node), id) {
						return true
					}
				}
				return false
			})
			for _, operation := range []string{"acquire", "save", "intend", "drop", "confirm", "reset", "look", "own", "seed", "headers", "heartbeat"} {
				one.await(operation+" is used", func() bool {
					_, a := one.get("/metrics")
					_, b := other.get("/metrics")
					return strings.Contains(a+b, `token_broker_store_operations_total{operation="`+operation+`",outcome="ok"}`)
				})
			}
			for _, node := range nodes {
				if denied := node.Do("ACL", "LOG").([]any); len(denied) > 0 {
					t.Errorf("denied: %v", denied)
				}
			}
			for _, p := range []*process{one, other} {
				p.ready("")
				if strings.Contains(p.log.String(), "the user needs") || strings.Contains(p.log.String(), "out of reach") {
					t.Errorf("the log has complaints:\n%s", p.log)
				}
			}
		})
	}
}
