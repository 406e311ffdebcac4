// Package testh2 speaks HTTP/2 to a gRPC server the way no well-behaved client
// does: frame by frame.
package testh2

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// patience is how long an answer may take.
const patience = 30 * time.Second

// Conn is a connection that says what a test wants it to say. One goroutine may
// write while another reads.
type Conn struct {
	net.Conn
	// Framer writes and reads frames. Its reads are of headers as a whole.
	Framer *http2.Framer

	header  bytes.Buffer
	encoder *hpack.Encoder
	next    uint32
}

// Dial connects and introduces itself. Without settings it does so without TLS.
func Dial(address string, settings *tls.Config) (*Conn, error) {
	raw, err := net.DialTimeout("tcp", address, patience)
	if err != nil {
		return nil, err
	}
	if settings != nil {
		settings = settings.Clone()
		settings.NextProtos = []string{"h2"}
		raw = tls.Client(raw, settings)
	}
	c := New(raw)
	if err := c.greet(); err != nil {
		raw.Close()
		return nil, fmt.Errorf("greeting %s: %w", address, err)
	}
	return c, nil
}

// New returns a connection on which nothing has been said yet.
func New(raw net.Conn) *Conn {
	c := &Conn{Conn: raw, Framer: http2.NewFramer(raw, raw), next: 1}
	c.Framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	c.Framer.AllowIllegalWrites = true
	c.encoder = hpack.NewEncoder(&c.header)
	return c
}

func (c *Conn) greet() error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
		return err
	}
	if err := c.Framer.WriteSettings(); err != nil {
		return err
	}
	return c.SetDeadline(time.Time{})
}

// Block encodes the headers of a call, and more after them.
func (c *Conn) Block(method string, more ...hpack.HeaderField) []byte {
	c.header.Reset()
	for _, f := range append([]hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: method}, {Name: ":authority", Value: "broker"},
		{Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"},
	}, more...) {
		_ = c.encoder.WriteField(f) // a buffer takes all
	}
	return bytes.Clone(c.header.Bytes())
}

// Begin sends the headers of a call, and returns its stream.
func (c *Conn) Begin(method string, more ...hpack.HeaderField) (stream uint32, err error) {
	stream = c.next
	c.next += 2
	return stream, c.Framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: c.Block(method, more...), EndHeaders: true})
}

// Send sends a message whole, and ends the stream.
func (c *Conn) Send(stream uint32, message []byte) error {
	return c.Framer.WriteData(stream, true, Prefixed(len(message), message))
}

// Prefixed is a gRPC message that claims to have size bytes.
func Prefixed(size int, message []byte) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(size)), message...)
}

// Answer is how a stream, or the whole connection, ended.
type Answer struct {
	Status  string // of gRPC; empty if there was none
	Message string
	Reset   http2.ErrCode // of the stream
	Away    http2.ErrCode // of the connection; ErrCodeNo if it stays
	Debug   string        // what the server said when it sent the caller away
}

// Await reads until the stream has ended, or the server sends the caller away;
// stream 0 waits for that. It answers settings and pings.
func (c *Conn) Await(stream uint32) (Answer, error) {
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return Answer{}, err
	}
	var a Answer
	for {
		frame, err := c.Framer.ReadFrame()
		if err != nil {
			return a, err
		}
		switch f := frame.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				err = c.Framer.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				err = c.Framer.WritePing(true, f.Data)
			}
		case *http2.GoAwayFrame:
			a.Away, a.Debug = f.ErrCode, string(f.DebugData())
			return a, nil
		case *http2.RSTStreamFrame:
			if f.StreamID == stream {
				a.Reset = f.ErrCode
				return a, nil
			}
		case *http2.MetaHeadersFrame:
			if f.StreamID != stream {
				break
			}
			for _, h := range f.Fields {
				switch strings.ToLower(h.Name) {
				case "grpc-status":
					a.Status = h.Value
				case "grpc-message":
					a.Message = h.Value
				}
			}
			if f.StreamEnded() {
				return a, nil
			}
		}
		if err != nil {
			return a, err
		}
	}
}

// Ping asks for an answer and waits for it.
func (c *Conn) Ping() error {
	if err := c.Framer.WritePing(false, [8]byte{1}); err != nil {
		return err
	}
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	for {
		frame, err := c.Framer.ReadFrame()
		if err != nil {
			return err
		}
		switch f := frame.(type) {
		case *http2.GoAwayFrame:
			return fmt.Errorf("sent away: %s", f.DebugData())
		case *http2.PingFrame:
			if f.IsAck() {
				return nil
			}
			err = c.Framer.WritePing(true, f.Data)
		case *http2.SettingsFrame:
			if !f.IsAck() {
				err = c.Framer.WriteSettingsAck()
			}
		}
		if err != nil {
			return err
		}
	}
}

// Drain reads and forgets until the connection ends.
func (c *Conn) Drain() {
	_ = c.SetReadDeadline(time.Time{}) // a closed one ends the copy at once
	_, _ = io.Copy(io.Discard, c.Conn)
}
