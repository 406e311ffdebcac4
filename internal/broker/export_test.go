package broker

// FamilyOf names the record and the place in it of the profile's own token.
func FamilyOf(p *Profile) (family, slot string) { return p.family(canonical(p.Scopes)) }

// SecretFamilies names the records that rotations of a profile's client secret
// use.
func SecretFamilies(p *Profile) (record, lease string) { return p.secretsFamily(), p.rotationFamily() }

// Entries is how many tokens memory has a place for, and how many of them are jobs'.
func (b *Broker) Entries() (all, jobs int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, es := range b.entries {
		all += len(es)
	}
	for _, p := range *b.profiles.Load() {
		jobs += int(p.jobs.count.Load())
	}
	return all, jobs
}
