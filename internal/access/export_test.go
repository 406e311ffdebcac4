package access

// Remembered is how many forwarded callers are remembered, and how much text.
func Remembered(f *Forwarders) (entries, text int) {
	for _, generation := range []map[key]*Caller{f.known.young, f.known.old} {
		entries += len(generation)
		for k := range generation {
			text += len(k.value)
		}
	}
	return entries, text
}
