package console

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

// Metrics of token requests and reloads. What they are labelled with comes from
// the configuration and from this code, never from a caller.
type Metrics struct {
	requests  *prometheus.CounterVec
	durations *prometheus.HistogramVec
	reloads   *prometheus.CounterVec
	loaded    prometheus.Gauge
}

// NewMetrics registers the metrics of this process with r, which puts the
// prefix token_broker_ before their names.
func NewMetrics(r prometheus.Registerer, version string) *Metrics {
	m := &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "token_requests_total",
			Help: "Requests made to token endpoints by this replica, by outcome.",
		}, []string{"profile", "outcome"}),
		durations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "token_request_duration_seconds",
			Help:    "How long token endpoints took to answer this replica.",
			Buckets: []float64{.025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, []string{"profile"}),
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "config_reloads_total",
			Help: "Attempts to take over a changed configuration, by result.",
		}, []string{"result"}),
		loaded: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "config_load_time_seconds",
			Help: "When the configuration in force was loaded, in Unix time.",
		}),
	}
	build := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "build_info", Help: "Always 1; the label tells the version.",
		ConstLabels: prometheus.Labels{"version": version},
	})
	build.Set(1)
	r.MustRegister(m.requests, m.durations, m.reloads, m.loaded, build)
	for _, result := range []string{"success", "failure"} {
		m.reloads.WithLabelValues(result)
	}
	return m
}

// Observe counts a token request.
func (m *Metrics) Observe(a broker.Attempt) {
	m.requests.WithLabelValues(a.Profile, a.Outcome).Inc()
	m.durations.WithLabelValues(a.Profile).Observe(a.Duration.Seconds())
}

// Loaded notes that a configuration came into force.
func (m *Metrics) Loaded() { m.loaded.SetToCurrentTime() }

// Reloaded notes how a reload ended.
func (m *Metrics) Reloaded(ok bool) {
	result := "failure"
	if ok {
		result = "success"
	}
	m.reloads.WithLabelValues(result).Inc()
}

// Profiles collects how the profiles fare, at the time of each scrape.
func Profiles(b *broker.Broker) prometheus.Collector { return profiles{b} }

type profiles struct{ broker *broker.Broker }

var (
	served = prometheus.NewDesc("tokens_served_total",
		"Tokens handed out by this replica, by where they came from.", []string{"profile", "source"}, nil)
	expireTime = prometheus.NewDesc("token_expire_time_seconds",
		"When the current token of the profile ends, in Unix time. Absent if there is none.", []string{"profile"}, nil)
	profileState = prometheus.NewDesc("profile_state",
		"1 for the state that the profile is in, 0 for the others.", []string{"profile", "state"}, nil)
	failedAttempts = prometheus.NewDesc("profile_failed_attempts",
		"Attempts in a row that failed.", []string{"profile"}, nil)
)

var sources = map[broker.Source]string{
	broker.FromMemory: "memory", broker.FromStore: "store", broker.FromEndpoint: "endpoint",
}

var states = map[broker.State]string{
	broker.Ready: "ready", broker.Idle: "idle", broker.BackingOff: "backing_off",
	broker.CredentialsRejected: "credentials_rejected", broker.AuthorizationRequired: "authorization_required",
}

func (p profiles) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{served, expireTime, profileState, failedAttempts} {
		ch <- d
	}
}

func (p profiles) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	for _, name := range p.broker.Profiles() {
		s, err := p.broker.Status(ctx, name)
		if err != nil { // gone since, or the store is out of reach: other metrics tell
			continue
		}
		for source, label := range sources {
			ch <- prometheus.MustNewConstMetric(served, prometheus.CounterValue, float64(s.Served[source]), name, label)
		}
		if s.TokenID != "" {
			gauge(expireTime, float64(s.ExpireTime.Unix()), name)
		}
		for state, label := range states {
			v := 0.0
			if s.State == state {
				v = 1
			}
			gauge(profileState, v, name, label)
		}
		attempts := 0
		if s.LastError != nil {
			attempts = s.LastError.Attempts
		}
		gauge(failedAttempts, float64(attempts), name)
	}
}
