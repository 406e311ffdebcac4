package broker

import (
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"time"
)

// Store is where replicas agree who talks to a token endpoint and what came
// back. It keeps one record per family: a lease, the current tokens, a
// remembered failure, and for a family that holds a consent the refresh token
// and what is known of its presentations. Each method is one transition of that
// record, applied as a whole or not at all; in between anything may happen.
//
// All methods may be called from any goroutine, and may be repeated with the
// same arguments: the second call answers as the first did. When a method
// returns an error, nobody knows whether the transition happened, or whether it
// will; repeating it is right. Durations count from the moment the call was
// begun, because clocks differ between machines and instants would not mean the
// same to both sides.
//
// A store may lose what it acknowledged: it was flushed, or a replica of it was
// promoted. What this process has read or written is then put back, joined with
// what others know: the newer wins, and what was dropped stays dropped.
type Store interface {
	// Acquire judges the claim's demand against the record and answers it
	// from there if it can; else it takes the lease. What it returns is the
	// record as it stands inside the lease: nothing needs to be read again.
	Acquire(ctx context.Context, claim Claim) (Acquisition, error)

	// Renew makes the lease last its length again. False means that it is
	// lost: it ran out, or somebody else holds it, or a drop overtook it.
	Renew(ctx context.Context, lease Lease) (bool, error)

	// Intend commits to presenting the refresh token, before the first byte
	// is sent and as durably as the store can: whoever comes after knows that
	// it may have been spent. Only Intended allows to send.
	Intend(ctx context.Context, lease Lease, p Presentation) (IntendVerdict, error)

	// Save stores what a call under the lease obtained, durably as far as
	// the store can, clears the remembered failure and ends the lease. What
	// it returns is the token as the record has it now; it means something
	// with Saved only.
	Save(ctx context.Context, lease Lease, result Result) (StoredToken, SaveVerdict, error)

	// Fail remembers the failure of a call under the lease and ends the
	// lease. It returns the failure as remembered, with its count and rest.
	// NoFailure only gives the lease back. A failure that a later lease, a
	// drop or a reset has overtaken changes nothing.
	Fail(ctx context.Context, lease Lease, failure Failure) (Failure, error)

	// Drop takes a token, or the whole grant, out of service for good: no
	// save that was under way, no copy in any memory and no restored backup
	// brings it back. It returns what was dropped, to be revoked at the
	// server, and remembers that until Confirm.
	Drop(ctx context.Context, drop Drop) (Dropped, error)

	// Confirm forgets what was dropped: the server has revoked the token with
	// this id.
	Confirm(ctx context.Context, family, id string) error

	// Reset forgets the remembered failure and the presentations in doubt. A
	// call under way may still save, but its failure no longer counts.
	Reset(ctx context.Context, family string) error

	// Keep keeps a ticket that nobody else has until it is redeemed, or its life
	// is over.
	Keep(ctx context.Context, ticket Ticket) error

	// Redeem hands the content of a ticket to the first owner who asks, and to
	// nobody else. A ticket that the store has lost is one that it does not know.
	Redeem(ctx context.Context, id, owner string) (Redemption, error)

	// Own gives an access token, by its id, to the first owner who asks for it,
	// until its life is over, and returns whose it is.
	Own(ctx context.Context, id, owner string, life time.Duration) (string, error)

	// Look returns the record, without taking part.
	Look(ctx context.Context, family, slot string) (Record, error)

	// Restore hands over a token that was obtained while the store was out
	// of reach. The store takes it in once it can, unless it knows a better
	// one by then, and announces the change. It does not block.
	Restore(family, slot string, token StoredToken)

	// Subscribe calls changed after each change of any family until stop is
	// called. It is a hint: it may come late, twice, or never. The callback
	// must not block and must not call the store.
	Subscribe(changed func(Change)) (stop func())
}

// ErrStoreRefused is wrapped by errors of a store whose host answered that
// nobody listens there. The transition did not happen.
var ErrStoreRefused = errors.New("connection refused")

// ErrUnreadable is wrapped by errors of a store that has the record and cannot
// read it: a newer version wrote it, or it is sealed with a key that this
// process does not have. It must be left as it is.
var ErrUnreadable = errors.New("the record cannot be read")

// Generation orders what happens to one family. It never falls. It is a number
// of milliseconds in the store's time, or more where that went back, so that it
// needs no counter that could be lost.
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
	// Slot is the token's place in the family; empty where there is but one. One
	// that is a job's begins with the job's name and a slash.
	Slot string
	// Owner is random, one per flight, and the same in every repetition.
	Owner string
	// Length of the lease.
	Length time.Duration
	// Floor is the highest generation that this process has seen.
	Floor Generation
	// Credentials are what a refusal may be bound to that stands in the way: the
	// digests, without blanks, of what would be presented and asked for.
	Credentials []string
	Demand      Demand
	// Consent says what the claimant needs of a refresh token.
	Consent ConsentUse
	// Asked tells that a claim before this one was answered Unknown, and that
	// its Wait is over.
	Asked bool
	// Peek takes no lease: what would be Granted is Free.
	Peek bool
}

// seize is a claim that no token answers: it is for the lease.
func seize(family string, length time.Duration, credentials ...string) Claim {
	return Claim{Family: family, Owner: newOwner(), Length: length, Credentials: credentials, Demand: Demand{NewerThan: math.MaxInt64}}
}

// lease is what the claim has come to when it was granted under a fence.
func (c Claim) lease(fence Generation) Lease {
	return Lease{Family: c.Family, Owner: c.Owner, Fence: fence, Length: c.Length}
}

// ConsentUse says whether a flight spends a refresh token.
type ConsentUse int

const (
	// NoConsent: the family has no refresh token.
	NoConsent ConsentUse = iota
	// ConsentPreferred: spends the refresh token if there is a living one, and
	// obtains the grant anew otherwise.
	ConsentPreferred
	// ConsentRequired: only a person could obtain the grant anew.
	ConsentRequired
)

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
	// InDoubt: another flight has committed to present the refresh token and
	// may still be waiting for the answer, for Wait at most.
	InDoubt
	// Unknown: the store has no trace of the consent, or may have gone back in
	// time. It is asking the other replicas; claim again after Wait, with
	// Asked.
	Unknown
	// Unauthorized: there is no consent. A person must sign in.
	Unauthorized
	// Ended: the slot's job has ended. There is no token for it any more.
	Ended
	// Free: the lease is to be had, by a claim that does not peek.
	Free
)

// Acquisition is the answer to a claim.
type Acquisition struct {
	Verdict Verdict
	Fence   Generation
	Token   *StoredToken
	Failure *Failure
	Wait    time.Duration
	// Consent comes with Granted where the family has one that lives, and
	// without its refresh token with Unauthorized where the last one is over.
	Consent *Consent
}

// Consent is what a family knows of its refresh token.
type Consent struct {
	RefreshToken Secret
	// Generation that the store gave it.
	Generation Generation
	// Rotates says whether the server replaces it with each use.
	Rotates Rotates
	// Account whose consent it is.
	Account Account
	// Dead tells that the server has said that it is no longer good.
	Dead bool
	// Age since the grant was first obtained; a refresh does not begin anew.
	Age time.Duration
	// Remaining until it ends whatever happens, negative since then, or Forever if
	// nobody knows.
	Remaining time.Duration
	// Presentations of this very refresh token whose outcome nobody knows.
	Presentations int
	// PresentedAge since the last of them was committed to.
	PresentedAge time.Duration
}

// over reports whether the consent has come to its known end.
func (c *Consent) over() bool { return c.Remaining <= 0 }

// lives reports whether the consent is still good, as far as anybody knows.
func (c *Consent) lives() bool { return c != nil && !c.Dead && !c.over() }

// isOf reports whether the consent is an account's.
func (c *Consent) isOf(a Account) bool { return c != nil && c.Account.Subject == a.Subject }

// Rotates is what was seen of a server's refresh tokens.
type Rotates int

// What a refresh has shown.
const (
	RotatesUnknown Rotates = iota
	RotatesYes
	RotatesNo
)

// Presentation is the use of one refresh token.
type Presentation struct {
	// RefreshID is the id of the refresh token; see Secret.ID.
	RefreshID string
	// Horizon is how long the presenter may still be waiting for its answer.
	Horizon time.Duration
	// Most is how many presentations of one refresh token may be in doubt.
	Most int
}

// IntendVerdict is a store's answer to Intend.
type IntendVerdict int

const (
	// Intended: send.
	Intended IntendVerdict = iota + 1
	// IntendLost: the lease is not held any more.
	IntendLost
	// IntendChanged: the refresh token is not the current one any more, or may
	// not be, because the store is being restored. Claim again.
	IntendChanged
	// IntendInDoubt: another presentation may still be answered.
	IntendInDoubt
	// IntendSpent: as many presentations as may be are in doubt.
	IntendSpent
	// IntendUnconfirmed: written, but not yet where it would survive the loss
	// of the store's master. Give it back with Unsent and try again later.
	IntendUnconfirmed
)

// Result is what a call under a lease obtained.
type Result struct {
	Slot  string
	Token StoredToken
	// Spent is the id of the refresh token that was presented; empty when the
	// grant was obtained anew.
	Spent string
	// Refresh is the refresh token that came; empty keeps the one in hand.
	Refresh Secret
	// Account is whose consent it is, kept beside Refresh.
	Account Account
	// Rotates is what this refresh has shown.
	Rotates Rotates
	// Remaining life of the consent, for a grant obtained anew; zero means
	// that nobody knows.
	Remaining time.Duration
	// Durable saves a token as durably as a refresh token: nobody could obtain
	// it again.
	Durable bool
	// Supersede makes a consent that a person gave win over all that is under
	// way, and is a reset of the family.
	Supersede bool
}

// Ticket is something to be redeemed once, on any replica.
type Ticket struct {
	// ID is a digest of the secret that whoever redeems it has to show.
	ID string
	// Content that is handed out for it.
	Content Secret
	// Life of the ticket.
	Life time.Duration
}

// Redemption is a store's answer to Redeem.
type Redemption struct {
	Verdict RedeemVerdict
	// Content of the ticket, and its age; with Redeemed only.
	Content Secret
	Age     time.Duration
}

// RedeemVerdict says whether a ticket was redeemed.
type RedeemVerdict int

const (
	// Redeemed: the ticket is the owner's.
	Redeemed RedeemVerdict = iota + 1
	// TicketUnknown: there is no such ticket, or not any more.
	TicketUnknown
	// TicketTaken: another owner has redeemed it.
	TicketTaken
)

// SaveVerdict is a store's answer to Save.
type SaveVerdict int

const (
	// Saved: the record has it.
	Saved SaveVerdict = iota + 1
	// Stale: a later lease was granted meanwhile, whose outcome counts. The
	// token is good, but must not be kept.
	Stale
	// Superseded: the refresh token that was spent is not the record's any
	// more. Look again.
	Superseded
	// WasDropped: a drop overtook the call. What was obtained must be revoked.
	WasDropped
)

// Drop says what to take out of service.
type Drop struct {
	Family string
	// Operation is random, one per drop, and the same in every repetition.
	Operation string
	// Token is the id of the access token to drop. Empty drops the grant: all
	// access tokens, the refresh token, and whatever is under way; but with a
	// Job only that.
	Token string
	// Job, if not empty, is the job that ends, by what its slots begin with, or
	// one of its slots, in full: its tokens are dropped, and what is under way
	// for it, and claims are answered Ended until the tokens would have ended by
	// themselves, and Remember is over. With a Token it ends only if that is in
	// service there; if not, nothing happens.
	Job string
	// Remember is how long the ids stay known as dropped: until the tokens
	// have ended by themselves.
	Remember time.Duration
	// Floor is the highest generation that this process has seen.
	Floor Generation
}

// Dropped is what a drop took out of service, as far as the store had it.
type Dropped struct {
	Access  []Secret
	Refresh Secret
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
	// Dead: the server says that a refresh token is no longer good. Binds
	// those who have no other.
	Dead
)

// Outcome says what became of a presentation.
type Outcome int

const (
	// OutcomeUnknown: sent, and no complete answer came. Whoever presents the
	// same once more takes a risk.
	OutcomeUnknown Outcome = iota
	// Unsent: no byte left this process.
	Unsent
	// Answered: the server has answered in full, and not with a grant.
	Answered
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
	// Credential that was refused, for Rejection; the id of the refresh token,
	// for Dead.
	Credential string
	// Outcome of the presentation, for a flight that committed to one.
	Outcome Outcome
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

// Binds reports whether the failure stands for whoever presents one of these:
// fingerprints, or the id of a refresh token.
func (f Failure) Binds(credentials ...string) bool {
	return f.Kind != NoFailure && f.Rest > 0 && (f.BacksOff() || slices.Contains(credentials, f.Credential))
}

// Record is a family as the store sees it. Absent parts are nil.
type Record struct {
	Token   *StoredToken
	Failure *Failure
	Consent *Consent
	// ToRevoke tells that something dropped waits for its revocation at the
	// server, and since when.
	ToRevoke      bool
	ToRevokeSince time.Duration
	// Ended tells that the slot's job has ended.
	Ended bool
}

// Change says that a family is no longer as it was.
type Change struct {
	Family     string
	Generation Generation
	// Reset tells that a remembered failure was forgotten.
	Reset bool
	// Dropped are the ids of tokens that must not be served any more.
	Dropped []string
	// Ended are the jobs, and the slots of jobs, that have ended: no token of
	// theirs must be served any more, known by its id or not.
	Ended []string
	// Slots that are no longer as they were; nil where that is not known.
	Slots []string
}

// JobOf is the job that a slot is of, by what the slot begins with; empty if it is
// of none.
func JobOf(slot string) string {
	job, _, ok := strings.Cut(slot, "/")
	if !ok {
		return ""
	}
	return job
}

// jobFamilyPrefix begins the names of families that hold nothing but the tokens of
// one job. A store forgets them soon after the tokens have ended.
const jobFamilyPrefix = "job."

// IsJobFamily reports whether a family holds nothing but the tokens of one job.
func IsJobFamily(family string) bool { return strings.HasPrefix(family, jobFamilyPrefix) }
