package oauth

import (
	"context"
	"net/url"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Revoke asks the server to forget a token (RFC 7009). Nil means that the server
// does not know it any more, or never did. The error is always a
// *[broker.IssueError]; its code is unsupported_token_type when the server does
// not revoke tokens of this kind.
func (c *Client) Revoke(ctx context.Context, token broker.Secret, kind broker.TokenKind, clientSecret broker.Secret) error {
	a := newAttempt(ctx, c, TokenRequest{
		ClientSecret: clientSecret,
		Parameters:   url.Values{"token_type_hint": {string(kind)}},
		Secrets:      map[string]broker.Secret{"token": token},
	})
	if failure := a.locate(ctx); failure != nil {
		return failure
	}
	if a.at.revocation.url == nil {
		return &broker.IssueError{
			Kind:    broker.RequestRejected,
			Text:    "the token cannot be revoked: no revocation endpoint is known beside the " + a.at.token.String(),
			Outcome: broker.Unsent,
		}
	}
	a.endpoint = a.at.revocation
	answer, failure := a.ask(ctx)
	if failure == nil {
		failure = a.judgeRevocation(answer)
	}
	if failure != nil {
		return failure
	}
	return nil
}

// judgeRevocation reads a complete answer. A success says all that there is to
// say by its status (RFC 7009 section 2.2), unless it is one of the pages and
// errors that some servers send under such a status.
func (a *attempt) judgeRevocation(answer *answer) *broker.IssueError {
	m, err := answer.read()
	if answer.isSuccess() && err != flawPage && !m.hasError() {
		return nil
	}
	return a.refusal(answer, m, err)
}
