package console

import (
	"strings"
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

// Profiles collects how the profiles fare, as this replica knows at the time of
// each scrape.
func Profiles(b *broker.Broker) prometheus.Collector { return profiles{b} }

type profiles struct{ broker *broker.Broker }

var (
	served = prometheus.NewDesc("tokens_served_total",
		"Tokens handed out by this replica, by where they came from.", []string{"profile", "source"}, nil)
	servedJobs = prometheus.NewDesc("job_tokens_served_total",
		"Tokens handed out by this replica to callers that named a job, by whether the token was the one that all share (named) or the job's own (dedicated).", []string{"profile", "job"}, nil)
	dedicatedTokens = prometheus.NewDesc("dedicated_tokens",
		"Jobs that have, or wait for, a token of their own on this replica.", []string{"profile"}, nil)
	expireTime = prometheus.NewDesc("token_expire_time_seconds",
		"When the current token of the profile ends, in Unix time. Absent if there is none.", []string{"profile"}, nil)
	profileState = prometheus.NewDesc("profile_state",
		"1 for the state that the profile is in, 0 for the others.", []string{"profile", "state"}, nil)
	failedAttempts = prometheus.NewDesc("profile_failed_attempts",
		"Attempts in a row that failed.", []string{"profile"}, nil)
	consentEnd = prometheus.NewDesc("consent_end_timestamp_seconds",
		"When the consent of the profile ends and a person must sign in again, in Unix time. Absent if that is not known.", []string{"profile"}, nil)
	unsavedGrants = prometheus.NewDesc("unsaved_grants",
		"Grants that only this process has, because the store has not taken them in yet.", nil, nil)
)

var states = map[broker.State]string{
	broker.Ready: "ready", broker.Idle: "idle", broker.BackingOff: "backing_off",
	broker.CredentialsRejected: "credentials_rejected", broker.AuthorizationRequired: "authorization_required",
}

func (p profiles) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{served, servedJobs, dedicatedTokens, expireTime, consentEnd, profileState, failedAttempts, unsavedGrants} {
		ch <- d
	}
}

func (p profiles) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(unsavedGrants, float64(p.broker.Unsaved()))
	for _, name := range p.broker.Profiles() {
		s, err := p.broker.Glance(name)
		if err != nil { // gone since
			continue
		}
		for _, source := range broker.Sources() {
			ch <- prometheus.MustNewConstMetric(served, prometheus.CounterValue, float64(s.Served[source]), name, source.String())
		}
		for job, n := range map[string]uint64{"named": s.Named, "dedicated": s.Dedicated} {
			ch <- prometheus.MustNewConstMetric(servedJobs, prometheus.CounterValue, float64(n), name, job)
		}
		gauge(dedicatedTokens, float64(s.DedicatedTokens), name)
		if s.TokenID != "" {
			gauge(expireTime, float64(s.ExpireTime.Unix()), name)
		}
		if !s.ConsentEnd.IsZero() {
			gauge(consentEnd, float64(s.ConsentEnd.Unix()), name)
		}
		for state, label := range states {
			gauge(profileState, boolean(s.State == state), name, label)
		}
		attempts := 0
		if s.LastError != nil {
			attempts = s.LastError.Attempts
		}
		gauge(failedAttempts, float64(attempts), name)
	}
}

// StoreStats is what a shared store tells of itself. Counts are since the
// process started.
type StoreStats struct {
	// Reachable says whether the last operation got an answer.
	Reachable bool
	// Operations by name and outcome, both from a fixed set.
	Operations map[StoreOperation]int64
	// Resubscriptions to the store's change events.
	Resubscriptions int64
	// Restored records: the store had lost them, or an older state of them.
	Restored int64
	// Unreadable values: sealed with a key that this process does not have, or
	// written by a newer version.
	Unreadable int64
	// Corrupt values: sealed with a known key, and not what was sealed.
	Corrupt int64
	// ClockOffset is how far the store's clock is ahead of this machine's.
	ClockOffset time.Duration
}

// StoreOperation is what StoreStats counts by.
type StoreOperation struct{ Name, Outcome string }

// Store collects how a shared store fares, at the time of each scrape.
func Store(stats func() StoreStats) prometheus.Collector { return sharedStore{stats} }

type sharedStore struct{ stats func() StoreStats }

var (
	storeReachable = prometheus.NewDesc("store_reachable",
		"1 if the store answers this replica, 0 if it does not.", nil, nil)
	storeOperations = prometheus.NewDesc("store_operations_total",
		"Operations of this replica on the store, by outcome.", []string{"operation", "outcome"}, nil)
	storeResubscriptions = prometheus.NewDesc("store_resubscriptions_total",
		"How often the subscription to changes was made anew, because it was lost or had gone silent.", nil, nil)
	storeRestored = prometheus.NewDesc("store_restored_total",
		"Records that this replica has put back into a store that had lost them.", nil, nil)
	storeUnreadable = prometheus.NewDesc("store_unreadable_total",
		"Sealed values that this replica could not read: it lacks the key, or a newer version wrote them.", nil, nil)
	storeCorrupt = prometheus.NewDesc("store_corrupt_total",
		"Sealed values that were damaged, or moved to another place.", nil, nil)
	storeClockOffset = prometheus.NewDesc("store_clock_offset_seconds",
		"How far the store's clock is ahead of this machine's.", nil, nil)
)

func (s sharedStore) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		storeReachable, storeOperations, storeResubscriptions, storeRestored, storeUnreadable, storeCorrupt, storeClockOffset,
	} {
		ch <- d
	}
}

func (s sharedStore) Collect(ch chan<- prometheus.Metric) {
	now := s.stats()
	gauge := func(d *prometheus.Desc, v float64) { ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v) }
	count := func(d *prometheus.Desc, v int64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	gauge(storeReachable, boolean(now.Reachable))
	for o, n := range now.Operations {
		count(storeOperations, n, o.Name, o.Outcome)
	}
	count(storeResubscriptions, now.Resubscriptions)
	count(storeRestored, now.Restored)
	count(storeUnreadable, now.Unreadable)
	count(storeCorrupt, now.Corrupt)
	gauge(storeClockOffset, now.ClockOffset.Seconds())
}

// Ends is when what the handshakes need ends.
type Ends struct {
	// Certificates by names for people, which come from the configuration.
	Certificates map[string]time.Time
	// Lists of revoked certificates, and when the next one is due.
	Lists map[RevocationList]time.Time
}

// RevocationList is what Ends has revocation lists by.
type RevocationList struct {
	// Door that asks it: "server" or "admin".
	Door string
	// Issuer is the authority's name.
	Issuer string
}

// Expiry collects when certificates and revocation lists end, at the time of each
// scrape.
func Expiry(ends func() Ends) prometheus.Collector { return expiry{ends} }

type expiry struct{ ends func() Ends }

var (
	certificateEnd = prometheus.NewDesc("certificate_expire_time_seconds",
		"When the certificates in force end, the first of each file, in Unix time.", []string{"certificate"}, nil)
	nextUpdate = prometheus.NewDesc("crl_next_update_time_seconds",
		"When the certificate revocation list in force should have been replaced by a newer one, in Unix time.", []string{"door", "issuer"}, nil)
)

func (e expiry) Describe(ch chan<- *prometheus.Desc) {
	ch <- certificateEnd
	ch <- nextUpdate
}

func (e expiry) Collect(ch chan<- prometheus.Metric) {
	now := e.ends()
	for name, end := range now.Certificates {
		ch <- prometheus.MustNewConstMetric(certificateEnd, prometheus.GaugeValue, float64(end.Unix()), name)
	}
	for list, due := range now.Lists {
		ch <- prometheus.MustNewConstMetric(nextUpdate, prometheus.GaugeValue, float64(due.Unix()), list.Door, strings.ToValidUTF8(list.Issuer, "?"))
	}
}

func boolean(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
