// Package serviceaccount takes Kubernetes service account tokens as proof of who
// a caller is.
//
// Such a token is a JWT (RFC 7519) that the cluster has signed for a pod, for a
// time and for an audience. It is checked here, with the cluster's public keys
// and without a call to the cluster: the token's issuer says which [Cluster] it
// has to be from, and nothing but that cluster's keys, audience, algorithms and
// longest lifetime count. Whose token it is, is the subject: the caller is
// k8s://CLUSTER/NAMESPACE/ACCOUNT.
//
// Keys come from a file, or from a URL ([Source]). They are fetched when they
// are first needed, again when a token names one that is not there, and when
// they are old; seldom enough that no flood of tokens becomes a flood of
// fetches. A server that is down costs nothing as long as its keys are known.
//
// Callers may rely on this:
//
//   - What has been verified is remembered, by its SHA-256, for five minutes at
//     the most and not beyond its end: the next calls cost a hash and a look, and
//     get the same [access.Caller]. It is forgotten when the cluster's keys
//     change. Tokens themselves are not kept.
//   - What is refused is not remembered. It costs a signature check at the most,
//     and all of those together get half of the processors.
//   - No error and no log line holds anything of a token.
//
// What the signature cannot tell is not known: a token of a pod or an account
// that is gone is believed until it ends.
package serviceaccount

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
)

const (
	// DefaultMaxLifetime is the lifetime that a Cluster without one accepts.
	DefaultMaxLifetime = time.Hour

	// leeway is by how much the cluster's clock may differ.
	leeway = 30 * time.Second
	// grain is by how much a token may live longer than is accepted: Kubernetes
	// makes some of 3,607 seconds where an hour is meant.
	grain = 10 * time.Second
)

// DefaultAlgorithms returns those that a Cluster without any accepts: what
// Kubernetes signs with.
func DefaultAlgorithms() []string { return []string{string(jose.RS256), string(jose.ES256)} }

// algorithms are all there can be. None is symmetric: a public key must not be
// of use for making tokens.
var algorithms = []string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}

// Cluster is one whose tokens are believed.
type Cluster struct {
	// Name of the cluster in the names of callers. Unique.
	Name string
	// Issuer that tokens must name, character by character. Unique.
	Issuer string
	// Audience that tokens must be for, among others.
	Audience string
	// Keys of the cluster; nil where Source has them.
	Keys *Keys
	// Source of the cluster's keys; nil where they are fixed.
	Source *Source
	// Algorithms of signatures to accept: RS256, RS384, RS512, PS256, PS384,
	// PS512, ES256, ES384, ES512 or EdDSA. Others are as if they were not there.
	// None means DefaultAlgorithms.
	Algorithms []string
	// MaxLifetime is for how long a token may have been made, give or take some
	// seconds. Zero means DefaultMaxLifetime.
	MaxLifetime time.Duration
}

// Source is a URL that has a cluster's keys.
type Source struct {
	// URL of the JSON Web Key Set: https://, or http:// on a loopback host.
	URL string
	// CA are the authorities that the server is checked against; nil means the
	// system's.
	CA *x509.CertPool
	// Token is sent as bearer token; empty sends none.
	Token broker.Secret
}

// Options are what a Verifier needs besides clusters. The zero value works.
type Options struct {
	// Logger is told when keys cannot be fetched, and when they change; nil
	// tells nobody.
	Logger *slog.Logger
	// Fetch gets the key set of a Source as it came; nil asks the URL. It runs
	// within a time-out of its own, never twice at a time for one Source.
	Fetch func(ctx context.Context, s *Source) ([]byte, error)
	// Previous is the Verifier that is being replaced; nil is none. Keys that it
	// has fetched are taken over where URL and CA have not changed.
	Previous *Verifier
}

// Verifier checks tokens. Make it with [New]; it may be used from several
// goroutines, and has nothing that must be closed.
type Verifier struct {
	clusters map[string]*cluster // by issuer
	verified *cache
	// turns are taken for a signature check, which is the only costly part.
	turns chan struct{}
}

// cluster is a Cluster ready for use.
type cluster struct {
	name, audience string
	algorithms     []jose.SignatureAlgorithm
	longest        time.Duration
	keys           keyring
}

// keyring has a cluster's keys.
type keyring interface {
	// current are those that are known by now; nil if none are.
	current() *Keys
	// find returns the key with that id and the set that it is from. Where the
	// key has to be fetched first it waits, until ctx ends at the most.
	find(ctx context.Context, id string) (key, *Keys, error)
}

// New returns a Verifier of these clusters' tokens; with none it refuses all.
func New(clusters []Cluster, o Options) *Verifier {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	v := &Verifier{
		clusters: map[string]*cluster{},
		verified: newCache(maxVerified),
		turns:    make(chan struct{}, max(runtime.GOMAXPROCS(0)/2, 1)),
	}
	for _, c := range clusters {
		v.clusters[c.Issuer] = newCluster(c, o)
	}
	return v
}

func newCluster(c Cluster, o Options) *cluster {
	made := &cluster{name: c.Name, audience: c.Audience, longest: c.MaxLifetime}
	if made.longest == 0 {
		made.longest = DefaultMaxLifetime
	}
	accepted := c.Algorithms
	if len(accepted) == 0 {
		accepted = DefaultAlgorithms()
	}
	for _, a := range accepted {
		if slices.Contains(algorithms, a) {
			made.algorithms = append(made.algorithms, jose.SignatureAlgorithm(a))
		}
	}
	if c.Source != nil {
		made.keys = newRemote(c, o)
	} else {
		made.keys = fixed{c.Keys}
	}
	return made
}

// fixed is a keyring that does not change.
type fixed struct{ keys *Keys }

func (f fixed) current() *Keys { return f.keys }

func (f fixed) find(_ context.Context, id string) (key, *Keys, error) {
	if k, ok := f.keys.find(id); ok {
		return k, f.keys, nil
	}
	return key{}, nil, errUnknownKey
}

// Verify returns who the token proves its bearer to be. The caller's Expires is
// the token's own end; because clocks differ, the token is taken for half a
// minute more. The error says why it proves nothing, and is [Unavailable] if
// that may change by itself.
func (v *Verifier) Verify(ctx context.Context, token string) (*access.Caller, error) {
	if len(token) > maxToken {
		return nil, errTooLong
	}
	digest := digestOf(token)
	now := time.Now().Round(0) // tokens end by the wall clock
	if c := v.verified.get(digest, now); c != nil {
		return c, nil
	}
	e, err := v.verify(ctx, token, now)
	if err != nil {
		return nil, err
	}
	// Of those that came at the same time one is kept for all.
	return v.verified.put(digest, e, now), nil
}

// verify does the whole work.
func (v *Verifier) verify(ctx context.Context, token string, now time.Time) (*entry, error) {
	t, err := parse(token)
	if err != nil {
		return nil, err
	}
	c := v.clusters[t.claims.Issuer]
	if c == nil {
		return nil, errIssuer
	}
	e, err := v.judge(ctx, c, t, now)
	if err != nil {
		return nil, fmt.Errorf("by what is configured for cluster %s: %w", c.name, err)
	}
	return e, nil
}

// judge holds a token to what its cluster accepts. What costs little comes
// first, and none of it is believed before the signature is.
func (v *Verifier) judge(ctx context.Context, c *cluster, t *token, now time.Time) (*entry, error) {
	subject, err := c.check(t, now)
	if err != nil {
		return nil, err
	}
	k, keys, err := c.keys.find(ctx, t.keyID)
	if err != nil {
		return nil, err
	}
	if !k.fits(t.algorithm) {
		return nil, errKeyMismatch
	}
	if err := v.signed(ctx, t, c, k); err != nil {
		return nil, err
	}
	caller := &access.Caller{
		Name:    "k8s://" + c.name + "/" + subject.namespace + "/" + subject.account,
		Proof:   access.ServiceAccount,
		Expires: time.Unix(*t.claims.Expires, 0),
	}
	return &entry{caller: caller, ring: c.keys, keys: keys, until: earlier(now.Add(rememberFor), caller.Expires.Add(leeway))}, nil
}

// signed checks the signature, when it is this token's turn.
func (v *Verifier) signed(ctx context.Context, t *token, c *cluster, k key) error {
	select {
	case v.turns <- struct{}{}:
	case <-ctx.Done():
		return &Unavailable{"there was no time to check the token's signature: too many wait for theirs"}
	}
	defer func() { <-v.turns }()
	return t.verify(k, c.algorithms)
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
