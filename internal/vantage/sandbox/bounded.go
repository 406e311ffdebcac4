package sandbox

import "container/list"

// bounded is a map that never holds more than limit entries: the oldest gives
// way. The zero value is not usable; see newBounded. It is not safe for
// concurrent use.
type bounded[K comparable, V any] struct {
	limit   int
	entries map[K]*list.Element
	order   *list.List // of entry[K, V], oldest first
}

type entry[K comparable, V any] struct {
	key   K
	value V
}

func newBounded[K comparable, V any](limit int) *bounded[K, V] {
	return &bounded[K, V]{limit: limit, entries: map[K]*list.Element{}, order: list.New()}
}

func (b *bounded[K, V]) get(key K) (V, bool) {
	if e, ok := b.entries[key]; ok {
		return e.Value.(entry[K, V]).value, true
	}
	var none V
	return none, false
}

func (b *bounded[K, V]) put(key K, value V) {
	if e, ok := b.entries[key]; ok {
		e.Value = entry[K, V]{key, value}
		return
	}
	if len(b.entries) >= b.limit {
		b.delete(b.order.Front().Value.(entry[K, V]).key)
	}
	b.entries[key] = b.order.PushBack(entry[K, V]{key, value})
}

func (b *bounded[K, V]) delete(key K) {
	if e, ok := b.entries[key]; ok {
		b.order.Remove(e)
		delete(b.entries, key)
	}
}

func (b *bounded[K, V]) clear() {
	clear(b.entries)
	b.order.Init()
}

// all copies the entries.
func (b *bounded[K, V]) all() map[K]V {
	m := make(map[K]V, len(b.entries))
	for key, e := range b.entries {
		m[key] = e.Value.(entry[K, V]).value
	}
	return m
}
