package main

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

func TestAddressThatASignInEndedAt(t *testing.T) {
	const state, secret = "s1", "c0de-hush"
	for name, tc := range map[string]struct{ address, want string }{
		"fine":           {"http://127.0.0.1:7444/oauth/callback?code=" + secret + "&state=s1&iss=https%3A%2F%2Fid \n", ""},
		"another one's":  {"http://127.0.0.1:7444/oauth/callback?code=" + secret + "&state=s2", "another sign-in"},
		"without a code": {"http://127.0.0.1:7444/oauth/callback?state=s1", "no code"},
		"refused":        {"http://127.0.0.1:7444/oauth/callback?error=access_denied&error_description=no%0Away&state=s1", `"access_denied" "no\nway"`},
		"no address":     {"http://[" + secret, "no address"},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := callbackOf(tc.address, state)
			if tc.want == "" {
				if err != nil || r.GetCode() != secret || r.GetState() != state || r.GetIss() != "https://id" {
					t.Fatalf("got %v", err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), secret) {
				t.Errorf("error is %v, want one that says %q and repeats no code", err, tc.want)
			}
		})
	}
}

// looks answers GetProfile with one profile after the other, and with the last
// from then on.
type looks struct {
	pb.ProfileAdminClient
	profiles []*pb.Profile
}

func (l *looks) GetProfile(context.Context, *pb.GetProfileRequest, ...grpc.CallOption) (*pb.GetProfileResponse, error) {
	p := l.profiles[0]
	if len(l.profiles) > 1 {
		l.profiles = l.profiles[1:]
	}
	return &pb.GetProfileResponse{Profile: p}, nil
}

// The end of a sign-in is noticed, also of one that brings no refresh token.
func TestEndOfASignInIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := timestamppb.Now()
		later := timestamppb.New(began.AsTime().Add(time.Minute))
		nobody, old := &pb.Profile{}, &pb.Profile{TokenId: "1", ConsentStartTime: began}
		for name, tc := range map[string]struct {
			before, then *pb.Profile
			ends         bool
		}{
			"the first one":             {nobody, &pb.Profile{TokenId: "2", ConsentStartTime: began}, true},
			"another one":               {old, &pb.Profile{TokenId: "2", ConsentStartTime: later}, true},
			"without a refresh token":   {nobody, &pb.Profile{TokenId: "2"}, true},
			"no refresh token any more": {old, &pb.Profile{TokenId: "2"}, true},
			"nothing":                   {nobody, nobody, false},
			"a renewal":                 {old, &pb.Profile{TokenId: "2", ConsentStartTime: began}, false},
			"a consent that ended":      {old, &pb.Profile{TokenId: "1"}, false},
			"a revocation":              {old, nobody, false},
		} {
			got, err := awaitConsent(t.Context(), &looks{profiles: []*pb.Profile{tc.before, tc.then}}, tc.before, time.Now().Add(10*time.Minute))
			if (err == nil) != tc.ends || tc.ends && got != tc.then {
				t.Errorf("%s: %v, %v", name, got, err)
			}
		}
	})
}
