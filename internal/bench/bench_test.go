package main

import (
	"encoding/xml"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestMain is the program where the bench starts itself in a role.
func TestMain(m *testing.M) {
	if inRole() {
		return
	}
	os.Exit(m.Run())
}

// TestSmoke runs the rows that targets name for a moment: real server, real etcd.
func TestSmoke(t *testing.T) {
	server := filepath.Join(t.TempDir(), "nsalloc-server")
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-o", server, "../../cmd/nsalloc-server")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	rows := []string{"nsalloc/16-processes", "etcd-owner/128-shared"}
	for _, v := range targets {
		rows = append(rows, v.ours, v.other)
	}
	o := options{match: regexp.MustCompile("^(" + strings.Join(rows, "|") + ")$"),
		rounds: 1, warm: 20 * time.Millisecond, time: 50 * time.Millisecond, dir: "/var/tmp", server: server}
	res, err := run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if len(res.rows) < 12 {
		t.Fatalf("%d rows", len(res.rows))
	}
	for _, r := range res.rows {
		if len(res.trials[r.name()]) != 1 {
			t.Fatalf("%s has %d trials", r.name(), len(res.trials[r.name()]))
		}
		got := res.trials[r.name()][0]
		if got.rate <= 0 || got.p50 <= 0 || got.p99 < got.p50 {
			t.Errorf("%s: %+v", r.name(), got)
		}
	}
	for _, v := range res.verdicts() {
		if !v.found {
			t.Errorf("target %q was not measured", v.words)
		}
	}
	wellFormed(t, res.chart())
}

func wellFormed(t *testing.T, text string) {
	t.Helper()
	for d := xml.NewDecoder(strings.NewReader(text)); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// TestRows: what a row or a target names is there.
func TestRows(t *testing.T) {
	names := map[string]bool{}
	for _, r := range allRows() {
		if names[r.name()] {
			t.Errorf("%s stands twice", r.name())
		}
		names[r.name()] = true
		if openers[r.ask] == nil || r.on != "" && starters[r.on] == nil {
			t.Errorf("%s: nobody asks %q, or starts %q", r.name(), r.ask, r.on)
		}
		if n := max(r.load.Processes, 1); r.load.Callers%n != 0 {
			t.Errorf("%s: %d callers in %d processes", r.name(), r.load.Callers, n)
		}
	}
	for _, v := range targets {
		if !names[v.ours] || !names[v.other] {
			t.Errorf("target %q: no row is called %s or %s", v.words, v.ours, v.other)
		}
	}
}

// TestReport: a peer that is missing is named, and a target is judged by the middle of the rounds' ratios.
func TestReport(t *testing.T) {
	res := newResults(options{rounds: 3})
	res.missing = map[string]string{"postgres": errMissing.Error()}
	for i := range 3 {
		res.trials["nsalloc/128"] = append(res.trials["nsalloc/128"], trial{rate: float64(70 + 10*i), p50: time.Millisecond})
		res.trials["echo/128"] = append(res.trials["echo/128"], trial{rate: 100, p50: time.Millisecond})
		res.trials["etcd-counter/128"] = append(res.trials["etcd-counter/128"], trial{rate: 1, p50: time.Millisecond})
	}
	text := res.markdown()
	for _, want := range []string{
		"| PostgreSQL nextval | 1 caller | missing: not installed",
		"| 128 callers, of the unary echo | at least 0.7 | 0.8 | 0.7..0.9 | met |",
		"| 128 callers, of the etcd counter | at least 100 | 80 | 70..90 | missed |",
		"| 1 caller, p50 beyond one etcd Put, ms | at most 1 | | | not measured |",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
	wellFormed(t, res.chart())
}

func TestHistogram(t *testing.T) {
	h, other := newHistogram(), newHistogram()
	var all []time.Duration
	for i := range 10_000 {
		d := time.Duration(rand.Int64N(int64(time.Second)))
		if i%2 == 0 {
			d /= 1000
		}
		all = append(all, d)
		if i%3 == 0 {
			other.add(d)
		} else {
			h.add(d)
		}
	}
	h.merge(other)
	slices.Sort(all)
	for _, q := range []float64{.01, .25, .5, .75, .99, 1} {
		got, want := h.quantile(q), all[max(int(q*float64(len(all)))-1, 0)]
		if diff := got - want; diff.Abs() > want/30+1 {
			t.Errorf("quantile %v is %v, not %v", q, got, want)
		}
	}
	if h = newHistogram(); h.quantile(.5) != 0 {
		t.Error("of nothing")
	}
	h.add(time.Hour)
	if h.quantile(.5) < time.Minute {
		t.Error("longer than the last bucket:", h.quantile(.5))
	}
}
