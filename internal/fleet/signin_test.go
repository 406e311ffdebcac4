package fleet_test

import (
	"context"
	"net/http"
	"net/url"
	"strings"
	"time"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// signIn has a person sign in for the operator: it begins at one replica, and the
// browser comes back to another.
func (f *harness) signIn(begins, ends *replica) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	begun, err := pb.NewProfileAdminClient(begins.conn).StartAuthorization(ctx, &pb.StartAuthorizationRequest{Profile: operator})
	if err != nil {
		f.t.Fatalf("starting a sign-in: %v\n%s", err, begins.tail())
	}
	back := f.allowAccess(ctx, begun.GetAuthorizationUrl())
	_, err = pb.NewProfileAdminClient(ends.conn).CompleteAuthorization(ctx, &pb.CompleteAuthorizationRequest{
		State: back.Get("state"), Code: back.Get("code"), Iss: back.Get("iss"),
	})
	if err != nil {
		f.t.Fatalf("completing a sign-in: %v\n%s", err, ends.tail())
	}
}

// allowAccess fills in the sandbox's page, and returns what the browser brings
// back.
func (f *harness) allowAccess(ctx context.Context, authorizationURL string) url.Values {
	f.t.Helper()
	page, err := url.Parse(authorizationURL)
	if err != nil {
		f.t.Fatal(err)
	}
	form := url.Values{"username": {operatorName}, "password": {operatorPassword}, "action": {"allow"}}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+f.endpoint.addresses[0]+page.RequestURI(), strings.NewReader(form.Encode()))
	if err != nil {
		f.t.Fatal(err)
	}
	request.Host = page.Host
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	transport := &http.Transport{DisableKeepAlives: true}
	response, err := transport.RoundTrip(request)
	if err != nil {
		f.t.Fatalf("signing in: %v", err)
	}
	response.Body.Close()
	to, err := response.Location()
	if err != nil {
		f.t.Fatalf("signing in: status %d and no redirect", response.StatusCode)
	}
	return to.Query()
}
