//go:build !race

package main

const (
	watchers           = 10_000
	watcherRounds      = 3
	watcherConnections = 50
	raceEnabled        = false
)
