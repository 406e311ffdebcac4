// Package config turns the configuration file into what the server is made of:
// addresses, TLS, profiles and policy.
//
// The file is YAML in the shape of the message Config of
// tokenbroker.config.v1. A load goes through it in stages:
//
//	text ─► nodes ─► shape ─► rules ─► secrets, certificates ─► store, profiles
//	        yaml.go  shape.go rules.go secrets.go, tls.go       store.go, profiles.go
//
// The idea is that no stage stops at a mistake. It notes a [Problem] with the
// place in the file, leaves the mistaken part out and goes on with the rest, so
// that whoever wrote the file hears of everything at once. A later stage keeps
// silent about what follows from a mistake that is told already.
//
// Callers may rely on this:
//
//   - A load succeeds completely or not at all. Nothing that was loaded before
//     changes.
//   - Every field of the schema is used. One that has no effect where it is
//     written is a problem or a warning, never ignored.
//   - No network is touched: authorization servers may be down.
//   - No secret is in a problem, a warning or an error, not even one that was
//     written in the wrong place: problems show keys, paths and names only
//     where they look like such, and never a line of the file.
//   - The package does not log.
package config

import (
	"crypto/tls"
	"log/slog"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/admission"
	"github.com/tokenbroker/tokenbroker/internal/audit"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
	"github.com/tokenbroker/tokenbroker/internal/serviceaccount"
	"github.com/tokenbroker/tokenbroker/internal/store"
)

// Config is a configuration in which everything has been found right. Defaults
// are filled in. It is not changed after it is returned.
type Config struct {
	// Server says where callers reach the gRPC services, and how.
	Server Server
	// Admin says where operators reach health, metrics and the console.
	Admin Admin
	// Store says where replicas share tokens; nil means in memory, which is not
	// shared.
	Store *Store
	// Log says what the server writes about itself.
	Log Log
	// Audit says where it is written who was given or denied what.
	Audit audit.Settings
	// Profiles, in the file's order; one at least.
	Profiles []*broker.Profile
	// Policy rules, in the file's order. None means nothing for authenticated
	// callers and everything for an anonymous one.
	Policy []access.Rule
	// Places of the policy's rules, in the same order.
	Places []Place
	// Certificates that the configuration names, each file once, sorted by name.
	Certificates []Certificate
	// Files that were read, the configuration file among them: absolute paths,
	// sorted. See [Loader.Watch].
	Files []string
	// Warnings are no reason to refuse the configuration, and worth telling
	// people. In the file's order.
	Warnings Problems
}

// Place is where something is in the configuration file.
type Place struct {
	// File as it was named to Load.
	File string `json:"file"`
	// Line and Column begin with 1.
	Line   int `json:"line"`
	Column int `json:"column"`
}

// Server says where callers reach the gRPC services, and how.
type Server struct {
	// Network and Address are what net.Listen wants: "tcp" and host:port, or
	// "unix" and a path.
	Network, Address string
	// TLS demands a client certificate that one of the configured authorities
	// has signed, and none has revoked; where callers can prove themselves by a
	// token, one may be missing. Nil means no TLS, which loopback addresses and
	// sockets only are allowed.
	TLS *tls.Config
	// WorkloadAPI is where the certificate and the authorities that TLS lacks
	// come from; nil means that it has them.
	WorkloadAPI *WorkloadAPI
	// Revocations are what TLS asks in the handshake; nil revokes nothing.
	Revocations *access.Revocations
	// Reflection says whether the schema is served.
	Reflection bool
	// Limits bound what callers can make the server do.
	Limits admission.Limits
	// Forwarders are the proxies that are believed about who is behind them;
	// nil is none.
	Forwarders *access.Forwarders
	// ServiceAccounts are the Kubernetes clusters whose service account tokens
	// prove who a caller is; none means that no token does.
	ServiceAccounts []serviceaccount.Cluster
}

// WorkloadAPI says where the server's SPIFFE identity comes from.
type WorkloadAPI struct {
	// Address of the API: "unix:" and a path, or "tcp://" and host:port.
	Address string
	// TrustDomains whose members may connect; none means that of the server's
	// own identity.
	TrustDomains []string
}

// Certificate is a file of certificates that end.
type Certificate struct {
	// Name is "server", "client_ca", "admin", "admin_client_ca", "redis",
	// "redis_ca", or "profile:" and the name of a profile whose client proves
	// itself by one; of any other file the path of its field.
	Name string
	// End is when the first in the file ends.
	End time.Time
}

// Admin says where operators reach health, metrics and the console.
type Admin struct {
	// Address is host:port.
	Address string
	// TLS asks for a client certificate where there are authorities to judge
	// it, and goes on without one. Nil means plain HTTP.
	TLS *tls.Config
	// Revocations are what TLS asks in the handshake; nil revokes nothing.
	Revocations *access.Revocations
	// BearerToken opens the console to whoever knows it; empty opens nothing.
	BearerToken broker.Secret
	// URL of the console as browsers see it, without a slash at its end; empty
	// if nobody says.
	URL string
}

// Store says where replicas share tokens.
type Store struct {
	// Redis says how to reach it. The Logger is whoever connects to choose.
	Redis store.RedisOptions
	// Access is what may change while the store is in use.
	Access store.Access
}

// Log says what the server writes about itself.
type Log struct {
	// Level is the lowest that is written.
	Level slog.Level
	// Format is "json" or "text".
	Format string
}

// Options are what a configuration needs and does not say. The zero value is
// right for looking at one file once.
type Options struct {
	// FingerprintKey is the process's key for broker.Fingerprint, where no store
	// has one for all processes. Nil means a random one, the same for all loads
	// of one Loader.
	FingerprintKey []byte
	// Transport is what profiles share. Nil means one for all loads of one
	// Loader.
	Transport *oauth.Transport
	// UserAgent is sent with token requests; empty means oauth's.
	UserAgent string
	// LookupEnv finds environment variables; nil means os.LookupEnv.
	LookupEnv func(name string) (string, bool)
}
