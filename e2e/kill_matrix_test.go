package e2e

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/nsalloc/nsalloc/internal/kernelns"
	"github.com/nsalloc/nsalloc/internal/killpoint"
	"github.com/nsalloc/nsalloc/internal/testpool"
)

// killCells selects cells by a regular expression over their names; empty is the selection of every test
// run, and "." is all of them (make kill-matrix).
const killCells = "NSALLOC_KILL_CELLS"

// allCells is how many cells the matrix has. The test counts them; a point, or a place where one is passed,
// that goes away is noticed here.
const allCells = 394

// everyRun is the fixed selection: some of each process, with the store's answers and without.
const everyRun = `^(` +
	`server/(Open|Bind)/committed server( lost)?|server/Confirm/committing server lost|server/Grant/committed server|` +
	`agent/checkpoint/recorded source|agent/Open/received source lost|agent/post-dump/verdict-recorded source lost|` +
	`agent/Confirm/sending source|agent/Confirm/received source lost|agent/untaken/recorded source|` +
	`agent/claim/recorded target lost|agent/Claim/received target|agent/Bind/received target|agent/post-restore/answering target|` +
	`agent/parked/ended target lost|agent/identity/recorded target|agent/new-life/recorded source lost|` +
	`agent/serials/recorded source born-away|agent/Register/received source part lost|server/Bind/committed server late|agent/Release/received target orphan|` +
	`server/witness/recording server lost|server/(life|generation)/committed server|` +
	`hook/post-dump/answered source|hook/post-restore/(asked|answered) target lost` +
	`)$`

// TestKillMatrix kills server, agents and hook at every point, each once with the store's answers lost and
// once not, starts again what was killed, and expects within ten seconds that the processes that are seen
// and the store agree: one live copy at most, owned by the host where it runs, and else images that restore.
func TestKillMatrix(t *testing.T) {
	cells := matrix(t)
	pattern := everyRun
	if set := os.Getenv(killCells); set != "" {
		pattern = set
	}
	selected, err := regexp.Compile(pattern)
	if err != nil {
		t.Fatal(err)
	}
	m := &killMatrix{t: t, bin: buildWithPoints(t)}
	t.Cleanup(m.close)
	began := time.Now()
	for _, c := range cells {
		if selected.MatchString(c.String()) {
			m.cell(c)
		}
	}
	t.Logf("%d of %d cells in %v, %v each\n%s", len(m.rows), len(cells), time.Since(began).Round(time.Second),
		(time.Since(began) / time.Duration(max(1, len(m.rows)))).Round(10*time.Millisecond), m.table())
	if len(m.rows) == 0 {
		t.Errorf("%s=%s selects no cell", killCells, pattern)
	}
}

// matrix lists every cell: each point wherever it is passed, twice.
func matrix(t *testing.T) []cell {
	t.Helper()
	var cells []cell
	for _, p := range killpoint.All() {
		at := places(p)
		if len(at) == 0 {
			t.Errorf("point %s has no cell", p)
		}
		for _, pl := range at {
			if _, ok := journeys[pl.journey]; !ok {
				t.Fatalf("there is no journey %q", pl.journey)
			}
			cells = append(cells, cell{p, pl, false}, cell{p, pl, true})
			if want, _ := (cell{p, pl, false}).mayShow(""); want == "" {
				t.Errorf("nothing says what a cell of %s %s may show", p, pl.role)
			}
		}
	}
	for _, l := range lostFirst {
		if !slices.ContainsFunc(cells, func(c cell) bool { return regexp.MustCompile(l.cells).MatchString(c.name()) }) {
			t.Errorf("what %s loses first is of no cell", l.cells)
		}
	}
	for _, e := range expected {
		if !slices.ContainsFunc(cells, func(c cell) bool { return regexp.MustCompile(e.cells).MatchString(c.name()) }) {
			t.Errorf("what is expected of %s is of no cell", e.cells)
		}
	}
	if len(cells) != allCells {
		t.Errorf("the matrix has %d cells, not %d", len(cells), allCells)
	}
	return cells
}

func buildWithPoints(t *testing.T) string {
	t.Helper()
	needHosts(t)
	dir := t.TempDir()
	cmd := exec.Command("go", "build", "-tags", "killpoints", "-o", dir+"/", "../cmd/nsalloc", "../cmd/nsalloc-agent", "../cmd/nsalloc-hook", "../cmd/nsalloc-server")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return dir
}

// killMatrix runs cells one after the other, in one pool for as long as they pass.
type killMatrix struct {
	t    *testing.T
	bin  string
	pool *testpool.Pool
	rows []row
	n    int
}

type row struct {
	cell
	result
	failed bool
}

func (m *killMatrix) cell(c cell) {
	m.n++
	m.t.Run(strings.NewReplacer("/", ".", " ", ",").Replace(c.String()), func(t *testing.T) {
		p := m.started(t)
		m.forgetLogs(t)
		kernel, err := kernelns.Open("/proc")
		if err != nil {
			t.Fatal(err)
		}
		id := fmt.Sprintf("kill%d", m.n)
		r := &cellRun{cell: c, p: p, kernel: kernel, j: journeys[c.journey], container: &container{p: p, id: id, bundle: killBundle, images: "/var/lib/images/" + id}}
		defer func() {
			m.rows = append(m.rows, row{c, r.result, t.Failed()})
			if t.Failed() {
				t.Log(p.Logs())
			}
			if t.Failed() || r.j.last { // what it left must not disturb the next
				m.close()
			}
		}()
		r.run()
	})
}

// started is the pool, made anew after a cell that failed.
func (m *killMatrix) started(t *testing.T) *pool {
	t.Helper()
	if m.pool == nil {
		ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
		defer cancel()
		p, err := testpool.Start(ctx, testpool.Options{
			Bin: m.bin, Hosts: []string{"a", "b"}, Log: io.Discard, Killpoints: true, AgentArgs: []string{"--sweep-interval", "250ms"},
		})
		if err != nil {
			t.Fatal(err)
		}
		m.pool = p
		(&pool{Pool: p, t: t}).killBundles()
	}
	return &pool{Pool: m.pool, t: t}
}

// forgetLogs lets a failure show its own cell's logs.
func (m *killMatrix) forgetLogs(t *testing.T) {
	paths, err := filepath.Glob(filepath.Join(m.pool.Dir(), "*.log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		if err := os.Truncate(path, 0); err != nil { // the daemons append
			t.Fatal(err)
		}
	}
}

func (m *killMatrix) close() {
	if m.pool != nil {
		if err := m.pool.Close(); err != nil {
			m.t.Error(err)
		}
		m.pool = nil
	}
}

func (r row) losses() string {
	if !r.lost {
		return ""
	}
	say := func(rpcs []string) string { return cmp.Or(strings.Join(rpcs, " "), "none") }
	return say(r.before) + "; " + say(r.after)
}

func (m *killMatrix) table() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "cell\thit\tlost before; after it struck\tseen when they agreed\tended\tafter\ttook\t")
	hits, failed := 0, 0
	for _, r := range m.rows {
		mark := ""
		if r.hit {
			hits++
		}
		if r.failed {
			failed++
			mark = "FAILED"
		}
		fmt.Fprintf(w, "%s\t%v\t%s\t%s\t%s\t%.1f s\t%.1f s\t%s\n", r.cell, r.hit, r.losses(), r.verdict, r.where, r.agreed.Seconds(), r.took.Seconds(), mark)
	}
	_ = w.Flush()
	fmt.Fprintf(&b, "cells %d, hit %d, failed %d\n", len(m.rows), hits, failed)
	return b.String()
}
