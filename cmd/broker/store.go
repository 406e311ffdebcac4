package main

import (
	"cmp"
	"fmt"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/config"
	"github.com/tokenbroker/tokenbroker/internal/console"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

// share has the server share its tokens over Redis, which need not be there yet.
func (s *server) share(c *config.Store) (err error) {
	o := c.Redis
	o.Logger = s.log
	s.redis, err = store.NewRedis(o, c.Access)
	return err
}

// degraded names what works less well than it should.
func (s *server) degraded() []string {
	var all []string
	if s.workload != nil {
		all = s.workload.Degraded()
	}
	if s.audit.Stats().Failure != nil {
		all = append(all, "the audit log cannot be written")
	}
	if s.redis == nil {
		return all
	}
	if now := s.redis.Stats(); !now.Reachable {
		all = append(all, fmt.Sprintf("the store is out of reach since %s (%s), so this replica is on its own",
			now.UnreachableSince.UTC().Format(time.RFC3339), cmp.Or(now.LastError, "not asked yet")))
	}
	if n := s.broker.Unsaved(); n > 0 {
		all = append(all, fmt.Sprintf("%d grants are only in the memory of this process, which must not end before the store has them", n))
	}
	return all
}

func (s *server) storeStats() console.StoreStats {
	now := s.redis.Stats()
	c := console.StoreStats{
		Reachable:       now.Reachable,
		Operations:      make(map[console.StoreOperation]int64, len(now.Calls)),
		Resubscriptions: now.Resubscriptions,
		Restored:        now.Restored,
		Unreadable:      now.Unreadable,
		Corrupt:         now.Corrupt,
		ClockOffset:     now.ClockOffset,
	}
	for call, n := range now.Calls {
		c.Operations[console.StoreOperation(call)] = n
	}
	return c
}
