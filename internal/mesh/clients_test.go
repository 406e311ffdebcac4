//go:build mesh

package mesh_test

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tokenbroker/tokenbroker/internal/faultproxy"
	"github.com/tokenbroker/tokenbroker/internal/testca"
)

// brought returns a file that "make mesh" brings.
func brought(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join(repository, name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("this test needs %s: run make mesh, which brings it", name)
	}
	return path
}

// protoPath is where the schema and what it imports are.
func protoPath(t *testing.T) []string {
	t.Helper()
	brought(t, "third_party/buf/validate/validate.proto")
	return []string{brought(t, "proto"), brought(t, "third_party")}
}

// environment tells a client where the broker is, and who it is itself.
func (p *place) environment(address string, as identity) []string {
	return append(os.Environ(), "BROKER_ADDRESS="+address, "BROKER_CA="+p.path("ca.crt"),
		"BROKER_CERTIFICATE="+p.path(as.name+".crt"), "BROKER_PRIVATE_KEY="+p.path(as.name+".key"))
}

// idle is for how long clients send nothing but keepalive pings, every 10 s: for
// four of them, because gRPC servers forgive the first three.
const idle = 45

// seen is what a client prints about a place.
type seen struct {
	Caller, Proof      string
	TokenID            string `json:"token_id"`
	TokenIDAfterIdling string `json:"token_id_after_idling"`
	TokenType          string `json:"token_type"`
	Denied, Throttled  failure
}

type failure struct {
	Code, Domain, Reason string
	RequestID            string   `json:"request_id"`
	RetrySeconds         *float64 `json:"retry_seconds"` // nil without a RetryInfo
}

func TestClientsOfOtherStacks(t *testing.T) {
	t.Parallel()
	for name, program := range map[string]func(*testing.T) *exec.Cmd{
		"grpcio": func(t *testing.T) *exec.Cmd {
			cmd := exec.Command(brought(t, "bin/python/bin/python"), "clients/python/peer.py")
			cmd.Env = []string{"PYTHONPATH=" + strings.Join(protoPath(t), ":")}
			return cmd
		},
		"grpc-js": func(t *testing.T) *exec.Cmd {
			brought(t, "internal/mesh/clients/node/node_modules/@grpc/grpc-js")
			cmd := exec.Command("node", "clients/node/peer.mjs")
			cmd.Env = []string{"PROTO_PATH=" + strings.Join(protoPath(t), ":")}
			return cmd
		},
		"grpc-java": func(t *testing.T) *exec.Cmd {
			for _, tool := range []string{"java", "mvn"} {
				if _, err := exec.LookPath(tool); err != nil {
					t.Skipf("NOT TESTED: %s is not installed, so nobody calls the broker with grpc-java: install a JDK (17 or newer) and Maven, and run make mesh", tool)
				}
			}
			return exec.Command("java", "-jar", brought(t, "bin/java/peer.jar"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for name, c := range map[string]struct {
				as            func(*place) identity
				caller, proof string
				idle          int
			}{
				"URI SAN": {func(p *place) identity { return p.identity("worker", uris(worker)) }, worker, "IDENTITY_PROOF_URI_SAN", idle},
				"DNS SAN": {func(p *place) identity { return p.identity("worker", testca.Named(workerDNS)) }, "dns:" + workerDNS, "IDENTITY_PROOF_DNS_SAN", 0},
			} {
				t.Run(name, func(t *testing.T) {
					t.Parallel()
					p := newPlace(t)
					b := p.startBroker("broker", "")
					network := faultproxy.New(t, b.address)
					cmd := program(t)
					cmd.Env = append(append(p.environment(network.Address(), c.as(p)), cmd.Env...), fmt.Sprintf("IDLE_SECONDS=%d", c.idle))
					cmd.Stderr = &strings.Builder{}
					out, err := cmd.Output()
					if err != nil {
						t.Fatalf("%v: %v\n%s\n%s", cmd, err, cmd.Stderr, b.process.Log())
					}
					var s seen
					if err := json.Unmarshal(out, &s); err != nil {
						t.Fatalf("%v\n%s", err, out)
					}
					if s.Caller != c.caller || s.Proof != c.proof {
						t.Errorf("the broker sees %s by %s, want %s by %s", s.Caller, s.Proof, c.caller, c.proof)
					}
					if len(s.TokenID) != 16 || s.TokenType != "Bearer" || s.TokenIDAfterIdling != s.TokenID {
						t.Errorf("got a %q token %q, and later %q", s.TokenType, s.TokenID, s.TokenIDAfterIdling)
					}
					s.Denied.want(t, "PERMISSION_DENIED", "CALLER_DENIED", 0)
					s.Throttled.want(t, "RESOURCE_EXHAUSTED", "ENDPOINT_THROTTLED", throttle.Seconds())
					for _, f := range []failure{s.Denied, s.Throttled} {
						if !strings.Contains(b.process.Log(), f.RequestID) {
							t.Errorf("the broker's log has no call %s", f.RequestID)
						}
					}
					if _, ever := network.Connections(); ever != 1 {
						t.Errorf("the client made %d connections, want 1: it was disconnected", ever)
					}
				})
			}
		})
	}
}

// want fails the test unless the failure is that one. It comes with advice when
// to retry, of at the most so many seconds, or without for zero.
func (f failure) want(t *testing.T, code, reason string, retry float64) {
	t.Helper()
	if f.Code != code || f.Reason != reason || f.Domain != "tokenbroker.v1" || f.RequestID == "" {
		t.Errorf("got %+v, want %s with the reason %s of tokenbroker.v1 and a request id", f, code, reason)
	}
	switch advice := f.RetrySeconds; {
	case retry == 0 && advice != nil:
		t.Errorf("%s: advice to retry in %v s, where that does not help", reason, *advice)
	case retry > 0 && (advice == nil || *advice <= 0 || *advice > 1.5*retry):
		t.Errorf("%s: advice to retry in %v s, want about %v", reason, advice, retry)
	}
}

func TestGrpcurl(t *testing.T) {
	t.Parallel()
	p := newPlace(t)
	b := p.startBroker("broker", "")
	p.identity("worker", uris(worker))
	// grpcurl makes one call, and returns what it prints: to stderr if it fails.
	grpcurl := func(method, request string, options ...string) string {
		t.Helper()
		cmd := exec.Command(brought(t, "bin/grpcurl"), append(options, "-cacert", p.path("ca.crt"), "-cert", p.path("worker.crt"), "-key", p.path("worker.key"),
			"-format-error", "-max-time", "30", "-d", request, b.address, "tokenbroker.v1.TokenBroker/"+method)...)
		var stdout, stderr strings.Builder
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		_ = cmd.Run() // what it prints tells
		return cmp.Or(stdout.String(), stderr.String())
	}
	var files []string
	for _, dir := range protoPath(t) {
		files = append(files, "-import-path", dir)
	}
	files = append(files, "-proto", "tokenbroker/v1/token_broker.proto")
	for name, schema := range map[string][]string{"schema by reflection": nil, "schema from files": files} {
		t.Run(name, func(t *testing.T) {
			var me struct{ Caller, Proof string }
			decode(t, grpcurl("WhoAmI", "{}", schema...), &me)
			if me.Caller != worker || me.Proof != "IDENTITY_PROOF_URI_SAN" {
				t.Errorf("the broker sees %+v", me)
			}
			var issued struct {
				Token struct{ ID, TokenType string }
			}
			decode(t, grpcurl("IssueToken", `{"profile": "invoices"}`, schema...), &issued)
			if len(issued.Token.ID) != 16 || issued.Token.TokenType != "Bearer" {
				t.Errorf("got %+v", issued)
			}
			for profile, want := range map[string]struct {
				code    int
				details string
			}{
				"secret":    {7, "google.rpc.ErrorInfo CALLER_DENIED request_id"},
				"throttled": {8, "google.rpc.ErrorInfo ENDPOINT_THROTTLED request_id google.rpc.RetryInfo"},
			} {
				out := grpcurl("IssueToken", fmt.Sprintf(`{"profile": %q}`, profile), schema...)
				var got struct {
					Code    int
					Details []struct {
						Type  string `json:"@type"`
						Value []byte `json:"@value"` // where the schema does not tell what it means
					}
				}
				decode(t, out, &got)
				for _, d := range got.Details {
					out += d.Type + string(d.Value)
				}
				for _, detail := range strings.Fields(want.details) {
					if got.Code != want.code || !strings.Contains(out, detail) {
						t.Errorf("a token for %s: want code %d and %s, got %s", profile, want.code, detail, out)
					}
				}
			}
		})
	}
}

func decode(t *testing.T, text string, into any) {
	t.Helper()
	if err := json.Unmarshal([]byte(text), into); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
}
