package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// What a platform leaves behind when it has not filled in a job's id is found
// before anything is asked: nobody listens at the default address here.
func TestJobMistakes(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		text string
	}{
		"dedicated to nobody":          {[]string{"token", "a", "--dedicated"}, "say which with --job ID"},
		"dedicated to nobody, refresh": {[]string{"refresh", "a", "--rejected", "9f86d081884c7d65", "--dedicated"}, "say which with --job ID"},
		"dedicated to nobody, revoke":  {[]string{"revoke", "a", "--dedicated"}, "say which with --job ID"},
		"a variable that is not set":   {[]string{"revoke", "a", "--job", ""}, "is the variable set that it comes from?"},
		"the same, for a token":        {[]string{"token", "a", "--job="}, "is the variable set that it comes from?"},
		"left by Kubernetes":           {[]string{"token", "a", "--job", "$(JOB_NAME)"}, "nothing has replaced"},
		"left by a shell":              {[]string{"token", "a", "--job", "nightly/${JOB}"}, "nothing has replaced"},
		"left by Argo, or Airflow":     {[]string{"revoke", "a", "--job", "{{workflow.uid}}"}, "nothing has replaced"},
		"no text":                      {[]string{"revoke", "a", "--job", "a\xff"}, "not valid UTF-8"},
		"another output":               {[]string{"revoke", "a", "--output", "xml"}, "use text or json"},
	} {
		got := command(t, append(c.args, "--address", "127.0.0.1:1")...)
		if got.status != exitUsage || !strings.Contains(got.stderr, c.text) || got.stdout != "" {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// revoker is a broker that answers RevokeToken as it is told, and notes what it
// was asked.
type revoker struct {
	pb.UnimplementedTokenBrokerServer
	asked    chan *pb.RevokeTokenRequest
	response *pb.RevokeTokenResponse
	err      error
}

func (r *revoker) RevokeToken(_ context.Context, request *pb.RevokeTokenRequest) (*pb.RevokeTokenResponse, error) {
	r.asked <- request
	return r.response, r.err
}

// Who names a job never revokes what others share, and learns how far it got.
func TestRevokeSaysWhoseTokenAndWhatHappened(t *testing.T) {
	confirmed := &pb.RevokeTokenResponse{Outcome: pb.RevocationOutcome_REVOCATION_OUTCOME_CONFIRMED, TokenId: "9f86d081884c7d65"}
	dropped := &pb.RevokeTokenResponse{Outcome: pb.RevocationOutcome_REVOCATION_OUTCOME_DROPPED, TokenId: "9f86d081884c7d65"}
	none := &pb.RevokeTokenResponse{Outcome: pb.RevocationOutcome_REVOCATION_OUTCOME_DROPPED}
	own := &pb.RevokeTokenRequest{Profile: "invoices", Job: &pb.Job{Id: "nightly/7", Dedicated: true}}
	everybodys := &pb.RevokeTokenRequest{Profile: "invoices"}
	for name, c := range map[string]struct {
		args     []string
		asked    *pb.RevokeTokenRequest
		response *pb.RevokeTokenResponse
		stdout   string
	}{
		"a job's, confirmed":      {[]string{"--job", "nightly/7"}, own, confirmed, "token 9f86d081884c7d65 of job nightly/7 of profile invoices: dropped here and revoked at the authorization server\n"},
		"a job's, said twice":     {[]string{"--job", "nightly/7", "--dedicated"}, own, confirmed, "token 9f86d081884c7d65 of job nightly/7 of profile invoices: dropped here and revoked at the authorization server\n"},
		"a job's, dropped only":   {[]string{"--job", "nightly/7"}, own, dropped, "token 9f86d081884c7d65 of job nightly/7 of profile invoices: dropped here; the authorization server did not confirm it, so whoever holds a copy can use it until it ends\n"},
		"a job's, without any":    {[]string{"--job", "nightly/7"}, own, none, "job nightly/7 of profile invoices has no token to revoke\n"},
		"everybody's, confirmed":  {nil, everybodys, confirmed, "token 9f86d081884c7d65 of profile invoices: dropped here and revoked at the authorization server\n"},
		"everybody's, without it": {nil, everybodys, none, "profile invoices has no token to revoke\n"},
		"of fewer scopes": {[]string{"--job", "nightly/7", "--scope", "openid", "--token", "9f86d081884c7d65"},
			&pb.RevokeTokenRequest{Profile: "invoices", Job: own.Job, Scopes: []string{"openid"}, TokenId: "9f86d081884c7d65"}, confirmed,
			"token 9f86d081884c7d65 of job nightly/7 of profile invoices: dropped here and revoked at the authorization server\n"},
		"for programs":              {[]string{"--job", "nightly/7", "--output", "json"}, own, dropped, `{"profile":"invoices","job":"nightly/7","token_id":"9f86d081884c7d65","outcome":"dropped"}`},
		"for programs, everybody's": {[]string{"--output", "json"}, everybodys, confirmed, `{"profile":"invoices","token_id":"9f86d081884c7d65","outcome":"confirmed"}`},
	} {
		r := &revoker{asked: make(chan *pb.RevokeTokenRequest, 10), response: c.response}
		got := command(t, append([]string{"revoke", "invoices", "--address", serveFake(t, r)}, c.args...)...)
		if c.stdout[0] == '{' {
			got.stdout = compact(t, got.stdout)
		}
		if got.status != 0 || got.stdout != c.stdout {
			t.Errorf("%s: %+v", name, got)
		}
		if asked := <-r.asked; !proto.Equal(asked, c.asked) {
			t.Errorf("%s: the broker was asked %v, want %v", name, asked, c.asked)
		}
	}
	r := &revoker{asked: make(chan *pb.RevokeTokenRequest, 10), err: status.Error(codes.FailedPrecondition, "the job has ended")}
	if got := command(t, "revoke", "invoices", "--job", "nightly/7", "--address", serveFake(t, r)); got.status != exitFailure || !strings.Contains(got.stderr, "the job has ended") {
		t.Errorf("refused: %+v", got)
	}
}

// serveFake serves a stand-in of the broker and returns its address.
func serveFake(t *testing.T, b pb.TokenBrokerServer) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	pb.RegisterTokenBrokerServer(server, b)
	go func() { _ = server.Serve(ln) }() // Stop ends it
	t.Cleanup(server.Stop)
	return ln.Addr().String()
}

// compact is JSON without the blanks between.
func compact(t *testing.T, text string) string {
	t.Helper()
	var out bytes.Buffer
	if err := json.Compact(&out, []byte(text)); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	return strings.TrimSpace(out.String())
}
