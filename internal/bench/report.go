package main

import (
	"fmt"
	"math"
	"slices"
	"sort"
	"strings"
	"time"
)

// results are what a run found.
type results struct {
	o       options
	rows    []row
	trials  map[string][]trial // by row, one a round
	missing map[string]string  // systems, and why
	notes   []string           // versions of what ran
	rounds  int                // that were measured
	took    time.Duration
}

func newResults(o options) *results {
	return &results{o: o, rows: o.rows(), trials: map[string][]trial{}}
}

// summary is the middle of some values, and their ends.
type summary struct{ median, least, most float64 }

func summarize(values []float64) summary {
	if len(values) == 0 {
		return summary{}
	}
	v := slices.Sorted(slices.Values(values))
	return summary{(v[(len(v)-1)/2] + v[len(v)/2]) / 2, v[0], v[len(v)-1]}
}

// of is a figure of all rounds of a row.
func (res *results) of(name string, figure func(trial) float64) summary {
	var values []float64
	for _, t := range res.trials[name] {
		values = append(values, figure(t))
	}
	return summarize(values)
}

func rate(t trial) float64 { return t.rate }

// ratio is a figure of two rows, taken within each round.
func (res *results) ratio(a, b string, figure func(a, b trial) float64) (summary, bool) {
	var values []float64
	for i := range min(len(res.trials[a]), len(res.trials[b])) {
		values = append(values, figure(res.trials[a][i], res.trials[b][i]))
	}
	return summarize(values), len(values) > 0
}

// verdict is a target with what was found; found is false where a row of it was not measured.
type verdict struct {
	target
	got        summary
	met, found bool
}

func (res *results) verdicts() (all []verdict) {
	for _, t := range targets {
		v := verdict{target: t}
		if t.least > 0 {
			v.got, v.found = res.ratio(t.ours, t.other, func(a, b trial) float64 { return a.rate / b.rate })
			v.met = v.got.median >= t.least
		} else {
			v.got, v.found = res.ratio(t.ours, t.other, func(a, b trial) float64 { return (a.p50 - b.p50).Seconds() * 1000 })
			v.met = v.got.median <= t.more
		}
		all = append(all, v)
	}
	return all
}

const chartName = "chart.svg"

// markdown is the whole report.
func (res *results) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Benchmarks\n\n")
	fmt.Fprintf(&b, "From `make bench`: %d rounds of %s for each row, each after a warm-up of %s, %s in all. The middle of the rounds,\n"+
		"and their least and most. Client and servers share one machine: %s. Read ratios, not figures.\n\n",
		res.rounds, res.o.time, res.o.warm, res.took.Round(time.Second), machine())
	fmt.Fprintf(&b, "![ids a second, logarithmic; nsalloc is blue](%s)\n", chartName)
	res.table(&b)
	res.targets(&b)
	res.explain(&b)
	return b.String()
}

func (res *results) table(b *strings.Builder) {
	group := ""
	for _, r := range res.rows {
		if r.group != group {
			group = r.group
			unit := "ids"
			if r.group == groupRegs {
				unit = "sandboxes"
			}
			fmt.Fprintf(b, "\n## %s\n\n| | load | %s/s | least..most | p50 | p99 | etcd commits/s | log entries/%s | CPU µs/%s |\n|---|---|--:|--:|--:|--:|--:|--:|--:|\n", group, unit, r.unit(), r.unit())
		}
		if why, ok := res.missing[r.on]; ok {
			fmt.Fprintf(b, "| %s | %s | missing: %s | | | | | | |\n", r.words, r.load.words(), why)
			continue
		}
		ids := res.of(r.name(), rate)
		p50 := res.of(r.name(), func(t trial) float64 { return float64(t.p50) })
		p99 := res.of(r.name(), func(t trial) float64 { return float64(t.p99) })
		commits, entries := "", ""
		if c := res.of(r.name(), func(t trial) float64 { return t.commits }); c.median > 0 {
			commits = count(c.median)
			entries = significant(res.of(r.name(), func(t trial) float64 { return t.entries }).median)
		}
		cpu := significant(res.of(r.name(), func(t trial) float64 { return t.callers.Seconds() * 1e6 }).median)
		if server := res.of(r.name(), func(t trial) float64 { return t.server.Seconds() * 1e6 }); server.median > 0 {
			cpu = significant(server.median) + " + " + cpu
		}
		times := fmt.Sprintf("%s | %s", duration(p50.median), duration(p99.median))
		if r.ask == "atomic" {
			times = " | " // it is not a call
		}
		fmt.Fprintf(b, "| %s | %s | %s | %s..%s | %s | %s | %s | %s |\n", r.words, r.load.words(), count(ids.median), count(ids.least), count(ids.most), times, commits, entries, cpu)
	}
}

func (res *results) targets(b *strings.Builder) {
	b.WriteString("\n## Targets\n\n| | target | here | least..most | |\n|---|--:|--:|--:|---|\n")
	for _, v := range res.verdicts() {
		want := fmt.Sprintf("at least %s", significant(v.least))
		if v.least == 0 {
			want = fmt.Sprintf("at most %s", significant(v.more))
		}
		switch {
		case !v.found:
			fmt.Fprintf(b, "| %s | %s | | | not measured |\n", v.words, want)
		default:
			word := "missed"
			if v.met {
				word = "met"
			}
			fmt.Fprintf(b, "| %s | %s | %s | %s..%s | %s |\n", v.words, want, significant(v.got.median), significant(v.got.least), significant(v.got.most), word)
		}
	}
}

func (res *results) explain(b *strings.Builder) {
	b.WriteString(`
## What is measured

- A caller asks for one serial, waits for the answer, and asks again. Callers have a connection each, over TCP on
  loopback; or they share one client, which gathers those who wait into one request, one on its way at a time. Where
  others are gathered, it is by the same code.
- nsalloc is nsalloc-server with the etcd in it. Its answers are committed: etcd has synced them to disk before, and
  the server its witness, on the same disk.
- The disk's row is what etcd's log does, without etcd: a block after the other, each synced. Compare what waits for
  a disk with that, on another machine too.
- The unary echo is a gRPC server that answers the same messages from memory, and gRPC's plain client, or ours. The
  stream echo has one stream in both directions, and a message for each batch; gathered by channels it is what a
  program does that has not our client, and with 1000 ids a message nobody waits for one of them.
- The etcd is one member, like the one in our server. Its counter is read and written by all callers; its owner is one
  process that alone writes a counter, in one transaction for all who wait.
- Redis and PostgreSQL are as Debian installs them. "AOF off" keeps nothing over a restart, and nextval logs every 32nd
  value, so that most answers wait for no disk. A client that pipelines gets far more out of Redis, but then no
  caller waits for its answer before the next one asks; gathered INCRBY is what pipelining is to callers who wait.
- etcd commits are transactions that changed something; log entries are all that raft took, with those whose
  comparisons failed.
- CPU is the processor time of the server, with the etcd in it, and that of its callers. PostgreSQL has a process a
  connection, and only its callers' is told.
- A ratio is taken in each round; the middle of those decides.
`)
	var names []string
	for name, why := range res.missing {
		names = append(names, fmt.Sprintf("- %s is missing: %s.\n", name, why))
	}
	sort.Strings(names)
	b.WriteString(strings.Join(names, ""))
	for _, n := range res.notes {
		fmt.Fprintf(b, "- %s\n", n)
	}
	b.WriteString("\n`make bench` makes this page again; `go run ./internal/bench -help` tells how to measure a part of it.\n")
}

// count is a number as people read it.
func count(v float64) string {
	switch {
	case v >= 1e7:
		return fmt.Sprintf("%.0fM", v/1e6)
	case v >= 1e6:
		return fmt.Sprintf("%.2fM", v/1e6)
	case v >= 1e5:
		return fmt.Sprintf("%.0fk", v/1e3)
	case v >= 1e4:
		return fmt.Sprintf("%.1fk", v/1e3)
	}
	return fmt.Sprintf("%.0f", v)
}

// significant keeps two or three digits.
func significant(v float64) string {
	switch a := math.Abs(v); {
	case a == 0:
		return "0"
	case a >= 100:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.3g", v)
	case a < .001:
		return fmt.Sprintf("%.1e", v)
	}
	return fmt.Sprintf("%.2g", v)
}

func duration(ns float64) string {
	d := time.Duration(ns)
	switch {
	case d >= 100*time.Millisecond:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d >= time.Millisecond:
		return fmt.Sprintf("%.3g ms", d.Seconds()*1e3)
	}
	return fmt.Sprintf("%d µs", d.Microseconds())
}
