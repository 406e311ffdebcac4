// Package conformance holds the tests that run the broker against an
// authorization server that is not ours: oidc-provider, installed from npm and
// started by server/server.mjs. They are built with the tag conformance; "make
// conformance" runs them. docs/decisions/013-third-party-judge.md says why.
//
// Each test has a server and a broker of its own, both real processes. It asks
// over gRPC, and believes what the server counted.
package conformance
