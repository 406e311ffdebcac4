// Package internal_test holds the packages to the rules of the house: who may
// know whom. docs/architecture.md has the picture.
package internal_test

import (
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/tokenbroker/tokenbroker/"

// pkg is what "go list" says of a package.
type pkg struct {
	ImportPath string
	Imports    []string
}

func packages(t *testing.T) []pkg {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", module+"...").Output()
	if err != nil {
		t.Fatalf("listing the packages: %v", err)
	}
	var all []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); d.More(); {
		var p pkg
		if err := d.Decode(&p); err != nil {
			t.Fatal(err)
		}
		p.ImportPath = strings.TrimPrefix(p.ImportPath, module)
		all = append(all, p)
	}
	if len(all) < 8 {
		t.Fatalf("found only %d packages", len(all))
	}
	return all
}

func TestWhoMayKnowWhom(t *testing.T) {
	// ours maps a package to those of ours that it may import.
	ours := map[string][]string{
		"internal":                       {},
		"cmd/broker":                     nil, // everything
		"client":                         {"clients", "gen/tokenbroker/v1"},
		"clients":                        {},
		"conformance":                    {},
		"internal/access":                {},
		"internal/admission":             {},
		"internal/audit":                 {},
		"internal/broker":                {},
		"internal/oauth":                 {"internal/broker"},
		"internal/store":                 {"internal/broker"},
		"internal/store/storetest":       {"internal/broker"},
		"internal/vantage":               {"internal/broker", "internal/oauth"},
		"internal/vantage/sandbox":       {},
		"internal/secureauth":            {"internal/broker", "internal/oauth"},
		"internal/config":                {"internal/access", "internal/admission", "internal/audit", "internal/broker", "internal/oauth", "internal/secureauth", "internal/serviceaccount", "internal/store", "internal/vantage", "gen/tokenbroker/config/v1"},
		"internal/service":               {"internal/access", "internal/admission", "internal/audit", "internal/broker", "gen/tokenbroker/v1"},
		"internal/serviceaccount":        {"internal/access", "internal/broker", "internal/oauth"},
		"internal/testca":                {},
		"internal/workload":              {},
		"internal/workload/workloadtest": {"internal/testca"},
		"internal/testclock":             {},
		"internal/testh2":                {},
		"internal/testproc":              {},
		"internal/testredis":             {"internal/testca", "internal/testproc"},
		"internal/faultproxy":            {"internal/testproc"},
		"internal/fleet":                 {"gen/tokenbroker/v1"},
		"internal/fleet/crowd":           {"internal/fleet"},
		"internal/mesh":                  {},
		"internal/clients":               {},
		"internal/console":               {"internal/access", "internal/audit", "internal/broker"},
		"gen/tokenbroker/v1":             {},
		"gen/tokenbroker/config/v1":      {},
	}
	for _, p := range packages(t) {
		allowed, known := ours[p.ImportPath]
		if !known {
			t.Errorf("%s is not in the house yet: say here whom it may know", p.ImportPath)
			continue
		}
		if allowed == nil {
			continue
		}
		for _, i := range p.Imports {
			name, isOurs := strings.CutPrefix(i, module)
			if isOurs && !slices.Contains(allowed, name) {
				t.Errorf("%s imports %s; it may import %v of ours", p.ImportPath, name, allowed)
			}
		}
	}
}

func TestWhoMayKnowWhichLibrary(t *testing.T) {
	for library, users := range map[string][]string{
		"google.golang.org/grpc":     {"internal/service", "internal/fleet", "internal/workload", "internal/workload/workloadtest", "cmd/broker", "client", "gen/tokenbroker/v1"},
		"golang.org/x/oauth2":        {"client"},
		"github.com/redis/go-redis":  {"internal/store"},
		"gopkg.in/yaml":              {"internal/config"},
		"buf.build/go/protoyaml":     {"internal/config"},
		"net/http":                   {"internal/oauth", "internal/vantage/sandbox", "internal/console", "client", "cmd/broker"},
		"github.com/go-jose/go-jose": {"internal/oauth", "internal/serviceaccount", "internal/vantage/sandbox"},
		"github.com/fsnotify":        {"internal/config"},
		"github.com/spf13/cobra":     {"cmd/broker"},
		"google.golang.org/protobuf": {"internal/service", "internal/fleet", "internal/config", "client", "cmd/broker", "gen/tokenbroker/v1", "gen/tokenbroker/config/v1"},
		"github.com/prometheus":      {"internal/console", "internal/service", "cmd/broker"},
		"github.com/chromedp":        {}, // tests only
		"github.com/spiffe":          {"internal/access", "internal/workload", "internal/workload/workloadtest"},
		"crypto/tls":                 {"internal/testca", "internal/testh2", "internal/testredis", "internal/oauth", "internal/serviceaccount", "internal/store", "internal/config", "internal/service", "internal/workload", "internal/workload/workloadtest", "client", "cmd/broker"},
	} {
		for _, p := range packages(t) {
			for _, i := range p.Imports {
				if (i == library || strings.HasPrefix(i, library+"/") || strings.HasPrefix(i, library+".")) && !slices.Contains(users, p.ImportPath) {
					t.Errorf("%s imports %s; only %v may", p.ImportPath, i, users)
				}
			}
		}
	}
}
