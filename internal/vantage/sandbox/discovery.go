package sandbox

import "net/http"

// metadata is the part of OpenID Connect Discovery that clients read.
type metadata struct {
	Issuer                string   `json:"issuer"`
	JWKSURI               string   `json:"jwks_uri"`
	AuthorizationEndpoint string   `json:"authorization_endpoint"`
	TokenEndpoint         string   `json:"token_endpoint"`
	RevocationEndpoint    string   `json:"revocation_endpoint"`
	ScopesSupported       []string `json:"scopes_supported"`
	GrantTypes            []string `json:"grant_types_supported"`
	ResponseTypes         []string `json:"response_types_supported"`
	ResponseModes         []string `json:"response_modes_supported"`
	TokenAuthMethods      []string `json:"token_endpoint_auth_methods_supported"`
	RevocationAuthMethods []string `json:"revocation_endpoint_auth_methods_supported"`
	SubjectTypes          []string `json:"subject_types_supported"`
	IDTokenAlgorithms     []string `json:"id_token_signing_alg_values_supported"`
	CodeChallengeMethods  []string `json:"code_challenge_methods_supported"`
	IssuerParameter       bool     `json:"authorization_response_iss_parameter_supported"`
}

func (s *Server) discovery(c *call) reply {
	if c.Method != http.MethodGet && c.Method != http.MethodHead {
		return methodNotAllowed("GET")
	}
	auth := []string{"client_secret_basic", "client_secret_post"}
	return jsonReply(http.StatusOK, metadata{
		Issuer:                c.issuer,
		JWKSURI:               c.issuer + "/.well-known/openid-configuration/jwks",
		AuthorizationEndpoint: c.issuer + "/connect/authorize",
		TokenEndpoint:         c.issuer + "/connect/token",
		RevocationEndpoint:    c.issuer + "/connect/revocation",
		ScopesSupported:       []string{"openid", "permissions", "global.wildcard", "publicapi.all", offlineAccess},
		GrantTypes:            []string{"authorization_code", "client_credentials", "password", "refresh_token"},
		ResponseTypes:         []string{"code"},
		ResponseModes:         []string{"query"},
		TokenAuthMethods:      auth,
		RevocationAuthMethods: auth,
		SubjectTypes:          []string{"public"},
		IDTokenAlgorithms:     []string{"ES256"},
		CodeChallengeMethods:  []string{"S256"},
		IssuerParameter:       true,
	})
}

func (s *Server) jwks(c *call) reply {
	if c.Method != http.MethodGet && c.Method != http.MethodHead {
		return methodNotAllowed("GET")
	}
	return jsonReply(http.StatusOK, s.keys.public)
}
