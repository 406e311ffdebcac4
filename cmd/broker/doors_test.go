package main

import (
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/testca"
)

// visitor is who knocks at the console.
type visitor struct {
	certificate *tls.Certificate // nil: none
	header      http.Header
}

// consoleDoor is a broker whose console lets the holders of certificates in.
type consoleDoor struct {
	t         *testing.T
	stage     *stage
	authority *testca.Authority
	process   *process
}

func newConsoleDoor(t *testing.T, revoked ...tls.Certificate) *consoleDoor {
	t.Helper()
	d := &consoleDoor{t: t, stage: newStage(t), authority: testca.New(t)}
	d.stage.tlsFiles(d.authority)
	d.revoke(revoked...)
	d.stage.write("config.yaml", strings.Replace(read(t, d.stage.config(`policy:`,
		`  - {callers: ["dns:ops.example.com"], profiles: [invoices], allow: [admin]}`,
		`  - {callers: ["dns:worker.example.com"], profiles: [invoices], allow: [issue, refresh, watch, revoke]}`)),
		`admin: {address: "127.0.0.1:0"}`,
		`admin: {address: "127.0.0.1:0", tls: {certificate: server.pem, private_key: server.key, client_ca: ca.pem, client_crl: [crl.pem]}}`, 1))
	d.process = start(t, d.stage.path("config.yaml"))
	return d
}

// revoke writes the authority's list.
func (d *consoleDoor) revoke(certificates ...tls.Certificate) {
	var leaves []*x509.Certificate
	for _, c := range certificates {
		leaves = append(leaves, c.Leaf)
	}
	d.stage.write("crl.pem", string(testca.ListPEM(d.authority.RevocationList(nil, leaves...))))
}

// client keeps its connection, if it gets one.
func (d *consoleDoor) client(v visitor) *http.Client {
	settings := &tls.Config{RootCAs: d.authority.Pool()}
	if v.certificate != nil {
		// Shown whether or not the server asks for one of its authority.
		settings.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return v.certificate, nil }
	}
	transport := &http.Transport{TLSClientConfig: settings, ForceAttemptHTTP2: true}
	d.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Timeout: 20 * time.Second, Transport: transport}
}

// get returns 0 for who is turned away in the handshake.
func (d *consoleDoor) get(c *http.Client, v visitor, path string) (status int, body string) {
	d.t.Helper()
	r, err := http.NewRequest(http.MethodGet, "https://"+d.process.admin+path, nil)
	if err != nil {
		d.t.Fatal(err)
	}
	for name, values := range v.header {
		r.Header[name] = slices.Clone(values)
	}
	a, err := c.Do(r)
	if err != nil {
		return 0, err.Error()
	}
	defer a.Body.Close()
	b, err := io.ReadAll(a.Body)
	if err != nil {
		d.t.Fatal(err)
	}
	return a.StatusCode, string(b)
}

// Everybody whom the console must not let in, and how it turns them away. The
// door of the calls has the same table in internal/service.
func TestWhoDoesNotEnterTheConsole(t *testing.T) {
	t.Parallel()
	d := newConsoleDoor(t)
	leaf := func(a *testca.Authority, changes ...func(*x509.Certificate)) *tls.Certificate {
		c := a.Leaf(func(c *x509.Certificate) {
			for _, change := range changes {
				change(c)
			}
		})
		return &c
	}
	ops := testca.Named("ops.example.com")
	revoked := leaf(d.authority, ops)
	d.revoke(*revoked)
	d.process.await("the list is in force", func() bool {
		v := visitor{certificate: revoked}
		status, _ := d.get(d.client(v), v, "/")
		return status == 0
	})
	forged := `By=spiffe://prod/proxy;URI=spiffe://prod/ops;DNS=ops.example.com`
	for what, c := range map[string]struct {
		visitor
		status int
	}{
		"an operator":              {visitor{certificate: leaf(d.authority, ops)}, 200},
		"no certificate":           {visitor{}, 403},
		"another authority's":      {visitor{certificate: leaf(testca.New(t), ops)}, 0},
		"ended":                    {visitor{certificate: leaf(d.authority, ops, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })}, 0},
		"not begun":                {visitor{certificate: leaf(d.authority, ops, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(30 * time.Minute) })}, 0},
		"revoked":                  {visitor{certificate: revoked}, 0},
		"another name":             {visitor{certificate: leaf(d.authority, testca.Named("worker.example.com"))}, 404},
		"the name as common name":  {visitor{certificate: leaf(d.authority, func(c *x509.Certificate) { c.Subject.CommonName = "ops.example.com" })}, 403},
		"two names":                {visitor{certificate: leaf(d.authority, testca.Named("ops.example.com", "worker.example.com"))}, 403},
		"a server's certificate":   {visitor{certificate: leaf(d.authority, ops, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })}, 0},
		"an operator, two steps":   {visitor{certificate: leaf(d.authority.Intermediate("below"), ops)}, 200},
		"a forged header":          {visitor{header: http.Header{"X-Forwarded-Client-Cert": {forged}}}, 403},
		"two forged headers":       {visitor{header: http.Header{"X-Forwarded-Client-Cert": {forged, forged}}}, 403},
		"Linkerd's, forged":        {visitor{header: http.Header{"L5d-Client-Id": {"ops.example.com"}}}, 403},
		"a bearer token":           {visitor{header: http.Header{"Authorization": {"Bearer eyJhbGciOiJub25lIn0.e30."}}}, 403},
		"another name and forged":  {visitor{certificate: leaf(d.authority, testca.Named("worker.example.com")), header: http.Header{"X-Forwarded-Client-Cert": {forged}}}, 404},
		"a cookie that means none": {visitor{header: http.Header{"Cookie": {"__Host-broker-session=AAAA"}}}, 403},
	} {
		t.Run(what, func(t *testing.T) {
			client := d.client(c.visitor)
			status, body := d.get(client, c.visitor, "/profiles/invoices")
			if status != c.status {
				t.Errorf("%d, want %d: %s", status, c.status, body)
			}
			if status != 200 && strings.Contains(body, "client_credentials") {
				t.Errorf("it shows the profile: %s", body)
			}
		})
	}
}

// A connection that is open does not outlive the right to have one.
func TestRevokedWhileTheConsoleIsOpen(t *testing.T) {
	t.Parallel()
	d := newConsoleDoor(t)
	c := d.authority.Leaf(testca.Named("ops.example.com"))
	v := visitor{certificate: &c}
	client := d.client(v)
	if status, body := d.get(client, v, "/profiles/invoices"); status != 200 {
		t.Fatalf("%d: %s", status, body)
	}
	d.revoke(c)
	d.process.await("the open connection is refused", func() bool {
		status, _ := d.get(client, v, "/profiles/invoices")
		return status == 403
	})
}
