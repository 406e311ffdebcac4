package service_test

import (
	"net"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/tokenbroker/tokenbroker/internal/access"
	"github.com/tokenbroker/tokenbroker/internal/testh2"

	pb "github.com/tokenbroker/tokenbroker/gen/tokenbroker/v1"
)

// What no client of gRPC would send claims no identity. The broker is on a socket
// where this process is a listed proxy, which gets in by its header alone.
func TestHeadersThatNoClientSends(t *testing.T) {
	const issue, whoami = pb.TokenBroker_IssueToken_FullMethodName, pb.TokenBroker_WhoAmI_FullMethodName
	field := func(name, value string) hpack.HeaderField { return hpack.HeaderField{Name: name, Value: value} }
	hop := field(access.EnvoyHeader, "URI="+batch)
	d := openDoors(t)
	for name, c := range map[string]struct {
		path     string
		headers  []hpack.HeaderField
		trailers []hpack.HeaderField
		in       bool
	}{
		"the header":                     {whoami, []hpack.HeaderField{hop}, nil, true},
		"none":                           {whoami, nil, nil, false},
		"in capitals":                    {whoami, []hpack.HeaderField{field("X-Forwarded-Client-Cert", hop.Value)}, nil, false},
		"in capitals, beside the header": {whoami, []hpack.HeaderField{hop, field("X-Forwarded-Client-Cert", hop.Value)}, nil, false},
		"in binary":                      {whoami, []hpack.HeaderField{field(access.EnvoyHeader+"-bin", "VVJJPXNwaWZmZTovL3Byb2QvbnMvYmF0Y2gvd29ya2Vy")}, nil, false},
		"in trailers":                    {whoami, nil, []hpack.HeaderField{hop}, false},
		"empty":                          {whoami, []hpack.HeaderField{field(access.EnvoyHeader, "")}, nil, false},
		"empty, and the header":          {whoami, []hpack.HeaderField{field(access.EnvoyHeader, ""), hop}, nil, false},
		"with a NUL":                     {whoami, []hpack.HeaderField{field(access.EnvoyHeader, hop.Value+"\x00")}, nil, false},
		"with a line break":              {whoami, []hpack.HeaderField{field(access.EnvoyHeader, hop.Value+"\r\nx: y")}, nil, false},
		"with letters of others":         {whoami, []hpack.HeaderField{field(access.EnvoyHeader, hop.Value+"é")}, nil, false},
		"after a blank":                  {whoami, []hpack.HeaderField{field(access.EnvoyHeader, " "+hop.Value)}, nil, false},
		"a pseudo header":                {whoami, []hpack.HeaderField{field(":"+access.EnvoyHeader, hop.Value)}, nil, false},
		"two authorities":                {whoami, []hpack.HeaderField{field(":authority", "other")}, nil, false},
		"a path without its slash":       {whoami[1:], []hpack.HeaderField{hop}, nil, false},
		"a path with two":                {"/" + whoami, []hpack.HeaderField{hop}, nil, false},
		"a path with health in it":       {"/grpc.health.v1.Health/../" + issue[1:], nil, nil, false},
		"gRPC-Web":                       {whoami, []hpack.HeaderField{field("content-type", "application/grpc-web+proto")}, nil, false},
		"a name of a connection":         {whoami, []hpack.HeaderField{hop, field("connection", access.EnvoyHeader)}, nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			raw, err := net.Dial("unix", d.socket.address)
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			conn := testh2.New(raw)
			if _, err := raw.Write([]byte(http2.ClientPreface)); err != nil {
				t.Fatal(err)
			}
			if err := conn.Framer.WriteSettings(); err != nil {
				t.Fatal(err)
			}
			stream, err := conn.Begin(c.path, c.headers...)
			if err != nil {
				t.Fatal(err)
			}
			if c.trailers == nil {
				err = conn.Send(stream, nil)
			} else if err = conn.Framer.WriteData(stream, false, testh2.Prefixed(0, nil)); err == nil {
				block := conn.Block(c.path, c.trailers...)
				err = conn.Framer.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: block, EndHeaders: true, EndStream: true})
			}
			if err != nil {
				t.Fatal(err)
			}
			answer, err := conn.Await(stream)
			if in := err == nil && answer.Status == "0"; in != c.in {
				t.Errorf("got in: %t; %+v, %v", in, answer, err)
			}
		})
	}
}
