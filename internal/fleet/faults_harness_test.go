//go:build faults

package fleet_test

import (
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// get reads a page of the admin address.
func (r *replica) get(path string) (int, string) {
	r.f.t.Helper()
	client := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get("http://" + r.admin + path)
	if err != nil {
		r.f.t.Fatalf("replica %d: %v", r.index, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		r.f.t.Fatalf("replica %d: reading %s: %v", r.index, path, err)
	}
	return response.StatusCode, string(body)
}

// metrics are those of /metrics, by name and labels as they are written there.
func (r *replica) metrics() map[string]float64 {
	r.f.t.Helper()
	_, text := r.get("/metrics")
	values := map[string]float64{}
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		at := strings.LastIndexByte(line, ' ')
		if at < 0 || strings.HasPrefix(line, "#") {
			continue
		}
		if v, err := strconv.ParseFloat(line[at+1:], 64); err == nil {
			values[line[:at]] = v
		}
	}
	return values
}

// goroutines of each replica, when they have come to rest.
func (f *harness) goroutines() []float64 {
	f.t.Helper()
	counts := make([]float64, len(f.replicas))
	for i, r := range f.replicas {
		counts[i] = r.metrics()["go_goroutines"]
	}
	return counts
}

// awaitGoroutines returns when no replica has more than before, but for a few
// that belong to connections of callers.
func (f *harness) awaitGoroutines(before []float64) {
	f.t.Helper()
	const spare = 12
	var now []float64
	f.await("goroutines have ended", 30*time.Second, func() bool {
		now = f.goroutines()
		for i := range now {
			if now[i] > before[i]+spare {
				return false
			}
		}
		return true
	})
}
