package service_test

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/broker"
	"github.com/tokenbroker/tokenbroker/internal/service"
	"github.com/tokenbroker/tokenbroker/internal/store"
	"github.com/tokenbroker/tokenbroker/internal/testh2"
)

// pipe is a connection in memory that seems to come from this machine.
type pipe struct{ net.Conn }

func (pipe) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

// pipes listens for connections in memory.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return pipe{c}, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { close(p.closed); return nil }
func (p *pipes) Addr() net.Addr { return pipe{}.RemoteAddr() }

// A caller that has vanished holds its streams for less than two minutes; one that
// is silent, but there, keeps them.
func TestVanishedCallerHoldsNothing(t *testing.T) {
	for name, c := range map[string]struct {
		answers       bool
		least, within time.Duration
	}{
		"vanished": {false, 0, 90 * time.Second},
		"silent":   {true, 4 * time.Minute, 7 * time.Minute}, // its age ends it
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				br := broker.New(store.NewMemory(), broker.Options{})
				defer br.Close()
				s, err := service.New(service.Options{Broker: br, Logger: slog.New(slog.DiscardHandler), Authorizer: access.NewAuthorizer()})
				if err != nil {
					t.Fatal(err)
				}
				ln := &pipes{make(chan net.Conn), make(chan struct{})}
				served := make(chan error, 1)
				go func() { served <- s.Serve(ln) }()
				defer func() {
					s.Stop()
					if err := <-served; err != nil {
						t.Errorf("serving: %v", err)
					}
				}()
				near, far := net.Pipe()
				ln.conns <- far
				began := time.Now()
				ended := make(chan error, 1)
				caller := testh2.New(near)
				said := make(chan struct{})
				go func() { ended <- read(caller, said, c.answers) }()
				if _, err := io.WriteString(near, http2.ClientPreface); err != nil {
					t.Fatal(err)
				}
				if err := caller.Framer.WriteSettings(); err != nil {
					t.Fatal(err)
				}
				stream, err := caller.Begin(healthpb.Health_Watch_FullMethodName)
				if err == nil {
					err = caller.Send(stream, nil)
				}
				if err != nil {
					t.Fatal(err)
				}
				close(said)
				err = <-ended
				if lasted := time.Since(began); !errors.Is(err, io.EOF) || lasted < c.least || lasted > c.within {
					t.Errorf("it lasted %v: %v", lasted, err)
				}
			})
		})
	}
}

// read reads all there is, and answers pings or does not, once all else is said.
func read(c *testh2.Conn, said <-chan struct{}, answers bool) error {
	for {
		frame, err := c.Framer.ReadFrame()
		if err != nil {
			return err
		}
		if p, ok := frame.(*http2.PingFrame); ok && answers && !p.IsAck() {
			<-said
			if err := c.Framer.WritePing(true, p.Data); err != nil {
				return err
			}
		}
	}
}
