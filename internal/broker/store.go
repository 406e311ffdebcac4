package broker

import (
	"context"
	"math"
	"time"
)

// Store is where replicas agree who talks to a token endpoint and what came
// back. It keeps one record per family: a lease, the current token, a
// remembered failure. Each method is one transition of that record, applied as
// a whole or not at all; in between anything may happen.
//
// All methods may be called from any goroutine, and may be repeated with the
// same arguments: the second call answers as the first did. When a method
// returns an error, nobody knows whether the transition happened; repeating it
// is right. Durations count from the moment the call was begun, because clocks
// differ between machines and instants would not mean the same to both sides.
type Store interface {
	// Acquire judges the claim's demand against the record and answers it
	// from there if it can; else it takes the lease. What it returns is the
	// record as it stands inside the lease: nothing needs to be read again.
	Acquire(ctx context.Context, claim Claim) (Acquisition, error)

	// Renew makes the lease last its length again. False means that it is
	// lost: it ran out, or somebody else holds it, or a reset overtook it.
	Renew(ctx context.Context, lease Lease) (bool, error)

	// Save stores what a call under the lease obtained, durably as far as
	// the store can, clears the remembered failure and ends the lease. False
	// means that a later lease was granted meanwhile, whose outcome counts:
	// the token is good, but must not be kept.
	Save(ctx context.Context, lease Lease, token StoredToken) (saved StoredToken, ok bool, err error)

	// Fail remembers the failure of a call under the lease and ends the
	// lease. It returns the failure as remembered, with its count and rest.
	// NoFailure only gives the lease back. A failure that a later lease or a
	// reset has overtaken changes nothing.
	Fail(ctx context.Context, lease Lease, failure Failure) (Failure, error)

	// Reset forgets the remembered failure. A call under way may still save,
	// but its failure no longer counts.
	Reset(ctx context.Context, family string) error

	// Look returns the record, without taking part.
	Look(ctx context.Context, family string) (Record, error)

	// Subscribe calls changed after each change of any family until stop is
	// called. It is a hint: it may come late, twice, or never. The callback
	// must not block and must not call the store.
	Subscribe(changed func(Change)) (stop func())
}

// Generation orders what happens to one family. It never falls.
type Generation int64

// Demand is what a request needs of a token.
type Demand struct {
	// Lifetime is the least life that it must have left.
	Lifetime time.Duration
	// NewerThan is the generation that it must exceed.
	NewerThan Generation
	// Not is the id of the token that a resource server refused.
	Not string
}

// Claim asks for a family's token, or for the right to obtain one.
type Claim struct {
	Family string
	// Owner is random, one per flight, and the same in every repetition.
	Owner string
	// Length of the lease.
	Length time.Duration
	// Floor is the highest generation that this process has seen.
	Floor Generation
	// Credential that would be presented.
	Credential string
	Demand     Demand
}

// Verdict is a store's answer to a claim.
type Verdict int

const (
	// Usable: Token meets the demand.
	Usable Verdict = iota + 1
	// Granted: the lease is the claimant's, under Fence.
	Granted
	// Busy: somebody else holds the lease for Wait at most.
	Busy
	// Refused: Failure stands in the way. Token may still live.
	Refused
	// Short: even a new token would not live as long as demanded. Token
	// shows the full life.
	Short
	// TooSoon: the token reported as refused was obtained a moment ago; a
	// report counts again after Wait.
	TooSoon
)

// Acquisition is the answer to a claim.
type Acquisition struct {
	Verdict Verdict
	Fence   Generation
	Token   *StoredToken
	Failure *Failure
	Wait    time.Duration
}

// Lease is the right to talk to the token endpoint about one family.
type Lease struct {
	Family string
	Owner  string
	Fence  Generation
	Length time.Duration
}

// StoredToken is a token as the store holds it.
type StoredToken struct {
	Access Secret
	Type   string
	Scopes []string
	// Generation that the store gave it; zero in what is handed to Save.
	Generation Generation
	// Lifetime is the full life, as it was when the token was first seen.
	Lifetime time.Duration
	// Remaining life.
	Remaining time.Duration
}

// FailureKind says whom a failure binds, and until when.
type FailureKind int

const (
	// NoFailure is the absence of one.
	NoFailure FailureKind = iota
	// Transient: the endpoint was down, slow or answered nonsense. Binds
	// everybody; backs off.
	Transient
	// Throttling: the endpoint asked for quiet. Binds everybody.
	Throttling
	// Rejection: the server refuses what was presented. Binds whoever would
	// present the same.
	Rejection
)

// Forever is the rest of a failure that does not end by itself.
const Forever = time.Duration(math.MaxInt64)

// Failure is what is remembered of calls that failed.
type Failure struct {
	Kind FailureKind
	// Code is the OAuth error code, if there was one.
	Code string
	// Text is the public account of the last attempt.
	Text string
	// Credential that was refused, for Rejection.
	Credential string
	// Rest is how long nobody tries again. Handed to Fail: the least that is
	// wanted; returned: what was decided.
	Rest time.Duration
	// Jitter scales the back-off, chosen by whoever failed so that all
	// replicas read one instant; 1 is none.
	Jitter float64
	// Attempts that failed in a row.
	Attempts int
	// Age since the last attempt failed.
	Age time.Duration
}

// BacksOff reports whether further attempts in a row wait longer and longer.
func (f Failure) BacksOff() bool { return f.Kind == Transient || f.Kind == Throttling }

// Binds reports whether the failure stands for whoever presents credential.
func (f Failure) Binds(credential string) bool {
	return f.Kind != NoFailure && f.Rest > 0 && (f.Kind != Rejection || f.Credential == credential)
}

// Record is a family as the store sees it. Absent parts are nil.
type Record struct {
	Token   *StoredToken
	Failure *Failure
}

// Change says that a family is no longer as it was.
type Change struct {
	Family     string
	Generation Generation
	// Reset tells that a remembered failure was forgotten.
	Reset bool
}
