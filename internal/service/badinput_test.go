package service_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/tokenbroker/tokenbroker/internal/access"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// raw sends bytes as they are, and reads none.
type raw struct{}

func (raw) Name() string { return "proto" }
func (raw) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}
func (raw) Unmarshal(mem.BufferSlice, any) error { return nil }

var _ encoding.CodecV2 = raw{}

func sendRaw(ctx context.Context, conn *grpc.ClientConn, method string, b []byte) error {
	return conn.Invoke(ctx, method, b, new([]byte), grpc.ForceCodecV2(raw{}))
}

func TestBadInput(t *testing.T) {
	r := newRig(t, rigOptions{})
	conn := r.dial(nil)
	tokens, admin := pb.NewTokenBrokerClient(conn), pb.NewProfileAdminClient(conn)
	ctx := t.Context()
	issue := func(q *pb.IssueTokenRequest) error { _, err := tokens.IssueToken(ctx, q); return err }
	refresh := func(q *pb.RefreshTokenRequest) error { _, err := tokens.RefreshToken(ctx, q); return err }
	text := func(field protowire.Number, s string) []byte {
		return protowire.AppendString(protowire.AppendTag(nil, field, protowire.BytesType), s)
	}
	large := strings.Repeat("a", 70<<10)

	for name, c := range map[string]struct {
		err    error
		reason string
		field  string
	}{
		"no profile":                   {issue(&pb.IssueTokenRequest{}), "INVALID_REQUEST", "profile"},
		"a profile name with a slash":  {issue(&pb.IssueTokenRequest{Profile: "a/b"}), "INVALID_REQUEST", "profile"},
		"a request of 300 KiB":         {issue(&pb.IssueTokenRequest{Profile: large}), "INVALID_REQUEST", ""},
		"an unknown scope":             {issue(&pb.IssueTokenRequest{Profile: "invoices", Scopes: []string{"everything"}}), "INVALID_REQUEST", "scopes"},
		"a scope with a space":         {issue(&pb.IssueTokenRequest{Profile: "invoices", Scopes: []string{"openid permissions"}}), "INVALID_REQUEST", "scopes[0]"},
		"a scope twice":                {issue(&pb.IssueTokenRequest{Profile: "invoices", Scopes: []string{"openid", "openid"}}), "INVALID_REQUEST", "scopes"},
		"too many scopes":              {issue(&pb.IssueTokenRequest{Profile: "invoices", Scopes: many(101)}), "INVALID_REQUEST", "scopes"},
		"a negative duration":          {issue(&pb.IssueTokenRequest{Profile: "invoices", MinLifetime: durationpb.New(-time.Second)}), "INVALID_REQUEST", "min_lifetime"},
		"an overflowing duration":      {issue(&pb.IssueTokenRequest{Profile: "invoices", MinLifetime: &durationpb.Duration{Seconds: 1 << 62}}), "INVALID_REQUEST", "min_lifetime"},
		"a duration of mixed signs":    {issue(&pb.IssueTokenRequest{Profile: "invoices", MinLifetime: &durationpb.Duration{Seconds: 1, Nanos: -5}}), "INVALID_REQUEST", "min_lifetime"},
		"a dedicated job without id":   {issue(&pb.IssueTokenRequest{Profile: "invoices", Job: &pb.Job{Dedicated: true}}), "INVALID_REQUEST", "job"},
		"a job id with a line break":   {issue(&pb.IssueTokenRequest{Profile: "invoices", Job: &pb.Job{Id: "a\nb"}}), "INVALID_REQUEST", "job.id"},
		"no rejected token":            {refresh(&pb.RefreshTokenRequest{Profile: "invoices"}), "INVALID_REQUEST", "rejected_token_id"},
		"a rejected token, not its id": {refresh(&pb.RefreshTokenRequest{Profile: "invoices", RejectedTokenId: "eyJhbGciOiJSUzI1NiJ9"}), "INVALID_REQUEST", "rejected_token_id"},
		"a page of -1":                 {second(admin.ListProfiles(ctx, &pb.ListProfilesRequest{PageSize: -1})), "INVALID_REQUEST", "page_size"},
		"invalid UTF-8":                {sendRaw(ctx, conn, pb.TokenBroker_IssueToken_FullMethodName, text(1, "invo\xffices")), "INVALID_REQUEST", ""},
		"a message that is cut short":  {sendRaw(ctx, conn, pb.TokenBroker_IssueToken_FullMethodName, text(1, "invoices")[:4]), "INVALID_REQUEST", ""},
		"no message at all":            {sendRaw(ctx, conn, pb.ProfileAdmin_GetProfile_FullMethodName, []byte("\xff\xff\xff")), "INVALID_REQUEST", ""},
	} {
		t.Run(name, func(t *testing.T) {
			d := detailsOf(c.err)
			if d.code != codes.InvalidArgument || d.info.Reason != c.reason || d.info.Domain != "tokenbroker.v1" || d.info.Metadata["request_id"] == "" {
				t.Errorf("got %v %v: %.200s", d.code, d.info, d.text)
			}
			if len(d.fields) != 1 || d.fields[0] != c.field {
				t.Errorf("fields %q, want %q", d.fields, c.field)
			}
			if len(d.text) > 1000 {
				t.Errorf("a text of %d characters", len(d.text))
			}
		})
	}

	_, err := tokens.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "nothing"})
	wantFailure(t, err, codes.PermissionDenied, "CALLER_DENIED", "nothing")
	if d := detailsOf(issue(&pb.IssueTokenRequest{Profile: strings.Repeat("a", 5<<20)})); d.code != codes.ResourceExhausted {
		t.Errorf("a request of 5 MB: %v", d.code)
	}
	r.wantRequests(0)
	if _, err := tokens.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"}); err != nil {
		t.Errorf("after all that: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

func many(n int) []string {
	s := make([]string, n)
	for i := range s {
		s[i] = fmt.Sprintf("scope-%d", i)
	}
	return s
}

func TestRequestIDIsTheCallersIfItIsHarmless(t *testing.T) {
	r := newRig(t, rigOptions{})
	client := r.tokens()
	for sent, kept := range map[string]bool{"job-42.7": true, strings.Repeat("x", 65): false, "a b": false, "<script>": false} {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "x-request-id", sent)
		who, err := client.WhoAmI(ctx, &pb.WhoAmIRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if (who.GetRequestId() == sent) != kept || who.GetRequestId() == "" {
			t.Errorf("sent %q, got %q", sent, who.GetRequestId())
		}
	}
}

func TestListProfilesInPages(t *testing.T) {
	names := many(25)
	r := newRig(t, rigOptions{more: names})
	admin := r.admin()
	var seen []string
	for token, pages := "", 0; ; pages++ {
		page, err := admin.ListProfiles(t.Context(), &pb.ListProfilesRequest{PageSize: 10, PageToken: token})
		if err != nil || pages > 3 {
			t.Fatalf("page %d: %v", pages, err)
		}
		for _, p := range page.GetProfiles() {
			seen = append(seen, p.GetName())
			if p.GetState() != pb.State_STATE_IDLE || p.GetProvider() != pb.Provider_PROVIDER_VANTAGE ||
				p.GetGrantType() != pb.GrantType_GRANT_TYPE_CLIENT_CREDENTIALS || p.GetStateText() == "" || p.GetLastError() != nil {
				t.Errorf("profile %v", p)
			}
		}
		if token = page.GetNextPageToken(); token == "" {
			break
		}
	}
	if len(seen) != 26 || seen[0] != "invoices" {
		t.Errorf("saw %d profiles: %v", len(seen), seen)
	}
	r.wantRequests(0)
}

// FuzzRequestPath sends arbitrary bytes as requests of every method: a typed
// answer or a valid one, and the server lives on.
func FuzzRequestPath(f *testing.F) {
	methods := []string{
		pb.TokenBroker_IssueToken_FullMethodName, pb.TokenBroker_RefreshToken_FullMethodName, pb.TokenBroker_WhoAmI_FullMethodName,
		pb.ProfileAdmin_ListProfiles_FullMethodName, pb.ProfileAdmin_GetProfile_FullMethodName, pb.ProfileAdmin_ResetProfile_FullMethodName,
		pb.ProfileAdmin_CreateClient_FullMethodName,
	}
	for i := range methods {
		f.Add(uint8(i), []byte{})
	}
	for _, q := range []*pb.IssueTokenRequest{
		{Profile: "invoices"}, {Profile: "invoices", Scopes: []string{"openid"}}, {Profile: "x", MinLifetime: durationpb.New(time.Hour), Job: &pb.Job{Id: "j"}},
	} {
		b, err := proto.Marshal(q)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(uint8(0), b)
		f.Add(uint8(1), append(b, "\x2a\x100123456789abcdef"...))
	}
	var once sync.Once
	var conn *grpc.ClientConn
	var r *rig
	f.Fuzz(func(t *testing.T, method uint8, request []byte) {
		once.Do(func() {
			r = newRig(&testing.T{}, rigOptions{})
			conn = r.dial(nil)
		})
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		err := sendRaw(ctx, conn, methods[int(method)%len(methods)], request)
		d := detailsOf(err)
		switch d.code {
		case codes.OK, codes.Unimplemented:
		case codes.InvalidArgument, codes.PermissionDenied, codes.FailedPrecondition, codes.ResourceExhausted:
			if d.info.Reason == "" || d.info.Domain != "tokenbroker.v1" {
				t.Errorf("%v without a reason: %s", d.code, d.text)
			}
		default:
			t.Errorf("got %v: %s", d.code, d.text)
		}
		if !utf8.ValidString(d.text) {
			t.Error("the message is not valid UTF-8")
		}
	})
}

func TestAnswersToBadRequestsAreSmall(t *testing.T) {
	r := newRig(t, rigOptions{})
	// What clients of other stacks accept in headers.
	conn, err := grpc.NewClient("passthrough:///"+r.address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithMaxHeaderListSize(8<<10))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, n := range []int{11, 100, 101, 15_000} {
		scopes := make([]string, n)
		for i := range scopes {
			scopes[i] = " " + string(rune('a'+i%26))
		}
		_, err := pb.NewTokenBrokerClient(conn).IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "invoices", Scopes: scopes})
		if d := detailsOf(err); d.code != codes.InvalidArgument || d.info.Reason != "INVALID_REQUEST" || len(d.text) > 2000 || len(d.fields) == 0 || len(d.fields) > 11 {
			t.Errorf("%d bad scopes: %v, %d characters, %d fields: %.200s", n, d.code, len(d.text), len(d.fields), d.text)
		}
	}
}

func TestMarkOfTheCodecTellsNothing(t *testing.T) {
	r := newRig(t, rigOptions{policy: []access.Rule{{Callers: []string{"anonymous"}, Profiles: []string{"other"}, Allow: []string{"issue"}}}})
	conn := r.dial(nil)
	for mark := range uint64(4) {
		var got []codes.Code
		for _, profile := range []string{"invoices", "nothing"} {
			b := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), profile)
			b = protowire.AppendVarint(protowire.AppendTag(b, protowire.MaxValidNumber, protowire.VarintType), mark)
			got = append(got, detailsOf(sendRaw(t.Context(), conn, pb.TokenBroker_IssueToken_FullMethodName, b)).code)
		}
		if got[0] != got[1] || got[0] == codes.OK {
			t.Errorf("with mark %d a forbidden profile answers %v, one that does not exist %v", mark, got[0], got[1])
		}
	}
}

func TestRequestIDOfAnErrorIsTheOneInTheLog(t *testing.T) {
	r := newRig(t, rigOptions{})
	for name, q := range map[string]*pb.IssueTokenRequest{
		"a bad field": {Profile: "a/b"}, "an unknown scope": {Profile: "invoices", Scopes: []string{"everything"}}, "an unknown profile": {Profile: "nothing"},
	} {
		_, err := r.tokens().IssueToken(t.Context(), q)
		if id := detailsOf(err).info.Metadata["request_id"]; id == "" || !strings.Contains(r.log.String(), `"request_id":"`+id+`"`) {
			t.Errorf("%s: the log does not have request %q", name, id)
		}
	}
}

// The largest valid request for a token is read, with room to spare.
func TestLargestRequestIsRead(t *testing.T) {
	r := newRig(t, rigOptions{})
	q := &pb.RefreshTokenRequest{
		Profile: strings.Repeat("a", 64), Scopes: many(100), MinLifetime: durationpb.New(time.Hour),
		RejectedTokenId: "0123456789abcdef", Job: &pb.Job{Id: strings.Repeat("j", 128)},
	}
	for i := range q.Scopes {
		q.Scopes[i] += strings.Repeat("s", 256-len(q.Scopes[i]))
	}
	if size := proto.Size(q); size < 26_000 || size > 64<<10/2 {
		t.Errorf("it has %d bytes", size)
	}
	_, err := pb.NewTokenBrokerClient(r.dial(nil)).RefreshToken(t.Context(), q)
	wantFailure(t, err, codes.PermissionDenied, "CALLER_DENIED", q.Profile)
}
