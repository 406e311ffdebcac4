package main

import (
	"crypto/rand"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/store"
	"github.com/tokenbroker/tokenbroker/internal/testredis"
)

// BenchmarkServe measures a real process: the time from its start until it
// answers /readyz, and the memory that it holds when idle.
func BenchmarkServe(b *testing.B) {
	s := newStage(b)
	var more []string
	for i := range 19 {
		more = append(more, fmt.Sprintf("  - {name: p%d, vantage: {region: eu, client_id: c%d, client_secret: {file: secret}, client_credentials: {}}}", i, i))
	}
	config := s.config(more...)
	var toServing, memory float64
	for b.Loop() {
		began := time.Now()
		p := start(b, config)
		if code, body := p.get("/readyz"); code != 200 {
			b.Fatal(code, body)
		}
		toServing += float64(time.Since(began).Milliseconds())
		memory += residentMiB(b, p.cmd.Process.Pid)
		p.stop()
	}
	b.ReportMetric(toServing/float64(b.N), "ms-to-serving")
	b.ReportMetric(memory/float64(b.N), "idle-MiB")
	b.ReportMetric(0, "ns/op") // it would be dominated by the stop
}

// BenchmarkRedisMemory measures what one family takes of Redis: a client with
// its token, and a consent with its access and its refresh token, of the sizes
// that Vantage's have.
func BenchmarkRedisMemory(b *testing.B) {
	access := strings.Repeat("x", 1200)
	for name, refresh := range map[string]string{"client": "", "consent": strings.Repeat("x", 66)} {
		b.Run(name, func(b *testing.B) {
			server := testredis.Start(b, testredis.Options{})
			text, err := store.NewKeyset()
			if err != nil {
				b.Fatal(err)
			}
			keyset, err := store.ParseKeyset(text)
			if err != nil {
				b.Fatal(err)
			}
			redis, err := store.NewRedis(store.RedisOptions{Addresses: []string{server.Address()}}, store.Access{Keyset: keyset})
			if err != nil {
				b.Fatal(err)
			}
			defer redis.Close()
			used := func() float64 {
				n, err := strconv.ParseFloat(server.Info("memory")["used_memory"], 64)
				if err != nil {
					b.Fatal(err)
				}
				return n
			}
			const families = 2000
			var grown float64
			for b.Loop() {
				server.Flush()
				before := used()
				for i := range families {
					c := broker.Claim{Family: broker.Identity(strconv.Itoa(i)), Owner: rand.Text(), Length: 3 * time.Second}
					a, err := redis.Acquire(b.Context(), c)
					if err != nil {
						b.Fatal(err)
					}
					lease := broker.Lease{Family: c.Family, Owner: c.Owner, Fence: a.Fence, Length: c.Length}
					_, verdict, err := redis.Save(b.Context(), lease, broker.Result{
						Token: broker.StoredToken{
							Access: broker.NewSecret(access + strconv.Itoa(i)), Type: "Bearer",
							Scopes: []string{"openid", "permissions", "global.wildcard"}, Lifetime: 24 * time.Hour, Remaining: 24 * time.Hour,
						},
						Refresh: broker.NewSecret(refresh),
					})
					if err != nil || verdict != broker.Saved {
						b.Fatal(verdict, err)
					}
				}
				grown += (used() - before) / families
			}
			b.ReportMetric(grown/float64(b.N), "B/family")
			b.ReportMetric(0, "ns/op") // of two calls after another
		})
	}
}

func residentMiB(b *testing.B, pid int) float64 {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Skip("this system does not tell what a process holds: ", err)
	}
	m := regexp.MustCompile(`VmRSS:\s+(\d+) kB`).FindStringSubmatch(string(status))
	if m == nil {
		b.Skip("no VmRSS in ", strings.TrimSpace(string(status)))
	}
	kib, err := strconv.Atoi(m[1])
	if err != nil {
		b.Fatal(err)
	}
	return float64(kib) / 1024
}
