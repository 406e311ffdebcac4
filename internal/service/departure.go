package service

import (
	"google.golang.org/grpc/mem"
)

// departure tells when a message has left for the network. SendMsg returns when
// grpc-go has queued it, up to 64 KiB of them for each stream, and a reader that
// is slow would get a queue of old tokens. grpc-go gives a message's buffer back
// once all of it is written, or will never be: that is the sign.
type departure struct {
	gone    chan struct{}
	waiting bool // for the last message; it belongs to the stream's goroutine
}

func newDeparture() *departure { return &departure{gone: make(chan struct{}, 1)} }

// buffer holds the data, which nothing must change any more, for one message.
func (d *departure) buffer(data *[]byte) mem.BufferSlice {
	return mem.BufferSlice{mem.NewBuffer(data, d)}
}

// leastData is a capacity from which on mem tells what becomes of its buffers.
const leastData = 1<<10 + 1

// Put implements mem.BufferPool: nobody needs the data any more.
func (d *departure) Put(*[]byte) {
	select {
	case d.gone <- struct{}{}:
	default:
	}
}

// Get implements mem.BufferPool; nobody calls it.
func (d *departure) Get(length int) *[]byte {
	data := make([]byte, length)
	return &data
}

// prepared is a message that is encoded already.
type prepared struct {
	data *[]byte
	by   *departure
}
