package broker

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
)

// A client secret is renewed in steps, each of which leaves a secret in use that
// works. What the steps have come to is in the store, in a record of its own per
// client, so that any replica can go on where another one died:
//
//  1. The intent is saved, under a description that nothing else has.
//  2. The secret is created, and saved as the candidate. Who dies in between
//     leaves a secret at the server that nobody knows; its description is logged.
//  3. The candidate is proven by a token request.
//  4. The candidate becomes the current secret, for all replicas, and the current
//     one the second choice.
//  5. The second choice is forgotten when it has ended.
//
// One replica at a time does so, under a lease that is held from the first step
// to the last. The secrets of the configuration stay last choice.

// secretRecord is what the store has of a client's secrets, sealed.
type secretRecord struct {
	Current *clientSecret `json:"current,omitempty"`
	// Previous secrets that have not ended, newest first.
	Previous []clientSecret `json:"previous,omitempty"`
	// Candidate was created, and is not proven.
	Candidate *clientSecret `json:"candidate,omitempty"`
	// Intent is the description of a secret that may have been created, IntentBy
	// who would know: two may be described alike.
	Intent   string `json:"intent,omitempty"`
	IntentBy string `json:"intent_by,omitempty"`
	// Attempts since the last success, and when there may be another one.
	Attempts  int       `json:"attempts,omitempty"`
	NotBefore time.Time `json:"not_before,omitzero"`
	// Written is when the record was written last.
	Written time.Time `json:"written"`
}

// clientSecret is a ClientSecret as the record has it.
type clientSecret struct {
	Value       openSecret `json:"value"`
	Description string     `json:"description,omitempty"`
	Start       time.Time  `json:"start"`
	End         time.Time  `json:"end"`
	// Created is when it was, by the clock of whoever asked for it.
	Created time.Time `json:"created"`
}

// openSecret is a Secret that JSON shows, for what is sealed as a whole.
type openSecret struct{ Secret }

func (s openSecret) MarshalText() ([]byte, error) { return []byte(s.Reveal()), nil }

func (s *openSecret) UnmarshalText(text []byte) error {
	s.Secret = NewSecret(string(text))
	return nil
}

const (
	// mostPrevious bounds the second choices: each costs a request when the
	// server refuses the client.
	mostPrevious = 3
	// recordSpare is how much longer than its secrets a record lives.
	recordSpare = 400 * 24 * time.Hour
	// longestSecretLife is what a secret's life counts for in that at the most: a
	// server may know of no end, and say the year 9999.
	longestSecretLife = 10 * 365 * 24 * time.Hour

	// rewriteAfter is how old a record gets at the most: each time it is sealed
	// with the store's newest key, and an old one may be dropped.
	rewriteAfter = 24 * time.Hour

	// A failed attempt rests, and so does an intent: whoever goes on with it
	// gives the one who had it the time to come back.
	rotationRestFirst = time.Minute
	rotationRestLast  = time.Hour

	// proofs are how often a new secret is tried: it may take a moment until it
	// is known everywhere.
	proofs         = 6
	proofWaitFirst = time.Second
	proofWaitLast  = 15 * time.Second

	// savingTakes is for how long a new secret is tried to be saved, whatever
	// else ends: only this process has it.
	savingTakes = keepTrying
)

// secretsFamily names the record of the client's secrets in the store.
func (p *Profile) secretsFamily() string { return Identity(p.itsClient(), "client secrets") }

// rotationFamily names the lease of whoever renews them.
func (p *Profile) rotationFamily() string { return Identity(p.itsClient(), "client secret rotation") }

// itsClient names the client, whatever its profiles do with it: they share its
// secrets.
func (p *Profile) itsClient() string {
	if admin, ok := p.Issuer.(Administrator); ok {
		return Identity(p.Endpoint, admin.Tenant(), admin.ClientID())
	}
	return p.Identity
}

// secretsIn reads the record; one that is not there is empty.
func secretsIn(t *StoredToken) (r secretRecord, err error) {
	if t == nil || t.Remaining <= 0 {
		return r, nil
	}
	if err := json.Unmarshal([]byte(t.Access.Reveal()), &r); err != nil {
		return r, fmt.Errorf("the record of client secrets: %w", ErrUnreadable) // not err, which may quote it
	}
	return r, nil
}

// stored is the record in the store's terms, where tokens are.
func (r secretRecord) stored(now time.Time) (StoredToken, error) {
	text, err := json.Marshal(r)
	if err != nil {
		return StoredToken{}, errors.New("the record of client secrets cannot be encoded")
	}
	last := now
	for _, s := range r.all() {
		if s.End.After(last) {
			last = s.End
		}
	}
	life := min(last.Sub(now), longestSecretLife) + recordSpare
	return StoredToken{Access: NewSecret(string(text)), Type: "client secrets", Lifetime: life, Remaining: life}, nil
}

func (r secretRecord) all() []clientSecret {
	all := slices.Clone(r.Previous)
	for _, s := range []*clientSecret{r.Current, r.Candidate} {
		if s != nil {
			all = append(all, *s)
		}
	}
	return all
}

func (r secretRecord) has(secret Secret) bool {
	return slices.ContainsFunc(r.all(), func(s clientSecret) bool { return s.Value.Equal(secret) })
}

// inUse are the secrets that the client presents, in this order.
func (r secretRecord) inUse() (secrets []Secret) {
	if r.Current == nil {
		return nil
	}
	secrets = append(secrets, r.Current.Value.Secret)
	for _, s := range r.Previous {
		secrets = append(secrets, s.Value.Secret)
	}
	return secrets
}

// promote makes the candidate the current secret.
func (r *secretRecord) promote() {
	if r.Current != nil {
		r.Previous = slices.Insert(r.Previous, 0, *r.Current)
		r.Previous = r.Previous[:min(len(r.Previous), mostPrevious)]
	}
	r.Current = r.Candidate
	r.settle()
}

// settle ends an attempt that has come to its end.
func (r *secretRecord) settle() {
	r.Candidate, r.Intent, r.IntentBy, r.Attempts, r.NotBefore = nil, "", "", 0, time.Time{}
}

// forget drops the second choices that have ended. It reports whether there were
// any.
func (r *secretRecord) forget(now time.Time) bool {
	before := len(r.Previous)
	r.Previous = slices.DeleteFunc(slices.Clone(r.Previous), func(s clientSecret) bool { return !s.End.After(now) })
	return len(r.Previous) < before
}

// rest has the next attempt wait: a minute, doubling to an hour.
func (r *secretRecord) rest(now time.Time) {
	r.Attempts++
	r.NotBefore = now.Add(doubled(rotationRestFirst, rotationRestLast, r.Attempts-1))
}

// SecretFiles writes client secrets to where the configuration reads them.
type SecretFiles interface {
	// Check says why the file cannot be replaced, if it cannot.
	Check(path string) error
	// Write replaces the file's content at once, readable by its owner only.
	Write(path string, secret Secret) error
}

// renewal renews the client secret of one profile.
type renewal struct {
	b       *Broker
	profile *Profile // as configured
	own     Administrator
	// admin is the profile whose token authorizes it.
	admin string
	// spec of the new secret; an empty Description is made.
	spec ClientSecretSpec
	// needed decides, under the lease, whether there is to be a new secret.
	needed func(secretRecord) bool
	// finish makes do with a candidate that is there.
	finish bool
	// patient waits for the lease as long as there is time.
	patient bool
}

var (
	errRotationBusy = errors.New("another replica is renewing it")
	errNotOurs      = errors.New("another replica has begun again meanwhile")
)

// run takes the steps, from wherever they were left. It returns the record as it
// is then.
func (r *renewal) run(ctx context.Context) (secretRecord, error) {
	lease, start, err := r.acquire(ctx)
	if err != nil {
		return secretRecord{}, err
	}
	held, lasts, release := r.b.hold(ctx, r.profile.Name, lease, start)
	defer func() {
		release()
		_ = detached(ctx, func(ctx context.Context) error { // it ends by itself
			_, err := r.b.store.Fail(ctx, lease, Failure{Kind: NoFailure})
			return err
		})
	}()
	record, err := r.look(held)
	if err == nil {
		record, err = r.tidy(held, record)
	}
	if err == nil && record.Candidate != nil {
		if record, err = r.introduce(held, record); err != nil || r.finish {
			return record, err
		}
	}
	if err != nil || !r.needed(record) {
		return record, err
	}
	if record, err = r.create(held, lasts); err != nil {
		return record, err
	}
	return r.introduce(held, record)
}

// acquire takes the lease that all steps are taken under.
func (r *renewal) acquire(ctx context.Context) (Lease, time.Time, error) {
	c := seize(r.profile.rotationFamily(), r.b.lease)
	var err error
	for ctx.Err() == nil {
		start := time.Now()
		var a Acquisition
		a, err = r.b.store.Acquire(ctx, c)
		switch {
		case err == nil && a.Verdict == Granted:
			return c.lease(a.Fence), start, nil
		case !r.patient && err == nil:
			return Lease{}, start, errRotationBusy
		case !r.patient:
			return Lease{}, start, r.unavailable(err)
		}
		waitFor(ctx, nil, min(pollInterval, max(a.Wait, storeRetry)))
	}
	if err != nil {
		return Lease{}, time.Time{}, r.unavailable(err)
	}
	return Lease{}, time.Time{}, context.Cause(ctx)
}

func (r *renewal) unavailable(err error) error {
	return storeUnavailable(r.profile, "renewing the client secret of", err)
}

func (r *renewal) look(ctx context.Context) (secretRecord, error) {
	found, err := r.b.store.Look(ctx, r.profile.secretsFamily(), "")
	if err != nil {
		return secretRecord{}, r.unavailable(err)
	}
	record, err := secretsIn(found.Token)
	if err != nil {
		return record, r.unavailable(err)
	}
	return record, nil
}

// update changes the record as a whole, until it is saved or ctx ends. Change may
// be called more than once: an answer may have been lost. It returns an error to
// leave the record as it is.
func (r *renewal) update(ctx context.Context, change func(*secretRecord) error) (record secretRecord, err error) {
	for {
		if record, err = r.updateOnce(ctx, change); err == nil || errors.Is(err, errNotOurs) {
			return record, err
		}
		waitFor(ctx, nil, storeRetry)
		if ctx.Err() != nil || errors.Is(err, ErrUnreadable) {
			return record, r.unavailable(err)
		}
	}
}

func (r *renewal) updateOnce(ctx context.Context, change func(*secretRecord) error) (record secretRecord, err error) {
	c := seize(r.profile.secretsFamily(), r.b.lease)
	a, err := r.b.store.Acquire(ctx, c)
	if err != nil {
		return record, err
	}
	if a.Verdict != Granted {
		return record, errRotationBusy
	}
	lease := c.lease(a.Fence)
	record, err = secretsIn(a.Token)
	if err == nil {
		err = change(&record)
	}
	if err != nil {
		_, _ = r.b.store.Fail(ctx, lease, Failure{Kind: NoFailure}) // it ends by itself
		return record, err
	}
	record.Written = time.Now()
	token, err := record.stored(record.Written)
	if err != nil {
		return record, err
	}
	_, verdict, err := r.b.store.Save(ctx, lease, Result{Token: token, Durable: true})
	if err == nil && verdict != Saved {
		err = errLeaseLost
	}
	return record, err
}

// create takes the first two steps.
func (r *renewal) create(ctx context.Context, lasts func() bool) (secretRecord, error) {
	token, _, err := r.b.Issue(ctx, Ask{Profile: r.admin}, Demand{})
	if err != nil {
		return r.failed(ctx, err)
	}
	admin, err := r.b.administrator(r.admin, &r.spec.TenantID)
	if err != nil {
		return r.failed(ctx, err)
	}
	if r.spec.Description == "" {
		r.spec.Description = fmt.Sprintf("token-broker %s %s %s", r.profile.Name, time.Now().UTC().Format(time.DateOnly), rand.Text()[:10])
	}
	description, us := r.spec.Description, newOwner()
	record, err := r.update(ctx, func(s *secretRecord) error {
		if s.IntentBy == us {
			return nil
		}
		if s.Intent != "" {
			r.orphaned(s.Intent)
		}
		s.rest(time.Now())
		s.Intent, s.IntentBy = description, us
		return nil
	})
	if err != nil || ctx.Err() != nil {
		return record, errors.Join(err, context.Cause(ctx))
	}
	if !lasts() { // this process stood still, and another one may be at it
		return record, errLeaseLost
	}
	asked := time.Now()
	made, err := admin.CreateClientSecret(context.WithoutCancel(ctx), token.Access, r.spec)
	if err != nil {
		failure := r.b.administrationFailed(r.admin, fmt.Sprintf("creating a new client secret for profile %s with the token of profile %s", r.profile.Name, r.admin), err)
		if mayExist(err) {
			r.orphaned(description)
		}
		return r.abandon(ctx, failure, func(s *secretRecord) bool { return s.IntentBy == us })
	}
	saving, cancel := context.WithTimeout(context.WithoutCancel(ctx), savingTakes)
	defer cancel()
	record, err = r.update(saving, func(s *secretRecord) error {
		switch {
		case s.has(made.Value): // saved before, and perhaps put into use meanwhile
			return nil
		case s.IntentBy != us:
			return errNotOurs
		}
		s.Intent, s.IntentBy = "", ""
		s.Candidate = &clientSecret{Value: openSecret{made.Value}, Description: description, Start: made.Start, End: made.End, Created: asked}
		return nil
	})
	if err != nil {
		r.orphaned(description)
		return record, r.unavailable(err)
	}
	r.b.log.Info("client secret created", "profile", r.profile.Name, "description", description, "end", made.End)
	return record, nil
}

// mayExist reports whether what was asked for may have been created.
func mayExist(err error) bool {
	var e *IssueError
	return !errors.As(err, &e) || e.Outcome == OutcomeUnknown
}

// orphaned tells of a secret that may exist and that nobody knows.
func (r *renewal) orphaned(description string) {
	r.b.orphaned(r.profile.Name, ClientSecretSpec{TenantID: r.spec.TenantID, ClientID: r.spec.ClientID, Description: description})
}

func (b *Broker) orphaned(profile string, spec ClientSecretSpec) {
	b.log.Error("a client secret may exist that nobody knows: remove it at the authorization server",
		"profile", profile, "tenant_id", spec.TenantID, "client_id", spec.ClientID, "description", spec.Description)
}

// failed has the next attempt wait. It returns the error.
func (r *renewal) failed(ctx context.Context, err error) (secretRecord, error) {
	if ctx.Err() != nil {
		return secretRecord{}, err
	}
	record, _ := r.update(ctx, func(s *secretRecord) error { // else the attempt is made again a bit early
		s.rest(time.Now())
		return nil
	})
	return record, err
}

// abandon gives up what was begun, if it is still what the record has. It returns
// the error.
func (r *renewal) abandon(ctx context.Context, err error, ours func(*secretRecord) bool) (secretRecord, error) {
	saving, cancel := context.WithTimeout(context.WithoutCancel(ctx), savingTakes)
	defer cancel()
	record, saveErr := r.update(saving, func(s *secretRecord) error {
		if !ours(s) {
			return errNotOurs
		}
		s.Intent, s.IntentBy, s.Candidate = "", "", nil
		return nil
	})
	if saveErr != nil {
		r.b.log.Warn("a rotation that failed is not noted as such: the next one begins with it", "profile", r.profile.Name, "error", saveErr)
	}
	return record, err
}

// introduce takes the last steps, for the candidate if there still is one.
func (r *renewal) introduce(ctx context.Context, record secretRecord) (secretRecord, error) {
	candidate := record.Candidate
	if candidate == nil {
		return record, nil
	}
	ours := func(s *secretRecord) bool {
		return s.Candidate != nil && s.Candidate.Value.Equal(candidate.Value.Secret)
	}
	if err := r.prove(ctx, candidate.Value.Secret); err != nil {
		var e *IssueError
		failure := r.b.administrationFailed(r.profile.Name, fmt.Sprintf("proving the new client secret of profile %s", r.profile.Name), err)
		if errors.As(err, &e) && e.Kind == ClientRejected {
			r.orphaned(candidate.Description)
			return r.abandon(ctx, failure, ours)
		}
		return r.failed(ctx, failure)
	}
	if err := ctx.Err(); err != nil {
		return record, context.Cause(ctx)
	}
	if r.profile.Rotation == nil {
		if err := r.b.secretFiles.Write(r.profile.SecretFile, candidate.Value.Secret); err != nil {
			return r.failed(ctx, r.b.notWritable(r.profile, err))
		}
	} else {
		record.promote()
		r.vouch(ctx, record)
	}
	after, err := r.update(ctx, func(s *secretRecord) error {
		switch {
		case ours(s) && r.profile.Rotation == nil:
			s.settle()
		case ours(s):
			s.promote()
		case s.Current == nil || !s.Current.Value.Equal(candidate.Value.Secret): // or an answer was lost
			return errNotOurs
		}
		return nil
	})
	if r.profile.Rotation == nil { // it is in the file: the record has nothing more to say
		after, err = secretRecord{Current: candidate}, nil
	}
	if err != nil {
		return after, err
	}
	r.b.mu.Lock()
	k := r.b.keepers[r.profile.secretsFamily()]
	r.b.mu.Unlock()
	if k != nil {
		_ = k.read(ctx) // here at once; what fails here comes as the news of it
	}
	r.b.log.Info("client secret renewed", "profile", r.profile.Name, "description", candidate.Description, "end", candidate.End)
	return after, nil
}

// prove tries a new secret, for a while.
func (r *renewal) prove(ctx context.Context, secret Secret) (err error) {
	for i := range proofs {
		if err = r.own.Prove(ctx, secret); err == nil || i == proofs-1 {
			return err
		}
		var e *IssueError
		wait := doubled(proofWaitFirst, proofWaitLast, i)
		if errors.As(err, &e) && e.RetryAfter > proofWaitLast {
			return err
		} else if e != nil {
			wait = max(wait, e.RetryAfter)
		}
		waitFor(ctx, nil, wait)
		if ctx.Err() != nil {
			return &IssueError{Kind: Unavailable, Outcome: Unsent, Text: "there was no more time", Err: context.Cause(ctx)}
		}
	}
	return err
}

// vouch tells the fleet that the credential of a record that is about to be saved
// works, so that its replicas need not find out one by one. What it cannot tell
// they do find out.
func (r *renewal) vouch(ctx context.Context, record secretRecord) {
	if r.profile.Rotation == nil || r.profile.GrantType == Password { // it presents none of them, or is never taken for proven
		return
	}
	p := r.b.with(r.profile, record.inUse())
	c := seize(p.client(), r.b.lease, p.credentials()...)
	a, err := r.b.store.Acquire(ctx, c)
	if err == nil && a.Verdict == Granted {
		_, _, _ = r.b.store.Save(ctx, c.lease(a.Fence), proofOf(p))
	}
}

// tidy takes the last step, for second choices that have ended, and writes a
// record anew that has become old.
func (r *renewal) tidy(ctx context.Context, record secretRecord) (secretRecord, error) {
	now := time.Now()
	switch {
	case record.forget(now):
		r.vouch(ctx, record)
	case record.Current == nil || now.Before(record.Written.Add(rewriteAfter)):
		return record, nil
	}
	return r.update(ctx, func(s *secretRecord) error {
		s.forget(time.Now())
		return nil
	})
}
