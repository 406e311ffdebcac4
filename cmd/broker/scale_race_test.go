//go:build race

package main

// The race detector makes all that crowds do some ten times slower: it sees small
// ones. "make scale" has the large ones.
const (
	watchers           = 1_000
	watcherRounds      = 1
	watcherConnections = 10
	raceEnabled        = true
)
