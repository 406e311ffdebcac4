//go:build faults || kills

package fleet_test

import (
	"slices"
	"time"
)

func quantile[T int | time.Duration](of []T, q float64) T {
	sorted := slices.Clone(of)
	slices.Sort(sorted)
	return sorted[int(q*float64(len(sorted)-1))]
}
