package store

import (
	"context"
	"embed"
	"fmt"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Each transition of a record is one script on one key. A script begins with a
// line for Redis, "#!lua flags=...", which must stay the first; what all have in
// common is put in after that.
//
//go:embed scripts
var scripts embed.FS

var (
	acquireScript    = loadScript("acquire")
	renewScript      = loadScript("renew")
	intendScript     = loadScript("intend")
	saveScript       = loadScript("save")
	failScript       = loadScript("fail")
	dropScript       = loadScript("drop")
	resetScript      = loadScript("reset")
	confirmScript    = loadScript("confirm")
	lookScript       = loadScript("look")
	seedScript       = loadScript("seed")
	restoreScript    = loadScript("restore")
	quarantineScript = loadScript("quarantine")
	keepScript       = loadScript("keep")
	redeemScript     = loadScript("redeem")
	ownScript        = loadScript("own")
)

func loadScript(name string) *script {
	text := func(name string) string {
		b, err := scripts.ReadFile("scripts/" + name + ".lua")
		if err != nil { // it was embedded
			panic(err)
		}
		return string(b)
	}
	header, body, _ := strings.Cut(text(name), "\n")
	return newScript(name, header+"\n"+text("prelude")+body)
}

// ErrForeign is wrapped by errors about a key that holds something else than a
// record. It is left as it is, like all that cannot be read.
var ErrForeign = fmt.Errorf("%w: it is not one of a token broker", broker.ErrUnreadable)

// reply of a script; prelude.lua makes it.
type reply struct {
	code              string
	now               int64 // Redis time
	generation, fence int64
	// stamps of the record, before and after.
	before, after string
	// delta is the content that was written, out what else was asked for.
	delta, out fields
	// confirmed tells that what was written durably has reached enough of Redis.
	confirmed bool
}

// call runs a script on a family's record. Its arguments are names and values in
// turn. what is being attempted begins the error.
func (r *Redis) call(ctx context.Context, what string, s *script, family string, durably bool, args ...any) (answer reply, err error) {
	offset := r.offset.Load()
	all := append([]any{offset, r.nonce()}, args...)
	var raw []any
	if durably {
		raw, answer.confirmed, err = r.link.runDurably(ctx, s, recordKey(family), all...)
	} else {
		raw, err = r.link.run(ctx, s, recordKey(family), all...)
	}
	if err == nil {
		err = answer.parse(raw)
		answer.now += offset
	}
	if err == nil {
		return answer, nil
	}
	r.mirror.doubt(family)
	return reply{}, r.explained(fmt.Errorf("%s family %s: %w", what, family, err), family)
}

// explained marks errors that time does not heal, and logs them once.
func (r *Redis) explained(err error, family string) error {
	switch {
	case redis.HasErrorPrefix(err, "TBNEWER"):
		r.unreadable.Add(1)
		err = fmt.Errorf("%w: a newer version wrote it; upgrade this replica: %w", ErrUnreadable, err)
	case redis.HasErrorPrefix(err, "TBFOREIGN"), redis.HasErrorPrefix(err, "WRONGTYPE"):
		err = fmt.Errorf("%w, and in the way of one; give the broker a Redis, or a user, whose keys %s* are its own: %w", ErrForeign, keyPrefix, err)
	default:
		return err
	}
	r.logOnce("record cannot be used", family, "", err)
	return err
}

// parse reads what prelude.lua's reply returns.
func (r *reply) parse(raw []any) error {
	const parts = 8
	if len(raw) != parts {
		return fmt.Errorf("the script answered with %d parts, not %d; is this the Redis of a token broker?", len(raw), parts)
	}
	r.code, r.before, r.after = text(raw[0]), text(raw[4]), text(raw[5])
	r.now, r.generation, r.fence = integer(raw[1]), integer(raw[2]), integer(raw[3])
	r.delta, r.out = pairs(raw[6]), pairs(raw[7])
	return nil
}

func text(v any) string {
	s, _ := v.(string)
	return s
}

func integer(v any) int64 {
	if n, ok := v.(int64); ok {
		return n
	}
	n, _ := strconv.ParseInt(text(v), 10, 64)
	return n
}

func pairs(v any) fields {
	flat, _ := v.([]any)
	f := make(fields, len(flat)/2)
	for i := 0; i+1 < len(flat); i += 2 {
		f[text(flat[i])] = text(flat[i+1])
	}
	return f
}
