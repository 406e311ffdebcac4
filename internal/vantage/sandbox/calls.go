package sandbox

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"net/http"
	"sync"
)

// Outcomes that are not an error code of RFC 6749.
const (
	outcomeSuccess = "success"
	outcomeFault   = "fault"
	unknown        = "unknown"
)

// maxPresented bounds how many refresh tokens and codes are counted apart.
const maxPresented = 100_000

// Calls is what the server received since it began, or since ResetCalls.
//
// A request counts as soon as it arrived, and has its outcome before the first
// byte of the answer leaves: whoever has an answer finds it counted. Outcomes
// are "success", RFC 6749's error code, "not_found" for an unknown tenant, or
// "fault" for a request that a [Fault] answered, whether it was processed or
// not. Grants and clients that the server does not know are called "unknown".
type Calls struct {
	// Total counts requests to the token endpoint.
	Total int `json:"total"`
	// InFlight is how many of them have no outcome yet or hang, and
	// PeakInFlight the most that ever did at once.
	InFlight     int `json:"in_flight"`
	PeakInFlight int `json:"peak_in_flight"`
	// ByGrant counts them by grant type, then outcome.
	ByGrant map[string]map[string]int `json:"by_grant"`
	// ByClient counts them by client identifier, then outcome.
	ByClient map[string]map[string]int `json:"by_client"`
	// Issued counts the access tokens that were really issued, by grant type,
	// including those whose answer a fault replaced or lost.
	Issued map[string]int `json:"issued"`
	// RefreshTokens and Codes count how often each was presented, whatever
	// came of it. They are named by the first 16 hex digits of their SHA-256.
	RefreshTokens map[string]int `json:"refresh_tokens"`
	Codes         map[string]int `json:"codes"`
	// Revocations counts processed revocation requests: "revoked", "unchanged"
	// (an unknown, dead or foreign token, which also answers 200), or the
	// error code.
	Revocations map[string]int `json:"revocations"`
}

// Calls returns the counts as they are now.
func (s *Server) Calls() Calls { return s.tally.snapshot() }

// ResetCalls begins to count again at nothing. Requests in flight stay in
// flight, and their outcomes count.
func (s *Server) ResetCalls() { s.tally.reset() }

// tally keeps the counts.
type tally struct {
	mu            sync.Mutex // guards all below
	calls         Calls      // its maps of presented tokens stay nil; see below
	refreshTokens *bounded[string, int]
	codes         *bounded[string, int]
}

func (t *tally) reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls = Calls{
		InFlight:     t.calls.InFlight,
		PeakInFlight: t.calls.InFlight,
		ByGrant:      map[string]map[string]int{},
		ByClient:     map[string]map[string]int{},
		Issued:       map[string]int{},
		Revocations:  map[string]int{},
	}
	t.refreshTokens = newBounded[string, int](maxPresented)
	t.codes = newBounded[string, int](maxPresented)
}

// arrive counts a token request that was read.
func (t *tally) arrive(c *call) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls.Total++
	t.calls.InFlight++
	t.calls.PeakInFlight = max(t.calls.PeakInFlight, t.calls.InFlight)
	switch c.grant {
	case "refresh_token":
		present(t.refreshTokens, c.form.Get("refresh_token"))
	case "authorization_code":
		present(t.codes, c.form.Get("code"))
	}
}

func present(counts *bounded[string, int], token string) {
	if token == "" {
		return
	}
	sum := sha256.Sum256([]byte(token))
	id := hex.EncodeToString(sum[:8])
	n, _ := counts.get(id)
	counts.put(id, n+1)
}

// issue counts an access token.
func (t *tally) issue(grant string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls.Issued[grant]++
}

// settle counts the outcome of a token request.
func (t *tally) settle(c *call, outcome string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	count(t.calls.ByGrant, c.grant, outcome)
	count(t.calls.ByClient, c.client, outcome)
}

func count(counts map[string]map[string]int, name, outcome string) {
	if counts[name] == nil {
		counts[name] = map[string]int{}
	}
	counts[name][outcome]++
}

// revocation counts the outcome of a revocation request.
func (t *tally) revocation(outcome string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls.Revocations[outcome]++
}

func (t *tally) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.calls.InFlight--
}

func (t *tally) snapshot() Calls {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.calls
	c.ByGrant = cloneCounts(c.ByGrant)
	c.ByClient = cloneCounts(c.ByClient)
	c.Issued = maps.Clone(c.Issued)
	c.Revocations = maps.Clone(c.Revocations)
	c.RefreshTokens = t.refreshTokens.all()
	c.Codes = t.codes.all()
	return c
}

func cloneCounts(counts map[string]map[string]int) map[string]map[string]int {
	clone := make(map[string]map[string]int, len(counts))
	for name, outcomes := range counts {
		clone[name] = maps.Clone(outcomes)
	}
	return clone
}

// controlCalls serves /sandbox/calls: GET reads, DELETE begins again.
func (s *Server) controlCalls(w http.ResponseWriter, r *http.Request) {
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		jsonReply(http.StatusOK, s.Calls()).noStore().write(w)
	case http.MethodDelete:
		s.ResetCalls()
		w.WriteHeader(http.StatusNoContent)
	default:
		methodNotAllowed("GET, DELETE").write(w)
	}
}
