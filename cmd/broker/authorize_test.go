package main

import (
	"strings"
	"testing"
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
