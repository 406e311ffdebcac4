//go:build !race

package main

const (
	watchers           = 10_000
	watcherConnections = 50
	raceEnabled        = false
)
