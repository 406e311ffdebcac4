package client

import (
	"errors"
	"log/slog"
	"strings"
	"time"

	"golang.org/x/oauth2"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// Token is an access token and what the broker says of it. It may be printed: it
// hides its secret.
type Token struct {
	// ID is safe to log: the first 16 hex digits of the SHA-256 of the token.
	ID string
	// Scopes are what the token allows, as the authorization server listed them.
	Scopes []string
	// IssueTime is when it was asked for, ExpireTime when it ends, and RefreshTime
	// when its successor is due.
	IssueTime, RefreshTime, ExpireTime time.Time
	// Source is where the broker had it from.
	Source pb.Source

	until time.Time // it is good
	// A function is the one thing that package fmt never looks into.
	reveal func() *oauth2.Token
}

// newToken checks what the broker sent.
func newToken(t *pb.Token, source pb.Source) (*Token, error) {
	if t.GetAccessToken() == "" || t.GetId() == "" || t.GetExpireTime() == nil {
		return nil, errors.New("the broker sent a token without content, id or expire_time")
	}
	n := &Token{
		ID: t.GetId(), Scopes: t.GetScopes(), Source: source,
		IssueTime: t.GetIssueTime().AsTime(), RefreshTime: t.GetRefreshTime().AsTime(), ExpireTime: t.GetExpireTime().AsTime(),
	}
	n.until = n.ExpireTime.Add(-n.margin())
	token := (&oauth2.Token{AccessToken: t.GetAccessToken(), TokenType: t.GetTokenType(), Expiry: n.ExpireTime}).
		WithExtra(map[string]any{"id": n.ID, "scope": strings.Join(n.Scopes, " ")})
	n.reveal = func() *oauth2.Token { return token }
	return n, nil
}

// longestMargin is what a token that lives for long must still have left to be good.
const longestMargin = 10 * time.Second

func (t *Token) margin() time.Duration {
	return min(longestMargin, max(0, t.ExpireTime.Sub(t.IssueTime))/10)
}

// good reports whether the token can be used. None is not.
func (t *Token) good(now time.Time) bool { return t != nil && now.Before(t.until) }

// AccessToken is the secret itself.
func (t *Token) AccessToken() string { return t.reveal().AccessToken }

// Type says how to present the token (RFC 6749 section 7.1): "Bearer".
func (t *Token) Type() string { return t.reveal().TokenType }

// OAuth2 is the token as package oauth2 has it, which shows its secret when it is
// printed. Extra("id") is the ID, Extra("scope") the scopes. It must not be changed.
func (t *Token) OAuth2() *oauth2.Token { return t.reveal() }

// String names the token and its end.
func (t Token) String() string {
	return "token " + t.ID + " until " + t.ExpireTime.Format(time.RFC3339)
}

// GoString is String: %#v shows no more.
func (t Token) GoString() string { return t.String() }

// LogValue is String.
func (t Token) LogValue() slog.Value { return slog.StringValue(t.String()) }
