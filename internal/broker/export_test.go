package broker

import (
	"context"
	"time"
)

// Next looks until there is a token, takes it, and returns it with the news of
// the next one; or the error that is the end of the watch.
func (w *Watch) Next(ctx context.Context, d Demand) (*Token, Source, <-chan struct{}, error) {
	for {
		v, err := w.Look(d)
		if err != nil {
			return nil, 0, nil, err
		}
		if v.Token != nil {
			w.HandedOn(v)
			return v.Token, v.Source, v.News, nil
		}
		var again <-chan time.Time
		if !v.Again.IsZero() {
			again = time.After(time.Until(v.Again))
		}
		select {
		case <-v.News:
		case <-v.Landed:
		case <-again:
		case <-ctx.Done():
			return nil, 0, nil, ctx.Err()
		}
	}
}

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
