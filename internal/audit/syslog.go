package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

// Syslog is a syslog server. Lines are sent as messages of RFC 5424: as
// datagrams, or over TCP in frames of RFC 6587 section 3.4.1. Over a unix socket
// that is a stream, as some have it, "\n" ends a message.
type Syslog struct {
	// Network is "unix", "udp" or "tcp".
	Network string
	// Address is a path, or host:port.
	Address string
	// Facility by its name in syslog.conf; empty is authpriv.
	Facility string
}

// facilities are the codes of RFC 5424 section 6.2.1.
var facilities = map[string]int{
	"user": 1, "daemon": 3, "auth": 4, "": 10, "authpriv": 10,
	"local0": 16, "local1": 17, "local2": 18, "local3": 19, "local4": 20, "local5": 21, "local6": 22, "local7": 23,
}

const (
	informational = 6

	// dialTime and sendTime bound an attempt, in which events pile up.
	dialTime, sendTime = 2 * time.Second, 2 * time.Second

	// longestDatagram is what receivers take: RFC 5424 wants 2 KiB of them,
	// those in use take 8 KiB.
	longestDatagram = 8<<10 - 512
)

// syslog keeps a connection to a server.
type syslog struct {
	Syslog
	priority string // and what else begins every message, up to the time
	origin   string // and what comes after it
	gone     func() // called when a server has ended the connection

	conn    net.Conn
	stream  bool          // of bytes, not of datagrams
	ended   *atomic.Bool  // of conn, by the server
	watched chan struct{} // closed when conn is no longer watched
	framed  []byte        // messages as they are sent
	lengths []frame
}

// frame says where a line and its message end.
type frame struct{ line, message int }

func newSyslog(s Syslog, gone func()) *syslog {
	host, err := os.Hostname()
	if err != nil || host == "" || len(host) > 255 || strings.ContainsFunc(host, func(r rune) bool { return r < '!' || r > '~' }) {
		host = "-"
	}
	return &syslog{
		Syslog: s, gone: gone,
		priority: fmt.Sprintf("<%d>1 ", facilities[s.Facility]<<3|informational),
		origin:   fmt.Sprintf(" %s token-broker %d audit - ", host, os.Getpid()),
	}
}

func (s *syslog) longest() int {
	if s.Network == "tcp" {
		return longestLine
	}
	return longestDatagram
}

func (s *syslog) reopen() error { return nil }

func (s *syslog) close() {
	if s.conn == nil {
		return
	}
	s.conn.Close()
	<-s.watched
	s.conn = nil
}

// write sends each line as a message. A connection that was good before and no
// longer is, is made anew at once: the server was restarted.
func (s *syslog) write(ctx context.Context, lines []byte) (int, error) {
	if s.conn != nil && s.ended.Load() {
		s.close()
	}
	sent := 0
	if s.conn != nil {
		n, err := s.send(lines)
		if err == nil {
			return n, nil
		}
		s.close()
		if isTimeout(err) { // it is there, and does not read
			return n, s.failed(err)
		}
		sent = n
	}
	if err := s.dial(ctx); err != nil {
		return sent, s.failed(err)
	}
	n, err := s.send(lines[sent:])
	if err != nil {
		s.close()
		return sent + n, s.failed(err)
	}
	return sent + n, nil
}

func (s *syslog) failed(err error) error {
	return fmt.Errorf("sending to the syslog server at %s:%s: %w", s.Network, s.Address, err)
}

func isTimeout(err error) bool {
	var timeout net.Error
	return errors.As(err, &timeout) && timeout.Timeout()
}

func (s *syslog) dial(ctx context.Context) error {
	network := s.Network
	if network == "unix" {
		network = "unixgram"
	}
	d := net.Dialer{Timeout: dialTime}
	conn, err := d.DialContext(ctx, network, s.Address)
	if errors.Is(err, syscall.EPROTOTYPE) { // the socket is a stream
		network = "unix"
		conn, err = d.DialContext(ctx, network, s.Address)
	}
	if err != nil {
		return err
	}
	s.conn, s.stream, s.ended, s.watched = conn, network == "unix" || network == "tcp", &atomic.Bool{}, make(chan struct{})
	if !s.stream {
		close(s.watched)
		return nil
	}
	go func() {
		defer close(s.watched)
		// A server sends nothing. That it has ended the connection a write would
		// not tell before the next but one.
		_, _ = io.Copy(io.Discard, conn)
		s.ended.Store(true)
		s.gone()
	}()
	return nil
}

// send sends lines, and returns how many bytes of whole lines were sent.
func (s *syslog) send(lines []byte) (int, error) {
	if err := s.conn.SetWriteDeadline(time.Now().Add(sendTime)); err != nil {
		return 0, err
	}
	s.frame(lines)
	if s.stream {
		n, err := s.conn.Write(s.framed)
		done := 0
		for _, f := range s.lengths {
			if f.message <= n {
				done = f.line
			}
		}
		return done, err
	}
	begin, done := 0, 0
	for _, f := range s.lengths {
		if _, err := s.conn.Write(s.framed[begin:f.message]); err != nil {
			return done, err
		}
		begin, done = f.message, f.line
	}
	return done, nil
}

// frame makes messages of lines.
func (s *syslog) frame(lines []byte) {
	s.framed, s.lengths = s.framed[:0], s.lengths[:0]
	now := time.Now().UTC().Format(timeFormat)
	for at := 0; at < len(lines); {
		n := bytes.IndexByte(lines[at:], '\n')
		if s.Network == "tcp" {
			s.framed = strconv.AppendInt(s.framed, int64(len(s.priority)+len(now)+len(s.origin)+n), 10)
			s.framed = append(s.framed, ' ')
		}
		s.framed = append(s.framed, s.priority...)
		s.framed = append(s.framed, now...)
		s.framed = append(s.framed, s.origin...)
		s.framed = append(s.framed, lines[at:at+n]...)
		if s.stream && s.Network == "unix" {
			s.framed = append(s.framed, '\n')
		}
		at += n + 1
		s.lengths = append(s.lengths, frame{line: at, message: len(s.framed)})
	}
}
