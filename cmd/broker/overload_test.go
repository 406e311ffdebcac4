//go:build hostile

package main

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/tokenbroker/tokenbroker/internal/testh2"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// load is what came of calls.
type load struct {
	ok, refused, lost int
	served, told      time.Duration // p99 of those served, and of those refused
}

func (l load) String() string {
	return fmt.Sprintf("%d served, p99 %s; %d refused, p99 %s; %d without an answer", l.ok, l.served, l.refused, l.told, l.lost)
}

// press is so many callers, for some time, who call again as soon as they are
// answered, or a second after they were refused.
func press(t *testing.T, address string, callers int, d time.Duration) load {
	t.Helper()
	const connections = 10
	var mu sync.Mutex
	var served, told []time.Duration
	sent, early := 0, 0
	settled := time.Now().Add(d / 4) // all come at once; that is not what counts
	var calling sync.WaitGroup
	for range connections {
		c, err := testh2.Dial(address, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		var began sync.Map // by stream
		room := make(chan struct{}, callers/connections)
		calling.Go(func() { // answers
			if err := c.SetReadDeadline(time.Now().Add(2 * d)); err != nil {
				t.Error(err)
			}
			ok := map[uint32]bool{}
			for {
				frame, err := c.Framer.ReadFrame()
				if err != nil {
					return
				}
				switch f := frame.(type) {
				case *http2.DataFrame:
					ok[f.StreamID] = true
				case *http2.MetaHeadersFrame:
					if !f.StreamEnded() {
						continue
					}
					at, _ := began.LoadAndDelete(f.StreamID)
					took := time.Since(at.(time.Time))
					mu.Lock()
					if at.(time.Time).Before(settled) {
						early++
					} else if ok[f.StreamID] {
						served = append(served, took)
					} else {
						told = append(told, took)
					}
					mu.Unlock()
					if ok[f.StreamID] {
						<-room
					} else { // as it was told
						time.AfterFunc(time.Second/2+rand.N(time.Second), func() { <-room })
					}
					delete(ok, f.StreamID)
				}
			}
		})
		calling.Go(func() { // calls
			end := time.After(d)
			for stream := uint32(1); ; stream += 2 {
				select {
				case <-end:
					return
				case room <- struct{}{}:
				}
				began.Store(stream, time.Now())
				_, err := c.Begin(pb.TokenBroker_IssueToken_FullMethodName)
				if err == nil {
					err = c.Send(stream, []byte("\n\binvoices"))
				}
				if err == nil && stream%1000 == 1 {
					err = c.Framer.WriteWindowUpdate(0, 1<<20) // for the answers
				}
				if err != nil {
					t.Errorf("calling: %v", err)
					return
				}
				mu.Lock()
				sent++
				mu.Unlock()
			}
		})
	}
	calling.Wait()
	p99 := func(all []time.Duration) time.Duration {
		if len(all) == 0 {
			return 0
		}
		slices.Sort(all)
		return all[len(all)*99/100]
	}
	return load{len(served), len(told), sent - early - len(served) - len(told), p99(served), p99(told)}
}

// With more callers than one processor can serve, those that are let in are
// served soon and the others know at once. Without limits all are late.
func TestOverloadIsAnsweredEarly(t *testing.T) {
	const callers = 5000 // ten times as many as are let in
	run := func(calls string) load {
		s := newStage(t)
		config := s.limited(t, "connection_streams: 100000, calls: "+calls)
		s.write("config.yaml", strings.Replace(read(t, config), "level: debug", "level: info", 1))
		p := start(t, config, "GOMAXPROCS=1")
		if got := command(t, "token", "invoices", "--address", p.address); got.status != 0 {
			t.Fatalf("%+v", got)
		}
		l := press(t, p.address, callers, 8*time.Second)
		t.Logf("calls: %-7s %s", calls, l)
		p.stop()
		return l
	}
	off, on := run("1000000"), run("500")
	if on.served > off.served/2 || on.told > off.served/2 {
		t.Errorf("with limits: %s; without: %s", on, off)
	}
	if on.lost > 0 || on.refused == 0 || on.ok == 0 {
		t.Errorf("with limits: %s", on)
	}
}
