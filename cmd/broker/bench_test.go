package main

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
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
