package access

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"iter"
	"math/big"
	"slices"
	"time"
)

// Revocations are certificate revocation lists (RFC 5280 section 5) of some
// authorities. A nil one revokes nothing. [Revocations.Add] fills it; from its
// first use on it must not change, and may be used concurrently.
//
// A certificate whose issuer has no list is not revoked, and a list that is past
// its next update counts for as long as there is no newer one: a list that is
// late is no reason to turn everybody away. [Revocations.Lists] tells when which
// one is due.
type Revocations struct {
	authorities []*x509.Certificate
	lists       map[issuer]*list
}

// issuer is an authority by its name and its key, both as they are encoded: two
// authorities of one name are two.
type issuer [sha256.Size]byte

func issuerOf(authority *x509.Certificate) issuer {
	return sha256.Sum256(slices.Concat(authority.RawSubject, authority.RawSubjectPublicKeyInfo))
}

// list is what there is to know of one revocation list.
type list struct {
	name       string
	number     *big.Int // of the list; nil if it has none
	thisUpdate time.Time
	nextUpdate time.Time
	scope      []byte              // its distribution point; nil if it names none
	serials    map[string]struct{} // of revoked certificates, big-endian
}

// List is one revocation list in use.
type List struct {
	// Issuer is the authority's distinguished name, as the list's issuer.
	Issuer string
	// NextUpdate is when a newer one is due; zero if the list does not say.
	NextUpdate time.Time
	// Revoked is the number of certificates on it.
	Revoked int
}

// ParseLists reads revocation lists: one in DER, or as many as there are in PEM,
// one at least.
func ParseLists(data []byte) ([]*x509.RevocationList, error) {
	if found, err := x509.ParseRevocationList(data); err == nil {
		return []*x509.RevocationList{found}, nil
	}
	var all []*x509.RevocationList
	block, rest := pem.Decode(data)
	for ; block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "X509 CRL" {
			continue
		}
		found, err := x509.ParseRevocationList(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("revocation list %d cannot be read: %w", len(all)+1, err)
		}
		all = append(all, found)
	}
	if bytes.Contains(rest, []byte("-----BEGIN ")) { // perhaps it is being written
		return nil, fmt.Errorf("what comes after %d revocation lists is cut off", len(all))
	}
	if len(all) == 0 {
		return nil, errors.New("there is no revocation list in it: it must be DER, or PEM with BEGIN X509 CRL")
	}
	return all, nil
}

// NewRevocations returns Revocations without a list. Only lists of these
// authorities are taken.
func NewRevocations(authorities []*x509.Certificate) *Revocations {
	return &Revocations{authorities: authorities, lists: map[issuer]*list{}}
}

// Add takes a list, or says why it cannot be used. Of several lists of one
// authority the one with the highest number stays.
func (r *Revocations) Add(found *x509.RevocationList) error {
	scope, err := scopeOf(found)
	if err != nil {
		return err
	}
	authority, err := r.signer(found)
	if err != nil {
		return err
	}
	l := &list{
		name: found.Issuer.String(), number: found.Number, thisUpdate: found.ThisUpdate, nextUpdate: found.NextUpdate,
		scope: scope, serials: make(map[string]struct{}, len(found.RevokedCertificateEntries)),
	}
	by := issuerOf(authority)
	if other := r.lists[by]; other != nil {
		if !bytes.Equal(other.scope, scope) {
			return fmt.Errorf("it is one of several that share the certificates of %q (issuing distribution point): one list must have them all", l.name)
		}
		if !l.newer(other) {
			return nil
		}
	}
	for _, entry := range found.RevokedCertificateEntries {
		l.serials[string(entry.SerialNumber.Bytes())] = struct{}{}
	}
	r.lists[by] = l
	return nil
}

// newer compares by number, which every list should have, else by time.
func (l *list) newer(other *list) bool {
	if l.number != nil && other.number != nil {
		return l.number.Cmp(other.number) > 0
	}
	return l.thisUpdate.After(other.thisUpdate)
}

// signer is the authority that has signed the list.
func (r *Revocations) signer(found *x509.RevocationList) (*x509.Certificate, error) {
	var reason error
	for _, authority := range r.authorities {
		if !bytes.Equal(authority.RawSubject, found.RawIssuer) {
			continue
		}
		if reason = found.CheckSignatureFrom(authority); reason == nil {
			return authority, nil
		}
	}
	if reason != nil {
		return nil, fmt.Errorf("no authority called %q has signed it: %w", found.Issuer, reason)
	}
	return nil, fmt.Errorf("its issuer %q is not among the authorities of client_ca: add it there, or remove the list", found.Issuer)
}

// Extensions of lists, and of their entries, by number (RFC 5280 sections 5.2
// and 5.3).
var (
	oidNumber       = asn1.ObjectIdentifier{2, 5, 29, 20}
	oidReason       = asn1.ObjectIdentifier{2, 5, 29, 21}
	oidInvalidity   = asn1.ObjectIdentifier{2, 5, 29, 24}
	oidDelta        = asn1.ObjectIdentifier{2, 5, 29, 27}
	oidScope        = asn1.ObjectIdentifier{2, 5, 29, 28}
	oidAuthorityKey = asn1.ObjectIdentifier{2, 5, 29, 35}
)

// scopeOf refuses lists that are not of all certificates of their issuer, and
// those that say something we do not understand and must (RFC 5280 section 5.2).
// It returns the distribution point that the list is for, if it names one.
func scopeOf(found *x509.RevocationList) (scope []byte, err error) {
	for _, extension := range found.Extensions {
		switch id := extension.Id; {
		case id.Equal(oidDelta):
			return nil, errors.New("it is a delta, which has only what is new since another list: use complete lists")
		case id.Equal(oidScope):
			if scope, err = distributionPoint(extension.Value); err != nil {
				return nil, err
			}
		case id.Equal(oidNumber), id.Equal(oidAuthorityKey), !extension.Critical:
		default:
			return nil, fmt.Errorf("it has the critical extension %s, which is not understood here", id)
		}
	}
	for _, entry := range found.RevokedCertificateEntries {
		for _, extension := range entry.Extensions {
			if id := extension.Id; extension.Critical && !id.Equal(oidReason) && !id.Equal(oidInvalidity) {
				return nil, fmt.Errorf("certificate %x on it has the critical extension %s, which is not understood here", entry.SerialNumber, id)
			}
		}
	}
	return scope, nil
}

// distributionPoint reads an issuing distribution point (RFC 5280 section
// 5.2.5): anything in it but a name narrows the list, since DER leaves flags out
// that are not set.
func distributionPoint(der []byte) ([]byte, error) {
	unreadable := errors.New("its issuing distribution point cannot be read")
	var point asn1.RawValue
	if rest, err := asn1.Unmarshal(der, &point); err != nil || len(rest) > 0 || point.Tag != asn1.TagSequence || point.Class != asn1.ClassUniversal {
		return nil, unreadable
	}
	const name, indirect = 0, 4
	for rest := point.Bytes; len(rest) > 0; {
		var field asn1.RawValue
		var err error
		if rest, err = asn1.Unmarshal(rest, &field); err != nil || field.Class != asn1.ClassContextSpecific {
			return nil, unreadable
		}
		switch {
		case field.Tag == name:
		case field.Tag == indirect:
			return nil, errors.New("it is an indirect list, with certificates of other authorities: use each authority's own list")
		default:
			return nil, errors.New("it has only some of its issuer's certificates, or only some reasons (issuing distribution point): use complete lists")
		}
	}
	return der, nil
}

// Check returns why a verified chain, the leaf first, is not to be believed any
// more; nil if it is. It asks the list of each certificate's issuer, and, above
// the end of the chain, those of further authorities. It costs a digest and a look
// per certificate.
func (r *Revocations) Check(chain []*x509.Certificate) error {
	if r == nil || len(r.lists) == 0 {
		return nil
	}
	for i, certificate := range chain[:max(0, len(chain)-1)] {
		if l := r.lists[issuerOf(chain[i+1])]; l.has(certificate) {
			return revoked(certificate, l)
		}
	}
	if len(chain) == 0 {
		return nil
	}
	const highest = 8 // authorities above one another
	return r.checkAuthority(chain[len(chain)-1], highest)
}

// CheckChains returns why none of the chains that a handshake has verified is to
// be believed any more; nil if one is, or if there is none.
func (r *Revocations) CheckChains(chains [][]*x509.Certificate) error {
	var reason error
	for _, chain := range chains {
		if reason = r.Check(chain); reason == nil {
			return nil
		}
	}
	return reason
}

// checkAuthority is for the end of a chain: an authority that is believed
// although it is not a root can be revoked by one that is above it.
func (r *Revocations) checkAuthority(certificate *x509.Certificate, steps int) error {
	if steps == 0 || bytes.Equal(certificate.RawIssuer, certificate.RawSubject) {
		return nil
	}
	for _, above := range r.authorities {
		if !bytes.Equal(above.RawSubject, certificate.RawIssuer) {
			continue
		}
		reason := r.checkAuthority(above, steps-1)
		if l := r.lists[issuerOf(above)]; l.has(certificate) {
			reason = revoked(certificate, l)
		}
		// The name alone is no proof that it is above; the proof is only asked
		// for when it matters, because it is slow.
		if reason != nil && certificate.CheckSignatureFrom(above) == nil {
			return reason
		}
	}
	return nil
}

func (l *list) has(certificate *x509.Certificate) bool {
	if l == nil {
		return false
	}
	_, found := l.serials[string(certificate.SerialNumber.Bytes())]
	return found
}

// ErrRevoked is what is wrong with a chain that is not to be believed any more.
var ErrRevoked = errors.New("has been revoked")

func revoked(certificate *x509.Certificate, l *list) error {
	return fmt.Errorf("certificate %x %w by %s", certificate.SerialNumber, ErrRevoked, l.name)
}

// Lists tells what is in use, in the order of the authorities.
func (r *Revocations) Lists() []List {
	var all []List
	if r == nil {
		return nil
	}
	for by, authority := range r.distinct() {
		if l := r.lists[by]; l != nil {
			all = append(all, List{Issuer: authority.Subject.String(), NextUpdate: l.nextUpdate, Revoked: len(l.serials)})
		}
	}
	return all
}

// Uncovered are the names of the authorities without a list.
func (r *Revocations) Uncovered() []string {
	var names []string
	for by, authority := range r.distinct() {
		if r.lists[by] == nil {
			names = append(names, authority.Subject.String())
		}
	}
	return names
}

// distinct goes through the authorities, one certificate for each.
func (r *Revocations) distinct() iter.Seq2[issuer, *x509.Certificate] {
	return func(yield func(issuer, *x509.Certificate) bool) {
		seen := map[issuer]bool{}
		for _, authority := range r.authorities {
			by := issuerOf(authority)
			if !seen[by] && !yield(by, authority) {
				return
			}
			seen[by] = true
		}
	}
}
