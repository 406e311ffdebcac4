package config

import (
	"fmt"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// The shape of the file is checked on its nodes, because only they know the
// lines and columns, and because the decoder repeats values in its errors. What
// comes out is a copy of the tree that has nothing but keys of the schema with
// values of the right type: the decoder finds nothing to complain about.

const (
	secretName   protoreflect.FullName = "tokenbroker.config.v1.Secret"
	durationName protoreflect.FullName = "google.protobuf.Duration"

	// mostItems of a list or a mapping are looked at: one more than any may
	// have, so that the rules notice, and not so many that it takes long.
	mostItems = 10_001

	writeSecret = "a secret is a reference: write {file: /path/of/file} or {env: NAME_OF_VARIABLE}"
)

// message returns what is right of the mapping at path, or nil.
func (n *notes) message(node *yaml.Node, path string, message protoreflect.MessageDescriptor) *yaml.Node {
	if isNull(node) {
		return &yaml.Node{Kind: yaml.MappingNode, Tag: "!!map"}
	}
	if node.Kind != yaml.MappingNode {
		return n.misshapen(node, path, notMapping(message))
	}
	right := *node
	right.Content = nil
	seen := map[protoreflect.FullName]*yaml.Node{}
	for i := 0; i+1 < min(len(node.Content), 2*mostItems); i += 2 {
		key, value := node.Content[i], node.Content[i+1]
		field := message.Fields().ByName(protoreflect.Name(key.Value))
		if key.Kind != yaml.ScalarNode || field == nil {
			n.problemAt(at(key), path, unknownKey(key, message))
			continue
		}
		fieldPath := child(path, key.Value)
		if !n.firstOf(seen, field, key, fieldPath) {
			continue
		}
		n.places[fieldPath] = placeOf(key, value)
		if value = n.field(value, fieldPath, field); value != nil {
			right.Content = append(right.Content, key, value)
		}
	}
	return &right
}

// firstOf notes a key that is there twice, and a second choice where only one
// is possible.
func (n *notes) firstOf(seen map[protoreflect.FullName]*yaml.Node, field protoreflect.FieldDescriptor, key *yaml.Node, path string) bool {
	if first := seen[field.FullName()]; first != nil {
		n.problemAt(at(key), path, fmt.Sprintf("is set on line %d already: remove one of the two", first.Line))
		return false
	}
	seen[field.FullName()] = key
	choice := field.ContainingOneof()
	if choice == nil || choice.IsSynthetic() {
		return true
	}
	if first := seen[choice.FullName()]; first != nil {
		n.problemAt(at(key), path, fmt.Sprintf("cannot be set beside %s (line %d): remove one of the two", first.Value, first.Line))
		return false
	}
	seen[choice.FullName()] = key
	return true
}

// field returns what is right of the value at path, or nil.
func (n *notes) field(value *yaml.Node, path string, field protoreflect.FieldDescriptor) *yaml.Node {
	switch {
	case field.IsList():
		return n.list(value, path, field)
	case field.IsMap():
		return n.pairs(value, path, field)
	case isNull(value) && (field.Message() == nil || field.Message().FullName() == durationName):
		return nil // left out
	}
	return n.single(value, path, field)
}

func (n *notes) list(node *yaml.Node, path string, field protoreflect.FieldDescriptor) *yaml.Node {
	if isNull(node) {
		return nil
	}
	if node.Kind != yaml.SequenceNode {
		return n.misshapen(node, path, "must be a list: write each item on a line of its own after \"- \", or all in [brackets]")
	}
	right := *node
	right.Content = nil
	for i, value := range node.Content[:min(len(node.Content), mostItems)] {
		itemPath := item(path, i)
		n.places[itemPath] = at(value)
		if isNull(value) {
			value = n.misshapen(value, itemPath, "is empty: remove it, or write a value")
		} else {
			value = n.single(value, itemPath, field)
		}
		if value == nil {
			// An item that is wrong keeps its place, so that the others
			// keep their numbers.
			value = blank(field)
		}
		right.Content = append(right.Content, value)
	}
	return &right
}

func (n *notes) pairs(node *yaml.Node, path string, field protoreflect.FieldDescriptor) *yaml.Node {
	if isNull(node) {
		return nil
	}
	if node.Kind != yaml.MappingNode {
		return n.misshapen(node, path, notMapping(nil))
	}
	right := *node
	right.Content = nil
	seen := map[string]bool{}
	for i := 0; i+1 < min(len(node.Content), 2*mostItems); i += 2 {
		key, value := node.Content[i], node.Content[i+1]
		entryPath := mapKey(path, key.Value)
		n.places[entryPath] = placeOf(key, value)
		switch {
		case seen[key.Value]:
			n.problemAt(at(key), entryPath, "is there twice: remove one of the two")
		case isNull(value):
			n.misshapen(value, entryPath, "is empty: remove it, or write a value")
		case n.text(key, entryPath) != nil && n.single(value, entryPath, field.MapValue()) != nil:
			right.Content = append(right.Content, key, value)
		}
		seen[key.Value] = true
	}
	return &right
}

func (n *notes) single(value *yaml.Node, path string, field protoreflect.FieldDescriptor) *yaml.Node {
	switch {
	case field.Message() == nil && field.Kind() == protoreflect.BoolKind:
		return n.boolean(value, path)
	case field.Message() == nil:
		return n.text(value, path)
	case field.Message().FullName() == durationName:
		return n.span(value, path)
	}
	return n.message(value, path, field.Message())
}

// text takes every scalar as it is written: a client_id may be a number.
func (n *notes) text(node *yaml.Node, path string) *yaml.Node {
	if node.Kind != yaml.ScalarNode {
		return n.misshapen(node, path, "must be text")
	}
	if node.Style&yaml.TaggedStyle != 0 && node.Tag != "!!str" {
		return n.misshapen(node, path, "begins with !, which means a YAML tag: put it in quotes if it is text")
	}
	right := *node
	right.Tag = "!!str"
	return &right
}

func (n *notes) boolean(node *yaml.Node, path string) *yaml.Node {
	if node.Kind != yaml.ScalarNode || node.Tag != "!!bool" {
		return n.misshapen(node, path, "must be true or false, without quotes")
	}
	right := *node
	right.Value = strings.ToLower(node.Value)
	return &right
}

// span turns days into hours, which is as far as the decoder goes.
func (n *notes) span(node *yaml.Node, path string) *yaml.Node {
	const advice = "must be a span of time with units, for example 300ms, 10s, 5m, 1h30m or 30d"
	if node.Kind != yaml.ScalarNode {
		return n.misshapen(node, path, advice)
	}
	d, err := parseSpan(node.Value)
	if err != nil {
		return n.misshapen(node, path, advice)
	}
	right := *node
	right.Tag, right.Value = "!!str", d.String()
	return &right
}

// parseSpan reads what time.ParseDuration does, after days of 24 hours.
func parseSpan(s string) (time.Duration, error) {
	days, rest, found := strings.Cut(s, "d")
	if !found {
		return time.ParseDuration(s)
	}
	hours, err := time.ParseDuration(days + "h")
	if err != nil || hours.Abs() > 100*366*time.Hour || strings.ContainsAny(days, "hmnuµμs") {
		return 0, fmt.Errorf("the number of days is wrong")
	}
	if rest == "" {
		return 24 * hours, nil
	}
	more, err := time.ParseDuration(rest)
	return 24*hours + more, err
}

// misshapen notes a value of the wrong type and leaves it out.
func (n *notes) misshapen(node *yaml.Node, path, message string) *yaml.Node {
	if node.Kind == yaml.AliasNode {
		message = "begins with *, which means a YAML alias, and those are not supported: write the value itself, in quotes if it is text"
	}
	n.problem(path, message)
	n.broken[path] = true
	n.brokenIn[parent(path)] = append(n.brokenIn[parent(path)], leaf(path))
	return nil
}

func notMapping(message protoreflect.MessageDescriptor) string {
	if message == nil {
		return "must have keys and values: write {key: value}"
	}
	if message.FullName() == secretName {
		return writeSecret
	}
	fields := fieldNames(message)
	if len(fields) == 0 {
		return "has no fields: write {}"
	}
	return "must have keys and values; it can have " + strings.Join(fields, ", ")
}

// unknownKey shows a key only where it cannot be a secret.
func unknownKey(key *yaml.Node, message protoreflect.MessageDescriptor) string {
	if message.FullName() == secretName {
		return "unknown key: " + writeSecret
	}
	name := "this key"
	if key.Kind == yaml.ScalarNode && looksLikeName(key.Value) {
		name = key.Value
	}
	fields := fieldNames(message)
	if like := closest(key.Value, fields); like != "" {
		return fmt.Sprintf("unknown key: %s is not known here, did you mean %s?", name, like)
	}
	if len(fields) == 0 {
		return fmt.Sprintf("unknown key: %s is not known here, there is nothing to set: write {}", name)
	}
	return fmt.Sprintf("unknown key: %s is not known here; there can be %s", name, strings.Join(fields, ", "))
}

func fieldNames(message protoreflect.MessageDescriptor) []string {
	var names []string
	for i := range message.Fields().Len() {
		names = append(names, string(message.Fields().Get(i).Name()))
	}
	return names
}

// closest is the name that word is most probably meant to be, if any: clientID,
// client-id and clientt_id are client_id.
func closest(word string, names []string) string {
	best, least := "", 3
	for _, name := range names {
		if d := distance(plain(word), plain(name)); d < least && 2*d <= len(name) {
			best, least = name, d
		}
	}
	return best
}

func plain(s string) string {
	return strings.ToLower(strings.NewReplacer("_", "", "-", "").Replace(s))
}

// distance is the number of letters to add, remove or change (Levenshtein),
// and large for words that are far too long.
func distance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0]++
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// blank stands for a list item whose value was wrong.
func blank(field protoreflect.FieldDescriptor) *yaml.Node {
	if field.Message() != nil {
		return &yaml.Node{Kind: yaml.MappingNode, Tag: "!!map"}
	}
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str"}
}

func isNull(node *yaml.Node) bool { return node.Kind == yaml.ScalarNode && node.Tag == "!!null" }

func at(node *yaml.Node) position { return position{max(1, node.Line), max(1, node.Column)} }

// placeOf is where a field is: its value, or its key when the value begins on
// another line or is empty.
func placeOf(key, value *yaml.Node) position {
	if value.Line != key.Line || isNull(value) {
		return at(key)
	}
	return at(value)
}
