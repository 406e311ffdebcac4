package sandbox

import (
	"maps"
	"testing"
)

// The limits of the server's memory are too far away for the front door.
func TestBounded(t *testing.T) {
	b := newBounded[string, int](2)
	b.put("a", 1)
	b.put("b", 2)
	b.put("a", 3) // not a new entry, and no younger for it
	b.put("c", 4)
	if want := (map[string]int{"b": 2, "c": 4}); !maps.Equal(b.all(), want) {
		t.Errorf("holds %v, want %v", b.all(), want)
	}
	b.delete("b")
	b.put("d", 5)
	if _, ok := b.get("b"); ok {
		t.Error("holds what was deleted")
	}
	if want := (map[string]int{"c": 4, "d": 5}); !maps.Equal(b.all(), want) {
		t.Errorf("holds %v, want %v", b.all(), want)
	}
	b.clear()
	if b.put("e", 6); len(b.all()) != 1 {
		t.Errorf("holds %v after clearing", b.all())
	}
}
