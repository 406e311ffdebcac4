// Package schema_test holds the examples beside it to the types of Kubernetes: a field that Kubernetes does not know, or
// knows elsewhere or otherwise, fails. It is a module of its own, so that nothing else depends on Kubernetes.
// What the examples do, the tests of cmd/broker try for real.
package schema_test

import (
	"errors"
	"os"
	"testing"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// workflow is as much of Argo's Workflow as the example has; the rest of it is Kubernetes'.
type workflow struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		Entrypoint         string                     `json:"entrypoint"`
		OnExit             string                     `json:"onExit"`
		ServiceAccountName string                     `json:"serviceAccountName"`
		SecurityContext    *corev1.PodSecurityContext `json:"securityContext"`
		Volumes            []corev1.Volume            `json:"volumes"`
		Templates          []struct {
			Name           string             `json:"name"`
			InitContainers []corev1.Container `json:"initContainers"`
			Container      *corev1.Container  `json:"container"`
			RetryStrategy  struct {
				Limit       string `json:"limit"`
				RetryPolicy string `json:"retryPolicy"`
				Backoff     struct {
					Duration string `json:"duration"`
					Factor   string `json:"factor"`
				} `json:"backoff"`
			} `json:"retryStrategy"`
		} `json:"templates"`
	} `json:"spec"`
}

func TestExamplesAreWhatKubernetesReads(t *testing.T) {
	for file, c := range map[string]struct {
		object  any
		version string
		kind    string
	}{
		"job.yaml":            {&batchv1.Job{}, "batch/v1", "Job"},
		"job-sidecar.yaml":    {&batchv1.Job{}, "batch/v1", "Job"},
		"spark-executor.yaml": {&corev1.Pod{}, "v1", "Pod"},
		"argo-workflow.yaml":  {&workflow{}, "argoproj.io/v1alpha1", "Workflow"},
	} {
		data, err := os.ReadFile("../" + file)
		if err != nil {
			t.Error(err)
			continue
		}
		var is metav1.TypeMeta
		if err := yaml.Unmarshal(data, &is); err != nil || is.APIVersion != c.version || is.Kind != c.kind {
			t.Errorf("%s is %s %s (%v), want %s %s", file, is.APIVersion, is.Kind, err, c.version, c.kind)
		}
		if err := strict(data, c.object); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
}

// strict reads as the API server does with fieldValidation=Strict.
func strict(data []byte, object any) error {
	asJSON, err := yaml.YAMLToJSONStrict(data)
	if err != nil {
		return err
	}
	unknown, err := json.UnmarshalStrict(asJSON, object)
	return errors.Join(append(unknown, err)...)
}

func TestMistakesAreFound(t *testing.T) {
	for name, text := range map[string]string{
		"unknown":         `spec: {templates: {}}`,
		"at another case": `spec: {template: {spec: {restartpolicy: Never}}}`,
		"at other place":  `spec: {restartPolicy: Never}`,
		"of another type": `spec: {template: {spec: {containers: [{name: a, command: worker}]}}}`,
		"given twice":     "spec: {backoffLimit: 1, backoffLimit: 2}",
	} {
		if strict([]byte(text), &batchv1.Job{}) == nil {
			t.Errorf("a field that is %s is not found", name)
		}
	}
}
