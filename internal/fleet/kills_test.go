//go:build kills

package fleet_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"
)

// TestKills kills and stops replicas at every point of a refresh, in $KILLRUNS
// runs from the seed $KILLSEED, half of them at a server with a grace and half at
// a strict one, and prints what came of it.
func TestKills(t *testing.T) {
	runs, err := strconv.Atoi(os.Getenv("KILLRUNS"))
	if err != nil {
		runs = 1000
	}
	seed, err := strconv.ParseUint(os.Getenv("KILLSEED"), 10, 64)
	if err != nil {
		seed = rand.Uint64()
	}
	fmt.Printf("%d runs; to see them again: make kills KILLRUNS=%d KILLSEED=%d\n", runs, runs, seed)
	began := time.Now()
	outcomes := strikeOften(t, seed, runs/2, 24)
	fmt.Printf("\nafter %v\n\n", time.Since(began).Round(time.Second))
	sum(outcomes)
}

// sum prints the table.
func sum(outcomes []outcome) {
	type row struct {
		server, signal string
		phase          phase
	}
	type count struct{ runs, twice, gone int }
	rows, at := map[row]count{}, map[moment]int{}
	var since, open []time.Duration
	for _, o := range outcomes {
		at[o.at]++
		r := row{o.server(), o.signal(), o.phase}
		c := rows[r]
		c.runs++
		if o.presentations > 1 {
			c.twice++
		}
		if o.gone {
			c.gone++
			since = append(since, o.since)
		}
		rows[r] = c
		if o.open > 0 {
			open = append(open, o.open)
		}
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "server\tsignal\tstruck\truns\tpresented twice\tgrants lost")
	total := count{}
	for _, server := range []string{"grace", "strict"} {
		for _, signal := range []string{"SIGKILL", "SIGSTOP"} {
			for _, p := range []phase{unsent, onTheWay, inHand, unsaved, saved, putOff} {
				if c := rows[row{server, signal, p}]; c.runs > 0 {
					fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%d\n", server, signal, p, c.runs, c.twice, c.gone)
					total = count{total.runs + c.runs, total.twice + c.twice, total.gone + c.gone}
				}
			}
		}
	}
	fmt.Fprintf(w, "all\t\t\t%d\t%d\t%d\n", total.runs, total.twice, total.gone)
	w.Flush()
	var moments []string
	for _, m := range strikeMoments {
		moments = append(moments, fmt.Sprintf("%s %d", m, at[m]))
	}
	fmt.Printf("\nruns by moment: %s\n", strings.Join(moments, ", "))
	if len(since) > 0 {
		fmt.Printf("strikes that cost a grant, counted from the server's decision: %v to %v, median %v\n", quantile(since, 0), quantile(since, 1), quantile(since, .5))
	}
	if len(open) > 0 {
		fmt.Printf("from the server's decision to the save, when nobody is struck: median %v, p99 %v\n", quantile(open, .5), quantile(open, .99))
	}
}
