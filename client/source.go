package client

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"log/slog"
	"slices"
	"sync"
	"time"

	"golang.org/x/oauth2"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// A TokenOption says which token of a profile a source follows.
type TokenOption func(*demand)

// WithScopes asks for fewer scopes than the profile's own.
func WithScopes(scopes ...string) TokenOption {
	return func(d *demand) { d.scopes = append(d.scopes, scopes...) }
}

// WithMinLifetime says how long each token must still live when the broker sends it.
// It is less when the token is used: a token stays good until its margin.
func WithMinLifetime(least time.Duration) TokenOption {
	return func(d *demand) { d.minLifetime = least }
}

// WithJob says under which job the broker's audit log has the source. Its token is the
// one that everybody shares.
func WithJob(id string) TokenOption {
	return func(d *demand) { d.job, d.dedicated = id, false }
}

// WithDedicatedJob asks for a token of the job's own: shared with no other job, and
// the same again for whoever asks under the same id. TokenSource.Revoke ends it.
func WithDedicatedJob(id string) TokenOption {
	return func(d *demand) { d.job, d.dedicated = id, true }
}

// demand is which token a source follows.
type demand struct {
	profile     string
	scopes      []string // sorted, no two alike
	minLifetime time.Duration
	job         string
	dedicated   bool
}

func (d *demand) normalize() {
	slices.Sort(d.scopes)
	d.scopes = slices.Compact(d.scopes)
}

// key is the same for demands that one stream can serve.
func (d demand) key() string {
	text, err := json.Marshal([]any{d.profile, d.scopes, d.minLifetime, d.job, d.dedicated})
	if err != nil { // strings and numbers can be marshaled
		panic(err)
	}
	return string(text)
}

func (d demand) doing() string { return "requesting a token of profile " + d.profile }

func (d demand) lifetime() *durationpb.Duration {
	if d.minLifetime == 0 {
		return nil
	}
	return durationpb.New(d.minLifetime)
}

func (d demand) jobMessage() *pb.Job {
	if d.job == "" && !d.dedicated {
		return nil
	}
	return &pb.Job{Id: d.job, Dedicated: d.dedicated}
}

// TokenSource follows one token of a profile; see the package. It implements
// oauth2.TokenSource. Its methods may be called by any number of goroutines.
type TokenSource struct {
	f     *follower
	leave sync.Once
}

// Token returns a token that is good. It waits for one as TokenContext does, for at
// most 40 seconds.
//
// While a good token is at hand the call is a look into memory, so call it for each
// use. All callers get the same *oauth2.Token, which must not be changed.
func (s *TokenSource) Token() (*oauth2.Token, error) { return s.TokenContext(context.Background()) }

// TokenContext is Token for as long as ctx allows, and 40 seconds at most. Without a
// good token at hand it waits until the broker sends one, or the next attempt to
// reach it fails; where somebody has to act first, or that attempt is further away
// than the time allows, the last error comes at once. Errors are of type *Error.
func (s *TokenSource) TokenContext(ctx context.Context) (*oauth2.Token, error) {
	t, err := s.f.current(ctx)
	if err != nil {
		return nil, err
	}
	return t.reveal(), nil
}

// Current is TokenContext for all that the broker says of the token.
func (s *TokenSource) Current(ctx context.Context) (*Token, error) {
	t, err := s.f.current(ctx)
	if err != nil {
		return nil, err
	}
	return t, nil
}

// Next waits for a token other than the previous one, for programs that put each
// token somewhere: into a file, or a connection that lives for long. A nil previous
// one is none. While the previous one is good it waits as long as ctx allows, whatever
// happens to the broker, and has the broker asked again with the usual back-off even if
// somebody has to act first; after that it returns what Current does. After an error,
// wait a while before calling it again.
func (s *TokenSource) Next(ctx context.Context, previous *Token) (*Token, error) {
	t, err := s.f.next(ctx, previous)
	if err != nil {
		return nil, err
	}
	return t, nil
}

// Rejected says that a server has refused the token (HTTP 401), and returns another
// one to try. The broker is asked at most once per token, however many say the same;
// they all get the same answer. If the source has another token by then, that one is
// the answer, without a call.
//
// There is no other token while the refused one is younger than 10 seconds, or while
// the broker has asked to wait; the error's reason is REFRESH_TOO_SOON. After a
// report that has failed, whoever says the same within 10 seconds gets its error.
func (s *TokenSource) Rejected(ctx context.Context, refused *oauth2.Token) (*oauth2.Token, error) {
	sum := sha256.Sum256([]byte(refused.AccessToken))
	t, err := s.f.rejected(ctx, hex.EncodeToString(sum[:8]))
	if err != nil {
		return nil, err
	}
	return t.reveal(), nil
}

// Revoke has the broker revoke the current token, and reports whether the
// authorization server has confirmed it; if not it was dropped at the broker, and
// works where somebody still has it. A dedicated job ends with it: its sources get
// errors with the reason JOB_ENDED from then on. A token that others share is
// replaced, for all of them.
func (s *TokenSource) Revoke(ctx context.Context) (confirmed bool, err error) {
	confirmed, failed := s.f.revoke(ctx)
	if failed != nil {
		return false, failed
	}
	return confirmed, nil
}

// Close ends the source, and its stream if no other source shares it; for sources
// that end before their client does.
func (s *TokenSource) Close() { s.leave.Do(func() { s.f.client.leave(s.f) }) }

// String names the profile, and no token.
func (s *TokenSource) String() string { return "token source of profile " + s.f.demand.profile }

// GoString is String: %#v shows no more.
func (s *TokenSource) GoString() string { return s.String() }

// LogValue is String.
func (s *TokenSource) LogValue() slog.Value { return slog.StringValue(s.String()) }
