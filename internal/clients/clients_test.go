//go:build clients

package clients_test

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/testproc"
)

// repository is the way to the files that users get.
const repository = "../.."

// binary is the command, built once for all tests.
var binary string

func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", "4"); err != nil { // they wait for the most part
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(testproc.RunWithBroker(m, &binary))
}

// languages have a library each. Those that are optional are left out without
// their tool chain, and scripts/toolchain.sh says so.
var languages = map[string]struct{ optional bool }{
	"python": {}, "node": {}, "java": {optional: true}, "rust": {optional: true},
}

// longest is what a library's tests may take.
const longest = 5 * time.Minute

func TestClients(t *testing.T) {
	for language, l := range languages {
		t.Run(language, func(t *testing.T) {
			t.Parallel()
			if l.optional {
				if out, err := exec.Command(repository+"/scripts/toolchain.sh", language, "the client library").CombinedOutput(); err != nil {
					t.Skipf("%s", out)
				}
			}
			s := newStage(t)
			cmd := exec.Command("./test.sh")
			cmd.Dir = filepath.Join(repository, "clients", language)
			cmd.Env = append(os.Environ(), s.environment()...)
			cmd.WaitDelay = time.Second
			timer := time.AfterFunc(longest, func() { _ = cmd.Process.Kill() })
			defer timer.Stop()
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("clients/%s/test.sh: %v\n%s\nthe broker's last words:\n%s", language, err, out, s.tail())
			}
			t.Logf("%s", strings.TrimSpace(string(out)))
		})
	}
}
