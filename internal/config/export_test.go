package config

import "time"

// SetPoll makes Watch look more often, so that tests need not wait, or as good
// as never, so that they see what notifications do alone.
func (l *Loader) SetPoll(d time.Duration) { l.poll = d }
