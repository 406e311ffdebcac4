package main

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestWhoeverWatchesReadinessHasTimeToNotice(t *testing.T) {
	for name, c := range map[string]struct {
		asked []time.Duration // pauses before readiness is asked for
		pause time.Duration   // then, until the end
		want  time.Duration
	}{
		"nobody asks":                 {nil, 0, 0},
		"somebody asked once":         {[]time.Duration{0}, 0, 0},
		"a balancer asks":             {[]time.Duration{0, time.Second, time.Second}, time.Second, lingering},
		"Kubernetes asks":             {[]time.Duration{0, 10 * time.Second}, 9 * time.Second, lingering},
		"a balancer asked long ago":   {[]time.Duration{0, time.Second, time.Second}, watchedEvery, 0},
		"people ask now and then":     {[]time.Duration{0, time.Hour}, 0, 0},
		"as seldom as balancers do":   {[]time.Duration{0, watchedEvery - time.Second}, watchedEvery - time.Second, lingering},
		"more seldom than any of all": {[]time.Duration{0, 2 * watchedEvery}, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var r readiness
				for _, pause := range c.asked {
					time.Sleep(pause)
					r.asked()
					if missing := r.missing(); len(missing) > 0 {
						t.Errorf("missing from the beginning: %v", missing)
					}
				}
				time.Sleep(c.pause)
				if got := r.leave(); got != c.want {
					t.Errorf("it lingers for %v, want %v", got, c.want)
				}
				if len(r.missing()) == 0 {
					t.Error("it is ready while it leaves")
				}
			})
		})
	}
}
