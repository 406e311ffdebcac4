package broker_test

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/url"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// door is an idp at which people sign in with a browser. It is the other side:
// tests believe what it counts.
type door struct {
	*idp
	// client that the profile is.
	client   string
	redirect string
	// silent servers send no refresh token.
	silent bool
	// down is what the exchange, or the URL, comes to instead.
	down *broker.IssueError

	codes     map[string]*visit
	exchanges int
	// thefts are codes that were used twice.
	thefts int
}

// visit is a person's, which ends with a code.
type visit struct {
	challenge, client string
	account           broker.Account
	used              bool
}

const itsIssuer = "https://id.example.com"

func newDoor() *door {
	return &door{idp: newIDP(), client: "invoices", redirect: "https://broker.example.com/callback/vantage", codes: make(map[string]*visit)}
}

func (d *door) profile(change ...func(*broker.Profile)) *broker.Profile {
	p := d.consented(append([]func(*broker.Profile){func(p *broker.Profile) {
		p.ConsentLifetime, p.ConsoleURL = 30*24*time.Hour, "https://broker.example.com/profiles/invoices"
	}}, change...)...)
	p.Issuer = d
	return p
}

func (d *door) AuthorizationURL(_ context.Context, r broker.AuthorizationRequest) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.down != nil {
		return "", d.down
	}
	return itsIssuer + "/authorize?" + url.Values{"state": {r.State}, "code_challenge": {r.Challenge}}.Encode(), nil
}

func (d *door) CheckIssuer(_ context.Context, iss string) error {
	if iss != "" && iss != itsIssuer {
		return &broker.IssueError{Kind: broker.Malformed, Text: "the answer is from " + iss}
	}
	return nil
}

func (d *door) RedirectURL() string { return d.redirect }

func (d *door) Exchange(ctx context.Context, x broker.CodeExchange) (*broker.Grant, error) {
	d.mu.Lock()
	d.exchanges++
	takes := d.takes
	d.mu.Unlock()
	time.Sleep(takes) // nothing cancels it
	if ctx.Err() != nil {
		return nil, &broker.IssueError{Kind: broker.Ambiguous, Text: "it was cut short"}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.down != nil {
		return nil, d.down
	}
	v := d.codes[x.Code.Reveal()]
	sum := sha256.Sum256([]byte(x.Verifier.Reveal()))
	if v != nil && v.used {
		d.thefts++
	}
	if v == nil || v.used || v.client != d.client || v.challenge != base64.RawURLEncoding.EncodeToString(sum[:]) {
		return nil, &broker.IssueError{Kind: broker.GrantDead, Code: "invalid_grant", Text: "invalid_grant", Outcome: broker.Answered}
	}
	v.used, d.dead = true, false
	g := d.grant()
	if g.Account = v.account; d.silent {
		g.RefreshToken = broker.Secret{}
	}
	return g, nil
}

// opens is a person who signs in at the address; the browser then brings back the
// callback.
func (d *door) opens(t *testing.T, s *broker.SignIn, account broker.Account) broker.Callback {
	t.Helper()
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	q := u.Query()
	d.mu.Lock()
	defer d.mu.Unlock()
	code := fmt.Sprint("code-", len(d.codes)+1)
	d.codes[code] = &visit{challenge: q.Get("code_challenge"), client: d.client, account: account}
	return broker.Callback{State: q.Get("state"), Code: broker.NewSecret(code), Issuer: itsIssuer, Path: "/callback/vantage"}
}

// asked is how often the token endpoint was asked for a code.
func (d *door) wantExchanges(t *testing.T, want int) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.exchanges != want || d.thefts > 0 {
		t.Fatalf("%d codes were exchanged, want %d; %d of them twice", d.exchanges, want, d.thefts)
	}
}

var (
	ann = broker.Account{Subject: "1", Name: "ann@example.com"}
	bob = broker.Account{Subject: "2", Name: "bob@example.com"}
)

// begins starts a sign-in at that replica.
func (f *fleet) begins(t *testing.T, replica int) *broker.SignIn {
	t.Helper()
	s, err := f.replicas[replica].StartAuthorization(t.Context(), "invoices", broker.Secret{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// signsIn has a person sign in from the one replica to the other.
func (f *fleet) signsIn(t *testing.T, d *door, account broker.Account) *broker.Completion {
	t.Helper()
	done, err := f.replicas[len(f.replicas)-1].CompleteAuthorization(t.Context(), d.opens(t, f.begins(t, 0), account))
	if err != nil {
		t.Fatal(err)
	}
	return done
}

// wantReason wants an error with that reason about that field.
func wantReason(t *testing.T, err error, reason broker.Reason, field string) *broker.Error {
	t.Helper()
	var e *broker.Error
	if !errors.As(err, &e) || e.Reason != reason || e.Field != field {
		t.Fatalf("got %v, want %s %s", err, reason, field)
	}
	return e
}
