//go:build race

package fleet_test

// workers are fewer than "make scale" has, because the race detector makes callers
// some ten times slower.
const workers = 2_000
