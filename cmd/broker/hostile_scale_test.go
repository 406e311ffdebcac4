//go:build !hostile

package main

import "time"

// How hard TestHostileCallers tries. The build tag "hostile" has the full size.
const (
	hostileConnections = 140
	hostileTime        = time.Second
)
