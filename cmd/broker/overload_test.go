//go:build hostile

package main

import (
	"fmt"
	"slices"
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

// press makes calls at a rate, whether or not they are answered, and waits for
// the answers for as long again.
func press(t *testing.T, address string, rate int, d time.Duration) load {
	t.Helper()
	const connections = 10
	var mu sync.Mutex
	var served, told []time.Duration
	sent := 0
	var calling sync.WaitGroup
	for range connections {
		c, err := testh2.Dial(address, nil)
		if err != nil {
			t.Fatal(err)
		}
		began := map[uint32]time.Time{}
		var beganMu sync.Mutex
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
					beganMu.Lock()
					took := time.Since(began[f.StreamID])
					beganMu.Unlock()
					mu.Lock()
					if ok[f.StreamID] {
						served = append(served, took)
					} else {
						told = append(told, took)
					}
					mu.Unlock()
					delete(ok, f.StreamID)
				}
			}
		})
		calling.Go(func() { // calls, ten milliseconds' worth at a time
			ticker := time.NewTicker(10 * time.Millisecond)
			defer ticker.Stop()
			for end := time.Now().Add(d); time.Now().Before(end); <-ticker.C {
				for range rate / connections / 100 {
					beganMu.Lock()
					stream, err := c.Begin(pb.TokenBroker_IssueToken_FullMethodName)
					began[stream] = time.Now()
					beganMu.Unlock()
					if err == nil {
						err = c.Send(stream, []byte("\n\binvoices"))
					}
					if err == nil && stream%1000 == 1 {
						err = c.Framer.WriteWindowUpdate(0, 1<<24) // for the answers
					}
					if err != nil {
						return
					}
					mu.Lock()
					sent++
					mu.Unlock()
				}
			}
		})
		t.Cleanup(func() { c.Close() })
	}
	calling.Wait()
	p99 := func(all []time.Duration) time.Duration {
		if len(all) == 0 {
			return 0
		}
		slices.Sort(all)
		return all[len(all)*99/100]
	}
	return load{len(served), len(told), sent - len(served) - len(told), p99(served), p99(told)}
}

// Under four times what one processor can do, those that are let in are served
// as fast as ever and the others know at once; without limits all are late.
func TestOverloadIsAnsweredEarly(t *testing.T) {
	const limits = "connection_streams: 100000, connections: 100"
	run := func(calls string, rate int) load {
		p := start(t, newStage(t).limited(t, limits+", calls: "+calls), "GOMAXPROCS=1")
		if got := command(t, "token", "invoices", "--address", p.address); got.status != 0 {
			t.Fatalf("%+v", got)
		}
		l := press(t, p.address, rate, 5*time.Second)
		t.Logf("calls: %-8s %6d a second: %s", calls, rate, l)
		p.stop()
		return l
	}
	capacity := run("1000000", 60_000).ok / 10
	rate := max(4*capacity, 20_000)
	off, on := run("1000000", rate), run("500", rate)
	if on.served > time.Second || on.told > time.Second {
		t.Errorf("with limits: %s", on)
	}
	if on.lost > 0 || on.refused == 0 || on.ok < off.ok/10 {
		t.Errorf("with limits: %s; without: %s", on, off)
	}
	if off.lost == 0 && off.served < 2*on.served {
		t.Errorf("it was no overload: %s", off)
	}
}
