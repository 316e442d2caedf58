package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

func (c *cli) checkCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Verify the promises over the records of a pool",
		Long: `Verify, over all sandboxes, checkpoints and hosts and the pool's record, what those can show:

  P1   no serial was given twice
  P3   each sandbox has had one owner at a time
  P6   each checkpoint was consumed at most once
  P16  a live namespace has exactly one serial

It sees what servers tell. They do not tell the counter, nor which serials were allocated and belong to
nothing, nor the stints of a sandbox before its last 32: a serial that was given twice there is not found.

A finding counts when three looks see it, between which the pool may have moved. Exit code 1 when there
are findings.`,
		Example: "  nsalloc check -o json",
		Args:    usageArgs(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return c.withPool(cmd.Context(), c.check) },
	}
}

// looks is how often records are read before a finding counts. The three lists are of as many revisions,
// so that a hand-off in between can look like a contradiction; one that stays is none of those.
const looks = 3

const (
	// lookPause is the least time between two looks, and between two questions for the store's revision.
	lookPause = 100 * time.Millisecond
	// lookWait bounds the wait for a revision that is newer: where nothing is written none comes.
	lookWait = 500 * time.Millisecond
)

func (c *cli) check(ctx context.Context, p *client.Client) error {
	var records alloc.Records
	var findings []alloc.Finding
	for look := range looks {
		var err error
		if look > 0 {
			if err = moved(ctx, p); err != nil {
				return err
			}
		}
		if records, err = recordsOf(ctx, p); err != nil {
			return err
		}
		now := alloc.Check(records)
		if look > 0 {
			now = common(findings, now)
		}
		if findings = now; len(findings) == 0 {
			break
		}
	}
	namespaces := 0
	for _, s := range records.Sandboxes {
		namespaces += len(s.Bindings)
	}
	if err := c.printFindings(records, namespaces, findings); err != nil {
		return err
	}
	if len(findings) > 0 {
		return silent(exitError)
	}
	return nil
}

// moved waits until something was written, or lookWait has passed: records that are read again at once
// are often the same, from the same moment of the same cache, and would confirm nothing.
func moved(ctx context.Context, p *client.Client) error {
	_, before, err := p.Pool(ctx)
	if err != nil {
		return err
	}
	ask := time.NewTicker(lookPause)
	defer ask.Stop()
	enough := time.NewTimer(lookWait)
	defer enough.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-enough.C:
			return nil
		case <-ask.C:
		}
		_, now, err := p.Pool(ctx)
		if err != nil || now > before {
			return err
		}
	}
}

func recordsOf(ctx context.Context, p *client.Client) (r alloc.Records, err error) {
	if r.Sandboxes, err = all(p.Sandboxes(ctx, client.Filter{Linearizable: true})); err != nil {
		return r, err
	}
	if r.Checkpoints, err = all(p.Checkpoints(ctx, 0)); err != nil {
		return r, err
	}
	if r.Hosts, err = all(p.Hosts(ctx)); err != nil {
		return r, err
	}
	r.Pool, _, err = p.Pool(ctx)
	return r, err
}

// common is the findings of both looks.
func common(before, now []alloc.Finding) []alloc.Finding {
	seen := map[alloc.Finding]bool{}
	for _, f := range before {
		seen[f] = true
	}
	var both []alloc.Finding
	for _, f := range now {
		if seen[f] {
			both = append(both, f)
		}
	}
	return both
}

type findingDoc struct {
	Promise  string `json:"promise"`
	Subject  string `json:"subject"`
	Evidence string `json:"evidence"`
	Fix      string `json:"fix"`
}

func (c *cli) printFindings(r alloc.Records, namespaces int, findings []alloc.Finding) error {
	doc := struct {
		Sandboxes   int          `json:"sandboxes"`
		Namespaces  int          `json:"namespaces"`
		Checkpoints int          `json:"checkpoints"`
		Hosts       int          `json:"hosts"`
		Findings    []findingDoc `json:"findings"`
	}{len(r.Sandboxes), namespaces, len(r.Checkpoints), len(r.Hosts), []findingDoc{}}
	a := answer{}
	for _, f := range findings {
		doc.Findings = append(doc.Findings, findingDoc(f))
		a.names = append(a.names, f.Subject)
	}
	a.doc = doc
	sum := fmt.Sprintf("%s, %s, %s", count(len(r.Sandboxes), "sandbox", "sandboxes"),
		count(namespaces, "namespace", "namespaces"), count(len(r.Checkpoints), "checkpoint", "checkpoints"))
	paint := c.paint(c.out)
	if len(findings) == 0 {
		a.lines = sum + ": " + paint.do(styleGood, "no findings") + "\n"
		return c.print(a)
	}
	// Evidence is a sentence: in a column of its own it would be cut where it matters.
	a.lines = sum + ": " + paint.do(styleBad, count(len(findings), "finding", "findings")) + "\n"
	for _, f := range findings {
		a.lines += fmt.Sprintf("\n%s  %s\n     %s\n     Fix: %s\n", paint.do(styleBad, fmt.Sprintf("%-3s", f.Promise)),
			paint.do(styleHead, printable(f.Subject)), printable(f.Evidence), printable(f.Fix))
	}
	return c.print(a)
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
