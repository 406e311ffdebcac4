package store

import (
	"cmp"
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
	runID map[string]string        // met last
	clock map[string]time.Duration // ahead of ours, which is the monotonic one
}

// meet reports whether i is new, and whether it is the first of that name. No run
// id means the one that was met last.
func (a *acquaintances) meet(name string, i incarnation) (isNew, first bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.met == nil {
		a.met, a.runID = make(map[string]map[incarnation]bool), make(map[string]string)
	}
	met, known := a.met[name]
	if !known {
		met = make(map[incarnation]bool)
		a.met[name] = met
	}
	i.runID = cmp.Or(i.runID, a.runID[name])
	isNew = !met[i]
	met[i], a.runID[name] = true, i.runID
	return isNew, !known
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
	replies, _ := conn.Pipelined(ctx, func(p redis.Pipeliner) error { // each reply has its error
		server, replication = p.Info(ctx, "server"), p.Info(ctx, "replication")
		return nil
	})
	for _, reply := range replies {
		switch err := reply.Err(); {
		case err == nil:
		case answered(err) && outcomeOf(err).means() == nodeAnswers:
			l.complain("restarts and failovers of redis go unnoticed: its user needs the permission for INFO", err)
		default:
			return err
		}
	}
	l.meet(name, infoField(server.Val(), "run_id"), replication.Val())
	return nil
}

// meet takes note of a node by what it says in INFO. A replica is nobody.
func (l *link) meet(name, runID, replication string) {
	i := incarnation{runID, infoField(replication, "master_replid")}
	if infoField(replication, "role") != "master" || i.replicationID == "" {
		return
	}
	isNew, first := l.known.meet(name, i)
	switch {
	case !isNew, first && time.Since(l.began) < startup:
		return
	case first:
		l.o.log.Info("redis node met for the first time", "node", l.where(name))
	default:
		l.o.log.Warn("redis was restarted or failed over, and may have lost what it acknowledged", "node", l.where(name), "replication_id", i.replicationID)
	}
	l.tally.add(func(s *linkStats) { s.incarnations++ })
	l.o.incarnation()
}

// greet meets the masters of a Cluster, while that is no news.
func (l *link) greet() {
	p := l.borrow()
	if p == nil {
		return
	}
	defer p.users.Done()
	if p.cluster == nil {
		return
	}
	ctx, cancel := context.WithTimeout(l.alive, startup)
	defer cancel()
	_ = p.cluster.ForEachMaster(ctx, func(ctx context.Context, c *redis.Client) error { return c.Ping(ctx).Err() })
}

// do runs a command whose reply is an array. A node of a Cluster is asked for the
// replication id each time: a replica that is promoted keeps its connections.
func (l *link) do(ctx context.Context, n node, conn *redis.Conn, args ...any) ([]any, error) {
	if n.addr != "" {
		replication, err := conn.Info(ctx, "replication").Result()
		if err != nil && !answered(err) {
			return nil, err
		}
		l.meet(n.addr, "", replication)
	}
	if n.asking {
		if err := conn.Do(ctx, "ASKING").Err(); err != nil {
			return nil, err
		}
	}
	cmd := redis.NewSliceCmd(ctx, args...)
	_ = conn.Process(ctx, cmd) // cmd has the error
	return cmd.Result()
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
	if took > clockJump/2 { // this process was paused
		return
	}
	ours := sent.Add(took / 2)
	l.tally.add(func(s *linkStats) { s.clockOffset = redisTime.Sub(ours.Round(0)) }) // without the monotonic reading
	jump := l.known.time(name, time.Duration(redisTime.UnixNano())-ours.Sub(l.began))
	if jump.Abs() > clockJump {
		l.tally.add(func(s *linkStats) { s.clockJumps++ })
		l.o.log.Warn("the clock of redis jumped", "node", l.where(name), "by", jump.Round(time.Millisecond))
		l.o.incarnation()
	}
}
