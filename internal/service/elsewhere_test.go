package service_test

import (
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// far is a listener whose visitors come from that address.
type far struct {
	net.Listener
	from net.Addr
}

func (f far) Accept() (net.Conn, error) {
	conn, err := f.Listener.Accept()
	return farConn{conn, f.from}, err
}

type farConn struct {
	net.Conn
	from net.Addr
}

func (c farConn) RemoteAddr() net.Addr { return c.from }

// Without TLS nobody from elsewhere is served, however the listener came to be
// reachable.
func TestWithoutTLSNobodyFromElsewhereIsServed(t *testing.T) {
	r := newRig(t, rigOptions{})
	for from, code := range map[string]codes.Code{
		"127.0.0.1:50000": codes.OK, "127.9.9.9:50000": codes.OK, "[::1]:50000": codes.OK, "[::ffff:127.0.0.1]:50000": codes.OK,
		"192.0.2.1:50000": codes.Unavailable, "10.0.0.1:50000": codes.Unavailable, "0.0.0.0:50000": codes.Unavailable,
		"[2001:db8::1]:50000": codes.Unavailable, "[::ffff:192.0.2.1]:50000": codes.Unavailable, "[fe80::1]:50000": codes.Unavailable, "[::]:50000": codes.Unavailable,
	} {
		address, err := net.ResolveTCPAddr("tcp", from)
		if err != nil {
			t.Fatal(err)
		}
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go func() { _ = r.service.Serve(far{ln, address}) }() // ends with the rig
		conn, err := grpc.NewClient("passthrough:///"+ln.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		_, err = pb.NewTokenBrokerClient(conn).IssueToken(within(t, 10*time.Second), &pb.IssueTokenRequest{Profile: "invoices"})
		if d := detailsOf(err); d.code != code {
			t.Errorf("from %s: %v", from, err)
		}
		conn.Close()
	}
}
