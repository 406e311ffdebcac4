package config

import (
	"bytes"
	"errors"
	"io"
	"regexp"
	"sort"
	"strings"

	"go.yaml.in/yaml/v3"
)

// parse returns the one document in text, nil when there is none, or notes why
// there is not one document.
func (n *notes) parse(text []byte) (root *yaml.Node, ok bool) {
	documents, err := decodeAll(text)
	switch {
	case err != nil:
		n.syntax(text, err)
		return nil, false
	case len(documents) == 0:
		return nil, true
	case len(documents) > 1:
		n.problemAt(at(documents[1]), "", "a second YAML document begins here: keep one document in the file")
		return nil, false
	}
	return documents[0], true
}

// decodeAll returns the documents in text, two at most.
func decodeAll(text []byte) (documents []*yaml.Node, err error) {
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	for len(documents) < 2 {
		var document yaml.Node
		err := decoder.Decode(&document)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		if document.Kind == yaml.DocumentNode && len(document.Content) == 1 {
			documents = append(documents, document.Content[0])
		}
	}
	return documents, nil
}

// yamlPrefix is what the parser begins its errors with. Its line is often the
// one where the construct begins that has the mistake, and often one less.
var yamlPrefix = regexp.MustCompile(`^yaml: (line [0-9]+: )?`)

// syntax notes an error of the YAML parser, which can repeat pieces of the
// file: only texts known to be the parser's own are shown.
func (n *notes) syntax(text []byte, err error) {
	reason := yamlPrefix.ReplaceAllString(err.Error(), "")
	n.problemAt(placeOfError(text, err), "", "is not YAML"+explain(reason))
}

// placeOfError finds the line that makes the parser fail: the first with which
// the text up to there fails in the same way. From then on what follows does
// not matter, so it can be searched for by halves.
func placeOfError(text []byte, err error) position {
	lines := bytes.SplitAfter(text, []byte("\n"))
	ends := make([]int, len(lines))
	end := 0
	for i, line := range lines {
		end += len(line)
		ends[i] = end
	}
	i := sort.Search(len(lines)-1, func(i int) bool {
		_, early := decodeAll(text[:ends[i]])
		return early != nil && early.Error() == err.Error()
	})
	return position{i + 1, 1 + len(lines[i]) - len(bytes.TrimLeft(lines[i], " \t"))}
}

func explain(reason string) string {
	switch {
	case strings.HasPrefix(reason, "unknown anchor"):
		return ": a value begins with *, which means an alias; put it in quotes if it is text"
	case strings.HasPrefix(reason, "found character that cannot start any token"):
		return ": " + reason + "; indent with blanks instead of tabs, and put text that begins with @, ` or % in quotes"
	case strings.HasPrefix(reason, "could not find "), strings.HasPrefix(reason, "did not find "):
		return ": " + reason
	case strings.ContainsAny(reason, "'\"`"):
		return ""
	}
	return ": " + reason
}
