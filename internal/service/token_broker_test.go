package service_test

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/vantage"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

func TestTenThousandCallsOnAColdBrokerMakeOneRequest(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.fault(sandbox.Fault{Delay: 500 * time.Millisecond, Process: true})
	var clients []pb.TokenBrokerClient
	for range 20 {
		clients = append(clients, r.tokens())
	}
	var wg sync.WaitGroup
	ids := make([]string, 10_000)
	ctx := within(t, time.Minute)
	for i := range ids {
		wg.Go(func() {
			response, err := clients[i%len(clients)].IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"}, grpc.WaitForReady(true))
			if err != nil {
				t.Errorf("call %d: %v", i, err)
				return
			}
			ids[i] = response.GetToken().GetId()
		})
	}
	wg.Wait()
	r.wantRequests(1)
	for i, id := range ids {
		if id != ids[0] {
			t.Fatalf("call %d got token %q, call 0 got %q", i, id, ids[0])
		}
	}
}

func TestTokenIsWhatTheSchemaPromises(t *testing.T) {
	r := newRig(t, rigOptions{})
	before := time.Now()
	response, err := r.tokens().IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
	if err != nil {
		t.Fatal(err)
	}
	token := response.GetToken()
	if response.GetSource() != pb.Source_SOURCE_ENDPOINT || token.GetTokenType() != "Bearer" {
		t.Errorf("source %v, type %q", response.GetSource(), token.GetTokenType())
	}
	if want := broker.NewSecret(token.GetAccessToken()).ID(); token.GetId() != want {
		t.Errorf("id %s, want %s", token.GetId(), want)
	}
	if got := strings.Join(token.GetScopes(), " "); got != "openid permissions global.wildcard" {
		t.Errorf("scopes %q", got)
	}
	issued, refresh, expires := token.GetIssueTime().AsTime(), token.GetRefreshTime().AsTime(), token.GetExpireTime().AsTime()
	if issued.Before(before.Add(-time.Second)) || issued.After(time.Now()) {
		t.Errorf("issued at %v", issued)
	}
	if life := expires.Sub(issued).Round(time.Second); life != 30*24*time.Hour {
		t.Errorf("lives %v, the stand-in said 30 days", life)
	}
	if !refresh.After(issued) || refresh.After(issued.Add(24*time.Hour)) {
		t.Errorf("refresh time %v, want within a day", refresh)
	}
	// The stand-in's API takes it.
	q, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, r.url+"/api/publicapi/v1/skills", nil)
	q.Header.Set("Authorization", token.GetTokenType()+" "+token.GetAccessToken())
	answer, err := http.DefaultClient.Do(q)
	if err != nil || answer.StatusCode != http.StatusOK {
		t.Errorf("the API answered %v, %v", answer, err)
	} else {
		answer.Body.Close()
	}
}

func TestCallerThatGivesUpCancelsNothing(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.fault(sandbox.Fault{Delay: time.Second, Process: true})
	client := r.tokens()

	impatient, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	disconnects, disconnect := context.WithCancel(t.Context())
	go func() {
		defer disconnect()
		eventually(t, "the request arrives", func() bool { return r.vantage.Calls().InFlight == 1 })
	}()
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := client.IssueToken(impatient, &pb.IssueTokenRequest{Profile: "invoices"}); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("the impatient caller got %v", err)
		}
	})
	wg.Go(func() {
		if _, err := client.IssueToken(disconnects, &pb.IssueTokenRequest{Profile: "invoices"}); status.Code(err) != codes.Canceled {
			t.Errorf("the caller that disconnected got %v", err)
		}
	})
	wg.Go(func() {
		if _, err := client.IssueToken(within(t, 20*time.Second), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
			t.Errorf("the patient caller got %v", err)
		}
	})
	wg.Wait()
	r.wantRequests(1)
}

func TestTokenOfALoneCallerThatGivesUpIsSaved(t *testing.T) {
	r := newRig(t, rigOptions{})
	r.fault(sandbox.Fault{Delay: 500 * time.Millisecond, Process: true})
	impatient, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := r.tokens().IssueToken(impatient, &pb.IssueTokenRequest{Profile: "invoices"}); status.Code(err) != codes.DeadlineExceeded {
		t.Fatalf("got %v", err)
	}
	admin := r.admin()
	eventually(t, "the token is saved", func() bool {
		p, err := admin.GetProfile(t.Context(), &pb.GetProfileRequest{Profile: "invoices"})
		return err == nil && p.GetProfile().GetState() == pb.State_STATE_READY
	})
	response, err := r.tokens().IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
	if err != nil || response.GetSource() != pb.Source_SOURCE_MEMORY {
		t.Errorf("got %v, %v; want a token from memory", response.GetSource(), err)
	}
	r.wantRequests(1)
}

func TestWrongSecretIsTriedOnce(t *testing.T) {
	r := newRig(t, rigOptions{change: func(c *vantage.Config) {
		c.ClientSecrets = []broker.Secret{broker.NewSecret("mistyped")}
	}})
	client := r.tokens()
	var wg sync.WaitGroup
	for range 1000 {
		wg.Go(func() {
			_, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
			d := wantFailure(t, err, codes.FailedPrecondition, "CREDENTIALS_REJECTED", "invoices")
			if d.info.Metadata["oauth_error"] != "invalid_client" || !strings.Contains(d.text, "client_secret") || !strings.Contains(d.text, "broker reset invoices") {
				t.Errorf("the message does not say what to do: %s", d.text)
			}
			if d.retry != nil {
				t.Error("told to retry, which would not help")
			}
		})
	}
	wg.Wait()
	r.wantRequests(1)

	p, err := r.admin().GetProfile(t.Context(), &pb.GetProfileRequest{Profile: "invoices"})
	if err != nil {
		t.Fatal(err)
	}
	e := p.GetProfile().GetLastError()
	if p.GetProfile().GetState() != pb.State_STATE_CREDENTIALS_REJECTED || e.GetReason() != pb.ErrorReason_ERROR_REASON_CREDENTIALS_REJECTED ||
		e.GetOauthError() != "invalid_client" || e.GetAttempts() != 1 || e.GetErrorTime() == nil || e.GetNextAttemptTime() == nil {
		t.Errorf("profile %v", p)
	}

	// A reset tries once more, a new secret at once.
	if _, err := r.admin().ResetProfile(t.Context(), &pb.ResetProfileRequest{Profile: "invoices"}); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); err == nil {
			t.Fatal("got a token")
		}
	}
	r.wantRequests(2)
	r.configure(nil)
	if _, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Fatal(err)
	}
	r.wantRequests(3)
}

func TestRefreshToken(t *testing.T) {
	r := newRig(t, rigOptions{})
	client := r.tokens()
	first, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
	if err != nil {
		t.Fatal(err)
	}
	// A token that nobody knows is answered with the current one.
	other, err := client.RefreshToken(t.Context(), &pb.RefreshTokenRequest{Profile: "invoices", RejectedTokenId: "0123456789abcdef"})
	if err != nil || other.GetToken().GetId() != first.GetToken().GetId() || other.GetSource() != pb.Source_SOURCE_MEMORY {
		t.Errorf("got %v, %v", other.GetSource(), err)
	}
	// The current one was obtained a moment ago.
	_, err = client.RefreshToken(t.Context(), &pb.RefreshTokenRequest{Profile: "invoices", RejectedTokenId: first.GetToken().GetId()})
	d := wantFailure(t, err, codes.ResourceExhausted, "REFRESH_TOO_SOON", "invoices")
	if d.retry.GetRetryDelay().AsDuration() <= 0 {
		t.Error("not told when to retry")
	}
	r.wantRequests(1)
}

func TestMinimumLifetimeThatNoTokenHas(t *testing.T) {
	r := newRig(t, rigOptions{})
	for range 3 {
		_, err := r.tokens().IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices", MinLifetime: durationpb.New(31 * 24 * time.Hour)})
		wantFailure(t, err, codes.FailedPrecondition, "LIFETIME_UNAVAILABLE", "invoices")
	}
	r.wantRequests(1)
}

func TestEndpointFailures(t *testing.T) {
	for name, c := range map[string]struct {
		fault  sandbox.Fault
		code   codes.Code
		reason string
		least  time.Duration
	}{
		"503":        {sandbox.Fault{Status: 503}, codes.Unavailable, "ENDPOINT_UNAVAILABLE", 3 * time.Second},
		"throttled":  {sandbox.Fault{Status: 429, Headers: map[string]string{"Retry-After": "120"}}, codes.ResourceExhausted, "ENDPOINT_THROTTLED", 119 * time.Second},
		"html":       {sandbox.Fault{Status: 200, Body: "<html>sign in</html>", Headers: map[string]string{"Content-Type": "text/html"}}, codes.Unavailable, "ENDPOINT_UNAVAILABLE", 3 * time.Second},
		"cut":        {sandbox.Fault{Cut: sandbox.CutBefore}, codes.Unavailable, "ENDPOINT_UNAVAILABLE", 3 * time.Second},
		"bad scopes": {sandbox.Fault{Status: 400, Body: `{"error":"invalid_scope"}`}, codes.FailedPrecondition, "CREDENTIALS_REJECTED", 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, rigOptions{})
			c.fault.Times = -1
			r.fault(c.fault)
			client := r.tokens()
			for range 3 {
				_, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
				d := wantFailure(t, err, c.code, c.reason, "invoices")
				if got := d.retry.GetRetryDelay().AsDuration(); got < c.least || c.least == 0 && got != 0 {
					t.Errorf("told to retry in %v, want at least %v", got, c.least)
				}
			}
			r.wantRequests(1)
		})
	}
}

func TestOneProfilesTroubleIsNotAnothers(t *testing.T) {
	r := newRig(t, rigOptions{change: func(c *vantage.Config) { c.Timeout = time.Minute }})
	client := r.tokens()
	if _, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Fatal(err)
	}
	r.fault(sandbox.Fault{Times: -1, Hang: true})
	stuck := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		_, err := client.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices", Scopes: []string{"openid"}})
		stuck <- err
	}()
	eventually(t, "a request hangs", func() bool { return r.vantage.Calls().InFlight == 1 })
	for range 1000 {
		response, err := client.IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices"})
		if err != nil || response.GetSource() != pb.Source_SOURCE_MEMORY {
			t.Fatalf("beside a hanging request: %v, %v", response.GetSource(), err)
		}
	}
	cancel()
	if err := <-stuck; status.Code(err) != codes.Canceled {
		t.Errorf("the stuck caller got %v", err)
	}
}
