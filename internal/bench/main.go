// Command bench measures what one serial costs, and puts our figures beside those of others in the same
// run: `make bench` prints the table and writes docs/bench.
//
// Figures of two runs, or of two machines, say little of each other, so that every row is measured here and
// now, in rounds: each round measures each row once, after a warm-up, and begins with another row than the
// one before, so that a machine that slows down slows all. A row shows the median of its rounds and their
// spread. A ratio of two rows is taken within each round.
//
// The load is the same on all: so many callers, each of which asks for one serial, waits for the answer, and
// asks again. Callers have a connection each; or share one client, which gathers those who wait at the same
// time into one request; or they are in 16 processes with one such client each. Servers are processes of
// their own, reached over TCP on loopback; what is durable is on a real disk, with fsync. A peer that is not
// installed is named as missing.
//
// This program is all of it but the real nsalloc-server, Redis and PostgreSQL: it starts itself again for
// the callers, the echo and the etcd, with the role in the environment (role.go). A process that it started
// ends with it.
//
//	go run ./internal/bench -rows '^(nsalloc|echo)/128' -rounds 3 -out ''
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// options are what a run can be told.
type options struct {
	match  *regexp.Regexp // of rows
	rounds int
	warm   time.Duration
	time   time.Duration // that a row is measured for in a round
	most   time.Duration // that the rounds may take; the last ones are left out
	dir    string        // on the disk that is measured
	server string        // nsalloc-server
	out    string        // "" writes nothing
	// profile is a directory for CPU profiles of the callers; "" for none.
	profile string
}

func main() {
	if inRole() {
		return
	}
	var o options
	rows := flag.String("rows", ".", "measure only the rows whose names match this `REGEXP`; -list prints them")
	list := flag.Bool("list", false, "print the names of the rows and end")
	flag.IntVar(&o.rounds, "rounds", 5, "how often each row is measured")
	flag.DurationVar(&o.most, "most", 3*time.Minute+30*time.Second, "begin no round that would probably end later than that")
	flag.DurationVar(&o.time, "time", 500*time.Millisecond, "how long it is measured each time")
	flag.DurationVar(&o.warm, "warm", 250*time.Millisecond, "how long its callers ask before that")
	flag.StringVar(&o.dir, "dir", "/var/tmp", "`DIR` for the data of all servers, on a real disk")
	flag.StringVar(&o.server, "server", "bin/nsalloc-server", "the server, a `FILE`")
	flag.StringVar(&o.out, "out", "docs/bench", "`DIR` for README.md and the chart; '' writes none")
	flag.StringVar(&o.profile, "profile", "", "`DIR` for CPU profiles of the callers, a file a row and process (of the last round)")
	flag.Parse()
	var err error
	if o.match, err = regexp.Compile(*rows); err != nil || flag.NArg() > 0 || o.rounds < 1 || o.time <= 0 || o.warm < 0 {
		fmt.Fprintln(os.Stderr, "usage: bench [-rows REGEXP] [-rounds N] [-most D] [-time D] [-warm D] [-dir DIR] [-server FILE] [-out DIR]:", err)
		os.Exit(2)
	}
	if *list {
		for _, r := range o.rows() {
			fmt.Println(r.name())
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	res, err := run(ctx, o)
	if err != nil {
		stop()
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
	text := res.markdown()
	fmt.Print(text)
	if o.out == "" {
		return
	}
	if err := errors.Join(os.MkdirAll(o.out, 0o755),
		os.WriteFile(filepath.Join(o.out, "README.md"), []byte(text), 0o644),
		os.WriteFile(filepath.Join(o.out, chartName), []byte(res.chart()), 0o644)); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run starts what the rows need, measures them and ends it.
func run(ctx context.Context, o options) (res *results, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(o.dir, &fs); err != nil {
		return nil, fmt.Errorf("-dir %s: %w", o.dir, err)
	}
	if fs.Type == unix.TMPFS_MAGIC {
		return nil, fmt.Errorf("-dir %s is in memory, where fsync costs nothing; name a directory on a disk", o.dir)
	}
	dir, err := os.MkdirTemp(o.dir, "nsalloc-bench-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.Chmod(dir, 0o711); err != nil { // PostgreSQL is not root, and has its own in it
		return nil, err
	}
	res = newResults(o)
	s := &systems{ctx: ctx, dir: dir, server: o.server, started: map[string]*system{}, missing: map[string]string{}}
	defer func() { s.stop() }()
	for _, r := range res.rows {
		if err := s.start(r.on); err != nil {
			return nil, fmt.Errorf("%s: %w", r.on, err)
		}
	}
	res.missing, res.notes = s.missing, s.versions()
	began := time.Now()
	for round := range o.rounds {
		if spent := time.Since(began); round > 0 && o.most > 0 && spent+spent/time.Duration(round) > o.most {
			fmt.Fprintf(os.Stderr, "bench: %d rounds are left out, they would take longer than %s\n", o.rounds-round, o.most)
			break
		}
		for i := range res.rows {
			r := res.rows[(i+round*len(res.rows)/o.rounds)%len(res.rows)]
			if _, ok := s.missing[r.on]; ok {
				continue
			}
			t, err := measure(ctx, o, r, s.started[r.on])
			if ctx.Err() != nil {
				return nil, errors.New("interrupted")
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w", r.name(), err)
			}
			res.trials[r.name()] = append(res.trials[r.name()], t)
		}
		res.rounds = round + 1
		fmt.Fprintf(os.Stderr, "bench: round %d of %d, %s\n", round+1, o.rounds, time.Since(began).Round(time.Second))
	}
	res.took = time.Since(began)
	return res, nil
}

// rows are those that are asked for.
func (o options) rows() (rows []row) {
	for _, r := range allRows() {
		if o.match == nil || o.match.MatchString(r.name()) {
			rows = append(rows, r)
		}
	}
	return rows
}

// first is the first line of a text.
func first(text string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(text), "\n")
	return line
}
