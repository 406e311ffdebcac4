// Package mesh holds the tests that run the broker with what stands between it
// and its callers in real networks, and with callers that are not ours: Envoy as
// the proxy of a service mesh, HAProxy and nginx as balancers of connections,
// and clients on grpcurl, grpcio, grpc-js and grpc-java. They are built with the
// tag mesh; "make mesh" brings what they need and runs them.
//
// Brokers, proxies and clients are real processes; the proxies run the files in
// deploy/, in which only addresses and paths are replaced. docs/mesh.md is the
// page for users.
package mesh
