package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/tokenbroker/tokenbroker/internal/testca"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// turnover is a broker whose certificates are replaced all the time: the
// server's, and those of the authorities that clients' certificates come from.
type turnover struct {
	*process
	stage   *stage
	root    *testca.Authority // of the server's certificates
	version int
	old     *testca.Authority // of clients, still believed
	current atomic.Pointer[testca.Authority]

	calls, connections, dials atomic.Int64
}

// startTurnover mounts the files as Kubernetes does: names that lead through
// ..data, which is replaced.
func startTurnover(t *testing.T) *turnover {
	t.Helper()
	r := &turnover{stage: newStage(t), root: testca.New(t), old: testca.New(t)}
	r.current.Store(testca.New(t))
	if err := os.Mkdir(r.stage.path("tls"), 0o700); err != nil {
		t.Fatal(err)
	}
	r.swap(t, r.files(t, r.current.Load()))
	for _, name := range []string{"server.pem", "server.key", "ca.pem"} {
		if err := os.Symlink(filepath.Join("..data", name), r.stage.path("tls/"+name)); err != nil {
			t.Fatal(err)
		}
	}
	config := read(t, r.stage.config(`policy:`, `  - {callers: ["dns:*.example.com"], profiles: [invoices], allow: [issue]}`))
	r.process = start(t, r.stage.write("config.yaml", strings.Replace(config,
		`{address: "127.0.0.1:0"}`, `{address: "127.0.0.1:0", tls: {certificate: tls/server.pem, private_key: tls/server.key, client_ca: tls/ca.pem}}`, 1)))
	return r
}

// files are a new server certificate and its key, and the authorities that are
// believed: next, and the one that was it before.
func (r *turnover) files(t *testing.T, next *testca.Authority) map[string][]byte {
	certificate, key := testca.PEM(t, r.root.Leaf(testca.Loopback))
	return map[string][]byte{"server.pem": certificate, "server.key": key, "ca.pem": append(r.old.PEM(), next.PEM()...)}
}

// swap puts all files in place at once.
func (r *turnover) swap(t *testing.T, files map[string][]byte) {
	t.Helper()
	r.version++
	version := fmt.Sprintf("..%d", r.version)
	if err := os.Mkdir(r.stage.path("tls/"+version), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, content := range files {
		if err := os.WriteFile(r.stage.path("tls/"+version+"/"+name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	link := r.stage.path("tls/..data")
	if err := os.Symlink(version, link+".new"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(link+".new", link); err != nil {
		t.Fatal(err)
	}
	if r.version > 1 {
		if err := os.RemoveAll(r.stage.path(fmt.Sprintf("tls/..%d", r.version-1))); err != nil {
			t.Fatal(err)
		}
	}
}

// overwrite writes one file after the other where it is, the key only when the
// broker has seen the certificate without it.
func (r *turnover) overwrite(t *testing.T, files map[string][]byte) {
	t.Helper()
	const misfit = "its files do not fit together"
	seen := strings.Count(r.log.String(), misfit)
	for _, name := range []string{"ca.pem", "server.pem", "server.key"} {
		if name == "server.key" {
			r.await("the certificate is seen without its key", func() bool { return strings.Count(r.log.String(), misfit) > seen })
		}
		if err := os.WriteFile(r.stage.path("tls/"+name), files[name], 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// shows waits until the server shows a certificate, to a client of the newest
// authority.
func (r *turnover) shows(t *testing.T, certificate []byte, authority *testca.Authority) {
	t.Helper()
	client := authority.Leaf(testca.Named("probe.example.com"))
	r.await("the new certificates are in force", func() bool {
		conn, err := tls.Dial("tcp", r.address, &tls.Config{RootCAs: r.root.Pool(), ServerName: "127.0.0.1", NextProtos: []string{"h2"}, Certificates: []tls.Certificate{client}})
		if err != nil {
			t.Errorf("the server's certificate: %v", err)
			return true
		}
		defer conn.Close()
		shown := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: conn.ConnectionState().PeerCertificates[0].Raw})
		if !bytes.Equal(shown, certificate) {
			return false
		}
		// The verdict on ours comes with the first bytes of the other side.
		_ = conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		_, err = conn.Read(make([]byte, 1))
		return err == nil
	})
}

// client makes calls until stop: a few on each connection, which each has a
// certificate of its own. A client that stays keeps its first.
func (r *turnover) client(ctx context.Context, n int, stays bool) error {
	for ctx.Err() == nil {
		leaf := r.current.Load().Leaf(testca.Named(fmt.Sprintf("client%d.example.com", n)))
		conn, err := grpc.NewClient("passthrough:///"+r.address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{
			RootCAs: r.root.Pool(), ServerName: "127.0.0.1", Certificates: []tls.Certificate{leaf},
		})), grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) {
			if stays {
				r.dials.Add(1)
			}
			return (&net.Dialer{}).DialContext(ctx, "tcp", address)
		}))
		if err != nil {
			return err
		}
		r.connections.Add(1)
		for i := 0; ctx.Err() == nil && (i < 5 || stays); i++ {
			within, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			_, err := pb.NewTokenBrokerClient(conn).IssueToken(within, &pb.IssueTokenRequest{Profile: "invoices"})
			cancel()
			r.calls.Add(1)
			if err != nil {
				conn.Close()
				return fmt.Errorf("client %d, call %d on its connection: %w", n, i+1, err)
			}
		}
		conn.Close()
	}
	return nil
}

// TestCertificatesTurnOverUnderLoad replaces all certificates once a second under load, for
// $ROTATIONTIME (5s): half of the times at once, half one file after the other.
func TestCertificatesTurnOverUnderLoad(t *testing.T) {
	length := 5 * time.Second
	if v := os.Getenv("ROTATIONTIME"); v != "" {
		var err error
		if length, err = time.ParseDuration(v); err != nil {
			t.Fatalf("ROTATIONTIME: %v", err)
		}
	}
	r := startTurnover(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	const clients = 20
	failed := make(chan error, clients)
	var group sync.WaitGroup
	for n := range clients {
		group.Go(func() {
			if err := r.client(ctx, n, n == 0); err != nil {
				failed <- err
			}
		})
	}
	second := time.NewTicker(time.Second)
	defer second.Stop()
	rotations, slowest := 0, time.Duration(0)
	for began := time.Now(); time.Since(began) < length && len(failed) == 0; rotations++ {
		<-second.C
		next := testca.New(t)
		r.old = r.current.Load()
		files := r.files(t, next)
		written := time.Now()
		if rotations%2 == 0 {
			r.swap(t, files)
		} else {
			r.overwrite(t, files)
		}
		r.shows(t, files["server.pem"], next)
		slowest = max(slowest, time.Since(written))
		r.current.Store(next)
	}
	stop()
	group.Wait()
	close(failed)
	for err := range failed {
		t.Error(err)
	}
	t.Logf("%d rotations, the slowest in force after %s; %d calls on %d connections", rotations, slowest.Round(time.Millisecond), r.calls.Load(), r.connections.Load())
	if r.calls.Load() < 100 || r.connections.Load() < 2*clients || rotations < 2 {
		t.Error("that was no load")
	}
	if n := r.dials.Load(); n != 1 {
		t.Errorf("the client that stays has connected %d times", n)
	}
	if log := r.log.String(); strings.Contains(log, `"level":"ERROR"`) {
		t.Errorf("the log has errors:\n%s", log)
	}
	if _, metrics := r.get("/metrics"); !strings.Contains(metrics, `token_broker_config_reloads_total{result="failure"} 0`) {
		t.Error("reloads have failed")
	}
}
