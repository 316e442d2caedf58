// Command mutants breaks the code on purpose, one line at a time, and shows that a test notices: `make
// mutants` prints the score. A mutant that no test notices is a promise that nobody keeps.
//
// The list is in Go (list.go). A mutation names the exact text that it replaces, which stands exactly once
// in its file, and the test that must fail. The tree is never touched: `go test -overlay` sees the broken
// file in the place of the real one. Each named test has to pass first without a mutation; a mutant counts
// as caught when that very test fails by what it asserts, and not when the mutant does not compile, hangs, or
// takes the process of the test down: a panic is noticed by whatever test comes by, and says nothing of the
// promise. A mutation whose true symptom is a panic says which.
//
// A list that no longer fits the code is found by this package's own test, as a part of `make test`.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"
)

// mutation is one way to break the code.
type mutation struct {
	what string // what it breaks, in words
	file string // relative to the module
	old  string // stands exactly once in the file
	new  string
	pkg  string // of the test, relative to the module
	test string // NAME or NAME/SUBTEST: it fails then
}

// patience bounds one test run, compilation included.
const patience = 4 * time.Minute

func main() {
	only := flag.String("run", "", "try only the mutations whose words match this regular expression")
	workers := flag.Int("workers", 2, "how many to try at the same time")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	match, err := regexp.Compile(*only)
	if err != nil || flag.NArg() > 0 || *workers < 1 {
		fmt.Fprintln(os.Stderr, "usage: mutants [-run REGEXP] [-workers N]:", err)
		os.Exit(2)
	}
	chosen := slices.DeleteFunc(slices.Clone(mutations), func(m mutation) bool { return !match.MatchString(m.what) })
	if err := score(ctx, chosen, *workers); err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

// score tries all mutations and prints the table. The error says that one was not caught.
func score(ctx context.Context, list []mutation, workers int) error {
	began := time.Now()
	dir, err := os.MkdirTemp("", "mutants")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := unbroken(ctx, list); err != nil {
		return err
	}
	results := make([]string, len(list))
	next := make(chan int)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := range next {
				results[i] = list[i].try(ctx, filepath.Join(dir, fmt.Sprint(i)), panicking[list[i].what])
			}
		})
	}
	for i := range list {
		next <- i
	}
	close(next)
	wg.Wait()
	caught := 0
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	for i, m := range list {
		if results[i] == "" {
			caught++
			results[i] = "caught"
		}
		fmt.Fprintf(w, "%s\t%s %s\t%s\n", m.what, m.pkg, m.test, results[i])
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Printf("%d of %d mutants caught in %s\n", caught, len(list), time.Since(began).Round(time.Second))
	if caught < len(list) {
		return fmt.Errorf("%d were not caught: write the test that misses them", len(list)-caught)
	}
	return nil
}

// unbroken proves that the named tests pass as long as nothing is broken, a package at a time.
func unbroken(ctx context.Context, list []mutation) error {
	tests := map[string][]string{}
	for _, m := range list {
		if !slices.Contains(tests[m.pkg], m.test) {
			tests[m.pkg] = append(tests[m.pkg], m.test)
		}
	}
	for pkg, names := range tests {
		var tops []string
		for _, name := range names {
			top, _, _ := strings.Cut(name, "/")
			tops = append(tops, "^"+top+"$")
		}
		slices.Sort(tops)
		o := run(ctx, pkg, strings.Join(slices.Compact(tops), "|"))
		for _, name := range names {
			if o.results[name] != "pass" {
				return fmt.Errorf("%s %s does not pass while nothing is broken (%v):\n%s", pkg, name, o.err, o.printed)
			}
		}
	}
	return nil
}

// try breaks the code and runs the test; "" when it fails as it has to, else what happened. Where panics is not
// "", it is a part of what the code has to panic with.
func (m mutation) try(ctx context.Context, dir, panics string) string {
	text, err := m.mutated()
	if err != nil {
		return err.Error()
	}
	file, err := filepath.Abs(m.file)
	if err != nil {
		return err.Error()
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err.Error()
	}
	broken, overlay := filepath.Join(dir, filepath.Base(m.file)), filepath.Join(dir, "overlay.json")
	replace, err := json.Marshal(map[string]any{"Replace": map[string]string{file: broken}})
	if err != nil {
		return err.Error()
	}
	for name, b := range map[string][]byte{broken: text, overlay: replace} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			return err.Error()
		}
	}
	var parts []string
	for name := range strings.SplitSeq(m.test, "/") {
		parts = append(parts, "^"+regexp.QuoteMeta(name)+"$")
	}
	o := run(ctx, m.pkg, strings.Join(parts, "/"), "-overlay="+overlay, "-vet=off", "-failfast")
	switch {
	case ctx.Err() != nil:
		return "interrupted"
	case strings.HasPrefix(o.panicked, "panic: test timed out"):
		return fmt.Sprintf("NOT TRIED: the test did not end: %.2000s", o.printed)
	case o.panicked != "" && panics != "" && strings.Contains(o.panicked, panics):
		return ""
	case o.panicked != "":
		return fmt.Sprintf("PANICKED, which no assertion has noticed: %.2000s", o.panicked)
	case panics != "" && o.asserted[m.test]:
		return "NO PANIC, and the list says that there is one: " + panics
	case o.asserted[m.test]:
		return ""
	case o.results[m.test] == "pass":
		return "NOT CAUGHT"
	default:
		return fmt.Sprintf("NOT TRIED: the test did not end (%v): %.2000s", o.err, o.printed)
	}
}

// mutated is the file's text with the mutation in it. The error says that the list is stale.
func (m mutation) mutated() ([]byte, error) {
	text, err := os.ReadFile(m.file)
	if err != nil {
		return nil, err
	}
	if n := bytes.Count(text, []byte(m.old)); n != 1 {
		return nil, fmt.Errorf("stale: %q stands %d times in %s, not once; bring internal/mutants/list.go up to date", m.old, n, m.file)
	}
	return bytes.Replace(text, []byte(m.old), []byte(m.new), 1), nil
}

// outcome is what a run of tests has shown.
type outcome struct {
	results map[string]string // pass or fail, by test
	// asserted are the tests that were told failed by the process that ran them, and so by themselves: when that
	// process goes in the middle, it is said of them by others.
	asserted map[string]bool
	panicked string // how the process panicked, with where; "" when it did not
	printed  string // all of it
	err      error
}

// run runs tests of a package.
func run(ctx context.Context, pkg, tests string, flags ...string) outcome {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	args := append([]string{"test", "-json", "-count=1", "-timeout", (patience - 10*time.Second).String(), "-run", tests}, flags...)
	cmd := exec.CommandContext(ctx, "go", append(args, "./"+pkg)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	cmd.WaitDelay = 10 * time.Second
	printed, err := cmd.CombinedOutput()
	o := outcome{results: map[string]string{}, asserted: map[string]bool{}, err: err}
	var all strings.Builder
	lines := bufio.NewScanner(bytes.NewReader(printed))
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var event struct{ Action, Test, Output string }
		if json.Unmarshal(lines.Bytes(), &event) != nil {
			all.Write(append(lines.Bytes(), '\n'))
			continue
		}
		all.WriteString(event.Output)
		if event.Test != "" && (event.Action == "pass" || event.Action == "fail") {
			o.results[event.Test] = event.Action
		}
		if name, ok := strings.CutPrefix(strings.TrimSpace(event.Output), "--- FAIL: "); ok {
			name, _, _ = strings.Cut(name, " ")
			o.asserted[name] = true
		}
	}
	o.printed = all.String()
	// What a test says is indented; this is the runtime's.
	if at := crashes.FindStringIndex(o.printed); at != nil {
		o.panicked = o.printed[at[0]:]
	}
	return o
}

var crashes = regexp.MustCompile(`(?m)^(panic|fatal error): `)
