// Package access is the one judge behind every door: who a caller is, and what
// it may do.
//
// A door (gRPC, the console) proves who is there, by [Identify] or one of its
// siblings, and gets a [Caller]. The caller asks for an [Operation] on a
// profile, and the [Authorizer] decides by the [Policy] in force. Default deny:
// what no rule allows is refused. A policy is compiled when it is made and
// immutable; replacing it takes effect with the next decision, and
// [Authorizer.Current] tells when, for whoever has something open.
//
// The package knows no transport. A decision takes no lock and allocates
// nothing.
package access

import (
	"sync/atomic"
	"time"
)

// Anonymous is the name of a caller whose identity nothing proves. It exists
// only on loopback.
const Anonymous = "anonymous"

// Proof is how a caller's identity was proven.
type Proof int

// The proofs.
const (
	// Loopback: nothing was proven but that the caller is on this machine.
	Loopback Proof = iota + 1
	// URISAN is a URI in a client certificate, which is usually a SPIFFE ID.
	URISAN
	// DNSSAN is a DNS name in a client certificate.
	DNSSAN
	// UnixPeer is the user at the other end of a unix socket, as the kernel
	// tells.
	UnixPeer
	// Forwarded is what a trusted proxy says of who is behind it.
	Forwarded
	// ServiceAccount is a Kubernetes service account token.
	ServiceAccount
	// BearerToken is the console's token.
	BearerToken
	// LocalOperator: whoever is on this machine, at a console that nobody else
	// can reach.
	LocalOperator
)

var proofs = [...]string{"none", "loopback", "uri_san", "dns_san", "unix_peer", "forwarded", "service_account", "bearer_token", "local_operator"}

// String returns the proof's name in the audit log.
func (p Proof) String() string {
	if p < 0 || int(p) >= len(proofs) {
		return proofs[0]
	}
	return proofs[p]
}

// Operation is something that the policy allows or denies, profile by profile.
type Operation int

// The operations, by their names in the configuration.
const (
	Issue Operation = iota + 1
	Refresh
	Watch
	Revoke
	Admin
)

var operations = [...]string{"", "issue", "refresh", "watch", "revoke", "admin"}

// String returns the operation's name in the configuration.
func (o Operation) String() string {
	if o < 0 || int(o) >= len(operations) {
		return ""
	}
	return operations[o]
}

// Operations lists all there are.
func Operations() []Operation { return []Operation{Issue, Refresh, Watch, Revoke, Admin} }

// Caller is who is at the other end, as far as it was proven. It holds for as
// long as its connection, or what proved it, does; it must not be copied.
type Caller struct {
	// Name by which the policy knows the caller: "spiffe://…", "dns:…",
	// "k8s://…", "unix:uid:…" or Anonymous.
	Name string
	// Groups are further names by which the policy may know it: "unix:gid:…".
	Groups []string
	// Proof is how the name was proven.
	Proof Proof
	// Forwarder is the name of the proxy that forwarded the name; empty if none
	// did.
	Forwarder string
	// Expires is when the proof ends; zero if it does not.
	Expires time.Time

	// Usage is for the door to keep what it counts about the caller, beside the
	// caller. This package does not look at it.
	Usage atomic.Value

	// granted caches what a policy says of the caller.
	granted atomic.Pointer[grants]
	// spoken caches what forwarders believe of the caller.
	spoken atomic.Pointer[voice]
}
