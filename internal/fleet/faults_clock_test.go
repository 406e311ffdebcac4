//go:build faults

package fleet_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// buildSkewed builds the broker with a wall clock that is off by some seconds,
// against a standard library whose time.Now adds them. The monotonic clock is
// as it is.
func buildSkewed(t *testing.T, seconds int) string {
	t.Helper()
	dir := t.TempDir()
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	original := filepath.Join(strings.TrimSpace(string(root)), "src", "time", "time.go")
	source, err := os.ReadFile(original)
	if err != nil {
		t.Fatal(err)
	}
	const now = "func Now() Time {\n\tsec, nsec, mono := runtimeNow()\n"
	if !strings.Contains(string(source), now) {
		t.Fatalf("time.Now in %s is not what it was: see how to skew it now", original)
	}
	skewed := filepath.Join(dir, "time.go")
	text := strings.Replace(string(source), now, now+fmt.Sprintf("\tsec += %d\n", seconds), 1)
	if err := os.WriteFile(skewed, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {original: skewed}})
	if err != nil {
		t.Fatal(err)
	}
	description := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(description, overlay, 0o600); err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "broker")
	if out, err := exec.Command("go", "build", "-overlay", description, "-o", binary, "../../cmd/broker").CombinedOutput(); err != nil {
		t.Fatalf("building with a skewed clock: %v\n%s", err, out)
	}
	return binary
}

// One replica's wall clock is off. It serves nothing that has ended, and the
// fleet renews as often as it would.
func TestClockOfOneReplicaIsOff(t *testing.T) {
	for _, seconds := range []int{20, -20} {
		t.Run(fmt.Sprint(seconds), func(t *testing.T) {
			f := newFleet(t, options{tokenLife: time.Minute, idle: true})
			// In 100 s: three or four tokens of a minute, for each of two.
			f.allow.requests, f.allow.upTo = 8, true
			f.replicas[0].binary = buildSkewed(t, seconds)
			f.startAll()
			for end := time.Now().Add(100 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
				for _, r := range f.replicas {
					r.must(plain)
					r.must(personal)
				}
			}
		})
	}
}
