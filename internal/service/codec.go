package service

import (
	"bytes"

	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that ours wraps
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

const (
	// largestRequest is more than twice what the largest valid request for a
	// token takes. The lists of CreateClient could be longer, if they had dozens
	// of addresses of 2,048 characters.
	largestRequest = 64 << 10
	// largestReceived is what is read of a message at all; gRPC itself refuses
	// more. Between the two, a request still gets an answer that says what is
	// wrong with it. It bounds what a caller can make the server hold with
	// messages that it sends half of: see docs/limits.md.
	largestReceived = largestRequest + 16<<10
)

// codec decodes requests, and marks those of ours that it cannot decode instead
// of failing: gRPC would answer INTERNAL, without details, before any of our
// code has run. The mark is an unknown field, which check finds.
type codec struct{ encoding.CodecV2 }

func newCodec() codec { return codec{encoding.GetCodecV2("proto")} }

// The marks, and what they mean. A caller that sends one itself gets the same
// answer.
var (
	tooLarge = mark(1)
	garbled  = mark(2)
)

// mark is the field with the highest number that there can be.
func mark(value uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(nil, protowire.MaxValidNumber, protowire.VarintType), value)
}

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if p, ok := v.(prepared); ok {
		return p.by.buffer(p.data), nil
	}
	return c.CodecV2.Marshal(v)
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(proto.Message)
	if !ok || !isOurs(m) {
		return c.CodecV2.Unmarshal(data, v)
	}
	if data.Len() > largestRequest {
		m.ProtoReflect().SetUnknown(tooLarge)
	} else if err := c.CodecV2.Unmarshal(data, v); err != nil {
		proto.Reset(m)
		m.ProtoReflect().SetUnknown(garbled)
	}
	return nil
}

// isOurs tells our messages from those of health and reflection.
func isOurs(m proto.Message) bool {
	return m.ProtoReflect().Descriptor().ParentFile().Package() == "tokenbroker.v1"
}

// undecoded says why a request was not decoded; empty if it was.
func undecoded(m proto.Message) string {
	switch unknown := m.ProtoReflect().GetUnknown(); {
	case bytes.Equal(unknown, tooLarge):
		return "the message is larger than 64 KiB, the most that is accepted"
	case bytes.Equal(unknown, garbled):
		return "not a valid protobuf message: a string with invalid UTF-8, or bytes that a broken client or another schema wrote"
	}
	return ""
}
