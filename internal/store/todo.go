package store

import (
	"context"

	"github.com/tokenbroker/tokenbroker/internal/broker"
)

func (m *Memory) Intend(context.Context, broker.Lease, broker.Presentation) (broker.IntendVerdict, error) {
	panic("to be written")
}

func (m *Memory) Drop(context.Context, broker.Drop) (broker.Dropped, error) { panic("to be written") }

func (m *Memory) Confirm(context.Context, string, string) error { panic("to be written") }

func (m *Memory) Restore(string, string, broker.StoredToken) { panic("to be written") }
