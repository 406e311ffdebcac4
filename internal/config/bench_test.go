package config_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/config"
)

// profiles returns a configuration with n profiles, each with its secret in a
// file, and TLS.
func manyProfiles(t testing.TB, n int) (path string) {
	t.Helper()
	directory := t.TempDir()
	writeServerFiles(t, directory)
	var s strings.Builder
	fmt.Fprintf(&s, "server: {address: 0.0.0.0:7443, tls: {certificate: %[1]s/tls.crt, private_key: %[1]s/tls.key, client_ca: %[1]s/ca.crt}}\n", directory)
	s.WriteString("policy: [{callers: ['spiffe://prod/ns/*'], profiles: ['p*'], allow: [issue, refresh, watch]}]\nprofiles:\n")
	for i := range n {
		write(t, filepath.Join(directory, "secrets", fmt.Sprint(i)), canary)
		fmt.Fprintf(&s, "  - name: p%d\n    scopes: [openid, permissions]\n    timeout: 10s\n    vantage:\n      region: eu\n      client_id: c%d\n", i, i)
		fmt.Fprintf(&s, "      client_secret: {file: %s/secrets/%d}\n      client_credentials: {}\n", directory, i)
	}
	return write(t, filepath.Join(directory, "broker.yaml"), s.String())
}

func benchmarkLoad(b *testing.B, n int) {
	path := manyProfiles(b, n)
	for b.Loop() {
		if _, err := config.Load(path, options); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLoad20(b *testing.B)    { benchmarkLoad(b, 20) }
func BenchmarkLoad10000(b *testing.B) { benchmarkLoad(b, 10_000) }

// BenchmarkFirstLoad20 is what a start pays: a process of its own each time, so
// that the schema's rules are compiled in it.
func BenchmarkFirstLoad20(b *testing.B) {
	path := manyProfiles(b, 20)
	var total time.Duration
	for b.Loop() {
		command := exec.Command(os.Args[0], "-test.run=^TestFirstLoad$", "-test.v")
		command.Env = append(os.Environ(), "FIRST_LOAD="+path)
		output, err := command.Output()
		if err != nil {
			b.Fatal(err)
		}
		_, took, _ := strings.Cut(string(output), "first load: ")
		took, _, _ = strings.Cut(took, "\n")
		d, err := time.ParseDuration(took)
		if err != nil {
			b.Fatal(err)
		}
		total += d
	}
	b.ReportMetric(float64(total.Microseconds())/1000/float64(b.N), "ms/load")
}

// TestFirstLoad is the process that BenchmarkFirstLoad20 starts.
func TestFirstLoad(t *testing.T) {
	path := os.Getenv("FIRST_LOAD")
	if path == "" {
		t.Skip("a benchmark's helper")
	}
	began := time.Now()
	if _, err := config.Load(path, options); err != nil {
		t.Fatal(err)
	}
	fmt.Printf("first load: %s\n", time.Since(began))
}
