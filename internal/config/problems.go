package config

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
)

// Problem is one mistake in a configuration, or one warning about it.
type Problem struct {
	// File is the configuration file as it was named to Load.
	File string `json:"file"`
	// Line and Column begin with 1. Zero means that the problem is the file
	// itself, for example that it cannot be read.
	Line   int `json:"line,omitempty"`
	Column int `json:"column,omitempty"`
	// Path is the field, for example profiles[0].vantage.region. Empty means
	// the whole file.
	Path string `json:"path,omitempty"`
	// Message says what is wrong and what to do about it.
	Message string `json:"message"`
	// Passing says that it may be over in a moment: certificates, keys and
	// lists belong together, and are replaced one after the other.
	Passing bool `json:"-"`
}

// String is the problem as editors and terminals understand it:
// "file:line:column: path: message".
func (p Problem) String() string {
	var s strings.Builder
	s.WriteString(p.File)
	if p.Line > 0 {
		s.WriteString(":" + strconv.Itoa(p.Line) + ":" + strconv.Itoa(p.Column))
	}
	s.WriteString(": ")
	if p.Path != "" {
		s.WriteString(p.Path + ": ")
	}
	s.WriteString(p.Message)
	return s.String()
}

// Problems are all that is wrong with a configuration, in the file's order. As
// an error they are one line each.
type Problems []Problem

func (p Problems) Error() string {
	lines := make([]string, len(p))
	for i := range p {
		lines[i] = p[i].String()
	}
	return strings.Join(lines, "\n")
}

// Passing reports whether all of them may be over in a moment.
func (p Problems) Passing() bool {
	return len(p) > 0 && !slices.ContainsFunc(p, func(p Problem) bool { return !p.Passing })
}

// sorted returns p in the file's order, each problem once.
func (p Problems) sorted() Problems {
	slices.SortStableFunc(p, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column),
			cmp.Compare(a.Path, b.Path), cmp.Compare(a.Message, b.Message))
	})
	return slices.Compact(p)
}

// position is a place in the configuration file.
type position struct{ line, column int }

// notes gathers what a load finds, and knows where in the file each field is.
type notes struct {
	file     string
	places   map[string]position // of every field that the file has, by path
	problems Problems
	warnings Problems
	// tainted has the path of every problem and of everything around it.
	tainted map[string]bool
	// broken has the paths whose values were left out because their shape is
	// wrong, brokenIn their fields' names by the path around them.
	broken   map[string]bool
	brokenIn map[string][]string
}

func newNotes(file string) *notes {
	return &notes{
		file:     file,
		places:   map[string]position{},
		tainted:  map[string]bool{},
		broken:   map[string]bool{},
		brokenIn: map[string][]string{},
	}
}

// problem notes what is wrong with the field at path.
func (n *notes) problem(path, message string) { n.problemAt(n.place(path), path, message) }

func (n *notes) problemAt(at position, path, message string) {
	n.problems = append(n.problems, n.note(at, path, message))
	for ; !n.tainted[path]; path = parent(path) {
		n.tainted[path] = true
	}
}

// passing notes a problem that may be over in a moment.
func (n *notes) passing(path, message string) {
	n.problem(path, message)
	n.problems[len(n.problems)-1].Passing = true
}

func (n *notes) warning(path, message string) {
	n.warnings = append(n.warnings, n.note(n.place(path), path, message))
}

func (n *notes) note(at position, path, message string) Problem {
	return Problem{File: n.file, Line: at.line, Column: at.column, Path: path, Message: message}
}

// place is where path is; for a field that is missing, where it should be.
func (n *notes) place(path string) position {
	for ; path != ""; path = parent(path) {
		if at, ok := n.places[path]; ok {
			return at
		}
	}
	return position{1, 1}
}

// placesOf are the places of a list's items.
func (n *notes) placesOf(list string, items int) []Place {
	var places []Place
	for i := range items {
		at := n.place(item(list, i))
		places = append(places, Place{File: n.file, Line: at.line, Column: at.column})
	}
	return places
}

// parent cuts the last element off a path: ".field", "[0]" or "[key]". Keys
// that hold brackets or dots are not written into paths; see mapKey.
func parent(path string) string {
	return path[:max(0, strings.LastIndexAny(path, ".["))]
}

// leaf is the last field in a path.
func leaf(path string) string {
	if strings.HasSuffix(path, "]") {
		path = parent(path)
	}
	return path[strings.LastIndexByte(path, '.')+1:]
}

// child is the path of a field of the message at path.
func child(path, field string) string {
	if path == "" {
		return field
	}
	return path + "." + field
}

func item(path string, i int) string { return path + "[" + strconv.Itoa(i) + "]" }

// mapKey is the path of an entry of the map at path. A key can be anything, a
// secret in the wrong place too, and is shown only where it looks like a name.
func mapKey(path, key string) string {
	if !looksLikeName(key) {
		key = "…"
	}
	return path + "[" + key + "]"
}

// looksLikeName reports whether s can be shown as a key: letters and
// underscores, as all keys of the schema, and not as secrets usually are.
func looksLikeName(s string) bool {
	if s == "" || len(s) > 40 {
		return false
	}
	for _, c := range s {
		if (c|0x20 < 'a' || c|0x20 > 'z') && c != '_' {
			return false
		}
	}
	return true
}
