package console

import (
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Access says how operators are known. Where neither certificates nor a bearer
// token are configured, whoever is on this machine is one, and nobody else.
type Access struct {
	// Local says that the listener is on a loopback address.
	Local bool
	// Certificate names the holder of a verified client certificate, or nobody:
	// nil. Nil itself: no client authority is configured.
	Certificate func(leaf *x509.Certificate) *access.Caller
	// Revocations in force at a request, which its connection may be older than;
	// nil: nothing is revoked.
	Revocations func() *access.Revocations
	// Authorities of operators at a request; nil, and a nil result, are those of
	// the handshake.
	Authorities func() *x509.CertPool
	// Authorizer decides which profiles an operator may administer. Never nil.
	Authorizer *access.Authorizer
	// BearerToken that lets anyone do everything; nil: none is configured. An
	// empty one lets nobody in.
	BearerToken func() broker.Secret
}

// operator is who uses the console.
type operator struct {
	*access.Caller
	// session says that there is one to end.
	session bool
}

// may reports whether the operator, nil being nobody, may see and change the
// profile.
func (c *console) may(o *operator, profile string) bool {
	return o != nil && c.Access.Authorizer.Decide(o.Caller, access.Admin, profile, nil).Allowed
}

// bearer is whoever knows the token.
func bearer() *access.Caller { return &access.Caller{Name: "bearer", Proof: access.BearerToken} }

// identify returns who is asking, or nil and what to tell them.
func (c *console) identify(r *http.Request) (*operator, *problem) {
	a := c.Access
	if a.BearerToken != nil {
		token := a.BearerToken()
		if scheme, given, ok := strings.Cut(r.Header.Get("Authorization"), " "); ok && strings.EqualFold(scheme, "Bearer") {
			if !opens(token, broker.NewSecret(given)) {
				return nil, wrongToken()
			}
			return &operator{Caller: bearer()}, nil
		}
		if cookie, err := r.Cookie(c.cookieName(r, "session")); err == nil && isSession(token, cookie.Value, time.Now()) {
			return &operator{Caller: bearer(), session: true}, nil
		}
	}
	if a.Certificate != nil && r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		holder := a.Certificate(r.TLS.VerifiedChains[0][0])
		if holder == nil {
			return nil, nobodysCertificate()
		}
		if refusal := a.standing(r.TLS.VerifiedChains); refusal != nil {
			return nil, refusal
		}
		return &operator{Caller: holder}, nil
	}
	switch {
	case a.BearerToken != nil:
		return nil, loginNeeded(a.Certificate != nil)
	case a.Certificate != nil:
		return nil, certificateNeeded()
	case a.Local && c.proxied():
		return nil, behindProxy()
	case a.Local && fromHere(r):
		return &operator{Caller: &access.Caller{Name: "local", Proof: access.LocalOperator}}, nil
	case a.Local:
		return nil, notFromHere()
	}
	return nil, consoleOff()
}

// standing returns why what a handshake has verified does not count any more; nil
// if it does.
func (a *Access) standing(chains [][]*x509.Certificate) *problem {
	var authorities *x509.CertPool
	var revocations *access.Revocations
	if a.Authorities != nil {
		authorities = a.Authorities()
	}
	if a.Revocations != nil {
		revocations = a.Revocations()
	}
	if time.Now().After(access.End(chains)) {
		return endedCertificate()
	}
	ends, err := access.Standing(chains, authorities, revocations)
	switch {
	case errors.Is(err, access.ErrNoAuthority):
		return strangeCertificate()
	case err != nil:
		return revokedCertificate()
	case time.Now().After(ends):
		return endedCertificate()
	}
	return nil
}

// opens compares in constant time. An empty token opens nothing.
func opens(token, given broker.Secret) bool {
	return !token.IsEmpty() && token.Equal(given)
}

// fromHere reports whether a request was made on this machine, by a browser
// that meant this machine, and not passed on by a proxy: that the connection is
// local says nothing about who is in front of the proxy, and a name that an
// attacker's DNS has turned into 127.0.0.1 is the attacker's page. Some proxies do
// not tell, and put their own idea of our name into Host; those speak HTTP/1.0,
// unlike any browser.
func fromHere(r *http.Request) bool {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil || !from.Addr().Unmap().IsLoopback() || !isLoopbackHost(r.Host) || !r.ProtoAtLeast(1, 1) {
		return false
	}
	for name := range r.Header {
		if name == "Forwarded" || name == "Via" || name == "X-Real-Ip" || strings.HasPrefix(name, "X-Forwarded-") {
			return false
		}
	}
	return true
}

// proxied reports whether a proxy passes on what comes from elsewhere.
func (c *console) proxied() bool {
	u, err := url.Parse(c.URL)
	return c.URL != "" && (err != nil || !isLoopbackHost(u.Host))
}

// isLoopbackHost reports whether a Host header names this machine in a way that
// DNS has no part in.
func isLoopbackHost(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
	ip, err := netip.ParseAddr(host)
	return strings.EqualFold(host, "localhost") || err == nil && ip.IsLoopback()
}

// operators serves a page to operators only.
func (c *console) operators(next func(http.ResponseWriter, *http.Request, *operator)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		o, refusal := c.identify(r)
		if o == nil {
			c.Logger.Info("console refused", "method", r.Method, "path", r.URL.Path, "remote", r.RemoteAddr, "status", refusal.Status, "why", refusal.Title, "request_id", requestID(r))
			c.record(r, nil, "", false, "", callerUnknown)
			if refusal.Status == http.StatusUnauthorized {
				w.Header().Set("WWW-Authenticate", `Bearer realm="token broker console"`)
				if r.Method == http.MethodGet {
					refusal.Return = safeReturn(r.URL.Path)
				}
			}
			c.fail(w, r, nil, refusal)
			return
		}
		next(w, r, o)
	}
}

// crossOrigin refuses a form that another site has sent.
func (c *console) crossOrigin(w http.ResponseWriter, r *http.Request) {
	c.Logger.Warn("console refused", "method", r.Method, "path", r.URL.Path, "remote", r.RemoteAddr, "status", http.StatusForbidden, "why", "cross-origin request", "request_id", requestID(r))
	c.record(r, nil, "", false, "", crossOrigin)
	c.fail(w, r, nil, &problem{
		Status: http.StatusForbidden, Title: "Not from this console",
		Text:   "The request came from a page of another site, so nothing was done.",
		Advice: "Open the console itself and try again. Behind a proxy that changes the Host header, set admin.url to the console's address.",
	})
}

// A session is a cookie that any replica with the same bearer token accepts:
// when it ends, a random number, and a MAC over both with a key that is derived
// from the token. A new token ends all sessions.
const (
	sessionLength = 8 * time.Hour
	sessionBody   = 8 + 16
)

func newSession(token broker.Secret, now time.Time) string {
	body := make([]byte, sessionBody)
	binary.BigEndian.PutUint64(body, uint64(now.Add(sessionLength).Unix()))
	rand.Read(body[8:])
	return base64.RawURLEncoding.EncodeToString(append(body, sessionMAC(token, body)...))
}

func isSession(token broker.Secret, value string, now time.Time) bool {
	b, err := base64.RawURLEncoding.Strict().DecodeString(value)
	if err != nil || len(b) != sessionBody+sha256.Size || token.IsEmpty() {
		return false
	}
	body := b[:sessionBody]
	return hmac.Equal(b[sessionBody:], sessionMAC(token, body)) && now.Unix() < int64(binary.BigEndian.Uint64(body))
}

func sessionMAC(token broker.Secret, body []byte) []byte {
	key, err := hkdf.Key(sha256.New, []byte(token.Reveal()), nil, "token broker console session", sha256.Size)
	if err != nil {
		panic("console: deriving the session key: " + err.Error()) // the length is fine
	}
	m := hmac.New(sha256.New, key)
	m.Write(body)
	return m.Sum(nil)
}

// secure reports whether the browser reaches the console over TLS: its own, or
// that of the proxy at Options.URL.
func (c *console) secure(r *http.Request) bool {
	if r.TLS != nil {
		return true
	}
	u, err := url.Parse(c.URL)
	return err == nil && u.Scheme == "https" && strings.EqualFold(u.Host, r.Host)
}

// cookieName puts the prefix before a name that has browsers refuse the cookie
// from anyone but this host over TLS.
func (c *console) cookieName(r *http.Request, name string) string {
	if c.secure(r) {
		return "__Host-broker-" + name
	}
	return "broker-" + name
}

// setCookie sets a cookie, or deletes it when its age is negative. It is Lax
// because a browser comes back from a sign-in by a link of another site.
func (c *console) setCookie(w http.ResponseWriter, r *http.Request, name, value string, age time.Duration) {
	http.SetCookie(w, &http.Cookie{
		Name: c.cookieName(r, name), Value: value, Path: "/", MaxAge: int(age / time.Second),
		HttpOnly: true, Secure: c.secure(r), SameSite: http.SameSiteLaxMode,
	})
}

func (c *console) loginPage(w http.ResponseWriter, r *http.Request) {
	if c.Access.BearerToken == nil {
		o, refusal := c.identify(r)
		if o != nil {
			http.Redirect(w, r, "/", http.StatusSeeOther)
			return
		}
		c.fail(w, r, nil, refusal)
		return
	}
	p := loginNeeded(c.Access.Certificate != nil)
	p.Status, p.Return = http.StatusOK, safeReturn(r.URL.Query().Get("return"))
	c.fail(w, r, nil, p)
}

func (c *console) login(w http.ResponseWriter, r *http.Request) {
	if c.Access.BearerToken == nil {
		c.loginPage(w, r)
		return
	}
	to, token := safeReturn(r.PostFormValue("return")), c.Access.BearerToken()
	switch {
	case !c.logins.allow(time.Now()):
		w.Header().Set("Retry-After", "1")
		c.record(r, nil, "", false, "", string(broker.ReasonCallerThrottled))
		p := loginNeeded(c.Access.Certificate != nil)
		p.Status, p.Title, p.Text, p.Return = http.StatusTooManyRequests, "Too many attempts", "Too many people are logging in at this moment. Wait a second, then try again.", to
		c.fail(w, r, nil, p)
	case !opens(token, broker.NewSecret(r.PostFormValue("token"))):
		c.Logger.Warn("console login refused", "remote", r.RemoteAddr, "request_id", requestID(r))
		c.record(r, nil, "", false, "", callerUnknown)
		p := wrongToken()
		p.Return = to
		c.fail(w, r, nil, p)
	default:
		c.Logger.Info("console login", "operator", "bearer", "remote", r.RemoteAddr, "request_id", requestID(r))
		c.record(r, &operator{Caller: bearer()}, "", true, byToken, "ok")
		c.setCookie(w, r, "session", newSession(token, time.Now()), sessionLength)
		http.Redirect(w, r, to, http.StatusSeeOther)
	}
}

func (c *console) logout(w http.ResponseWriter, r *http.Request) {
	if o, _ := c.identify(r); o != nil {
		c.record(r, o, "", true, byToken, "ok")
	}
	c.setCookie(w, r, "session", "", -time.Second)
	http.Redirect(w, r, "/login", http.StatusSeeOther)
}

// safeReturn is the page to go back to after a login: one of ours, whatever was
// asked for.
func safeReturn(path string) string {
	if name, ok := strings.CutPrefix(path, "/profiles/"); ok && name != "" && strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789._-") == "" {
		return path
	}
	return "/"
}

// limiter allows five attempts at once, and then five a second, over all
// visitors.
type limiter struct {
	mu   sync.Mutex
	next time.Time // when all that was allowed is paid for
}

func (l *limiter) allow(now time.Time) bool {
	const each, most = time.Second / 5, 5
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.next.Before(now) {
		l.next = now
	}
	if l.next.Sub(now) > (most-1)*each {
		return false
	}
	l.next = l.next.Add(each)
	return true
}
