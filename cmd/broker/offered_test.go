package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	endian "encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/testca"
)

// This file looks at the listeners as they are, whatever was configured: what is
// accepted is found out by offering everything there could be.

// hello is a ClientHello, and what it offers.
type hello struct {
	record      uint16   // version of the record
	version     uint16   // legacy_version
	versions    []uint16 // supported_versions; nil leaves them out, as before TLS 1.3
	suites      []uint16
	compression []byte
	groups      []uint16
	alpn        []string
}

// vector is a length of that many bytes and the content.
func vector(bytes int, content ...[]byte) []byte {
	all := slices.Concat(content...)
	length := endian.BigEndian.AppendUint32(nil, uint32(len(all)))
	return append(length[4-bytes:], all...)
}

func numbers(all []uint16) (b []byte) {
	for _, n := range all {
		b = endian.BigEndian.AppendUint16(b, n)
	}
	return b
}

func (h hello) encode() []byte {
	var extensions []byte
	extend := func(id uint16, content []byte) {
		extensions = append(endian.BigEndian.AppendUint16(extensions, id), vector(2, content)...)
	}
	if h.version >= tls.VersionTLS10 {
		extend(10, vector(2, numbers(h.groups)))
		extend(11, []byte{1, 0}) // uncompressed points
		extend(13, vector(2, numbers([]uint16{0x0403, 0x0503, 0x0603, 0x0804, 0x0805, 0x0806, 0x0401, 0x0501, 0x0601, 0x0203, 0x0201})))
		extend(35, nil) // session ticket
		var protocols []byte
		for _, p := range h.alpn {
			protocols = append(protocols, vector(1, []byte(p))...)
		}
		if len(protocols) > 0 {
			extend(16, vector(2, protocols))
		}
	}
	if h.versions != nil {
		extend(43, vector(1, numbers(h.versions)))
		extend(51, vector(2)) // no key shares: the server says which group it wants
	}
	random := make([]byte, 32)
	rand.Read(random)
	body := slices.Concat(numbers([]uint16{h.version}), random, vector(1), vector(2, numbers(h.suites)), vector(1, h.compression))
	if extensions != nil {
		body = append(body, vector(2, extensions)...)
	}
	message := append([]byte{1}, vector(3, body)...)
	return slices.Concat([]byte{22}, numbers([]uint16{h.record}), vector(2, message))
}

// reply is what the server chose.
type reply struct {
	version, suite, group uint16
	compression           byte
	ticket                bool // it wants to give one
	session               bool // it gave one an id
}

var errRefused = errors.New("refused")

// say sends a hello and reads the answer.
func (h hello) say(address string) (*reply, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := conn.Write(h.encode()); err != nil {
		return nil, err
	}
	var messages []byte
	found := &reply{}
	for met := false; ; {
		head := make([]byte, 5)
		if _, err := io.ReadFull(conn, head); err != nil {
			if met {
				return found, nil
			}
			return nil, fmt.Errorf("%w: %w", errRefused, err)
		}
		content := make([]byte, endian.BigEndian.Uint16(head[3:]))
		if _, err := io.ReadFull(conn, content); err != nil {
			return nil, err
		}
		if head[0] == 21 {
			return nil, fmt.Errorf("%w: alert %d", errRefused, content[len(content)-1])
		}
		if head[0] != 22 {
			return nil, fmt.Errorf("a record of type %d", head[0])
		}
		messages = append(messages, content...)
		for len(messages) >= 4 {
			size := int(messages[1])<<16 | int(messages[2])<<8 | int(messages[3])
			if len(messages) < 4+size {
				break
			}
			kind, body := messages[0], messages[4:4+size]
			messages = messages[4+size:]
			switch kind {
			case 2: // ServerHello, or HelloRetryRequest
				met = true
				found.read(body)
				if found.version == tls.VersionTLS13 {
					return found, nil
				}
			case 12: // ServerKeyExchange: named_curve, the group
				if body[0] == 3 {
					found.group = endian.BigEndian.Uint16(body[1:])
				}
			case 14: // ServerHelloDone
				return found, nil
			}
		}
	}
}

func (r *reply) read(body []byte) {
	r.version = endian.BigEndian.Uint16(body)
	session := int(body[34])
	r.session = session > 0
	body = body[35+session:]
	r.suite, r.compression = endian.BigEndian.Uint16(body), body[2]
	if len(body) < 5 {
		return
	}
	for body = body[5:]; len(body) >= 4; {
		id, size := endian.BigEndian.Uint16(body), int(endian.BigEndian.Uint16(body[2:]))
		content := body[4 : 4+size]
		switch id {
		case 35:
			r.ticket = true
		case 43:
			r.version = endian.BigEndian.Uint16(content)
		case 51:
			r.group = endian.BigEndian.Uint16(content)
		}
		body = body[4+size:]
	}
}

// every number that a suite or a group can have, in portions, without the two that
// are signals to the server.
func portions() (all [][]uint16) {
	var portion []uint16
	for n := range 1 << 16 {
		if n == 0x00ff || n == 0x5600 {
			continue
		}
		if portion = append(portion, uint16(n)); len(portion) == 4096 {
			all, portion = append(all, portion), nil
		}
	}
	return append(all, portion)
}

// chosen finds out all that the server accepts, by offering everything, and then
// everything but what it chose.
func chosen(t *testing.T, address string, offer func([]uint16) hello, choice func(*reply) uint16) (found []uint16) {
	t.Helper()
	for _, portion := range portions() {
		for len(portion) > 0 {
			r, err := offer(portion).say(address)
			if errors.Is(err, errRefused) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			n := choice(r)
			at := slices.Index(portion, n)
			if at < 0 {
				t.Fatalf("%#04x was chosen and not offered", n)
			}
			found, portion = append(found, n), slices.Delete(slices.Clone(portion), at, at+1)
		}
	}
	slices.Sort(found)
	return found
}

// someGroups are enough for any server, someSuites are any that TLS 1.3 and 1.2
// have with them.
var (
	someGroups = []uint16{29, 23, 24, 25}
	someSuites = []uint16{0x1301, 0x1302, 0x1303, 0xc02b, 0xc02c, 0xc02f, 0xc030, 0xcca8, 0xcca9, 0xc013, 0xc014, 0x002f, 0x0035, 0x009c, 0x000a, 0x0005}
	plain      = []byte{0}
	h2         = []string{"h2", "http/1.1"}
)

func offer12(suites []uint16) hello {
	return hello{record: 0x0301, version: tls.VersionTLS12, suites: suites, compression: plain, groups: someGroups, alpn: h2}
}

func offer13(suites []uint16) hello {
	return hello{record: 0x0301, version: tls.VersionTLS12, versions: []uint16{tls.VersionTLS13}, suites: suites, compression: plain, groups: someGroups, alpn: h2}
}

func groups12(groups []uint16) hello {
	h := offer12(someSuites)
	h.groups = groups
	return h
}

func groups13(groups []uint16) hello {
	h := offer13(someSuites)
	h.groups = groups
	return h
}

func names(ids []uint16) (all []string) {
	for _, id := range ids {
		all = append(all, tls.CipherSuiteName(id))
	}
	return all
}

// versions are those that the server accepts, with any suite. SSL 3.0 is 0x0300.
func versions(t *testing.T, address string) (found []uint16) {
	t.Helper()
	for _, version := range []uint16{0x0300, tls.VersionTLS10, tls.VersionTLS11, tls.VersionTLS12, tls.VersionTLS13} {
		h := offer12(someSuites)
		h.version, h.record = version, min(version, tls.VersionTLS10)
		if version == tls.VersionTLS13 {
			h = offer13(someSuites)
		}
		r, err := h.say(address)
		switch {
		case errors.Is(err, errRefused):
		case err != nil:
			t.Fatal(err)
		case r.version != version:
			t.Errorf("%#04x was offered, %#04x chosen", version, r.version)
		default:
			found = append(found, version)
		}
	}
	return found
}

// cache counts the sessions that a server wants to resume.
type cache struct{ put atomic.Int32 }

func (c *cache) Get(string) (*tls.ClientSessionState, bool) { return nil, false }
func (c *cache) Put(_ string, s *tls.ClientSessionState) {
	if s != nil {
		c.put.Add(1)
	}
}

// TestOnlyWhatIsConfiguredIsOffered looks at both listeners, with the versions
// of TLS that they have by default and with 1.2 as well.
func TestOnlyWhatIsConfiguredIsOffered(t *testing.T) {
	t.Parallel()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	suites13 := []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384, tls.TLS_CHACHA20_POLY1305_SHA256}
	ecdsa12 := []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256}
	rsa12 := []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256}
	classic := []uint16{uint16(tls.CurveP256), uint16(tls.CurveP384), uint16(tls.CurveP521), uint16(tls.X25519)}
	modern := append(slices.Clone(classic), uint16(tls.SecP256r1MLKEM768), uint16(tls.X25519MLKEM768), uint16(tls.SecP384r1MLKEM1024))
	for name, c := range map[string]struct {
		settings string
		rsa      bool
		versions []uint16
		suites   []uint16 // of TLS 1.2
		groups   []uint16 // of TLS 1.2
	}{
		"by default":            {"tls", false, []uint16{tls.VersionTLS13}, nil, nil},
		"by default, with RSA":  {"tls", true, []uint16{tls.VersionTLS13}, nil, nil},
		"1.3, said so":          {"tls, min_version: 1.3", false, []uint16{tls.VersionTLS13}, nil, nil},
		"from 1.2 on":           {"tls, min_version: 1.2", false, []uint16{tls.VersionTLS12, tls.VersionTLS13}, ecdsa12, classic},
		"from 1.2 on, with RSA": {"tls, min_version: 1.2", true, []uint16{tls.VersionTLS12, tls.VersionTLS13}, rsa12, classic},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStage(t)
			authority := testca.New(t)
			s.tlsFiles(authority)
			if c.rsa {
				certificate, key := testca.PEM(t, authority.LeafFor(key, testca.Loopback))
				s.write("server.pem", string(certificate))
				s.write("server.key", string(key))
			}
			p := start(t, s.tlsConfig(c.settings, c.settings))
			for door, address := range map[string]string{"gRPC": p.address, "admin": p.admin} {
				if got := versions(t, address); !slices.Equal(got, c.versions) {
					t.Errorf("%s accepts versions %#04x, want %#04x", door, got, c.versions)
				}
				if got := chosen(t, address, offer13, func(r *reply) uint16 { return r.suite }); !slices.Equal(got, suites13) {
					t.Errorf("%s accepts with TLS 1.3 %v", door, names(got))
				}
				if got := chosen(t, address, groups13, func(r *reply) uint16 { return r.group }); !slices.Equal(got, modern) {
					t.Errorf("%s agrees on keys with TLS 1.3 by %v, want %v", door, got, modern)
				}
				if got := chosen(t, address, offer12, func(r *reply) uint16 { return r.suite }); !slices.Equal(got, c.suites) {
					t.Errorf("%s accepts with TLS 1.2 %v", door, names(got))
				}
				if got := chosen(t, address, groups12, func(r *reply) uint16 { return r.group }); !slices.Equal(got, c.groups) {
					t.Errorf("%s agrees on keys with TLS 1.2 by %v, want %v", door, got, c.groups)
				}
				if len(c.versions) == 2 {
					details12(t, door, address)
					s.renegotiation(address)
				}
			}
			sessions(t, p, authority, c.versions)
			protocols(t, p, authority)
			for what, certificates := range map[string][]tls.Certificate{
				"no certificate":      nil,
				"another authority's": {testca.New(t).Leaf(testca.Named("worker.example.com"))},
			} {
				for _, version := range c.versions {
					if isServed(t, p.address, &tls.Config{RootCAs: authority.Pool(), ServerName: "127.0.0.1", NextProtos: h2[:1], Certificates: certificates, MaxVersion: version}) {
						t.Errorf("%s is served over %s", what, tls.VersionName(version))
					}
				}
			}
		})
	}
}

// details12 are what TLS 1.2 could still get wrong.
func details12(t *testing.T, door, address string) {
	t.Helper()
	h := offer12(someSuites)
	h.compression = []byte{1, 0}
	r, err := h.say(address)
	if err != nil {
		t.Fatal(err)
	}
	if r.compression != 0 || r.ticket || r.session {
		t.Errorf("%s: compression %d, ticket %t, session id %t", door, r.compression, r.ticket, r.session)
	}
	h.compression = []byte{1}
	if r, err := h.say(address); !errors.Is(err, errRefused) {
		t.Errorf("%s with compression only: %+v, %v", door, r, err)
	}
	// A client that could do better than TLS 1.2 was made to try it
	// (TLS_FALLBACK_SCSV, RFC 7507).
	if r, err := offer12(append(slices.Clone(someSuites), 0x5600)).say(address); !errors.Is(err, errRefused) {
		t.Errorf("%s after a downgrade: %+v, %v", door, r, err)
	}
}

// renegotiation needs a client that can ask for it, which Go's cannot.
func (s *stage) renegotiation(address string) {
	s.t.Helper()
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		s.t.Log("renegotiation is not tried, because openssl is not here")
		return
	}
	// OpenSSL gives up by itself when what the server says first (settings of
	// HTTP/2) comes while it waits for the answer: that tells nothing.
	out, err := s.askToRenegotiate(openssl, address)
	for range 20 {
		if !strings.Contains(out, "unexpected record") {
			break
		}
		out, err = s.askToRenegotiate(openssl, address)
	}
	if err == nil || !strings.Contains(out, "RENEGOTIATING") || !strings.Contains(out, "alert unexpected message") {
		s.t.Errorf("%s: renegotiation is not refused: %v\n%s", address, err, out)
	}
}

// askToRenegotiate returns what OpenSSL says, and how it ended.
func (s *stage) askToRenegotiate(openssl, address string) (string, error) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, openssl, "s_client", "-connect", address, "-tls1_2", "-legacy_renegotiation", "-no_ign_eof", "-alpn", "h2",
		"-cert", s.path("client.pem"), "-key", s.path("client.key"))
	in, err := cmd.StdinPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	defer in.Close()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	_, _ = io.WriteString(in, "R\n") // the answer is in the output
	err = cmd.Wait()
	if ctx.Err() != nil {
		s.t.Fatalf("%s: openssl does not end\n%s", address, &out)
	}
	return out.String(), err
}

// isServed reports whether the server sends anything after the handshake. A server
// of HTTP/2 begins with its settings.
func isServed(t *testing.T, address string, settings *tls.Config) bool {
	t.Helper()
	conn, err := tls.Dial("tcp", address, settings)
	if err != nil {
		return false
	}
	defer conn.Close()
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	_, err = conn.Read(make([]byte, 1))
	if errors.Is(err, context.DeadlineExceeded) {
		t.Fatal("the connection is left open")
	}
	return err == nil
}

// sessions must not be resumed: that would skip what has changed since.
func sessions(t *testing.T, p *process, authority *testca.Authority, versions []uint16) {
	t.Helper()
	for _, version := range versions {
		c := &cache{}
		settings := &tls.Config{
			RootCAs: authority.Pool(), ServerName: "127.0.0.1", NextProtos: h2[:1], MaxVersion: version, ClientSessionCache: c,
			Certificates: []tls.Certificate{authority.Leaf(testca.Named("worker.example.com"))},
		}
		if !isServed(t, p.address, settings) {
			t.Errorf("a good client is not served over %s", tls.VersionName(version))
		}
		conn, err := tls.Dial("tcp", p.admin, settings)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		if body, err := io.ReadAll(conn); err != nil || !bytes.Contains(body, []byte("200 OK")) {
			t.Errorf("admin over %s: %q, %v", tls.VersionName(version), body, err)
		}
		conn.Close()
		if n := c.put.Load(); n != 0 {
			t.Errorf("%d sessions can be resumed over %s", n, tls.VersionName(version))
		}
	}
}

// protocols: gRPC is HTTP/2, and nothing else (ALPN, RFC 7301). The admin address
// is HTTP/1.1: what HTTP/2 can be attacked by, it need not withstand.
func protocols(t *testing.T, p *process, authority *testca.Authority) {
	t.Helper()
	worker := []tls.Certificate{authority.Leaf(testca.Named("worker.example.com"))}
	for _, offered := range [][]string{nil, {"http/1.1"}, {"h3"}, {"h2c"}, {"http/1.1", "h3"}} {
		if isServed(t, p.address, &tls.Config{RootCAs: authority.Pool(), ServerName: "127.0.0.1", NextProtos: offered, Certificates: worker}) {
			t.Errorf("gRPC serves who offers %q", offered)
		}
	}
	for _, offered := range [][]string{{"h2"}, {"http/1.1", "h2"}} {
		if !isServed(t, p.address, &tls.Config{RootCAs: authority.Pool(), ServerName: "127.0.0.1", NextProtos: offered, Certificates: worker}) {
			t.Errorf("gRPC does not serve who offers %q", offered)
		}
	}
	for _, offered := range [][]string{{"h2"}, {"h2", "http/1.1"}} {
		conn, err := tls.Dial("tcp", p.admin, &tls.Config{RootCAs: authority.Pool(), ServerName: "127.0.0.1", NextProtos: offered, Certificates: worker})
		if err != nil {
			continue // no protocol in common
		}
		if protocol := conn.ConnectionState().NegotiatedProtocol; protocol == "h2" {
			t.Errorf("admin takes %s from who offers %q", protocol, offered)
		}
		// Nor is it taken without being agreed upon.
		_, _ = io.WriteString(conn, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
		if answer, err := io.ReadAll(conn); !bytes.HasPrefix(answer, []byte("HTTP/1.1 ")) {
			t.Errorf("admin answers HTTP/2 with %q, %v", answer, err)
		}
		conn.Close()
	}
}
