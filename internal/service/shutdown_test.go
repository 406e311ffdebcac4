package service_test

import (
	"context"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/service"
	"github.com/tokenbroker/tokenbroker/internal/store"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// holding is a log that holds up whoever writes a certain line.
type holding struct {
	slog.Handler
	line          string
	held, release chan struct{}
}

func (h *holding) Enabled(context.Context, slog.Level) bool { return true }

func (h *holding) Handle(_ context.Context, r slog.Record) error {
	if r.Message == h.line {
		close(h.held)
		<-h.release
	}
	return nil
}

// What comes after the server's end, such as the end of the audit log, must find
// no handler that still runs, whatever became of its caller.
func TestShutdownWaitsForHandlers(t *testing.T) {
	log := &holding{Handler: slog.DiscardHandler, line: "caller asked who it is", held: make(chan struct{}), release: make(chan struct{})}
	br := broker.New(store.NewMemory(), broker.Options{})
	defer br.Close()
	s, err := service.New(service.Options{Broker: br, Logger: slog.New(log), Authorizer: access.NewAuthorizer()})
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		if err := s.Serve(ln); err != nil {
			t.Errorf("serving: %v", err)
		}
	})
	ctx, leave := context.WithCancel(t.Context())
	client := pb.NewTokenBrokerClient((&rig{t: t, address: ln.Addr().String()}).dial(nil))
	running.Go(func() { _ = whoami(ctx, client) })
	<-log.held
	leave()
	over, end := context.WithCancel(t.Context())
	end() // no time at all
	down := make(chan struct{})
	go func() {
		defer close(down)
		s.Shutdown(over)
	}()
	select {
	case <-down:
		t.Error("it is shut down, and a handler runs")
	case <-time.After(200 * time.Millisecond):
	}
	close(log.release)
	<-down
	running.Wait()
}
