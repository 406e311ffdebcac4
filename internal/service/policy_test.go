package service_test

import (
	"context"
	"crypto/tls"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/testca"
	"github.com/tokenbroker/tokenbroker/internal/vantage"
	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

func (r *rig) use(rules ...access.Rule) {
	r.t.Helper()
	policy, err := access.NewPolicy(rules)
	if err != nil {
		r.t.Fatal(err)
	}
	r.access.Use(policy)
}

func anonymousMay(profile string, allow ...string) access.Rule {
	return access.Rule{Callers: []string{"anonymous"}, Profiles: []string{profile}, Allow: allow}
}

func TestCallerThatWaitedIsJudgedAgain(t *testing.T) {
	other := access.Rule{Callers: []string{"dns:x"}, Profiles: []string{"*"}, Allow: []string{"issue"}}
	limited := anonymousMay("invoices", "issue", "refresh")
	limited.Scopes = []string{"openid", "permissions", "global.*"}
	issue := func(ctx context.Context, c pb.TokenBrokerClient) error {
		_, err := c.IssueToken(ctx, &pb.IssueTokenRequest{Profile: "invoices"})
		return err
	}
	refresh := func(ctx context.Context, c pb.TokenBrokerClient) error {
		_, err := c.RefreshToken(ctx, &pb.RefreshTokenRequest{Profile: "invoices", RejectedTokenId: "0123456789abcdef"})
		return err
	}
	for name, c := range map[string]struct {
		call      func(context.Context, pb.TokenBrokerClient) error
		fault     sandbox.Fault
		meanwhile func(r *rig)
		denied    bool
		why       string
	}{
		"issue, no rule names it any more": {call: issue, meanwhile: func(r *rig) { r.use(other) }, denied: true, why: "no rule names the caller"},
		"refresh, another operation only":  {call: refresh, meanwhile: func(r *rig) { r.use(anonymousMay("invoices", "issue")) }, denied: true, why: "add refresh to its allow"},
		"issue, its profile has more scopes": {call: issue, meanwhile: func(r *rig) {
			r.configure(func(c *vantage.Config) { c.Scopes = append(c.Scopes, "offline_access") })
		}, denied: true, why: "add offline_access to the scopes of policy[0]"},
		"issue, its profile is gone":                 {call: issue, meanwhile: func(r *rig) { r.broker.Configure(nil) }, denied: true, why: "there is no such profile; if there were"},
		"issue, and the endpoint is down":            {call: issue, fault: sandbox.Fault{Status: 503}, meanwhile: func(r *rig) { r.use(other) }, denied: true, why: "no rule names the caller"},
		"issue, another rule allows it":              {call: issue, meanwhile: func(r *rig) { r.use(other, anonymousMay("inv*", "issue")) }},
		"refresh, the same rules":                    {call: refresh, meanwhile: func(r *rig) { r.use(limited) }},
		"issue, another policy and then the old one": {call: issue, meanwhile: func(r *rig) { r.use(other); r.use(limited) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, rigOptions{policy: []access.Rule{limited}})
			c.fault.Delay, c.fault.Process = time.Second, c.fault.Status == 0
			r.fault(c.fault)
			result := make(chan error, 1)
			client := r.tokens()
			go func() { result <- c.call(within(t, 30*time.Second), client) }()
			eventually(t, "the caller waits", func() bool { return r.vantage.Calls().InFlight == 1 })
			c.meanwhile(r)
			err := <-result
			if !c.denied {
				if err != nil {
					t.Error(err)
				}
				return
			}
			d := wantFailure(t, err, codes.PermissionDenied, "CALLER_DENIED", "invoices")
			if log := r.log.String(); !strings.Contains(log, c.why) || strings.Contains(d.text, c.why) {
				t.Errorf("the caller learns %q, the log has\n%s", d.text, log)
			}
		})
	}
}

func TestDeniedCallerLearnsNothingAndTheLogHasItAll(t *testing.T) {
	secret := access.Rule{Callers: []string{"dns:treasury.example.com"}, Profiles: []string{"payroll"}, Allow: []string{"issue"}}
	r := newRig(t, rigOptions{more: []string{"payroll"}, policy: []access.Rule{secret, anonymousMay("invoices", "issue")}})
	_, err := r.tokens().IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "payroll"})
	d := wantFailure(t, err, codes.PermissionDenied, "CALLER_DENIED", "payroll")
	for _, forbidden := range []string{"treasury", "policy[", "invoices"} {
		if strings.Contains(d.text+d.info.String(), forbidden) {
			t.Errorf("the caller learns of %q: %s", forbidden, d.text)
		}
	}
	if !strings.Contains(d.text, "caller anonymous") || d.info.Metadata["caller"] != "anonymous" {
		t.Errorf("the caller does not learn who it is: %s", d.text)
	}
	line := lineWith(t, r.log.String(), d.info.Metadata["request_id"])
	for _, want := range []string{
		`"msg":"call failed"`, `"caller":"anonymous"`, `"profile":"payroll"`, `"operation":"issue"`, `"reason":"CALLER_DENIED"`,
		`"why":"policy[1] names the caller, but not the profile: add it to the profiles of a rule"`,
	} {
		if !strings.Contains(line, want) {
			t.Errorf("the line lacks %s:\n%s", want, line)
		}
	}
	_, err = r.tokens().IssueToken(t.Context(), &pb.IssueTokenRequest{Profile: "nothing"})
	d = wantFailure(t, err, codes.PermissionDenied, "CALLER_DENIED", "nothing")
	if line := lineWith(t, r.log.String(), d.info.Metadata["request_id"]); !strings.Contains(line, "there is no such profile") {
		t.Errorf("the line does not say that there is none:\n%s", line)
	}
}

// lineWith is the one line of the log that has the text.
func lineWith(t *testing.T, log, text string) string {
	t.Helper()
	var found []string
	for line := range strings.Lines(log) {
		if strings.Contains(line, text) {
			found = append(found, line)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d lines have %q:\n%s", len(found), text, log)
	}
	return found[0]
}

// methods are all that name a profile, each called about one. Those of the second
// name are about another than the first, which the caller may administer.
func methods(conn *grpc.ClientConn) map[string]func(ctx context.Context, profile string) error {
	tokens, admin := pb.NewTokenBrokerClient(conn), pb.NewProfileAdminClient(conn)
	return map[string]func(ctx context.Context, profile string) error{
		"IssueToken.profile": func(ctx context.Context, p string) error {
			_, err := tokens.IssueToken(ctx, &pb.IssueTokenRequest{Profile: p})
			return err
		},
		"RefreshToken.profile": func(ctx context.Context, p string) error {
			_, err := tokens.RefreshToken(ctx, &pb.RefreshTokenRequest{Profile: p, RejectedTokenId: "0123456789abcdef"})
			return err
		},
		"RevokeToken.profile": func(ctx context.Context, p string) error {
			_, err := tokens.RevokeToken(ctx, &pb.RevokeTokenRequest{Profile: p})
			return err
		},
		"WatchToken.profile": func(ctx context.Context, p string) error {
			stream, err := tokens.WatchToken(ctx, &pb.WatchTokenRequest{Profile: p})
			if err == nil {
				_, err = stream.Recv()
			}
			return err
		},
		"GetProfile.profile": func(ctx context.Context, p string) error {
			_, err := admin.GetProfile(ctx, &pb.GetProfileRequest{Profile: p})
			return err
		},
		"ResetProfile.profile": func(ctx context.Context, p string) error {
			_, err := admin.ResetProfile(ctx, &pb.ResetProfileRequest{Profile: p})
			return err
		},
		"StartAuthorization.profile": func(ctx context.Context, p string) error {
			_, err := admin.StartAuthorization(ctx, &pb.StartAuthorizationRequest{Profile: p})
			return err
		},
		"CreateClient.profile": func(ctx context.Context, p string) error {
			_, err := admin.CreateClient(ctx, &pb.CreateClientRequest{Profile: p, ClientId: "c", AllowedGrantTypes: []string{"client_credentials"}})
			return err
		},
		"CreateClientSecret.profile": func(ctx context.Context, p string) error {
			_, err := admin.CreateClientSecret(ctx, &pb.CreateClientSecretRequest{Profile: p, ClientId: "c"})
			return err
		},
		"CreateClientSecret.deliver_to_profile": func(ctx context.Context, p string) error {
			_, err := admin.CreateClientSecret(ctx, &pb.CreateClientSecretRequest{Profile: "invoices", ClientId: "c", DeliverToProfile: p})
			return err
		},
		"RotateClientSecret.profile": func(ctx context.Context, p string) error {
			_, err := admin.RotateClientSecret(ctx, &pb.RotateClientSecretRequest{Profile: p})
			return err
		},
		"RotateClientSecret.admin_profile": func(ctx context.Context, p string) error {
			_, err := admin.RotateClientSecret(ctx, &pb.RotateClientSecretRequest{Profile: "invoices", AdminProfile: p})
			return err
		},
	}
}

// forbiddenRig has a caller that may do something with "invoices", and a profile
// "payroll" that is for others. "nothing" does not exist.
func forbiddenRig(t *testing.T) map[string]func(ctx context.Context, profile string) error {
	t.Helper()
	a := testca.New(t)
	policy := []access.Rule{
		{Callers: []string{"dns:worker.example.com"}, Profiles: []string{"invoices", "inv-*"}, Allow: []string{"issue", "refresh", "admin"}},
		{Callers: []string{"dns:other.example.com"}, Profiles: []string{"payroll"}, Allow: []string{"issue", "refresh", "revoke", "watch", "admin"}},
	}
	settings := serverOf(a)
	r := newRig(t, rigOptions{tls: func() *tls.Config { return settings }, more: []string{"payroll"}, policy: policy})
	return methods(r.dial(clientOf(a, testca.Named("worker.example.com"))))
}

func TestEveryMethodThatNamesAProfileIsTested(t *testing.T) {
	known := methods(nil)
	found := 0
	for _, file := range []protoreflect.FileDescriptor{pb.File_tokenbroker_v1_token_broker_proto, pb.File_tokenbroker_v1_profile_admin_proto} {
		for i := range file.Services().Len() {
			all := file.Services().Get(i).Methods()
			for j := range all.Len() {
				fields := all.Get(j).Input().Fields()
				for k := range fields.Len() {
					if name := string(fields.Get(k).Name()); name == "profile" || strings.HasSuffix(name, "_profile") {
						found++
						if known[string(all.Get(j).Name())+"."+name] == nil {
							t.Errorf("%s of %s is not tested", name, all.Get(j).Name())
						}
					}
				}
			}
		}
	}
	if found != len(known) {
		t.Errorf("%d fields name profiles, %d are tested", found, len(known))
	}
}

func TestForbiddenAndUnknownProfilesHaveTheSameAnswer(t *testing.T) {
	for name, call := range forbiddenRig(t) {
		t.Run(name, func(t *testing.T) {
			// The names have one length, so that even the texts must be the same.
			forbidden, unknown := detailsOf(call(t.Context(), "payroll")), detailsOf(call(t.Context(), "nothing"))
			if want := codes.PermissionDenied; forbidden.code != want || forbidden.info.Metadata["profile"] != "payroll" {
				t.Errorf("forbidden: %v %q", forbidden.code, forbidden.text)
			}
			for _, d := range []*detail{&forbidden, &unknown} {
				delete(d.info.Metadata, "profile")
				delete(d.info.Metadata, "request_id")
				d.text = strings.NewReplacer("payroll", "…", "nothing", "…").Replace(d.text)
			}
			if forbidden.code != unknown.code || forbidden.text != unknown.text || !proto.Equal(forbidden.info, unknown.info) ||
				len(forbidden.fields)+len(unknown.fields) != 0 || forbidden.retry != nil || unknown.retry != nil {
				t.Errorf("forbidden %v %q\nunknown   %v %q", forbidden.code, forbidden.text, unknown.code, unknown.text)
			}
		})
	}
}

// How long an answer takes does not tell whether a profile exists.
func TestForbiddenAndUnknownProfilesTakeAsLong(t *testing.T) {
	// The median hides what the machine does beside; what remains, and how
	// much is enough to be seen, the control says.
	const samples, bound = 151, 1.15
	for name, call := range forbiddenRig(t) {
		t.Run(name, func(t *testing.T) {
			ask := func(profile string) func() {
				return func() {
					if err := call(t.Context(), profile); err == nil {
						t.Fatal("it was allowed")
					}
				}
			}
			var ratio float64
			for range 3 {
				forbidden, unknown := medians(samples, ask("payroll"), ask("nothing"))
				ratio = float64(forbidden) / float64(unknown)
				if ratio < bound && ratio > 1/bound {
					t.Logf("forbidden %v, unknown %v, ratio %.3f", forbidden, unknown, ratio)
					return
				}
			}
			t.Errorf("a forbidden profile takes %.3f times what an unknown one takes", ratio)
		})
	}
	t.Run("control", func(t *testing.T) {
		call := forbiddenRig(t)["IssueToken.profile"]
		same := func() { _ = call(t.Context(), "payroll") }
		slower := func() { same(); same() }
		if a, b := medians(samples, slower, same); float64(a)/float64(b) < bound {
			t.Errorf("two calls take %v, one takes %v: the measurement shows nothing", a, b)
		}
	})
}

// medians measures two things in turn, each first as often as second.
func medians(samples int, a, b func()) (time.Duration, time.Duration) {
	took := func(f func()) time.Duration {
		began := time.Now()
		f()
		return time.Since(began)
	}
	var as, bs []time.Duration
	for i := range samples {
		if i%2 == 0 {
			as, bs = append(as, took(a)), append(bs, took(b))
		} else {
			bs, as = append(bs, took(b)), append(as, took(a))
		}
	}
	slices.Sort(as)
	slices.Sort(bs)
	return as[samples/2], bs[samples/2]
}

func TestWhoAmITellsWhichRulesAllowWhat(t *testing.T) {
	limited := anonymousMay("inv*", "issue", "admin")
	limited.Scopes = []string{"openid", "read.*"}
	useless := anonymousMay("*", "watch")
	useless.Scopes = []string{"nothing.like.it"}
	r := newRig(t, rigOptions{more: []string{"orders", "payroll"}, policy: []access.Rule{
		{Callers: []string{"dns:x"}, Profiles: []string{"*"}, Allow: []string{"issue"}},
		limited, useless, anonymousMay("invoices", "issue", "revoke"), anonymousMay("orders", "refresh"),
	}})
	who, err := r.tokens().WhoAmI(t.Context(), &pb.WhoAmIRequest{})
	if err != nil {
		t.Fatal(err)
	}
	grant := func(op pb.Operation, rule string, scopes ...string) *pb.Grant {
		return &pb.Grant{Operation: op, Rule: rule, Scopes: scopes}
	}
	want := &pb.WhoAmIResponse{
		Caller: "anonymous", Proof: pb.IdentityProof_IDENTITY_PROOF_ANONYMOUS_LOOPBACK, RequestId: who.GetRequestId(),
		Permissions: []*pb.Permission{
			{
				Profile:    "invoices",
				Operations: []pb.Operation{pb.Operation_OPERATION_ISSUE, pb.Operation_OPERATION_REVOKE, pb.Operation_OPERATION_ADMIN},
				Grants: []*pb.Grant{
					grant(pb.Operation_OPERATION_ISSUE, "policy[1]", "openid", "read.*"), grant(pb.Operation_OPERATION_ISSUE, "policy[3]"),
					grant(pb.Operation_OPERATION_REVOKE, "policy[3]"), grant(pb.Operation_OPERATION_ADMIN, "policy[1]"),
				},
			},
			{
				Profile: "orders", Operations: []pb.Operation{pb.Operation_OPERATION_REFRESH},
				Grants: []*pb.Grant{grant(pb.Operation_OPERATION_REFRESH, "policy[4]")},
			},
		},
	}
	if !proto.Equal(who, want) || who.GetRequestId() == "" {
		t.Errorf("got  %v\nwant %v", who, want)
	}
	r.use()
	who, err = r.tokens().WhoAmI(t.Context(), &pb.WhoAmIRequest{})
	if err != nil || len(who.GetPermissions()) != 3 || len(who.GetPermissions()[0].GetGrants()) != 5 || who.GetPermissions()[0].GetGrants()[0].GetRule() != "default" {
		t.Errorf("without rules: %v, %v", who, err)
	}
}
