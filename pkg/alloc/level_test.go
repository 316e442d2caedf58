package alloc_test

import (
	"testing"
	"time"

	"github.com/nsalloc/nsalloc/pkg/alloc"
)

func TestLevel(t *testing.T) {
	start := time.Date(2026, 2, 3, 4, 5, 6, 0, time.UTC)
	at := func(d time.Duration) time.Time { return start.Add(d) }
	var g alloc.Gauge
	c := func(next uint64) *alloc.Counter { return &alloc.Counter{Generation: 3, Next: next} }
	if l := g.Level(c(100), start); l.Left != alloc.MaxCounter-99 || l.Generations != int(alloc.MaxGeneration)-3 || l.Over != 0 || l.Burn != 0 || !l.RunsOut.IsZero() {
		t.Errorf("nothing was seen: %+v", l)
	}
	g.See(c(100), start)
	if l := g.Level(c(100), start); l.Over != 0 || l.Burn != 0 {
		t.Errorf("no time has passed: %+v", l)
	}
	if l := g.Level(c(100), at(time.Hour)); l.Over != time.Hour || l.Burn != 0 || !l.RunsOut.IsZero() {
		t.Errorf("nothing was taken: %+v", l)
	}
	// Ten a second for two hours, in steps of a second: the last hour is told.
	for s := range 7200 {
		g.See(c(100+uint64(s)*10), at(time.Duration(s)*time.Second))
	}
	now := at(7200 * time.Second)
	if l := g.Level(c(100+72000), now); l.Burn < 9.99 || l.Burn > 10.01 || l.Over < 59*time.Minute || l.Over > 62*time.Minute || !l.RunsOut.IsZero() {
		t.Errorf("%+v", l)
	}
	// Nothing for ten hours, and then a million.
	if l := g.Level(c(100+72000+1_000_000), now.Add(10*time.Hour)); l.Over < 10*time.Hour || l.Burn < 27 || l.Burn > 28 {
		t.Errorf("after a pause: %+v", l)
	}
	// A billion a second: the half that is left lasts 39 hours.
	g = alloc.Gauge{}
	g.See(c(1<<47), now)
	l := g.Level(c(1<<47+3600e9), now.Add(time.Hour))
	if l.Left != 1<<47-3600e9 || l.Burn != 1e9 || l.RunsOut.Sub(now.Add(time.Hour)).Round(time.Hour) != 38*time.Hour {
		t.Errorf("%+v, %v", l, l.RunsOut.Sub(now))
	}
	// What was before a new generation, or before the counter or the clock went back, says nothing.
	for name, see := range map[string]func() alloc.Level{
		"a new generation": func() alloc.Level {
			n := &alloc.Counter{Generation: 4, Next: 1 << 40}
			if l := g.Level(n, now.Add(time.Hour)); l.Over != 0 {
				t.Errorf("before it was seen: %+v", l)
			}
			g.See(n, now.Add(time.Hour))
			return g.Level(n, now.Add(time.Hour))
		},
		"the counter went back": func() alloc.Level {
			g.See(c(5), now.Add(2*time.Hour))
			return g.Level(c(5), now.Add(2*time.Hour))
		},
		"the clock went back": func() alloc.Level { g.See(c(9), start); return g.Level(c(9), start) },
	} {
		if l := see(); l.Over != 0 || l.Burn != 0 || !l.RunsOut.IsZero() {
			t.Errorf("%s: %+v", name, l)
		}
	}
	g = alloc.Gauge{}
	if l := g.Level(&alloc.Counter{Generation: alloc.MaxGeneration, Next: alloc.MaxCounter + 1}, now); l.Left != 0 || l.Generations != 0 {
		t.Errorf("all is used up: %+v", l)
	}
}
