package console

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/audit"
	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Outcomes in the audit log that the broker has no reasons for.
const (
	callerUnknown    = "CALLER_UNKNOWN"
	callerDenied     = "CALLER_DENIED"
	crossOrigin      = "CROSS_ORIGIN"
	auditUnavailable = "AUDIT_UNAVAILABLE"
	anotherAccount   = "ANOTHER_ACCOUNT"
)

// byState decides in place of a rule of the policy: the state of a sign-in.
const byState = "state"

// byToken decides who has the console's token.
var byToken = access.Decision{Rule: access.ByToken}.By()

// requestIDHeader is honoured and returned.
const requestIDHeader = "X-Request-Id"

// visit is what is known of a request: its id, and the place that the audit log
// keeps for it.
type visit struct {
	id    string
	place audit.Place
}

type visitKey struct{}

func visitOf(r *http.Request) *visit {
	v, ok := r.Context().Value(visitKey{}).(*visit)
	if !ok {
		return &visit{} // every request of the handler has one
	}
	return v
}

func requestID(r *http.Request) string { return visitOf(r).id }

// visited gives a request the id that its sender has chosen, if it is harmless,
// or a new one, and returns it.
func (c *console) visited(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v := &visit{id: cmp.Or(audit.RequestID(r.Header[requestIDHeader]), audit.NewRequestID())}
		w.Header().Set(requestIDHeader, v.id)
		r = r.WithContext(context.WithValue(r.Context(), visitKey{}, v))
		defer c.Audit.Release(&v.place)
		defer c.recovered(w, r)
		next.ServeHTTP(w, r)
	})
}

// recovered answers for a handler that panics. The value may hold anything, so
// only its type is written.
func (c *console) recovered(w http.ResponseWriter, r *http.Request) {
	value := recover()
	if value == nil {
		return
	}
	c.Logger.Error("panic in a request", "method", c.method(r), "type", fmt.Sprintf("%T", value), "stack", string(debug.Stack()), "request_id", requestID(r))
	c.record(r, nil, "", false, "", "INTERNAL")
	http.Error(w, "The broker itself failed; its log has the place.", http.StatusInternalServerError)
}

// isProfileName is the rule that the configuration has for names of profiles, or
// wider.
func isProfileName(s string) bool {
	return len(s) <= 64 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-_.") == ""
}

// decision is what the policy says of the operator, nil being nobody, and the
// profile; without one it is nothing.
func (c *console) decision(o *operator, profile string) access.Decision {
	if o == nil || profile == "" {
		return access.Decision{Rule: access.NoRule}
	}
	return c.Access.Authorizer.Decide(o.Caller, access.Admin, profile, nil)
}

// record writes the audit log's line for a request.
func (c *console) record(r *http.Request, o *operator, profile string, allowed bool, rule, outcome string) {
	v := visitOf(r)
	if !isProfileName(profile) { // whatever it is, it is none
		profile = ""
	}
	e := audit.Event{
		Time: time.Now(), Door: "console", Method: c.method(r), Peer: address(r.RemoteAddr), Profile: profile,
		Allowed: allowed, Rule: rule, Outcome: outcome, RequestID: v.id,
	}
	if profile != "" {
		e.Operation = access.Admin.String()
	}
	if o != nil {
		e.Caller, e.Proof, e.Forwarder = o.Name, o.Proof.String(), o.Forwarder
	}
	c.Audit.Fill(&v.place, &e)
}

// method is the pattern of the page that a request is for: what a sender has put
// in its place is not repeated.
func (c *console) method(r *http.Request) string {
	if r.Pattern != "" {
		return r.Pattern
	}
	_, pattern := c.mux.Handler(r) // it was refused before it came there
	return cmp.Or(pattern, r.Method)
}

// address is one as net/http tells it.
type address string

func (a address) String() string { return string(a) }

// outcomeOf is the word for how an action ended.
func outcomeOf(err error) string {
	var e *broker.Error
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &e):
		return string(e.Reason)
	case errors.Is(err, context.DeadlineExceeded):
		return "DEADLINE_EXCEEDED"
	case errors.Is(err, context.Canceled):
		return "CANCELLED"
	}
	return "INTERNAL"
}

// reserve keeps a place in the audit log for what is about to be done, or
// answers that nothing can be done without.
func (c *console) reserve(w http.ResponseWriter, r *http.Request, o *operator, profile string) bool {
	place, err := c.Audit.Reserve()
	if err == nil {
		visitOf(r).place = place
		return true
	}
	d := c.decision(o, profile)
	c.record(r, o, profile, d.Allowed, d.By(), auditUnavailable)
	w.Header().Set("Retry-After", "1")
	c.fail(w, r, o, &problem{
		Status: http.StatusServiceUnavailable, Title: "Not done", Profile: profile,
		Text:   "The audit log cannot be written at this moment, and by its configuration the broker changes nothing meanwhile.",
		Advice: "Mend what the broker's log names, then try again.",
	})
	return false
}

// AuditLog collects how the audit log fares, at the time of each scrape.
func AuditLog(l *audit.Log) prometheus.Collector { return auditLog{l} }

type auditLog struct{ log *audit.Log }

var (
	auditEvents = prometheus.NewDesc("audit_events_total",
		"Events for the audit log, the lost ones among them.", nil, nil)
	auditLost = prometheus.NewDesc("audit_events_lost_total",
		"Events that the audit log has no line of, because it could not be written for too long.", nil, nil)
	auditBuffered = prometheus.NewDesc("audit_events_buffered",
		"Events that are not written yet.", nil, nil)
	auditWritable = prometheus.NewDesc("audit_writable",
		"1 if the last attempt to write to the audit log succeeded, 0 if it failed.", nil, nil)
)

func (auditLog) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{auditEvents, auditLost, auditBuffered, auditWritable} {
		ch <- d
	}
}

func (a auditLog) Collect(ch chan<- prometheus.Metric) {
	now := a.log.Stats()
	ch <- prometheus.MustNewConstMetric(auditEvents, prometheus.CounterValue, float64(now.Recorded))
	ch <- prometheus.MustNewConstMetric(auditLost, prometheus.CounterValue, float64(now.Lost))
	ch <- prometheus.MustNewConstMetric(auditBuffered, prometheus.GaugeValue, float64(now.Buffered))
	ch <- prometheus.MustNewConstMetric(auditWritable, prometheus.GaugeValue, boolean(now.Failure == nil))
}
