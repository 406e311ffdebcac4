package sandbox

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"
)

// clientSettings is a client as the administration API reads and shows it.
type clientSettings struct {
	ClientID                         string   `json:"clientId"`
	ClientName                       string   `json:"clientName"`
	AllowOfflineAccess               bool     `json:"allowOfflineAccess"`
	AllowRememberConsent             bool     `json:"allowRememberConsent"`
	BackChannelLogoutSessionRequired bool     `json:"backChannelLogoutSessionRequired"`
	RequireClientSecret              bool     `json:"requireClientSecret"`
	RequireConsent                   bool     `json:"requireConsent"`
	AllowNoPKCE                      bool     `json:"allowNoPkce"`
	AllowedGrantTypes                []string `json:"allowedGrantTypes"`
	// AllowedCorsOrigins is documented as a switch and named like a list: it
	// is shown as it came.
	AllowedCorsOrigins     json.RawMessage `json:"allowedCorsOrigins,omitempty"`
	AllowedScopes          []string        `json:"allowedScopes"`
	PostLogoutRedirectURIs []string        `json:"postLogoutRedirectUris"`
	RedirectURIs           []string        `json:"redirectUris"`
	AccessTokenLifetime    int64           `json:"accessTokenLifetime"`  // seconds
	RefreshTokenLifetime   int64           `json:"refreshTokenLifetime"` // seconds
}

// The grant types and scopes that a client may be created with.
var (
	clientGrantTypes = []string{
		"authorization_code", "client_credentials", "password", "hybrid", "implicit",
		"urn:ietf:params:oauth:grant-type:device_code",
	}
	clientScopes = []string{"openid", "permissions", "publicapi.all"}
)

const maxLifetime = 10 * 365 * 24 * 60 * 60 // seconds

// defaultSettings are the documented ones.
func defaultSettings() clientSettings {
	return clientSettings{
		AllowRememberConsent:             true,
		BackChannelLogoutSessionRequired: true,
		RequireClientSecret:              true,
		PostLogoutRedirectURIs:           []string{},
		RedirectURIs:                     []string{},
		AccessTokenLifetime:              24 * 60 * 60,
		RefreshTokenLifetime:             30 * 24 * 60 * 60,
	}
}

// settingsOf shows a client that did not come through the API.
func settingsOf(c Client) clientSettings {
	v := defaultSettings()
	v.ClientID, v.ClientName = c.ID, c.Name
	v.AllowOfflineAccess, v.AllowNoPKCE, v.RequireClientSecret = c.AllowOfflineAccess, c.AllowNoPKCE, !c.Public
	v.AllowedGrantTypes, v.AllowedScopes = slices.Concat([]string{}, c.GrantTypes), c.Scopes
	v.RedirectURIs = slices.Concat([]string{}, c.RedirectURIs)
	v.AccessTokenLifetime = int64(c.AccessTokenLifetime / time.Second)
	v.RefreshTokenLifetime = int64(c.RefreshTokenLifetime / time.Second)
	return v
}

// client makes the client that the settings describe, for one tenant. It has no
// secret yet.
func (v clientSettings) client(tenant *Tenant) Client {
	return Client{
		ID: v.ClientID, Name: v.ClientName, Tenant: tenant.ID,
		Public:               !v.RequireClientSecret,
		GrantTypes:           v.AllowedGrantTypes,
		Scopes:               v.AllowedScopes,
		AllowOfflineAccess:   v.AllowOfflineAccess,
		AllowNoPKCE:          v.AllowNoPKCE,
		RedirectURIs:         v.RedirectURIs,
		AccessTokenLifetime:  time.Duration(v.AccessTokenLifetime) * time.Second,
		RefreshTokenLifetime: time.Duration(v.RefreshTokenLifetime) * time.Second,
	}
}

// check returns what is wrong with each field.
func (v clientSettings) check() fieldErrors {
	wrong := fieldErrors{}
	if v.ClientID == "" || len(v.ClientID) > maxCredential || strings.ContainsAny(v.ClientID, " /") {
		wrong.add("clientId", "must have 1 to 100 characters, no space and no slash")
	}
	if v.ClientName == "" || len(v.ClientName) > 200 {
		wrong.add("clientName", "must have 1 to 200 characters")
	}
	if err := checkGrantTypes(v.AllowedGrantTypes); err != nil {
		wrong.add("allowedGrantTypes", err.Error())
	}
	if len(v.AllowedScopes) != len(clientScopes) ||
		slices.ContainsFunc(clientScopes, func(scope string) bool { return !slices.Contains(v.AllowedScopes, scope) }) {
		wrong.add("allowedScopes", "must be exactly openid, permissions and publicapi.all")
	}
	if origins := v.AllowedCorsOrigins; len(origins) > 0 {
		var list []string
		var flag bool
		if json.Unmarshal(origins, &list) != nil && json.Unmarshal(origins, &flag) != nil {
			wrong.add("allowedCorsOrigins", "must be a list of origins or a boolean")
		}
	}
	if slices.Contains(v.RedirectURIs, "") || slices.Contains(v.PostLogoutRedirectURIs, "") {
		wrong.add("redirectUris", "must not contain an empty URI")
	}
	if v.AccessTokenLifetime < 1 || v.AccessTokenLifetime > maxLifetime {
		wrong.add("accessTokenLifetime", "must be a positive number of seconds")
	}
	if v.RefreshTokenLifetime < 1 || v.RefreshTokenLifetime > maxLifetime {
		wrong.add("refreshTokenLifetime", "must be a positive number of seconds")
	}
	return wrong
}

// checkGrantTypes applies IdentityServer's rules.
func checkGrantTypes(types []string) error {
	if len(types) == 0 {
		return errors.New("must name at least one grant type")
	}
	browser := 0
	for i, t := range types {
		switch {
		case !slices.Contains(clientGrantTypes, t):
			return fmt.Errorf("%q is not a grant type", t)
		case slices.Contains(types[:i], t):
			return fmt.Errorf("%q is named twice", t)
		case t == "authorization_code" || t == "hybrid" || t == "implicit":
			browser++
		}
	}
	if browser > 1 {
		return errors.New("authorization_code, hybrid and implicit exclude each other")
	}
	return nil
}

// secretRequest is what a secret is created from.
type secretRequest struct {
	Description string    `json:"description"`
	StartTime   time.Time `json:"startTime"`
	Expiration  time.Time `json:"expiration"`
}

// secretView is a secret as the API shows it: with its value once, with the
// first three characters ever after.
type secretView struct {
	ID           string     `json:"id"`
	Description  string     `json:"description"`
	Value        string     `json:"value,omitempty"`
	ValueDisplay string     `json:"valueDisplay"`
	StartTime    *time.Time `json:"startTime"`
	Expiration   *time.Time `json:"expiration"` // null: never, which the API itself does not offer
}

func (s *secret) view() secretView {
	v := secretView{ID: s.id, Description: s.description, ValueDisplay: s.display}
	if !s.start.IsZero() {
		v.StartTime = &s.start
	}
	if !s.end.IsZero() {
		v.Expiration = &s.end
	}
	return v
}

// complete fills in the documented defaults.
func (q *secretRequest) complete(now time.Time) {
	now = now.UTC().Truncate(time.Millisecond)
	setDefault(&q.StartTime, now)
	setDefault(&q.Expiration, now.AddDate(0, 6, 0))
}

// check returns what is wrong with each field.
func (q *secretRequest) check() fieldErrors {
	wrong := fieldErrors{}
	if len(q.Description) > 1000 {
		wrong.add("description", "must have at most 1000 characters")
	}
	if q.Expiration.Before(q.StartTime.AddDate(0, 0, 1)) || q.Expiration.After(q.StartTime.AddDate(3, 0, 0)) {
		wrong.add("expiration", "must lie between 1 day and 3 years after the start")
	}
	return wrong
}

// adminClients serves …/clients/: GET lists, POST creates.
func (s *Server) adminClients(c *call) reply {
	if refused := s.adminOnly(c); refused != nil {
		return *refused
	}
	switch c.Method {
	case http.MethodGet:
		return s.listClients(c)
	case http.MethodPost:
		return s.createClient(c)
	}
	return methodNotAllowed("GET, POST")
}

func (s *Server) listClients(c *call) reply {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := []clientSettings{}
	for _, id := range s.world.ids {
		if cl := s.world.clients[id]; cl.in(c.tenant) {
			list = append(list, cl.settings)
		}
	}
	return jsonReply(http.StatusOK, list)
}

// in reports whether the client belongs to a tenant.
func (c *client) in(tenant *Tenant) bool { return c.Tenant == "" || c.Tenant == tenant.ID }

func (s *Server) createClient(c *call) reply {
	v := defaultSettings()
	if refused := decode(c, &v); refused != nil {
		return *refused
	}
	if wrong := v.check(); len(wrong) > 0 {
		return invalid(c, wrong)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.world.clients[v.ClientID] != nil {
		return problem(c, http.StatusConflict, "there is a client with this clientId already")
	}
	if err := s.world.addClient(v.client(c.tenant)); err != nil {
		return problem(c, http.StatusConflict, err.Error())
	}
	s.world.clients[v.ClientID].settings = v
	return jsonReply(http.StatusCreated, v)
}

// adminClient serves …/clients/{client}: GET shows it.
func (s *Server) adminClient(c *call) reply {
	return s.adminOf(c, "GET", func(cl *client) reply {
		return jsonReply(http.StatusOK, cl.settings)
	})
}

// adminSecrets serves …/clients/{client}/secrets/: GET lists, POST creates.
func (s *Server) adminSecrets(c *call) reply {
	return s.adminOf(c, "GET, POST", func(cl *client) reply {
		if c.Method == http.MethodPost {
			return s.createSecret(c, cl)
		}
		list := []secretView{}
		for _, kept := range cl.secrets {
			list = append(list, kept.view())
		}
		return jsonReply(http.StatusOK, list)
	})
}

// createSecret is called with Server.mu held.
func (s *Server) createSecret(c *call, cl *client) reply {
	var q secretRequest
	if refused := decode(c, &q); refused != nil {
		return *refused
	}
	q.complete(s.options.Now())
	if wrong := q.check(); len(wrong) > 0 {
		return invalid(c, wrong)
	}
	if len(cl.secrets) >= maxSecrets {
		return problem(c, http.StatusConflict, fmt.Sprintf("the client has %d secrets already", maxSecrets))
	}
	value := randomToken()
	kept, err := newSecret(Secret{
		Value: value, Description: q.Description, StartTime: q.StartTime, Expiration: q.Expiration,
	})
	if err != nil {
		panic("sandbox: a secret of our own making: " + err.Error())
	}
	cl.secrets = slices.Insert(cl.secrets, 0, kept)
	v := kept.view()
	v.Value = value
	return jsonReply(http.StatusCreated, v).noStore()
}

// adminSecret serves …/secrets/{secret}: DELETE removes it.
func (s *Server) adminSecret(c *call) reply {
	return s.adminOf(c, "DELETE", func(cl *client) reply {
		id := c.PathValue("secret")
		i := slices.IndexFunc(cl.secrets, func(kept *secret) bool { return kept.id == id })
		if i < 0 {
			return problem(c, http.StatusNotFound, "there is no such secret")
		}
		cl.secrets = slices.Delete(cl.secrets, i, i+1)
		return reply{status: http.StatusNoContent}
	})
}

// adminOf runs do, with Server.mu held, for the client that the path names.
func (s *Server) adminOf(c *call, methods string, do func(*client) reply) reply {
	if refused := s.adminOnly(c); refused != nil {
		return *refused
	}
	if !slices.Contains(strings.Split(methods, ", "), c.Method) {
		return methodNotAllowed(methods)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	cl := s.world.clients[c.PathValue("client")]
	if cl == nil || !cl.in(c.tenant) {
		return problem(c, http.StatusNotFound, "there is no such client in this tenant")
	}
	return do(cl)
}

// adminOnly returns nil when the bearer token belongs to a tenant administrator
// of the tenant in the path, and the refusal otherwise. A grant that a user
// gave has the user's role, whatever the client's.
func (s *Server) adminOnly(c *call) *reply {
	g := s.bearer(c)
	if g == nil {
		refused := unauthorized()
		return &refused
	}
	allowed := g.client.TenantAdministrator && g.client.in(c.tenant)
	if g.user != nil {
		allowed = g.user.TenantAdministrator && g.user.Tenant == c.tenant.ID
	}
	if !allowed {
		refused := problem(c, http.StatusForbidden, "the role of tenant administrator is required")
		return &refused
	}
	return nil
}

// decode reads a JSON body. It knows no mercy for misspelt fields, which the
// real API may well ignore: a stand-in that ignored them would hide mistakes.
func decode(c *call, v any) *reply {
	if mediaType(c.Request) != "application/json" {
		refused := problem(c, http.StatusUnsupportedMediaType, "the body must be application/json")
		return &refused
	}
	decoder := json.NewDecoder(bytes.NewReader(c.body))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(v); err != nil {
		refused := problem(c, http.StatusBadRequest, "the body is not as documented: "+err.Error())
		return &refused
	}
	if decoder.More() {
		refused := problem(c, http.StatusBadRequest, "something follows the body's JSON object")
		return &refused
	}
	return nil
}

// fieldErrors are ASP.NET's: messages by field.
type fieldErrors map[string][]string

func (f fieldErrors) add(field, message string) { f[field] = append(f[field], message) }

// problemDetails is ASP.NET's error body. Vantage labels it application/json.
type problemDetails struct {
	Type     string      `json:"type"`
	Title    string      `json:"title"`
	Status   int         `json:"status"`
	Detail   string      `json:"detail,omitempty"`
	Instance string      `json:"instance,omitempty"`
	Errors   fieldErrors `json:"errors,omitempty"`
}

func problem(c *call, status int, detail string) reply {
	return jsonReply(status, problemDetails{
		Type: "about:blank", Title: http.StatusText(status), Status: status,
		Detail: detail, Instance: c.URL.Path,
	})
}

func invalid(c *call, wrong fieldErrors) reply {
	return jsonReply(http.StatusBadRequest, problemDetails{
		Type: "about:blank", Title: "One or more validation errors occurred.",
		Status: http.StatusBadRequest, Instance: c.URL.Path, Errors: wrong,
	})
}
