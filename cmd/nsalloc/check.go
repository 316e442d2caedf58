package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/nsalloc/nsalloc/pkg/alloc"
	"github.com/nsalloc/nsalloc/pkg/client"
)

func (c *cli) checkCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check",
		Short: "Verify the promises over the records of a pool",
		Long: `Verify, over every record of the pool as of one moment, what those can show:

  P1      no serial was given twice, or can be
  P3      each sandbox has had one owner at a time
  P6      each checkpoint was consumed at most once
  P16     a live namespace has exactly one serial
  RECORD  each record can be read

A finding comes with its evidence, with what mending it costs, and with the command that mends it. Run
them in the order in which they are shown, and check again: one often mends several.

Exit code 1 when there are findings.`,
		Example: `  nsalloc check
  nsalloc check -o json`,
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c.takesLong(cmd)
			return c.withPool(cmd.Context(), c.check)
		},
	}
}

func (c *cli) check(ctx context.Context, p *client.Client) error {
	report, err := p.Check(ctx)
	if err != nil {
		return err
	}
	return c.reported(report)
}

// reported prints a report; findings are an error that has been said.
func (c *cli) reported(r alloc.Report) error {
	if err := c.printReport(r); err != nil {
		return err
	}
	if r.Total > 0 {
		return silent(exitError)
	}
	return nil
}

type findingDoc struct {
	Promise  string   `json:"promise"`
	Subject  string   `json:"subject"`
	Evidence string   `json:"evidence"`
	Fix      string   `json:"fix"`
	Mend     []string `json:"mend"`
}

func (c *cli) printReport(r alloc.Report) error {
	doc := struct {
		Revision    int64        `json:"revision"`
		Sandboxes   int          `json:"sandboxes"`
		Namespaces  int          `json:"namespaces"`
		Checkpoints int          `json:"checkpoints"`
		Hosts       int          `json:"hosts"`
		Aside       int          `json:"aside"`
		Total       int          `json:"total"`
		Findings    []findingDoc `json:"findings"`
	}{int64(r.Revision), r.Sandboxes, r.Namespaces, r.Checkpoints, r.Hosts, r.Aside, r.Total, []findingDoc{}}
	a := answer{}
	for _, f := range r.Findings {
		d := findingDoc{f.Promise, f.Subject, f.Evidence, f.Fix, f.Mend}
		if len(d.Mend) == 0 {
			d.Mend = []string{} // none, and not null
		} else if name := alloc.CommandLine(d.Mend[1:]); !slices.Contains(a.names, name) {
			a.names = append(a.names, name)
		}
		doc.Findings = append(doc.Findings, d)
	}
	a.doc = doc
	a.lines = c.reportText(r)
	return c.print(a)
}

func (c *cli) reportText(r alloc.Report) string {
	text := fmt.Sprintf("%s, %s, %s", count(r.Sandboxes, "sandbox", "sandboxes"),
		count(r.Namespaces, "namespace", "namespaces"), count(r.Checkpoints, "checkpoint", "checkpoints"))
	if r.Aside > 0 {
		text += fmt.Sprintf(" (%s put aside)", count(r.Aside, "record", "records"))
	}
	paint := c.paint(c.out)
	if r.Total == 0 {
		return text + ": " + paint.do(styleGood, "no findings") + "\n"
	}
	text += ": " + paint.do(styleBad, count(r.Total, "finding", "findings"))
	if n := len(r.Findings); n < r.Total {
		text += fmt.Sprintf(", of which the first %d are", n)
	}
	text += "\n"
	// Evidence is a sentence: in a column of its own it would be cut where it matters.
	const margin = 5
	most, _ := terminalWidth(c.out)
	for _, f := range r.Findings {
		text += fmt.Sprintf("\n%s  %s\n     %s\n     %s\n", paint.do(styleBad, fmt.Sprintf("%-3s", f.Promise)), paint.do(styleHead, printable(f.Subject)),
			wrap(printable(f.Evidence), most, margin), wrap(printable(f.Fix), most, margin))
		if len(f.Mend) > 0 { // in one line, to be copied
			text += "     Mend: " + paint.do(styleKey, printable("nsalloc "+alloc.CommandLine(f.Mend))) + "\n"
		}
	}
	return text
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
