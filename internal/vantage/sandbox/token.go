package sandbox

import (
	"net/http"
	"slices"
	"strings"
)

const offlineAccess = "offline_access"

// Longest parameters, in bytes; IdentityServer's limits.
const (
	maxCredential = 100 // identifiers, secrets, names, passwords, codes, tokens
	maxScope      = 300
)

// A tokenError is an error answer of RFC 6749 section 5.2.
type tokenError struct {
	Code        string `json:"error"`
	Description string `json:"error_description,omitempty"`
}

// The error answers. None but the last has a description, and that one does not
// tell a wrong password from a locked account.
var (
	errInvalidRequest       = &tokenError{Code: "invalid_request"}
	errInvalidClient        = &tokenError{Code: "invalid_client"}
	errUnsupportedGrantType = &tokenError{Code: "unsupported_grant_type"}
	errUnauthorizedClient   = &tokenError{Code: "unauthorized_client"}
	errInvalidScope         = &tokenError{Code: "invalid_scope"}
	errInvalidGrant         = &tokenError{Code: "invalid_grant"}
	errInvalidPassword      = &tokenError{Code: "invalid_grant", Description: "invalid_username_or_password"}
)

// reply is 400 for every error: IdentityServer has no 401 here.
func (e *tokenError) reply() reply {
	a := jsonReply(http.StatusBadRequest, e).noStore()
	a.outcome = e.Code
	return a
}

// tokenResponse is the answer of RFC 6749 section 5.1, in the order in which
// Vantage's documentation shows it.
type tokenResponse struct {
	IDToken      string `json:"id_token,omitempty"`
	AccessToken  string `json:"access_token"`
	ExpiresIn    int64  `json:"expires_in"`
	TokenType    string `json:"token_type"`
	RefreshToken string `json:"refresh_token,omitempty"`
	Scope        string `json:"scope"`
}

// A grantHandler judges the credential of one grant type and says what to
// issue. Client, grant type and the spelling of the scopes were checked before.
type grantHandler func(c *call, cl *client) (*order, *tokenError)

func (s *Server) grantHandler(grantType string) grantHandler {
	switch grantType {
	case "client_credentials":
		return s.clientCredentials
	case "password":
		return s.password
	case "authorization_code":
		return s.authorizationCode
	case "refresh_token":
		return s.refresh
	}
	return nil
}

// tokenRequest answers at the token endpoint. The order of the checks is part
// of the behaviour: it decides which of several errors is told.
func (s *Server) tokenRequest(c *call) reply {
	if c.form == nil {
		return errInvalidRequest.reply()
	}
	cl, err := s.authenticate(c)
	if err != nil {
		return err.reply()
	}
	grantType := c.form.Get("grant_type")
	judge := s.grantHandler(grantType)
	if judge == nil {
		return errUnsupportedGrantType.reply()
	}
	if !cl.mayUse(grantType) {
		return errUnauthorizedClient.reply()
	}
	o, err := judge(c, cl)
	if err != nil {
		return err.reply()
	}
	a := jsonReply(http.StatusOK, s.issue(c, o)).noStore()
	a.outcome = outcomeSuccess
	s.tally.issue(c.grant)
	return a
}

// label names the grant and the client of a token request for the tally, in
// words that no caller chooses.
func (s *Server) label(c *call) {
	c.grant, c.client = unknown, unknown
	if c.form == nil {
		return
	}
	if grantType := c.form.Get("grant_type"); s.grantHandler(grantType) != nil {
		c.grant = grantType
	}
	id, _ := credentials(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.world.clients[id] != nil {
		c.client = id
	}
}

func (c *client) mayUse(grantType string) bool {
	if grantType == "refresh_token" {
		return c.AllowOfflineAccess
	}
	return slices.Contains(c.GrantTypes, grantType)
}

// scopesOf reads the scope parameter of a request that begins a grant. Without
// one the client gets all that it may have.
func (c *client) scopesOf(parameter string, offline bool) ([]string, *tokenError) {
	if len(parameter) > maxScope {
		return nil, errInvalidScope
	}
	requested := strings.Fields(parameter)
	if len(requested) == 0 {
		scopes := slices.Clone(c.Scopes)
		if offline && c.AllowOfflineAccess {
			scopes = append(scopes, offlineAccess)
		}
		return scopes, nil
	}
	var scopes []string
	for _, scope := range requested {
		if !c.mayHave(scope, offline) {
			return nil, errInvalidScope
		}
		if !slices.Contains(scopes, scope) {
			scopes = append(scopes, scope)
		}
	}
	return scopes, nil
}

// mayHave decides about one scope. Vantage's documents disagree on the name of
// the scope that gives access: clients are created with publicapi.all, and then
// request global.wildcard. So the first includes the second.
func (c *client) mayHave(scope string, offline bool) bool {
	switch {
	case scope == offlineAccess:
		return offline && c.AllowOfflineAccess
	case slices.Contains(c.Scopes, scope):
		return true
	}
	return scope == "global.wildcard" && slices.Contains(c.Scopes, "publicapi.all")
}

// clientCredentials is RFC 6749 section 4.4. Vantage, other than stock
// IdentityServer, lets it name openid.
func (s *Server) clientCredentials(c *call, cl *client) (*order, *tokenError) {
	scopes, err := cl.scopesOf(c.form.Get("scope"), false)
	if err != nil {
		return nil, err
	}
	return &order{grant: &grant{client: cl, scopes: scopes}, scopes: scopes}, nil
}
