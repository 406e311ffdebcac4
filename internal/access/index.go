package access

import (
	"slices"
	"strings"
)

// index finds the rules that have a pattern for a string, in a time that hardly
// depends on how many there are: patterns without "*" are looked up, the others
// by what they begin or end with, or by some letters in their middle, whichever
// fewer have, and only those found so are tried. It is immutable once it is
// built, and asking it allocates nothing.
type index struct {
	matches  func(pattern, s string) bool
	words    int // of a set of rules
	literals map[string]*ruleSet

	prefixes, suffixes keyed
	pieces             [][]placed // by pieceHash; nil if there are none
	others             []*glob

	// Only while it is built: the globs, in the order of the rules, and by
	// pattern.
	globs []*glob
	known map[string]*glob
}

// glob is a pattern with "*".
type glob struct {
	pattern string
	rules   ruleSet
}

// placed is a glob under one of its pieces.
type placed struct {
	piece string
	*glob
}

// keyed are globs by their beginnings, or by their ends.
type keyed struct {
	lengths []int // of the keys, ascending
	globs   map[string][]*glob
}

func newIndex(words int, matches func(pattern, s string) bool) *index {
	return &index{matches: matches, words: words, literals: map[string]*ruleSet{}, known: map[string]*glob{}}
}

// add notes that a rule has a pattern. Rules come in ascending order.
func (x *index) add(pattern string, rule int) {
	if !strings.Contains(pattern, "*") {
		s := x.literals[pattern]
		if s == nil {
			s = &ruleSet{}
			x.literals[pattern] = s
		}
		s.add(rule, x.words)
		return
	}
	g := x.known[pattern]
	if g == nil {
		g = &glob{pattern: pattern}
		x.known[pattern] = g
		x.globs = append(x.globs, g)
	}
	g.rules.add(rule, x.words)
}

// build ends the adding: it puts each glob where it is looked for.
func (x *index) build() {
	prefixes, suffixes := map[string]int{}, map[string]int{}
	for _, g := range x.globs {
		prefix, suffix := g.ends()
		prefixes[prefix]++
		suffixes[suffix]++
	}
	for _, g := range x.globs {
		switch prefix, suffix := g.ends(); {
		case prefix == "" && suffix == "":
			x.placeByPiece(g)
		case suffix == "" || prefix != "" && prefixes[prefix] <= suffixes[suffix]:
			x.prefixes.add(prefix, g)
		default:
			x.suffixes.add(suffix, g)
		}
	}
	x.globs, x.known = nil, nil
}

// ends are what comes before the first "*", and after the last.
func (g *glob) ends() (prefix, suffix string) {
	return g.pattern[:strings.IndexByte(g.pattern, '*')], g.pattern[strings.LastIndexByte(g.pattern, '*')+1:]
}

// placeByPiece puts a glob under the piece of it that fewest others are under.
func (x *index) placeByPiece(g *glob) {
	if x.pieces == nil && len(g.pattern) > strings.Count(g.pattern, "*") {
		x.pieces = make([][]placed, pieceHashes)
	}
	for size := longestPiece; size > 1; size-- {
		best, under := -1, ""
		for part := range strings.SplitSeq(g.pattern, "*") {
			for i := 0; i+size <= len(part); i++ {
				piece := part[i : i+size]
				if h := pieceHash(piece); best < 0 || len(x.pieces[h]) < len(x.pieces[best]) {
					best, under = h, piece
				}
			}
		}
		if best >= 0 {
			x.pieces[best] = append(x.pieces[best], placed{under, g})
			return
		}
	}
	x.others = append(x.others, g)
}

func (k *keyed) add(key string, g *glob) {
	if k.globs == nil {
		k.globs = map[string][]*glob{}
	}
	k.globs[key] = append(k.globs[key], g)
	if at, found := slices.BinarySearch(k.lengths, len(key)); !found {
		k.lengths = slices.Insert(k.lengths, at, len(key))
	}
}

// find adds the rules that have a pattern for s to bits.
func (x *index) find(s string, bits []uint64) {
	if rules := x.literals[s]; rules != nil {
		rules.into(bits)
	}
	for _, n := range x.prefixes.lengths {
		if n > len(s) {
			break
		}
		x.try(x.prefixes.globs[s[:n]], s, bits)
	}
	for _, n := range x.suffixes.lengths {
		if n > len(s) {
			break
		}
		x.try(x.suffixes.globs[s[len(s)-n:]], s, bits)
	}
	if x.pieces != nil {
		for size := 2; size <= longestPiece; size++ {
			for i := 0; i+size <= len(s); i++ {
				x.tryPieces(s[i:i+size], s, bits)
			}
		}
	}
	x.try(x.others, s, bits)
}

func (x *index) try(globs []*glob, s string, bits []uint64) {
	for _, g := range globs {
		if x.matches(g.pattern, s) {
			g.rules.into(bits)
		}
	}
}

func (x *index) tryPieces(piece, s string, bits []uint64) {
	for _, g := range x.pieces[pieceHash(piece)] {
		if g.piece == piece && x.matches(g.pattern, s) {
			g.rules.into(bits)
		}
	}
}

// Globs that begin and end with "*" are found by pieces of so many letters.
const (
	longestPiece = 3
	pieceHashes  = 1 << 11
)

func pieceHash(piece string) int {
	var h uint32
	for i := range len(piece) {
		h = h<<8 | uint32(piece[i])
	}
	return int(h * 0x9e3779b1 >> 21)
}

// ruleSet is a set of rules: their numbers while they are few, ascending, then a
// bit for each.
type ruleSet struct {
	few  []int32
	bits []uint64
}

// add adds a rule that is not before the last that was added, to a set that may
// have so many words.
func (s *ruleSet) add(rule, words int) {
	if s.bits != nil {
		setBit(s.bits, rule)
		return
	}
	if n := len(s.few); n > 0 && s.few[n-1] == int32(rule) {
		return
	}
	if s.few = append(s.few, int32(rule)); len(s.few) > 2*words { // bits take less
		bits := make([]uint64, words)
		s.into(bits)
		s.few, s.bits = nil, bits
	}
}

// into adds the set to bits.
func (s *ruleSet) into(bits []uint64) {
	for _, rule := range s.few {
		setBit(bits, int(rule))
	}
	for i, word := range s.bits {
		bits[i] |= word
	}
}

func setBit(bits []uint64, i int) { bits[i/64] |= 1 << (i % 64) }
