package config

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"buf.build/gen/go/bufbuild/protovalidate/protocolbuffers/go/buf/validate"
	"buf.build/go/protovalidate"
	"buf.build/go/protoyaml"
	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"

	configv1 "github.com/tokenbroker/tokenbroker/gen/tokenbroker/config/v1"
)

// validator is compiled once per process, when it is first needed: that takes
// some 20 ms, a validation well under one.
var validator = sync.OnceValues(func() (protovalidate.Validator, error) {
	return protovalidate.New(protovalidate.WithMessages(&configv1.Config{}), protovalidate.WithDisableLazy())
})

// decode turns the nodes, whose shape is right, into the message.
func (n *notes) decode(root *yaml.Node) *configv1.Config {
	message := &configv1.Config{}
	// protoyaml quotes the text in its errors. It gets blank lines instead,
	// enough of them for every node, and the nodes from graft.
	blank := "{}" + strings.Repeat("\n", lastLine(root))
	options := protoyaml.UnmarshalOptions{CustomUnmarshaler: graft{root}}
	if options.Unmarshal([]byte(blank), message) != nil {
		// Not shown: the decoder's errors repeat values. The shape has been
		// checked, so nobody should ever see this.
		n.problem("", "cannot be decoded: a value has a type that the schema does not expect")
	}
	return message
}

// graft replaces the document that protoyaml has parsed by one that is parsed
// already.
type graft struct{ root *yaml.Node }

func (g graft) Unmarshal(node *yaml.Node, message proto.Message) (bool, error) {
	if _, ok := message.(*configv1.Config); ok {
		*node = *g.root
	}
	return false, nil
}

func lastLine(node *yaml.Node) int {
	last := node.Line
	for _, c := range node.Content {
		last = max(last, lastLine(c))
	}
	return last
}

// validate notes which rules of the schema are broken.
func (n *notes) validate(message *configv1.Config) {
	v, err := validator()
	if err == nil {
		err = v.Validate(message)
	}
	var broken *protovalidate.ValidationError
	switch {
	case err == nil:
	case errors.As(err, &broken):
		for _, violation := range broken.Violations {
			n.violation(message, violation)
		}
	default: // The error could repeat a value.
		n.problem("", "cannot be checked: the schema has a rule that does not work, which is a mistake in this program")
	}
}

func (n *notes) violation(in proto.Message, v *protovalidate.Violation) {
	path, field := locate(in, v.Proto.GetField())
	message := sentence(v, field)
	if !n.follows(path, message) {
		n.problem(n.nearer(path, v.Proto.GetRuleId()), message)
	}
}

// follows reports whether a violation is but a consequence of a value that was
// left out: it is about that value, or names it.
func (n *notes) follows(path, message string) bool {
	for p := path; ; p = parent(p) {
		if n.broken[p] {
			return true
		}
		if p == "" {
			break
		}
	}
	return slices.ContainsFunc(n.brokenIn[path], func(field string) bool {
		return slices.Contains(strings.FieldsFunc(message, notInName), field)
	})
}

func notInName(c rune) bool {
	return c != '_' && (c < 'a' || c > 'z') && (c < '0' || c > '9')
}

// nearer points into the message at path when the rule is about one of the
// fields that it has: the rule vantage.base_url.http is about base_url.
func (n *notes) nearer(path, rule string) string {
	for _, field := range strings.Split(rule, ".") {
		if _, ok := n.places[child(path, field)]; ok {
			return child(path, field)
		}
	}
	return path
}

// locate follows a path from the top of the configuration. The field is the last
// on it, nil when there is none.
func locate(in proto.Message, way *validate.FieldPath) (path string, field protoreflect.FieldDescriptor) {
	message := in.ProtoReflect().Descriptor()
	for _, element := range way.GetElements() {
		path = child(path, element.GetFieldName())
		field = message.Fields().ByName(protoreflect.Name(element.GetFieldName()))
		message = field.Message()
		switch subscript := element.GetSubscript().(type) {
		case *validate.FieldPathElement_Index:
			path = item(path, int(subscript.Index))
		case *validate.FieldPathElement_StringKey:
			path = mapKey(path, subscript.StringKey)
		}
	}
	return path, field
}

// patterns says in words what the schema's regular expressions demand.
var patterns = map[protoreflect.FullName]string{
	"tokenbroker.config.v1.Secret.env":              "must be the name of an environment variable: letters, digits and _",
	"tokenbroker.config.v1.Profile.scopes":          "must be one scope, without blanks, quotes and backslashes (RFC 6749 section 3.3): write each scope as an item of its own",
	"tokenbroker.config.v1.Vantage.tenant_id":       "must be 1 to 128 letters, digits and any of . _ ~ -, and begin with a letter or digit",
	"tokenbroker.config.v1.Vantage.product_id":      "must be 1 to 128 printable ASCII characters",
	"tokenbroker.config.v1.Vantage.client_id":       "must be 1 to 256 printable ASCII characters",
	"tokenbroker.config.v1.SecureAuth.tenant_id":    "must be 1 to 63 letters, digits and -, and begin and end with a letter or digit",
	"tokenbroker.config.v1.SecureAuth.workspace_id": "must be 1 to 128 letters, digits and any of . _ ~ -, and begin with a letter or digit",
	"tokenbroker.config.v1.SecureAuth.client_id":    "must be 1 to 256 printable ASCII characters",
	"tokenbroker.config.v1.OAuth2.client_id":        "must be 1 to 256 printable ASCII characters",
	"tokenbroker.config.v1.OAuth2.resource":         "must be an absolute URI without fragment (RFC 8707), for example https://api.example.com/",
	"tokenbroker.config.v1.ServiceAccounts.cluster": "must be 1 to 63 of the characters a to z, 0 to 9, . and -, and begin and end with a letter or digit",
	"tokenbroker.config.v1.PolicyRule.callers":      "must be printable ASCII without blanks, for example spiffe://prod/ns/batch/*, dns:worker.example.com or anonymous",
	"tokenbroker.config.v1.Forwarder.peers":         "must be printable ASCII without blanks, for example spiffe://prod/ns/mesh/sa/gateway, dns:envoy.example.com or unix:uid:1337",
	"tokenbroker.config.v1.Forwarder.callers":       "must be printable ASCII without blanks, for example spiffe://prod/ns/batch/* or dns:*.example.com",
	"tokenbroker.config.v1.PolicyRule.profiles":     "must be the name of a profile, in which * can stand for any number of characters",
	"tokenbroker.config.v1.PolicyRule.scopes":       "must be one scope, without blanks, quotes and backslashes, in which * can stand for any number of characters",
}

// sentence says in our words what a violated rule demands of a field.
func sentence(v *protovalidate.Violation, field protoreflect.FieldDescriptor) string {
	given := strings.TrimPrefix(v.Proto.GetMessage(), "value ")
	rule := v.Proto.GetRuleId()
	switch {
	case rule == "string.pattern":
		return cmp.Or(patterns[field.FullName()], given)
	case strings.HasPrefix(rule, "duration."):
		return between(rulesOf(field).GetDuration())
	case rule == "required":
		return "is missing: add it"
	case rule == "message.oneof":
		return strings.Replace(given, "can be set", "can be set: remove the others", 1)
	case !v.RuleValue.IsValid():
		return given
	}
	switch rule {
	case "string.in":
		return "must be one of " + listed(v.RuleValue)
	case "string.not_in":
		return "is set by the broker itself, or has a field of its own: remove it"
	case "string.min_len":
		return "must not be empty"
	case "string.max_len":
		return fmt.Sprintf("must be at most %d characters long", v.RuleValue.Uint())
	case "repeated.min_items":
		return atLeast(v.RuleValue.Uint())
	case "repeated.max_items":
		return atMost(v.RuleValue.Uint())
	case "repeated.unique":
		return "must not have the same item twice"
	}
	return given
}

func listed(values protoreflect.Value) string {
	var words []string
	for i := range values.List().Len() {
		words = append(words, values.List().Get(i).String())
	}
	return strings.Join(words, ", ")
}

func atLeast(number uint64) string {
	if number == 1 {
		return "must have at least 1 item"
	}
	return fmt.Sprintf("must have at least %d items", number)
}

func atMost(number uint64) string { return fmt.Sprintf("must have at most %d items", number) }

func between(rules *validate.DurationRules) string {
	return fmt.Sprintf("must be %s to %s", span(rules.GetGte()), span(rules.GetLte()))
}

func rulesOf(field protoreflect.FieldDescriptor) *validate.FieldRules {
	rules, _ := proto.GetExtension(field.Options(), validate.E_Field).(*validate.FieldRules)
	return rules
}

// span writes a duration as people do: 30d, 24h, 90s.
func span(d *durationpb.Duration) string {
	const day = 24 * time.Hour
	switch t := d.AsDuration(); {
	case t > day && t%day == 0:
		return fmt.Sprintf("%dd", t/day)
	case t >= time.Hour && t%time.Hour == 0:
		return fmt.Sprintf("%dh", t/time.Hour)
	case t >= time.Minute && t%time.Minute == 0:
		return fmt.Sprintf("%dm", t/time.Minute)
	default:
		return t.String()
	}
}
