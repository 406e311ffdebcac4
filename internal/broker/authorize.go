package broker

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/url"
	"time"
)

// A sign-in may be started on one replica and completed on another. What the
// second needs to know of it is kept in the store as a ticket, which only the
// state redeems that goes with the browser: once, by one replica. So the code is
// sent to the server by one call of one replica, and never again, because the
// server takes a second use for theft. Whoever brings a state that is not theirs
// hears no more than one who brings an invented one.

// SignIn is a person's sign-in under way.
type SignIn struct {
	// URL to open in a browser.
	URL string
	// State that the browser brings back.
	State string
	// Expires is when it is too late to come back.
	Expires time.Time
}

// Callback is what the browser brought back.
type Callback struct {
	State string
	Code  Secret
	// Issuer is the parameter iss (RFC 9207); empty if it was not there.
	Issuer string
	// Path of the URL that it came back to; empty is any. It must be that of
	// the profile's redirect URL.
	Path string
	// Browser is what the sign-in was bound to when it was started.
	Browser Secret
	// ReplaceAccount has the new grant replace a working one of another
	// account without asking.
	ReplaceAccount bool
	// Allowed reports whether whoever brings it may complete a sign-in for the
	// profile; nil is yes. A sign-in for another one is UNKNOWN to them.
	Allowed func(profile string) bool
}

// Completion is how a sign-in ended.
type Completion struct {
	Profile string
	// Account that has signed in.
	Account Account
	// Ticket is empty when the grant is in use. Otherwise the profile works
	// with a grant of another account, Previous, than anybody has agreed to
	// replace: Confirm or Abandon, within ten minutes.
	Ticket   string
	Previous Account
}

// signInLife is how long a person has to sign in, and then to confirm.
const signInLife = 10 * time.Minute

// subject is what a ticket is about: a profile, and what was issued for it then.
type subject struct {
	Profile string `json:"profile"`
	Family  string `json:"family"`
	Slot    string `json:"slot"`
}

func (p *profile) subject() subject { return subject{p.Name, p.own.family, p.own.slot} }

// started is what a state redeems.
type started struct {
	subject
	Redirect string `json:"redirect"`
	Verifier string `json:"verifier"`
	// Browser is the digest of what the sign-in is bound to.
	Browser string `json:"browser,omitempty"`
}

func stateID(state string) string { return Identity("sign-in", state) }

func browserID(browser Secret) string {
	if browser.IsEmpty() {
		return ""
	}
	return Identity("browser", browser.Reveal())
}

// random is 256 random bits in 43 letters, digits, dashes and underscores.
func random() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // it never fails
	return base64.RawURLEncoding.EncodeToString(b[:])
}

// StartAuthorization begins a sign-in for a profile, which only the holder of
// browser can complete unless that is empty. The error is an *Error or ctx's.
func (b *Broker) StartAuthorization(ctx context.Context, name string, browser Secret) (*SignIn, error) {
	p, err := b.profile(name)
	if err != nil {
		return nil, err
	}
	authorizer, ok := p.Issuer.(Authorizer)
	if !ok || p.GrantType != AuthorizationCode {
		return nil, &Error{
			Reason: ReasonInvalidRequest, Field: "profile",
			Text: fmt.Sprintf("starting a sign-in for profile %s: its grant is %s, which needs nobody to sign in", p.Name, p.GrantType),
		}
	}
	state, verifier := random(), random()
	challenge := sha256.Sum256([]byte(verifier))
	address, err := authorizer.AuthorizationURL(ctx, AuthorizationRequest{
		State: state, Challenge: base64.RawURLEncoding.EncodeToString(challenge[:]),
	})
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, ctx.Err()
	case err != nil:
		failed := asIssueError(err)
		return nil, signInFailed(p.Profile, failureOf(p.Profile, failed), max(failed.RetryAfter, backoffFirst))
	}
	s := &SignIn{URL: address, State: state, Expires: time.Now().Add(signInLife)}
	err = b.keep(ctx, stateID(state), started{
		subject: p.subject(), Redirect: authorizer.RedirectURL(), Verifier: verifier, Browser: browserID(browser),
	})
	if err != nil {
		return nil, storeUnavailable(p.Profile, "starting a sign-in for", err)
	}
	b.log.Info("sign-in started", "profile", p.Name)
	return s, nil
}

// RefuseAuthorization ends a sign-in to which the authorization server answered
// with an error instead of a code (RFC 6749 section 4.1.2.1). It returns the
// profile that the sign-in was for.
func (b *Broker) RefuseAuthorization(ctx context.Context, c Callback) (profile string, err error) {
	_, p, err := b.arrive(ctx, c)
	if err != nil {
		return "", err
	}
	b.log.Info("sign-in refused by the authorization server", "profile", p.Name)
	return p.Name, nil
}

// arrive redeems the state that came back.
func (b *Broker) arrive(ctx context.Context, c Callback) (started, *profile, error) {
	s, _, err := redeem[started](ctx, b, stateID(c.State), "state")
	if err != nil {
		return s, nil, err
	}
	p, err := b.about(s.subject, c.Allowed, "state")
	if err != nil {
		return s, nil, err
	}
	switch {
	case subtle.ConstantTimeCompare([]byte(s.Browser), []byte(browserID(c.Browser))) == 0 && s.Browser != "":
		b.log.Warn("sign-in not completed: another browser has started it", "profile", p.Name)
		return s, nil, ticketUnknown("state")
	case c.Path != "" && c.Path != pathOf(s.Redirect):
		b.log.Warn("sign-in not completed: it came back to the redirect URL of another issuer", "profile", p.Name)
		return s, nil, ticketUnknown("state")
	case s.Redirect != p.Issuer.(Authorizer).RedirectURL():
		return s, nil, subjectChanged(p, "state")
	}
	return s, p, nil
}

func pathOf(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return ""
	}
	return cmp.Or(u.Path, "/")
}

// about returns the profile that a ticket is about, for somebody who may know.
func (b *Broker) about(s subject, allowed func(profile string) bool, field string) (*profile, error) {
	p := (*b.profiles.Load())[s.Profile]
	if p == nil {
		return nil, ticketUnknown(field)
	}
	if allowed != nil && !allowed(p.Name) {
		b.log.Warn("sign-in not completed: whoever brought it may not administer the profile", "profile", p.Name)
		return nil, ticketUnknown(field)
	}
	if _, ok := p.Issuer.(Authorizer); !ok || p.subject() != s {
		return nil, subjectChanged(p, field)
	}
	return p, nil
}

// ticketUnknown says the same of all states that are not the caller's to redeem.
func ticketUnknown(field string) *Error {
	return &Error{
		Reason: ReasonInvalidRequest, Field: field,
		Text: fmt.Sprintf("completing a sign-in: there is none under way with this %s: it was completed already, is older than %d minutes, or never began here; start again", field, signInLife/time.Minute),
	}
}

func subjectChanged(p *profile, field string) *Error {
	return &Error{
		Reason: ReasonInvalidRequest, Field: field, Profile: p.Name,
		Text: fmt.Sprintf("completing a sign-in for profile %s: the profile has changed since the sign-in was started; start again", p.Name),
	}
}

// keep keeps content as a ticket.
func (b *Broker) keep(ctx context.Context, id string, content any) error {
	text, err := json.Marshal(content)
	if err != nil {
		return err
	}
	ticket := Ticket{ID: id, Content: NewSecret(string(text)), Life: signInLife}
	err = thrice(ctx, func(ctx context.Context) error { return b.store.Keep(ctx, ticket) })
	b.reach.observe(err)
	return err
}

// redeem returns the content of a ticket and its age. Field is the one of the
// request that stands for the ticket.
func redeem[T any](ctx context.Context, b *Broker, id, field string) (content T, age time.Duration, err error) {
	owner := newOwner()
	var r Redemption
	err = thrice(ctx, func(ctx context.Context) (err error) {
		r, err = b.store.Redeem(ctx, id, owner)
		return err
	})
	b.reach.observe(err)
	switch {
	case err != nil:
		return content, 0, &Error{
			Reason: ReasonStoreUnavailable, RetryAfter: time.Second, Err: err,
			Text: fmt.Sprintf("completing a sign-in: the store is out of reach; try again, and if its %s is unknown then, start again", field),
		}
	case r.Verdict != Redeemed:
		return content, 0, ticketUnknown(field)
	}
	if err := json.Unmarshal([]byte(r.Content.Reveal()), &content); err != nil { // a newer version kept it
		return content, 0, ticketUnknown(field)
	}
	return content, r.Age, nil
}
