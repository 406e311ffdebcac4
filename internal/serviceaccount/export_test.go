package serviceaccount

// Remember makes the Verifier remember no more tokens than that.
func (v *Verifier) Remember(n int) { v.verified = newCache(n) }

// Remembered is how many tokens the Verifier remembers.
func (v *Verifier) Remembered() int {
	v.verified.mu.RLock()
	defer v.verified.mu.RUnlock()
	n := len(v.verified.young)
	for d := range v.verified.old {
		if _, both := v.verified.young[d]; !both {
			n++
		}
	}
	return n
}

// Occupy takes all turns to check a signature, until release.
func (v *Verifier) Occupy() (release func()) {
	for range cap(v.turns) {
		v.turns <- struct{}{}
	}
	return func() {
		for range cap(v.turns) {
			<-v.turns
		}
	}
}
