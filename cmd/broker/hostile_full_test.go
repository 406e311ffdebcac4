//go:build hostile

package main

import "time"

// How hard TestHostileCallers tries.
const (
	hostileConnections = 1000
	hostileTime        = 20 * time.Second
)
