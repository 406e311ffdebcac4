package broker_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

// endpoint is a token endpoint in virtual time. It is the other side: tests
// believe its counts.
type endpoint struct {
	mu    sync.Mutex
	calls []time.Time
	asked [][]string
	// under way now, and the most that ever were.
	under, most int
	// revoked are the tokens that it was asked to revoke.
	revoked []string
	// takes is how long an answer takes.
	takes time.Duration
	// lives is the lifetime of its tokens; zero means an hour.
	lives time.Duration
	// answer overrides the next answers when set; n counts from 1.
	answer func(n int) (*broker.Grant, error)
}

func (e *endpoint) Issue(ctx context.Context, r broker.Request) (*broker.Grant, error) {
	e.mu.Lock()
	e.calls = append(e.calls, time.Now())
	e.asked = append(e.asked, r.Scopes)
	n, takes, answer := len(e.calls), e.takes, e.answer
	lives := e.lives
	e.under++
	e.most = max(e.most, e.under)
	e.mu.Unlock()
	defer e.set(func(e *endpoint) { e.under-- })
	select {
	case <-time.After(takes):
	case <-ctx.Done():
		return nil, &broker.IssueError{Kind: broker.Ambiguous, Text: "the request was cut short", Err: context.Cause(ctx)}
	}
	if answer != nil {
		return answer(n)
	}
	return grant(n, lives), nil
}

// revoking is an endpoint whose server revokes tokens.
type revoking struct{ *endpoint }

func (e revoking) Revoke(_ context.Context, token broker.Secret, _ broker.TokenKind) error {
	e.set(func(*endpoint) { e.revoked = append(e.revoked, token.Reveal()) })
	return nil
}

func grant(n int, lives time.Duration) *broker.Grant {
	if lives == 0 {
		lives = time.Hour
	}
	return &broker.Grant{AccessToken: broker.NewSecret(fmt.Sprintf("token-%d", n)), TokenType: "Bearer", Lifetime: lives}
}

func (e *endpoint) count() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.calls)
}

// since returns when the requests after the first n came.
func (e *endpoint) since(n int) []time.Time {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.calls[n:])
}

func (e *endpoint) set(change func(e *endpoint)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	change(e)
}

// fails answers every request with the same error.
func fails(kind broker.IssueErrorKind, code string, retryAfter time.Duration) func(int) (*broker.Grant, error) {
	return func(int) (*broker.Grant, error) {
		return nil, &broker.IssueError{Kind: kind, Code: code, Text: "the endpoint said " + kind.String(), RetryAfter: retryAfter}
	}
}

// profile of the tests, spread over scopes a, b and c.
func profile(e *endpoint, change ...func(*broker.Profile)) *broker.Profile {
	p := &broker.Profile{
		Name: "invoices", Provider: "vantage", GrantType: broker.ClientCredentials,
		Scopes: []string{"a", "b", "c"}, Identity: broker.Identity("https://id.example.com", "invoices"),
		Credential: "secret-1", Issuer: e, Endpoint: "https://id.example.com/token",
	}
	for _, c := range change {
		c(p)
	}
	return p
}

// fleet starts replicas that share a store and serve the profiles, and closes
// them when the test ends.
type fleet struct {
	store    *store.Memory
	replicas []*broker.Broker
	log      *buffer
}

// buffer is a log that may be read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func start(t *testing.T, replicas int, profiles ...*broker.Profile) *fleet {
	t.Helper()
	f := &fleet{store: store.NewMemory(), log: &buffer{}}
	for range replicas {
		b := broker.New(f.store, broker.Options{
			Logger: slog.New(slog.NewTextHandler(f.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
		})
		b.Configure(profiles)
		f.replicas = append(f.replicas, b)
	}
	t.Cleanup(f.stop)
	return f
}

func (f *fleet) stop() {
	for _, b := range f.replicas {
		b.Close()
	}
}

// ask wants a token from the first replica and fails the test without one.
func (f *fleet) ask(t *testing.T, d broker.Demand) (*broker.Token, broker.Source) {
	t.Helper()
	token, source, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, d)
	if err != nil {
		t.Fatalf("issue: %v", err)
	}
	return token, source
}

// refused wants no token, and that reason for it.
func (f *fleet) refused(t *testing.T, d broker.Demand, reason broker.Reason) *broker.Error {
	t.Helper()
	token, _, err := f.replicas[0].Issue(t.Context(), broker.Ask{Profile: "invoices"}, d)
	if err == nil {
		t.Fatalf("got token %s, want %s", token.ID, reason)
	}
	var e *broker.Error
	if !errors.As(err, &e) || e.Reason != reason {
		t.Fatalf("got %v, want %s", err, reason)
	}
	return e
}

func wantCalls(t *testing.T, e *endpoint, want int) {
	t.Helper()
	if got := e.count(); got != want {
		t.Fatalf("the endpoint got %d token requests, want %d", got, want)
	}
}
