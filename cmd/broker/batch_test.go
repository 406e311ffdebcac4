package main

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/tokenbroker/tokenbroker/internal/testca"
)

const examples = "../../deploy/batch/"

// podSpec is what the examples have of a pod; deploy/batch/schema holds them to
// all that Kubernetes knows.
type podSpec struct {
	RestartPolicy      string `yaml:"restartPolicy"`
	ServiceAccountName string `yaml:"serviceAccountName"`
	SecurityContext    struct {
		RunAsNonRoot bool `yaml:"runAsNonRoot"`
		RunAsUser    int  `yaml:"runAsUser"`
	} `yaml:"securityContext"`
	InitContainers []podContainer `yaml:"initContainers"`
	Containers     []podContainer `yaml:"containers"`
	Volumes        []struct {
		Name     string `yaml:"name"`
		EmptyDir *struct {
			Medium string `yaml:"medium"`
		} `yaml:"emptyDir"`
		ConfigMap *struct {
			Name string `yaml:"name"`
		} `yaml:"configMap"`
		Projected *struct {
			Sources []struct {
				ServiceAccountToken struct {
					Audience string `yaml:"audience"`
					Path     string `yaml:"path"`
				} `yaml:"serviceAccountToken"`
			} `yaml:"sources"`
		} `yaml:"projected"`
	} `yaml:"volumes"`
}

type podContainer struct {
	Name          string   `yaml:"name"`
	Command       []string `yaml:"command"`
	Args          []string `yaml:"args"`
	RestartPolicy string   `yaml:"restartPolicy"`
	Env           []struct {
		Name      string `yaml:"name"`
		Value     string `yaml:"value"`
		ValueFrom struct {
			FieldRef struct {
				FieldPath string `yaml:"fieldPath"`
			} `yaml:"fieldRef"`
		} `yaml:"valueFrom"`
	} `yaml:"env"`
	VolumeMounts []struct {
		Name      string `yaml:"name"`
		MountPath string `yaml:"mountPath"`
		ReadOnly  bool   `yaml:"readOnly"`
	} `yaml:"volumeMounts"`
	StartupProbe struct {
		Exec struct {
			Command []string `yaml:"command"`
		} `yaml:"exec"`
		FailureThreshold int `yaml:"failureThreshold"`
	} `yaml:"startupProbe"`
	SecurityContext struct {
		ReadOnlyRootFilesystem   bool  `yaml:"readOnlyRootFilesystem"`
		AllowPrivilegeEscalation *bool `yaml:"allowPrivilegeEscalation"`
	} `yaml:"securityContext"`
}

func decode(t *testing.T, text string, into any) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(text), into); err != nil {
		t.Fatal(err)
	}
}

// jobPod is the pod of an example Job.
func jobPod(t *testing.T, file string) podSpec {
	t.Helper()
	var job struct {
		Spec struct {
			Template struct {
				Spec podSpec `yaml:"spec"`
			} `yaml:"template"`
		} `yaml:"spec"`
	}
	decode(t, read(t, examples+file), &job)
	return job.Spec.Template.Spec
}

func sparkPod(t *testing.T) podSpec {
	t.Helper()
	var pod struct {
		Spec podSpec `yaml:"spec"`
	}
	decode(t, read(t, examples+"spark-executor.yaml"), &pod)
	return pod.Spec
}

// argoPods are those of the example's templates, for a workflow of that uid.
func argoPods(t *testing.T, uid string) map[string]podSpec {
	t.Helper()
	var workflow struct {
		Spec struct {
			podSpec   `yaml:",inline"`
			OnExit    string `yaml:"onExit"`
			Templates []struct {
				Name           string         `yaml:"name"`
				InitContainers []podContainer `yaml:"initContainers"`
				Container      podContainer   `yaml:"container"`
				RetryStrategy  struct {
					RetryPolicy string `yaml:"retryPolicy"`
				} `yaml:"retryStrategy"`
			} `yaml:"templates"`
		} `yaml:"spec"`
	}
	decode(t, strings.ReplaceAll(read(t, examples+"argo-workflow.yaml"), "{{workflow.uid}}", uid), &workflow)
	pods := make(map[string]podSpec)
	for _, template := range workflow.Spec.Templates {
		pod := workflow.Spec.podSpec
		pod.InitContainers, pod.Containers = template.InitContainers, []podContainer{template.Container}
		pods[template.Name] = pod
		if template.RetryStrategy.RetryPolicy != "Always" {
			t.Errorf("%s: init containers that fail are not tried again", template.Name)
		}
	}
	if workflow.Spec.OnExit != "end" {
		t.Errorf("onExit is %q", workflow.Spec.OnExit)
	}
	return pods
}

// cluster is where the examples run: a broker that knows service accounts, and
// directories for volumes.
type cluster struct {
	*stage
	kube    *kube
	config  string
	address string // of the broker, also while it does not run
}

const batchPolicy = `policy: [{callers: ["k8s://prod/shop/invoices"], profiles: [invoices], allow: [issue, watch, revoke]}]`

func newCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{stage: newStage(t), kube: newKube(t, "one"), address: freeAddress(t)}
	c.tlsFiles(testca.New(t))
	c.write("jwks.json", c.kube.keys())
	whole := read(t, c.withAccounts("jwks_file: jwks.json"))
	policy := regexp.MustCompile(`(?s)policy:.*`)
	c.config = c.write("config.yaml", policy.ReplaceAllString(strings.Replace(whole, "127.0.0.1:0", c.address, 1), batchPolicy+"\n"))
	return c
}

func (c *cluster) serve() *process {
	c.t.Helper()
	return start(c.t, c.config)
}

// pod is an example's pod on this machine: its mounts are directories.
type pod struct {
	*cluster
	podSpec
	volumes map[string]string
	fields  map[string]string // what the downward API says
}

// newPod makes the volumes of a pod, after a look at what it may do.
func (c *cluster) newPod(spec podSpec, fields map[string]string) *pod {
	c.t.Helper()
	p := &pod{c, spec, map[string]string{}, fields}
	if !spec.SecurityContext.RunAsNonRoot || spec.SecurityContext.RunAsUser == 0 {
		c.t.Error("the pod may be root's, or its containers those of different users")
	}
	for _, v := range spec.Volumes {
		dir := c.t.TempDir()
		p.volumes[v.Name] = dir
		switch {
		case v.EmptyDir != nil && v.EmptyDir.Medium == "Memory":
		case v.ConfigMap != nil && v.ConfigMap.Name == "broker-ca":
			p.put(dir, "ca.crt", read(c.t, c.path("ca.pem")))
		case v.Projected != nil:
			source := v.Projected.Sources[0].ServiceAccountToken
			p.put(dir, source.Path, c.kube.token("invoices", source.Audience))
		default:
			c.t.Errorf("volume %s is none that holds a token, an authority or an identity", v.Name)
		}
	}
	return p
}

func (p *pod) put(dir, name, content string) {
	p.t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// here is a path inside a container, on this machine.
func (p *pod) here(c podContainer, path string) string {
	p.t.Helper()
	for _, m := range c.VolumeMounts {
		dir, ok := p.volumes[m.Name]
		if !ok {
			p.t.Errorf("container %s mounts %s, which is no volume", c.Name, m.Name)
		}
		if rest, ok := strings.CutPrefix(path, m.MountPath+"/"); ok {
			return filepath.Join(dir, rest)
		}
	}
	return path
}

// command is that of a container, with its environment, as a kubelet would start
// it. Programs are those of this machine.
func (p *pod) command(c podContainer, line []string) *exec.Cmd {
	p.t.Helper()
	env, vars := []string{"PATH=" + os.Getenv("PATH")}, []string{}
	for _, e := range c.Env {
		value := e.Value
		if path := e.ValueFrom.FieldRef.FieldPath; path != "" {
			var ok bool
			if value, ok = p.fields[path]; !ok {
				p.t.Errorf("container %s wants the field %s", c.Name, path)
			}
		}
		value = p.here(c, value)
		if e.Name == "BROKER_ADDRESS" {
			if value != "broker.token-broker.svc:7443" {
				p.t.Errorf("the broker is at %s", value)
			}
			value = p.address
		}
		env, vars = append(env, e.Name+"="+value), append(vars, "$("+e.Name+")", value)
	}
	line = slices.Clone(line)
	for i, arg := range line {
		line[i] = p.here(c, strings.NewReplacer(vars...).Replace(arg))
	}
	switch line[0] {
	case "broker":
		line[0] = binary
		if !c.SecurityContext.ReadOnlyRootFilesystem || *c.SecurityContext.AllowPrivilegeEscalation {
			p.t.Errorf("container %s may do more than it needs", c.Name)
		}
	case "worker":
		line = []string{"sh", "-c", `test "$(stat -c %a "$TOKEN_FILE")" = 600 && cat "$TOKEN_FILE"`}
	}
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Env = env
	return cmd
}

// run runs a container, or its probe, to its end.
func (p *pod) run(c podContainer, line ...string) outcome {
	p.t.Helper()
	if len(line) == 0 {
		line = slices.Concat(c.Command, c.Args)
	}
	return finish(p.t, p.command(c, line))
}

// worker is what the pod's own container reads.
func (p *pod) worker() string {
	p.t.Helper()
	w := p.Containers[0]
	w.Command = []string{"worker"} // where it is up to the platform
	got := p.run(w)
	if got.status != 0 {
		p.t.Fatalf("the worker cannot read the token: %+v", got)
	}
	return strings.TrimSpace(got.stdout)
}

// finish runs a command to its end.
func finish(t testing.TB, cmd *exec.Cmd) outcome {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%v: %v", cmd.Args, err)
	}
	return outcome{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// live tells whether the stand-in Vantage takes a token.
func (s *stage) live(token string) bool {
	s.t.Helper()
	r, err := http.NewRequest(http.MethodGet, s.url+"/api/publicapi/v1/skills", nil)
	if err != nil {
		s.t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		s.t.Fatal(err)
	}
	response.Body.Close()
	return response.StatusCode == http.StatusOK
}

func jobFields(name string) map[string]string {
	return map[string]string{"metadata.namespace": "shop", "metadata.labels['batch.kubernetes.io/job-name']": name}
}

// A Job's pods have one token, whichever try they are, and no other Job has it.
func TestJobFetchesItsToken(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	spec := jobPod(t, "job.yaml")
	if spec.RestartPolicy != "Never" && spec.RestartPolicy != "OnFailure" {
		t.Errorf("no Job may have restartPolicy %q", spec.RestartPolicy)
	}
	first := c.newPod(spec, jobFields("nightly-1"))
	token := first.InitContainers[0]
	early := token
	early.Args = append(slices.Clone(token.Args), "--timeout", "5s")
	if got := first.run(early); got.status != exitFailure || !strings.Contains(got.stderr, "is it running there") {
		t.Errorf("without a broker: %+v", got)
	}
	if left, err := os.ReadDir(first.volumes["token"]); err != nil || len(left) > 0 {
		t.Errorf("a failed try leaves %v, %v", left, err)
	}
	p := c.serve()
	read := func(of *pod) string {
		if got := of.run(of.InitContainers[0]); got.status != 0 || got.stdout != "" {
			t.Fatalf("%+v\n%s", got, p.log)
		}
		return of.worker()
	}
	its := read(first)
	if !c.live(its) {
		t.Error("it is no token")
	}
	if again := read(c.newPod(spec, jobFields("nightly-1"))); again != its {
		t.Error("a second try has another token")
	}
	if other := read(c.newPod(spec, jobFields("nightly-2"))); other == its {
		t.Error("another Job has the same token")
	}
	if calls := c.vantage.Calls(); calls.Total != 2 {
		t.Errorf("%d token requests, want one for each Job", calls.Total)
	}
	p.await("the audit log names the Job", func() bool { return strings.Contains(p.out.String(), `"job":"shop/nightly-1"`) })
	long := first.InitContainers[0]
	long.Args = slices.Clone(long.Args)
	long.Args[slices.Index(long.Args, "30m")] = "8760h"
	if got := first.run(long); got.status != exitFailure || !strings.Contains(got.stderr, "LIFETIME_UNAVAILABLE") {
		t.Errorf("for longer than any token: %+v", got)
	}
	if first.worker() != its {
		t.Error("a failed try takes the token away")
	}
	unnamed := jobPod(t, "job.yaml")
	unnamed.InitContainers[0].Env = slices.Delete(unnamed.InitContainers[0].Env, 0, 2)
	if pod := c.newPod(unnamed, nil); pod.run(pod.InitContainers[0]).status != exitUsage {
		t.Error("a Job without a name gets a token")
	}
}

// A sidecar keeps the token, whatever becomes of the broker.
func TestSidecarsKeepTheToken(t *testing.T) {
	t.Parallel()
	for name, example := range map[string]struct {
		spec   podSpec
		fields map[string]string
	}{
		"job":   {jobPod(t, "job-sidecar.yaml"), jobFields("archive-1")},
		"spark": {sparkPod(t), map[string]string{"metadata.namespace": "shop", "metadata.labels['spark-app-selector']": "spark-7f1c"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t)
			first := c.newPod(example.spec, example.fields)
			sidecar := first.InitContainers[0]
			if sidecar.RestartPolicy != "Always" || sidecar.StartupProbe.FailureThreshold == 0 {
				t.Errorf("it is no sidecar: %+v", sidecar)
			}
			ready := func(p *pod) bool { return p.run(sidecar, sidecar.StartupProbe.Exec.Command...).status == 0 }
			watch := background(t, first.command(sidecar, slices.Concat(sidecar.Command, sidecar.Args)))
			if ready(first) {
				t.Error("it is ready without a token")
			}
			p := c.serve() // which was away
			watch.await("there is a token", func() bool { return ready(first) })
			its := first.worker()
			if !c.live(its) {
				t.Error("it is no token")
			}
			second := c.newPod(example.spec, example.fields)
			other := background(t, second.command(sidecar, slices.Concat(sidecar.Command, sidecar.Args)))
			other.await("there is a token", func() bool { return ready(second) })
			if second.worker() != its || c.vantage.Calls().Total != 1 {
				t.Errorf("the second pod has another token: %d token requests", c.vantage.Calls().Total)
			}
			if status := p.stop(); status != 0 {
				t.Errorf("the broker: %d", status)
			}
			if first.worker() != its {
				t.Error("the token went with the broker")
			}
			for _, w := range []*process{watch, other} {
				if status := w.stop(); status != 0 {
					t.Errorf("a sidecar that is told to stop: %d\n%s", status, w.log)
				}
			}
			if first.worker() != its {
				t.Error("the token went with the sidecar")
			}
		})
	}
}

// background runs a command whose end is not waited for.
func background(t *testing.T, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{t: t, cmd: cmd, log: &lockedBuffer{}, out: &lockedBuffer{}, exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = p.out, p.log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.exited)
		_ = cmd.Wait() // the exit status is in ProcessState
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended already
		<-p.exited
	})
	return p
}

// A workflow's token lasts over its steps and tries, and ends with it.
func TestWorkflowEndsItsToken(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	p := c.serve()
	pods := argoPods(t, "0f8d6a52-1e2b-4b4e-9d1c-aa11bb22cc33")
	work, end := c.newPod(pods["work"], nil), c.newPod(pods["end"], nil)
	token := work.InitContainers[0]
	if got := work.run(token); got.status != 0 {
		t.Fatalf("%+v\n%s", got, p.log)
	}
	its := work.worker()
	again := c.newPod(pods["work"], nil)
	if got := again.run(token); got.status != 0 || again.worker() != its || !c.live(its) {
		t.Errorf("the next step: %+v", got)
	}
	shared := c.token()
	if got := end.run(end.Containers[0]); got.status != 0 || !strings.Contains(got.stdout, "of job 0f8d6a52-1e2b-4b4e-9d1c-aa11bb22cc33 of profile invoices: dropped here and revoked at the authorization server") {
		t.Errorf("the exit handler: %+v\n%s", got, p.log)
	}
	if c.live(its) || !c.live(shared) {
		t.Errorf("the workflow's token lives: %v; everybody's: %v", c.live(its), c.live(shared))
	}
	if got := work.run(token); got.status != exitFailure || !strings.Contains(got.stderr, "reason: JOB_ENDED") {
		t.Errorf("a step after the end: %+v", got)
	}
	if calls := c.vantage.Calls(); calls.Total != 2 || calls.Revocations["revoked"] != 1 {
		t.Errorf("%d token requests, revocations %v", calls.Total, calls.Revocations)
	}
}

// token is everybody's.
func (c *cluster) token() string {
	c.t.Helper()
	cmd := exec.Command(binary, "token", "invoices")
	cmd.Env = c.environment()
	got := finish(c.t, cmd)
	if got.status != 0 {
		c.t.Fatalf("%+v", got)
	}
	return strings.TrimSpace(got.stdout)
}

// environment is that of a program which calls as the examples do.
func (c *cluster) environment(more ...string) []string {
	c.t.Helper()
	account := c.write("account", c.kube.token("invoices", "token-broker"))
	return append(more, "PATH="+os.Getenv("PATH"), "BROKER="+binary, "BROKER_ADDRESS="+c.address, "BROKER_CA="+c.path("ca.pem"), "BROKER_TOKEN_FILE="+account)
}

// What the image holds needs nothing but itself.
func TestBinaryIsStatic(t *testing.T) {
	t.Parallel()
	dockerfile := read(t, examples+"Dockerfile")
	if !strings.Contains(dockerfile, "CGO_ENABLED=0 go build -trimpath -o /broker ./cmd/broker") {
		t.Errorf("the image is built otherwise:\n%s", dockerfile)
	}
	path := filepath.Join(t.TempDir(), "broker")
	build := exec.Command("go", "build", "-trimpath", "-o", path, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+runtime.GOARCH)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	file, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if libraries, err := file.ImportedLibraries(); err != nil || len(libraries) > 0 {
		t.Errorf("it needs %v, %v", libraries, err)
	}
	for _, program := range file.Progs {
		if program.Type == elf.PT_INTERP {
			t.Error("it needs a loader")
		}
	}
	if documented := read(t, "../../docs/batch.md"); !strings.Contains(documented, dockerfile) {
		t.Error("docs/batch.md shows another Dockerfile")
	}
}

// wrapper is with-token.sh on one shell.
type wrapper struct {
	*cluster
	shell string
	dir   string // where its files are
}

func (w *wrapper) command(args ...string) *exec.Cmd {
	w.t.Helper()
	cmd := exec.Command(w.shell, append([]string{examples + "with-token.sh"}, args...)...)
	cmd.Env = w.environment("TOKEN_DIR=" + w.dir)
	return cmd
}

// left is what the script leaves behind.
func (w *wrapper) left() []os.DirEntry {
	w.t.Helper()
	left, err := os.ReadDir(w.dir)
	if err != nil {
		w.t.Fatal(err)
	}
	return left
}

// onShells runs a test on the shells that systems have as sh.
func onShells(t *testing.T, test func(t *testing.T, w *wrapper)) {
	t.Parallel()
	var seen []string
	for _, shell := range []string{"dash", "bash", "sh"} {
		path, err := exec.LookPath(shell)
		if err != nil {
			t.Logf("NOT TESTED: %v", err)
			continue
		}
		if path, err = filepath.EvalSymlinks(path); err != nil {
			t.Fatal(err)
		}
		if slices.Contains(seen, filepath.Base(path)) {
			continue // it is one of the others
		}
		seen = append(seen, filepath.Base(path))
		t.Run(shell, func(t *testing.T) {
			t.Parallel()
			test(t, &wrapper{newCluster(t), shell, t.TempDir()})
		})
	}
}

func TestScriptIsClean(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("shellcheck"); err != nil {
		t.Logf("NOT TESTED: %v", err)
		return
	}
	if got := finish(t, exec.Command("shellcheck", "--shell=sh", examples+"with-token.sh")); got.status != 0 {
		t.Error(got.stdout)
	}
}

func TestProgramRunsWithAToken(t *testing.T) {
	onShells(t, func(t *testing.T, w *wrapper) {
		p := w.serve()
		umask := finish(t, exec.Command("sh", "-c", "umask")).stdout
		for name, c := range map[string]struct {
			program string
			status  int
			stdout  string
		}{
			"success":            {`echo done`, 0, "done\n"},
			"failure":            {`exit 7`, 7, ""},
			"ended by a signal":  {`kill -KILL $$`, 137, ""},
			"input":              {`cat`, 0, "from outside"},
			"the token":          {`stat -c '%a' "$TOKEN_FILE" && stat -c '%a' "$(dirname "$TOKEN_FILE")"`, 0, "600\n700\n"},
			"a path with blanks": {`printf '<%s>' "$@"`, 0, "<a b><*>"},
			"files of its own":   {`umask`, 0, umask},
		} {
			cmd := w.command("invoices", "--", "sh", "-c", c.program, "sh", "a b", "*")
			cmd.Stdin = strings.NewReader("from outside")
			if got := finish(t, cmd); got.status != c.status || got.stdout != c.stdout {
				t.Errorf("%s: %+v\n%s", name, got, p.log)
			}
		}
		got := finish(t, w.command("--scope", "openid", "--scope", "permissions", "--min-lifetime", "1h", "--job", "nightly/7", "invoices", "sh", "-c", `cat "$TOKEN_FILE"`))
		if !w.live(strings.TrimSpace(got.stdout)) || w.token() == strings.TrimSpace(got.stdout) {
			t.Errorf("of fewer scopes: %+v", got)
		}
		for _, name := range []string{"no-such-program", "clean"} { // the script has a function of that name
			if got := finish(t, w.command("invoices", name)); got.status != 127 {
				t.Errorf("no such program: %+v", got)
			}
		}
		if left := w.left(); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
}

func TestProgramIsNotStartedWithoutAToken(t *testing.T) {
	onShells(t, func(t *testing.T, w *wrapper) {
		for name, c := range map[string]struct {
			args   []string
			status int
			stderr string
		}{
			"no broker":              {[]string{"--wait", "1", "invoices"}, 1, "no token of profile invoices within 1 s"},
			"an unset variable":      {[]string{"--job", "", "invoices"}, 2, "--job needs a value"},
			"one that is left":       {[]string{"--job", "$(JOB_NAME)", "invoices"}, 2, "nothing has replaced"},
			"revoking what is all's": {[]string{"--job", "a", "--revoke", "always", "invoices"}, 2, "add --job ID and --dedicated"},
			"revoking nobody's":      {[]string{"--dedicated", "--revoke", "always", "invoices"}, 2, "add --job ID and --dedicated"},
			"revoking when?":         {[]string{"--job", "a", "--dedicated", "--revoke", "never", "invoices"}, 2, "use success or always"},
			"waiting how long?":      {[]string{"--wait", "1m", "invoices"}, 2, "use a number of seconds"},
			"or how long at all?":    {[]string{"--wait", "08", "invoices"}, 2, "use a number of seconds"}, // octal, to a shell
			"waiting for years":      {[]string{"--wait", "99999999999999999999", "invoices"}, 2, "use a number of seconds"},
			"an unknown option":      {[]string{"--token", "invoices"}, 2, "unknown option --token"},
		} {
			got := finish(t, w.command(append(c.args, "echo", "started")...))
			if got.status != c.status || !strings.Contains(got.stderr, c.stderr) || got.stdout != "" {
				t.Errorf("%s: %+v", name, got)
			}
		}
		if got := finish(t, w.command("invoices")); got.status != 2 || !strings.Contains(got.stderr, "which program?") {
			t.Errorf("no program: %+v", got)
		}
		p := w.serve()
		if got := finish(t, w.command("payments", "echo", "started")); got.status != 1 || got.stdout != "" || !strings.Contains(got.stderr, "CALLER_DENIED") {
			t.Errorf("a profile that is not its own: %+v\n%s", got, p.log)
		}
		if left := w.left(); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
}

func TestProgramGetsSignals(t *testing.T) {
	// A shell cannot trap what its parent ignores, as whoever runs under nohup does
	// SIGHUP; children of who listens for it do not ignore it.
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	t.Cleanup(func() { signal.Stop(hangups) })
	onShells(t, func(t *testing.T, w *wrapper) {
		w.serve()
		for sent, heard := range map[syscall.Signal]string{
			syscall.SIGTERM: "TERM", syscall.SIGHUP: "HUP", syscall.SIGUSR1: "USR1", syscall.SIGUSR2: "USR2", syscall.SIGINT: "TERM", syscall.SIGQUIT: "TERM",
		} {
			p := background(t, w.command("invoices", "sh", "-c", `trap 'echo heard; exit 9' `+heard+`; echo up; while :; do sleep 0.05; done`))
			p.await("it is up", func() bool { return strings.Contains(p.out.String(), "up") })
			p.signal(sent)
			p.ended()
			if status := p.cmd.ProcessState.ExitCode(); status != 9 || !strings.Contains(p.out.String(), "heard") {
				t.Errorf("%v: exit status %d, output %q\n%s", sent, status, p.out, p.log)
			}
		}
		plain := background(t, w.command("invoices", "sh", "-c", `echo up; exec sleep 60`))
		plain.await("it is up", func() bool { return strings.Contains(plain.out.String(), "up") })
		plain.signal(syscall.SIGTERM)
		plain.ended()
		if status := plain.cmd.ProcessState.ExitCode(); status != 143 {
			t.Errorf("a program without a trap: exit status %d", status)
		}
		if left := w.left(); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
}

// Who is told to stop while it waits for its first token stops.
func TestWaitingForATokenEndsWithASignal(t *testing.T) {
	onShells(t, func(t *testing.T, w *wrapper) {
		p := background(t, w.command("invoices", "echo", "started"))
		p.await("it waits", func() bool { return len(w.left()) > 0 })
		if status := p.stop(); status != 143 || p.out.String() != "" {
			t.Errorf("exit status %d, output %q\n%s", status, p.out, p.log)
		}
		if left := w.left(); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
}

// The broker may come late and leave early, and a token that is replaced is
// there for whoever reads the file again.
func TestProgramOutlivesTheBroker(t *testing.T) {
	onShells(t, func(t *testing.T, w *wrapper) {
		script := `cat "$TOKEN_FILE"; while read -r line; do cat "$TOKEN_FILE"; done`
		cmd := w.command("invoices", "sh", "-c", script)
		input, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		p := background(t, cmd)
		p.await("it waits", func() bool { return len(w.left()) > 0 })
		b := w.serve()
		tokens := func() []string { return strings.Fields(p.out.String()) }
		again := func() string {
			before := len(tokens())
			if _, err := fmt.Fprintln(input); err != nil {
				t.Fatal(err)
			}
			p.await("it has read the file", func() bool { return len(tokens()) > before })
			return tokens()[before]
		}
		p.await("it has started", func() bool { return len(tokens()) == 1 })
		first := tokens()[0]
		if !w.live(first) {
			t.Error("it is no token")
		}
		revoke := exec.Command(binary, "revoke", "invoices")
		revoke.Env = w.environment()
		if got := finish(t, revoke); got.status != 0 {
			t.Fatalf("%+v", got)
		}
		p.await("the next token is there", func() bool { return again() != first })
		second := again()
		b.stop()
		if again() != second {
			t.Error("the token went with the broker")
		}
		input.Close()
		<-p.exited
		if status := p.cmd.ProcessState.ExitCode(); status != 0 {
			t.Errorf("exit status %d\n%s", status, p.log)
		}
	})
}

// A job's own token ends when its owner says so, and only then.
func TestProgramEndsItsToken(t *testing.T) {
	onShells(t, func(t *testing.T, w *wrapper) {
		p := w.serve()
		shared := w.token()
		for i, c := range []struct {
			when, program string
			status        int
			ends          bool
		}{
			{"", `true`, 0, false},
			{"success", `exit 4`, 4, false},
			{"success", `true`, 0, true},
			{"always", `exit 4`, 4, true},
			{"always", `kill -TERM $PPID; exec sleep 60`, 143, true},
		} {
			id := fmt.Sprintf("nightly/%d", i)
			args := []string{"--job", id, "--dedicated", "invoices", "sh", "-c", `cat "$TOKEN_FILE"; ` + c.program}
			if c.when != "" {
				args = append([]string{"--revoke", c.when}, args...)
			}
			before := w.vantage.Calls().Revocations["revoked"]
			got := finish(t, w.command(args...))
			token := strings.TrimSpace(got.stdout)
			if got.status != c.status || token == "" || token == shared {
				t.Fatalf("revoke %q, %s: %+v\n%s", c.when, c.program, got, p.log)
			}
			if after := w.vantage.Calls().Revocations["revoked"]; (after == before+1) != c.ends || w.live(token) == c.ends {
				t.Errorf("revoke %q, %s: %d revocations, the token lives: %v\n%s", c.when, c.program, after-before, w.live(token), got.stderr)
			}
			again := finish(t, w.command(args...))
			if c.ends && (again.status != 1 || !strings.Contains(again.stderr, "JOB_ENDED")) {
				t.Errorf("revoke %q, %s: once more: %+v", c.when, c.program, again)
			}
			if !c.ends && strings.TrimSpace(again.stdout) != token {
				t.Errorf("revoke %q, %s: the next try has another token: %+v", c.when, c.program, again)
			}
		}
		if !w.live(shared) {
			t.Error("everybody's token is revoked")
		}
		if left := w.left(); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
}

// airflow is as much of Airflow as the example uses.
const airflow = `
import sys, types
ti = types.SimpleNamespace(dag_id="invoices", run_id="scheduled__2026-01-31T00:00:00+00:00", task_id="archive", map_index=-1, try_number=%d, max_tries=3)
sdk = types.ModuleType("airflow.sdk")
sdk.get_current_context = lambda: {"ti": ti}
sdk.task = lambda **_: lambda f: f
dags = []
sdk.dag = lambda **_: lambda f: lambda: dags.append(f)
sys.modules["airflow"] = types.ModuleType("airflow")
sys.modules["airflow.sdk"] = sdk
import broker_token
`

// python runs a program beside the example for Airflow.
func (c *cluster) python(program string, more ...string) outcome {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "python3", "-B", "-c", program)
	bin := c.t.TempDir()
	if err := os.Symlink(binary, filepath.Join(bin, "broker")); err != nil {
		c.t.Fatal(err)
	}
	cmd.Env = c.environment(append(more, "PYTHONPATH="+examples+"airflow", "VANTAGE_SKILLS="+c.url+"/api/publicapi/v1/skills")...)
	i := slices.IndexFunc(cmd.Env, func(e string) bool { return strings.HasPrefix(e, "PATH=") })
	cmd.Env[i] = "PATH=" + bin + ":" + os.Getenv("PATH")
	return finish(c.t, cmd)
}

// The example DAG works, and its token ends when the task is over for good.
func TestAirflowTask(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	p := c.serve()
	const succeed = `
import invoices_dag
for dag in dags:
    dag()
`
	const fail = `
import invoices_dag
def work(path):
    raise RuntimeError("no luck")
invoices_dag.work = work
dags[0]()
`
	run := func(try int, program string) outcome {
		return c.python(fmt.Sprintf(airflow, try) + program)
	}
	got := run(1, fail)
	if got.status != 1 || !strings.Contains(got.stderr, "RuntimeError: no luck") {
		t.Fatalf("a try that fails: %+v\n%s", got, p.log)
	}
	if calls := c.vantage.Calls(); calls.Total != 1 || calls.Revocations["revoked"] != 0 {
		t.Errorf("after it: %d token requests, revocations %v", calls.Total, calls.Revocations)
	}
	if got := run(2, succeed); got.status != 0 {
		t.Errorf("a try that succeeds: %+v\n%s", got, p.log)
	}
	if calls := c.vantage.Calls(); calls.Total != 1 || calls.Revocations["revoked"] != 1 {
		t.Errorf("after it: %d token requests, revocations %v", calls.Total, calls.Revocations)
	}
	if got := run(3, succeed); got.status != 1 || !strings.Contains(got.stderr, "NoToken") || !strings.Contains(got.stderr, "JOB_ENDED") {
		t.Errorf("a try after the end: %+v", got)
	}
	p.await("the audit log names the task", func() bool {
		return strings.Contains(p.out.String(), `"job":"invoices/scheduled__2026-01-31T00:00:00+00:00/archive"`)
	})
}

func TestAirflowWrapper(t *testing.T) {
	t.Parallel()
	c := newCluster(t)
	if got := c.python(`
import broker_token
with broker_token.broker_token("invoices", wait=0.5):
    print("started")
`); got.status != 1 || got.stdout != "" || !strings.Contains(got.stderr, "NoToken: no token of profile invoices: none came within 0.5 s") {
		t.Errorf("without a broker: %+v", got)
	}
	c.serve()
	for name, p := range map[string]struct{ program, stdout, stderr string }{
		"the token": {`
import os, stat
with broker_token.broker_token("invoices", scopes=["openid"], min_lifetime="1h") as path:
    print(oct(stat.S_IMODE(os.stat(path).st_mode)), open(path).read().count("."))
print(os.path.exists(os.path.dirname(path)))`, "0o600 2\nFalse\n", ""},
		"what is not allowed": {`
try:
    with broker_token.broker_token("payments"):
        print("started")
except broker_token.NoToken as e:
    print("CALLER_DENIED" in str(e), "broker watch has ended" in str(e))`, "True True\n", ""},
		"arguments": {`
for a in [dict(job=""), dict(dedicated=True), dict(job="a", revoke_after_success=True)]:
    try:
        with broker_token.broker_token("invoices", **a):
            print("started")
    except ValueError as e:
        print(e)`, "the job's id is empty\na token of a job's own needs the job's id\nonly a token of the job's own can be revoked: dedicated=True\n", ""},
		"ids": {`
print(broker_token.job_id({"ti": ti}))
ti.map_index = 0
print(broker_token.job_id({"ti": ti}))
ti.task_id = "a" * 200
one = broker_token.job_id({"ti": ti})
ti.map_index = 1
other = broker_token.job_id({"ti": ti})
print(len(one), one != other, one.startswith("invoices/scheduled__"))
ti.task_id = "für alle"
print(broker_token.job_id({"ti": ti})[:-32], broker_token.job_id({"ti": ti}).isascii())
print([broker_token.last_try({"ti": types.SimpleNamespace(try_number=n, max_tries=2)}) for n in (1, 2, 3)])`,
			"invoices/scheduled__2026-01-31T00:00:00+00:00/archive\ninvoices/scheduled__2026-01-31T00:00:00+00:00/archive/0\n128 True True\n" +
				"invoices/scheduled__2026-01-31T00:00:00+00:00/f_r_alle/1~ True\n[False, False, True]\n", ""},
	} {
		got := c.python(fmt.Sprintf(airflow, 1) + p.program)
		if got.status != 0 || got.stdout != p.stdout {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
