package broker

// FamilyOf names the record and the place in it of the profile's own token.
func FamilyOf(p *Profile) (family, slot string) { return p.family(canonical(p.Scopes)) }

// SecretFamilies names the records that rotations of a profile's client secret
// use.
func SecretFamilies(p *Profile) (record, lease string) { return p.secretsFamily(), p.rotationFamily() }
