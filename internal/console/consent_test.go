package console_test

import (
	"context"
	"fmt"
	"net/url"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/console"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

// consenting is an authorization server at which a person has just consented.
type consenting struct{ broker.Issuer }

func (consenting) AuthorizationURL(_ context.Context, r broker.AuthorizationRequest) (string, error) {
	return "https://id.example.com/?state=" + url.QueryEscape(r.State), nil
}
func (consenting) CheckIssuer(context.Context, string) error { return nil }
func (consenting) RedirectURL() string                       { return "https://broker.example.com/callback" }
func (consenting) Exchange(context.Context, broker.CodeExchange) (*broker.Grant, error) {
	return &broker.Grant{AccessToken: broker.NewSecret("a"), TokenType: "Bearer", Lifetime: time.Hour, RefreshToken: broker.NewSecret("r")}, nil
}

func TestEndOfAConsentIsAMetric(t *testing.T) {
	b := broker.New(store.NewMemory(), broker.Options{})
	defer b.Close()
	b.Configure([]*broker.Profile{
		{Name: "letters", GrantType: broker.AuthorizationCode, RefreshTokens: true, Identity: "i", Issuer: consenting{}, ConsentLifetime: 30 * 24 * time.Hour},
		{Name: "invoices", GrantType: broker.AuthorizationCode, RefreshTokens: true, Identity: "j", Issuer: consenting{}, ConsentLifetime: 30 * 24 * time.Hour},
	})
	registry := prometheus.NewRegistry()
	registry.MustRegister(console.Profiles(b))
	s, err := b.StartAuthorization(t.Context(), "letters", broker.Secret{})
	if err != nil {
		t.Fatal(err)
	}
	before := time.Now()
	if _, err := b.CompleteAuthorization(t.Context(), broker.Callback{State: s.State, Code: broker.NewSecret("c")}); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, f := range families {
		if f.GetName() != "consent_end_timestamp_seconds" {
			continue
		}
		for _, m := range f.GetMetric() {
			ends := time.Unix(int64(m.GetGauge().GetValue()), 0)
			found = append(found, fmt.Sprint(m.GetLabel()[0].GetValue(), " in ", ends.Sub(before).Round(time.Minute)))
		}
	}
	if fmt.Sprint(found) != "[letters in 720h0m0s]" {
		t.Errorf("found %v", found)
	}
}
