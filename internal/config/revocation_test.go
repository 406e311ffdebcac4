package config_test

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/config"
)

// revocable is a configuration that names two files of lists.
func revocable(t *testing.T, directory string) string {
	return with(t, tlsText(directory), "  tls:\n", "  tls:\n    client_crl: ["+directory+"/ca.crl, "+directory+"/more.crl]\n")
}

func TestRevocationLists(t *testing.T) {
	ca, second, stranger := newAuthority(t), newAuthority(t), newAuthority(t)
	due := time.Now().Add(-time.Minute)
	late := func(l *x509.RevocationList) { l.NextUpdate = due }
	numbered := func(n int64) func(*x509.RevocationList) {
		return func(l *x509.RevocationList) { l.Number = big.NewInt(n) }
	}
	delta := func(l *x509.RevocationList) {
		l.ExtraExtensions = []pkix.Extension{{Id: []int{2, 5, 29, 27}, Critical: true, Value: []byte{2, 1, 1}}}
	}
	for name, c := range map[string]struct {
		crl, more string
		problem   string // its end; empty for none
		warning   string
	}{
		"a list for each authority": {crl: ca.list(t, nil), more: second.list(t, nil)},
		"both in one file":          {crl: ca.list(t, nil) + second.list(t, nil), more: ca.list(t, numbered(2))},
		"one authority without":     {crl: ca.list(t, nil), more: ca.list(t, nil), warning: "client_crl: no list is of " + second.certificate.Subject.String() + ": certificates that it signs cannot be revoked"},
		"a late one": {crl: ca.list(t, late), more: second.list(t, nil),
			warning: "ca.crl has a list of " + ca.certificate.Subject.String() + " that was to be replaced by " + due.UTC().Format(time.RFC3339) + ": it is still used; get the newer one here"},
		"no list":                  {crl: certificatePEM(ca.certificate), more: second.list(t, nil), problem: "ca.crl: there is no revocation list in it: it must be DER, or PEM with BEGIN X509 CRL"},
		"a broken one":             {crl: "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n", more: second.list(t, nil), problem: "ca.crl: revocation list 1 cannot be read: x509: malformed crl"},
		"a stranger's":             {crl: ca.list(t, nil) + stranger.list(t, nil), more: second.list(t, nil), problem: "ca.crl: revocation list 2 cannot be used: its issuer \"" + stranger.certificate.Subject.String() + "\" is not among the authorities of client_ca: add it there, or remove the list"},
		"a delta":                  {crl: ca.list(t, delta), more: second.list(t, nil), problem: "ca.crl: revocation list 1 cannot be used: it is a delta, which has only what is new since another list: use complete lists"},
		"a file that is not there": {crl: ca.list(t, nil), problem: "reading the revocation lists from $DIR/more.crl: no such file or directory"},
		"too large a file":         {crl: ca.list(t, nil), more: strings.Repeat("x", 32<<20+1), problem: "the file is larger than 32768 KiB"},
	} {
		t.Run(name, func(t *testing.T) {
			directory := t.TempDir()
			writeServerFiles(t, directory)
			write(t, filepath.Join(directory, "ca.crt"), certificatePEM(ca.certificate)+certificatePEM(second.certificate))
			write(t, filepath.Join(directory, "ca.crl"), c.crl)
			if c.more != "" {
				write(t, filepath.Join(directory, "more.crl"), c.more)
			}
			loaded, err := parse(revocable(t, directory))
			if c.problem != "" {
				got := shorten(t, err)
				if len(got) != 1 || !strings.HasSuffix(got[0], strings.ReplaceAll(c.problem, "$DIR", directory)) {
					t.Errorf("got %q, want %q", got, c.problem)
				}
				var problems config.Problems
				if !errors.As(err, &problems) || !problems.Passing() {
					t.Errorf("lists and authorities are replaced one after the other, so this may pass: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Join(warnings(t, loaded), "\n"); !strings.HasSuffix(got, c.warning) || (c.warning == "") != (got == "") {
				t.Errorf("warned of %q, want %q", got, c.warning)
			}
			for _, file := range []string{"ca.crl", "more.crl"} {
				if !slices.Contains(loaded.Files, filepath.Join(directory, file)) {
					t.Errorf("%s is not among the files to watch", file)
				}
			}
			if loaded.Server.TLS.VerifyConnection == nil {
				t.Error("the handshake does not ask")
			}
		})
	}
}

// A list can be larger than a configuration may be, and a change at its end is
// seen.
func TestLargeList(t *testing.T) {
	directory := t.TempDir()
	ca := newAuthority(t)
	list := func(n int64) string {
		return ca.list(t, func(l *x509.RevocationList) {
			l.Number = big.NewInt(n)
			for i := range n {
				l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: new(big.Int).Lsh(big.NewInt(i+1), 100), RevocationTime: time.Now()})
			}
		})
	}
	writeServerFiles(t, directory)
	write(t, filepath.Join(directory, "ca.crt"), certificatePEM(ca.certificate))
	text := list(100_000)
	if len(text) <= 4<<20 {
		t.Fatalf("the list has %d bytes only", len(text))
	}
	write(t, filepath.Join(directory, "ca.crl"), text)
	c := mustParse(t, with(t, tlsText(directory), "  tls:\n", "  tls:\n    client_crl: ["+directory+"/ca.crl]\n"))
	if got := c.Server.Revocations.Lists(); len(got) != 1 || got[0].Revoked != 100_000 {
		t.Errorf("got %+v", got)
	}
}

func TestListsWithoutWhatTheyNeed(t *testing.T) {
	directory := t.TempDir()
	writeServerFiles(t, directory)
	equal(t, problems(t, minimal+fmt.Sprintf("admin: {tls: {certificate: %[1]s/tls.crt, private_key: %[1]s/tls.key, client_crl: [%[1]s/ca.crl]}}\n", directory)),
		[]string{fmt.Sprintf("8:%d: admin.tls.client_crl: has no effect without client_ca: add it, or remove the lists", 15+len("certificate: /tls.crt, private_key: /tls.key, client_crl: ")+2*len(directory))})
	equal(t, problems(t, minimal+"server: {tls: {workload_api: {address: 'unix:/x'}, client_crl: ["+directory+"/ca.crl]}}\n"),
		[]string{"8:64: server.tls.client_crl: lists are checked with client_ca, which workload_api replaces: remove them, and let SPIFFE's certificates end soon"})
}

func TestWorkloadAPI(t *testing.T) {
	const named, unnamed = minimal + "server: {tls: {workload_api: {address: 'unix:/run/api.sock', trust_domains: [a.test]}}}\n", minimal + "server: {tls: {workload_api: {}}}\n"
	in := func(variable string) config.Options {
		o := options
		o.LookupEnv = func(name string) (string, bool) {
			if name == "SPIFFE_ENDPOINT_SOCKET" {
				return variable, variable != ""
			}
			return options.LookupEnv(name)
		}
		return o
	}
	for name, c := range map[string]struct {
		text, variable, address, problem string
	}{
		"in the config":      {named, "unix:/other", "unix:/run/api.sock", ""},
		"in the environment": {unnamed, "unix:/other", "unix:/other", ""},
		"nowhere":            {unnamed, "", "", "8:30: server.tls.workload_api.address: is missing: add it, or set SPIFFE_ENDPOINT_SOCKET"},
		"not an address":     {unnamed, "/other", "", "8:30: server.tls.workload_api.address: SPIFFE_ENDPOINT_SOCKET is not the address of a Workload API, such as unix:/run/spire/agent/public/api.sock"},
	} {
		got, err := config.Parse("broker.yaml", []byte(c.text), in(c.variable))
		if c.problem != "" {
			if lines := shorten(t, err); len(lines) != 1 || strings.TrimPrefix(lines[0], "broker.yaml:") != c.problem {
				t.Errorf("%s: got %q, want %q", name, lines, c.problem)
			}
			continue
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got.Server.WorkloadAPI == nil || got.Server.WorkloadAPI.Address != c.address || got.Server.TLS == nil || len(got.Server.TLS.Certificates) != 0 || got.Server.TLS.ClientCAs != nil {
			t.Errorf("%s: got %+v", name, got.Server)
		}
	}
}

func TestCertificatesAndTheirEnds(t *testing.T) {
	directory := t.TempDir()
	writeServerFiles(t, directory)
	soon := time.Now().Add(time.Minute).UTC().Truncate(time.Second)
	ca := newAuthority(t)
	ending, _ := ca.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: "ends soon"}, IsCA: true, BasicConstraintsValid: true, NotAfter: soon})
	write(t, filepath.Join(directory, "ca.crt"), certificatePEM(ca.certificate)+certificatePEM(ending))
	in := strings.NewReplacer("$DIR", directory, "$PROVIDER", "oauth2", "$SERVER", "issuer: 'https://id.example.com'").Replace
	c := mustParse(t, in(chainProfile+adminPart+tlsPart))
	var got []string
	for _, certificate := range c.Certificates {
		got = append(got, fmt.Sprint(certificate.Name, " ", certificate.End.Equal(soon)))
	}
	equal(t, got, []string{"admin false", "admin_client_ca true", "client_ca true", "profile:p false", "server false"})
}
