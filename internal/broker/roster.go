package broker

import "slices"

// roster holds entries by family: one each, or one per token of a consent.
type roster map[string][]*entry

func (r roster) find(family, slot string) *entry {
	for _, e := range r[family] {
		if e.slot == slot {
			return e
		}
	}
	return nil
}

// add e unless it is there.
func (r roster) add(e *entry) {
	if r.find(e.family, e.slot) == nil {
		r[e.family] = append(r[e.family], e)
	}
}

func (r roster) remove(e *entry) {
	left := slices.DeleteFunc(slices.Clone(r[e.family]), func(x *entry) bool { return x == e })
	if len(left) == 0 {
		delete(r, e.family)
		return
	}
	r[e.family] = left
}
