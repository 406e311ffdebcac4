package sandbox_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/vantage/sandbox"
)

// serve runs the server until the returned stop, which reports Serve's error.
func serve(t *testing.T, server *sandbox.Server) (url string, stop func() error) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, listener) }()
	t.Cleanup(cancel)
	return "http://" + listener.Addr().String(), func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(30 * time.Second):
			return errors.New("serving goes on")
		}
	}
}

func TestServeRemembersOverARestart(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	url, stop := serve(t, r.Server)
	r.url = url
	rt := r.consent().field(t, "refresh_token")
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.try(r.postForm(tokenPath, r.form(r.invoices()...))); err == nil {
		t.Error("an answer from a stopped server")
	}
	r.url, stop = serve(t, r.Server)
	r.want(r.refresh("review", rt), http.StatusOK, "")
	if err := stop(); err != nil {
		t.Fatal(err)
	}
}

func TestServeLetsGoOfWhatHangs(t *testing.T) {
	r := newRig(t, sandbox.Options{})
	url, stop := serve(t, r.Server)
	r.url = url
	hangs := make(chan struct{})
	if err := r.Fault(sandbox.Fault{Hang: true, Hook: func() { close(hangs) }}); err != nil {
		t.Fatal(err)
	}
	request := r.postForm(tokenPath, r.form(r.invoices()...))
	answered := make(chan error, 1)
	go func() {
		_, err := r.try(request)
		answered <- err
	}()
	<-hangs
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if err := <-answered; !errors.Is(err, io.EOF) {
		t.Errorf("error %v, want a closed connection", err)
	}
}

func TestServeRefusesOtherAddresses(t *testing.T) {
	server, err := sandbox.New(sandbox.Options{})
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Skip("this machine has no such address:", err)
	}
	err = server.Serve(t.Context(), listener)
	if err == nil || !strings.Contains(err.Error(), "not a loopback address") {
		t.Errorf("error %v", err)
	}
	if _, err := listener.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the listener is open: %v", err)
	}
}
