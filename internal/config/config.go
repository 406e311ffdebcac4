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

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/admission"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/oauth"
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
	// Profiles, in the file's order; one at least.
	Profiles []*broker.Profile
	// Policy rules, in the file's order. None means nothing for authenticated
	// callers and everything for an anonymous one.
	Policy []access.Rule
	// Files that were read, the configuration file among them: absolute paths,
	// sorted. See [Loader.Watch].
	Files []string
	// Warnings are no reason to refuse the configuration, and worth telling
	// people. In the file's order.
	Warnings Problems
}

// Server says where callers reach the gRPC services, and how.
type Server struct {
	// Network and Address are what net.Listen wants: "tcp" and host:port, or
	// "unix" and a path.
	Network, Address string
	// TLS demands a client certificate that one of the configured authorities
	// has signed. Nil means none, which loopback addresses and sockets only
	// are allowed.
	TLS *tls.Config
	// Reflection says whether the schema is served.
	Reflection bool
	// Limits bound what callers can make the server do.
	Limits admission.Limits
}

// Admin says where operators reach health, metrics and the console.
type Admin struct {
	// Address is host:port.
	Address string
	// TLS asks for a client certificate where there are authorities to judge
	// it, and goes on without one. Nil means plain HTTP.
	TLS *tls.Config
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
