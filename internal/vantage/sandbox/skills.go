package sandbox

import (
	"net/http"
	"strings"
)

// skill is one entry of the list that proves a token.
type skill struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	Type string `json:"type"`
}

var demoSkills = []skill{
	{ID: "5a0e1c0e-7f63-4f0b-9a55-3b1b6a1d2c01", Name: "Invoice", Type: "Document"},
	{ID: "5a0e1c0e-7f63-4f0b-9a55-3b1b6a1d2c02", Name: "Purchase Order", Type: "Document"},
	{ID: "5a0e1c0e-7f63-4f0b-9a55-3b1b6a1d2c03", Name: "Accounts Payable", Type: "Process"},
}

// skills lists the published skills to whoever has a live token.
func (s *Server) skills(c *call) reply {
	if c.Method != http.MethodGet && c.Method != http.MethodHead {
		return methodNotAllowed("GET")
	}
	if s.bearer(c) == nil {
		return unauthorized()
	}
	return jsonReply(http.StatusOK, demoSkills)
}

// bearer returns the grant behind the bearer token of a call, or nil.
func (s *Server) bearer(c *call) *grant {
	scheme, token, _ := strings.Cut(c.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return nil
	}
	return s.liveToken(token)
}

func unauthorized() reply {
	return reply{status: http.StatusUnauthorized}.
		with("WWW-Authenticate", `Bearer error="invalid_token"`)
}
