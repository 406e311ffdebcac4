package testredis

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"
)

// callTimeout for one command.
const callTimeout = 5 * time.Second

// Error is an error reply, for example "NOPERM this user has no permissions".
type Error string

func (e Error) Error() string { return string(e) }

// dialer runs commands, each over a connection of its own: what a test asks
// between two faults must not depend on a connection from before.
type dialer struct {
	address  string
	password string
	tls      *tls.Config // nil for none
}

func (d dialer) do(args ...any) (any, error) {
	conn, err := net.DialTimeout("tcp", d.address, callTimeout)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(callTimeout)); err != nil {
		return nil, err
	}
	if d.tls != nil {
		conn = tls.Client(conn, d.tls)
	}
	r := bufio.NewReader(conn)
	if d.password != "" {
		if _, err := call(conn, r, "AUTH", d.password); err != nil {
			return nil, err
		}
	}
	return call(conn, r, args...)
}

// call writes a command and reads its reply.
func call(w io.Writer, r *bufio.Reader, args ...any) (any, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", len(args))
	for _, a := range args {
		text := fmt.Sprint(a)
		fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(text), text)
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return nil, err
	}
	return read(r)
}

// read reads one RESP2 value. An error reply is the error, also as an element.
func read(r *bufio.Reader) (any, error) {
	line, err := r.ReadString('\n')
	if err != nil {
		return nil, err
	}
	line = strings.TrimSuffix(line, "\r\n")
	if line == "" {
		return nil, errors.New("redis sent an empty line")
	}
	kind, rest := line[0], line[1:]
	switch kind {
	case '+':
		return rest, nil
	case '-':
		return nil, Error(rest)
	}
	n, err := strconv.ParseInt(rest, 10, 64)
	if err != nil {
		return nil, fmt.Errorf("redis sent %q: %w", line, err)
	}
	switch {
	case kind == ':':
		return n, nil
	case n < 0:
		return nil, nil
	case kind == '$':
		b := make([]byte, n+2)
		if _, err := io.ReadFull(r, b); err != nil {
			return nil, err
		}
		return string(b[:n]), nil
	case kind == '*':
		values := make([]any, n)
		for i := range values {
			if values[i], err = read(r); err != nil {
				return nil, err
			}
		}
		return values, nil
	}
	return nil, fmt.Errorf("redis sent %q, which is no RESP2", line)
}
