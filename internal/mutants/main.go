// Command mutants breaks the code on purpose, one line at a time, and shows that a test notices: `make
// mutants` prints the score. A mutant that no test notices is a promise that nobody keeps.
//
// The list is in Go (list.go). A mutation names the exact text that it replaces, which stands exactly once
// in its file, and the test that must fail. The tree is never touched: `go test -overlay` sees the broken
// file in the place of the real one. Each named test has to pass first without a mutation; a mutant counts
// as caught when that very test fails, and not when the mutant does not compile, or hangs.
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
				results[i] = list[i].try(ctx, filepath.Join(dir, fmt.Sprint(i)))
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
		results, out, err := run(ctx, pkg, strings.Join(slices.Compact(tops), "|"))
		for _, name := range names {
			if results[name] != "pass" {
				return fmt.Errorf("%s %s does not pass while nothing is broken (%v):\n%s", pkg, name, err, out)
			}
		}
	}
	return nil
}

// try breaks the code and runs the test; "" when it fails as it has to, else what happened.
func (m mutation) try(ctx context.Context, dir string) string {
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
	results, out, err := run(ctx, m.pkg, strings.Join(parts, "/"), "-overlay="+overlay, "-vet=off", "-failfast")
	switch got := results[m.test]; {
	case ctx.Err() != nil:
		return "interrupted"
	case got == "fail" && !strings.Contains(out, "panic: test timed out"):
		return ""
	case got == "pass":
		return "NOT CAUGHT"
	default:
		return fmt.Sprintf("NOT TRIED: the test did not end (%v): %.2000s", err, out)
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

// run runs tests of a package. It gives what became of each, and all that was printed.
func run(ctx context.Context, pkg, tests string, flags ...string) (results map[string]string, out string, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	args := append([]string{"test", "-json", "-count=1", "-timeout", (patience - 10*time.Second).String(), "-run", tests}, flags...)
	cmd := exec.CommandContext(ctx, "go", append(args, "./"+pkg)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	cmd.WaitDelay = 10 * time.Second
	printed, err := cmd.CombinedOutput()
	results = map[string]string{}
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
			results[event.Test] = event.Action
		}
	}
	return results, all.String(), err
}
