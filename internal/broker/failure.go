package broker

import (
	"cmp"
	"fmt"
	"time"
)

// failureOf says what an attempt's error means for those that follow.
func failureOf(p *Profile, err *IssueError) Failure {
	f := Failure{Kind: Transient, Code: err.Code, Text: err.Text, Rest: err.RetryAfter, Jitter: between(0.8, 1.2)}
	switch err.Kind {
	case Throttled:
		f.Kind = Throttling
	case ClientRejected:
		f.Kind, f.Credential, f.Rest = Rejection, p.Credential, p.rejectedRetry()
	case UserRejected, GrantDead: // of a refresh token that is in hand: see attempt.failed
		f.Kind, f.Credential, f.Rest = Rejection, cmp.Or(p.UserCredential, p.Credential), Forever
	case RequestRejected:
		f.Kind, f.Credential, f.Rest = Rejection, p.Credential, requestRetry
	}
	return f
}

// requestRetry is how long a request that the server refuses to grant rests:
// its operators may allow the scope any minute, and nothing gets locked.
const requestRetry = 5 * time.Minute

// failureError tells a caller of a failure, and what to do.
func failureError(p *Profile, f Failure, rest time.Duration) *Error {
	e := &Error{
		Reason:     ReasonEndpointUnavailable,
		Code:       f.Code,
		RetryAfter: rest,
	}
	var advice string
	switch f.Kind {
	case Throttling:
		e.Reason = ReasonEndpointThrottled
		advice = "the endpoint is left alone; next attempt " + restText(rest)
	case Dead:
		e := authorizationNeeded(p, f.Text)
		e.Code = f.Code
		return e
	case Rejection:
		e.Reason, e.RetryAfter, e.credential = ReasonCredentialsRejected, 0, f.Credential
		advice = rejectedAdvice(p, f, rest)
	default:
		if f.Code == codeRepeated {
			return dedicatedUnavailable(p, f.Text)
		}
		advice = "next attempt " + restText(rest)
	}
	e.Text = fmt.Sprintf("requesting a token for profile %s: %s; %s", p.Name, f.Text, advice)
	return e
}

func rejectedAdvice(p *Profile, f Failure, rest time.Duration) string {
	switch {
	case rest == Forever:
		return fmt.Sprintf("not tried again, because wrong passwords lock accounts: correct the user name or password of profile %s, or unlock the account and run 'broker reset %s'", p.Name, p.Name)
	case f.Code == "invalid_client" || f.Code == "invalid_grant" || f.Code == "": // a client can be refused without a code, a request cannot
		return fmt.Sprintf("not tried again for now, because wrong secrets lock clients (next attempt %s): correct client_id and client_secret of profile %s, or run 'broker reset %s' once the client is allowed again", restText(rest), p.Name, p.Name)
	}
	return fmt.Sprintf("correct the scopes or the grant of profile %s, or have the client allowed to use them and run 'broker reset %s' (next attempt %s)", p.Name, p.Name, restText(rest))
}

func restText(rest time.Duration) string {
	switch {
	case rest == Forever:
		return "never by itself"
	case rest <= 0:
		return "now"
	}
	return "in " + max(rest.Round(time.Second), time.Second).String()
}

func authorizationNeeded(p *Profile, why string) *Error {
	return &Error{
		Reason:     ReasonAuthorizationNeeded,
		ConsoleURL: p.ConsoleURL,
		Text:       fmt.Sprintf("requesting a token for profile %s: %s; a person must sign in: %s", p.Name, why, p.signInAdvice()),
	}
}

// signInAdvice tells an operator how to sign in.
func (p *Profile) signInAdvice() string {
	run := fmt.Sprintf("run 'broker authorize %s'", p.Name)
	if p.ConsoleURL == "" {
		return run
	}
	return "sign in at " + p.ConsoleURL + " or " + run
}

const deadGrant = "the refresh token is no longer good"

// consentGone tells why c, or nil, is no consent to go on with.
func consentGone(c *Consent, now time.Time) string {
	switch {
	case c == nil:
		return "nobody has signed in yet, or the grant was revoked"
	case c.over():
		return "the consent ended on " + date(now.Add(c.Remaining))
	}
	return deadGrant
}

// answerAwaited says that the last refresh may still be answered.
func answerAwaited(p *Profile, left time.Duration) *Error {
	return &Error{
		Reason:     ReasonEndpointUnavailable,
		Text:       fmt.Sprintf("requesting a token for profile %s: the refresh token was presented and no answer came back yet; presenting it again might cost the grant, so that waits for the end of the token that there is; next attempt %s", p.Name, restText(left)),
		RetryAfter: left,
	}
}

// revokedMeanwhile says that a revocation overtook the request.
func revokedMeanwhile(p *Profile) *Error {
	const why = "a revocation has overtaken the token that was on its way"
	if p.consentUse() == ConsentRequired {
		return authorizationNeeded(p, why)
	}
	return &Error{
		Reason:     ReasonEndpointUnavailable,
		Text:       fmt.Sprintf("requesting a token for profile %s: %s; ask again for a new one", p.Name, why),
		RetryAfter: time.Second,
	}
}

func lifetimeUnavailable(p *Profile, d Demand, full time.Duration) *Error {
	return &Error{
		Reason: ReasonLifetimeUnavailable,
		Text:   fmt.Sprintf("requesting a token for profile %s that lives %v: a new one lives %v in all; ask for %v at most, or have the authorization server give this client longer tokens", p.Name, d.Lifetime, full, LongestFloor(full)),
	}
}

func tooSoon(p *Profile, d Demand, wait time.Duration) *Error {
	return &Error{
		Reason:     ReasonRefreshTooSoon,
		Text:       fmt.Sprintf("refreshing the token of profile %s: token %s was obtained a moment ago, so a new one would hardly fare better; check what the resource server objects to (scope, audience, role), and report again %s", p.Name, d.Not, restText(wait)),
		RetryAfter: wait,
	}
}

func storeUnavailable(p *Profile, tried string, err error) *Error {
	return &Error{
		Reason:     ReasonStoreUnavailable,
		Text:       fmt.Sprintf("%s profile %s: the store is out of reach", tried, p.Name),
		RetryAfter: time.Second,
		Err:        err,
	}
}

// unreadableRecord says that what the store has must be left as it is.
func unreadableRecord(p *Profile, err error) *Error {
	return &Error{
		Reason:     ReasonStoreUnavailable,
		Text:       fmt.Sprintf("requesting a token for profile %s: this replica cannot read what the store has of it, because a newer version wrote it, its key is not in this replica's keyset, or it is none of ours; the replica's log says which", p.Name),
		RetryAfter: time.Minute,
		Err:        err,
	}
}

func shuttingDown(p *Profile) *Error {
	return &Error{
		Reason:     ReasonShuttingDown,
		Text:       fmt.Sprintf("requesting a token for profile %s: this replica is shutting down; ask another one", p.Name),
		RetryAfter: 100 * time.Millisecond,
		Err:        errClosing,
	}
}
