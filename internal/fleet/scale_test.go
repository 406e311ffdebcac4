//go:build !race

package fleet_test

// workers is how many jobs there are, half of them with a token of their own.
const workers = 10_000
