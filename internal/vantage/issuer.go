package vantage

import "github.com/tokenbroker/tokenbroker/internal/broker"

// issuer speaks for one profile. It implements broker.Issuer and broker.Revoker
// as oauth does for any server, and broker.Administrator.
type issuer struct {
	grants
	administration
}

// grants are what Vantage's token and revocation endpoints do.
type grants interface {
	broker.Issuer
	broker.Revoker
}

// authorizer is an issuer whose grants begin with a sign-in.
type authorizer struct {
	*issuer
	broker.Authorizer
}

func newIssuer(of broker.Issuer, admin administration) broker.Issuer {
	i := &issuer{of.(grants), admin} // there is a revocation URL
	if signIn, ok := of.(broker.Authorizer); ok {
		return authorizer{i, signIn}
	}
	return i
}

// explain says what a refusal means at Vantage.
func explain(e *broker.IssueError) string {
	switch e.Kind {
	case broker.ClientRejected:
		return "; Vantage says the same of an unknown client, a wrong secret and an expired one (six months by default): " +
			"check client_id, then create a new secret in Vantage"
	case broker.UserRejected:
		return "; Vantage says the same of a wrong user name or password, of a locked account, of a name with accounts in several tenants " +
			"unless tenant_id is set, and of every user in a tenant with an external identity provider, where only client_credentials works without a person"
	}
	return ""
}
