package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"

	"github.com/redis/go-redis/v9"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// outcome of a call: what metrics and logs call it.
type outcome string

const (
	done outcome = "ok"

	// The node was not reached, or did not answer.

	refused outcome = "refused" // nobody listens there
	timeout outcome = "timeout"
	broken  outcome = "broken" // any other trouble with the connection

	// The node answered that it cannot serve.

	unauthenticated outcome = "unauthenticated"
	readOnly        outcome = "readonly"
	loading         outcome = "loading"
	masterDown      outcome = "masterdown"
	clusterDown     outcome = "clusterdown"

	// The node answered that it does not want to.

	forbidden   outcome = "forbidden"
	outOfMemory outcome = "oom"
	noReplicas  outcome = "noreplicas"
	redirected  outcome = "redirected" // to another node, once too often
	other       outcome = "error"

	// Nothing was asked.

	crowded  outcome = "crowded" // too many calls at once
	canceled outcome = "canceled"
	closed   outcome = "closed"
)

// means is what an outcome says about the node.
func (o outcome) means() meaning {
	switch o {
	case refused, timeout, broken, unauthenticated, readOnly, loading, masterDown, clusterDown:
		return nodeFails
	case crowded, canceled, closed:
		return nothing
	}
	return nodeAnswers
}

type meaning int

const (
	nothing meaning = iota
	nodeAnswers
	nodeFails
)

var (
	errCrowded = errors.New("too many calls are under way")
	errClosed  = errors.New("the store is closed")
)

// outcomeOf classifies what go-redis returns.
func outcomeOf(err error) outcome {
	if err == nil {
		return done
	}
	var answer redis.Error
	if errors.As(err, &answer) {
		return outcomeOfAnswer(answer)
	}
	var timedOut net.Error
	switch {
	case errors.Is(err, context.Canceled):
		return canceled
	case errors.Is(err, errClosed):
		return closed
	case errors.Is(err, errCrowded), errors.Is(err, redis.ErrPoolTimeout), errors.Is(err, redis.ErrPoolExhausted):
		return crowded
	case errors.Is(err, syscall.ECONNREFUSED):
		return refused
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded),
		errors.As(err, &timedOut) && timedOut.Timeout():
		return timeout
	}
	return broken
}

func outcomeOfAnswer(err redis.Error) outcome {
	word, _, _ := strings.Cut(err.Error(), " ")
	switch word {
	case "NOAUTH", "WRONGPASS":
		return unauthenticated
	case "READONLY":
		return readOnly
	case "LOADING":
		return loading
	case "MASTERDOWN":
		return masterDown
	case "CLUSTERDOWN":
		return clusterDown
	case "NOPERM":
		return forbidden
	case "OOM":
		return outOfMemory
	case "NOREPLICAS":
		return noReplicas
	case "MOVED", "ASK":
		return redirected
	}
	return other
}

// answered reports whether err is a node's answer rather than the lack of one.
func answered(err error) bool {
	var answer redis.Error
	return errors.As(err, &answer)
}

// advice says what an outcome is, and what to do about it.
func (o outcome) advice() string {
	switch o {
	case refused:
		return "nobody listens there: start Redis, or correct store.redis.addresses"
	case timeout:
		return "no answer in time: Redis, or the network on the way, is stuck or overloaded"
	case broken:
		return "the connection failed: look at the address, the network, and TLS on both sides"
	case unauthenticated:
		return "Redis refuses the user or the password: correct store.redis.username and store.redis.password"
	case readOnly:
		return "this node is a replica: a failover is under way, or store.redis.addresses does not name the master"
	case loading:
		return "Redis is starting and reads its data: it will answer soon"
	case masterDown:
		return "this node is a replica that has lost its master: repair the replication"
	case clusterDown:
		return "the Cluster does not serve this slot: bring back the master that is missing"
	case forbidden:
		return "the Redis user may not do this: extend its ACL"
	case outOfMemory:
		return "Redis is full: raise its maxmemory, or remove what else is in it"
	case noReplicas:
		return "fewer replicas are in step than min-replicas-to-write asks for: bring them back"
	case redirected:
		return "this is a node of a Cluster whose slots do not settle, or that is not configured as one: correct store.redis"
	case crowded:
		return "too many calls at once: Redis is slow, or this replica has too much to do"
	case canceled:
		return "the caller gave up"
	}
	return ""
}

// linkError is the failure of a call.
type linkError struct {
	what    string // was called
	where   string // it was asked of
	outcome outcome
	err     error // the private cause: it holds no secret, but addresses
	// perhapsDone: an earlier try of the same call may have been executed.
	perhapsDone bool
	// skipped: it was not even tried, because it had failed so a moment ago.
	skipped bool
}

func (l *link) failure(what, addr string, err error) *linkError {
	return &linkError{what: what, where: l.where(addr), outcome: outcomeOf(err), err: err}
}

// where names a node, or what is known of where it is.
func (l *link) where(addr string) string {
	where := cmp.Or(addr, strings.Join(l.o.addresses, ", "))
	if l.o.masterName != "" {
		where = fmt.Sprintf("%s (named by Sentinel at %s)", l.o.masterName, where)
	}
	return where
}

// untried is the same failure of a call that was spared.
func (e *linkError) untried(what string) *linkError {
	return &linkError{what: what, where: e.where, outcome: e.outcome, err: e.err, skipped: true}
}

func (e *linkError) Error() string {
	cause := e.cause()
	if e.skipped {
		cause = "not tried, because a moment ago: " + cause
	}
	text := fmt.Sprintf("calling %s in Redis at %s: %s", e.what, e.where, cause)
	if advice := e.outcome.advice(); advice != "" {
		text += " (" + advice + ")"
	}
	return text
}

// cause leaves out what Redis repeats of a command that it does not know: the
// command may have been AUTH.
func (e *linkError) cause() string {
	cause, _, _ := strings.Cut(e.err.Error(), ", with args beginning with")
	return cause
}

// Unwrap has broker.ErrStoreRefused only where nothing can have happened.
func (e *linkError) Unwrap() []error {
	if e.outcome == refused && !e.perhapsDone {
		return []error{broker.ErrStoreRefused, e.err}
	}
	return []error{e.err}
}

// joined is errors.Join in one line.
type joined []error

func (j joined) Error() string {
	texts := make([]string, len(j))
	for i, err := range j {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "; ")
}

func (j joined) Unwrap() []error { return j }
