package store

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	// startup is how long the first contact with a node is no news: whoever has
	// just opened a store is careful anyway.
	startup = 2 * time.Second
	// clockJump is by how much the clock of Redis must jump to count.
	clockJump = 2 * time.Second
)

// incarnation is one life of a node as a master. A restart changes the run id, a
// promotion the replication id, even of a node that was the master before.
type incarnation struct{ runID, replicationID string }

// acquaintances are what is known of nodes, by name. The master that Sentinels
// name is one and the same, whichever node it is.
type acquaintances struct {
	mu    sync.Mutex
	met   map[string]map[incarnation]bool
	clock map[string]time.Duration // ahead of ours, which is the monotonic one
}

// meet reports whether i is new, and whether it is the first of that name.
func (a *acquaintances) meet(name string, i incarnation) (isNew, first bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	met, known := a.met[name]
	if met[i] {
		return false, false
	}
	if !known {
		if a.met == nil {
			a.met = make(map[string]map[incarnation]bool)
		}
		met = make(map[incarnation]bool)
		a.met[name] = met
	}
	met[i] = true
	return true, !known
}

// time notes by how much a clock is ahead, and returns by how much it jumped.
func (a *acquaintances) time(name string, ahead time.Duration) (jump time.Duration) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if before, known := a.clock[name]; known {
		jump = ahead - before
	}
	if a.clock == nil {
		a.clock = make(map[string]time.Duration)
	}
	a.clock[name] = ahead
	return jump
}

// connected is called on each new connection, before anything else is asked over
// it. An error closes the connection.
func (l *link) connected(ctx context.Context, conn *redis.Conn, name string) error {
	l.tally.add(func(s *linkStats) { s.connections++ })
	var server, replication *redis.StringCmd
	_, err := conn.Pipelined(ctx, func(p redis.Pipeliner) error {
		server, replication = p.Info(ctx, "server"), p.Info(ctx, "replication")
		return nil
	})
	if outcomeOf(err).means() == nodeFails {
		return err
	}
	if err != nil {
		l.complain("restarts and failovers of redis go unnoticed: its user needs the permission for INFO", err)
		return nil
	}
	i := incarnation{infoField(server.Val(), "run_id"), infoField(replication.Val(), "master_replid")}
	if isNew, first := l.known.meet(name, i); isNew && !(first && time.Since(l.began) < startup) {
		l.tally.add(func(s *linkStats) { s.incarnations++ })
		l.o.log.Warn("redis was restarted or failed over, and may have lost what it acknowledged", "node", name, "run_id", i.runID, "replication_id", i.replicationID)
		l.o.incarnation()
	}
	return nil
}

func infoField(info, name string) string {
	for line := range strings.Lines(info) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// observe compares the clock of a node, as the answer to what was sent then has
// it, with ours.
func (l *link) observe(name string, redisTime, sent time.Time) {
	took := time.Since(sent)
	ours := sent.Add(took / 2)
	l.tally.add(func(s *linkStats) { s.clockOffset = redisTime.Sub(ours.Round(0)) }) // without the monotonic reading
	jump := l.known.time(name, time.Duration(redisTime.UnixNano())-ours.Sub(l.began))
	if jump.Abs() > clockJump {
		l.tally.add(func(s *linkStats) { s.clockJumps++ })
		l.o.log.Warn("the clock of redis jumped", "node", name, "by", jump.Round(time.Millisecond))
		l.o.incarnation()
	}
}
